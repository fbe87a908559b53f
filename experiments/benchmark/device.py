"""What a machine with an accelerator owes, by one command and in a given time.

    python -m experiments.benchmark --suite=device --budget_secs=500 --out=DIR [--smoke]

Rows run most important first, each in a process of its own; DIR/ROW.json is written when it ends.
Called again with the same DIR it goes on with what is missing or failed. What does not end in time
is stopped, and begins with its programs compiled (DIR/cache) the next time. `--smoke`: the rows at
the sizes of their configs' smoke, for any machine.

card     what is there: versions, the speed of a matrix product and of a copy
step     a config's real train step, compiled and timed: its time beside the bound by kernel
         (`plan/hlo.py`; of GPUs with 2.5 microseconds a kernel), its memory, cold start
numbers  the kernels of this platform against XLA's own, forward and backward
resume   four steps, and two, saved, restored, and two: the same to the bit
others   suites of this command (attention, sampling; beside Diffusers where that is installed)

It needs jax, flax, optax and orbax, and the small packages that `launch/wheels.sh DIR` puts into a
folder for PYTHONPATH; a data set or a network connection is not needed.
"""

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import files
from diffusion.checkpoint import Checkpoints
from diffusion.models import target
from diffusion.models.attention import chosen_kernel, dot_product_attention
from diffusion.models.group_norm import GroupNorm
from diffusion.training.parallel import Parallel, make_mesh
from experiments.benchmark import ours
from experiments.benchmark.workload import summary
from experiments.plan import hlo, mesh
from experiments.plan.target import LAUNCH_SECS

SUITE = "device"
LEAST_SECS = 20  # a row is not begun with less left
SD, CIFAR, LDM = "stable_diffusion:v1", "ddpm_cifar10", "ldm_imagenet256:f4"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # most important first
    "card": ("card", {}),
    "step_ddpm_cifar10_512": ("step", {"config": CIFAR, "batch": 512}),
    "numbers": ("numbers", {}),
    "step_ddpm_cifar10_128": ("step", {"config": CIFAR, "batch": 128}),
    "resume_ddpm_cifar10": ("resume", {"config": CIFAR, "batch": 128}),
    "step_sd_v1_32": ("step", {"config": SD, "batch": 32}),
    "step_ldm_imagenet256_64": ("step", {"config": LDM, "batch": 64}),
    "attention": ("others", {"config": SD, "flags": ["--suite=attention"]}),
    "sample_ddpm_cifar10": (
        "others",
        {"config": CIFAR, "batch": 512, "flags": ["--suite=sample", "--rounds=1", "--repeats=3"]},
    ),
    "train_ddpm_cifar10_peer": (
        "others",
        {"config": CIFAR, "batch": 512, "flags": ["--suite=train", "--peer=diffusers"]},
    ),
    "train_sd_v1_peer": (
        "others",
        {"config": SD, "batch": 32, "flags": ["--suite=train", "--peer=diffusers"]},
    ),
}


def device(out: pathlib.Path, budget_secs: float, smoke: bool) -> dict[str, str]:
    """{row: what became of it}; their JSONs in `out`."""
    started, became = time.monotonic(), {}
    out.mkdir(parents=True, exist_ok=True)
    for name in ROWS:
        path = out / f"{name}.json"
        if path.exists() and "failed" not in json.loads(path.read_text()):
            became[name] = "there"
            continue
        left = budget_secs - (time.monotonic() - started)
        if left < LEAST_SECS:
            became[name] = "no time left"
            continue
        found = _in_a_process(name, out, left, smoke)
        files.write_json(path, found)
        became[name] = found.get("failed", "measured")
        print(f"{name:<28} {became[name]}", flush=True)
    return became


def _in_a_process(name: str, out: pathlib.Path, left: float, smoke: bool) -> dict[str, Any]:
    kind, asked = ROWS[name]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.resolve() / "cache")}
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "found.json"
        command = ["-m", "experiments.benchmark.device", kind, json.dumps(asked), str(int(smoke))]
        if kind == "others":
            if "--peer=diffusers" in asked["flags"] and not _installed("diffusers", "torch"):
                return {"failed": "needs diffusers and torch"}
            command = ["-m", "experiments.benchmark", *_flags(asked, smoke), f"--out={result}"]
        try:
            done = subprocess.run(
                [sys.executable, *command],
                capture_output=True,
                text=True,
                timeout=left,
                env=os.environ | cache,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {left:.0f} s"}
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:500]}
        text = result.read_text() if kind == "others" else done.stdout.splitlines()[-1]
    return {"row": name, **json.loads(text)}


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def _flags(asked: dict[str, Any], smoke: bool) -> list[str]:
    name, _, argument = asked["config"].partition(":")
    arguments = ",".join(filter(None, [argument, "smoke" if smoke else ""]))
    flags = [*asked["flags"], f"--config=configs/{name}.py:{arguments}"]
    if not smoke:
        flags += ["--config.model.dtype=bfloat16", "--sync_every=10"]
    if "batch" in asked:
        flags.append(f"--batch={2 if smoke else asked['batch']}")
    return flags


# -- rows, each in its process ---------------------------------------------------------------------


def _step(asked: dict[str, Any], smoke: bool) -> tuple[Any, ...]:
    """The compiled step, its first state and a batch of noise, and how long compiling took."""
    name, _, argument = asked["config"].partition(":")
    arguments = ",".join(filter(None, [argument, "smoke" if smoke else ""]))
    config = importlib.import_module(f"configs.{name}").get_config(arguments or None).unlock()
    config.model.dtype = "bfloat16"
    config.train.batch_size = 8 if smoke else asked["batch"]
    placed = Parallel("jit", make_mesh(devices=jax.devices()[:1]))
    task, shapes, batch, frozen = mesh.abstract_step(config.lock(), placed)
    rng = np.random.default_rng(0)

    def drawn(s):
        wide = jnp.issubdtype(s.dtype, jnp.floating)
        x = rng.normal(size=s.shape) if wide else rng.integers(0, 2, s.shape)
        return jax.device_put(x.astype(s.dtype), s.sharding)

    state = placed.init(task.init, jax.random.key(0))
    step = placed.jitted(task.train_step, jax.tree.map(lambda x: x.sharding, shapes))
    started = time.perf_counter()
    compiled = step.lower(shapes, batch, frozen).compile()
    secs = time.perf_counter() - started
    return compiled, state, jax.tree.map(drawn, (batch, frozen)), secs


def step(asked: dict[str, Any], smoke: bool) -> dict[str, Any]:
    compiled, state, (batch, frozen), compile_secs = _step(asked, smoke)
    repeats, together = (2, 2) if smoke else (10, 10)
    secs = []
    for i in range(repeats + 1):  # the first warms up
        started = time.perf_counter()
        for _ in range(together):
            state, metrics = compiled(state, batch, frozen)
        jax.block_until_ready((state, metrics))
        secs += [(time.perf_counter() - started) / together] * (i > 0)
    one, memory = jax.devices()[0], compiled.memory_analysis()
    found = {**asked, "batch": 8 if smoke else asked["batch"], "device": one.device_kind}
    found |= {"loss": float(metrics["loss"]), "skipped": int(metrics["skipped_steps"])}
    found |= {"step_secs": summary(secs), "compile_secs": compile_secs}
    found |= {"examples_per_sec": found["batch"] / found["step_secs"]["median"]}
    found |= {"temporary_bytes": int(memory.temp_size_in_bytes)}
    found |= {"peak_bytes": (one.memory_stats() or {}).get("peak_bytes_in_use")}
    kind = next((k for k in mesh.HARDWARE if k in one.device_kind.lower()), None)
    if kind is None:
        return found | {"bound": None}
    chip = mesh.HARDWARE[kind]
    launch = LAUNCH_SECS if one.platform == "gpu" else 0
    of = hlo.summary(compiled.as_text(), chip.flops, chip.bandwidth, launch)
    return found | {"bound": of, "bound_share": of["bound_secs"] / found["step_secs"]["median"]}


def resume(asked: dict[str, Any], smoke: bool) -> dict[str, Any]:
    compiled, state, (batch, frozen), _ = _step(asked, smoke)

    def after(state, steps):
        for _ in range(steps):
            state, _ = compiled(state, batch, frozen)
        return state

    halfway = after(state, 2)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder))
        checkpoints.save(2, halfway, {}, {})
        checkpoints.wait()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), halfway
        )
        restored = checkpoints.restore(shapes)
        whole = jax.device_get(after(halfway, 2))
        again = jax.device_get(after(restored.state, 2))
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True)
    differ = sum(not np.array_equal(a, b) for a, b in pairs)
    return {**asked, "leaves": len(jax.tree.leaves(whole)), "leaves_that_differ": differ}


def numbers(asked: dict[str, Any], smoke: bool) -> dict[str, Any]:
    """Relative differences from what XLA alone computes, in bfloat16."""
    found = {}
    aim = target.of(jax.devices()[:1])
    keys = jax.random.split(jax.random.key(0), 3)

    def compare(function, *arguments):
        def loss(*arguments):
            return jnp.sin(function(*arguments).astype(jnp.float32)).sum()

        run = jax.value_and_grad(loss, tuple(range(len(arguments))))
        sides = []
        for one in (target.ANY, aim):
            with target.handed(one):
                # A function of its own a side: what was traced for one is not for the other.
                sides.append(jax.device_get(jax.jit(functools.partial(run))(*arguments)))
        plain, other = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s)]) for s in sides)
        plain, other = plain.astype(np.float64), other.astype(np.float64)
        return float(np.linalg.norm(plain - other) / np.linalg.norm(plain))

    for length in (64,) if smoke else (256, 1024, 4096):
        for width in (40, 64, 160):
            shape = (2, length, 4, width)
            q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
            with target.handed(aim):
                kernel = chosen_kernel(q, k, v, None)
            difference = compare(dot_product_attention, q, k, v)
            found[f"attention_{length}_{width}"] = {"kernel": kernel, "difference": difference}
    norm = GroupNorm(dtype=jnp.bfloat16)
    side = 8 if smoke else 64
    x = jax.random.normal(keys[0], (4, side, side, 320), jnp.bfloat16)
    shift = jax.random.normal(keys[1], (4, 320), jnp.bfloat16)
    params = norm.init(keys[2], x)
    found["group_norm"] = {
        "difference": compare(lambda x, s, p: norm.apply(p, x, s, silu=True), x, shift, params)
    }
    return found


def card(asked: dict[str, Any], smoke: bool) -> dict[str, Any]:
    one = jax.devices()[0]
    n = 2**20 if smoke else 2**29
    add = jax.jit(lambda x: x + 1)
    x = jax.block_until_ready(add(jnp.zeros(n, jnp.bfloat16)))
    best = np.inf
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(add(x))
        best = min(best, time.perf_counter() - started)
    names = ("jax", "flax", "optax")
    versions = {name: importlib.import_module(name).__version__ for name in names}
    found = {"device": one.device_kind, "devices": len(jax.devices()), "memory": one.memory_stats()}
    found |= {"versions": versions | {"python": sys.version.split()[0]}}
    found |= {"copy_bytes_per_sec": 4 * n / best}
    return found | ours.ceiling({"dtype": "float32" if smoke else "bfloat16"}, pathlib.Path())


if __name__ == "__main__":
    do = {"card": card, "step": step, "resume": resume, "numbers": numbers}[sys.argv[1]]
    print(json.dumps(do(json.loads(sys.argv[2]), sys.argv[3] == "1")))
