"""What is measured, in three plain things: `Run` and `Samples`, what is sampled; `Tools` and
`references.Against`, what that is seen with and compared with; `Subject`, both, and what the
networks said.

None of them changes; what is costly is made once, when it is first asked for. Images go by in
batches (`stream.py`), and each network that the metrics asked for sees every batch while it is
there: vectors, labels and scores are kept, images are not.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.data.builders.captioned_digits import compose
from diffusion.sampling.inputs import Columns
from diffusion.wording import Progress
from experiments.evaluate import references, sample_sets, stream
from experiments.evaluate.features import FeatureNetwork, Judge, Tools, attributes
from experiments.host import cluster
from experiments.run import build, data, generate, given, kept, workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run's "ema" or "raw" weights, of checkpoint `step` (None: the newest).

    sample: keys that replace those of the config's `sample`. options: sampler, steps,
    guidance_scale; None: the config's.
    """

    directory: pathlib.Path
    which: str = "ema"
    step: int | None = None
    sample: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:  # as errors name it
        return f"--workdir={self.directory}"

    @functools.cached_property
    def model(self) -> generate.Model:
        model = generate.load(self.directory, self.which, self.step, self.sample)
        return dataclasses.replace(model, pipeline=model.pipeline.changed(**self.options))

    @functools.cached_property
    def image_config(self) -> ConfigDict:
        """The config, its data that of the images which its latents were made of."""
        return data.images_config(workdir.read_config(self.directory))

    @property
    def captioned(self) -> bool:
        return build.reads_captions(self.image_config)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(height, width, channels) of its images; None where they are no squares."""
        size = self.image_config.data.image_size
        return (size, size, self.image_config.data.channels) if isinstance(size, int) else None

    def made_from(self) -> dict[str, Any]:
        """What samples depend on, but for their seed and rounding."""
        sample, how = self.model.config.sample, self.model.pipeline.how
        chosen = {name: getattr(how, name) for name in ("sampler", "steps", "guidance_scale")}
        if "options" in sample and how.sampler == sample.sampler:  # they are one sampler's
            chosen["options"] = sample.options.to_dict()
        if sample.autoguidance:  # which checkpoint it was is in the hash
            chosen["autoguidance"] = pathlib.Path(sample.autoguidance).name
        if sample.guidance_classifier:  # so is which classifier
            chosen["classifier_scale"] = how.classifier_scale
        return {"step": self.model.step, "checkpoint": self.model.checkpoint_hash, "sample": chosen}


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """`num` samples of a run, or all images at `path`.

    keep: a folder for the samples, from which an interrupted evaluation goes on. compiled: the
    samplers, which all that were made of this by `dataclasses.replace` share.
    """

    run: Run | None
    num: int = 1000
    num_held_out: int = 250
    seed: int = 0
    rounding: str = "nearest"
    path: pathlib.Path | None = None
    keep: pathlib.Path | None = None
    compiled: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"--num={self.num} must be at least 1")

    @functools.cached_property
    def set(self) -> sample_sets.SampleSet | None:
        return sample_sets.open_samples(self.path, None) if self.path else None

    @property
    def count(self) -> int:
        return self.num if self.set is None else self.set.count

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(height, width, channels), where that is known before any is made."""
        return self.set.shape if self.set is not None else self.run and self.run.image_shape

    def prompts(self, num: int, held_out: bool = False) -> tuple[list[str] | None, dict]:
        """Captions for `num` samples, and the attributes they ask for (of digits alone)."""
        if not self.run.captioned:
            return None, {}
        if data.known(self.run.image_config.data.name).prompts:
            return compose.prompts(num, self.seed, held_out)
        return data.captions(self.run.image_config, num), {}

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """Images of the evaluation split and what the samples are made of; {} for noise alone."""
        config, epoch = self.run.image_config, references.UNSEEN_EPOCH
        return given.columns(config, self.num, epoch) if given.reads(config) else {}

    def columns(self, num: int, held_out: bool = False) -> Columns:
        """What the pipeline is told of them."""
        pipeline = self.run.model.pipeline
        told = pipeline.columns(self.prompts(num, held_out)[0])
        return told | {name: self.given[name] for name in pipeline.reads if name in self.given}

    def drawn(self, columns: Columns, num: int, start: int = 0) -> Iterator[np.ndarray]:
        """Batches of uint8, from sample `start` on."""
        images = self.run.model.pipeline.images(columns, num, [self.seed], start, self._sampler)
        for batch in images:
            yield sample_sets.to_uint8(batch, self.rounding, start)
            start += len(batch)

    @property
    def _sampler(self) -> Any:
        """Averaged and raw weights, and all checkpoints, go through one compiled function."""
        model = self.run.model
        extra = {k: v for k, v in model.pipeline.extra.items() if k.startswith("latent_")}
        known = [workdir.to_json(model.config), dict(self.run.options)]
        key = json.dumps([*known, jax.tree.map(np.ndarray.tolist, extra)])
        if key not in self.compiled:
            self.compiled[key] = model.pipeline.compiled(rounded=False)
        return self.compiled[key]

    def batches(self, num: int, held_out: bool = False) -> Iterator[np.ndarray]:
        """Samples as they are made, or as they stand in the set."""
        if self.set is not None:
            yield from _shown(self.set.batches(), self.count)
            return
        pipeline = self.run.model.pipeline
        make = functools.partial(self.drawn, self.columns(num, held_out), num)
        if self.keep is None:
            yield from _shown(make(), num)
        else:
            which = self.run.which
            made_from = {**self.made_from(), "weights": which, "held_out": held_out}
            folder = self.keep / f"{which}{'_held_out' * held_out}"
            batches = kept.kept(folder, make, num, pipeline.at_a_time(num), made_from)
            yield from _shown(batches, num)

    def images(self, num: int, held_out: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Samples in memory, and what their prompts asked for (nothing where there are none)."""
        return np.concatenate(list(self.batches(num, held_out))), self.prompts(num, held_out)[1]

    def made_from(self) -> dict[str, Any]:
        """What the samples depend on."""
        found = self.run.made_from()
        sample = {**found.pop("sample"), "rounding": self.rounding}
        return {**found, "seed": self.seed, "sample": sample}


AGAINST = references.Against()


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """Samples with what measures them, and what the networks said of them.

    strict: refuse what would be singular (`frechet.sample_count_warning`). needs, reference: what
    the metrics asked for use, filled in by `metrics.prepare`: of `rows`, "features", "attributes",
    "class", "clip"; of the reference, "pool", "spatial", "vectors"; the "model", the "judge" by
    itself, and "stage features" of a first stage's pictures.
    """

    samples: Samples
    tools: Tools = dataclasses.field(default_factory=Tools)
    against: references.Against = AGAINST
    replicates: int = 100
    strict: bool = False
    needs: frozenset[str] = frozenset()
    reference: references.Reference | None = None

    def changed(self, keep: str = "", **changes: Any) -> "Subject":
        """With another "which" or "step", or other options; samples are kept in `keep` of the
        folder."""
        own = {k: changes.pop(k) for k in ("which", "step") if k in changes}
        run = dataclasses.replace(self.run, **own, options={**self.run.options, **changes})
        folder = self.samples.keep and self.samples.keep / keep
        samples = dataclasses.replace(self.samples, run=run, keep=folder)
        return dataclasses.replace(self, samples=samples)

    @property
    def run(self) -> Run | None:
        return self.samples.run

    @property
    def judge(self) -> Judge:
        judge = self.tools.judge
        name = "" if self.run is None else self.run.image_config.data.name
        if name and judge.data != (data.known(name).like or name):
            raise ValueError(
                f"--classifier={self.tools.classifier} was trained on {judge.data!r}, but "
                f"{self.run} on {name!r}: name one of that"
            )
        return judge

    @property
    def network(self) -> FeatureNetwork:
        if self.tools.feature_name == "classifier":
            _ = self.judge  # refuses one of other data
        return self.tools.network

    @functools.cached_property
    def rows(self) -> dict[str, stream.Rows]:
        """What each of the networks in `needs` says of every sample: one pass over them."""
        samples, scorer = self.samples, self.tools
        prompts = samples.prompts(samples.num)[0] if "clip" in self.needs else None
        networks = {
            "features": lambda images, _: self.network.run(images),
            "attributes": lambda images, _: attributes(images, self.judge),
            "class": lambda images, _: {"seen": self.judge(images)[0]},
            "clip": lambda images, index: {  # image i is of the prompt whose turn it was
                "score": scorer.clip.scores(images, [prompts[i % len(prompts)] for i in index])
            },
        }
        wanted = {name: network for name, network in networks.items() if name in self.needs}
        return stream.through(stream.split(samples.batches(samples.num)), wanted)

    def compared(self) -> references.Reference:
        """Read, or made of the run's training data (and kept, where a file is named)."""
        run, given, (path, split, num) = self.run, self.samples.set, self.against
        config = None if run is None else run.image_config
        if path is not None and path.is_file():
            expected = {} if config is None else references.data_identity(config, split)
            vectors = "vectors" in self.needs
            return references.read(path, self.network, expected, self.samples.shape, vectors)
        if config is None:
            raise ValueError(
                "--reference is missing: name an .npz of statistics, or --workdir, whose data it "
                "is made of"
            )
        if given is not None and (shape := run.image_shape) and given.shape[:2] != shape[:2]:
            raise ValueError(
                f"--samples={given.path} are {given.shape[:2]} pixels, the data of the run "
                f"{shape[:2]}: compare images of one size"
            )
        made = references.of_data(config, split, self.network, num, "spatial" in self.needs)
        if path is not None:
            references.write(path, made)
        return made

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on, of the parts that `needs` says were used."""
        tools, found = self.tools, {}
        seen = "features" in self.needs or ("stage features" in self.needs and tools.chosen)
        if self.needs & {"attributes", "class", "judge"} or (
            seen and tools.feature_name == "classifier"
        ):
            found["classifier"] = tools.judge.hash
        if seen:
            found["features"] = tools.network.identity()
        if self.reference is not None:
            found["reference"] = self.reference.identity
        if "clip" in self.needs or (seen and tools.feature_name == "clip"):
            found["clip"] = tools.clip.hash
        if "model" in self.needs:
            found |= {**self.samples.made_from(), "samples": self.samples.num}
        if (given := self.samples.set) is not None:
            found |= {"samples": given.count, "samples_from": given.path.name}
            found |= {"samples_made_from": given.described} if given.described else {}
        return found


def _shown(batches: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    return Progress("samples", count, silent=not cluster.is_first()).over(batches)
