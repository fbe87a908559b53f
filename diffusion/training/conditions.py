"""What a denoiser is told besides x_t and t: a caption, a class, control pictures, other channels.

A condition makes columns of a batch into arguments of the network, and knows the columns that say
nothing: the empty caption, the null class. Training puts these in place of some of a batch's own;
guidance wants both (classifier-free guidance, arXiv:2207.12598, algorithms 1 and 2).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from diffusion.training import codec

Batch = Mapping[str, Array]
Given = dict[str, Any]  # arguments of the network, by name
Params = dict[str, Any]


@runtime_checkable
class Condition(Protocol):
    """Holds no arrays; `params` has every network's by name."""

    def init(self, key: Key[Array, ""]) -> tuple[Given, Params]:
        """What the network is given of one example, and fresh parameters of the condition's own."""
        ...

    def encode(self, params: Params, batch: Batch, keys: Key[Array, " batch"] | None) -> Given:
        """What the network is given; `keys` draw the dropout, None: none."""
        ...

    def null(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Columns as long as the batch's that say nothing; none for what is always told."""
        ...


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens to the context that tau_theta, the text encoder, makes of them, and its mask if
    padding is to be hidden. A column "context", stored outputs of a frozen text encoder, is taken
    as it is. null_tokens: the encoded empty caption; a column "negative" has others in its place.
    """

    encoder: Any
    null_tokens: tuple[int, ...]
    mask_padding: bool = False
    labels: int = 0  # of boxes, which the tokens are of (`data/layouts.py`); 0: captions

    def init(self, key):
        tokens = jnp.zeros((1, len(self.null_tokens)), jnp.int32)
        context, variables = self.encoder.init_with_output(key, tokens)
        return {"context": context}, {"text_encoder": variables["params"]}

    def encode(self, params, batch, keys=None):
        tokens = batch["tokens"]
        mask = tokens != 0 if self.mask_padding else None
        context = batch.get("context")
        if context is None:
            variables = {"params": params["text_encoder"]}
            context = self.encoder.apply(variables, tokens, mask=mask, keys=keys)
        return {"context": context} | ({} if mask is None else {"context_mask": mask})

    def null(self, params, batch):
        empty = jnp.asarray(self.null_tokens, batch["tokens"].dtype)[None]
        found = {"tokens": jnp.broadcast_to(empty, batch["tokens"].shape)}
        if "context" in batch:
            context, stored = self.encode(params, {"tokens": empty})["context"], batch["context"]
            found["context"] = jnp.broadcast_to(context.astype(stored.dtype), stored.shape)
        return found | ({"tokens": batch["negative"]} if "negative" in batch else {})


@dataclasses.dataclass(frozen=True)
class Label:
    """A class as it is, or as the context that `embedder` makes of it (LDM on ImageNet)."""

    null_label: int  # a class more than the data has
    embedder: Any = None
    has_null: bool = True  # False: no such class was trained, and null_label is none

    def init(self, key):
        label = jnp.zeros((1,), jnp.int32)
        if self.embedder is None:
            return {"labels": label}, {}
        context, variables = self.embedder.init_with_output(jax.random.fold_in(key, 1), label)
        return {"context": context}, {"class_embedder": variables["params"]}

    def encode(self, params, batch, keys=None):
        if self.embedder is None:
            return {"labels": batch["label"]}
        variables = {"params": params["class_embedder"]}
        return {"context": self.embedder.apply(variables, batch["label"])}

    def null(self, params, batch):
        if not self.has_null:
            return {}
        return {"label": jnp.full_like(batch["label"], self.null_label)}


@dataclasses.dataclass(frozen=True)
class Augmented:
    """A column "augment", how a picture was augmented (`augment.py`); without it: not at all."""

    numbers: int

    def init(self, key):
        return {"augment": jnp.zeros((1, self.numbers))}, {}

    def encode(self, params, batch, keys=None):
        return {"augment": batch["augment"]} if "augment" in batch else {}

    def null(self, params, batch):
        return {}


@dataclasses.dataclass(frozen=True)
class Hints:
    """Columns "hint", or "hint_0", "hint_1", ..., uint8, to pictures in [0, 1], one a ControlNet,
    and their weights "hint_scale_0", ... Their networks are the denoiser's (`denoiser.py`).
    """

    def init(self, key):
        return {}, {}

    def encode(self, params, batch, keys=None):
        names = sorted(name for name in batch if name[:5] == "hint_" and name[5:].isdigit())
        if not names:
            return {"hints": (_unit(batch["hint"]),)} if "hint" in batch else {}
        scales = tuple(batch[f"hint_scale_{name[5:]}"] for name in names)
        return {"hints": tuple(_unit(batch[name]) for name in names), "hint_scales": scales}

    def null(self, params, batch):
        return {}


@dataclasses.dataclass(frozen=True)
class Past:
    """A column "past" (batch, k length, channels), what came before the window, as channels that
    join x_t's: at each place the values of that place k windows ago, .. , one window ago.
    length: of a window. channels: that join.
    """

    length: int
    channels: int
    kind: ClassVar[str] = "past"

    def init(self, key):
        return {"concat": jnp.zeros((1, self.length, self.channels))}, {}

    def encode(self, params, batch, keys=None):
        past = batch["past"].reshape(len(batch["past"]), -1, self.length, batch["past"].shape[2])
        return {"concat": jnp.moveaxis(past, 1, 2).reshape(len(past), self.length, -1)}

    def null(self, params, batch):
        return {}


@dataclasses.dataclass(frozen=True)
class Concat:
    """What joins x_t's channels: always told, never dropped.

        "low_resolution"  "small", uint8, in [-1, 1], enlarged `factor` times to x_t's size, by
                          bicubic or, as ADM's, linear `enlarge` (LDM, arXiv:2112.10752, section
                          4.4; SR3, arXiv:2104.07636)
        "inpaint"         [mask in {0, 1}, latents of the image with a grey hole]: Stable Diffusion
        "inpaint_ldm"     [latents of the image with a black hole, mask in {-1, 1}]: CompVis's
                          inpainting_big (CompVis/latent-diffusion: scripts/inpaint.py)
        "edit"            latents of the image, unscaled: InstructPix2Pix (arXiv:2211.09800)
        "semantic"        what `rescaler`, trained with the denoiser, makes of labels "segments"

    "mask" is 1 where the image is to be made. shape: (*space, channels) of what joins, as trained.
    """

    kind: str
    shape: tuple[int, ...]
    factor: int = 1
    rescaler: Any = None
    enlarge: str = "cubic"

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns of a batch."""
        kinds = {"low_resolution": ("small",), "semantic": ("segments",), "edit": ("image",)}
        return kinds.get(self.kind, ("image", "mask", "masked"))

    def init(self, key):
        given = {"concat": jnp.zeros((1, *self.shape))}
        if self.rescaler is None:
            return given, {}
        sides = (side * 2**self.rescaler.halvings for side in self.shape[:-1])
        return given, {"rescaler": self.rescaler.init(key, jnp.zeros((1, *sides), int))["params"]}

    def ready(self, batch: Batch, encode: Callable, extra: Mapping[str, Any]) -> Batch:
        """The batch with "masked", latents of what is left of "image": `encode` of [-1, 1], or
        those that are stored, scaled as `extra` says."""
        if self.kind == "edit":
            z = encode(codec.signed(batch["image"]))
            return {**batch, "masked": codec.unscaled(z, extra)}
        if self.kind not in ("inpaint", "inpaint_ldm"):
            return batch
        if "masked" in batch:
            return {**batch, "masked": codec.scaled(batch["masked"], extra)}
        hole = 0.0 if self.kind == "inpaint" else -1.0
        left = jnp.where(batch["mask"] > 0, hole, codec.signed(batch["image"]))
        return {**batch, "masked": encode(left)}

    def encode(self, params, batch, keys=None):
        if self.kind == "semantic":
            segments = batch["segments"].astype(jnp.int32)
            return {"concat": self.rescaler.apply({"params": params["rescaler"]}, segments)}
        if self.kind == "low_resolution":
            small = codec.signed(batch["small"])
            space = [side * self.factor for side in small.shape[1:-1]]
            shape = (len(small), *space, small.shape[-1])
            large = jax.image.resize(small, shape, self.enlarge) if self.factor > 1 else small
            return {"concat": large}
        masked = batch["masked"]
        if self.kind == "edit":
            return {"concat": masked}
        step = batch["mask"].shape[1] // masked.shape[1]
        mask = batch["mask"][:, ::step, ::step].astype(masked.dtype)  # the nearest, as the authors'
        parts = [mask, masked] if self.kind == "inpaint" else [masked, 2 * mask - 1]
        return {"concat": jnp.concatenate(parts, axis=-1)}

    def null(self, params, batch):
        """Always told, but by "edit"."""
        return {"masked": jnp.zeros_like(batch["masked"])} if self.kind == "edit" else {}


def null(conditions: Mapping[str, Condition], params: Params, batch: Batch) -> dict[str, Array]:
    """The columns of every condition that say nothing."""
    return {k: v for c in conditions.values() for k, v in c.null(params, batch).items()}


def ready(
    conditions: Mapping[str, Condition], batch: Batch, encode: Callable, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The batch with what the other channels are made of (`Concat.ready`)."""
    concat: Any = conditions.get("concat")
    return dict(batch if concat is None else concat.ready(batch, encode, extra))


def drop(
    conditions: Mapping[str, Condition], params: Params, batch: Batch, which: Bool[Array, " batch"]
) -> dict[str, Array]:
    """The batch, with columns that say nothing for the examples `which`."""
    found = dict(batch)
    for name, empty in null(conditions, params, batch).items():
        rows = which.reshape(-1, *[1] * (empty.ndim - 1))
        found[name] = jnp.where(rows, empty, found[name])
    return found


def encode(
    conditions: Mapping[str, Condition],
    params: Params,
    batch: Batch,
    keys: Key[Array, " batch"] | None = None,
) -> Given:
    """What the network is given by all of them."""
    found: Given = {}
    for condition in conditions.values():
        found |= condition.encode(params, batch, keys)
    return found


def _unit(image: Array) -> Array:
    return image.astype(jnp.float32) / 255
