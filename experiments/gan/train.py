"""Both models trained for as many seconds of processor time, of all cores together: other work on
the machine does not change it. Compilation is apart, on a state that is thrown away."""

import contextlib
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion.training import codec
from experiments.gan.model import Gan
from experiments.run import assemble


def timed(advance: Any, state: Any, secs: float) -> tuple[Any, int, float]:
    """`advance(state, step)` for `secs` seconds: the last state, steps, and the seconds it took."""
    began, step = time.process_time(), 0
    while time.process_time() - began < secs:
        state = advance(state, step)
        step += 1
        if step % 20 == 0:
            jax.block_until_ready(state)
    jax.block_until_ready(state)
    return state, step, time.process_time() - began


def train_gan(run: assemble.Run, gan: Gan, secs: float, seed: int) -> tuple[Any, int, float]:
    """`batch_size` latents a step, drawn from the first stage's posterior."""
    extra = {k: jnp.asarray(v) for k, v in run.arguments.items()}
    key = jax.random.key(seed)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        draw, key = jax.random.split(key)
        noise = jax.random.normal(draw, batch["mean"].shape)
        real = codec.scaled(batch["mean"] + jnp.exp(batch["logvar"] / 2) * noise, extra)
        return gan.step(state, real, key)

    with contextlib.closing(run.train_batches()) as batches:

        def advance(state, i):
            batch = next(batches)
            latents = {name: batch[name] for name in ("mean", "logvar")}
            return step(state, latents, jax.random.fold_in(key, i))

        jax.block_until_ready(advance(gan.init(key), 0))
        return timed(advance, gan.init(key), secs)


def train_diffusion(config: ConfigDict, secs: float) -> tuple[assemble.Run, Any, int, float]:
    """As `experiments.train` does, with as many steps in its schedule as the seconds will hold."""
    _, _, steps, took = _trained(config, secs / 20)
    config = ConfigDict(config.to_dict())
    steps = max(config.optim.warmup_steps + 1, round(steps / took * secs))
    config.train.steps = config.optim.decay_steps = steps
    return _trained(config.lock(), secs)


def _trained(config: ConfigDict, secs: float) -> tuple[assemble.Run, Any, int, float]:
    run = assemble.build_run(config)
    step, frozen = run.parallel.step(run.task.train_step), run.parallel.replicate(run.frozen)

    def begin():
        return run.parallel.init(run.init, jax.random.key(config.seed), run.start)

    with contextlib.closing(run.train_batches()) as batches:

        def advance(state, _):
            return step(state, run.parallel.batch(next(batches)), frozen)[0]

        jax.block_until_ready(advance(begin(), 0))
        return run, *timed(advance, begin(), secs)
