"""Learning-rate schedules and optimisers, as optax chains.

The learning rate written in a config is the one used: nothing here scales it by the batch or the
number of devices (LDM's `main.py` does; its configs here hold the product).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array

Rate = Callable[..., Array]  # step -> learning rate
BY_ELEMENT = ("adam", "radam", "adamw", "sgd")  # which do not look at a leaf's shape


def learning_rate(
    peak: float, warmup_steps: int = 0, decay_steps: int = 0, decay: str = "constant"
) -> Rate:
    """Linear warm-up from 0 at step 0 to `peak` (as DDPM and LDM have it), then `decay`.

    decay: "constant"; "cosine" to 0 at `decay_steps`; "linear" to 0 at `decay_steps`;
    "inverse_sqrt", peak / sqrt(max(step / decay_steps, 1)) (EDM2, arXiv:2312.02696, eq. 67).
    `decay_steps` counts from step 0, warm-up included.

    Raises ValueError for an unknown `decay`, or a decay that ends within its warm-up.
    """
    shapes = {
        "constant": lambda step: jnp.ones_like(step),
        "cosine": lambda step: 0.5 * (1 + jnp.cos(jnp.pi * _progress(step))),
        "linear": lambda step: 1 - _progress(step),
        "inverse_sqrt": lambda step: 1 / jnp.sqrt(jnp.maximum(step / decay_steps, 1)),
    }
    if decay not in shapes:
        raise ValueError(f"optim.decay={decay!r} is unknown: use one of {sorted(shapes)}")
    if decay != "constant" and decay_steps <= warmup_steps:
        raise ValueError(
            f"optim.decay_steps={decay_steps} must exceed optim.warmup_steps={warmup_steps} "
            f"for optim.decay={decay!r}"
        )

    def _progress(step):
        return jnp.clip((step - warmup_steps) / (decay_steps - warmup_steps), 0, 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, step / warmup_steps) if warmup_steps else 1.0
        return peak * warm * shapes[decay](step)

    return rate


def make_transform(
    rate: Rate,
    name: str = "adam",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
) -> optax.GradientTransformation:
    """Adam, RAdam, AdamW, SGD or Muon with a scheduled rate. Raises ValueError for another name.

    "radam" (arXiv:1908.03265) needs no warm-up: its own follows from the variance of its steps.
    "muon" (Jordan et al. 2024, as scaled by Moonlight, arXiv:2502.16982): orthogonalised momentum
    for matrices, their updates of AdamW's usual size, so that one rate serves both; AdamW for what
    is no matrix (biases, norms, convolutions, tables of embeddings).
    """
    if name in ("adam", "radam"):
        if weight_decay:
            raise ValueError(
                f"optim.weight_decay={weight_decay} has no effect with optim.name={name!r}: "
                "use optim.name='adamw'"
            )
        return {"adam": optax.adam, "radam": optax.radam}[name](rate, b1=b1, b2=b2, eps=eps)
    if name == "adamw":
        return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if name == "sgd":
        return optax.sgd(rate, momentum=b1 or None)
    if name == "muon":
        if not 0 <= momentum < 1:
            raise ValueError(f"optim.momentum={momentum} must lie in [0, 1): Muon's is 0.95")
        muon = optax.contrib.muon(
            rate, beta=momentum, weight_decay=weight_decay, consistent_rms=0.2
        )
        adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
        return optax.partition({"muon": muon, "adamw": adamw}, _kinds)
    raise ValueError(f"optim.name={name!r} is unknown: use adam, radam, adamw, sgd or muon")


def _kinds(params: Any) -> Any:
    """ "muon" for the kernels of dense layers, "adamw" for all else."""

    def kind(path, leaf):
        dense = leaf.ndim == 2 and path[-1] == jax.tree_util.DictKey("kernel")
        return "muon" if dense else "adamw"

    return jax.tree_util.tree_map_with_path(kind, params)
