"""The diffusion task: DDPM on pixels, latent diffusion, with or without a condition.

With a schedule alpha(t), sigma(t), a network eps_theta and a frozen encoder E (LDM eq. 1 and 2,
arXiv:2112.10752; E is the identity for DDPM, arXiv:2006.11239 eq. 14):

    (1) z0  = scale (E(image) - shift)            latents of about unit variance
    (2) z_t = alpha(t) z0 + sigma(t) eps
    (3) L   = mean || eps - eps_theta(z_t, t, tau_theta(caption)) ||^2

tau_theta is the text encoder: trained jointly when it is among the state's parameters, else frozen;
so is the U-Net, under low-rank updates, beside a ControlNet, or where a word is learned. A fraction
`drop_condition` of the captions is replaced by the empty one (classes by the null class), for
classifier-free guidance (arXiv:2207.12598, algorithm 1).

Objectives of few steps (`process/few_steps.py`) ask the network for jumps to a second time, without
its condition, and a frozen "teacher" for the velocity.

With a loss history, t is drawn more often where the loss is large and the loss divided by how much
more often (Improved DDPM section 3.3, arXiv:2102.09672; the equations are in `process/losses.py`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion.models.lora import Lora
from diffusion.models.second_time import told_guidance
from diffusion.models.words import Words
from diffusion.process import keys as ks
from diffusion.process import losses
from diffusion.training import codec, conditions, coupling
from diffusion.training import state as ts
from diffusion.training.conditions import Condition
from diffusion.training.ema import Ema
from diffusion.training.state import Metrics, Optimizer, Params, TrainState

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Flax modules and functions of the task; holds no arrays. See `experiments/run/tasks.py`.

    sample_shape: (*space, channels) of what is diffused. objective and draw: of `process/losses.py`
    or `few_steps.py`. `network`, "denoiser" among the parameters, is called as `models/unet.py` is.
    Networks with a transform in `optimizer` are trained, the others frozen. conditions: by name,
    what the network is told, a fraction `drop_condition` dropped in training. loss_history: the
    empty one of second-moment resampling, None: t as `draw` has it. lora: low-rank updates of the
    U-Net. words: new rows of the text encoder's table. controlnets: each reads one of the hints,
    "controlnet", "controlnet_1", ... among the parameters. teacher: a frozen network, "teacher"
    among them; None with `lora`: the network without it. augment: of the pictures in training.
    coupled: noise and examples of a training batch are paired by optimal transport.
    """

    network: Any
    sample_shape: tuple[int, ...]
    objective: Callable
    draw: Callable
    optimizer: Optimizer
    ema: Ema
    conditions: Mapping[str, Condition] = dataclasses.field(default_factory=dict)
    lora: Lora | None = None
    words: Words | None = None
    controlnets: tuple[Any, ...] = ()
    drop_condition: float = 0.0
    autoencoder: Any = None
    teacher: Any = None
    flip: bool = False
    augment: Callable[[Batch, Array], Batch] | None = None
    accumulate: int = 1
    loss_history: Any = None
    coupled: bool = False

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
        networks = self.networks_init(init_key)
        params = {name: networks[name] for name in self.optimizer.transforms}
        extra = {}
        if latent_shift is not None and latent_scale is not None:
            extra = {"latent_shift": latent_shift, "latent_scale": latent_scale}
        if self.loss_history is not None:
            extra["loss_history"] = self.loss_history
        return ts.create_state(run_key, params, self.optimizer, self.ema, extra)

    def networks_init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters of every network of the task, trained or not."""
        network_key, condition_key = jax.random.split(key)
        params: Params = {}
        given: dict[str, Any] = {}
        x, t = jnp.zeros((1, *self.sample_shape)), jnp.zeros((1,))
        for condition in self.conditions.values():
            of_one, own = condition.init(condition_key)
            given |= of_one
            params |= own
        if "concat" in given:
            x = jnp.concatenate([x, given.pop("concat")], axis=-1)
        if self.words is not None:
            params |= self.words.split(params["text_encoder"])
        params["denoiser"] = self.network.init(network_key, x, t, **given)["params"]
        if self.teacher is not None:
            params["teacher"] = self.teacher.init(network_key, x, t, **given)["params"]
        if self.lora is not None:
            params["lora"] = self.lora.init(jax.random.fold_in(key, 2), params["denoiser"])
        for i, network in enumerate(self.controlnets):
            hint = jnp.zeros(self._hint_shape(network))
            control_key = jax.random.fold_in(key, 3 + i)
            params[control_name(i)] = network.init(control_key, x, t, hint, **given)["params"]
        return params

    def _hint_shape(self, network: Any) -> tuple[int, ...]:
        factor = 2 ** (len(network.hint_widths) - 1)
        return (1, *(side * factor for side in self.sample_shape[:-1]), 3)

    def train_step(
        self, state: TrainState, batch: Batch, frozen: Params, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Gradients of equation 3, their mean over devices, a guarded update."""

        def loss_fn(params, batch):
            keys = ks.example_keys(state.rng, state.step, batch["position"])
            every = {**frozen, **params}
            loss, aux = self.loss(every, state.extra, batch, keys, train=True, step=state.step)
            loss = loss * batch["weight"] if "weight" in batch else loss
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
        keys = ks.held_out_keys(batch["index"])
        params = {**frozen, **state.inference_params}
        loss, _ = self.loss(params, state.extra, batch, keys, train=False, step=state.step)
        valid = batch["valid"].astype(loss.dtype)
        return {"loss": jnp.sum(loss * valid), "count": jnp.sum(valid)}

    # -- its parts -----------------------------------------------------------------------------

    def loss(
        self,
        params: Params,
        extra: dict[str, Array],
        batch: Batch,
        keys: Array,
        train: bool,
        step: Array | int = 0,
    ) -> tuple[Float[Array, " batch"], dict[str, Array]]:
        """Equation 3 for each example, given one key an example; `step`: how many were taken."""
        base, params = params, self.merged(params)
        if self.augment is not None and train:
            batch = self.augment(batch, ks.stream(keys, ks.DATA))
        x0 = self.clean(params, extra, batch, keys, train)
        encode = functools.partial(codec.encode, self.autoencoder, params, extra)
        batch = conditions.ready(self.conditions, batch, encode, extra)
        condition = self.condition(params, batch, keys, train)
        dropout_keys = ks.stream(keys, ks.DROPOUT) if train else None

        def network(x_t, t, s=None, told=True, teacher=False, guidance=None):
            given = condition if told else self.nothing(params, batch)
            if teacher:
                frozen = dataclasses.replace(self, network=self.teacher or self.network)
                of = {**params, "denoiser": base["denoiser" if self.teacher is None else "teacher"]}
                return frozen.predict(of, x_t, t, given)
            if guidance is not None and told_guidance(self.network):
                given = {**given, "guidance": guidance}
            return self.predict(params, x_t, t, given, s, dropout_keys)

        t, noise = self.draw(ks.stream(keys, ks.TIMES), x0, step)
        if self.coupled and train:
            noise = coupling.optimal(x0, noise)
        if self.loss_history is None or not train:
            return self.objective(network, x0, t, noise)
        p = losses.second_moment_probabilities(extra["loss_history"])
        t, weight = losses.resampled_times(ks.stream(keys, ks.TIMES), p)
        loss, aux = self.objective(network, x0, t, noise)
        return loss * weight, {**aux, "t": t, "unweighted": jax.lax.stop_gradient(loss)}

    def merged(self, params: Params) -> Params:
        """The parameters with low-rank updates and learned words in those that they are of."""
        if self.words is not None:
            params = self.words.merged(params)
        if self.lora is None or "lora" not in params:
            return params
        return {**params, "denoiser": self.lora.merge(params["denoiser"], params["lora"])}

    def predict(
        self,
        params: Params,
        x_t: Array,
        t: Array,
        condition: dict[str, Any],
        s: Array | None = None,
        keys: Any = None,
    ) -> Array:
        """The network's output, given `merged` parameters; s: where a jump from t ends.

        Of `condition`, "concat" joins x_t's channels (super-resolution, inpainting), "hints" (one a
        ControlNet, in [0, 1]) and "hint_scales" (batch,) steer, and the rest is the network's own.
        """
        given = dict(condition)
        concat, hints = given.pop("concat", None), given.pop("hints", ())
        ones = jnp.ones(x_t.shape[:1], x_t.dtype)
        scales = given.pop("hint_scales", (ones,) * len(hints))
        x = x_t if concat is None else jnp.concatenate([x_t, concat.astype(x_t.dtype)], axis=-1)
        told = {name: value for name, value in given.items() if name != "guidance"}  # not theirs
        total: Any = None
        for i, (network, hint, scale) in enumerate(zip(self.controlnets, hints, scales)):
            variables = {"params": params[control_name(i)]}
            found = network.apply(variables, x, t, hint, keys=keys, **told)
            found = [scale.reshape(-1, *[1] * (r.ndim - 1)) * r for r in found]
            total = found if total is None else [a + b for a, b in zip(total, found)]
        if s is not None:
            if not hasattr(self.network, "second_time"):
                name = type(self.network).__name__
                raise ValueError(f"{name} is told of no jump's end: use a U-Net or Transformer")
            given["s"] = s
        return self.network.apply(
            {"params": params["denoiser"]}, x, t, residuals=total, keys=keys, **given
        )

    def clean(
        self, params: Params, extra: dict[str, Array], batch: Batch, keys: Array, train: bool
    ) -> Float[Array, "batch *space channels"]:
        """z0 of equation 1 from stored moments or from pixels; uint8 becomes [-1, 1] here."""
        drawn = ks.stream(keys, ks.POSTERIOR) if train else None
        if "mean" in batch:
            return codec.stored(batch, extra, drawn)
        x = batch["image"]
        if x.dtype == jnp.uint8:
            x = codec.signed(x)
        if self.flip and train:
            x = ts.random_flip(x, ks.stream(keys, ks.DATA))
        return codec.encode(self.autoencoder, params, extra, x, drawn)

    def condition(
        self, params: Params, batch: Batch, keys: Array | None = None, train: bool = False
    ) -> dict[str, Any]:
        """What the network is given besides x_t and t, some of it dropped when training."""
        if not train or keys is None:
            return conditions.encode(self.conditions, params, batch)
        if self.drop_condition:
            which = jax.vmap(jax.random.uniform)(ks.stream(keys, ks.CAPTION)) < self.drop_condition
            batch = conditions.drop(self.conditions, params, batch, which)
        dropout_keys = ks.stream(keys, ks.DROPOUT)
        return conditions.encode(self.conditions, params, batch, dropout_keys)

    def nothing(self, params: Params, batch: Batch) -> dict[str, Any]:
        """What the network is given in place of a condition, held fixed."""
        empty = conditions.null(self.conditions, params, batch)
        found = conditions.encode(self.conditions, params, {**batch, **empty})
        return jax.lax.stop_gradient(found)


def control_name(i: int) -> str:
    """Of the i-th ControlNet, among the parameters."""
    return f"controlnet_{i}" if i else "controlnet"
