"""What `experiments.evaluate` measures: one function a metric, from a run to numbers.

adherence          the fraction of samples in which each attribute, and all at once, is what the
                   prompt says: the digit by the classifier, the rest measured on pixels
                   (diffusion/metrics/adherence.py)
fid, sfid, kid,    distances to the reference on a feature network, "fid" and so on by name on the
inception_score,   published Inception alone, and frechet_distance, spatial_frechet_distance,
precision_recall   kernel_distance, classifier_score on any other (`features.py`); with density and
                   coverage (`distributions.py`)
frechet_distance,  as fid and kid, on any feature network
kernel_distance
clip_score         of samples and their captions, by the CLIP of --clip
bits_per_dim       the variational bound on the evaluation split, as DDPM computes it, and its terms
                   (diffusion/process/likelihood.py)
motion             median straightness and speed of what moves in sampled videos, beside those of
                   the data and of the data with its frames shuffled (diffusion/metrics/motion.py)
spectrum           relative error of the mean power spectrum of sampled series
reconstruction     all that `reconstructions.py` says of a first stage; with --classifier
                   or --features the Frechet distance of reconstructions and images as well, "rfid"
                   on the published Inception
psnr               of the first stage's reconstructions of test images, from the posterior's mean
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusion.data import loader
from diffusion.metrics import adherence as adherence_metric
from diffusion.metrics import frechet, reconstruction
from diffusion.metrics import motion as motion_metric
from diffusion.metrics.intervals import mean_interval
from diffusion.process import gaussian, guidance, likelihood
from diffusion.process.keys import numbered
from diffusion.training import codec
from experiments.evaluate import distances, reconstructions
from experiments.evaluate.features import Judge, attributes
from experiments.evaluate.samples import Subject
from experiments.run import build, data, networks

__all__ = ["METRICS", "Judge", "Subject", "attributes", "measure"]


# -- the metrics ---------------------------------------------------------------------------------


def adherence(subject: Subject) -> dict[str, Any]:
    results = {"adherence": _adherence(subject.rows["attributes"], subject.prompts(subject.num)[1])}
    images, wanted = subject.images(subject.num_held_out, held_out=True)
    found = attributes(images, subject.judge)
    return {**results, "adherence_held_out": _adherence(found, wanted)}


def _adherence(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, Any]:
    return adherence_metric.adherence(found, wanted)


def clip_score(subject: Subject) -> dict[str, Any]:
    found = mean_interval(subject.rows["clip"]["score"])
    return {"clip_score": found.value, "intervals": {"clip_score": [found.low, found.high]}}


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
        x0 = codec.signed(image)
        keys = numbered(jax.random.key(subject.seed), index)

        def network(x_t, t):
            return model.pipeline.task.predict(params, x_t, t, {})

        denoise = gaussian.make_denoise(
            network,
            schedule,
            model.config.process.prediction,
            learned_variance=variance == "learned",
        )
        return likelihood.bits_per_dim(guidance.clip_x0(denoise), schedule, x0, keys, variance)

    source, steps = data.open_images(model.config, model.config.data.eval_split)
    if data.known(model.config.data.name).axes == 1:
        raise ValueError(
            f"--metrics=bits_per_dim is of pixels, but --workdir={subject.directory} diffuses "
            "series: name a run of images or videos"
        )
    count, size = min(subject.num, len(source)), min(64, subject.num)
    parts = []
    for batch in loader.one_pass(source, size, steps, stop=count):
        found = bound(model.pipeline.params, batch["image"], batch["index"].astype(np.int32))
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
    videos = {"samples": subject.samples, "data": subject.data("test", subject.num)}
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
    made, real = subject.samples, subject.data("test", subject.num)
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
    directory, config = subject.run, subject.image_config
    if "autoencoder" not in config.model:
        raise ValueError(f"--metrics=psnr needs a first stage, and --workdir={directory} has none")
    reconstruct = reconstructions.reconstructor(networks.load_stage(directory, subject.step))
    source, steps = data.open_images(config, "test")
    values = []
    for batch in loader.one_pass(source, 250, steps):
        pixels, _ = reconstruct(batch["image"])
        value = reconstruction.psnr(batch["image"], pixels, reconstruction.UINT8)
        values.append(np.asarray(value)[batch["valid"]])
    found = mean_interval(np.concatenate(values))
    interval = {"psnr": [found.low, found.high]}
    return {"autoencoder": {"psnr": found.value, "interval": interval, "count": len(source)}}


def reconstruction_quality(subject: Subject) -> dict[str, Any]:
    stage = networks.load_stage(subject.run, subject.step)
    tools = subject.tools
    network = subject.network if tools.classifier or tools.features else None
    features = None if network is None else lambda images: network.run(images)["pool"]
    batches = reconstructions.test_images(stage, subject.num)
    found = reconstructions.measure(stage, batches, features)
    if network is not None and network.public:
        found["rfid"] = found.pop("frechet_distance")
    return {"reconstruction": found, "first_stage": stage.hash, "first_stage_step": stage.step}


METRICS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "adherence": adherence,
    "fid": distances.frechet,
    "sfid": distances.spatial_frechet,
    "kid": distances.kernel_distance,
    "inception_score": distances.classifier_score,
    "precision_recall": distances.neighbours,
    "frechet_distance": distances.frechet,
    "kernel_distance": distances.kernel_distance,
    "clip_score": clip_score,
    "bits_per_dim": bits_per_dim,
    "motion": motion,
    "spectrum": spectrum,
    "reconstruction": reconstruction_quality,
    "psnr": psnr,
}
NEEDS = {  # what `Subject.rows` must hold
    "adherence": "attributes",
    "clip_score": "clip",
    **dict.fromkeys(("fid", "sfid", "frechet_distance"), "features"),
    **dict.fromkeys(("kid", "kernel_distance"), "features"),
    **dict.fromkeys(("inception_score", "precision_recall"), "features"),
}
FRECHET = ("fid", "sfid", "frechet_distance")
OF_POINTS = ("kid", "kernel_distance", "precision_recall")  # compare single vectors
OF_IMAGES = (*FRECHET, *OF_POINTS, "inception_score")  # need no run
OF_FIRST_STAGE = ("reconstruction", "psnr")  # which has its own weights


def prepare(subject: Subject, metrics: list[str]) -> None:
    """Refuses what can be refused before any sample is made; opens networks and the reference."""
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or not metrics:
        raise ValueError(f"--metrics={','.join(metrics)} must name some of {', '.join(METRICS)}")
    if "adherence" in metrics:
        _check_digits(subject)
    subject.needs = tuple(sorted({NEEDS[name] for name in metrics if name in NEEDS}))
    subject.tools.spatial |= "sfid" in metrics
    subject.tools.vectors |= bool(set(OF_POINTS) & set(metrics))
    if "features" in subject.needs:
        _check_network(subject, metrics)
    if "clip" in subject.needs:
        _ = subject.tools.clip
    if set(metrics) & {*FRECHET, *OF_POINTS}:
        _ = subject.reference


def _check_digits(subject: Subject) -> None:
    if not data.known(subject.image_config.data.name).judged or not subject.captioned:
        raise ValueError(
            "--metrics=adherence is for denoisers of captioned digits that read captions, not "
            f"--workdir={subject.directory}"
        )
    _ = subject.judge


def _check_network(subject: Subject, metrics: list[str]) -> None:
    network = subject.network
    if subject.directory is not None and subject.image_shape is None:
        raise ValueError(
            f"--workdir={subject.directory} makes no images, which --metrics={metrics[0]} is of"
        )
    if network.name != "inception":
        for name in ("fid", "sfid", "kid"):
            if name in metrics:
                raise ValueError(
                    f"--metrics={name} is of Inception, not of {network.name}: give "
                    "--features=inception, or ask for frechet_distance"
                )
    for name in set(metrics) & set(FRECHET):
        dim = 2023 if name == "sfid" else network.dim
        frechet.sample_count_warning(subject.count, dim, strict=subject.strict)


def measure(subject: Subject, metrics: list[str]) -> dict[str, Any]:
    """Numbers by name, with "intervals" of those that have one."""
    results: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for name in metrics:
        found = METRICS[name](subject)
        intervals |= found.pop("intervals", {})
        results |= found
    return {**results, "intervals": intervals}
