"""A run in progress, looked at: pictures, and where a classifier is named, numbers of samples.

With the held-out losses of `evaluation.every_steps` come pictures (`evaluation.preview` of them:
samples of a denoiser, reconstructions of a first stage) for every writer and as
DIR/previews/NAME-STEP.png, and with `evaluation.samples` the Frechet distance on the features of
`evaluation.classifier`, and for captioned digits the adherence, of as few samples, for averaged and
raw weights. So few that they rank the steps of one run, and nothing else: `experiments.evaluate`
makes numbers to compare. Noise and prompts are those of `seed` at every step.

Nothing here draws from the stream of training batches or its keys.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import pictures as sheets
from diffusion import weights
from diffusion.data.builders.captioned_digits import compose
from diffusion.data.tokenizers import Tokenizer
from diffusion.metrics import adherence, frechet
from diffusion.training.autoencoder import Autoencoder
from diffusion.training.denoiser import Denoiser
from diffusion.training.parallel import to_host
from diffusion.training.state import TrainState
from diffusion.writers import Writer
from experiments.evaluate import watched
from experiments.evaluate.metrics import Judge, Subject, attributes
from experiments.host import cluster
from experiments.run import build, data, generate, training

CLASSIFIER = "evaluation.classifier"
REFERENCE = 10_000  # training images, at most, that the Frechet distance is to


def check(config: ConfigDict) -> None:
    """ValueError for an `evaluation.samples` that nothing can judge."""
    wanted = config.evaluation
    if not wanted.samples:
        return
    if config.task != "denoiser" or "controlnet" in config.model or config.conditioning.concat:
        raise ValueError(
            f"evaluation.samples={wanted.samples} is for runs that sample from noise, with or "
            "without a caption: set it to 0"
        )
    if wanted.samples < 2:
        raise ValueError(f"evaluation.samples={wanted.samples} must be 0 or at least 2")
    if not wanted.classifier:
        raise ValueError(
            f"{CLASSIFIER} is empty, but evaluation.samples={wanted.samples}: name the run of a "
            "classifier on the same data, or set evaluation.samples=0"
        )
    if "text_encoder" in config.model and not data.known(_data_name(config)).judged:
        raise ValueError(
            f"evaluation.samples={wanted.samples} knows the captions of captioned_digits alone: "
            "set it to 0"
        )
    watched.classifier(wanted.classifier, _data_name(config))


def _data_name(config: ConfigDict) -> str:
    return data.images_config(config).data.name


@dataclasses.dataclass
class Preview:
    """Looks at states of one run; what they share is loaded and compiled once."""

    run: training.Run
    directory: pathlib.Path

    def show(self, step: int, state: TrainState, writer: Writer) -> None:
        """Hands the pictures of `state` to the writer, and writes them as PNGs."""
        if not self.run.config.evaluation.preview:
            return
        pictures = self.pictures(state)
        writer.images(step, pictures)
        if not cluster.is_first():
            return
        folder = self.directory / "previews"
        folder.mkdir(exist_ok=True)
        for name, pixels in pictures.items():
            sheets.save_grid(folder / f"{name}-{step:08d}.png", pixels)

    def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
        """What there is to see of `state`; empty for a task without pictures.

        By name, uint8 (images, height, width, channels).
        """
        if isinstance(self.run.task, Autoencoder):
            return self._reconstructions(state)
        if isinstance(self.run.task, Denoiser):
            return self._samples(state)
        return {}

    def _reconstructions(self, state: TrainState) -> dict[str, np.ndarray]:
        image = next(self.run.eval_batches())["image"][: self.run.config.evaluation.preview]
        params = {"params": state.inference_params["autoencoder"]}
        x = jnp.asarray(image, jnp.float32) / 127.5 - 1
        z = self.run.task.network.apply(params, x, method="encode").mean
        decoded = generate.to_uint8(self.run.task.network.apply(params, z, method="decode"))
        return {"images": image, "reconstructions": to_host(decoded)}

    def _samples(self, state: TrainState) -> dict[str, np.ndarray]:
        seen = next(self.run.eval_batches())
        model, prompts, given = self.model(state), None, {}
        if model.tokenizer is not None:
            prompts = model.tokenizer.decode(seen["tokens"])
        if "hint" in seen:
            given = {"hint_0": seen["hint"], "hint_scale_0": np.ones(1, np.float32)}
        num = self.run.config.evaluation.preview
        batches = generate.images(model, num, prompts, given=given, run=self._sampler(model))
        return {"samples": sheets.as_images(np.concatenate(list(batches)))}

    # -- numbers -----------------------------------------------------------------------------------

    def numbers(self, state: TrainState) -> dict[str, float]:
        """Of `evaluation.samples` samples: eval_frechet_distance_ema, eval_adherence_all_raw, ...

        Empty where that is 0.
        """
        if not self.run.config.evaluation.samples:
            return {}
        found = {}
        for which in ("ema", "raw") if state.ema else ("raw",):
            values = self._judged(state, which)
            found |= {f"eval_{name}_{which}": value for name, value in values.items()}
        return found

    def _judged(self, state: TrainState, which: str) -> dict[str, float]:
        config, model = self.run.config, self.model(state, which)
        num, captioned = config.evaluation.samples, model.tokenizer is not None
        digits = captioned and data.known(_data_name(config)).judged
        sets = {"adherence": num, "adherence_held_out": max(num // 4, 1)} if digits else {"": num}
        found: dict[str, float] = {}
        for name, count in sets.items():
            prompts, asked = None, {}
            if digits:
                prompts, asked = compose.prompts(count, config.seed, name == "adherence_held_out")
            batches = generate.images(model, count, prompts, config.seed, run=self._sampler(model))
            images = np.concatenate(list(batches))
            if "frechet_distance" not in found:
                made = frechet.feature_statistics(self._judge(images)[1])
                found["frechet_distance"] = frechet.frechet_distance(made, self._reference)
            if digits:
                values = adherence.adherence(attributes(images, self._judge), asked)
                numbers = {k: v for k, v in values.items() if isinstance(v, float)}
                found |= {f"{name}_{attribute}": value for attribute, value in numbers.items()}
        return found

    @functools.cached_property
    def _judge(self) -> Judge:
        config = self.run.config
        return watched.classifier(config.evaluation.classifier, _data_name(config))

    @functools.cached_property
    def _reference(self) -> frechet.FeatureStatistics:
        images = Subject(self.directory).data("train", REFERENCE)
        return frechet.feature_statistics(self._judge(images)[1])

    # -- a state as a model ------------------------------------------------------------------------

    def model(self, state: TrainState, which: str = "ema") -> generate.Model:
        """What samples from `state`, with averaged weights where there are any, or raw ones."""
        params = state.inference_params if which == "ema" else state.params
        return dataclasses.replace(
            self._around,
            params={**to_host(params), **self._around.params},
            extra=to_host(dict(state.extra)),
        )

    def _sampler(self, model: generate.Model) -> Any:
        """Compiled once: parameters are its arguments, and the latents' scale never changes."""
        if "sampler" not in self.__dict__:
            self.__dict__["sampler"] = generate.make_sampler(dataclasses.replace(model, params={}))
        return self.__dict__["sampler"]

    @functools.cached_property
    def _around(self) -> generate.Model:
        """All of the model that training does not change."""
        params: dict[str, Any] = dict(self.run.frozen)
        first_stage, tokenizer = None, None
        if "autoencoder" in self.run.config.model:
            folder = self.directory / "first_stage"
            params["autoencoder"], described, _ = weights.load_weights(folder)
            first_stage = build.autoencoder(ConfigDict(described))
        if self.run.task.text_encoder is not None:
            tokenizer = Tokenizer.load(self.directory / "tokenizer.json")
        return generate.Model(self.run.config, self.run.task, params, {}, first_stage, tokenizer)
