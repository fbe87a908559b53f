"""What both sides of a benchmark share: the work, and how it is timed. Imports neither framework.

A workload is a plain dict (it goes to each side as JSON): the suite, sizes, and the settings of
`config` that the other side has to know. Shapes are (batch, *space, channels).
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

WEIGHTS, GRADIENTS, INPUTS = "weights", "gradients", "inputs.npz"


def describe(config: ConfigDict, suite: str, **sizes: Any) -> dict[str, Any]:
    """The workload of a config. `sizes`: batch, warmup, repeats, sync_every, sample_steps, seed,
    devices."""
    optim = config.optim
    work = {
        "suite": suite,
        "config": config.to_dict(),
        "optim": {k: optim[k] for k in ("b1", "b2", "eps", "weight_decay", "clip_norm")}
        | {"learning_rate": optim.learning_rate},
        "ema_decay": config.ema.decay,
        "dtype": config.model.dtype,
        **sizes,
    }
    if suite == "autoencoder":
        loss = config.loss
        work |= {k: loss[k] for k in ("reconstruction", "reduction", "kl_weight")}
    return work


def inputs(work: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random arrays of the named shapes (never zeros: some kernels are faster on those)."""
    rng = np.random.default_rng(work["seed"])
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def timed(call: Callable[[], Any], wait: Callable[[], Any], work: dict[str, Any]) -> dict[str, Any]:
    """Runs `call` over and over. `wait` returns when all that was asked for is done.

    `first_secs`: of the first call, compilation included. `secs`: of each later one after the
    warm-up; where the device runs ahead of the host, means over `sync_every` calls.
    """
    started = time.perf_counter()
    call()
    wait()
    first = time.perf_counter() - started
    for _ in range(work["warmup"]):
        call()
    wait()
    every, secs = work["sync_every"], []
    for _ in range(work["repeats"]):
        started = time.perf_counter()
        for _ in range(every):
            call()
        wait()
        secs.append((time.perf_counter() - started) / every)
    return {"first_secs": first, "secs": secs}


def resident_bytes() -> int:
    """The most memory this process has held.

    From Linux's VmHWM: `ru_maxrss` begins at what the process that started this one held, so under
    a large parent it does not grow at all.
    """
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status names no VmHWM: memory is measured on Linux only")


def summary(secs: list[float]) -> dict[str, float]:
    """Median, and the tenth and ninetieth percentiles."""
    p10, median, p90 = np.percentile(secs, (10, 50, 90))
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}
