"""What a U-Net's fields and inputs must be; `unet.py` has what they are."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array


def check(unet: Any, x: Array, context: Any, labels: Any, vector: Any = None) -> None:
    """ValueError where fields contradict each other or the inputs."""
    for key in ("attention", "blocks", "heads", "head_dim", "transformer_depth"):
        value = getattr(unet, key)
        if isinstance(value, tuple | list) and len(value) != unet.levels:
            raise ValueError(
                f"{key}={value} has {len(value)} entries but multipliers={unet.multipliers} "
                f"has {unet.levels}: give one entry a level"
            )
    factor, space = 2 ** (unet.levels - 1), x.shape[1:-1]
    if any(size % factor for size in space):
        raise ValueError(
            f"input size {tuple(space)} cannot be halved {unet.levels - 1} times, as the "
            f"U-Net's {unet.levels} levels need: pad or crop every axis to a multiple of "
            f"{factor}, or use fewer levels"
        )
    for key, given, what in (("num_classes", labels, "labels are"), ("vector", vector, "one is")):
        if (getattr(unet, key) in (None, False)) != (given is None):
            said = f"{key}={getattr(unet, key)} but {what} {'not ' * (given is None)}given"
            raise ValueError(f"{said}: pass such exactly where {key} is set")
    if unet.pool_context and context is None:
        raise ValueError("pool_context=True needs a context: pass one, or set it to False")


def check_residuals(residuals: Sequence[Array], skips: Sequence[Array]) -> None:
    """ValueError where a ControlNet's are not one a skip and one for the middle."""
    if len(residuals) != len(skips) + 1:
        raise ValueError(
            f"{len(residuals)} residuals for {len(skips)} skips and the middle: give one each"
        )
