"""EDM's `.pkl` files to what a workdir is made of."""

import pathlib
from typing import Any

from diffusion.interop import edm
from diffusion.interop.scheduler import Scheduler
from diffusion.models.song import SongUNet
from experiments.convert.reading import Parts, finish, pipeline_config

# Its README's sampling, of CIFAR-10, of FFHQ and AFHQv2, and of ImageNet.
CHURN = {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}


def from_edm(source: pathlib.Path) -> Parts:
    """Reads one file. ValueError naming it for what is not EDM's, or does not fit."""
    module, params, found = edm.load_edm(source)
    said = {"sigma_min": 0.0, "sigma_max": float("inf"), "sigma_data": 0.5} | dict(found.settings)
    schedule = {
        "name": "edm",
        "sigma_min": max(0.002, said["sigma_min"]),
        "sigma_max": min(80.0, said["sigma_max"]),
        "sigma_data": said["sigma_data"],
    }
    side, song = said["img_resolution"], isinstance(module, SongUNet)
    options: dict[str, Any] = {} if song else CHURN
    described = Scheduler(schedule, "edm", "heun", options, clip=False)
    config = pipeline_config(module, None, described)
    config.model.denoiser.kind = "song_unet" if song else "unet"
    config.process.objective.weighting = "edm"
    config.data.update({"image_size": side, "channels": said["img_channels"]})
    config.conditioning.null_label = False  # every class is one of the data's
    steps = (18 if side < 64 else 40) if song else 256
    config.sample.update({"steps": steps, "batch_size": 64, "state": "float64"})
    return Parts(finish(config, params, source), {"denoiser": params})
