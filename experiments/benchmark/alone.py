"""The suites that have no other side: the input pipeline, checkpoints, attention's kernels."""

import collections
import contextlib
import itertools
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import manifest
from diffusion.checkpoint import Checkpoints
from diffusion.models import target
from diffusion.models.attention import chosen_kernel, dot_product_attention
from experiments.benchmark.workload import summary
from experiments.run import assemble
from experiments.train import RUN_AHEAD_STEPS

READ_AHEAD_BATCHES = 8  # no fewer than a loader holds: its buffer, and one a thread
BLOCK_SECS = 0.25  # of steps timed together; what drains at its end is little of it


def _rate(stream: Iterator, batches: int) -> float:
    """Batches a second, of all together: the reading threads hand them over in bunches, so that
    the median wait is that within a bunch. What was read ahead comes first and is not counted."""
    for _ in range(READ_AHEAD_BATCHES):
        next(stream)
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches / (time.perf_counter() - started)


def median_interval(x: np.ndarray) -> tuple[float, float, float]:
    """The median between its 0.95 bounds, which are order statistics (binomial, at 1/2)."""
    x = np.sort(x)
    reach = 0.98 * np.sqrt(len(x))
    low, high = math.floor(len(x) / 2 - reach), math.ceil(len(x) / 2 + reach)
    return float(x[max(low, 0)]), float(np.median(x)), float(x[min(high, len(x) - 1)])


def data(config: ConfigDict, batch: int | None, repeats: int) -> dict[str, Any]:
    """Batches a second of the pipeline alone, and the step with it and without.

    Needs the config's prepared data. "times" is the pipeline's speed over the step's (2 and more:
    a step never waits), "slower" how much longer a step takes when the pipeline feeds it: the
    median over `repeats` pairs of blocks of steps, one block fed and one on a single batch, in
    turns; between "slower_low" and "slower_high" lies the true one with probability 0.95.
    """
    if batch:
        config = ConfigDict(config.to_dict())
        config.train.batch_size = batch
    run, size = assemble.build_run(config), config.train.batch_size
    step = run.parallel.step(run.task.train_step)
    held = {"state": run.parallel.init(run.init, jax.random.key(config.seed), run.start)}
    frozen = run.parallel.replicate(run.frozen)
    with contextlib.closing(run.train_batches()) as stream:
        one = run.parallel.batch(next(stream))

        late = collections.deque()  # the host runs ahead of the device, as in the loop

        def advance(batch):
            held["state"], metrics = step(held["state"], batch, frozen)
            late.append(metrics["loss"])
            return late.popleft() if len(late) > RUN_AHEAD_STEPS else None

        feeds = {"still": lambda: one, "fed": lambda: run.parallel.batch(next(stream))}

        def block(feed: str, steps: int) -> float:
            """Seconds a step."""
            started = time.perf_counter()
            for _ in range(steps):
                advance(feeds[feed]())
            jax.block_until_ready(held["state"])
            return (time.perf_counter() - started) / steps

        block("still", 5), block("fed", 5)
        steps = max(1, round(BLOCK_SECS / block("still", 5)))
        secs: dict[str, list[float]] = {"still": [], "fed": []}
        for i in range(repeats):
            for feed in ("still", "fed") if i % 2 else ("fed", "still"):
                secs[feed].append(block(feed, steps))
        alone = _rate(stream, repeats * 5) * size
    low, slower, high = median_interval(np.divide(secs["fed"], secs["still"]) - 1)
    row = {
        "batch": size,
        "pipeline_per_sec": alone,
        **{f"{feed}_per_sec": size / float(np.median(s)) for feed, s in secs.items()},
        "times": alone * float(np.median(secs["still"])) / size,
        "slower": slower,
        "slower_low": low,
        "slower_high": high,
    }
    return {"suite": "data", "rows": [row]}


def checkpoint(config: ConfigDict, batch: int | None, repeats: int) -> dict[str, Any]:
    """Seconds of saving and restoring the config's state; of hashing and of verifying it.

    "blocking" is what the loop waits for before its next step, "save" until all is on disk.
    """
    del batch
    config = ConfigDict(config.to_dict())
    placed, task = assemble.parallel(config), assemble.tasks.task(config)
    state = placed.init(task.init, jax.random.key(config.seed))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    found: dict[str, list[float]] = {k: [] for k in ("blocking", "save", "hash", "restore")}
    # In the current folder: a temporary one may lie in memory.
    with tempfile.TemporaryDirectory(dir=os.getcwd(), prefix=".benchmark_") as folder:
        with Checkpoints(pathlib.Path(folder), keep_last=1) as checkpoints:
            for i in range(max(min(repeats, 5), 2)):
                started = time.perf_counter()
                checkpoints.save(i + 1, state, {}, {})
                found["blocking"].append(time.perf_counter() - started)
                checkpoints.wait()
                found["save"].append(time.perf_counter() - started)
                started = time.perf_counter()
                manifest.verify(pathlib.Path(folder) / str(i + 1))
                found["hash"].append(time.perf_counter() - started)
                started = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(state).state)
                found["restore"].append(time.perf_counter() - started)
    medians = {f"{k}_secs": summary(v[1:])["median"] for k, v in found.items()}
    row = {"state_mib": size / 2**20, **medians}
    row["hash_of_save"] = medians["hash_secs"] / medians["save_secs"]
    row["save_mib_per_sec"] = row["state_mib"] / medians["save_secs"]
    return {"suite": "checkpoint", "rows": [row]}


def attention(config: ConfigDict, batch: int | None, repeats: int) -> dict[str, Any]:
    """Forward and backward of each kernel, milliseconds, by length and width of a head."""
    dtype = jnp.bfloat16 if config.model.dtype == "bfloat16" else jnp.float32
    rows = []
    for tokens, head_dim in itertools.product((64, 256, 1024, 4096), (40, 64, 80, 160)):
        q, k, v = jax.random.normal(jax.random.key(0), (3, batch or 4, tokens, 8, head_dim), dtype)
        with target.handed(target.of(jax.devices())):
            kernels = {"xla", chosen_kernel(q, k, v, None)}
        row: dict[str, Any] = {"tokens": tokens, "head_dim": head_dim, "dtype": str(q.dtype)}
        for kernel in ("xla", "cudnn", "pallas"):
            row[f"{kernel}_ms"] = "-"
            if kernel in kernels:
                row[f"{kernel}_ms"] = _attention_ms(q, k, v, kernel, repeats)
        rows.append(row)
    return {"suite": "attention", "device": jax.devices()[0].device_kind, "rows": rows}


def _attention_ms(q, k, v, kernel: str, repeats: int) -> float:
    def total(q, k, v):
        return dot_product_attention(q, k, v, implementation=kernel).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    jax.block_until_ready(step(q, k, v))
    secs = []
    for _ in range(min(repeats, 10)):
        started = time.perf_counter()
        jax.block_until_ready(step(q, k, v))
        secs.append(time.perf_counter() - started)
    return float(np.median(secs)) * 1e3


SUITES: dict[str, Callable[[ConfigDict, int | None, int], dict[str, Any]]] = {
    "data": data,
    "checkpoint": checkpoint,
    "attention": attention,
}
