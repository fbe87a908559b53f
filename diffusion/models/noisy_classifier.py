"""ADM's classifier of noised pictures: the U-Net's way down, then attention pooling.

Dhariwal and Nichol (https://arxiv.org/abs/2105.05233, section 4 and appendix H; openai/
guided-diffusion: guided_diffusion/unet.py, EncoderUNetModel with pool "attention"). With places
h_1 .. h_n of eq. 3 of `unet.py`, normed and through silu, and learned positions p_0 .. p_n,

    (1)  h_0 = mean h_i;   logits = W attention(h_0 + p_0; all h_i + p_i)

as CLIP's image encoder pools (https://arxiv.org/abs/2103.00020).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from diffusion.models.attention import Attention, to_tokens
from diffusion.models.group_norm import GroupNorm
from diffusion.models.unet import UNet


class NoisyClassifier(UNet):
    """`net.apply({"params": p}, x, t)`: logits (batch, classes) of x at the time t.

    The fields are the U-Net's (`out_channels` is not used); of one size of pictures.
    """

    classes: int = 1000

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *space channels"],
        t: Num[Array, ""] | Num[Array, "batch"],
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Float32 or wider; `keys` turn dropout on. ValueError as the U-Net's."""
        self._check(x, None, None)
        temb = self._embed(x, t, None, None, None)
        h, _ = self._down(x, temb, None, None, keys)
        h = self._middle(h, temb, None, None, keys)
        h = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm_out")(h, silu=True)
        tokens = to_tokens(h)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        init = nn.initializers.normal(tokens.shape[-1] ** -0.5)
        places = self.param("positions", init, tokens.shape[1:], jnp.float32)
        tokens = tokens + places.astype(tokens.dtype)[None]
        pool = Attention(
            *self.head_shape(self.levels - 1),
            qkv_bias=True,
            out_features=self.classes,
            dtype=self.dtype,
            name="pool",
        )
        logits = pool(tokens[:, :1], tokens)[:, 0]
        return logits.astype(jnp.promote_types(x.dtype, jnp.float32))
