"""Named evaluations, one for each published number that a config claims, as data.

    python -m experiments.evaluate --workdir=DIR --preset=ldm_table1_celebahq

A preset sets metrics, number of samples, sampler, steps, guidance and rounding as the row had them,
refuses a run of other data, and puts the published number beside the measured one. Sources:
DDPM https://arxiv.org/abs/2006.11239; LDM https://arxiv.org/abs/2112.10752 and its README (numbers
of steps, eta); Improved DDPM https://arxiv.org/abs/2102.09672; EDM https://arxiv.org/abs/2206.00364;
rectified flow https://arxiv.org/abs/2209.03003.

`scripts/sample_diffusion.py` of CompVis and `scripts/image_sample.py` of improved-diffusion cut
pixels off to 8 bits; EDM's `generate.py` rounds to nearest; DDPM's Inception sees floats that are
not rounded at all (`diffusion_tf/tpu_utils/tpu_utils.py`), which are rounded to nearest here.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row. data: the config's data.name. published: numbers by the names in the results.

    sample: keys of the config's `sample` that the row fixes, "options" among them.
    """

    config: str
    row: str
    data: str
    image_size: int
    metrics: tuple[str, ...]
    sample: dict[str, Any]
    published: dict[str, float]
    num: int = 50_000
    split: str = "train"
    rounding: str = "nearest"
    note: str = ""


FID_AND_IS = ("fid", "inception_score")
TRIPLE = ("fid", "precision", "recall")


def _ldm(config: str, row: str, data: str, sample: tuple, published: dict, **more: Any) -> Preset:
    """sample: DDIM's (steps, eta, guidance scale)."""
    steps, eta, scale = sample
    options = {"eta": eta, "spacing": "stride", "steps_offset": 1}
    given = {"sampler": "ddim", "steps": steps, "guidance_scale": scale, "options": options}
    more = {"metrics": ("fid", "precision_recall"), "rounding": "truncate", **more}
    row = f"LDM table {row}"
    return Preset(f"configs/{config}", row, data, 256, sample=given, published=published, **more)


def _pixels(config: str, row: str, data: str, published: dict, **more: Any) -> Preset:
    sample = {"sampler": "ddpm", "steps": 1000, "guidance_scale": 1.0, **more.pop("sample", {})}
    size = 32 if data == "cifar10" else 256
    more = {"metrics": ("fid",), **more}
    return Preset(f"configs/{config}", row, data, size, sample=sample, published=published, **more)


def _cifar(config: str, row: str, fid: float, **more: Any) -> Preset:
    return _pixels(config, row, "cifar10", {"fid": fid, **more.pop("and_", {})}, **more)


def _lsun(name: str, fid: float, data: str = "") -> Preset:
    config, data = f"ddpm_lsun256.py:{name}", f"lsun/{data or name}"
    return _pixels(config, "DDPM table 3", data, {"fid": fid})


def _table_1(config: str, data: str, steps: int, eta: float, *numbers: float, **more: Any):
    return _ldm(config, "1", data, (steps, eta, 1.0), dict(zip(TRIPLE, numbers)), **more)


PRESETS: dict[str, Preset] = {
    "ddpm_table1_cifar10": _cifar(
        "ddpm_cifar10.py",
        "DDPM table 1, L_simple",
        3.17,
        and_={"inception_score": 9.46},
        metrics=FID_AND_IS,
    ),
    "ddpm_table1_cifar10_test": _cifar(
        "ddpm_cifar10.py", "DDPM section 4.1, against the test images", 5.24, split="test"
    ),
    "ddpm_lsun_church": _lsun("church", 7.89, "church_outdoor"),
    "ddpm_lsun_bedroom": _lsun("bedroom", 6.36),
    "ddpm_lsun_cat": _lsun("cat", 19.75),
    "iddpm_cifar10_simple": _cifar(
        *("iddpm_cifar10.py:simple", "Improved DDPM table 2", 2.90),
        sample={"steps": 4000},
        rounding="truncate",
    ),
    "iddpm_cifar10_hybrid": _cifar(
        *("iddpm_cifar10.py:hybrid", "Improved DDPM table 2", 3.19),
        sample={"steps": 4000},
        rounding="truncate",
    ),
    "edm_cifar10": _cifar(
        "edm_cifar10.py",
        "EDM table 2, unconditional, VP",
        1.97,
        sample={"sampler": "heun", "steps": 18},
        note="published is the least of three sets of 50,000",
    ),
    "ldm_table1_celebahq": _table_1(
        "ldm_celebahq256.py",
        "celeb_a_hq/256",
        *(200, 0.0, 5.11, 0.72, 0.49),
        note="the paper's text says 500 steps, its repository 200",
    ),
    "ldm_table1_ffhq": _table_1("ldm_ffhq256.py", "ffhq", 200, 1.0, 4.98, 0.73, 0.50),
    "ldm_table1_churches": _table_1(
        "ldm_lsun256.py:churches", "lsun/church_outdoor", 400, 0.0, 4.02, 0.64, 0.52
    ),
    "ldm_table1_bedrooms": _table_1(
        "ldm_lsun256.py:beds", "lsun/bedroom", 200, 1.0, 2.95, 0.66, 0.48
    ),
    "ldm_table3_imagenet_guided": _ldm(
        "ldm_imagenet256.py:f4",
        "3, LDM-4-G",
        "imagenet2012",
        (250, 1.0, 1.5),
        {"fid": 3.60, "inception_score": 247.67, "precision": 0.87, "recall": 0.48},
        metrics=(*FID_AND_IS, "precision_recall"),
        note="eta is not in the table; a user's check with 1 gave FID 3.54 and IS 249.59",
    ),
    "ldm_table3_imagenet": _ldm(
        "ldm_imagenet256.py:f4",
        "3, LDM-4",
        "imagenet2012",
        (250, 1.0, 1.0),
        {"fid": 10.56, "inception_score": 103.5},
        metrics=FID_AND_IS,
    ),
    "ldm_imagenet_8": _ldm(
        "ldm_imagenet256.py:f8",
        "(its README), LDM-8",
        "imagenet2012",
        (250, 1.0, 1.0),
        {"fid": 15.82, "inception_score": 78.8},
        metrics=FID_AND_IS,
        note="without guidance; LDM-8-G's 7.76 has a classifier of noised latents, scale 10, which "
        "was not published (configs/adm_classifier.py:fashion_latents trains a small one)",
    ),
    "ldm_table2_coco": _ldm(
        "ldm_text.py",
        "2, LDM-KL-8-G",
        "captioned_images",
        (250, 0.0, 1.5),
        {"fid": 12.63, "inception_score": 30.29},
        metrics=FID_AND_IS,
        num=30_000,
        split="validation",
        note="of MS-COCO, whose images and captions are the user's to prepare",
    ),
}


PRESETS |= {
    f"adm_imagenet{size}_guided": Preset(
        f"configs/adm_imagenet.py:{size}",
        "ADM of openai/guided-diffusion's README",
        "imagenet2012",
        size,
        ("fid", "precision_recall"),
        {
            "sampler": "ddpm",
            "steps": 250,
            "guidance_scale": 1.0,
            "classifier_scale": scale,
            "options": {"spacing": "linspace"},
        },
        {"fid": fid, "precision": precision, "recall": recall},
        rounding="truncate",
        note="with --guidance_classifier=DIR; theirs moves a step's mean, here x0 is moved; at 64 "
        "pixels the paper's table 5 has 2.07 for ADM with dropout and no classifier",
    )
    for size, scale, fid, precision, recall in (
        (64, 1.0, 2.07, 0.74, 0.63),
        (128, 0.5, 2.97, 0.78, 0.59),
        (256, 1.0, 4.59, 0.82, 0.52),
        (512, 4.0, 7.72, 0.87, 0.42),
    )
}


def find(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"--preset={name} is unknown: use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def check(name: str, preset: Preset, config: ConfigDict, directory: object) -> None:
    """Refuses a run of other data: `config` is that of the images."""
    for key, wanted in (("name", preset.data), ("image_size", preset.image_size)):
        if config.data[key] != wanted:
            raise ValueError(
                f"--preset={name} is of data.{key}={wanted!r}, but --workdir={directory} has "
                f"{config.data[key]!r}: name a run of {preset.config}"
            )


def beside(preset: Preset) -> dict[str, Any]:
    """What the results say of it."""
    published = {"row": preset.row, "config": preset.config, "numbers": preset.published}
    return {**published, **({"note": preset.note} if preset.note else {})}
