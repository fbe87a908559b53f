"""Captions by several text encoders, Stable Diffusion XL's and 3's; XL's sizes of the picture."""

import dataclasses

import jax.numpy as jnp

from diffusion.models.layers import timestep_embedding
from diffusion.training.conditions import Batch, Given, Text


@dataclasses.dataclass(frozen=True)
class PooledText(Text):
    """Stable Diffusion 3's (arXiv:2403.03206, section 4): the context of a `TextPair` and its
    pooled caption. null_tokens may be -1: zeros.
    """

    def init(self, key):
        given, own = super().init(key)
        return self._given(given["context"], {}), own

    def encode(self, params, batch, keys=None):
        tokens = batch["tokens"]
        variables = {"params": params["text_encoder"]}
        out = self.encoder.apply(variables, jnp.maximum(tokens, 0), keys=keys)
        told = (tokens[:, 0] >= 0).astype(jnp.float32)
        told = {k: v * told.reshape(-1, *[1] * (v.ndim - 1)) for k, v in out.items()}
        return self._given(told, batch)

    def _given(self, out: Given, batch: Batch) -> Given:
        return out


@dataclasses.dataclass(frozen=True)
class SizedText(PooledText):
    """Stable Diffusion XL's (arXiv:2307.01952, section 2.2): the pooled caption is a vector, with
    `size_dim` sinusoids each of the original height and width, the crop's top and left, and the
    target height and width, in pixels: a column "sizes" (batch, 6), as data have it
    (`fitting.sizes`); without one, those of an uncropped picture of `size`.
    """

    size: tuple[int, int] = (1024, 1024)
    size_dim: int = 256

    def _given(self, out: Given, batch: Batch) -> Given:
        own = jnp.array([[*self.size, 0, 0, *self.size]], jnp.float32)
        sizes = batch.get("sizes", jnp.broadcast_to(own, (len(out["pooled"]), 6)))
        numbers = timestep_embedding(sizes.astype(jnp.float32).reshape(-1), self.size_dim, True, 0)
        numbers = numbers.reshape(len(sizes), -1).astype(out["pooled"].dtype)
        vector = jnp.concatenate([out["pooled"], numbers], axis=-1)
        return {"context": out["context"], "vector": vector}
