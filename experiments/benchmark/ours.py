"""This project's side of a benchmark: the real train step, sampler and decoder.

    python -m experiments.benchmark.ours prepare|measure|ceiling DIR < work.json

`prepare` writes random weights in Diffusers' format, random inputs, and what this side makes of
them in float32: the other side checks itself against that before any time is taken. `measure`
prints times as JSON. Each is a process of its own.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import files, interop
from diffusion.interop import scheduler
from diffusion.process import samplers
from diffusion.sampling.settings import Settings
from diffusion.training import state as ts
from diffusion.training.denoiser import Denoiser
from diffusion.training.parallel import Parallel, make_mesh
from experiments.benchmark.workload import GRADIENTS, INPUTS, WEIGHTS, inputs, resident_bytes, timed
from experiments.plan import cost, hlo
from experiments.run import build, tasks


class Given(Denoiser):
    """The U-Net alone, its condition given: text encoders are no part of these numbers."""

    def condition(self, params, batch, keys=None, train=False):
        return {k: batch[k] for k in ("context", "labels") if k in batch}


def denoiser_task(
    config: ConfigDict, networks: tuple[str, ...] = ("denoiser",)
) -> tuple[Given, Any, dict]:
    """The task, the U-Net's parameter shapes, and the shapes of a batch of one."""
    full = tasks.denoiser(config)
    fields = {f.name: getattr(full, f.name) for f in dataclasses.fields(full)}
    fields |= {"conditions": {}, "autoencoder": None, "flip": False}
    fields["optimizer"] = build.optimizer(config, networks)
    fields["ema"] = build.ema(config, networks)
    shapes = {"x": full.sample_shape}
    if (text := full.conditions.get("text")) is not None:
        shapes["context"] = (len(text.null_tokens), text.encoder.width)
    params = jax.eval_shape(full.networks_init, jax.random.key(0))["denoiser"]
    return Given(**fields), params, shapes


def random_params(shapes: Any, seed: int) -> Any:
    """Every leaf drawn anew, zero-initialised ones too, at a scale that keeps signals of order 1.

    A kernel's is 1/sqrt(fan in); norms' scales lie about 1.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "scale":
            return 1 + 0.1 * x
        return x / np.sqrt(np.prod(leaf.shape[:-1])) if x.ndim > 1 else 0.1 * x

    return jax.tree_util.tree_map_with_path(draw, shapes)


# -- what the other side is held to ---------------------------------------------------------------


def prepare(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    config = ConfigDict(work["config"])
    jax.config.update("jax_default_matmul_precision", "highest")
    if work["suite"] == "autoencoder":
        return _prepare_autoencoder(work, config, directory)
    task, shapes, sizes = denoiser_task(config)
    network = task.network.clone(dtype=None, remat=None)
    params = random_params(shapes, work["seed"])
    interop.save_unet(directory / WEIGHTS, network, params)
    arrays = inputs(work, {k: (work["batch"], *s) for k, s in sizes.items()})
    arrays["target"] = inputs({"seed": work["seed"] + 1}, {"x": arrays["x"].shape})["x"]
    arrays["t"] = np.linspace(1, 999, work["batch"]).astype(np.int32)
    small = {k: v[:2] for k, v in arrays.items()}  # a gate needs no whole batch

    def loss(params):
        context = {k: small[k] for k in ("context",) if k in small}
        out = network.apply({"params": params}, small["x"], small["t"], **context)
        return jnp.square(out[..., : small["x"].shape[-1]] - small["target"]).mean(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    interop.save_unet(directory / GRADIENTS, network, jax.device_get(grads))
    arrays["output"] = np.asarray(out)
    if work["suite"] == "sample":
        sampled = sampling(work, config)(params, arrays, 2)
        arrays["sampled"] = np.asarray(sampled)
        described = scheduler.scheduler_config(
            scheduler.Scheduler(
                config.process.schedule.to_dict(), config.process.prediction, "ddim", {}, False
            )
        )
        files.write_json(directory / "scheduler" / "scheduler_config.json", described)
    files.write_arrays(directory / INPUTS, **arrays)
    return {"parameters": cost.count(shapes), "flops": _step_flops(work, config)}


def _prepare_autoencoder(work, config, directory):
    network = build.autoencoder(config.model.autoencoder)
    shape = build.image_shape(config)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    params = random_params(shapes, work["seed"])
    interop.save_autoencoder(directory / WEIGHTS, network, params)
    x = inputs(work, {"x": (work["batch"], *shape)})["x"].clip(-1, 1)

    def loss(params):
        z = network.apply({"params": params}, x[:2], method="encode").mean
        out = network.apply({"params": params}, z, method="decode")
        return jnp.square(out - x[:2]).mean(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    interop.save_autoencoder(directory / GRADIENTS, network, jax.device_get(grads))
    files.write_arrays(directory / INPUTS, x=x, output=np.asarray(out))
    return {"parameters": cost.count(shapes), "flops": _step_flops(work, config)}


def _step_flops(work: dict[str, Any], config: ConfigDict) -> int:
    """Of one timed call, from its traced program: products and convolutions."""
    call, arguments = _call(work, config, None)
    return cost.flops(call, *arguments)


# -- what is timed --------------------------------------------------------------------------------


def sampling(work: dict[str, Any], config: ConfigDict) -> Any:
    """(params, arrays, count) -> x0 of DDIM with eta 0, guided where there is a context."""
    task, _, _ = denoiser_task(config)
    changed = {"steps": work["sample_steps"], "guidance_scale": work["guidance_scale"]}
    process = {"prediction": config.process.prediction, "variance": config.process.variance}
    how = Settings(build.schedule(config), **process, sampler="ddim", **changed)

    @functools.partial(jax.jit, static_argnames="count")
    def run(params, arrays, count):
        told = {k: arrays[k][:count] for k in ("context",) if k in arrays}
        nothing = jax.tree.map(jnp.zeros_like, told) or None
        denoise = how.denoise(functools.partial(task.predict, {"denoiser": params}), told, nothing)
        keys = jax.random.split(jax.random.key(0), count)
        return samplers.sample(how.method(), denoise, arrays["x"][:count], keys)

    return run


def _call(work: dict[str, Any], config: ConfigDict, directory: pathlib.Path | None) -> Any:
    """What is timed: a function and its arguments (shapes alone without a directory)."""
    devices = jax.devices()[: work["devices"]]
    if len(devices) < work["devices"]:
        raise ValueError(f"--devices={work['devices']}, but there are {len(devices)}")
    placed = Parallel("jit", make_mesh(devices=devices))
    if work["suite"] == "autoencoder":
        task = tasks.first_stage(config)
        init, name = task.init, "autoencoder"
        shapes = {"image": build.image_shape(config)}
    else:
        task, params, shapes = denoiser_task(config)
        name = "denoiser"

        def init(key):
            zeros = {"denoiser": jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)}
            return ts.create_state(key, zeros, task.optimizer, task.ema, {})

    if directory is None:
        state = jax.eval_shape(init, jax.random.key(0))
        batch = {
            k: jax.ShapeDtypeStruct((work["batch"], *s), jnp.float32) for k, s in shapes.items()
        }
    else:
        load = interop.load_autoencoder if name == "autoencoder" else interop.load_unet
        _, weights = load(directory / WEIGHTS)
        state = placed.init(init, jax.random.key(work["seed"]), {name: weights})
        arrays = dict(np.load(directory / INPUTS))
        arrays["image"] = arrays["x"]
        batch = {k: arrays[k] for k in shapes}
    batch |= {"position": np.arange(work["batch"], dtype=np.int32)}
    if directory is not None:
        batch = placed.batch(batch)
    if work["suite"] == "sample":
        run = sampling(work, config)
        return jax.jit(functools.partial(run, count=work["batch"])), (
            state.params["denoiser"],
            batch,
        )
    if "x" in batch:
        batch["image"] = batch.pop("x")
    step = task.train_step
    if directory is not None:
        step = placed.jitted(step, jax.tree.map(lambda x: x.sharding, state))
    return step, (state, batch, {})


def measure(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    before = resident_bytes()
    call, arguments = _call(work, ConfigDict(work["config"]), directory)
    held: dict[str, Any] = {"arguments": arguments, "result": None}
    del arguments

    def once():
        if work["suite"] == "sample":
            held["result"] = call(*held["arguments"])
            return
        state, batch, frozen = held["arguments"]
        state, held["result"] = call(state, batch, frozen)
        held["arguments"] = (state, batch, frozen)

    found = timed(once, lambda: jax.block_until_ready((held["result"], held["arguments"])), work)
    return found | memory(before, call, held["arguments"])


def memory(before: int, call: Any, arguments: Any) -> dict[str, Any]:
    """What a jitted call took, and where it ran. `before`: the resident bytes before anything."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    found = {
        "peak_bytes": stats.get("peak_bytes_in_use", resident_bytes() - before),
        "resident_bytes": resident_bytes(),
    }
    compiled = call.lower(*arguments).compile()
    of = compiled.memory_analysis()
    buffers = of.argument_size_in_bytes + of.output_size_in_bytes + of.temp_size_in_bytes
    return found | {
        "buffer_bytes": buffers - of.alias_size_in_bytes,  # without the compiler's own memory
        "collectives": hlo.collectives(compiled.as_text()),
        "device": device.device_kind,
        "versions": {"jax": jax.__version__},
    }


def ceiling(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """FLOP/s of a square matrix product, the dearest thing that this device does well."""
    del directory
    on_cpu = jax.default_backend() == "cpu"
    n = 2048 if on_cpu else 8192
    dtype = jnp.float32 if work["dtype"] == "float32" else jnp.bfloat16
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(a, a))
    best = np.inf
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - started)
    return {"matmul_flops_per_sec": 2 * n**3 / best, "n": n, "dtype": str(jnp.dtype(dtype))}


if __name__ == "__main__":
    do = {"prepare": prepare, "measure": measure, "ceiling": ceiling}[sys.argv[1]]
    print(json.dumps(do(json.load(sys.stdin), pathlib.Path(sys.argv[2]))))
