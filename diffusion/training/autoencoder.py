"""The first-stage task: LDM's autoencoder (arXiv:2112.10752, section 3.1 and appendix G).

With x^ = D(z), z ~ q(z | x) = N(mean(x), std(x)^2), and B images in the batch:

    (1) L_rec = sum over pixels and channels of |x - x^| (or its square), divided by B
    (2) L_KL  = sum over the latent of KL(q(z | x) || N(0, 1)), divided by B
    (3) L     = L_rec + kl_weight L_KL

Sums and means are as LDM has them (`contperceptual.py`): the reconstruction is summed, so
`kl_weight` of 1e-6 is relative to a sum over pixels. LDM's `logvar` is left out: it is a parameter
there, but in no optimiser's list, and so stays 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion.training import state as ts
from diffusion.training.state import Ema, Metrics, Optimizer, Params, TrainState

RECONSTRUCTION = {"l1": jnp.abs, "l2": jnp.square}


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Reconstruction and KL on `batch["image"]` (uint8). Holds no arrays.

    sample_shape: (*space, channels) of the images. reconstruction: "l1" or "l2".
    """

    network: Any
    sample_shape: tuple[int, ...]
    optimizer: Optimizer
    ema: Ema
    reconstruction: str = "l1"
    kl_weight: float = 1e-6
    flip: bool = False
    accumulate: int = 1

    def __post_init__(self):
        if self.reconstruction not in RECONSTRUCTION:
            raise ValueError(
                f"loss.reconstruction={self.reconstruction!r} is unknown: use one of "
                f"{sorted(RECONSTRUCTION)}"
            )

    def init(self, key: Key[Array, ""]) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params = {
            "autoencoder": self.network.init(init_key, jnp.zeros((1, *self.sample_shape)))["params"]
        }
        return ts.create_state(run_key, params, self.optimizer, self.ema, {})

    def train_step(
        self, state: TrainState, batch: dict[str, Array], frozen: Params, axis_name=None
    ) -> tuple[TrainState, Metrics]:
        def loss_fn(params, batch):
            keys = ts.example_keys(state.rng, state.step, batch["position"])
            terms = self.terms(params, batch["image"], keys)
            means = jax.tree.map(jnp.mean, terms)
            return means["reconstruction"] + self.kl_weight * means["kl"], means

        grad_fn = ts.accumulate(jax.value_and_grad(loss_fn, has_aux=True), self.accumulate)
        (loss, means), grads = ts.mean_over_devices(grad_fn(state.params, batch), axis_name)
        state, metrics = ts.apply_gradients(state, grads, loss, self.optimizer, self.ema)
        return state, {"loss": loss, **means, **metrics}

    def eval_step(
        self, state: TrainState, batch: dict[str, Array], frozen: Params
    ) -> dict[str, Array]:
        """Sums over a batch of the terms, from the posterior's mean, and "count"."""
        terms = self.terms(state.inference_params, batch["image"], None)
        valid = batch["valid"].astype(jnp.float32)
        sums = {name: jnp.sum(value * valid) for name, value in terms.items()}
        loss = sums["reconstruction"] + self.kl_weight * sums["kl"]
        return {"loss": loss, **sums, "count": jnp.sum(valid)}

    def terms(
        self, params: Params, image: Array, keys: Key[Array, " batch"] | None
    ) -> dict[str, Float[Array, " batch"]]:
        """Equations 1 and 2 for each example, and its mean squared error.

        With keys the latent is sampled (and images flipped), without it is the mean.
        """
        x = image.astype(jnp.float32) / 127.5 - 1
        if self.flip and keys is not None:
            x = ts.random_flip(x, ts.stream(keys, ts.DATA))
        variables = {"params": params["autoencoder"]}
        posterior = self.network.apply(variables, x, method="encode")
        z = posterior.mean if keys is None else posterior.sample(ts.stream(keys, ts.POSTERIOR))
        error = (x - self.network.apply(variables, z, method="decode")).astype(jnp.float32)
        axes = tuple(range(1, x.ndim))
        return {
            "reconstruction": RECONSTRUCTION[self.reconstruction](error).sum(axes),
            "kl": posterior.kl(),
            "mse": jnp.square(error).mean(axes),
        }
