"""What `experiments.evaluate` measures: one record a metric, and what is refused before any is.

The command's help, its checks and the README's list are made of `METRICS`. "fid" and so on are
names of the published Inception alone; on any other network they are a frechet_distance, a
spatial_frechet_distance, a kernel_distance and a classifier_score (`features.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from diffusion.metrics import frechet
from diffusion.metrics.directions import higher_is_better
from diffusion.process import gaussian
from experiments.evaluate import adapters, distances, placements, restorations, scores
from experiments.evaluate.samples import Subject
from experiments.run import build, data, given


@dataclasses.dataclass(frozen=True)
class Metric:
    """One name of --metrics: from a subject to numbers by name, "intervals" and a "sheet" beside,
    which draws a picture into a file.

    says: what it is. of: "images" of a run or a set; "samples" that a run makes; its "data"; its
    "first stage", which has its own weights. needs: what `Subject.rows` must hold, or another use
    of the networks. compares: with the reference's "pool" or "spatial" statistics, or its
    "vectors". inception: of that network alone. axes: of an example of the data; None: any.
    """

    says: str
    function: Callable[[Subject], dict[str, Any]]
    of: str = "images"
    needs: str = ""
    compares: str = ""
    inception: bool = False
    axes: int | None = None


def _distance(says: str, function: Callable, compares: str = "pool", inception: bool = False):
    return Metric(says, function, "images", "features", compares, inception, 2)


_FRECHET, _KERNEL = "Frechet distance to the reference", "squared kernel distance (MMD) to it"
METRICS: dict[str, Metric] = {
    "adherence": Metric(
        "how often a sample shows what its prompt says: the digit by the classifier, the rest "
        "measured on pixels",
        scores.adherence,
        "samples",
        "attributes",
    ),
    "accuracy": Metric(
        "how often a sample is taken for its class", scores.accuracy, "samples", "class", axes=2
    ),
    "fid": _distance(f"{_FRECHET}, on Inception", distances.frechet, inception=True),
    "sfid": _distance(
        "the same on Inception's spatial features", distances.spatial_frechet, "spatial", True
    ),
    "kid": _distance(f"{_KERNEL}, on Inception", distances.kernel_distance, "vectors", True),
    "inception_score": _distance(
        "of the network's own classes; on any but Inception, classifier_score",
        distances.classifier_score,
        "",
    ),
    "precision_recall": _distance(
        "precision, recall, density and coverage", distances.neighbours, "vectors"
    ),
    "frechet_distance": _distance(f"{_FRECHET}, on any feature network", distances.frechet),
    "kernel_distance": _distance(
        f"{_KERNEL}, on any feature network", distances.kernel_distance, "vectors"
    ),
    "clip_score": Metric(
        "of samples and their captions, by the CLIP of --clip", scores.clip_score, "samples", "clip"
    ),
    "bits_per_dim": Metric(
        "the variational bound on the evaluation split, as DDPM computes it, its terms, and rate "
        "and distortion by step",
        scores.bits_per_dim,
        "data",
    ),
    "colour": Metric(
        "of LoRA on the digits: adherence before and after, in its new colour and in the others",
        adapters.colour,
        "samples",
        "judge",
        axes=2,
    ),
    "outline": Metric(
        "of ControlNet on the digits: agreement of samples with the outlines given, and adherence, "
        "before and after",
        adapters.outline,
        "samples",
        "judge",
        axes=2,
    ),
    "motion": Metric(
        "straightness and speed of what moves in videos, beside those of the data; with "
        "--classifier the share of frames that it reads as the class asked for",
        scores.motion,
        "samples",
        axes=3,
    ),
    "spectrum": Metric(
        "relative error of the mean power spectrum of series", scores.spectrum, "samples", axes=1
    ),
    "reconstruction": Metric(
        "of a first stage: PSNR, SSIM, sharpness, LPIPS, latents' moments; with --classifier or "
        "--features a Frechet distance as well, rfid on Inception",
        scores.reconstruction,
        "first stage",
        "stage features",
        axes=2,
    ),
    "restoration": Metric(
        "of super-resolution and inpainting: PSNR, SSIM, with --classifier accuracy and Frechet "
        "distance, of samples and of what needs no model",
        restorations.restoration,
        "samples",
        axes=2,
    ),
    "placement": Metric(
        "of boxes and maps of labels: whether digits are where they were asked for, and right",
        placements.placement,
        "samples",
        "judge",
        axes=2,
    ),
    "psnr": Metric(
        "of the first stage's reconstructions of test images", scores.psnr, "first stage", axes=2
    ),
}
COMPARED = ("pool", "spatial", "vectors")  # of a reference
AXES = {1: "series", 2: "images", 3: "videos"}


def listed() -> str:
    """Every metric and what it is, for --help; the README has it as well."""
    return " ".join(f"{name}: {described(name)}." for name in METRICS)


def described(name: str) -> str:
    return f"{METRICS[name].says}{' (higher is better)' * higher_is_better(name)}"


def of(*kinds: str) -> tuple[str, ...]:
    """The names of the metrics of these kinds: "images", "first stage", ..."""
    return tuple(name for name, metric in METRICS.items() if metric.of in kinds)


def comparing(metrics: list[str], *what: str) -> list[str]:
    return [name for name in metrics if METRICS[name].compares in what]


# -- what is refused, before any network is run ----------------------------------------------------


def check(metrics: list[str]) -> None:
    """ValueError for none, and for one that there is not."""
    if not metrics or set(metrics) - set(METRICS):
        raise ValueError(f"--metrics={','.join(metrics)} must name some of {', '.join(METRICS)}")


def prepare(subject: Subject, metrics: list[str]) -> Subject:
    """The subject with what the metrics need: networks and the reference are opened.

    Refuses what can be refused before any sample is made.
    """
    check(metrics)
    for name in metrics:
        if subject.run is not None:
            _check_run(subject, name)
        if name in CHECKS:
            CHECKS[name](subject, name)
    every = [METRICS[name] for name in metrics]
    needs = {part for metric in every for part in (metric.needs, metric.compares)} - {""}
    if any(_sampled(metric, subject) for metric in every):
        needs |= {"model"}
    subject = dataclasses.replace(subject, needs=frozenset(needs))
    if "features" in needs:
        _check_network(subject, metrics)
    if not needs & {*COMPARED}:
        return subject
    reference = subject.reference or subject.compared()
    for key in needs & {"pool", "spatial"}:
        reference.of(key)
    if "vectors" in needs:
        reference.points()
    return dataclasses.replace(subject, reference=reference)


def _sampled(metric: Metric, subject: Subject) -> bool:
    """Whether it is of a denoiser."""
    return metric.of in ("samples", "data") or (metric.of == "images" and not subject.samples.path)


def _check_run(subject: Subject, name: str) -> None:
    """Whether the run has what the metric is of."""
    metric, config = METRICS[name], subject.run.image_config
    axes = data.known(config.data.name).axes
    if metric.axes not in (None, axes):
        raise ValueError(
            f"--metrics={name} is of {AXES[metric.axes]}, but {subject.run} is of "
            f"{AXES[axes]} (data.name={config.data.name!r}): name another metric or run"
        )
    if config.task == "denoiser" and config.conditioning.concat == "past":
        raise ValueError(
            f"--metrics={name} is of samples, but {subject.run} goes on from past values: use "
            "`python -m experiments.evaluate.forecast`"
        )
    if metric.of == "first stage" and "autoencoder" not in config.model:
        raise ValueError(
            f"--metrics={name} needs a first stage, and {subject.run} has none: "
            "name a run of one, or of latent diffusion"
        )
    if _sampled(metric, subject) and config.task != "denoiser":
        raise ValueError(
            f"--metrics={name} is of denoisers, but {subject.run} holds a run of "
            f"task={config.task!r}: name one of 'denoiser'"
        )


def _check_digits(subject: Subject, name: str) -> None:
    if not data.known(subject.run.image_config.data.name).judged or not subject.run.captioned:
        raise ValueError(
            f"--metrics={name} is for denoisers of captioned digits that read captions, not "
            f"{subject.run}"
        )
    if subject.samples.num_held_out < 1:
        raise ValueError(f"--num_held_out={subject.samples.num_held_out} must be at least 1")
    _ = subject.judge


def _check_captions(subject: Subject, name: str) -> None:
    if not subject.run.captioned:
        raise ValueError(f"--metrics={name} needs captions, and {subject.run} reads none")
    _ = subject.tools.clip


def _check_bound(subject: Subject, name: str) -> None:
    """That the model has a bound on the bits of its pixels."""
    config, end, start = subject.run.image_config, subject.run, f"--metrics={name} is of "
    if "autoencoder" in config.model:
        raise ValueError(f"{start}pixels, but {end} diffuses latents: name a pixel-space run")
    if data.known(config.data.name).axes == 1:
        raise ValueError(
            f"{start}pixels, but {end} diffuses series: name a run of images or videos"
        )
    if told := sorted(given.told(config).keys() - {"hint"}):
        raise ValueError(
            f"{start}unconditional models, but {end} is told {told[0]}: name one that is told "
            "nothing"
        )
    try:
        gaussian.posterior_tables(build.schedule(config))
    except ValueError as error:
        raise ValueError(f"--metrics={name}, {end}: {error}") from error


CHECKS = {
    "adherence": _check_digits,
    "clip_score": _check_captions,
    "bits_per_dim": _check_bound,
    "accuracy": scores.check_classes,
    **dict.fromkeys(adapters.KINDS, adapters.check),
    "restoration": restorations.check,
    "placement": placements.check,
}


def _check_network(subject: Subject, metrics: list[str]) -> None:
    named = subject.tools.feature_name
    for name in metrics:
        if METRICS[name].inception and named != "inception":
            raise ValueError(
                f"--metrics={name} is of Inception, not of {named}: give --features=inception, or "
                f"ask for {'kernel' if name == 'kid' else 'frechet'}_distance"
            )
        if name == "inception_score" and named == "clip":
            raise ValueError(
                "--metrics=inception_score needs classes, and --features=clip has none: use "
                "inception or classifier"
            )
    for name in comparing(metrics, "pool", "spatial"):
        dim = 2023 if METRICS[name].compares == "spatial" else subject.network.dim
        frechet.sample_count_warning(subject.samples.count, dim, strict=subject.strict)
    _ = subject.network


def measure(subject: Subject, metrics: list[str]) -> dict[str, Any]:
    """Numbers by name, with "intervals" of those that have one, and "sheets" of pictures."""
    results: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    sheets: dict[str, Any] = {}
    for name in metrics:
        found = METRICS[name].function(subject)
        intervals |= found.pop("intervals", {})
        sheets |= {name: found.pop("sheet")} if "sheet" in found else {}
        results |= found
    return {**results, "intervals": intervals, **({"sheets": sheets} if sheets else {})}
