"""Metrics that are no distances between sets of images, each from a `Subject` to numbers."""

import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from diffusion import pictures
from diffusion.data import loader
from diffusion.metrics import adherence as adherence_metric
from diffusion.metrics import motion as motion_metric
from diffusion.metrics import reconstruction as of_pixels
from diffusion.metrics.intervals import beside, mean_interval, wilson
from diffusion.pictures import Line, Panel
from diffusion.process import likelihood
from diffusion.process.keys import numbered
from diffusion.training import codec
from experiments.evaluate import reconstructions, references
from experiments.evaluate.features import attributes
from experiments.evaluate.samples import Subject
from experiments.run import data, networks


def adherence(subject: Subject) -> dict[str, Any]:
    samples = subject.samples
    wanted = samples.prompts(samples.num)[1]
    images, held_out = samples.images(samples.num_held_out, held_out=True)
    found = attributes(images, subject.judge)
    return {
        "adherence": adherence_metric.adherence(subject.rows["attributes"], wanted),
        "adherence_held_out": adherence_metric.adherence(found, held_out),
    }


def clip_score(subject: Subject) -> dict[str, Any]:
    return beside({"clip_score": mean_interval(subject.rows["clip"]["score"])})


def accuracy(subject: Subject) -> dict[str, Any]:
    right = subject.rows["class"]["seen"] == _asked(subject)
    return beside({"accuracy": wilson(int(right.sum()), len(right))})


def check_classes(subject: Subject, name: str) -> None:
    """ValueError for a run whose samples are of no class."""
    if _asked(subject) is None:
        raise ValueError(
            f"--metrics={name} is of samples of a class, but {subject.run} is told none: name a "
            "class-conditional run, or give --guidance_classifier"
        )
    _ = subject.judge


def bits_per_dim(subject: Subject) -> dict[str, Any]:
    model, num, seed = subject.run.model, subject.samples.num, subject.samples.seed
    how = model.pipeline.how.changed(clip=True, dynamic_threshold=0.0, guidance_scale=1.0)

    @jax.jit
    def bound(params, image, index):
        keys = numbered(jax.random.key(seed), index)
        denoise = how.denoise(functools.partial(model.pipeline.task.predict, params), {})
        x0 = codec.signed(image)
        return likelihood.bits_per_dim(denoise, how.schedule, x0, keys, how.variance)

    source, steps = data.open_images(model.config, model.config.data.eval_split)
    count, size = min(num, len(source)), min(64, num)
    parts = []
    for batch in loader.one_pass(source, size, steps, stop=count):
        found = bound(model.pipeline.params, batch["image"], batch["index"].astype(np.int32))
        parts.append({k: np.asarray(v)[batch["valid"]] for k, v in found.items()})
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    terms, prior = every["terms"].mean(0), float(every["prior"].mean())
    found = likelihood.rate_distortion(prior, terms, every["x0_mse"].mean(0))
    curve = {name: _short(values) for name, values in found.items()}
    return {
        "sheet": functools.partial(plot_rate_distortion, curve=curve),
        "bits_per_dim": {
            **beside({"mean": mean_interval(every["bits_per_dim"])}),
            "standard_error": float(every["bits_per_dim"].std() / np.sqrt(count)),
            "count": count,
            "split": model.config.data.eval_split,
            "prior": prior,
            "terms": _short(terms),
            "rate_distortion": curve,
        },
    }


def plot_rate_distortion(path: pathlib.Path, curve: Mapping[str, list[float]]) -> None:
    """DDPM's figure 5: distortion and rate against the reverse steps taken, and each other."""
    rate, distortion = curve["rate"], curve["distortion"]
    done = len(rate) - 1 - np.arange(len(rate))
    across = {"xlabel": "reverse steps"}, {"xlabel": "rate, bits/dim"}
    error = {"ylabel": "distortion (RMSE, 0 to 255)"}
    panels = [
        Panel([Line(done, distortion)], across[0] | error),
        Panel([Line(done, rate)], across[0] | {"ylabel": "rate, bits/dim"}),
        Panel([Line(rate, distortion)], across[1] | error),
    ]
    pictures.figure(path, panels, 3)


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _both(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Samples, and as many of the data's test split."""
    samples = subject.samples
    real = references.unseen(subject.run.image_config, "test", samples.num)
    return samples.images(samples.num)[0], real


def motion(subject: Subject) -> dict[str, Any]:
    made, real = _both(subject)
    videos = {"samples": made, "data": real}
    rng = np.random.default_rng(subject.samples.seed)
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
    if subject.tools.classifier is not None:
        for name, asked in _classes(subject).items():
            frames = videos[name].reshape(-1, *videos[name].shape[2:])
            found, _ = subject.judge(np.repeat(frames, 3 // frames.shape[-1], axis=-1))
            results[name]["legible"] = float((found.reshape(len(asked), -1).T == asked).mean())
    return {"motion": results}


def _classes(subject: Subject) -> dict[str, np.ndarray]:
    """Of the data's videos, and of the samples where they are of classes."""
    number = np.arange(subject.samples.num)
    source, _ = data.open_images(subject.run.image_config, "test")
    of_data = {"data": source.batch(number[: len(source)])["label"]}
    asked = _asked(subject)
    return of_data if asked is None else {"samples": asked, **of_data}


def _asked(subject: Subject) -> np.ndarray | None:
    """Classes of the samples; None where they are of none."""
    classes = subject.run.model.pipeline.columns().get("label")
    return None if classes is None else classes[np.arange(subject.samples.num) % len(classes)]


def spectrum(subject: Subject) -> dict[str, Any]:
    def mean_power(x):
        return (np.abs(np.fft.rfft(x.astype(np.float64), axis=1)) ** 2).mean((0, 2))

    def error(a, b):
        a, b = mean_power(a), mean_power(b)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    made, real = _both(subject)
    half = len(real) // 2
    return {
        "spectrum": {
            "relative_error": error(made, real),
            # What two halves of the data differ by: the error of a perfect model is about half.
            "between_halves": error(real[:half], real[half:]),
        }
    }


def psnr(subject: Subject) -> dict[str, Any]:
    stage = networks.load_stage(subject.run.directory, subject.run.step)
    reconstruct = reconstructions.reconstructor(stage)
    source, steps = data.open_images(subject.run.image_config, "test")
    values = []
    for batch in loader.one_pass(source, 250, steps):
        pixels, _ = reconstruct(batch["image"])
        value = of_pixels.psnr(batch["image"], pixels, of_pixels.UINT8)
        values.append(np.asarray(value)[batch["valid"]])
    found = mean_interval(np.concatenate(values))
    return {"autoencoder": {**beside({"psnr": found}), "count": len(source)}}


def reconstruction(subject: Subject) -> dict[str, Any]:
    stage = networks.load_stage(subject.run.directory, subject.run.step)
    found = of_stage(subject, stage, reconstructions.test_images(stage, subject.samples.num))
    return {"reconstruction": found, "first_stage": stage.hash, "first_stage_step": stage.step}


def of_stage(
    subject: Subject, stage: networks.Stage, batches: Iterable[np.ndarray]
) -> dict[str, Any]:
    """`reconstructions.measure` with the feature network that was chosen, if any."""
    network = subject.network if subject.tools.chosen else None
    features = None if network is None else lambda images: network.run(images)["pool"]
    found = reconstructions.measure(stage, batches, features)
    if network is not None and network.public:
        found["rfid"] = found.pop("frechet_distance")
    return found
