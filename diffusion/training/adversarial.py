"""The adversarial part of a first stage: losses of both networks, and the adaptive weight.

With D the discriminator's logits, one a patch, x an image, x^ its reconstruction, and means over
patches and images (https://arxiv.org/abs/2012.09841, equations 5-7; LDM's
`ldm/modules/losses/contperceptual.py`):

    (1)  L_D = 1/2 mean max(0, 1 - D(x)) + 1/2 mean max(0, 1 + D(x^))           hinge
    (2)  L_D = 1/2 mean softplus(-D(x))  + 1/2 mean softplus(D(x^))             vanilla
    (3)  L_G = -mean D(x^)                                                      of the autoencoder
    (4)  lambda = weight * clip(|d L_nll / d W| / (|d L_G / d W| + 1e-4), 0, 1e4)

W is the kernel of the decoder's last layer, L_nll the reconstruction's loss without KL or codebook.
The autoencoder minimises L_nll + ... + lambda L_G, with lambda a constant: however large the sum
over pixels is, the discriminator's pull on the last layer is `weight` times the image's.

Both gradients of (4) are means over the whole batch, over devices and accumulated parts, before
their norms are taken. LDM takes the norms on each device before it averages, and so has another
lambda on another number of GPUs.

Steps are those of the autoencoder, counted from 0, whatever number of optimisers there is
(Lightning from 1.6 on counts each of them, and starts the discriminator at half the step written):

    D trains from step `start_steps`; the autoencoder sees it from `start_steps + warmup_steps`.

LDM has no warm-up. What is not yet in use is not computed either. LDM's discriminator sees
reconstructions by the autoencoder as it is after that step's update, and draws their latents again;
here both networks take their gradients at the same point, from the same reconstructions, which
saves a pass. Before D trains its gradients are zeros, through Adam as in LDM.

Healthy (of hinge): logits of real patches between 0 and 1 and of fakes between -1 and 0, in a tug
of war; L_D between 0.5 and 1. L_D at 1 with logits at 0: D sees nothing; train it longer before it
counts (`warmup_steps`), or start later. L_D near 0 with logits beyond -1 and 1: it has won, and
what it asks for is noise; lower `weight`. lambda moves slowly, within a factor of ten; at its bound
of 1e4 the discriminator is flat or unused.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from diffusion.models.discriminator import STATISTICS

EPSILON, BOUND = 1e-4, 1e4  # of equation 4


def hinge(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Equation 1."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def vanilla(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Equation 2."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


LOSSES: dict[str, Callable[[Array, Array], Array]] = {"hinge": hinge, "vanilla": vanilla}


def generator_loss(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Equation 3."""
    return -fake.mean()


def adaptive_weight(
    nll_grad: Float[Array, "..."], generator_grad: Float[Array, "..."], weight: float
) -> Float[Array, ""]:
    """Equation 4, of gradients that are means over the whole batch."""
    norms = [jnp.linalg.norm(g.ravel()) for g in (nll_grad, generator_grad)]
    return weight * jnp.clip(norms[0] / (norms[1] + EPSILON), 0, BOUND)


def when(condition: Array, function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` where the scalar holds, zeros of that structure where it does not."""
    shapes = jax.eval_shape(function, *arguments)

    def zeros(*_):
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return lax.cond(condition, function, zeros, *arguments)


@dataclasses.dataclass(frozen=True)
class Adversary:
    """The discriminator and when and how much it counts. Holds no arrays.

    loss: "hinge" or "vanilla". weight: of equation 4. start_steps, warmup_steps: see above.
    """

    network: Any
    loss: str = "hinge"
    weight: float = 0.5
    start_steps: int = 50_001
    warmup_steps: int = 0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(
                f"loss.adversarial={self.loss!r} is unknown: use one of {sorted(LOSSES)}, or '' "
                "for none"
            )
        for name in ("weight", "start_steps", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.adversarial_{name}={getattr(self, name)} must be 0 or more")

    def trains(self, step: Array) -> Array:
        return step >= self.start_steps

    def counts(self, step: Array) -> Array:
        """Whether the autoencoder sees it."""
        return step >= self.start_steps + self.warmup_steps

    def init(self, key: Key[Array, ""], x: Float[Array, "..."]) -> tuple[Any, Any]:
        """Parameters, and the running statistics of batch norm ({} with group norm)."""
        variables = self.network.init(key, x)
        return variables["params"], variables.get(STATISTICS, {})

    def generator(
        self, params: Any, statistics: Any, fake: Float[Array, "batch ..."]
    ) -> Float[Array, ""]:
        """Equation 3 of reconstructions. Batch norm goes by this batch's statistics."""
        return generator_loss(self._logits(params, statistics, fake)[0])

    def discriminator(
        self, params: Any, statistics: Any, real: Float[Array, "batch ..."], fake: Array
    ) -> tuple[Float[Array, ""], tuple[dict[str, Array], Any]]:
        """Equation 1 or 2; the mean logits; and the running statistics after both batches."""
        real_logits, statistics = self._logits(params, statistics, real)
        fake_logits, statistics = self._logits(params, statistics, lax.stop_gradient(fake))
        loss = LOSSES[self.loss](real_logits, fake_logits)
        logits = {"logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
        return loss, ({"discriminator_loss": loss, **logits}, statistics)

    def _logits(self, params: Any, statistics: Any, x: Array) -> tuple[Array, Any]:
        variables = {"params": params, STATISTICS: statistics} if statistics else {"params": params}
        logits, changed = self.network.apply(variables, x, train=True, mutable=[STATISTICS])
        return logits, changed.get(STATISTICS, {})
