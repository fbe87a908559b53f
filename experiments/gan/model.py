"""The GAN of the comparison, of 8x8x4 latents: DCGAN's plan (arXiv:1511.06434) without
normalisation, and R3GAN's loss (arXiv:2501.05441, eqs. 2 to 4), D the critic, G the generator:

    (1)  L_D = E softplus(D(G(z)) - D(x)) + gamma/2 E |grad D(x)|^2 + gamma/2 E |grad D(G(z))|^2
    (2)  L_G = E softplus(D(x) - D(G(z)))
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

NOISE = 64


class Generator(nn.Module):
    """(batch, NOISE) to (batch, 8, 8, 4)."""

    width: int

    @nn.compact
    def __call__(self, z: Float[Array, "batch noise"]) -> Float[Array, "batch 8 8 4"]:
        h = nn.leaky_relu(nn.Dense(16 * 2 * self.width)(z), 0.2).reshape(-1, 4, 4, 2 * self.width)
        h = nn.leaky_relu(Conv(2 * self.width)(h), 0.2)
        h = h.repeat(2, axis=1).repeat(2, axis=2)
        for _ in range(2):
            h = nn.leaky_relu(Conv(self.width)(h), 0.2)
        return Conv(4)(h)


class Critic(nn.Module):
    """(batch, 8, 8, 4) to (batch,)."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch 8 8 4"]) -> Float[Array, " batch"]:
        h = nn.leaky_relu(Conv(self.width)(x), 0.2)
        h = nn.leaky_relu(Conv(self.width)(h), 0.2)
        h = nn.leaky_relu(Conv(2 * self.width, stride=2)(h), 0.2)
        h = nn.leaky_relu(Conv(2 * self.width)(h), 0.2)
        return nn.Dense(1)(h.reshape(len(h), -1))[:, 0]


class Conv(nn.Module):
    """3x3 as one product: XLA's gradients of small convolutions are slow on CPUs, and equation 1
    takes them twice."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        height, width = x.shape[1:3]
        padded, every = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), self.stride
        near = [
            padded[:, i : i + height : every, j : j + width : every]
            for i in range(3)
            for j in range(3)
        ]
        dense = nn.Dense(self.width, kernel_init=nn.initializers.he_normal())
        return dense(jnp.concatenate(near, axis=-1))


@dataclasses.dataclass(frozen=True)
class Gan:
    """Both networks and their losses; `init` and `step` are pure. The state: parameters and
    Adam's moments of both networks, and the generator's average."""

    width: int
    gamma: float
    learning_rate: float
    decay: float = 0.999

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate, b1=0.0, b2=0.99)

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        keys = jax.random.split(key)
        params = {
            "generator": Generator(self.width).init(keys[0], jnp.zeros((1, NOISE))),
            "critic": Critic(self.width).init(keys[1], jnp.zeros((1, 8, 8, 4))),
        }
        adam = {name: self.optimizer.init(params[name]) for name in params}
        average = jax.tree.map(jnp.array, params["generator"])  # a copy: states are donated
        return {"params": params, "adam": adam, "ema": average}

    def critic_loss(self, critic: Any, fake: Array, real: Array) -> Array:
        """Equation 1."""
        network = Critic(self.width)

        def scores(x):
            return network.apply(critic, x)

        def steepness(x):
            slope = jax.grad(lambda x: scores(x).sum())(x)
            return jnp.square(slope).sum((1, 2, 3)).mean()

        lost = jax.nn.softplus(scores(fake) - scores(real)).mean()
        return lost + self.gamma / 2 * (steepness(real) + steepness(fake))

    def generator_loss(self, generator: Any, critic: Any, z: Array, real: Array) -> Array:
        """Equation 2."""
        fake, network = Generator(self.width).apply(generator, z), Critic(self.width)
        return jax.nn.softplus(network.apply(critic, real) - network.apply(critic, fake)).mean()

    def step(self, state: dict[str, Any], real: Array, key: Key[Array, ""]) -> dict[str, Any]:
        """The critic, then the generator, once each."""
        params, adam = dict(state["params"]), dict(state["adam"])
        z = jax.random.normal(key, (2, len(real), NOISE))
        fake = Generator(self.width).apply(params["generator"], z[0])
        slopes = jax.grad(self.critic_loss)(params["critic"], fake, real)
        change, adam["critic"] = self.optimizer.update(slopes, adam["critic"])
        params["critic"] = optax.apply_updates(params["critic"], change)
        loss = self.generator_loss
        slopes = jax.grad(loss)(params["generator"], params["critic"], z[1], real)
        change, adam["generator"] = self.optimizer.update(slopes, adam["generator"])
        params["generator"] = optax.apply_updates(params["generator"], change)
        average = optax.incremental_update(params["generator"], state["ema"], 1 - self.decay)
        return {"params": params, "adam": adam, "ema": average}
