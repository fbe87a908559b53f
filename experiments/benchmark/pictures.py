"""Pictures a second of trained runs as they are sampled: text encoder, sampler and decoder.

The first run may be sampled by several numbers of steps, the others as their configs say; "times"
is the speed over that of the last, a teacher say. They take turns, so that whatever else the
machine does slows all of them.
"""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion.wording import Progress
from experiments.evaluate.samples import Run, Samples
from experiments.run import generate

BLOCK_SECS = 0.5  # of calls timed together


def sampler(run: Run, batch: int, seed: int) -> Callable[[], Any]:
    """Makes `batch` pictures; compiled by its first call."""
    pipeline = run.model.pipeline
    columns = Samples(run, batch, seed=seed).columns(batch)
    rows = {name: np.resize(rows, (batch, *rows.shape[1:])) for name, rows in columns.items()}
    numbers = np.full(batch, seed, np.uint32), np.arange(batch, dtype=np.int32)
    params, given = jax.device_put(pipeline.params), jax.device_put((*numbers, rows))
    make = pipeline.compiled()
    return lambda: jax.block_until_ready(make(params, *given))


def pictures(
    workdirs: Sequence[str], steps: Sequence[int], batch: int, rounds: int, seed: int
) -> dict[str, Any]:
    """A row a run and number of steps; medians and bests over `rounds`."""
    first, *others = (pathlib.Path(directory) for directory in workdirs)
    runs = [Run(first, options={"steps": n}) for n in steps or (None,)]
    runs += [Run(directory) for directory in others]
    makers = [sampler(run, batch, seed) for run in runs]
    counts = []
    for make in makers:
        make()
        started = time.perf_counter()
        make()
        counts.append(max(1, round(BLOCK_SECS / (time.perf_counter() - started))))
    rates: list[list[float]] = [[] for _ in runs]
    progress = Progress("rounds", rounds, every_secs=0)
    for turn in range(rounds):
        for make, count, found in zip(makers, counts, rates, strict=True):
            started = time.perf_counter()
            for _ in range(count):
                make()
            found.append(count * batch / (time.perf_counter() - started))
        progress.at(turn + 1)
    rows = []
    for run, found in zip(runs, rates, strict=True):
        how, evaluations = run.model.pipeline.how, generate.evaluations(run.model.pipeline)
        named = {name: getattr(how, name) for name in ("sampler", "steps", "guidance_scale")}
        rate = {"images_per_sec": float(np.median(found)), "best": max(found)}
        times = rate["images_per_sec"] / float(np.median(rates[-1]))
        row = {"run": run.directory.name, **named, "evaluations": evaluations}
        rows.append({**row, **rate, "times": times})
    device = jax.devices()[0].device_kind
    return {"suite": "pictures", "batch": batch, "device": device, "rows": rows}
