"""Low-rank adaptation of dense layers, as pure functions on parameter trees.

LoRA (https://arxiv.org/abs/2106.09685, eq. 3) adds to a frozen kernel W (in, out) a product of rank
r, of which alone is trained:

    (1)  W' = W + (alpha / r) A B,     A (in, r),  B (r, out),     B = 0 at first

A tree of updates has the structure of the parameters it adapts, cut down to the adapted layers:
where those have `{"kernel": W, ...}` it has `{"down": A, "up": B}`; a convolution's W is
(*window, in, out) and its A (*window, in, r). DoRA (https://arxiv.org/abs/2402.09353, eq. 5) has a
"magnitude" m (out,) too, the norm of W' an output: W'' = m W' / |W'|. The network runs on merged
parameters and never knows; the gradient of A and B goes through eq. 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which layers are adapted, and how: `targets` are names of dense layers ("to_q", ...).

    initialisation: of A, "uniform" or "gaussian" (`init`).
    """

    rank: int = 4
    alpha: float | int = 4.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out")
    initialisation: str = "uniform"

    def __post_init__(self) -> None:
        if self.initialisation not in ("uniform", "gaussian"):
            raise ValueError(
                f"model.lora.initialisation={self.initialisation!r} is unknown: use uniform or "
                "gaussian"
            )
        if self.rank < 1:
            raise ValueError(f"model.lora.rank={self.rank} must be at least 1")

    @property
    def scale(self) -> float:
        """alpha / r of eq. 1."""
        return self.alpha / self.rank

    def init(self, key: Key[Array, ""], params: Mapping[str, Any]) -> Tree:
        """Updates that change nothing yet, for the layers of `params` (arrays, or their shapes).

        A is uniform within in^(-1/2), as PEFT has it, or N(0, 1 / rank^2), as Diffusers' training
        scripts ask of it (init_lora_weights="gaussian"). ValueError where no layer has a target's
        name.
        """
        kernels = self._kernels(params)
        flat: dict[tuple[str, ...], Array] = {}
        for number, (path, kernel) in enumerate(sorted(kernels.items())):
            width, out = kernel.shape
            bound = width**-0.5
            layer_key = jax.random.fold_in(key, number)
            shape = (width, self.rank)
            if self.initialisation == "gaussian":
                down = jax.random.normal(layer_key, shape) / self.rank
            else:
                down = jax.random.uniform(layer_key, shape, minval=-bound, maxval=bound)
            flat[*path, "down"] = down
            flat[*path, "up"] = jnp.zeros((self.rank, out))
        return unflatten_dict(flat)

    def merge(self, params: Mapping[str, Any], tree: Tree) -> Tree:
        """Eq. 1."""
        return merge(params, tree, self.scale)

    def _kernels(self, params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
        """Kernels (in, out) of the layers with a target's name, by the path of the layer."""
        flat: dict[Any, Any] = flatten_dict(dict(params))  # pyright: ignore[reportAssignmentType]
        found = {
            path[:-1]: leaf
            for path, leaf in flat.items()
            if path[-1] == "kernel" and path[-2] in self.targets and len(leaf.shape) == 2
        }
        if not found:
            raise ValueError(
                f"model.lora.targets={self.targets} name no dense layer of the network: use those "
                "of attention, such as to_q"
            )
        return found


def merge(params: Mapping[str, Any], tree: Tree, scale: float | int = 1.0) -> Tree:
    """Parameters with `scale` times the updates added to their kernels.

    ValueError where an update has no kernel of its shape.
    """
    flat: dict[Any, Any] = dict(flatten_dict(dict(params)))  # pyright: ignore[reportAssignmentType]
    updates: dict[Any, Any] = flatten_dict(tree)  # pyright: ignore[reportAssignmentType]
    for path in dict.fromkeys(path[:-1] for path in updates):
        delta = updates[*path, "down"] @ updates[*path, "up"]
        kernel = flat.get((*path, "kernel"))
        if kernel is None or kernel.shape != delta.shape:
            found = "no kernel" if kernel is None else f"a kernel of shape {tuple(kernel.shape)}"
            raise ValueError(
                f"the low-rank update of {'/'.join(path)} has shape {tuple(delta.shape)}, but the "
                f"network has {found} there: it was made for another network"
            )
        kernel = kernel + (scale * delta).astype(kernel.dtype)
        if (magnitude := updates.get((*path, "magnitude"))) is not None:
            norm = jnp.sqrt(jnp.sum(kernel**2, axis=range(kernel.ndim - 1), keepdims=True))
            kernel = kernel * (magnitude.reshape(norm.shape) / norm).astype(kernel.dtype)
        flat[*path, "kernel"] = kernel
    return unflatten_dict(flat)
