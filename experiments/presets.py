"""Named evaluations, one for each published number that a config claims, as data.

    python -m experiments.evaluate --workdir=DIR --preset=ldm_table1_celebahq

A preset sets metrics, number of samples, sampler, steps, guidance and rounding as the row had them,
refuses a run of other data, and puts the published number beside the measured one. Sources:
DDPM https://arxiv.org/abs/2006.11239; LDM https://arxiv.org/abs/2112.10752 and its README (numbers
of steps, eta); Improved DDPM https://arxiv.org/abs/2102.09672; EDM https://arxiv.org/abs/2206.00364;
rectified flow https://arxiv.org/abs/2209.03003.

`scripts/sample_diffusion.py` of CompVis cuts pixels off to 8 bits; the others' rounding is to
nearest here.
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
    weights: str = "ema"
    note: str = ""


def _ddim(steps: int, eta: float, scale: float = 1.0) -> dict[str, Any]:
    return {
        "sampler": "ddim",
        "steps": steps,
        "guidance_scale": scale,
        "options": {"spacing": "leading", "steps_offset": 1, "eta": eta},
    }


def _ldm(config: str, row: str, data: str, sample: dict, published: dict, **more: Any) -> Preset:
    metrics = more.pop("metrics", ("fid", "precision_recall"))
    return Preset(
        config, row, data, 256, metrics, sample, published, rounding="truncate", **more
    )


def _ddpm(config: str, row: str, data: str, size: int, published: dict, **more: Any) -> Preset:
    sample = {"sampler": "ddpm", "steps": 1000, "guidance_scale": 1.0}
    metrics = more.pop("metrics", ("fid",))
    return Preset(config, row, data, size, metrics, sample, published, **more)


PRESETS: dict[str, Preset] = {}
