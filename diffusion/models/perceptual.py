"""LPIPS: how different two images look, as a distance of VGG-16's features.

Zhang et al. 2018 (https://arxiv.org/abs/1801.03924, eq. 1), with VGG-16 (https://arxiv.org/abs/
1409.1556, configuration D) cut after the last convolution of each of its five stages. With f_l the
activations there, of h_l by w_l places, scaled to unit length across channels,

    (1)  u_l(x) = f_l(x) / (|f_l(x)| + 1e-10)
    (2)  d(x, y) = sum_l 1 / (h_l w_l) sum over places of w_l . (u_l(x) - u_l(y))^2

where w_l is a learned vector of one weight a channel, none of them negative. Images in [-1, 1] are
first shifted and scaled to the range VGG was trained in (`ScalingLayer` of
richzhang/PerceptualSimilarity:lpips/lpips.py). Weights: `interop/perceptual.py`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion.models.layers import Conv, Dropout

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10
MIN_SIZE = 2 ** (len(STAGES) - 1)  # pixels a side that leave one place at the last stage


class LPIPS(nn.Module):
    """`apply({"params": p}, x, y) -> (batch,)`, eq. 2 of images in [-1, 1], grey or colour.

    dtype: what VGG computes in; features are compared in float32 or wider. dropout: before each
    head, where there are keys; LDM's training has a half.
    """

    dtype: Any = None
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        y: Float[Array, "..."],
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch"]:
        """`keys`: of the dropout.

        ValueError where images are not planes of 1 or 3 channels, 16 pixels a side or more.
        """
        if x.ndim != 4 or x.shape[-1] not in (1, 3) or min(x.shape[1:3]) < MIN_SIZE:
            raise ValueError(
                f"LPIPS of images of shape {tuple(x.shape[1:])}: it needs two axes of {MIN_SIZE} "
                "pixels or more and 1 or 3 channels; set loss.perceptual_weight=0 for others"
            )
        wide = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
        both = jnp.concatenate([x.astype(wide), y.astype(wide)])
        both = jnp.broadcast_to(both, (*both.shape[:3], 3))
        h = (both - jnp.asarray(SHIFT, wide)[None, None, None]) / jnp.asarray(SCALE, wide)[
            None, None, None
        ]
        total, index = jnp.zeros(x.shape[0], wide), 0
        for stage, widths in enumerate(STAGES):
            h = nn.max_pool(h, (2, 2), (2, 2)) if stage else h
            for width in widths:
                h = nn.relu(Conv(width, dtype=self.dtype, name=f"conv_{index}")(h))
                index += 1
            u, v = jnp.split(_unit(h.astype(wide)), 2)
            head = Conv(1, 1, use_bias=False, name=f"head_{stage}")
            difference = Dropout(self.dropout, name=f"dropout_{stage}")(jnp.square(u - v), keys)
            total += head(difference).mean((1, 2, 3))
        return total


def _unit(f: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w channels"]:
    """Eq. 1. Where all channels are 0 the root has no gradient: 0 is given."""
    square = jnp.square(f).sum(-1, keepdims=True)
    zero = square == 0
    return f / (jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square))) + EPSILON)
