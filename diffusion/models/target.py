"""What a program is traced for. It chooses kernels, and is handed in by whoever compiles.

A network does not ask which devices are there: the same step is compiled for hardware that is not.
Where nothing is handed in, kernels are XLA's own, which every platform has.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Target:
    """`platform`: "cpu", "gpu" or "tpu"; "": any. devices: over which the program is partitioned.

    cudnn_head_dim: the widest head of cuDNN's flash attention there, 0: it has none. mesh: of a
    program that is partitioned by the compiler, which splits no kernel that is not its own.
    forward_mode: of a program that is differentiated by `jax.jvp`, which custom gradients lack.
    """

    platform: str = ""
    devices: int = 1
    cudnn_head_dim: int = 0
    mesh: Mesh | None = None
    forward_mode: bool = False


ANY = Target()  # what is traced for where nothing is handed in
_current: contextvars.ContextVar[Target] = contextvars.ContextVar("target")


def current() -> Target:
    return _current.get(ANY)


@contextlib.contextmanager
def handed(target: Target) -> Iterator[None]:
    token = _current.set(target)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """What is traced inside has kernels that `jax.jvp` takes."""
    with handed(dataclasses.replace(current(), forward_mode=True)):
        yield


def of(devices: Sequence[Any], mesh: Mesh | None = None) -> Target:
    """The target of these devices, which may be of a topology that is not here.

    cuDNN's flash attention takes heads of 256 from compute capability 9.0 on (Hopper), of 128
    before; ROCm says "gfx90a" and has none.
    """
    platform = devices[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    width = 0
    if platform == "gpu":
        with contextlib.suppress(TypeError, ValueError):
            width = 256 if float(getattr(devices[0], "compute_capability", "")) >= 9.0 else 128
    return Target(platform, len(devices), width, mesh)


def aimed(function: Callable, devices: Sequence[Any], mesh: Mesh | None = None) -> Callable:
    """`function`, whenever it is traced, for these devices."""
    target = of(devices, mesh)

    @functools.wraps(function)
    def traced(*arguments: Any, **named: Any) -> Any:
        with handed(target):
            return function(*arguments, **named)

    return traced
