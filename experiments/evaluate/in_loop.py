"""A run in progress, looked at: evaluators, which the loop iterates after every so many steps.

Each gives numbers, named eval_*, and pictures of a state; both have the same names, and the numbers
the same bits, on every process, so that `train.keep_best` is decided alike everywhere:

HeldOut      the task's own sums over the evaluation split: losses, and of a first stage PSNR,
             SSIM, sharpness and the latents' moments
FirstStage   Frechet distance of reconstructions and held-out images on the features of
             `evaluation.classifier`, LPIPS where `perceptual` names weights that the loss does not
             use; pictures of images and reconstructions
Samples      Frechet distance of `evaluation.samples` samples to training images on those features,
             and adherence of as few for captioned digits, of averaged and raw weights; pictures of
             samples. So few that they rank the steps of one run alone: `experiments.evaluate` makes
             numbers to compare. Noise and prompts are those of `seed` at every step.

Pictures are `evaluation.preview` each; they go to every writer, and to DIR/previews/NAME-STEP.png.
Nothing here draws from the stream of training batches or its keys.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import pictures as sheets
from diffusion import weights
from diffusion.data.builders.captioned_digits import compose
from diffusion.data.tokenizers import Tokenizer
from diffusion.metrics import adherence, frechet
from diffusion.sampling.inputs import Columns
from diffusion.sampling.pipeline import Pipeline
from diffusion.training import codec
from diffusion.training.autoencoder import Autoencoder
from diffusion.training.denoiser import Denoiser
from diffusion.training.parallel import to_host
from diffusion.training.state import TrainState
from diffusion.writers import Writer
from experiments.evaluate import reconstructions, references, stream
from experiments.evaluate.features import Judge, attributes
from experiments.host import cluster
from experiments.run import assemble, build, data, generate, networks

CLASSIFIER = "evaluation.classifier"
REFERENCE = 10_000  # training images, at most, that the Frechet distance is to


class Evaluator:
    """Every process calls both, with the whole state, at the same steps."""

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Numbers by name: the same on every process."""
        return {}

    def pictures(self, step: int, state: TrainState) -> dict[str, np.ndarray]:
        """uint8 (images, height, width, channels) by name."""
        return {}


def evaluators(
    run: assemble.Run, directory: pathlib.Path, frozen: dict[str, Any]
) -> tuple[Evaluator, ...]:
    """Those of a run in `directory`; `frozen`: its frozen weights, on the devices."""
    found: list[Evaluator] = [HeldOut(run, frozen)]
    if isinstance(run.task, Autoencoder):
        found.append(FirstStage(run))
    if isinstance(run.task, Denoiser):
        found.append(Samples(run, directory))
    return tuple(found)


def measure(every: Sequence[Evaluator], step: int, state: TrainState) -> dict[str, float]:
    return {k: v for one in every for k, v in one.evaluate(step, state).items()}


def show(
    every: Sequence[Evaluator], step: int, state: TrainState, writer: Writer, folder: pathlib.Path
) -> None:
    """Hands the pictures of `state` to the writer, and writes them to `folder` as PNGs."""
    pictures = {k: v for one in every for k, v in one.pictures(step, state).items()}
    if not pictures:
        return
    writer.images(step, pictures)
    if not cluster.is_first():
        return
    folder.mkdir(exist_ok=True)
    for name, pixels in pictures.items():
        sheets.save_grid(folder / f"{name}-{step:08d}.png", pixels)


def check(config: ConfigDict) -> None:
    """ValueError for an `evaluation.samples` or `evaluation.classifier` that does not fit."""
    if (wanted := config.evaluation).classifier and config.task not in ("autoencoder", "denoiser"):
        raise ValueError(
            f"{CLASSIFIER}={wanted.classifier} is for tasks 'autoencoder' and 'denoiser', not "
            f"{config.task!r}: leave it empty"
        )
    if wanted.samples:
        _check_samples(config)
    if wanted.classifier and (wanted.samples or config.task == "autoencoder"):
        classifier(wanted.classifier, _data_name(config))


def _check_samples(config: ConfigDict) -> None:
    wanted = config.evaluation
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
    if build.reads_captions(config) and not data.known(_data_name(config)).judged:
        raise ValueError(
            f"evaluation.samples={wanted.samples} knows the captions of captioned_digits alone: "
            "set it to 0"
        )


def _data_name(config: ConfigDict) -> str:
    return data.images_config(config).data.name


@functools.lru_cache(maxsize=1)
def classifier(directory: str, data: str) -> Judge:
    """`evaluation.classifier`. ValueError for no such run, and for one of other data."""
    judge = Judge(pathlib.Path(directory), flag=f"--config.{CLASSIFIER}")
    if judge.data != data:
        raise ValueError(
            f"--config.{CLASSIFIER}={directory} was trained on {judge.data!r}, but this "
            f"run is on {data!r}: name one of that"
        )
    return judge


@dataclasses.dataclass
class HeldOut(Evaluator):
    """Means over the evaluation split; each process reads its rows."""

    run: assemble.Run
    frozen: dict[str, Any]

    @functools.cached_property
    def _step(self) -> Callable[..., dict[str, jax.Array]]:
        return jax.jit(self.run.parallel.aimed(self.run.task.eval_step))

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        parallel, totals = self.run.parallel, {}
        frozen = parallel.whole(self.frozen)
        for batch in self.run.eval_batches(jax.process_index(), jax.process_count()):
            sums = self._step(state, parallel.rows(batch), frozen)
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        count = totals.pop("count")
        means = {name: value / count for name, value in totals.items()}
        if hasattr(self.run.task, "summarise"):
            means = self.run.task.summarise(means)
        return {f"eval_{name}": value for name, value in means.items()}


@dataclasses.dataclass
class FirstStage(Evaluator):
    """Reconstructions with the averaged weights."""

    run: assemble.Run

    @property
    def names(self) -> tuple[str, ...]:
        """Of what the task does not measure itself."""
        config = self.run.config
        given = config.perceptual.vgg and config.perceptual.heads
        distance = ("frechet_distance",) if config.evaluation.classifier else ()
        return distance + (("lpips",) if given and not config.loss.perceptual_weight else ())

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        if not self.names:
            return {}
        config, features = self.run.config, None
        params = to_host(state.inference_params["autoencoder"])
        if config.evaluation.classifier:
            judge = classifier(config.evaluation.classifier, config.data.name)
            features = lambda images: judge(images)[1]  # noqa: E731
        stage = networks.Stage(config, self.run.task.network, params, 0, "")
        found = stream.of_first(
            self.names, lambda: reconstructions.measure(stage, self._images(), features)
        )
        return {f"eval_{name}": value for name, value in found.items()}

    def _images(self) -> Iterator[np.ndarray]:
        for batch in self.run.eval_batches():
            yield batch["image"][batch["valid"]]

    def pictures(self, step: int, state: TrainState) -> dict[str, np.ndarray]:
        if not self.run.config.evaluation.preview:
            return {}
        image = next(self.run.eval_batches())["image"][: self.run.config.evaluation.preview]
        params = {"params": state.inference_params["autoencoder"]}
        z = self.run.task.network.apply(params, codec.signed(image), method="encode").mean
        decoded = codec.to_uint8(self.run.task.network.apply(params, z, method="decode"))
        pictures = {"images": image, "reconstructions": to_host(decoded)}
        return {name: sheets.as_images(value) for name, value in pictures.items()}


@dataclasses.dataclass
class Samples(Evaluator):
    """Samples of a denoiser; what several looks share is loaded and compiled once."""

    run: assemble.Run
    directory: pathlib.Path
    _sampler: Any = None

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """eval_frechet_distance_ema, eval_adherence_all_raw, ...; nothing for 0 samples."""
        if not self.run.config.evaluation.samples:
            return {}
        found = {}
        for which in ("ema", "raw") if state.ema else ("raw",):
            values = self._judged(state, which)
            found |= {f"eval_{name}_{which}": value for name, value in values.items()}
        return found

    def pictures(self, step: int, state: TrainState) -> dict[str, np.ndarray]:
        num = self.run.config.evaluation.preview
        if not num:
            return {}
        seen = next(self.run.eval_batches())
        pipeline = self._pipeline(state)
        given: Columns = {name: seen[name] for name in pipeline.reads if name in seen}
        prompts = pipeline.tokenizer.decode(seen["tokens"]) if pipeline.tokenizer else None
        if "hint" in seen:
            given |= {"hint_0": seen["hint"], "hint_scale_0": np.ones(1, np.float32)}
        made = self._made(pipeline, pipeline.columns(prompts) | given, num)
        return {"samples": sheets.as_images(made)}

    def _made(self, pipeline: Pipeline, columns: Columns, num: int, seed: int = 0) -> np.ndarray:
        """Compiled once: parameters are arguments, and the latents' scale never changes."""
        self._sampler = self._sampler or pipeline.compiled()
        return np.concatenate(list(pipeline.images(columns, num, [seed], run=self._sampler)))

    def _judged(self, state: TrainState, which: str) -> dict[str, float]:
        config, pipeline = self.run.config, self._pipeline(state, which)
        num, captioned = config.evaluation.samples, pipeline.tokenizer is not None
        digits = captioned and data.known(_data_name(config)).judged
        sets = {"adherence": num, "adherence_held_out": max(num // 4, 1)} if digits else {"": num}
        found: dict[str, float] = {}
        for name, count in sets.items():
            prompts, asked = None, {}
            if digits:
                prompts, asked = compose.prompts(count, config.seed, name == "adherence_held_out")
            images = self._made(pipeline, pipeline.columns(prompts), count, config.seed)
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
        return classifier(config.evaluation.classifier, _data_name(config))

    @functools.cached_property
    def _reference(self) -> frechet.FeatureStatistics:
        images = references.unseen(data.images_config(self.run.config), "train", REFERENCE)
        return frechet.feature_statistics(self._judge(images)[1])

    def _pipeline(self, state: TrainState, which: str = "ema") -> Pipeline:
        """What samples from `state`, with averaged weights where there are any, or raw ones."""
        params = state.inference_params if which == "ema" else state.params
        return dataclasses.replace(
            self._around,
            params={**to_host(params), **self._around.params},
            extra=to_host(dict(state.extra)),
        )

    @functools.cached_property
    def _around(self) -> Pipeline:
        """All of the pipeline that training does not change."""
        params: dict[str, Any] = dict(self.run.frozen)
        first_stage, tokenizer = None, None
        if "autoencoder" in self.run.config.model:
            folder = self.directory / "first_stage"
            params["autoencoder"], described, _ = weights.load_weights(folder)
            first_stage = build.autoencoder(ConfigDict(described))
        if build.reads_captions(self.run.config):
            tokenizer = Tokenizer.load(self.directory / "tokenizer.json")
        given = {"first_stage": first_stage, "tokenizer": tokenizer}
        return generate.pipeline(self.run.config, self.run.task, params, **given)
