"""The diffusion task: DDPM on pixels, latent diffusion, with or without a condition.

With a schedule alpha(t), sigma(t), a network eps_theta and a frozen encoder E (LDM eq. 1 and 2,
arXiv:2112.10752; E is the identity for DDPM, arXiv:2006.11239 eq. 14):

    (1) z0  = scale (E(image) - shift)            latents of about unit variance
    (2) z_t = alpha(t) z0 + sigma(t) eps
    (3) L   = mean || eps - eps_theta(z_t, t, tau_theta(caption)) ||^2

tau_theta is the text encoder: trained jointly when it is among the state's parameters, frozen when
it is among the frozen ones. A fraction `drop_condition` of the captions is replaced by the empty
one (classes by the null class), for classifier-free guidance (arXiv:2207.12598, algorithm 1).

With a loss history, t is drawn more often where the loss is large and the loss divided by how much
more often (Improved DDPM section 3.3, arXiv:2102.09672; the equations are in `process/losses.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffusion.process import losses
from diffusion.training import state as ts
from diffusion.training.state import Ema, Metrics, Optimizer, Params, TrainState

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Flax modules and functions of the task; holds no arrays. See `experiments/build.py`.

    sample_shape: (*space, channels) of what is diffused. objective and draw come from
    `process/losses.py`. null_tokens is the encoded empty caption; null_label the extra class.
    loss_history is the empty history of second-moment resampling, None: t as `draw` has it.
    """

    unet: Any
    sample_shape: tuple[int, ...]
    objective: Callable
    draw: Callable
    optimizer: Optimizer
    ema: Ema
    text_encoder: Any = None
    train_text_encoder: bool = False
    null_tokens: tuple[int, ...] = ()
    mask_padding: bool = False
    null_label: int | None = None
    drop_condition: float = 0.0
    autoencoder: Any = None
    flip: bool = False
    accumulate: int = 1
    loss_history: Any = None

    def __post_init__(self):
        if self.loss_history is not None and self.accumulate > 1:
            raise ValueError(
                f"train.accumulate={self.accumulate} with process.times='second_moment', which "
                "keeps a history of single losses: set train.accumulate=1"
            )

    # -- the task's interface ------------------------------------------------------------------

    def init(
        self,
        key: Key[Array, ""],
        latent_shift: Float[Array, " channels"] | None = None,
        latent_scale: Float[Array, " channels"] | None = None,
    ) -> TrainState:
        """The state at step 0. Shift and scale of the latents: equation 1 (None: 0 and 1)."""
        init_key, run_key = jax.random.split(key)
        unet_key, text_key = jax.random.split(init_key)
        params: Params = {}
        x = jnp.zeros((1, *self.sample_shape))
        condition: dict[str, Any] = {}
        if self.text_encoder is not None:
            tokens = jnp.zeros((1, len(self.null_tokens)), jnp.int32)
            context, variables = self.text_encoder.init_with_output(text_key, tokens)
            condition = {"context": context}
            if self.train_text_encoder:
                params["text_encoder"] = variables["params"]
        if self.null_label is not None:
            condition["labels"] = jnp.zeros((1,), jnp.int32)
        params["unet"] = self.unet.init(unet_key, x, jnp.zeros((1,)), **condition)["params"]
        extra = {}
        if latent_shift is not None and latent_scale is not None:
            extra = {"latent_shift": latent_shift, "latent_scale": latent_scale}
        if self.loss_history is not None:
            extra["loss_history"] = self.loss_history
        return ts.create_state(run_key, params, self.optimizer, self.ema, extra)

    def train_step(
        self, state: TrainState, batch: Batch, frozen: Params, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Gradients of equation 3, their mean over devices, a guarded update."""

        def loss_fn(params, batch):
            keys = ts.example_keys(state.rng, state.step, batch["position"])
            loss, aux = self.loss({**frozen, **params}, state.extra, batch, keys, train=True)
            return loss.mean(), aux if self.loss_history is not None else {}

        grad_fn = ts.accumulate(jax.value_and_grad(loss_fn, has_aux=True), self.accumulate)
        (loss, aux), grads = grad_fn(state.params, batch)
        loss, grads = ts.mean_over_devices((loss, grads), axis_name)
        state, metrics = ts.apply_gradients(state, grads, loss, self.optimizer, self.ema)
        if self.loss_history is not None:
            state = self._remember(state, aux, axis_name)
        return state, {"loss": loss, **metrics}

    def _remember(self, state: TrainState, aux: Metrics, axis_name: str | None) -> TrainState:
        """The losses of the whole batch into the history, unless one is not finite."""
        t, seen = aux["t"], aux["unweighted"]
        if axis_name is not None:
            t, seen = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (t, seen))
        history = state.extra["loss_history"]
        new = losses.second_moment_update(history, t, seen)
        history = jnp.where(jnp.isfinite(seen).all(), new, history)
        return state.replace(extra={**state.extra, "loss_history": history})

    def eval_step(self, state: TrainState, batch: Batch, frozen: Params) -> dict[str, Array]:
        """Sums over a batch with the averaged weights: "loss" and "count" of valid examples.

        Times and noise are keyed by each example's index, so the number is the same every time.
        """
        keys = ts.example_keys(
            jax.random.key_data(jax.random.key(0)), jnp.zeros((), jnp.int32), batch["index"]
        )
        params = {**frozen, **state.inference_params}
        loss, _ = self.loss(params, state.extra, batch, keys, train=False)
        valid = batch["valid"].astype(loss.dtype)
        return {"loss": jnp.sum(loss * valid), "count": jnp.sum(valid)}

    # -- its parts -----------------------------------------------------------------------------

    def loss(
        self, params: Params, extra: dict[str, Array], batch: Batch, keys: Array, train: bool
    ) -> tuple[Float[Array, " batch"], dict[str, Array]]:
        """Equation 3 for each example, given one key an example."""
        x0 = self.clean(params, extra, batch, keys, train)
        condition = self.condition(params, batch, keys, train)
        dropout_keys = ts.stream(keys, ts.DROPOUT) if train else None

        def network(x_t, t):
            return self.unet.apply(
                {"params": params["unet"]}, x_t, t, keys=dropout_keys, **condition
            )

        t, noise = self.draw(ts.stream(keys, ts.TIMES), x0)
        if self.loss_history is None or not train:
            return self.objective(network, x0, t, noise)
        p = losses.second_moment_probabilities(extra["loss_history"])
        t, weight = losses.resampled_times(ts.stream(keys, ts.TIMES), p)
        loss, aux = self.objective(network, x0, t, noise)
        return loss * weight, {**aux, "t": t, "unweighted": jax.lax.stop_gradient(loss)}

    def clean(
        self, params: Params, extra: dict[str, Array], batch: Batch, keys: Array, train: bool
    ) -> Float[Array, "batch *space channels"]:
        """z0 of equation 1 from stored moments or from pixels; uint8 becomes [-1, 1] here."""
        if "mean" in batch:
            mean, std = batch["mean"], jnp.exp(0.5 * batch["logvar"])
            noise = _normal(ts.stream(keys, ts.POSTERIOR), mean.shape[1:])
            z = mean + std * noise if train else mean
        else:
            z = batch["image"]
            if z.dtype == jnp.uint8:
                z = z.astype(jnp.float32) / 127.5 - 1
            if self.flip and train:
                z = ts.random_flip(z, ts.stream(keys, ts.DATA))
            if self.autoencoder is not None:
                posterior = self.autoencoder.apply(
                    {"params": params["autoencoder"]}, z, method="encode"
                )
                z = posterior.sample(ts.stream(keys, ts.POSTERIOR)) if train else posterior.mean
        if "latent_scale" in extra:
            z = (z - _channels(extra["latent_shift"], z)) * _channels(extra["latent_scale"], z)
        return z

    def condition(
        self, params: Params, batch: Batch, keys: Array | None, train: bool
    ) -> dict[str, Array]:
        """What the U-Net is given besides x_t and t, some of it dropped when training."""
        rate = self.drop_condition if train else 0.0
        drop = None
        if rate and keys is not None:
            uniform = jax.vmap(jax.random.uniform)(ts.stream(keys, ts.CAPTION))
            drop = uniform < rate
        condition = {}
        if self.text_encoder is not None:
            tokens = batch["tokens"]
            if drop is not None:
                null = jnp.asarray(self.null_tokens, tokens.dtype)[None]
                tokens = jnp.where(drop[:, None], null, tokens)
            text_keys = ts.stream(keys, ts.DROPOUT) if train and keys is not None else None
            condition = self.encode_text(params, tokens, text_keys)
        if self.null_label is not None:
            labels = batch["label"]
            condition["labels"] = (
                labels if drop is None else jnp.where(drop, self.null_label, labels)
            )
        return condition

    def encode_text(
        self, params: Params, tokens: Int[Array, "batch length"], keys: Array | None = None
    ) -> dict[str, Array]:
        """tau_theta: tokens to the U-Net's context, and its mask if padding is to be hidden."""
        assert self.text_encoder is not None
        mask = tokens != 0 if self.mask_padding else None
        context = self.text_encoder.apply(
            {"params": params["text_encoder"]}, tokens, mask=mask, keys=keys
        )
        if mask is None:
            return {"context": context}
        return {"context": context, "context_mask": mask}


def _normal(keys: Key[Array, " batch"], shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _channels(per_channel: Array, like: Array) -> Array:
    return per_channel.reshape(*[1] * (like.ndim - 1), -1).astype(like.dtype)
