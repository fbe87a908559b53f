"""What the loop measures of a first stage beside the sums that its task takes itself.

eval_frechet_distance    of reconstructions and held-out images, on the features of the classifier
                         that `evaluation.classifier` names
eval_lpips               where `perceptual` names weights that the loss does not use

PSNR, SSIM, sharpness, the terms of the loss and the latents' moments are the task's `eval_step`.
"""

import functools
import pathlib
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from diffusion.training.parallel import to_host
from diffusion.training.state import TrainState
from experiments.evaluate import reconstructions
from experiments.evaluate.features import Judge
from experiments.host import cluster
from experiments.run import training

KEYS = ("frechet_distance", "lpips")


@functools.lru_cache(maxsize=1)
def classifier(directory: str, data: str) -> Judge:
    """`evaluation.classifier`. ValueError for no such run, and for one of other data."""
    judge = Judge(pathlib.Path(directory), flag="--config.evaluation.classifier")
    if judge.data != data:
        raise ValueError(
            f"--config.evaluation.classifier={directory} was trained on {judge.data!r}, but this "
            f"run is on {data!r}: name one of that"
        )
    return judge


def judge(config: ConfigDict) -> Judge | None:
    """The classifier; None where none is named. ValueError for one that does not fit."""
    named = config.evaluation.classifier
    if not named or config.task == "denoiser":  # whose samples `preview.py` judges
        return None
    if config.task != "autoencoder":
        raise ValueError(
            f"evaluation.classifier={named} is for tasks 'autoencoder' and 'denoiser', not "
            f"{config.task!r}: leave it empty"
        )
    return classifier(named, config.data.name)


def measure(run: training.Run, state: TrainState) -> dict[str, float]:
    """The numbers above, of the averaged weights; every process calls it, the first one counts."""
    config = run.config
    if config.task != "autoencoder":
        return {}
    unused = config.perceptual.vgg and config.perceptual.heads and not config.loss.perceptual_weight
    judged = judge(config)
    if judged is None and not unused:
        return {}
    params = to_host(state.inference_params["autoencoder"])
    if not cluster.is_first():
        return {}
    stage = reconstructions.Stage(config, run.task.network, params, 0, "")
    features = None if judged is None else lambda images: judged(images)[1]
    found = reconstructions.measure(stage, _images(run), features)
    keys = KEYS if unused else KEYS[:1]  # the task logs the LPIPS of its loss itself
    return {f"eval_{key}": found[key] for key in keys if key in found}


def _images(run: training.Run) -> Iterator[np.ndarray]:
    for batch in run.eval_batches():
        yield batch["image"][batch["valid"]]
