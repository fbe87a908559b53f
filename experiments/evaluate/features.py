"""Feature networks of an evaluation: uint8 images to vectors, and what tells one from another.

inception    the FID Inception-v3 (diffusion/models/inception.py): "pool", "spatial", "logits"
classifier   the run of a classifier on the same data: "pool", its penultimate features; "logits"
clip         CLIP's image tower (diffusion/models/clip.py): "pool", its vectors

A number has the name that the field knows ("fid", "kid", ...) on the published Inception weights
alone, brought there as torch-fidelity does. On any other network, weights or preprocessing it is a
"frechet_distance", "kernel_distance" and so on, with the network's hash beside it.

One evaluation's networks stand in `Tools`; each is opened when it is first asked for.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion import files
from diffusion.checkpoint import restore_params
from diffusion.data.builders.captioned_digits import compose
from diffusion.interop import inception as published
from diffusion.interop.clip import Clip, load_clip
from diffusion.metrics import adherence as adherence_metric
from diffusion.metrics.clip_score import scores
from diffusion.models import clip as clip_model
from diffusion.models.inception import PREPROCESSINGS, Inception, preprocess
from diffusion.training import codec
from experiments.run import tasks, workdir

Rows = dict[str, np.ndarray]  # arrays with a leading axis of images
# metric: its name on the published Inception
NAMES = {
    "frechet_distance": "fid",
    "spatial_frechet_distance": "sfid",
    "kernel_distance": "kid",
    "classifier_score": "inception_score",
}


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """`run(images)`: uint8 (n, height, width, channels) to vectors by name, for any n.

    dim: of "pool". keys: what `run` gives. public: the published Inception as torch-fidelity has
    it.
    """

    name: str
    sha256: str
    preprocessing: str
    dim: int
    keys: tuple[str, ...]
    run: Callable[[np.ndarray], Rows]
    public: bool = False

    def identity(self) -> dict[str, Any]:
        """What vectors must share to be compared."""
        return {"network": self.name, "sha256": self.sha256, "preprocessing": self.preprocessing}

    def key(self, metric: str) -> str:
        """The name that a number has in the results."""
        return NAMES[metric] if self.public else metric


def batched(run: Callable[[jax.Array], Any], params: Any, batch: int) -> Callable[..., Rows]:
    """`run(params, images)` jitted, over this process's devices, in batches padded to one size."""
    devices = [d for d in jax.devices() if d.process_index == jax.process_index()]
    mesh = Mesh(np.array(devices), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    compiled, batch = jax.jit(run), -(-batch // len(devices)) * len(devices)

    def call(images: np.ndarray) -> Rows:
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            found = compiled(params, jax.device_put(padded, rows))
            parts.append({k: np.asarray(v)[: len(part)] for k, v in found.items()})
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    return call


def inception(
    weights: str | None = None, preprocessing: str = PREPROCESSINGS[0], batch: int = 50
) -> FeatureNetwork:
    """On a file of weights, or the published one. ValueError where neither is to be had."""
    params, sha256 = published.load_inception(weights or published.published())

    def run(params, images):
        return Inception().apply({"params": params}, preprocess(images, preprocessing))

    public = sha256 == published.SHA256 and preprocessing == PREPROCESSINGS[0]
    keys = ("pool", "spatial", "logits")
    call = batched(run, params, batch)
    return FeatureNetwork("inception", sha256, preprocessing, 2048, keys, call, public)


class Judge:
    """A trained classifier: labels and features of uint8 images."""

    def __init__(self, directory: pathlib.Path, batch: int = 250, flag: str = "--classifier"):
        config = workdir.read_config(directory, flag)
        if config.task != "classifier" or config.model.classifier.kind != "digits":
            kind = "" if config.task != "classifier" else f" of {config.model.classifier.kind}"
            raise ValueError(
                f"{flag}={directory} holds a run with task={config.task!r}{kind}: name one of "
                "configs/digits_classifier.py"
            )
        self.data = config.data.name
        saved = restore_params(directory / "checkpoints", ("params", "ema"))
        params = {**saved.items["params"], **saved.items["ema"]}["classifier"]
        network = tasks.task(config).network
        self.hash, self.dim = saved.hash, network.feature_dim

        def run(params, image):
            x, variables = codec.signed(image), {"params": params}
            features = network.apply(variables, x, method="features")
            return {"pool": features, "logits": network.apply(variables, x)}

        self.rows = batched(run, params, batch)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.rows(images)
        return found["logits"].argmax(-1).astype(np.int32), found["pool"]

    def network(self) -> FeatureNetwork:
        keys = ("pool", "logits")
        return FeatureNetwork("classifier", self.hash, "x/127.5 - 1", self.dim, keys, self.rows)


class ClipScorer:
    """CLIP from a Transformers directory: vectors of images, and scores of images and captions."""

    def __init__(self, directory: str, batch: int = 64):
        from diffusion.data import tokenizer_files

        self.clip: Clip = load_clip(directory)
        self.tokenizer = tokenizer_files.load(directory)
        paths = sorted(pathlib.Path(directory).glob("model*.safetensors"))
        hashes = {path.name: files.hash_file(path) for path in paths}
        self.hash = hashes[paths[0].name] if len(paths) == 1 else files.digest(hashes)
        clip = self.clip

        def see(params, x):
            return {"pool": clip.image.apply({"params": params}, x)}

        def read(params, tokens):
            hidden = clip.text.apply({"params": params["text"]}, tokens)
            found = clip_model.pool_text(hidden, tokens, params["text_projection"], clip.end)
            return {"text": found}

        self._see = batched(see, clip.params["image"], batch)
        kept = {key: clip.params[key] for key in ("text", "text_projection")}
        self._read = batched(read, kept, batch)

    def images(self, images: np.ndarray) -> Rows:
        size = self.clip.image.image_size
        return self._see(clip_model.preprocess(images, size, self.clip.mean, self.clip.std))

    def scores(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        tokens = self.tokenizer.encode(captions, self.clip.text.max_length)
        return scores(self.images(images)["pool"], self._read(tokens)["text"])

    def network(self) -> FeatureNetwork:
        dim, how = self.clip.image.projection, f"bicubic to {self.clip.image.image_size}, centre"
        return FeatureNetwork("clip", self.hash, how, dim, ("pool",), self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Tools:
    """features: "inception", "classifier" or "clip"; None: the classifier where there is one, else
    Inception."""

    classifier: pathlib.Path | None = None
    features: str | None = None
    inception_weights: str | None = None
    preprocessing: str = PREPROCESSINGS[0]
    clip_directory: str | None = None
    feature_batch: int = 50

    @functools.cached_property
    def judge(self) -> Judge:
        if self.classifier is None:
            raise ValueError(
                "--classifier is missing: adherence and frechet_distance need the run of "
                "configs/digits_classifier.py, or of another classifier of the same data"
            )
        return Judge(self.classifier)

    @functools.cached_property
    def clip(self) -> ClipScorer:
        if not self.clip_directory:
            raise ValueError("--clip is missing: name a Transformers directory of a CLIPModel")
        return ClipScorer(self.clip_directory)

    @property
    def chosen(self) -> bool:
        """Whether a feature network was named."""
        return bool(self.classifier or self.features)

    @property
    def feature_name(self) -> str:
        return self.features or ("classifier" if self.classifier else "inception")

    @functools.cached_property
    def network(self) -> FeatureNetwork:
        if self.feature_name == "classifier":
            return self.judge.network()
        if self.feature_name == "clip":
            return self.clip.network()
        return inception(self.inception_weights, self.preprocessing, self.feature_batch)


def attributes(
    images: np.ndarray, judge: Judge, colours: Mapping[str, Sequence[float]] = compose.COLOURS
) -> dict[str, np.ndarray]:
    """Every attribute of each image, as positions in the tables of `compose`."""
    large = np.array(compose.OFFSETS["large"]) + compose.SIZES["large"] / 2
    # The larger digit's centres: the smaller one's lie further out, nearer to no other place.
    places = {
        name: tuple(large[list(place)] / compose.CANVAS) for name, place in compose.PLACES.items()
    }
    found = adherence_metric.measure(
        images, colours=colours, backgrounds=compose.BACKGROUNDS, places=places, sizes=compose.SIZES
    )
    return {**found, "digit": judge(images)[0]}
