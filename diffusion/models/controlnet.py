"""ControlNet: a trainable copy of a U-Net's first half that reads a picture and steers the U-Net.

With the U-Net's skips s_1 .. s_n and middle m (`unet.py`, eqs. 2-3), a copy of its encoder that
sees the noisy x and an embedding E of a condition c (an outline, a depth map), and convolutions Z
that are zero at first (https://arxiv.org/abs/2302.05543, eqs. 2-4):

    (1)  s'_i, m' = encoder(conv_in(x) + E(c), t, context)
    (2)  s_i <- s_i + w Z_i(s'_i),       m <- m + w Z_m(m')

so that at the start nothing is changed and no noise enters the U-Net; w weighs the control when
sampling. E is LDM's habit in small: a 3x3 convolution, then for each further width one at the same
size and one of stride 2, SiLU after each, and a last one that is zero at first.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from diffusion.models.layers import Conv
from diffusion.models.unet import UNet

zeros = nn.initializers.zeros


class ControlNet(UNet):
    """`net.apply({"params": p}, x, t, hint, context, ...)`: residuals for `UNet(residuals=...)`.

    Its fields are those of the U-Net that it steers (`out_channels` is not used), and
    hint_widths: channels of E's convolutions; the condition is 2^(len - 1) times as large as x.
    """

    hint_widths: tuple[int, ...] = (16, 32, 96, 256)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channels"],
        t: Num[Array, ""] | Num[Array, "batch"],
        hint: Float[Array, "batch *hint_space hint_channels"],
        context: Float[Array, "batch tokens width"] | None = None,
        context_mask: Bool[Array, "batch tokens"] | None = None,
        labels: Int[Array, "batch"] | None = None,
        keys: Key[Array, "batch"] | None = None,
        vector: Float[Array, "batch numbers"] | None = None,
    ) -> list[Float[Array, "batch ..."]]:
        """Z of eq. 2, one a skip and one for the middle. `hint` in [0, 1], as Diffusers has it.

        ValueError where the hint's size does not belong to that of x.
        """
        self._check(x, context, labels, vector)
        self._check_hint(x, hint)
        temb = self._embed(x, t, context, context_mask, labels, vector=vector)
        h, skips = self._down(x, temb, context, context_mask, keys, added=self._embed_hint(hint))
        h = self._middle(h, temb, context, context_mask, keys)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        out = [self._zero(s, f"zero_{i}") for i, s in enumerate(skips)] + [
            self._zero(h, "zero_mid")
        ]
        return [r.astype(wide) for r in out]

    def _embed_hint(self, hint: Array) -> Array:
        """E of eq. 1."""
        first, *rest = self.hint_widths
        h = nn.silu(Conv(first, dtype=self.dtype, name="hint_in")(hint))
        for i, width in enumerate(rest):
            h = nn.silu(Conv(h.shape[-1], dtype=self.dtype, name=f"hint_{2 * i}")(h))
            down: Any = Conv(
                width, strides=2, padding=1, dtype=self.dtype, name=f"hint_{2 * i + 1}"
            )
            h = nn.silu(down(h))
        width = min(self.channels, self.width(0))  # of conv_in, which it joins
        return Conv(width, kernel_init=zeros, dtype=self.dtype, name="hint_out")(h)

    def _zero(self, h: Array, name: str) -> Array:
        point = Conv(h.shape[-1], kernel_size=1, kernel_init=zeros, dtype=self.dtype, name=name)
        return point(h)

    def _check_hint(self, x: Array, hint: Array) -> None:
        factor = 2 ** (len(self.hint_widths) - 1)
        wanted = tuple(size * factor for size in x.shape[1:-1])
        if hint.shape[1:-1] != wanted:
            raise ValueError(
                f"the control picture has size {hint.shape[1:-1]}, but the ControlNet with "
                f"hint_widths={self.hint_widths} needs {wanted}: resize the picture"
            )
