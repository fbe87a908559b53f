"""LPIPS's weights: VGG-16 as torchvision publishes it, and the heads of the `lpips` package.

    vgg     https://download.pytorch.org/models/vgg16-397923af.pth
    heads   lpips/weights/v0.1/vgg.pth of https://github.com/richzhang/PerceptualSimilarity

Both may be `.safetensors` of the same names too. VGG's classifier is left out.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.interop.files import Rules, Weights, to_params
from diffusion.interop.single_file import check_hash, read_file
from diffusion.models.perceptual import LPIPS, MIN_SIZE

SOURCES = (
    "https://download.pytorch.org/models/vgg16-397923af.pth and lpips/weights/v0.1/vgg.pth of "
    "https://github.com/richzhang/PerceptualSimilarity"
)
# Where torchvision's `features` has its convolutions; activations and pooling stand between.
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
RULES: Rules = (
    *((rf"/conv_{i}/", f"/features/{place}/") for i, place in enumerate(PLACES)),
    (r"/head_(\d)/", r"/lin\1/model/1/"),
)


def load_lpips(
    vgg: str | os.PathLike, heads: str | os.PathLike, vgg_sha256: str = "", heads_sha256: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """(parameters of `models.perceptual.LPIPS`, SHA-256 by file).

    ValueError naming the file for another hash than is expected (`check_hash`), and for anything
    missing, broken or of another shape.
    """
    hashes = {"vgg": check_hash(vgg, vgg_sha256), "heads": check_hash(heads, heads_sha256)}
    parts = [read_file(vgg).without(r"^classifier\."), read_file(heads)]
    both = Weights(
        {**parts[0].tensors, **parts[1].tensors},
        {**parts[0].files, **parts[1].files},
        parts[0].directory,
    )
    return to_params(both, shapes(), RULES), hashes


def shapes() -> Any:
    """The tree of LPIPS's parameters, as shapes."""
    image = jnp.zeros((1, MIN_SIZE, MIN_SIZE, 3))
    return jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]
