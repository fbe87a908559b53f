"""What both models make, and what is measured of it."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.data import loader
from diffusion.data.builders.captioned_digits import compose
from diffusion.metrics import frechet, precision_recall
from diffusion.training import codec
from experiments.evaluate.features import Judge, attributes
from experiments.gan.model import NOISE, Gan, Generator
from experiments.gan.train import train_diffusion, train_gan
from experiments.run import assemble, data, generate, networks


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every run shares: the config, the first stage, the judge, and the real pictures."""

    config: ConfigDict
    stage: networks.Stage
    judge: Judge
    real: np.ndarray
    num: int

    def samples(self, name: str, gan: Gan, secs: float, seed: int) -> tuple[np.ndarray, dict]:
        """uint8 pictures of one trained model, and how it was trained."""
        config = ConfigDict(self.config.to_dict())
        config.seed = seed
        if name == "diffusion":
            run, state, steps, took = train_diffusion(config.lock(), secs)
            params = {**run.parallel.whole(state).ema, "autoencoder": self.stage.params}
            size = _size(state.params)
            made = {"extra": run.arguments, "first_stage": self.stage.network}
            pipeline = generate.pipeline(config, run.task, params, **made)
            pixels = np.concatenate(list(pipeline.images({}, self.num, [seed])))
        else:
            config.train.batch_size = 2 * config.train.batch_size
            run = assemble.build_run(config.lock())
            state, steps, took = train_gan(run, gan, secs, seed)
            size = _size(state["params"])
            pixels = self.decoded(gan, state["ema"], run.arguments, seed)
        size_of_batch = run.config.train.batch_size
        return pixels, {"steps": steps, "batch_size": size_of_batch, "secs": took, "params": size}

    def decoded(self, gan: Gan, generator: Any, extra: dict[str, Any], seed: int) -> np.ndarray:
        @jax.jit
        def run(generator, first_stage, z):
            x = Generator(gan.width).apply(generator, z)
            params = {"autoencoder": first_stage}
            return codec.to_uint8(codec.decode(self.stage.network, params, extra, x))

        z = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), (self.num, NOISE))
        parts = [run(generator, self.stage.params, z[i : i + 250]) for i in range(0, self.num, 250)]
        return np.concatenate(parts)

    def measured(self, pixels: np.ndarray) -> dict[str, Any]:
        """The numbers of the module's docstring."""
        mine, real = (self.judge(x)[1] for x in (pixels, self.real))
        statistics = [frechet.feature_statistics(x) for x in (mine, real)]
        numbers = precision_recall.precision_recall(mine, real)._asdict()
        return {
            **numbers,
            "frechet_distance": frechet.frechet_distance(*statistics),
            **occurring(attributes(pixels, self.judge)),
        }


def occurring(found: dict[str, np.ndarray]) -> dict[str, int]:
    """How many combinations that training shows occur among attributes; and the least frequent
    digit's and colour's count."""
    pairs = set(zip(found["digit"].tolist(), found["colour"].tolist(), strict=True))
    names = compose.ATTRIBUTES
    every = set(zip(*(found[name].tolist() for name in names), strict=True))
    held = {(digit, list(compose.COLOURS).index(colour)) for digit, colour in compose.HELD_OUT}
    seen = [one for one in every if min(one) >= 0 and (one[0], one[1]) not in held]
    digits = np.bincount(found["digit"], minlength=len(compose.DIGITS))
    colours = np.bincount(np.maximum(found["colour"], 0), minlength=len(compose.COLOURS))
    return {
        "pairs": sum(min(one) >= 0 and one not in held for one in pairs),
        "combinations": len(seen),
        "rarest_digit": int(digits.min()),
        "rarest_colour": int(colours.min()),
    }


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def setting(config: ConfigDict, classifier: str, num: int) -> tuple[Setting, np.ndarray]:
    """And the row "data": other training pictures, as the first stage returns them."""
    first_stage = pathlib.Path(config.latents.first_stage)
    stage = networks.load_stage(first_stage, flag="latents.first_stage")
    source, steps = data.open_images(data.images_config(config), "train")
    chosen = np.random.default_rng(0).permutation(len(source))[: 2 * num]
    if len(chosen) < 2 * num:
        raise ValueError(f"--num={num} takes {2 * num} pictures, but there are {len(source)}")
    images = _images(source, steps, chosen)
    shared = Setting(config, stage, Judge(pathlib.Path(classifier)), images[:num], num)

    @jax.jit
    def returned(params, image):
        code = stage.network.apply({"params": params}, codec.signed(image), method="encode").mean
        return codec.to_uint8(stage.network.apply({"params": params}, code, method="decode"))

    parts = [returned(stage.params, images[i : i + 250]) for i in range(num, 2 * num, 250)]
    return shared, np.concatenate(parts)


def _images(source: Any, steps: list, chosen: np.ndarray) -> np.ndarray:
    zeros = np.zeros(len(chosen), np.int64)
    return loader.fetch(source, chosen, zeros, zeros, steps)["image"]
