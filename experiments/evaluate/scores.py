"""Metrics that are no distances between sets of images, each from a `Subject` to numbers."""

import functools
from typing import Any

import jax
import numpy as np

from diffusion.data import loader
from diffusion.metrics import adherence as adherence_metric
from diffusion.metrics import motion as motion_metric
from diffusion.metrics import reconstruction as of_pixels
from diffusion.metrics.intervals import beside, mean_interval
from diffusion.process import likelihood
from diffusion.process.keys import numbered
from diffusion.training import codec
from experiments.evaluate import reconstructions
from experiments.evaluate.features import attributes
from experiments.evaluate.samples import Subject
from experiments.run import data, networks


def adherence(subject: Subject) -> dict[str, Any]:
    wanted = subject.prompts(subject.num)[1]
    images, held_out = subject.images(subject.num_held_out, held_out=True)
    found = attributes(images, subject.judge)
    return {
        "adherence": adherence_metric.adherence(subject.rows["attributes"], wanted),
        "adherence_held_out": adherence_metric.adherence(found, held_out),
    }


def clip_score(subject: Subject) -> dict[str, Any]:
    return beside({"clip_score": mean_interval(subject.rows["clip"]["score"])})


def bits_per_dim(subject: Subject) -> dict[str, Any]:
    model = subject.model
    how = model.pipeline.how.changed(clip=True, dynamic_threshold=0.0, guidance_scale=1.0)

    @jax.jit
    def bound(params, image, index):
        keys = numbered(jax.random.key(subject.seed), index)
        denoise = how.denoise(functools.partial(model.pipeline.task.predict, params), {})
        x0 = codec.signed(image)
        return likelihood.bits_per_dim(denoise, how.schedule, x0, keys, how.variance)

    source, steps = data.open_images(model.config, model.config.data.eval_split)
    count, size = min(subject.num, len(source)), min(64, subject.num)
    parts = []
    for batch in loader.one_pass(source, size, steps, stop=count):
        found = bound(model.pipeline.params, batch["image"], batch["index"].astype(np.int32))
        parts.append({k: np.asarray(v)[batch["valid"]] for k, v in found.items()})
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        "bits_per_dim": {
            **beside({"mean": mean_interval(every["bits_per_dim"])}),
            "standard_error": float(every["bits_per_dim"].std() / np.sqrt(count)),
            "count": count,
            "split": model.config.data.eval_split,
            "prior": float(every["prior"].mean()),
            "terms": [float(f"{term:.4g}") for term in every["terms"].mean(0)],
        }
    }


def motion(subject: Subject) -> dict[str, Any]:
    videos = {"samples": subject.samples, "data": subject.data("test", subject.num)}
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
    def mean_power(x):
        return (np.abs(np.fft.rfft(x.astype(np.float64), axis=1)) ** 2).mean((0, 2))

    def error(a, b):
        a, b = mean_power(a), mean_power(b)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    real = subject.data("test", subject.num)
    half = len(real) // 2
    return {
        "spectrum": {
            "relative_error": error(subject.samples, real),
            # What two halves of the data differ by: the error of a perfect model is about half.
            "between_halves": error(real[:half], real[half:]),
        }
    }


def psnr(subject: Subject) -> dict[str, Any]:
    reconstruct = reconstructions.reconstructor(networks.load_stage(subject.run, subject.step))
    source, steps = data.open_images(subject.image_config, "test")
    values = []
    for batch in loader.one_pass(source, 250, steps):
        pixels, _ = reconstruct(batch["image"])
        value = of_pixels.psnr(batch["image"], pixels, of_pixels.UINT8)
        values.append(np.asarray(value)[batch["valid"]])
    found = mean_interval(np.concatenate(values))
    return {"autoencoder": {**beside({"psnr": found}), "count": len(source)}}


def reconstruction(subject: Subject) -> dict[str, Any]:
    stage, tools = networks.load_stage(subject.run, subject.step), subject.tools
    network = subject.network if tools.classifier or tools.features else None
    features = None if network is None else lambda images: network.run(images)["pool"]
    batches = reconstructions.test_images(stage, subject.num)
    found = reconstructions.measure(stage, batches, features)
    if network is not None and network.public:
        found["rfid"] = found.pop("frechet_distance")
    return {"reconstruction": found, "first_stage": stage.hash, "first_stage_step": stage.step}
