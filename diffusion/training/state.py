"""The state of a run and the parts of a step that every task shares.

A step is: per-example keys, gradients (accumulated over parts of the batch), their mean over
devices, a guarded update of parameters, optimiser and EMA. All of it is pure; the tasks
(`denoiser.py`, `autoencoder.py`, `classifier.py`) supply the loss, `parallel.py` runs it.

Guard: a step is skipped whose loss or gradient is not finite and, with `max_loss_deviations` = k,
one whose loss l leaps above what the steps taken so far had (n of them, from the 101st on):

    (1) l > m_n + k sqrt(v_n)
    (2) m_n = m_{n-1} + a_n (l_n - m_{n-1}),  v_n = (1 - a_n) (v_{n-1} + a_n (l_n - m_{n-1})^2),
        a_n = max(1 / n, 1 / 100)

the sample's mean and variance over the first 100, exponential averages afterwards.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from diffusion.models import target
from diffusion.training.ema import Ema, update_profile
from diffusion.training.ema import update as averaged

Params = dict[str, Any]  # one entry a network: {"denoiser": ..., "text_encoder": ...}
Metrics = dict[str, Array]

LOSSES = "loss_statistics"  # in `extra`: m_n and v_n of equation 2
SMALL = 2**12  # elements of a leaf whose kernel takes as long to start as to run
ROWS = 1024  # at most, to which a larger one is summed: some for each multiprocessor
SPIKE_STEPS = 100  # 1 / a_n at most, and how many steps equation 1 waits for


class TrainState(flax.struct.PyTreeNode):
    """Everything that a checkpoint holds besides the place in the data.

    `params`, `opt_state` and `ema` are keyed by network; which networks have an EMA is config.
    `profiles` are keyed by length, then network (`ema.py`, equation 4).
    `rng` is the raw data of the run's key, never changed: step and position are folded in.
    `extra` holds what is neither: latent shift and scale, batch statistics, skipped steps.
    Leaves may be arrays, their shapes or their shardings, so the fields say so in words.
    """

    step: Any  # int32 ()
    rng: Any  # uint32 (2,)
    params: Params
    opt_state: dict[str, Any]
    ema: Params
    extra: dict[str, Any]
    profiles: dict[str, Params] = dataclasses.field(default_factory=dict)

    @property
    def inference_params(self) -> Params:
        """The EMA where a network has one, its raw parameters elsewhere."""
        return {**self.params, **self.ema}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One optax transformation for each network, and what surrounds the update.

    `clip_norm` bounds the global norm over all networks of one `apply_gradients` (0: off);
    `max_loss_deviations` is k of equation 1 (0: off). by_element: the transforms do not look at a
    leaf's shape.
    """

    transforms: Mapping[str, optax.GradientTransformation]
    learning_rate: Callable[[Array], Array]
    clip_norm: float = 0.0
    max_loss_deviations: float = 0.0
    by_element: bool = False

    def __post_init__(self):
        if not self.max_loss_deviations >= 0:
            raise ValueError(
                f"train.max_loss_deviations={self.max_loss_deviations} must be 0 (off) or more"
            )

    def init(self, params: Params) -> dict[str, Any]:
        return {name: tx.init(params[name]) for name, tx in self.transforms.items()}


def create_state(
    key: Key[Array, ""], params: Params, optimizer: Optimizer, ema: Ema, extra: dict[str, Any]
) -> TrainState:
    """The state before the first step; `key` becomes the key of all the run's draws."""
    if optimizer.max_loss_deviations:
        extra = {LOSSES: {"mean": jnp.zeros(()), "variance": jnp.zeros(())}, **extra}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(key),
        params=params,
        opt_state=optimizer.init(params),
        ema=ema.init(params),
        extra={
            "skipped_steps": jnp.zeros((), jnp.int32),
            "skipped_in_a_row": jnp.zeros((), jnp.int32),
            **extra,
        },
        profiles=ema.init_profiles(params),
    )


def random_flip(
    x: Float[Array, "batch *space channels"], keys: Key[Array, " batch"]
) -> Float[Array, "batch *space channels"]:
    """Mirrors half of the examples along their last spatial axis."""
    heads = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(heads.reshape(-1, *[1] * (x.ndim - 1)), jnp.flip(x, -2), x)


def accumulate(grad_fn: Callable, parts: int) -> Callable:
    """`grad_fn(params, batch) -> tree of means`, computed as a scan over `parts` of the batch.

    The split is strided (part i takes examples i, i + parts, ...), so that a batch that is
    sharded over devices keeps every row where it is.
    """
    if parts == 1:
        return grad_fn

    def accumulated(params, batch):
        def split(x):
            return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

        def add(total, part):
            return jax.tree.map(jnp.add, total, grad_fn(params, part)), None

        split_batch = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], split_batch)
        shapes = jax.eval_shape(grad_fn, params, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = lax.scan(add, zeros, split_batch)
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated


def mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    """The mean over a `pmap` axis; under `jit` (no axis) arrays are global and the mean is made."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def is_spike(
    statistics: dict[str, Array], loss: Float[Array, ""], taken: Int[Array, ""], deviations: float
) -> Bool[Array, ""]:
    """Equation 1, after `taken` steps."""
    bound = statistics["mean"] + deviations * jnp.sqrt(statistics["variance"])
    return (taken >= SPIKE_STEPS) & (loss > bound)


def loss_statistics(
    statistics: dict[str, Array], loss: Float[Array, ""], n: Int[Array, ""]
) -> dict[str, Array]:
    """Equation 2 for the n-th loss, n = 1, 2, ..."""
    rate = jnp.maximum(1 / n.astype(jnp.float32), 1 / SPIKE_STEPS)
    difference = loss - statistics["mean"]
    variance = (1 - rate) * (statistics["variance"] + rate * difference**2)
    return {"mean": statistics["mean"] + rate * difference, "variance": variance}


def _judge(
    state: TrainState, norm: Array, loss: Array, optimizer: Optimizer
) -> tuple[Bool[Array, ""], dict[str, Any]]:
    """Whether the step is taken, and `extra` with what is counted of it."""
    extra = dict(state.extra)
    ok = jnp.isfinite(norm) & jnp.isfinite(loss)
    if optimizer.max_loss_deviations:
        known, taken = extra[LOSSES], updates_done(state)
        ok &= ~is_spike(known, loss, taken, optimizer.max_loss_deviations)
        new = loss_statistics(known, loss, taken + 1)
        extra[LOSSES] = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, known)
    bad = (~ok).astype(jnp.int32)
    extra["skipped_steps"] = state.extra["skipped_steps"] + bad
    extra["skipped_in_a_row"] = (state.extra["skipped_in_a_row"] + 1) * bad
    return ok, extra


def updates_done(state: TrainState) -> Int[Array, ""]:
    """The steps that were not skipped."""
    return state.step - state.extra["skipped_steps"]


def _by_lines(optimizer: Optimizer) -> bool:
    """Whether leaves are updated as lines of numbers: on GPUs, where they are not split.

    A convolution's gradient lies otherwise than its kernel. As lines it is written once as the
    kernel lies; else XLA transposes kernels, moments and averages to meet it, and back.
    """
    aim = target.current()
    split = aim.mesh is not None and aim.mesh.shape.get("fsdp", 1) > 1
    return aim.platform == "gpu" and not split and optimizer.by_element


def _lines(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1) if x.ndim else x, tree)


def _norm(trees: list[Any], lines: bool) -> Float[Array, ""]:
    """The norm of all leaves of all trees.

    XLA makes two kernels of a large leaf's sum on GPUs and one of a small one's, which there cost
    as much as they weigh: small ones are joined there, large ones summed to rows, and all of that
    once (the barrier keeps XLA from taking it apart again).
    """
    if not lines:
        return optax.tree.norm(trees)
    leaves = jax.tree.leaves(trees)
    small = [leaf.reshape(-1) for leaf in leaves if leaf.size < SMALL]
    parts = [jnp.square(jnp.concatenate(small))] if small else []
    for leaf in leaves:
        if leaf.size >= SMALL:
            rows = max(n for n in range(1, ROWS + 1) if leaf.size % n == 0)
            parts.append(jnp.square(leaf).reshape(rows, -1).sum(1))
    return jnp.sqrt(lax.optimization_barrier(jnp.concatenate(parts)).sum())


def _taken(ok: Bool[Array, ""], update: Callable[[Any], Any], old: Any, lines: bool) -> Any:
    """`update(old)` where `ok`, else `old`.

    On CPUs by a branch: old buffers are then updated in place, where choosing between old and new
    copies them (experiments/results/speed: a quarter of the time). On GPUs a branch copies them,
    four a leaf, and waits for the host; there the choice is part of the update's own kernels
    (experiments/results/targets).
    """
    if target.current().platform != "gpu":
        return lax.cond(ok, update, lambda old: old, old)
    before = _lines(old) if lines else old
    new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), update(before), before)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), new, old)


def apply_gradients(
    state: TrainState, grads: Params, loss: Float[Array, ""], optimizer: Optimizer, ema: Ema
) -> tuple[TrainState, Metrics]:
    """One guarded update of the networks in `grads`; the step count advances by one.

    A step whose loss or gradient norm is not finite, or whose loss is a spike, changes no
    parameter, optimiser state or average: it is counted in `extra["skipped_steps"]` and
    `extra["skipped_in_a_row"]`.
    """
    lines = _by_lines(optimizer)
    if lines:
        grads = lax.optimization_barrier(_lines(grads))
    # In the optimiser's order and not by name: a sum of floats depends on it.
    norm = _norm([grads[name] for name in optimizer.transforms if name in grads], lines)
    ok, extra = _judge(state, norm, loss, optimizer)
    done = updates_done(state)
    decay, rates = ema.decay_at(done + 1), ema.profile_rates(done + 1)

    def update(old):
        params, opt_state, averages = (dict(part) for part in old[:3])
        profiles = {length: dict(part) for length, part in old[3].items()}
        clipped = grads
        if optimizer.clip_norm:
            scale = optimizer.clip_norm / jnp.maximum(norm, optimizer.clip_norm)
            clipped = jax.tree.map(lambda g: g * scale, grads)
        for name, network_grads in clipped.items():
            updates, opt_state[name] = optimizer.transforms[name].update(
                network_grads, opt_state[name], params[name]
            )
            params[name] = optax.apply_updates(params[name], updates)
            if name in averages:
                averages[name] = averaged(averages[name], params[name], decay)
            for length, part in profiles.items():
                if name in part:
                    part[name] = update_profile(part[name], params[name], rates[length])
        return params, opt_state, averages, profiles

    old = (state.params, state.opt_state, state.ema, state.profiles)
    params, opt_state, averages, profiles = _taken(ok, update, old, lines)
    metrics = {
        "grad_norm": norm,
        # Of the new ones: the norm of the old ones would keep them alive.
        "param_norm": _norm([params[name] for name in optimizer.transforms], lines),
        "learning_rate": optimizer.learning_rate(done),
        "skipped_steps": extra["skipped_steps"],
        "skipped_in_a_row": extra["skipped_in_a_row"],
    }
    state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=averages,
        extra=extra,
        profiles=profiles,
    )
    return state, metrics
