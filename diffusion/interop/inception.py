"""The weights of the FID Inception-v3: a file that the user names, a cached one, or a download.

pytorch-fid and torch-fidelity publish the same file under two names. It is TensorFlow's graph of
5 December 2015, converted; a distance on any other weights is not "FID", whatever the network.
"""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.files import whole
from diffusion.interop.files import to_params
from diffusion.interop.single_file import check_hash, read_file
from diffusion.models.inception import SIZE, Inception

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NAME = "weights-inception-2015-12-05-6726825d.pth"
URLS = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAME}",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
)
TIMEOUT_SECS = 20.0


def load_inception(path: str | os.PathLike, sha256: str = "") -> tuple[dict[str, Any], str]:
    """(parameters of `models.inception.Inception`, SHA-256 of the file).

    Read are `.pth` and `.safetensors` with torchvision's names. ValueError naming the file for
    another hash than `sha256`, or than the digits in its name, and for anything missing, broken or
    of another shape.
    """
    found = check_hash(path, sha256)
    # The last layer's bias has no part in any of the metrics; the counters none in the network.
    weights = read_file(path).without(r"num_batches_tracked$|^fc\.bias$|^AuxLogits\.")
    return to_params(weights, shapes(), ()), found


def shapes() -> Any:
    """The tree of Inception's parameters, as shapes."""
    image = jnp.zeros((1, SIZE, SIZE, 3))
    return jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]


def cache_directory() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/jax-diffusion, or ~/.cache/jax-diffusion."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jax-diffusion"


def published() -> Path:
    """The published file: the cached copy, or a download, its hash checked either way.

    ValueError where there is neither, naming file, hash and what to do.
    """
    path = cache_directory() / NAME
    if path.is_file():
        check_hash(path, SHA256)
        return path
    problems = []
    for url in URLS:
        try:
            return _download(url, path)
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            problems.append(str(getattr(error, "reason", error)))
    raise ValueError(
        f"the Inception weights {NAME} (SHA-256 {SHA256}) are neither in {path.parent} nor could "
        f"they be fetched from {URLS[0]} ({problems[0]}): fetch the file elsewhere and name it "
        "with --inception_weights=FILE"
    )


def _download(url: str, path: Path) -> Path:
    print(f"fetching {url}", flush=True)
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECS) as answer:
        data = answer.read()
    with whole(path) as partial:
        partial.write_bytes(data)
        check_hash(partial, SHA256)
    return path
