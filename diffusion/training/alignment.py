"""REPA: a transformer's tokens, aligned to what a frozen network sees in the clean picture.

Yu et al. (https://arxiv.org/abs/2410.06940, section 3.2, equations 8 and 9). With a block's tokens
h_n of x_t and, at the same places, features y_n of the picture without noise,

    (1)  L = L_denoise - weight / N sum_n cos(y_n, z_n),     z = W3 silu(W2 silu(W1 h))

z is trained with the denoiser and not needed afterwards. What is evaluated is L_denoise alone.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion.models.layers import Dense
from diffusion.models.positions import per_axis
from diffusion.process import keys as ks
from diffusion.training import codec
from diffusion.training import state as ts
from diffusion.training.denoiser import Denoiser
from diffusion.training.state import Params


class Projector(nn.Module):
    """z of eq. 1; width: of its two inner layers, out: of the features."""

    width: int
    out: int
    dtype: Any = None

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens features"]:
        for i, width in enumerate((self.width, self.width, self.out)):
            h = Dense(width, dtype=self.dtype, name=f"layer_{i}")(nn.silu(h) if i else h)
        return h.astype(jnp.promote_types(h.dtype, jnp.float32))


def cosine(
    z: Float[Array, "batch tokens features"], y: Float[Array, "batch tokens features"]
) -> Float[Array, "batch"]:
    """The mean over tokens of the cosine of z and y; of a vector that is zero it is 0."""
    square = jnp.sum(z**2, axis=-1) * jnp.sum(y**2, axis=-1)
    return jnp.mean(jnp.sum(z * y, axis=-1) * jax.lax.rsqrt(jnp.maximum(square, 1e-16)), axis=-1)


class Watched:
    """A network that remembers the tokens which its block puts out."""

    def __init__(self, network: Any, block: str):
        self.network, self.block = network, block
        self.tokens: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def apply(self, variables: Any, *arguments: Any, **told: Any) -> Array:
        told |= {"capture_intermediates": lambda module, _: module.name == self.block}
        out, state = self.network.apply(variables, *arguments, **told, mutable="intermediates")
        (found,) = state["intermediates"][self.block]["__call__"]
        self.tokens = found[0] if isinstance(found, tuple) else found  # MMDiT's words beside them
        return out


@dataclasses.dataclass(frozen=True)
class Aligned(Denoiser):
    """A `Denoiser` with eq. 1, of a transformer that is given pictures.

    features: a module whose `feature_map` of pictures in [-1, 1] has the grid that it is told,
    frozen, "features" among the parameters; "projector" is trained. block: whose tokens, the first
    being 1. projector_width: of its inner layers. ValueError for a block that there is not.
    """

    features: Any = None
    block: int = 8
    projector_width: int = 2048
    weight: float | int = 0.5

    def __post_init__(self):
        super().__post_init__()
        depth = getattr(self.network, "depth", 0)
        if self.projector_width < 1:
            raise ValueError(f"projector_width={self.projector_width} must be at least 1")
        if not 1 <= self.block <= depth or len(self.sample_shape) != 3:
            raise ValueError(
                f"block={self.block} must be one of the 1..{depth} of a transformer on two axes, "
                f"and what is diffused is {self.sample_shape}: choose another, or weight=0"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """The network's tokens an axis."""
        return tuple(
            n // p for n, p in zip(self.sample_shape, per_axis("patch", self.network.patch, 2))
        )

    def networks_init(self, key: Key[Array, ""]) -> Params:
        params, key = super().networks_init(key), jax.random.fold_in(key, 5)
        first = self.autoencoder
        factor, channels = (first.downsampling, first.image_channels) if first else (1, None)
        x = jnp.zeros(
            (1, *(n * factor for n in self.sample_shape[:2]), channels or self.sample_shape[2])
        )
        y, seen = self.features.init_with_output(key, x, self.grid, method="feature_map")
        tokens = jnp.zeros((1, 1, self.network.width))
        own = self._projector(y.shape[-1]).init(jax.random.fold_in(key, 1), tokens)
        return {**params, "features": seen["params"], "projector": own["params"]}

    def _projector(self, out: int) -> Projector:
        return Projector(self.projector_width, out, self.network.dtype)

    def loss(
        self,
        params: Params,
        extra: dict[str, Array],
        batch: dict[str, Array],
        keys: Array,
        train: bool,
        step: Array | int = 0,
    ) -> tuple[Float[Array, " batch"], dict[str, Array]]:
        """Equation 1; without `train` L_denoise alone."""
        if not train:
            return super().loss(params, extra, batch, keys, train, step)
        network = Watched(self.network, f"blocks_{self.block - 1}")
        watched = dataclasses.replace(self, network=network)
        loss, aux = Denoiser.loss(watched, params, extra, batch, keys, train, step)
        x = codec.signed(batch["image"])
        if self.flip:  # as `clean` has it
            x = ts.random_flip(x, ks.stream(keys, ks.DATA))
        frozen = {"params": params["features"]}
        y = self.features.apply(frozen, x, self.grid, method="feature_map")
        y = jax.lax.stop_gradient(y).reshape(len(y), -1, y.shape[-1])
        tokens = network.tokens[:, -y.shape[1] :]  # registers and labels are before the patches
        z: Any = self._projector(y.shape[-1]).apply({"params": params["projector"]}, tokens)
        return loss - self.weight * cosine(z, y), aux
