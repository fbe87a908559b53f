"""What is evaluated: a run's samples, or a set of images, with what several metrics need of them.

Everything is made once, when it is first asked for. Images go by in batches (`stream.py`), and each
network that the metrics asked for sees every batch while it is there: vectors, labels and scores
are kept, images are not. What does not depend on weights or sampler (feature networks, the
reference) stands in `Tools`, and one command's subjects share it.
"""

import copy
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.data import loader
from diffusion.data.builders.captioned_digits import compose
from diffusion.wording import Progress
from experiments.evaluate import references, sample_sets, stream
from experiments.evaluate.features import FeatureNetwork, Judge, attributes
from experiments.evaluate.tools import Tools
from experiments.host import cluster
from experiments.run import data, generate, kept, workdir


class Subject:
    """`num` samples of the run in `directory`, or the images at `samples`.

    which: "ema" or "raw" weights, of checkpoint `step` (None: the newest). strict: refuse what
    would be singular (`frechet.sample_count_warning`). keep: a folder for the samples, from which
    an interrupted evaluation goes on. sample: keys that replace those of the config's `sample`.
    options: sampler, steps, guidance_scale; None: the config's.
    """

    def __init__(
        self,
        directory: pathlib.Path | None,
        classifier: pathlib.Path | None = None,
        num: int = 1000,
        num_held_out: int = 250,
        seed: int = 0,
        which: str = "ema",
        *,
        tools: Tools | None = None,
        step: int | None = None,
        samples: pathlib.Path | None = None,
        keep: pathlib.Path | None = None,
        rounding: str = "nearest",
        replicates: int = 100,
        strict: bool = False,
        sample: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        if num < 1:
            raise ValueError(f"--num={num} must be at least 1")
        self.directory, self.which, self.step = directory, which, step
        self.num, self.num_held_out, self.seed = num, num_held_out, seed
        self.tools = tools or Tools(classifier)
        self.samples_path, self.keep, self.rounding = samples, keep, rounding
        self.replicates, self.strict = replicates, strict
        self.sample, self.options = dict(sample or {}), options
        self.needs: tuple[str, ...] = ()

    def changed(self, **changes: Any) -> "Subject":
        """The same with other weights, step or options; nothing that depends on them is shared."""
        if set(changes) == {"which"} and changes["which"] == self.which:
            return self
        made = copy.copy(self)
        made.options = {**self.options}
        for name in [k for k in made.__dict__ if isinstance(getattr(Subject, k, None), _LAZY)]:
            del made.__dict__[name]
        for key, value in changes.items():
            if key in ("which", "step", "keep"):
                setattr(made, key, value)
            else:
                made.options[key] = value
        return made

    # -- the run ---------------------------------------------------------------------------------

    @functools.cached_property
    def model(self) -> generate.Model:
        model = generate.load(self.run, self.which, self.step, self.sample)
        return dataclasses.replace(model, pipeline=model.pipeline.changed(**self.options))

    @property
    def run(self) -> pathlib.Path:
        if self.directory is None:
            raise ValueError("--workdir is missing: this metric needs a run, not samples alone")
        return self.directory

    @functools.cached_property
    def image_config(self) -> ConfigDict:
        """The run's config, its data that of the images which its latents were made of."""
        return data.images_config(workdir.read_config(self.run))

    @property
    def judge(self) -> Judge:
        judge = self.tools.judge
        if self.directory is not None and judge.data != self.image_config.data.name:
            raise ValueError(
                f"--classifier={self.tools.classifier} was trained on {judge.data!r}, but "
                f"--workdir={self.directory} on {self.image_config.data.name!r}: name one of that"
            )
        return judge

    @property
    def network(self) -> FeatureNetwork:
        if self.tools.features in (None, "classifier") and self.tools.classifier:
            _ = self.judge  # refuses one of other data
        return self.tools.network

    @property
    def captioned(self) -> bool:
        return "text_encoder" in self.image_config.model

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(height, width, channels) of the run's images; None where they are no squares."""
        size = self.image_config.data.image_size
        return (size, size, self.image_config.data.channels) if isinstance(size, int) else None

    # -- the samples -----------------------------------------------------------------------------

    @functools.cached_property
    def sample_set(self) -> sample_sets.SampleSet | None:
        return sample_sets.open_samples(self.samples_path, None) if self.samples_path else None

    @property
    def count(self) -> int:
        return self.num if self.sample_set is None else self.sample_set.count

    def prompts(self, num: int, held_out: bool = False) -> tuple[list[str] | None, dict]:
        """Captions for `num` samples, and the attributes they ask for (of digits alone)."""
        if not self.captioned:
            return None, {}
        if data.known(self.image_config.data.name).prompts:
            return compose.prompts(num, self.seed, held_out)
        return data.captions(self.image_config, num), {}

    def batches(self, num: int, held_out: bool = False) -> Iterator[np.ndarray]:
        """Samples as they are made, or as they stand in the set."""
        if self.sample_set is not None:
            yield from _shown(self.sample_set.batches(), self.count)
            return
        prompts, _ = self.prompts(num, held_out)
        pipeline = self.model.pipeline
        size, columns = pipeline.at_a_time(num), pipeline.columns(prompts)

        def make(start: int) -> Iterator[np.ndarray]:
            for batch in pipeline.images(columns, num, [self.seed], start, self.sampler):
                yield sample_sets.to_uint8(batch, self.rounding, start)
                start += len(batch)

        if self.keep is None:
            yield from _shown(make(0), num)
        else:
            made_from = {**self.made_from(), "weights": self.which, "held_out": held_out}
            folder = self.keep / f"{self.which}{'_held_out' * held_out}"
            batches = kept.kept(folder, make, num, size, made_from)
            yield from _shown(batches, num)

    def images(self, num: int, held_out: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Samples in memory, and what their prompts asked for (nothing where there are none)."""
        return np.concatenate(list(self.batches(num, held_out))), self.prompts(num, held_out)[1]

    @property
    def sampler(self) -> Any:
        """Averaged and raw weights, and all checkpoints, go through one compiled function."""
        model = self.model
        extra = {k: v for k, v in model.pipeline.extra.items() if k.startswith("latent_")}
        known = [
            workdir.to_json(model.config),
            self.options,
            jax.tree.map(np.ndarray.tolist, extra),
        ]
        key = json.dumps(known)
        if key not in self.tools.samplers:
            self.tools.samplers[key] = model.pipeline.compiled(rounded=False)
        return self.tools.samplers[key]

    @functools.cached_property
    def samples(self) -> np.ndarray:
        return self.images(self.num)[0]

    @functools.cached_property
    def rows(self) -> dict[str, stream.Rows]:
        """What each of the networks in `needs` says of every sample: one pass over them."""
        prompts = self.prompts(self.num)[0] if "clip" in self.needs else None
        networks = {
            "features": lambda images, _: self.network.run(images),
            "attributes": lambda images, _: attributes(images, self.judge),
            "clip": lambda images, index: {  # image i is of the prompt whose turn it was
                "score": self.tools.clip.scores(images, [prompts[i % len(prompts)] for i in index])
            },
        }
        wanted = {name: networks[name] for name in self.needs}
        return stream.through(stream.split(self.batches(self.num)), wanted)

    # -- what they are compared with -------------------------------------------------------------

    def data(self, split: str, num: int | None = None) -> np.ndarray:
        """Images of the data set, in compositions that no training run reads."""
        source, steps = data.open_images(self.image_config, split)
        index = np.arange(min(num or len(source), len(source)))
        epoch = np.full_like(index, references.UNSEEN_EPOCH)
        return loader.fetch(source, index, epoch, index, steps)["image"]

    @property
    def reference(self) -> references.Reference:
        """Read, or made of the run's training data (and kept, where a file is named)."""
        tools = self.tools
        if tools.made is not None:
            return tools.made
        path = tools.reference
        if path is not None and path.is_file():
            shape = None if self.sample_set is None else self.sample_set.shape
            expected = {}
            if self.directory is not None:
                expected = references.data_identity(self.image_config, tools.reference_split)
                shape = shape or self.image_shape
            tools.made = references.read(path, self.network, expected, shape, tools.vectors)
            return tools.made
        if self.directory is None:
            raise ValueError(
                "--reference is missing: name an .npz of statistics, or --workdir, whose data it "
                "is made of"
            )
        if self.sample_set is not None:
            _check_size(self.sample_set, self.image_shape)
        made = references.of_data(
            self.image_config,
            tools.reference_split,
            self.network,
            tools.reference_num,
            tools.spatial,
        )
        if path is not None:
            references.write(path, made)
        tools.made = made
        return made

    def made_from(self) -> dict[str, Any]:
        """What the samples depend on."""
        sample = self.model.config.sample
        chosen = {k: v if v is not None else sample.get(k) for k, v in self.options.items()}
        if "options" in sample:
            chosen["options"] = sample.options.to_dict()
        return {
            "step": self.model.step,
            "checkpoint": self.model.checkpoint_hash,
            "seed": self.seed,
            "sample": {**chosen, "rounding": self.rounding},
        }

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on, of the parts that were used."""
        found: dict[str, Any] = {}
        if "judge" in self.tools.__dict__:
            found["classifier"] = self.tools.judge.hash
        if "network" in self.tools.__dict__:
            found["features"] = self.tools.network.identity()
        if self.tools.made is not None:
            found["reference"] = self.tools.made.identity
        if "clip" in self.tools.__dict__:
            found["clip"] = self.tools.clip.hash
        if "model" in self.__dict__:
            found |= {**self.made_from(), "samples": self.num}
        if self.sample_set is not None:
            described = self.sample_set.described
            found |= {"samples": self.count, "samples_from": self.sample_set.path.name}
            found |= {"samples_made_from": described} if described else {}
        return found


_LAZY = functools.cached_property


def _shown(batches: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    return Progress("samples", count, silent=not cluster.is_first()).over(batches)


def _check_size(found: sample_sets.SampleSet, shape: tuple[int, ...] | None) -> None:
    if shape is not None and found.shape[:2] != shape[:2]:
        raise ValueError(
            f"--samples={found.path} are {found.shape[:2]} pixels, the data of the run "
            f"{shape[:2]}: compare images of one size"
        )
