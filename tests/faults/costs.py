"""What the guarantees cost, on a state of realistic size: DDPM's U-Net of 35.7 million parameters.

    PYTHONPATH=. python tests/faults/costs.py OUT.json [BATCH]

Parameters, average and Adam's moments are 571 MB. Measured on the default device: the time for
which a save holds up the loop, the save's time in all, its hashing and its verification; a train
step of BATCH images; what the on-device guard adds to an update, and the host's guards to a step.
"""

import json
import pathlib
import sys
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from configs import ddpm_cifar10
from diffusion import checkpoint, manifest
from diffusion.training import state as ts
from experiments.host import cluster, guards
from experiments.run import tasks


def seconds(call, repeats: int) -> float:
    """The least of `repeats` times, the first of which compiles."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times[1:])


def of_saves(state, folder: pathlib.Path, repeats: int = 5) -> dict[str, float]:
    found: dict[str, list[float]] = {"save_blocks": [], "save": [], "verify": [], "restore": []}
    hashing: list[float] = []
    write = manifest.write_manifest

    def timed(*arguments):
        began = time.perf_counter()
        write(*arguments)
        hashing.append(time.perf_counter() - began)

    with mock.patch.object(manifest, "write_manifest", timed):
        for step in range(repeats):
            with checkpoint.Checkpoints(folder, keep_last=1) as checkpoints:
                began = time.perf_counter()
                checkpoints.save(step, state, {}, {})
                found["save_blocks"].append(time.perf_counter() - began)
                checkpoints.wait()
                found["save"].append(time.perf_counter() - began)
                began = time.perf_counter()
                manifest.verify(folder / str(step))
                found["verify"].append(time.perf_counter() - began)
                began = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(state).state)
                found["restore"].append(time.perf_counter() - began)
    found["hash_and_fsync"] = hashing
    return {f"{name}_secs": float(np.median(times)) for name, times in found.items()}


def of_update(task, state) -> tuple[float, float]:
    """Seconds of one update of the state from given gradients: with the guard, and without."""
    grads = jax.tree.map(lambda x: 1e-3 * x, state.params)

    def measured():
        update = jax.jit(
            lambda s, g: ts.apply_gradients(s, g, jnp.float32(1), task.optimizer, task.ema)[0],
            donate_argnums=0,
        )
        held = [jax.tree.map(jnp.copy, state)]

        def one():
            held[0] = update(held[0], grads)
            return held[0]

        return seconds(one, 12)

    guarded = measured()
    with mock.patch.object(ts.jnp, "isfinite", lambda x: jnp.bool_(True)):  # XLA drops the branch
        plain = measured()
    return guarded, plain


def of_host(calls: int = 20_000) -> float:
    """Seconds a step that the host spends on watchdog, skipped steps, signals and agreement."""
    peers, count = cluster.Peers(1), jnp.int32(0)
    skipped = guards.SkippedSteps(3, 2, lambda c: int(c), print)
    examples = np.arange(128)
    with guards.StopOnSignal() as stop, guards.Watchdog(600, 600) as watchdog:
        began = time.perf_counter()
        for step in range(calls):
            skipped.step(step, count, examples)
            watchdog.doing(f"step {step} or its data")
            peers.exchange(step, stop.requested, 0.0)
        return (time.perf_counter() - began) / calls


def main(out: str, batch_size: int = 4) -> None:
    config = ddpm_cifar10.get_config()
    task = tasks.task(config)
    state = jax.jit(task.init)(jax.random.key(0))
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    results = {
        "device": jax.devices()[0].device_kind,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "state_bytes": sum(sizes),
        "batch_size": batch_size,
    }
    with tempfile.TemporaryDirectory(dir=".") as folder:
        results |= of_saves(state, pathlib.Path(folder))
    print(results, flush=True)
    guarded, plain = of_update(task, state)
    results |= {"update_secs": guarded, "update_without_guard_secs": plain}
    results["host_guards_secs"] = of_host()
    print(results, flush=True)
    batch = {
        "image": np.zeros((batch_size, 32, 32, 3), np.uint8),
        "position": np.arange(batch_size, dtype=np.int32),
    }
    step = jax.jit(lambda s, b: task.train_step(s, b, {}), donate_argnums=0)
    held = [state]

    def one():
        held[0], metrics = step(held[0], batch)
        return metrics

    results["step_secs"] = seconds(one, 3)
    extra = max(guarded - plain, 0) + results["host_guards_secs"]
    results["guards_share_of_step"] = extra / results["step_secs"]
    results["blocking_share_of_step"] = results["save_blocks_secs"] / results["step_secs"]
    for name in ("save_blocks", "hash_and_fsync", "verify"):
        results[f"{name}_share_of_save"] = results[f"{name}_secs"] / results["save_secs"]
    pathlib.Path(out).write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
