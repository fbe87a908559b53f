"""The classification task: the digit classifier that the default job is evaluated with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from diffusion.process import keys as ks
from diffusion.training import codec
from diffusion.training import state as ts
from diffusion.training.ema import Ema
from diffusion.training.state import Metrics, Optimizer, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Softmax cross-entropy on `batch["label"]` from `batch["image"]` (uint8)."""

    network: Any
    sample_shape: tuple[int, ...]
    optimizer: Optimizer
    ema: Ema
    accumulate: int = 1

    def init(self, key: Key[Array, ""]) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params = {
            "classifier": self.network.init(init_key, jnp.zeros((1, *self.sample_shape)))["params"]
        }
        return ts.create_state(run_key, params, self.optimizer, self.ema, {})

    def train_step(
        self, state: TrainState, batch: dict[str, Array], frozen: Params, axis_name=None
    ) -> tuple[TrainState, Metrics]:
        def loss_fn(params, batch):
            keys = ks.example_keys(state.rng, state.step, batch["position"])
            logits = self.logits(params, batch["image"], ks.stream(keys, ks.DROPOUT))
            return _cross_entropy(logits, batch["label"]).mean()

        grad_fn = ts.accumulate(jax.value_and_grad(loss_fn), self.accumulate)
        loss, grads = ts.mean_over_devices(grad_fn(state.params, batch), axis_name)
        state, metrics = ts.apply_gradients(state, grads, loss, self.optimizer, self.ema)
        return state, {"loss": loss, **metrics}

    def eval_step(
        self, state: TrainState, batch: dict[str, Array], frozen: Params
    ) -> dict[str, Array]:
        """Sums over a batch: "loss", "accuracy" and "count" of valid examples."""
        logits = self.logits(state.inference_params, batch["image"])
        valid = batch["valid"].astype(jnp.float32)
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        return {
            "loss": jnp.sum(_cross_entropy(logits, batch["label"]) * valid),
            "accuracy": jnp.sum(right * valid),
            "count": jnp.sum(valid),
        }

    def logits(
        self, params: Params, image: Array, keys: Array | None = None
    ) -> Float[Array, "batch classes"]:
        x = codec.signed(image)
        return self.network.apply({"params": params["classifier"]}, x, keys=keys)


def _cross_entropy(logits: Array, labels: Array) -> Float[Array, " batch"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
