"""Distances and scores of samples on a feature network: FID and its kin, under exact names.

Each function takes a `Subject` and returns numbers by name, and "intervals", 95 % of the sampling
of what was generated (the reference is taken as it is):

    frechet             eq. 1 of metrics/frechet.py, its value at infinitely many samples, bootstrap
    spatial_frechet     the same of Inception's spatial features
    kernel              metrics/kernel.py; interval over disjoint blocks
    classifier_score    metrics/inception_score.py, of the network's own classes
    neighbours          precision, recall, density, coverage (metrics/precision_recall.py)
"""

from typing import Any

import numpy as np

from diffusion.metrics import frechet as frechet_metric
from diffusion.metrics import inception_score, kernel, precision_recall
from diffusion.metrics.intervals import Estimate, beside
from experiments.evaluate import stream
from experiments.evaluate.samples import Subject

UNKNOWN = (float("nan"), float("nan"))  # the interval where there is none
FEW_REPLICATES, MANY_DIMENSIONS = 20, 512  # a bootstrap replicate costs dim³


def frechet(subject: Subject) -> dict[str, Any]:
    return _frechet(subject, "pool", subject.network.key("frechet_distance"))


def spatial_frechet(subject: Subject) -> dict[str, Any]:
    return _frechet(subject, "spatial", subject.network.key("spatial_frechet_distance"))


def _frechet(subject: Subject, key: str, name: str) -> dict[str, Any]:
    vectors, target = subject.rows["features"][key], subject.reference.of(key)
    found = stream.statistics(vectors)
    distance = frechet_metric.frechet_distance(found, target)
    ends = _bootstrap(subject, vectors, target)
    known = {name: Estimate(distance, *(ends[1:3] if ends else UNKNOWN))}
    at = _at_infinity(vectors, target, subject.samples.seed)
    if at is not None:
        half = 1.96 * at.standard_error
        known[f"{name}_at_infinity"] = Estimate(at.value, at.value - half, at.value + half)
    return {**beside(known), f"{name}_samples": len(vectors)}


def _bootstrap(subject: Subject, vectors: np.ndarray, target) -> Estimate | None:
    replicates = subject.replicates
    if vectors.shape[1] > MANY_DIMENSIONS:
        replicates = min(replicates, FEW_REPLICATES)
    if replicates < 2 or len(vectors) <= vectors.shape[1]:
        return None
    return frechet_metric.frechet_interval(
        vectors, target, replicates=replicates, seed=subject.samples.seed
    )


def _at_infinity(vectors: np.ndarray, target, seed: int):
    """None where there are too few samples to draw a line through."""
    count, dim = vectors.shape
    if max(count // 10, dim + 1) >= count - 2:
        return None
    points = 15 if dim <= MANY_DIMENSIONS else 6
    return frechet_metric.frechet_at_infinity(vectors, target, points=points, seed=seed)


def kernel_distance(subject: Subject) -> dict[str, Any]:
    name = subject.network.key("kernel_distance")
    found = kernel.kernel_distance(
        subject.rows["features"]["pool"], subject.reference.points(), seed=subject.samples.seed
    )
    size = {f"{name}_std": found.std, f"{name}_subset_size": found.subset_size}
    return {**beside({name: Estimate(found.value, found.low, found.high)}), **size}


def classifier_score(subject: Subject) -> dict[str, Any]:
    name = subject.network.key("classifier_score")
    logits = subject.rows["features"]["logits"]
    found = inception_score.inception_score(
        logits,
        splits=min(10, len(logits)),
        replicates=subject.replicates,
        seed=subject.samples.seed,
    )
    more = {f"{name}_std": found.std, f"{name}_splits": found.splits}
    return {**beside({name: Estimate(found.value, found.low, found.high)}), **more}


def neighbours(subject: Subject) -> dict[str, Any]:
    terms = precision_recall.per_point(subject.rows["features"]["pool"], subject.reference.points())
    found = precision_recall.with_intervals(terms)
    counts = [terms.precision.size, terms.recall.size]
    return {**beside(found), "precision_recall_counts": counts}
