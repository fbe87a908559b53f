"""Pictures of prompts: networks, settings and a first stage as one compiled function.

Example i of a run of samples is a function of (seed, i) and its own columns alone: its noise is
keyed by fold_in(key(seed), i), so neither batch size nor device count changes it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.data.tokenizers import Tokenizer
from diffusion.models import target
from diffusion.models.second_time import told_guidance
from diffusion.process import keys as ks
from diffusion.process import samplers
from diffusion.process.gaussian import Denoise
from diffusion.sampling import inputs
from diffusion.sampling.inputs import Columns
from diffusion.sampling.precision import in_float32, with_float64
from diffusion.sampling.settings import Settings
from diffusion.training import codec, conditions
from diffusion.training.denoiser import Denoiser
from diffusion.training.parallel import BATCH, make_mesh, to_host
from diffusion.training.sized_text import SizedText


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A denoiser with all it needs to make pictures. `params` holds every network, by name.

    extra: the latents' shift and scale. batch_size: pictures at a time. guide: a worse model, which
    guidance leads away from (`sampling/guide.py`); its networks are params["guide"]. classifier: of
    noised pictures, whose gradient guides (`guidance.by_classifier`).
    """

    task: Denoiser
    how: Settings
    params: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_stage: Any = None
    tokenizer: Tokenizer | None = None
    batch_size: int = 64
    guide: "Pipeline | None" = None
    classifier: Any = None

    @property
    def downsampling(self) -> int:
        return 1 if self.first_stage is None else self.first_stage.downsampling

    @property
    def slots(self) -> inputs.Slots:
        """What it takes besides prompts."""
        space = self.task.sample_shape[:-1]
        pixels = tuple(side * self.downsampling for side in space)
        channels = self.task.sample_shape[-1] if self.first_stage is None else 3
        controls, past = len(self.task.controlnets), self.task.conditions.get("past")
        joined = self.concat or past
        return inputs.Slots(joined, space, pixels, controls, channels, self.layout)

    @property
    def layout(self) -> tuple[int, int, int] | None:
        """Tokens, words and labels of boxes, where it reads some."""
        text: Any = self.task.conditions.get("text")
        if text is None or not text.labels:
            return None
        return len(text.null_tokens), text.encoder.vocab_size, text.labels

    @property
    def concat(self) -> Any:
        """What joins x_t's channels: a `conditions.Concat`, or None."""
        return self.task.conditions.get("concat")

    @property
    def edits(self) -> bool:
        """Whether it is InstructPix2Pix's kind, guided by image and text apart."""
        return self.concat is not None and self.concat.kind == "edit"

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns of a data set's batch that it is given, beside prompts and labels."""
        boxes = ("tokens",) if self.layout else ()
        return boxes if self.concat is None else (*boxes, *self.concat.reads)

    def changed(self, **given: Any) -> "Pipeline":
        """With other settings; those that are None stay."""
        own = given.get("image_guidance_scale")
        if own is not None and not self.edits:
            raise ValueError(
                f"image_guidance_scale={own}, but the model edits no images: leave it out"
            )
        return dataclasses.replace(self, how=self.how.changed(**given))

    def resized(self, size: Sequence[int]) -> "Pipeline":
        """For pictures of (height, width) pixels. ValueError where the networks refuse."""
        multiple = self.downsampling * self.task.network.size_multiple
        if self.classifier is not None:
            raise ValueError("size is the classifier's own with guidance_classifier: leave it out")
        if len(size) != 2 or any(side < 1 or side % multiple for side in size):
            raise ValueError(
                f"size={','.join(map(str, size))} must be height,width in multiples of {multiple}, "
                "since the networks halve them so often"
            )
        space = [side // self.downsampling for side in size]
        told, text = dict(self.task.conditions), self.task.conditions.get("text")
        if isinstance(text, SizedText):
            told["text"] = dataclasses.replace(text, size=tuple(size))
        shape = (*space, self.task.sample_shape[-1])
        task = dataclasses.replace(self.task, sample_shape=shape, conditions=told)
        return dataclasses.replace(self, task=task)

    # -- what is asked for -----------------------------------------------------------------------

    def tokens(self, prompts: Sequence[str] | None, name: str = "prompt") -> np.ndarray | None:
        """Prompts to tokens; None for a model that reads none. What it cannot read, it says.

        Raises ValueError for prompts the model cannot use, and for an empty list.
        """
        text: Any = self.task.conditions.get("text")
        if self.tokenizer is None or text is None:
            if prompts:
                raise ValueError(
                    f"{name}={prompts[0]!r} was given, but the model reads no captions: leave it "
                    "out, or use a run of a text-conditional config"
                )
            return None
        prompts = [""] if prompts is None else list(prompts)
        if not prompts:
            raise ValueError("the list of prompts is empty: give --prompt=... or a file of lines")
        if unknown := self.tokenizer.unknown(prompts):
            print(f"note: words the tokenizer does not know: {', '.join(unknown[:10])}", flush=True)
        tokens, cut = self.tokenizer.encode_and_mark(prompts, len(text.null_tokens))
        if cut.any():
            note = f"note: {int(cut.sum())} prompts were longer than the text encoder reads"
            print(note, flush=True)
        return tokens

    def columns(
        self,
        prompts: Sequence[str] | None = None,
        negative: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        sizes: Mapping[str, Sequence[int]] | None = None,
    ) -> Columns:
        """Columns of any length, in turn: row i % n for picture i. Each class in turn where none is
        named. sizes: of what Stable Diffusion XL is told. ValueError for what the model does not
        know."""
        found: Columns = inputs.sizes(self.task.conditions.get("text"), sizes or {})
        for name, words in (("tokens", prompts), ("negative", negative)):
            if words and name == "negative" and told_guidance(self.task.network):
                raise ValueError("a network that is told its guidance takes no negative_prompt")
            tokens = self.tokens(words, "prompt" if name == "tokens" else "negative_prompt")
            if tokens is not None and (words or name == "tokens"):
                found[name] = tokens
        known: Any = self.task.conditions.get("label")
        if known is None and self.classifier is None:
            if labels:
                raise ValueError(f"label={labels[0]}, but the model knows no classes: leave it out")
            return found
        null = known is None or known.has_null
        if not null and self.guide is None and self.how.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={self.how.guidance_scale} needs a null class, which the model was "
                "trained without: set it to 1"
            )
        classes = self.classifier.classes if known is None else known.null_label
        last = classes - (self.classifier is not None or not known.has_null)
        if wrong := [label for label in labels or () if not 0 <= label <= last]:
            raise ValueError(f"label={wrong[0]} must lie in 0..{last}")
        return found | {"label": np.array(labels or range(classes), np.int32)}

    # -- pictures --------------------------------------------------------------------------------

    def decode(self, params: Any, x: jax.Array, tile: int = 0, rounded: bool = True) -> jax.Array:
        """What was diffused, (batch, *space, channels), to pixels uint8; a series to float32.

        `tile` > 0: in tiles of so many pixels (`models/tiling.py`). Not `rounded`: in [0, 1].
        """
        x = codec.decode(self.first_stage, params, self.extra, x, tile)
        if x.ndim == 3:  # a series is no picture: it stays as it is
            return x
        return codec.to_uint8(x) if rounded else jnp.clip((x + 1) / 2, 0, 1)

    def compiled(
        self,
        trajectory: bool | str = False,
        strength: float | int = 1.0,
        tile: int = 0,
        rounded: bool = True,
        devices: list | None = None,
    ) -> Callable[..., Any]:
        """A compiled function (params, seeds, indices, columns) -> images [, images of each step].

        It holds no parameters. seeds, indices and columns have one row a picture; a column
        "guidance_scale" has each picture's own, "other" and "mix" make a picture between "image"
        and it (`inputs.py`, eq. 1), whose noise is the same at every place between. `trajectory`:
        x_t of each step as well, or the "estimates" of x_0 from it. `devices`: by default all.
        """
        self._check_told(strength)
        bare = dataclasses.replace(self, params={})
        task, how, method = bare.task, bare.how, bare.how.method(strength)

        def run(params: Any, seeds: Any, indices: Any, batch: dict[str, Any]) -> Any:
            key = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))
            keys = key(seeds, jnp.zeros_like(indices) if "mix" in batch else indices)
            first, noise, second = (ks.stream(keys, i) for i in range(3))
            params = task.merged(params)
            encode = functools.partial(codec.encode, bare.first_stage, params, bare.extra)
            given = inputs.prepare(bare.concat, batch, encode, bare.downsampling)
            denoise = given.kept(bare._denoise(params, batch, encode))
            shape = (len(indices), *task.sample_shape)
            x, more = (ks.normal(key, shape, jnp.float32) for key in (first, second))
            x, wide = given.start(how.schedule, method, x, more), how.state == "float64"
            if wide:
                x, denoise = x.astype(jnp.float64), in_float32(denoise)
            found: Any = samplers.sample(method, denoise, x, noise, bool(trajectory))
            if trajectory == "estimates":
                found = found[0], samplers.estimates(method, denoise, found[1])
            found = jax.tree.map(lambda x: x.astype(jnp.float32), found) if wide else found
            if not trajectory:
                return given.pasted(bare.decode(params, found, tile, rounded))
            x0, xs = found
            return bare.decode(params, x0, tile), jax.vmap(lambda x: bare.decode(params, x))(xs)

        mesh = make_mesh(devices=devices)
        jitted = jax.jit(target.aimed(run, mesh.devices.flatten().tolist(), mesh))
        return with_float64(jitted, how.state)

    def _denoise(self, params: Any, batch: dict[str, Any], encode: Callable[..., Any]) -> Denoise:
        """denoise(x_t, t) of the pictures that `batch` asks for, guided."""
        task, worse = self.task, None
        if self.guide is not None:
            alone = {k: v for k, v in batch.items() if k != "guidance_scale"}
            worse = self.guide._denoise(self.guide.task.merged(params["guide"]), alone, encode)
        batch = conditions.ready(task.conditions, batch, encode, self.extra)
        told, nothing, image = task.condition(params, batch), None, None
        if empty := conditions.null(task.conditions, params, batch):
            nothing = task.condition(params, {**batch, **empty})
        if self.edits:
            words = {k: v for k, v in empty.items() if k != "masked"}
            image = task.condition(params, {**batch, **words})
        predict, scale = functools.partial(task.predict, params), batch.get("guidance_scale")
        if told_guidance(task.network):  # as a weight beside 1, in place of a second evaluation
            w = jnp.float32(self.how.guidance_scale if scale is None else scale) - 1
            told = {**told, "guidance": jnp.broadcast_to(w, len(next(iter(batch.values()))))}
            nothing = scale = None
        denoise = self.how.denoise(predict, told, nothing, scale, worse, image)
        if self.classifier is not None:
            judge = functools.partial(self.classifier.apply, {"params": params["classifier"]})
            denoise = self.how.classified(denoise, judge, batch["label"])
        return denoise

    def _check_told(self, strength: float | int) -> None:
        """What is not of a model that is told of the image, or its guidance, beside x_t."""
        given: dict[str, Any] = {}
        if self.edits or told_guidance(self.task.network):
            given = {n: getattr(self.how, n) for n in ("guidance_interval", "guidance_rescale")}
            given["autoguidance"] = self.guide is not None
        given["strength"] = strength if self.concat is not None and strength != 1 else 0
        of = "of the image itself" if self.concat is not None else "its guidance"
        for name, value in given.items():
            if value:
                raise ValueError(f"{name}={value}, but the model is told {of}: leave it out")

    def at_a_time(self, count: int) -> int:
        """How many of `count` pictures are made at a time: what all devices divide."""
        size, devices = min(self.batch_size, count), make_mesh().size
        return -(-size // devices) * devices

    def images(
        self,
        columns: Columns,
        num: int,
        seeds: Sequence[int] = (0,),
        start: int = 0,
        run: Callable[..., Any] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields batches of `num` pictures of each seed, from the one numbered `start` on.

        Row i % n of a column is for picture i of a seed. A ragged last batch is padded, so one
        compilation serves all. Spread over all devices. `run`: what `compiled` gave, of the same
        networks and settings.
        """
        if num < 1:
            raise ValueError(f"num={num} must be at least 1")
        total = num * len(seeds)
        mesh, size, run = make_mesh(), self.at_a_time(total), run or self.compiled()
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        split = NamedSharding(mesh, BATCH)
        for first in range(start, total, size):
            turn, index = np.divmod(np.minimum(np.arange(first, first + size), total - 1), num)
            rows = {name: column[index % len(column)] for name, column in columns.items()}
            numbers = np.array(seeds, np.uint32)[turn], index.astype(np.int32)
            placed = jax.device_put((*numbers, rows), split)
            yield to_host(run(params, *placed))[: min(size, total - first)]
