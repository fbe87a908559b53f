"""Parameters as PyTorch's layers start, which CompVis's first stages keep.

nn.Conv2d and nn.Linear draw weights and biases alike from

    (1)  U(-b, b),   b = 1 / sqrt(fan_in)

(kaiming_uniform with a = sqrt(5)), the last convolutions and attention's output included; DDPM's
layers (`layers.py`) start larger, at Var = 2 / (fan_in + fan_out), biases and some kernels at zero.
"""

import math
import zlib
from typing import Any

import jax
from jaxtyping import Array, Key


def torch_defaults(key: Key[Array, ""], params: Any, path: tuple[str, ...] = ()) -> Any:
    """`params` with every layer that has a kernel drawn anew by eq. 1; norms and tables stay."""
    if "kernel" not in params:
        return {
            name: torch_defaults(key, tree, (*path, name)) if isinstance(tree, dict) else tree
            for name, tree in params.items()
        }
    own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
    bound = 1 / math.sqrt(math.prod(params["kernel"].shape[:-1]))
    return {
        name: jax.random.uniform(
            jax.random.fold_in(own, i), leaf.shape, leaf.dtype, minval=-bound, maxval=bound
        )
        for i, (name, leaf) in enumerate(sorted(params.items()))
    }
