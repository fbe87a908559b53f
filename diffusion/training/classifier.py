"""The classification task: the digit classifier that the default job is evaluated with, or ADM's of
noised pictures (`models/noisy_classifier.py`), told x_t and t as the denoiser it will guide is:

    (1)  x_t = alpha(t) x_0 + sigma(t) eps,   t as for a denoiser (arXiv:2105.05233, section 4)

x_0 is a picture or, as the denoiser's, a stored latent (LDM-8-G, arXiv:2112.10752, table 10).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from diffusion.process import gaussian, losses
from diffusion.process import keys as ks
from diffusion.process.schedules import Schedule
from diffusion.training import codec
from diffusion.training import state as ts
from diffusion.training.ema import Ema
from diffusion.training.state import Metrics, Optimizer, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Softmax cross-entropy on `batch["label"]` from `batch["image"]` (uint8) or stored moments of
    latents.

    noising: the schedule of eq. 1, whose network takes t as well; None: pictures as they are.
    """

    network: Any
    sample_shape: tuple[int, ...]
    optimizer: Optimizer
    ema: Ema
    accumulate: int = 1
    noising: Schedule | None = None
    flip: bool = False

    def init(
        self,
        key: Key[Array, ""],
        latent_shift: Float[Array, " channels"] | None = None,
        latent_scale: Float[Array, " channels"] | None = None,
    ) -> TrainState:
        """The state at step 0. Shift and scale of latents: `codec.py`, equation 2."""
        init_key, run_key = jax.random.split(key)
        time = () if self.noising is None else (jnp.zeros(1),)
        x = jnp.zeros((1, *self.sample_shape))
        params = {"classifier": self.network.init(init_key, x, *time)["params"]}
        extra = {}
        if latent_shift is not None and latent_scale is not None:
            extra = {"latent_shift": latent_shift, "latent_scale": latent_scale}
        return ts.create_state(run_key, params, self.optimizer, self.ema, extra)

    def train_step(
        self, state: TrainState, batch: dict[str, Array], frozen: Params, axis_name=None
    ) -> tuple[TrainState, Metrics]:
        def loss_fn(params, batch):
            keys = ks.example_keys(state.rng, state.step, batch["position"])
            logits = self.logits(params, batch, state.extra, keys, train=True)
            return _cross_entropy(logits, batch["label"]).mean()

        grad_fn = ts.accumulate(jax.value_and_grad(loss_fn), self.accumulate)
        loss, grads = ts.mean_over_devices(grad_fn(state.params, batch), axis_name)
        state, metrics = ts.apply_gradients(state, grads, loss, self.optimizer, self.ema)
        return state, {"loss": loss, **metrics}

    def eval_step(
        self, state: TrainState, batch: dict[str, Array], frozen: Params
    ) -> dict[str, Array]:
        """Sums over a batch: "loss", "accuracy" and "count" of valid examples."""
        keys = ks.held_out_keys(batch["index"])
        logits = self.logits(state.inference_params, batch, state.extra, keys)
        valid = batch["valid"].astype(jnp.float32)
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        return {
            "loss": jnp.sum(_cross_entropy(logits, batch["label"]) * valid),
            "accuracy": jnp.sum(right * valid),
            "count": jnp.sum(valid),
        }

    def logits(
        self,
        params: Params,
        batch: dict[str, Array],
        extra: dict[str, Array],
        keys: Array,
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """Noised by eq. 1 where there is noise; `keys` draw it, and in training dropout, mirroring
        and the posterior's latents."""
        if "mean" in batch:
            x = codec.stored(batch, extra, ks.stream(keys, ks.POSTERIOR) if train else None)
        else:
            x = codec.signed(batch["image"])
            if self.flip and train:
                x = ts.random_flip(x, ks.stream(keys, ks.DATA))
        dropout = ks.stream(keys, ks.DROPOUT) if train else None
        variables = {"params": params["classifier"]}
        network = functools.partial(self.network.apply, variables, keys=dropout)
        if self.noising is None:
            return network(x)
        t, noise = losses.draw(ks.stream(keys, ks.TIMES), self.noising, x)
        x_t = gaussian.q_sample(self.noising, x, t, noise)
        return gaussian.apply_network(network, self.noising, "eps", x_t, t)


def _cross_entropy(logits: Array, labels: Array) -> Float[Array, " batch"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
