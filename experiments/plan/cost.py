"""What a run costs, counted from shapes and traced programs: no array is made."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from diffusion.interop import perceptual as lpips
from diffusion.training import parallel
from experiments.run import build, given, tasks


def count(tree: Any) -> int:
    """Elements of all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flops(call: Any, *arguments: Any) -> int:
    """Multiply-adds times two of every matrix product and convolution of a call."""
    jaxpr = jax.make_jaxpr(call)(*arguments).jaxpr
    return _flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [_inner(value) for value in equation.params.values()]
        nested = [j for group in inner for j in group]
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(shape[axis] for axis in contract)
            )
        elif equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * taps
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(map(_flops, nested))
        elif equation.primitive.name == "cond":
            total += max(map(_flops, nested), default=0)
        else:
            total += sum(map(_flops, nested))
    return total


def _inner(value: Any) -> list[Any]:
    if hasattr(value, "jaxpr"):  # a closed jaxpr
        return [value.jaxpr]
    if hasattr(value, "eqns"):
        return [value]
    if isinstance(value, tuple | list):
        return [j for item in value for j in _inner(item)]
    return []


def state_bytes(state: Any, fsdp: int) -> int:
    """Bytes of a state on one device of `fsdp` that share it."""
    total = 0
    for leaf in jax.tree.leaves(state):
        sharded = any(parallel.partition(leaf.shape, fsdp))
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total += size // fsdp if sharded else size
    return total


def plan(config: ConfigDict, devices: int = 1) -> dict[str, Any]:
    """The numbers of a config. Raises ValueError where it does not fit the devices."""
    fsdp = config.parallel.fsdp
    if devices < 1 or devices % fsdp:
        raise ValueError(f"--devices={devices} is not a multiple of parallel.fsdp={fsdp}")
    parallel.check_batch(config.train.batch_size, config.train.accumulate, devices)
    task, state, frozen = shapes(config)
    return {
        "task": config.task,
        "networks": networks(state, frozen),
        "sample_shape": list(task.sample_shape),
        "flops_per_example": step_flops(config, task, state, frozen),
        "batch_size": config.train.batch_size,
        "devices": devices,
        "bytes_per_device": {
            "params": state_bytes(state.params, fsdp),
            "ema": state_bytes((state.ema, state.profiles), fsdp),
            "optimizer": state_bytes(state.opt_state, fsdp),
            "state": state_bytes(state, fsdp),
        },
    }


def shapes(config: ConfigDict) -> tuple[Any, Any, dict[str, Any]]:
    """The task, the shapes of its state, and those of its frozen networks."""
    task = tasks.task(config)
    state = jax.eval_shape(task.init, jax.random.key(0))
    return task, state, frozen_shapes(config, task, state)


def networks(state: Any, frozen: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Name -> {"parameters"} of every network, trained or frozen."""
    found = {**state.params, **frozen}
    return {name: {"parameters": count(tree)} for name, tree in found.items()}


def frozen_shapes(config: ConfigDict, task: Any, state: Any) -> dict[str, Any]:
    """Parameter shapes of the networks that the config has but does not train."""
    if config.task != "denoiser":
        return {}
    frozen = dict(jax.eval_shape(task.networks_init, jax.random.key(0)))
    if "autoencoder" in config.model:
        network = build.autoencoder(config.model.autoencoder)
        image = jax.ShapeDtypeStruct((1, *build.image_shape(config)), jnp.float32)
        frozen["autoencoder"] = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    return {name: tree for name, tree in frozen.items() if name not in state.params}


def abstract_batch(config: ConfigDict, task: Any, size: int) -> dict[str, Any]:
    """Shapes of a batch of `size` examples."""
    batch = {
        "position": jax.ShapeDtypeStruct((size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
        "valid": jax.ShapeDtypeStruct((size,), jnp.bool_),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    shape = (size, *task.sample_shape)
    if config.data.name == "latents":
        batch |= {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k in ("mean", "logvar")}
    else:
        image = (size, *build.image_shape(config))
        batch["image"] = jax.ShapeDtypeStruct(image, jnp.uint8)
    batch |= joined(config, task, size)
    if "controlnet" in config.model:
        hint = (size, *build.image_shape(config)[:-1], 3)
        batch["hint"] = jax.ShapeDtypeStruct(hint, jnp.uint8)
    if "text_encoder" in config.model:
        length = build.caption_length(config)
        batch["tokens"] = jax.ShapeDtypeStruct((size, length), jnp.int32)
        if "latents" in config and config.latents.contexts:
            shape = (size, length, config.model.text_encoder.width)
            batch["context"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return batch


def joined(config: ConfigDict, task: Any, size: int) -> dict[str, Any]:
    """Of what joins x_t's channels."""
    if config.task != "denoiser" or not (kind := config.conditioning.concat):
        return {}
    image, latent = build.image_shape(config), task.sample_shape
    stored = config.data.name == "latents"
    if kind == "past":
        past = (size, config.data.past, image[-1])
        return {"past": jax.ShapeDtypeStruct(past, jnp.float32)}
    if kind == "low_resolution":
        shapes = {"small": (given.small_size(config),) * 2 + image[-1:]}
    elif kind == "semantic":
        shapes = {"segments": image[:-1]}
    else:
        shapes = {"mask": (*(latent if stored else image)[:-1], 1)}
    found = {k: jax.ShapeDtypeStruct((size, *s), jnp.uint8) for k, s in shapes.items()}
    if stored and "mask" in found:
        found["masked"] = jax.ShapeDtypeStruct((size, *latent), jnp.float32)
    return found


def judges(task: Any) -> dict[str, Any]:
    """Shapes of what a first stage's loss looks through."""
    return {"perceptual": lpips.shapes()} if getattr(task, "perceptual", None) else {}


def step_flops(config: ConfigDict, task: Any, state: Any, frozen: dict[str, Any]) -> dict[str, int]:
    """An example's share of an evaluation step ("forward") and of a training step ("train")."""
    frozen, parts = frozen | judges(task), config.train.accumulate
    whole = flops(task.train_step, state, abstract_batch(config, task, parts), frozen)
    forward = flops(task.eval_step, state, abstract_batch(config, task, 1), frozen)
    return {"forward": forward, "train": whole // parts}
