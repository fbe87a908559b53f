"""What samples are compared with: statistics of real images, and what they are statistics of.

A reference file is an .npz that this module writes, or a public one:

    ours             mu, sigma, count, vectors (the first 10,000), identity (JSON): data set, split,
                     preprocessing, feature network and its hash, version of the code; with sFID's
                     mu_s, sigma_s
    pytorch-fid's    mu, sigma; of the Inception's 2,048 features, of images that it does not name
    guided-diffusion arr_0, images to be seen again, and mu, sigma, mu_s, sigma_s of the whole set

Ours is made of the very arrays that training reads (`run/data.py`, the loader, the config's
crop and padding), so that one image cannot be prepared in two ways. Whatever the file says of
itself and the evaluation contradicts is refused; what a public file leaves open is named in the
results.
"""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import subprocess
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import files
from diffusion.data import loader
from diffusion.metrics.frechet import FeatureStatistics, empty_statistics
from diffusion.wording import Progress
from experiments.evaluate import sample_sets, stream
from experiments.evaluate.features import FeatureNetwork
from experiments.host import cluster
from experiments.run import data, fits

UNSEEN_EPOCH = 10**6
VECTORS = 10_000  # kept for distances between single vectors: as many as guided-diffusion's
BATCH = 250
SUFFIX = {"pool": "", "spatial": "_s"}
ROOT = pathlib.Path(__file__).parents[2]


class Against(NamedTuple):
    """What is to be compared with: `path`, which is made where it is missing (None: made and not
    kept), of the first `num` images (0: of all) of `split`."""

    path: pathlib.Path | None = None
    split: str = "train"
    num: int = 0


@dataclasses.dataclass(frozen=True)
class Reference:
    """statistics: by "pool" and "spatial". vectors: some of "pool"; None: there are none.

    identity: what the results say of it. open: what a public file does not say of itself.
    """

    statistics: dict[str, FeatureStatistics]
    vectors: np.ndarray | None
    count: int | None
    identity: dict[str, Any]
    open: tuple[str, ...] = ()

    def of(self, key: str) -> FeatureStatistics:
        if key not in self.statistics:
            raise ValueError(
                f"--reference={self.identity.get('file')} has no mu_s and sigma_s, which sfid "
                "compares: make one with --metrics=sfid"
            )
        return self.statistics[key]

    def points(self) -> np.ndarray:
        if self.vectors is None:
            raise ValueError(
                f"--reference={self.identity.get('file')} holds mu and sigma alone, and kernel "
                "distance, precision and recall compare vectors: give one with images (arr_0), or "
                "one that --reference made"
            )
        return self.vectors


# -- the data of a run ---------------------------------------------------------------------------


def preprocessing(config: ConfigDict) -> dict[str, Any]:
    """How a run's images are prepared."""
    section = config.data
    size = section.image_size
    size = size if isinstance(size, int) else list(size)
    told = {"image_size": size, "channels": section.channels, "fit": section.fit}
    return told | fits.changed(fits.centred(config))


def data_identity(config: ConfigDict, split: str) -> dict[str, Any]:
    return {"data": config.data.name, "split": split, "preprocessing": preprocessing(config)}


def fetch(source: Any, steps: list, index: np.ndarray) -> np.ndarray:
    """Images in compositions that no training run reads."""
    epoch = np.full_like(index, UNSEEN_EPOCH)
    return loader.fetch(source, index, epoch, index, steps)["image"]


def unseen(config: ConfigDict, split: str, num: int = 0) -> np.ndarray:
    """The first `num` images of the data set, or all."""
    source, steps = data.open_images(fits.centred(config), split)
    return fetch(source, steps, np.arange(min(num or len(source), len(source))))


def images(config: ConfigDict, split: str, num: int = 0) -> tuple[int, str, stream.Stream]:
    """(count, hash of the data, this process's rows) of the first `num` images; 0: of all."""
    source, steps = data.open_images(fits.centred(config), split)
    count = min(num or len(source), len(source))

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        every = range(0, count, BATCH)
        for first in every:
            own = np.arange(first, min(first + BATCH, count))
            own = own[jax.process_index() :: jax.process_count()]
            if len(own):
                yield own, fetch(source, steps, own)

    return count, str(source.provenance.get("sha256", "unknown")), rows()


def of_data(
    config: ConfigDict, split: str, network: FeatureNetwork, num: int = 0, spatial: bool = False
) -> Reference:
    """Streamed: no more than a batch of images, and `VECTORS` vectors, are held."""
    count, sha256, rows = images(config, split, num)
    keys = ("pool", "spatial") if spatial else ("pool",)
    found: dict[str, FeatureStatistics] = {}
    index, vectors = [np.zeros(0, np.int64)], [np.zeros((0, network.dim), np.float32)]
    progress = Progress("reference", count, silent=not cluster.is_first())
    for place, pixels in rows:
        made = network.run(pixels)
        progress.at(int(place[-1]) + 1)
        for key in keys:
            start = found.get(key) or empty_statistics(made[key].shape[1])
            found[key] = start.update(made[key])
        kept = place < VECTORS
        index.append(place[kept])
        vectors.append(made["pool"][kept])
    progress.close()
    found = {key: stream.gather_statistics(value) for key, value in found.items()}
    order = np.argsort(stream.gather(np.concatenate(index)))
    identity = {
        **data_identity(config, split),
        "count": count,
        "data_sha256": sha256,
        "features": network.identity(),
        "version": code_version(),
    }
    return Reference(found, stream.gather(np.concatenate(vectors))[order], count, identity)


@functools.cache
def code_version() -> str:
    """The commit of this checkout, "+changes" where files differ from it; else "unknown"."""

    def git(*argv: str) -> str:
        done = subprocess.run(
            ["git", *argv], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {**{name: importlib.metadata.version(name) for name in names}, "code": code_version()}


# -- files ---------------------------------------------------------------------------------------


def write(path: pathlib.Path, reference: Reference) -> None:
    """Whole or not at all; by process 0."""
    if not cluster.is_first():
        return
    arrays: dict[str, Any] = {"identity": json.dumps(reference.identity), "count": reference.count}
    for key, found in reference.statistics.items():
        arrays[f"mu{SUFFIX[key]}"], arrays[f"sigma{SUFFIX[key]}"] = found.mean, found.covariance
    if reference.vectors is not None:
        arrays["vectors"] = reference.vectors
    files.write_arrays(path, **arrays)


def read(
    path: pathlib.Path,
    network: FeatureNetwork,
    expected: dict[str, Any],
    shape: tuple[int, ...] | None = None,
    seen: bool = False,
) -> Reference:
    """A reference file of any of the three kinds, checked against `network` and what is `expected`.

    expected: `data_identity` of the run, or {} where there is none. shape: of the samples, (height,
    width, channels), where known. seen: vectors are wanted, so that arr_0 goes through the network.
    ValueError naming what differs.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            names = set(file.files)
            small = names - {"arr_0", "images"}
            arrays = {name: file[name] for name in small}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise ValueError(f"--reference={path} is truncated or no .npz: make it again") from error
    sha256 = files.hash_file(path)[:16]
    if "identity" in arrays:
        return _ours(path, arrays, network, expected, shape, sha256)
    return _public(path, names, arrays, network, shape, seen, sha256)


def _ours(path, arrays, network, expected, shape, sha256) -> Reference:
    try:
        identity, count = json.loads(str(arrays["identity"])), int(arrays["count"])
        size = identity["preprocessing"]["image_size"]
    except (ValueError, KeyError, TypeError) as error:
        what = f"--reference={path} does not say what it is of ({error!r})"
        raise ValueError(f"{what}: make it again") from error
    wanted = {**expected, "features": network.identity()}
    found = {key: value for key, value in identity.items() if key in wanted}
    remedy = "name another file, and it will be made"
    files.check_same(found, wanted, f"--reference={path}", remedy)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if shape is not None and shape[:2] != sides[-2:]:
        _resolution(path, sides, shape)
    statistics = _statistics(path, arrays, count)
    made_from = {**identity, "file": path.name, "sha256": sha256}
    return Reference(statistics, arrays.get("vectors"), count, made_from)


def _resolution(path: pathlib.Path, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    raise ValueError(
        f"--reference={path} is of images of {tuple(found)} pixels, the samples are {shape[:2]}: "
        "compare images of one size"
    )


def _statistics(path, arrays, count: int | None) -> dict[str, FeatureStatistics]:
    found = {}
    for key, suffix in SUFFIX.items():
        if f"mu{suffix}" in arrays and f"sigma{suffix}" in arrays:
            mean, covariance = (
                np.asarray(arrays[f"{name}{suffix}"], np.float64) for name in ("mu", "sigma")
            )
            if covariance.shape != (mean.size, mean.size):
                raise ValueError(
                    f"--reference={path}: sigma{suffix} is {list(covariance.shape)} for "
                    f"{mean.size} means: make it again"
                )
            n = count or 2  # the count of a public file is not known, and not used
            found[key] = FeatureStatistics(n, mean, covariance * (n - 1))
    return found


def _public(path, names, arrays, network, shape, seen, sha256) -> Reference:
    if not names & {"mu", "arr_0"}:
        raise ValueError(
            f"--reference={path} has the arrays {', '.join(sorted(names))}: a reference has mu and "
            "sigma, or images as arr_0"
        )
    statistics, vectors = _statistics(path, arrays, None), None
    if "pool" in statistics and statistics["pool"].mean.size != network.dim:
        raise ValueError(
            f"--reference={path} is of {statistics['pool'].mean.size} features, the network "
            f"{network.name} has {network.dim}: use --features=inception, or another reference"
        )
    unknown = ["data", "preprocessing", "features"]
    if "arr_0" in names:
        found = sample_sets.open_npz(path, "--reference")
        if shape is not None and found.shape[:2] != tuple(shape[:2]):
            _resolution(path, found.shape[:2], shape)
        if seen or not statistics:
            rows = stream.through(
                stream.split(found.batches()), {"f": lambda x, _: network.run(x)}
            )["f"]
            vectors = rows["pool"]
            if not statistics:
                keys = [key for key in SUFFIX if key in rows]
                statistics = {key: stream.statistics(rows[key]) for key in keys}
                unknown.remove("features")
    identity = {"file": path.name, "sha256": sha256, "unchecked": unknown}
    print(f"note: --reference={path} does not say its {', '.join(unknown)}", flush=True)
    return Reference(statistics, vectors, None, identity, tuple(unknown))
