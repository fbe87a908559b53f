"""How a train step grows: with its batch, with the side of an image, with devices.

Each case is a process of its own on one device, or on n with n times the batch. Times are fitted by

    secs(B) = a + b B                                                                       (1)

over the batches; a is what a step costs whatever its size. On CPU the devices share the cores, so
that the time of theirs says nothing: what counts is that collectives and their bytes stay the same.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.wording import Progress
from experiments.benchmark.workload import describe, summary
from experiments.run import build

BATCHES, SIDES, DEVICES = (1, 2, 4, 8), (0.5, 2.0), (2, 4, 8)
MODULE = "experiments.benchmark.ours"


def growth(
    config: ConfigDict, batch: int, rounds: int, options: dict[str, Any], run: Callable
) -> dict[str, Any]:
    """A row a case, and equation 1. `run(module, what, work, directory)` is a process."""
    suite = "autoencoder" if config.task == "autoencoder" else "train"
    cases = [("batch", batch * k, 1.0, 1) for k in BATCHES]
    cases += [("side", batch, factor, 1) for factor in SIDES]
    cases += [("devices", batch * n, 1.0, n) for n in DEVICES]
    rows, progress = [], Progress("cases", len(cases), every_secs=0)
    for axis, size, factor, devices in cases:
        changed = resized(config, factor)
        work = describe(changed, suite, **{**options, "batch": size, "devices": devices})
        with tempfile.TemporaryDirectory() as folder:
            directory = pathlib.Path(folder)
            prepared = run(MODULE, "prepare", work, directory)
            cache = directory / "cache"
            found = [run(MODULE, "measure", work, directory, cache) for _ in range(rounds)]
        rows.append(_row(axis, changed, work, prepared, found))
        progress.at(len(rows), axis)
    progress.close()
    sizes, secs = zip(*((r["batch"], r["step_secs"]) for r in rows if r["axis"] == "batch"))
    b, a = np.polyfit(sizes, secs, 1)
    return {"suite": "growth", "rows": rows, "fit": {"a_secs": float(a), "b_secs": float(b)}}


def resized(config: ConfigDict, factor: float) -> ConfigDict:
    """The config of images `factor` times as large a side."""
    changed = ConfigDict(config.to_dict())
    size = config.data.image_size
    scaled = [int(side * factor) for side in ([size] if isinstance(size, int) else size)]
    changed.data.image_size = scaled[0] if isinstance(size, int) else tuple(scaled)
    return changed


def _row(axis, config, work, prepared, found) -> dict[str, Any]:
    secs = summary([s for one in found for s in one["secs"]])["median"]
    moved = found[0]["collectives"].values()
    shape = (build.image_shape if config.task == "autoencoder" else build.sample_shape)(config)
    return {
        "axis": axis,
        "batch": work["batch"],
        "shape": "x".join(map(str, shape)),
        "devices": work["devices"],
        "step_secs": secs,
        "examples_per_sec": work["batch"] / secs,
        "gflop_per_sec": prepared["flops"] / secs / 1e9,
        "buffer_mib": found[0]["buffer_bytes"] / 2**20,
        "collectives": sum(entry["count"] for entry in moved),
        "collective_mib": sum(entry["bytes"] for entry in moved) / 2**20,
    }
