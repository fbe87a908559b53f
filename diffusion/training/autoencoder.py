"""The first-stage task: LDM's autoencoders (arXiv:2112.10752, section 3.1 and appendix G).

With x^ = D(z), z ~ q(z | x) = N(mean(x), std(x)^2) (KL) or the nearest codes (VQ), and B images of
N values (pixels times channels) in the batch:

    (1) L_nll = sum over images and values of (|x - x^| + p LPIPS(x, x^)), divided by B
    (2) L_reg = kl_weight sum over the latent of KL(q(z | x) || N(0, 1)), divided by B
    (3) L     = L_nll + L_reg + lambda L_G

Sums and means are as LDM has them (`contperceptual.py`): everything is summed over an image, so
that `kl_weight` of 1e-6 is relative to a sum over pixels, and LPIPS, one number an image, counts
once for each value. VQ models (`vqperceptual.py`) take means instead: `reduction` "mean" divides
(1) by N, and L_reg is codebook_weight times the mean of the bottleneck's loss, whose own two
weights are the network's (`bottleneck.py`, eq. 4). lambda L_G, and the loss of the second network,
the discriminator: `adversarial.py`. LDM's `logvar`, in no optimiser's list, stays 0: left out.

Lambda is a ratio of two gradients' norms at the decoder's last layer. Their pull-backs reach no
further than that layer (the compiler drops the rest), so a step is one forward and one backward
pass of the autoencoder. With an accumulated batch lambda needs all parts before the first backward
pass: there, one pass over the parts finds it, and a second one the gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion.metrics import reconstruction as quality
from diffusion.process import keys as ks
from diffusion.training import adversarial, codebook, codec
from diffusion.training import state as ts
from diffusion.training.adversarial import Adversary
from diffusion.training.ema import Ema
from diffusion.training.state import Metrics, Optimizer, Params, TrainState

RECONSTRUCTION = {"l1": jnp.abs, "l2": jnp.square}
REDUCTIONS = ("sum", "mean")
STATISTICS = "discriminator_stats"  # of `TrainState.extra`: of batch norm
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Equations 1-3 on `batch["image"]` (uint8). Holds no arrays.

    sample_shape: (*space, channels) of the images. reconstruction: "l1" or "l2". adversary: None
    for none. regularizer_weight: kl_weight, or codebook_weight of a VQ network. perceptual: LPIPS,
    whose parameters are the frozen "perceptual"; None where its weight is 0. reseed_every_steps: of
    dead codes (`codebook.py`; 0: never), which needs the batch_size. initialise: of the network.
    """

    network: Any
    sample_shape: tuple[int, ...]
    optimizer: Optimizer
    ema: Ema
    reconstruction: str = "l1"
    reduction: str = "sum"
    regularizer_weight: float = 1e-6
    perceptual: Any = None
    perceptual_weight: float = 0.0
    initialise: Callable[[Key[Array, ""], Params], Params] = lambda key, params: params
    adversary: Adversary | None = None
    reseed_every_steps: int = 0
    batch_size: int = 0
    flip: bool = False
    accumulate: int = 1

    def __post_init__(self):
        choices = {"reconstruction": sorted(RECONSTRUCTION), "reduction": list(REDUCTIONS)}
        for key, allowed in choices.items():
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"loss.{key}={value!r} is unknown: use one of {allowed}")

    @property
    def num_codes(self) -> int:
        """Of a VQ network; 0 of a KL one."""
        return getattr(self.network, "num_codes", 0)

    # -- the task's interface ------------------------------------------------------------------

    def init(self, key: Key[Array, ""]) -> TrainState:
        init_key, run_key = jax.random.split(key)
        x = jnp.zeros((1, *self.sample_shape))
        made = self.network.init(init_key, x)["params"]
        params: Params = {"autoencoder": self.initialise(init_key, made)}
        extra: dict[str, Any] = {}
        if self.adversary is not None:
            made = self.adversary.init(jax.random.fold_in(init_key, 1), x)
            params["discriminator"], statistics = made
            extra |= {STATISTICS: statistics} if statistics else {}
        if self.reseed_every_steps:
            extra[codebook.COUNTS] = jnp.zeros(self.num_codes)
        return ts.create_state(run_key, params, self.optimizer, self.ema, extra)

    def train_step(
        self, state: TrainState, batch: Batch, frozen: Params, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Gradients of both networks, their means over devices, one guarded update."""
        weigh = self._weigh(state, batch, frozen, axis_name)

        def grad_fn(params, batch):
            return self._gradients(params, state, batch, frozen, weigh)

        grad_fn = ts.accumulate(grad_fn, self.accumulate)
        found, grads = ts.mean_over_devices(grad_fn(state.params, batch), axis_name)
        metrics = dict(found["metrics"])
        guarded = metrics["loss"] + metrics.get("discriminator_loss", 0.0)
        for name, of_network in grads.items() if self.adversary is not None else ():
            squares = sum(jnp.vdot(x, x) for x in jax.tree.leaves(of_network))
            metrics[f"grad_norm_{name}"] = jnp.sqrt(squares)
        new, update = ts.apply_gradients(state, grads, guarded, self.optimizer, self.ema)
        if codebook.COUNTS in found:
            metrics |= codebook.usage(found[codebook.COUNTS])
        return self._beside(state, new, found), {**metrics, **update}

    def eval_step(self, state: TrainState, batch: Batch, frozen: Params) -> dict[str, Array]:
        """Sums over a batch, from the posterior's mean: the terms, PSNR (dB), SSIM, energies of
        high frequencies, moments of the latent's channels; and "count"."""
        x = codec.signed(batch["image"])
        params = state.inference_params["autoencoder"]
        x_hat, (bottleneck, z) = self._reconstruct(params, x, None)
        terms = self.terms(frozen, x, x_hat) | self._regularizer(bottleneck)
        terms |= quality.per_example(x, jnp.clip(x_hat, -1, 1), quality.SIGNED) | codec.moments(z)
        valid = batch["valid"].astype(jnp.float32)
        sums = {name: jnp.sum(value * valid) for name, value in terms.items()}
        return {"loss": self._loss(sums), **sums, "count": jnp.sum(valid)}

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """Means of what `eval_step` sums, with what is made of means: sharpness, deviations."""
        found = dict(means)
        if "high_frequency" in found:
            of_images = found["high_frequency_of_images"]
            found["sharpness"] = found["high_frequency"] / of_images if of_images else math.nan
        for c in range(self.network.latent_channels):
            mean, square = found[f"latent_mean_{c}"], found.pop(f"latent_square_{c}")
            found[f"latent_std_{c}"] = math.sqrt(max(square - mean**2, 0.0))
        return found

    # -- its parts -----------------------------------------------------------------------------

    def terms(
        self, frozen: Params, x: Float[Array, "batch ..."], x_hat: Array, keys: Array | None = None
    ) -> dict[str, Float[Array, " batch"]]:
        """Of equation 1 for each example: its error reduced, LPIPS, and its mean squared error."""
        error = x - x_hat  # float32 or wider, as the network puts x^ out
        axes = tuple(range(1, x.ndim))
        distance = RECONSTRUCTION[self.reconstruction](error)
        reduced = distance.sum(axes) if self.reduction == "sum" else distance.mean(axes)
        found = {"reconstruction": reduced, "mse": jnp.square(error).mean(axes)}
        if self.perceptual is not None:
            found["lpips"] = self.perceptual.apply({"params": frozen["perceptual"]}, x, x_hat, keys)
        return found

    def _nll(self, means: dict[str, Array]) -> Array:
        """Equation 1 of means (or sums) of `terms`."""
        if self.perceptual is None:
            return means["reconstruction"]
        values = math.prod(self.sample_shape) if self.reduction == "sum" else 1
        return means["reconstruction"] + self.perceptual_weight * values * means["lpips"]

    def _regularizer(self, bottleneck: Any) -> dict[str, Float[Array, " batch"]]:
        return {"codebook": bottleneck.loss} if self.num_codes else {"kl": bottleneck.kl()}

    def _loss(self, means: dict[str, Array]) -> Array:
        """L_nll + L_reg."""
        regularizer = means["codebook" if self.num_codes else "kl"]
        return self._nll(means) + self.regularizer_weight * regularizer

    def _reconstruct(
        self, params: Any, x: Array, keys: Key[Array, " batch"] | None
    ) -> tuple[Array, tuple[Any, Array]]:
        """(x^, (what the bottleneck did, z before it is quantised)); without keys from the mean."""
        variables = {"params": params}
        posterior = self.network.apply(variables, x, method="encode")
        if self.num_codes:
            quantised = self.network.apply(variables, posterior.mean, method="quantize")
            x_hat = self.network.apply(variables, quantised.codes, method="decode_codes")
            return x_hat, (quantised, posterior.mean)
        z = posterior.mean if keys is None else posterior.sample(ks.stream(keys, ks.POSTERIOR))
        return self.network.apply(variables, z, method="decode"), (posterior, posterior.mean)

    def _inputs(self, state: TrainState, batch: Batch) -> tuple[Array, Key[Array, " batch"]]:
        keys = ks.example_keys(state.rng, state.step, batch["position"])
        x = codec.signed(batch["image"], jnp.result_type(float))
        return (ts.random_flip(x, ks.stream(keys, ks.DATA)) if self.flip else x), keys

    def _weigh(
        self, state: TrainState, batch: Batch, frozen: Params, axis_name: str | None
    ) -> Callable[[Array, Array], Array]:
        """lambda from the last layer's two gradients, which it averages as the batch is split."""
        adversary = self.adversary
        if adversary is None:
            return lambda *_: jnp.zeros(())

        def weigh(*kernels):
            nll, generator = ts.mean_over_devices(kernels, axis_name)
            found = adversarial.adaptive_weight(nll, generator, adversary.weight)
            return jnp.where(adversary.counts(state.step), found, 0.0)

        if self.accumulate == 1:
            return weigh

        def kernels(params, batch):
            return self._forward(params, state, batch, frozen)["kernels"]

        weight = weigh(*ts.accumulate(kernels, self.accumulate)(state.params, batch))
        return lambda *_: weight

    def _forward(self, params: Params, state: TrainState, batch: Batch, frozen: Params) -> Any:
        """Images, reconstructions, the way back from these, and both losses' gradients there."""
        x, keys = self._inputs(state, batch)
        dropout = ks.stream(keys, ks.DROPOUT)

        def reconstruct(of_autoencoder):
            x_hat, (bottleneck, z) = self._reconstruct(of_autoencoder, x, keys)
            regularizer = jax.tree.map(jnp.mean, self._regularizer(bottleneck))
            return (x_hat, regularizer), (bottleneck, z)

        def nll(x_hat):
            means = jax.tree.map(jnp.mean, self.terms(frozen, x, x_hat, dropout))
            return self._nll(means), means

        (x_hat, regularizer), pull, aux = jax.vjp(reconstruct, params["autoencoder"], has_aux=True)
        nll_grad, means = jax.grad(nll, has_aux=True)(x_hat)
        found = {"x": x, "x_hat": x_hat, "aux": aux, "means": means | regularizer}
        weight = jax.tree.map(lambda r: jnp.full_like(r, self.regularizer_weight), regularizer)
        found |= {"pull": lambda g: pull((g.astype(x_hat.dtype), weight))[0], "nll": nll_grad}
        adversary = self.adversary
        if adversary is None:
            return found
        of_discriminator = params["discriminator"], state.extra.get(STATISTICS, {})
        look = jax.value_and_grad(adversary.generator, argnums=2)
        counts = adversary.counts(state.step)
        loss, grad = adversarial.when(counts, look, *of_discriminator, x_hat)
        none = jax.tree.map(jnp.zeros_like, regularizer)
        last = [
            functools.reduce(dict.__getitem__, self.network.last_layer, pull((g, none))[0])
            for g in (nll_grad, grad)
        ]
        return found | {"generator_loss": loss, "generator": grad, "kernels": tuple(last)}

    def _gradients(
        self, params: Params, state: TrainState, batch: Batch, frozen: Params, weigh: Callable
    ) -> tuple[dict[str, Any], Params]:
        """(what is averaged beside the gradients, gradients by network) of one part of a batch."""
        made = self._forward(params, state, batch, frozen)
        means, metrics, grad = made["means"], {}, made["nll"]
        loss = self._loss(means)
        found: dict[str, Any] = self._codes(state, batch, *made["aux"])
        grads: Params = {}
        if self.adversary is not None:
            weight = weigh(*made["kernels"])
            grad = grad + weight * made["generator"]
            loss = loss + weight * made["generator_loss"]
            learn = jax.value_and_grad(self.adversary.discriminator, has_aux=True)
            old = state.extra.get(STATISTICS, {})
            arguments = (params["discriminator"], old, made["x"], made["x_hat"])
            trains = self.adversary.trains(state.step)
            (_, (logged, new)), grads["discriminator"] = adversarial.when(trains, learn, *arguments)
            if old:
                found[STATISTICS] = jax.tree.map(lambda n, o: jnp.where(trains, n, o), new, old)
            metrics = logged | {"generator_loss": made["generator_loss"], "adaptive_weight": weight}
        grads["autoencoder"] = made["pull"](grad)
        return {"metrics": {"loss": loss, **means, **metrics}, **found}, grads

    def _codes(self, state: TrainState, batch: Batch, bottleneck: Any, z: Array) -> dict[str, Any]:
        if not self.num_codes:
            return {}
        found: dict[str, Any] = codebook.statistics(bottleneck.indices, self.num_codes)
        if self.reseed_every_steps:
            found["candidates"] = codebook.candidates(
                state.rng, state.step, z, batch["position"], self.batch_size, self.num_codes
            )
        return found

    def _beside(self, old: TrainState, new: TrainState, found: dict[str, Any]) -> TrainState:
        """`new` with what a step changes besides gradients' work; nothing where it was skipped."""
        skipped = new.extra["skipped_in_a_row"] > 0
        extra, params = dict(new.extra), dict(new.params)

        def unless_skipped(value, was):
            return jax.tree.map(lambda n, o: jnp.where(skipped, o, n), value, was)

        if STATISTICS in found:
            extra[STATISTICS] = unless_skipped(found[STATISTICS], old.extra[STATISTICS])
        if self.reseed_every_steps:
            counts = old.extra[codebook.COUNTS] + found[codebook.COUNTS]
            due = new.step % self.reseed_every_steps == 0
            book = params["autoencoder"]["codebook"]["embedding"]
            fresh = codebook.reseed(book, counts, found["candidates"])
            fresh = unless_skipped(jnp.where(due, fresh, book), book)
            params["autoencoder"] = params["autoencoder"] | {"codebook": {"embedding": fresh}}
            counts = jnp.where(due, 0.0, counts)
            extra[codebook.COUNTS] = unless_skipped(counts, old.extra[codebook.COUNTS])
        return new.replace(params=params, extra=extra)
