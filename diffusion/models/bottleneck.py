"""The bottlenecks of the first stage: a diagonal Gaussian, and vector quantisation.

KL bottleneck (https://arxiv.org/abs/1312.6114, eq. 10): logvar is clamped to [-30, 20], and

    (1)  z = mean + exp(logvar / 2) * noise
    (2)  KL(N(mean, exp(logvar)) || N(0, 1)) = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)

VQ bottleneck (https://arxiv.org/abs/1711.00937, eqs. 1-3; sg: stop gradient): the nearest code e_k,

    (3)  k = argmin_j |z - e_j|^2,   q = z + sg(e_k - z)
    (4)  loss = commitment * |sg(e_k) - z|^2 + codebook_weight * |e_k - sg(z)|^2

The weights 1.0 and 0.25 are what taming-transformers, LDM and Diffusers compute (`legacy`); the
paper has them the other way round. How much of the codebook is used:

    (5)  perplexity = exp(-sum_j p_j log p_j),   p_j: the fraction of places that took code j
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

LOGVAR_RANGE = (-30.0, 20.0)


@flax.struct.dataclass
class Posterior:
    """Diagonal Gaussian over latents, eq. 1. `mean` and `logvar`: (batch, *space, channels)."""

    mean: Any
    logvar: Any

    @property
    def std(self) -> Array:
        """Standard deviation, the shape of `mean`."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, keys: Key[Array, "batch"]) -> Float[Array, "batch *space channels"]:
        """One draw per example from its own key, eq. 1."""
        return self.mean + self.std * jax.vmap(self._noise)(keys)

    def kl(self) -> Float[Array, "batch"]:
        """Divergence from N(0, 1) in nats, summed over each example, eq. 2."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(tuple(range(1, terms.ndim)))

    def _noise(self, key: Key[Array, ""]) -> Array:
        return jax.random.normal(key, self.mean.shape[1:], self.mean.dtype)


@flax.struct.dataclass
class Code:
    """The code of a VQ model before quantisation, as a posterior without spread."""

    mean: Any

    @property
    def std(self) -> Array:
        """Zeros."""
        return jnp.zeros_like(self.mean)

    @property
    def logvar(self) -> Array:
        """The floor of the KL model's, since log 0 could not be stored as a finite number."""
        return jnp.full_like(self.mean, LOGVAR_RANGE[0])

    def sample(self, keys: Key[Array, "batch"]) -> Float[Array, "batch *space channels"]:
        """The mean: there is nothing to draw."""
        del keys
        return self.mean


@flax.struct.dataclass
class Quantized:
    """Result of eqs. 3-4.

    `codes`: (batch, *space, channels), straight-through; `indices`: (batch, *space); `loss`:
    (batch,), the mean of eq. 4 over an example.
    """

    codes: Any
    indices: Any
    loss: Any


def quantize(
    z: Float[Array, "batch *space channels"],
    codebook: Float[Array, "codes channels"],
    commitment: float = 1.0,
    codebook_weight: float = 0.25,
) -> Quantized:
    """Eqs. 3-4; the gradient of the codes with respect to `z` is the identity."""
    # Highest precision: TensorFloat-32 would change which code is nearest.
    product = jnp.einsum("...c,nc->...n", z, codebook, precision=lax.Precision.HIGHEST)
    length = jnp.square(codebook).sum(-1)
    indices = jnp.argmin(jnp.expand_dims(length, tuple(range(z.ndim - 1))) - 2 * product, axis=-1)
    nearest = codebook[indices]
    axes = tuple(range(1, z.ndim))
    commit = jnp.square(lax.stop_gradient(nearest) - z).mean(axes)
    embed = jnp.square(nearest - lax.stop_gradient(z)).mean(axes)
    codes = z + lax.stop_gradient(nearest - z)
    return Quantized(codes, indices, commitment * commit + codebook_weight * embed)


def code_counts(indices: Int[Array, "..."], num_codes: int) -> Float[Array, "{num_codes}"]:
    """How often each code was taken; counts add over batches and devices."""
    return jnp.bincount(indices.reshape(-1), length=num_codes).astype(jnp.float32)


def code_usage(counts: Float[Array, "codes"]) -> Float[Array, ""]:
    """Fraction of the codes that were taken at all."""
    return (counts > 0).mean(dtype=counts.dtype)


def perplexity(counts: Float[Array, "codes"]) -> Float[Array, ""]:
    """Eq. 5: the number of codes that, used evenly, would carry as much."""
    p = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(jax.scipy.special.entr(p).sum())
