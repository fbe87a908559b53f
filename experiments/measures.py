"""What `experiments.evaluate` measures: one function a metric, from a run to numbers.

adherence          the fraction of samples in which each attribute, and all at once, is what the
                   prompt says: the digit by the classifier, the rest measured on pixels
                   (diffusion/metrics/adherence.py)
frechet_distance   of samples and training images, on the features of the classifier; not "FID"
bits_per_dim       the variational bound on the evaluation split, as DDPM computes it, and its terms
                   (diffusion/process/likelihood.py)
motion             median straightness and speed of what moves in sampled videos, beside those of
                   the data and of the data with its frames shuffled (diffusion/metrics/motion.py)
spectrum           relative error of the mean power spectrum of sampled series
reconstruction     all that `experiments/first_stage.py` says of a first stage; with --classifier
                   the Frechet distance of reconstructions and images as well
psnr               of the first stage's reconstructions of test images, from the posterior's mean
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import weights
from diffusion.checkpoint import restore_params
from diffusion.data import loader
from diffusion.data.builders.captioned_digits import compose
from diffusion.metrics import adherence as adherence_metric
from diffusion.metrics import frechet, reconstruction
from diffusion.metrics import motion as motion_metric
from diffusion.process import gaussian, guidance, likelihood
from experiments import build, first_stage, generate, runs, workdir

UNSEEN_EPOCH = 10**6  # compositions that no training run reads


class Judge:
    """A trained classifier: labels and features of uint8 images."""

    def __init__(self, directory: pathlib.Path, flag: str = "--classifier"):
        config = workdir.read_config(directory, flag)
        if config.task != "classifier":
            raise ValueError(
                f"{flag}={directory} holds a run with task={config.task!r}: name one of "
                "configs/digits_classifier.py"
            )
        self.data = config.data.name
        saved = restore_params(directory / "checkpoints", ("params", "ema"))
        params = {**saved.items["params"], **saved.items["ema"]}["classifier"]
        network = build.task(config).network
        self.hash = saved.hash

        @jax.jit
        def run(image):
            x = image.astype(jnp.float32) / 127.5 - 1
            variables = {"params": params}
            logits = network.apply(variables, x)
            return logits.argmax(-1), network.apply(variables, x, method="features")

        self._run = run

    def __call__(self, images: np.ndarray, batch: int = 250) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._run(images[i : i + batch]) for i in range(0, len(images), batch)]
        labels, features = zip(*parts)
        return np.concatenate(labels).astype(np.int32), np.concatenate(features)


class Subject:
    """A run under evaluation; what several metrics need is made once, when it is asked for."""

    def __init__(
        self,
        directory: pathlib.Path,
        classifier: pathlib.Path | None = None,
        num: int = 1000,
        num_held_out: int = 250,
        seed: int = 0,
        which: str = "ema",
        **options: Any,
    ):
        if num < 1:
            raise ValueError(f"--num={num} must be at least 1")
        self.directory, self.classifier, self.which = directory, classifier, which
        self.num, self.num_held_out, self.seed = num, num_held_out, seed
        self.options = options

    @functools.cached_property
    def model(self) -> generate.Model:
        return generate.load(self.directory, self.which)

    @functools.cached_property
    def judge(self) -> Judge:
        if self.classifier is None:
            raise ValueError(
                "--classifier is missing: adherence and frechet_distance need the run of "
                "configs/digits_classifier.py, or of another classifier of the same data"
            )
        judge = Judge(self.classifier)
        if judge.data != self.image_config.data.name:
            raise ValueError(
                f"--classifier={self.classifier} was trained on {judge.data!r}, but "
                f"--workdir={self.directory} on {self.image_config.data.name!r}: name one of that"
            )
        return judge

    @functools.cached_property
    def image_config(self) -> ConfigDict:
        """The run's config, its data that of the images which its latents were made of."""
        config = ConfigDict(workdir.read_config(self.directory).to_dict())
        if "latents" in config:
            config.data.dir, config.data.name = config.latents.data_dir, config.latents.data_name
        return config

    @functools.cached_property
    def captioned(self) -> bool:
        return "text_encoder" in self.model.config.model

    def images(self, num: int, held_out: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Samples, and what their prompts asked for (nothing where there are no prompts)."""
        prompts, wanted = None, {}
        if self.captioned:
            prompts, wanted = compose.prompts(num, self.seed, held_out)
        batches = generate.images(self.model, num, prompts, self.seed, **self.options)
        return np.concatenate(list(batches)), wanted

    @functools.cached_property
    def samples(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self.images(self.num)

    def data(self, split: str, num: int | None = None) -> np.ndarray:
        """Images of the data set, in compositions that no training run reads."""
        source, steps = runs.open_images(self.image_config, split)
        index = np.arange(min(num or len(source), len(source)))
        return loader.fetch(source, index, np.full_like(index, UNSEEN_EPOCH), index, steps)["image"]

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on, of the parts that were used."""
        found: dict[str, Any] = {}
        if "judge" in self.__dict__:
            found["classifier"] = self.judge.hash
        if "model" in self.__dict__:
            found |= {"weights": self.which, "step": self.model.step}
            found["checkpoint"] = self.model.checkpoint_hash
        if "samples" in self.__dict__:
            sample = self.model.config.sample
            chosen = {k: v if v is not None else sample[k] for k, v in self.options.items()}
            found |= {"sample": chosen, "samples": self.num}
        return found


# -- the metrics ---------------------------------------------------------------------------------


def adherence(subject: Subject) -> dict[str, Any]:
    if subject.image_config.data.name != "captioned_digits" or not subject.captioned:
        raise ValueError(
            f"--metrics=adherence is for captioned digits, not --workdir={subject.directory}"
        )
    results = {}
    sets = {"adherence": subject.samples, "adherence_held_out": None}
    for key, made in sets.items():
        images, wanted = made or subject.images(subject.num_held_out, held_out=True)
        results[key] = adherence_metric.adherence(attributes(images, subject.judge), wanted)
    return results


def attributes(
    images: np.ndarray, judge: Judge, colours: Mapping[str, Any] = compose.COLOURS
) -> dict[str, np.ndarray]:
    """Every attribute of each image, as positions in the tables of `compose`."""
    large = np.array(compose.OFFSETS["large"]) + compose.SIZES["large"] / 2
    # The larger digit's centres: the smaller one's lie further out, nearer to no other place.
    places = {
        name: tuple(large[list(place)] / compose.CANVAS) for name, place in compose.PLACES.items()
    }
    found = adherence_metric.measure(
        images,
        colours=colours,
        backgrounds=compose.BACKGROUNDS,
        places=places,
        sizes=compose.SIZES,
    )
    return {**found, "digit": judge(images)[0]}


def frechet_distance(subject: Subject) -> dict[str, Any]:
    features = subject.judge(subject.samples[0])[1]
    reference = frechet.feature_statistics(subject.judge(subject.data("train"))[1])
    warning = frechet.sample_count_warning(len(features), features.shape[1])
    if warning:
        print(f"note: {warning}", flush=True)
    distance = frechet.frechet_distance(frechet.feature_statistics(features), reference)
    return {"frechet_distance": distance, "frechet_distance_samples": len(features)}


def bits_per_dim(subject: Subject) -> dict[str, Any]:
    model = subject.model
    if "autoencoder" in model.config.model:
        raise ValueError(
            f"--metrics=bits_per_dim is of pixels, but --workdir={subject.directory} diffuses "
            "latents: name a pixel-space run"
        )
    schedule, variance = build.schedule(model.config), model.config.process.variance

    @jax.jit
    def bound(params, image, index):
        x0 = image.astype(jnp.float32) / 127.5 - 1
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(subject.seed), index)

        def network(x_t, t):
            return model.task.predict(params, x_t, t, {})

        denoise = gaussian.make_denoise(
            network,
            schedule,
            model.config.process.prediction,
            learned_variance=variance == "learned",
        )
        return likelihood.bits_per_dim(guidance.clip_x0(denoise), schedule, x0, keys, variance)

    source, steps = runs.open_images(model.config, model.config.data.eval_split)
    if model.config.data.name == "signals":
        raise ValueError(
            f"--metrics=bits_per_dim is of pixels, but --workdir={subject.directory} diffuses "
            "series: name a run of images or videos"
        )
    count, size = min(subject.num, len(source)), min(64, subject.num)
    parts = []
    for batch in loader.one_pass(source, size, steps, stop=count):
        found = bound(model.params, batch["image"], batch["index"].astype(np.int32))
        parts.append({k: np.asarray(v)[batch["valid"]] for k, v in found.items()})
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        "bits_per_dim": {
            "mean": float(every["bits_per_dim"].mean()),
            "standard_error": float(every["bits_per_dim"].std() / np.sqrt(count)),
            "count": count,
            "split": model.config.data.eval_split,
            "prior": float(every["prior"].mean()),
            "terms": [float(f"{term:.4g}") for term in every["terms"].mean(0)],
        }
    }


def motion(subject: Subject) -> dict[str, Any]:
    videos = {"samples": subject.samples[0], "data": subject.data("test", subject.num)}
    if videos["data"].ndim != 5:
        raise ValueError(
            f"--metrics=motion is of videos, but --workdir={subject.directory} makes none: name a "
            "run of configs/video_digits.py"
        )
    rng = np.random.default_rng(subject.seed)
    videos["data_shuffled"] = rng.permuted(videos["data"], axis=1)
    results = {}
    for name, video in videos.items():
        # Less the faint ground, which has a centre of its own.
        path = motion_metric.centres(np.maximum(video.astype(np.int16) - 32, 0))
        straight = motion_metric.straightness(path)
        results[name] = {
            "straightness": float(np.nanmedian(straight)),
            "speed": float(np.nanmedian(motion_metric.speed(path))),
            "measured": int(np.isfinite(straight).sum()),
        }
    return {"motion": results}


def spectrum(subject: Subject) -> dict[str, Any]:
    made, real = subject.samples[0], subject.data("test", subject.num)
    if real.ndim != 3:
        raise ValueError(
            f"--metrics=spectrum is of series, but --workdir={subject.directory} makes none: name "
            "a run of configs/signal_ddpm.py"
        )

    def mean_power(x):
        return (np.abs(np.fft.rfft(x.astype(np.float64), axis=1)) ** 2).mean((0, 2))

    half = len(real) // 2
    target = mean_power(real)

    def error(a, b):
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return {
        "spectrum": {
            "relative_error": error(mean_power(made), target),
            # What two halves of the data differ by: the error of a perfect model is about half.
            "between_halves": error(mean_power(real[:half]), mean_power(real[half:])),
        }
    }


def psnr(subject: Subject) -> dict[str, Any]:
    directory, config = subject.directory, subject.image_config
    if config.task == "autoencoder":
        saved = restore_params(directory / "checkpoints", ("params", "ema"))
        params = {**saved.items["params"], **saved.items["ema"]}["autoencoder"]
    elif "autoencoder" in config.model:
        params = weights.load_weights(directory / "first_stage")[0]
    else:
        raise ValueError(f"--metrics=psnr needs a first stage, and --workdir={directory} has none")
    network = build.autoencoder(config.model.autoencoder)

    @jax.jit
    def reconstruct(image):
        x = image.astype(jnp.float32) / 127.5 - 1
        z = network.apply({"params": params}, x, method="encode").mean
        return generate.to_uint8(network.apply({"params": params}, z, method="decode"))

    source, steps = runs.open_images(config, "test")
    values = []
    for batch in loader.one_pass(source, 250, steps):
        pixels = np.asarray(reconstruct(batch["image"]))
        value = reconstruction.psnr(batch["image"], pixels, reconstruction.UINT8)
        values.append(np.asarray(value)[batch["valid"]])
    mean = float(np.concatenate(values).mean())
    return {"autoencoder": {"psnr": mean, "count": len(source)}}


def reconstruction_quality(subject: Subject) -> dict[str, Any]:
    stage = first_stage.load(subject.directory)
    judge = subject.judge if subject.classifier is not None else None
    features = None if judge is None else lambda images: judge(images)[1]
    batches = first_stage.test_images(stage, subject.num)
    found = first_stage.measure(stage, batches, features)
    return {"reconstruction": found, "first_stage": stage.hash, "first_stage_step": stage.step}


METRICS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "adherence": adherence,
    "frechet_distance": frechet_distance,
    "bits_per_dim": bits_per_dim,
    "motion": motion,
    "spectrum": spectrum,
    "reconstruction": reconstruction_quality,
    "psnr": psnr,
}
