"""Super-resolution and inpainting, measured: pictures made of degraded ones beside the originals.

The evaluation split's pictures are degraded as in training, in draws that no training run reads
(`references.UNSEEN_EPOCH`), and restored; beside the samples stands what needs no model: the small
picture enlarged by bicubic, or the picture with its black hole. Of each: PSNR and SSIM to the
originals, and with --classifier how often it is taken for what it is, and the Frechet distance of
its features to the originals' (the same pictures, so that nothing restored has distance 0). A mean
of PSNR is of the pictures' own, as papers have it; one that equals its original has none (it is
infinite, in scikit-image too): "equal" says how many were left out.
"""

from typing import Any

import numpy as np

from diffusion import pictures
from diffusion.data import degrade
from diffusion.metrics import frechet
from diffusion.metrics import reconstruction as of_pixels
from diffusion.metrics.intervals import beside, mean_interval, wilson
from experiments.evaluate.samples import Subject

SHOWN = 10
NAMES = {"low_resolution": "bicubic", "inpaint": "hidden", "inpaint_ldm": "hidden"}


def check(subject: Subject, name: str) -> None:
    """ValueError for a run of another task."""
    kind = subject.run.image_config.conditioning.concat
    if kind not in NAMES:
        raise ValueError(
            f"--metrics={name} is of super-resolution and inpainting, but {subject.run} has "
            f"conditioning.concat={kind!r}: name another metric"
        )
    if subject.tools.classifier:
        dim = subject.judge.dim
        frechet.sample_count_warning(subject.samples.num, dim, strict=subject.strict)


def restoration(subject: Subject) -> dict[str, Any]:
    samples = subject.samples
    given = samples.given
    images = given["image"]
    kind = subject.run.image_config.conditioning.concat
    judge = subject.judge if subject.tools.classifier else None
    sets = {
        "samples": samples.images(samples.num)[0],
        NAMES[kind]: without(kind, given),
        "originals": images,
    }
    known = {} if judge is None else {name: judge(pixels) for name, pixels in sets.items()}
    found: dict[str, Any] = {}
    for name, pixels in sets.items():
        estimates, equal = {}, {}
        if name != "originals":
            for metric in (of_pixels.psnr, of_pixels.ssim):
                values = np.asarray(metric(images, pixels, of_pixels.UINT8))
                finite = np.isfinite(values)
                estimates[metric.__name__] = mean_interval(values[finite])
                equal = equal or {"equal": int((~finite).sum())}
        if name in known and "label" in given:
            right = known[name][0] == given["label"]
            estimates["accuracy"] = wilson(int(right.sum()), len(right))
        found[name] = {**beside(estimates), **equal}
        if name in known and name != "originals":
            made, real = (frechet.feature_statistics(known[n][1]) for n in (name, "originals"))
            found[name]["frechet_distance"] = frechet.frechet_distance(made, real)
    shown = {name: pixels[:SHOWN] for name, pixels in sets.items()}
    rows = np.concatenate([shown[NAMES[kind]], shown["samples"], shown["originals"]])
    said = [name for name in (NAMES[kind], "sample", "original") for _ in images[:SHOWN]]
    sheet = pictures.sheet(rows, said, min(SHOWN, len(images)))
    return {"restoration": {**found, "count": len(images)}, "sheet": sheet}


def without(kind: str, given: dict[str, Any]) -> np.ndarray:
    """uint8, as large as the originals: what there is without a model."""
    if kind == "low_resolution":
        scale = given["image"].shape[1] / given["small"].shape[1]
        return np.stack([degrade.bicubic(small, scale) for small in given["small"]])
    return np.where(given["mask"] > 0, 0, given["image"])
