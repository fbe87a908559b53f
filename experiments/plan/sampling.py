"""The program that `sample` runs, of shapes: for compilers of hardware that is not here.

The text encoder, the whole loop of the sampler with guidance, and the decoder are one program, as
`Pipeline.compiled` makes it; the averaged weights lie whole on every device and the pictures are
split over all, `sample.batch_size` rounded up to what they divide.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion.sampling.pipeline import Pipeline
from diffusion.training.parallel import BATCH, Parallel
from experiments.plan import cost
from experiments.plan.mesh import laid
from experiments.run import build, generate

TRAINED_APART = ("lora", "words", "teacher")  # a workdir's are merged when loaded, or not read


def check(config: ConfigDict) -> None:
    """ValueError for what makes no pictures, or not by its config alone."""
    if config.task != "denoiser" or "denoiser" not in config.model:
        raise ValueError(
            f"--sample is of denoisers, but the config's task={config.task!r} samples nothing: "
            "leave it out"
        )
    for key in ("autoguidance", "guidance_classifier"):
        if path := config.sample[key]:
            raise ValueError(f"--sample cannot weigh the run sample.{key}={path}: set it to ''")
    if hasattr(build.settings(config).method(), "integrate"):
        raise ValueError(
            f"--sample counts steps, but sample.sampler={config.sample.sampler!r} takes as many as "
            "its error asks: give --config.sample.sampler=heun, say"
        )


def pipeline(config: ConfigDict) -> Pipeline:
    """With shapes in place of parameters."""
    task, state, frozen = cost.shapes(config)
    params = {**frozen, **state.params}
    if task.words is not None:
        params = jax.eval_shape(task.words.merged, params)
    params = {name: tree for name, tree in params.items() if name not in TRAINED_APART}
    if "autoencoder" not in config.model:
        return generate.pipeline(config, task, params)
    first, channels = build.autoencoder(config.model.autoencoder), task.sample_shape[-1]
    extra = {"latent_shift": np.zeros(channels), "latent_scale": np.ones(channels)}
    return generate.pipeline(config, task, params, extra=extra, first_stage=first)


def columns(config: ConfigDict, made: Pipeline, size: int) -> dict[str, Any]:
    """Shapes of what `size` pictures are asked by: prompts, labels, and what the model is told."""
    slots, task = made.slots, made.task
    found = cost.abstract_batch(config, task, size)
    pixels = (size, *slots.image_size)
    found |= {"image": jax.ShapeDtypeStruct((*pixels, slots.channels), jnp.uint8)}
    found |= {"mask": jax.ShapeDtypeStruct((*pixels, 1), jnp.bool_)}
    told = {"text": "tokens", "label": "label", "past": "past"}
    names = {told[name] for name in told if name in task.conditions} | set(made.reads)
    found = {name: found[name] for name in names - {"masked"}}
    for i in range(slots.controls):
        found[f"hint_{i}"] = jax.ShapeDtypeStruct((*pixels, 3), jnp.uint8)
        found[f"hint_scale_{i}"] = jax.ShapeDtypeStruct((size,), jnp.float32)
    return found


def program(config: ConfigDict, placed: Parallel) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What is jitted, its arguments as shapes with shardings, and what is known of it."""
    check(config)
    made, chips = pipeline(config), placed.devices
    size = -(-config.sample.batch_size // chips) * chips
    numbers = [jax.ShapeDtypeStruct((size,), dtype) for dtype in (jnp.uint32, jnp.int32)]
    arguments = (
        laid(made.params, placed),
        *laid((*numbers, columns(config, made, size)), placed, BATCH),
    )
    run = made.compiled(devices=placed.mesh.devices.flatten().tolist())
    how = made.how
    facts = {
        "batch_size": size,
        "sampler": how.sampler,
        "steps": how.method().steps,
        "guidance_scale": how.guidance_scale,
        "evaluations": generate.evaluations(made),
    }

    def sample(frozen: Any, seeds: Any, indices: Any, batch: Any) -> Any:  # `provenance.py` reads
        return run(frozen, seeds, indices, batch)  # these names

    return jax.jit(sample), arguments, facts
