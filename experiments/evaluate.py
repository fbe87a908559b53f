"""Numbers of a trained run, with what they depend on, as evaluation.json.

    python -m experiments.evaluate --workdir=DIR --metrics=adherence,frechet_distance \
        --classifier=DIR [--weights=ema|raw]
    python -m experiments.evaluate --workdir=DIR --metrics=psnr

adherence: the fraction of samples in which each attribute, and all at once, is what the prompt
says: the digit by the classifier, the rest measured on pixels (diffusion/metrics/adherence.py).
frechet_distance: on the classifier's features, against composed training digits; not "FID".
psnr: of the first stage's reconstructions of the composed test digits, from the posterior's mean.
"""

import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from diffusion import weights
from diffusion.checkpoint import restore_params
from diffusion.data import loader
from diffusion.data.builders.captioned_digits import compose
from diffusion.metrics import adherence as adherence_metric
from diffusion.metrics import frechet, reconstruction
from experiments import build, cli, generate, runs, workdir

METRICS = ("adherence", "frechet_distance", "psnr")
UNSEEN_EPOCH = 10**6  # compositions that no training run reads


class DigitJudge:
    """The trained classifier: digits and features of uint8 images."""

    def __init__(self, directory: pathlib.Path):
        config = workdir.read_config(directory)
        if config.task != "classifier":
            raise ValueError(
                f"--classifier={directory} holds a run with task={config.task!r}: name one of "
                "configs/digits_classifier.py"
            )
        saved = restore_params(directory / "checkpoints", ("params", "ema"))
        params = {**saved.items["params"], **saved.items["ema"]}["classifier"]
        network = build.task(config).network
        self.hash = saved.hash

        @jax.jit
        def run(image):
            x = image.astype(jnp.float32) / 127.5 - 1
            variables = {"params": params}
            logits = network.apply(variables, x)
            return logits.argmax(-1), network.apply(variables, x, method="features")

        self._run = run

    def __call__(self, images: np.ndarray, batch: int = 250) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._run(images[i : i + batch]) for i in range(0, len(images), batch)]
        digits, features = zip(*parts)
        return np.concatenate(digits).astype(np.int32), np.concatenate(features)


def measure(images: np.ndarray, judge: DigitJudge) -> dict[str, np.ndarray]:
    """Every attribute of each image, as positions in the tables of `compose`."""
    large = np.array(compose.OFFSETS["large"]) + compose.SIZES["large"] / 2
    # The larger digit's centres: the smaller one's lie further out, nearer to no other place.
    places = {
        name: tuple(large[list(place)] / compose.CANVAS) for name, place in compose.PLACES.items()
    }
    found = adherence_metric.measure(
        images,
        colours=compose.COLOURS,
        backgrounds=compose.BACKGROUNDS,
        places=places,
        sizes=compose.SIZES,
    )
    return {**found, "digit": judge(images)[0]}


def digits(
    model: generate.Model, judge: DigitJudge, num: int, num_held_out: int, seed: int, **options: Any
) -> dict[str, Any]:
    """Adherence over seen and held-out prompts, and the Frechet distance of the seen samples."""
    results: dict[str, Any] = {}
    for key, n, held_out in (("adherence", num, False), ("adherence_held_out", num_held_out, True)):
        prompts, wanted = compose.prompts(n, seed, held_out)
        images = np.concatenate(list(generate.images(model, n, prompts, seed, **options)))
        results[key] = adherence_metric.adherence(measure(images, judge), wanted)
        if not held_out:
            features = judge(images)[1]
    config = ConfigDict(model.config.to_dict())
    config.data.dir, config.data.name = config.latents.data_dir, config.latents.data_name
    source, steps = runs.open_images(config, "train")
    index = np.arange(len(source))
    composed = loader.fetch(source, index, np.full_like(index, UNSEEN_EPOCH), index, steps)
    reference = frechet.feature_statistics(judge(composed["image"])[1])
    samples = frechet.feature_statistics(features)
    warning = frechet.sample_count_warning(len(features), features.shape[1])
    if warning:
        print(f"note: {warning}", flush=True)
    results["frechet_distance"] = frechet.frechet_distance(samples, reference)
    results["frechet_distance_samples"] = len(features)
    return results


def first_stage_psnr(directory: pathlib.Path) -> dict[str, float]:
    """PSNR (dB, mean over images) of the composed test digits through a first stage."""
    config = ConfigDict(workdir.read_config(directory).to_dict())
    if config.task == "autoencoder":
        saved = restore_params(directory / "checkpoints", ("params", "ema"))
        params = {**saved.items["params"], **saved.items["ema"]}["autoencoder"]
    elif "autoencoder" in config.model:
        params = weights.load_weights(directory / "first_stage")[0]
        config.data.dir, config.data.name = config.latents.data_dir, config.latents.data_name
    else:
        raise ValueError(f"--metrics=psnr needs a first stage, and --workdir={directory} has none")
    network = build.autoencoder(config.model.autoencoder)

    @jax.jit
    def reconstruct(image):
        x = image.astype(jnp.float32) / 127.5 - 1
        z = network.apply({"params": params}, x, method="encode").mean
        return generate.to_uint8(network.apply({"params": params}, z, method="decode"))

    source, steps = runs.open_images(config, "test")
    values = []
    for batch in loader.one_pass(source, 250, steps):
        pixels = np.asarray(reconstruct(batch["image"]))
        value = reconstruction.psnr(batch["image"], pixels, reconstruction.UINT8)
        values.append(np.asarray(value)[batch["valid"]])
    return {"psnr": float(np.concatenate(values).mean()), "count": len(source)}


def versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def evaluate(
    directory: pathlib.Path,
    metrics: list[str],
    classifier: pathlib.Path | None = None,
    num: int = 1000,
    num_held_out: int = 250,
    seed: int = 0,
    which: str = "ema",
    **options: Any,
) -> dict[str, Any]:
    """The named metrics of a run, with seeds, sampler, hashes and versions beside them."""
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or not metrics:
        raise ValueError(f"--metrics={','.join(metrics)} must name some of {', '.join(METRICS)}")
    started = time.perf_counter()
    results: dict[str, Any] = {"workdir": directory.name, "seed": seed, "versions": versions()}
    results["device"] = jax.devices()[0].device_kind
    if {"adherence", "frechet_distance"} & set(metrics):
        if classifier is None:
            raise ValueError(
                "--classifier is missing: adherence and frechet_distance need the run of "
                "configs/digits_classifier.py"
            )
        model = generate.load(directory, which)
        if model.config.get("latents", {}).get("data_name") != "captioned_digits":
            raise ValueError(
                f"--metrics=adherence is for captioned digits, not --workdir={directory}"
            )
        judge = DigitJudge(classifier)
        chosen = {k: v if v is not None else model.config.sample[k] for k, v in options.items()}
        results |= {"weights": which, "sample": chosen, "classifier": judge.hash}
        results |= {"checkpoint": model.checkpoint_hash, "step": model.step}
        results |= digits(model, judge, num, num_held_out, seed, **options)
    if "psnr" in metrics:
        results["autoencoder"] = first_stage_psnr(directory)
    results["seconds"] = round(time.perf_counter() - started, 1)
    return results


def define(add: cli.Flags) -> None:
    add.add("string", "workdir", None, "A run.")
    add.add("list", "metrics", None, "adherence, frechet_distance, psnr: comma-separated.")
    add.add("string", "classifier", None, "The digit classifier's run.")
    add.add("integer", "num", 1000, "Prompts of pairs seen in training.")
    add.add("integer", "num_held_out", 250, "Prompts of held-out pairs.")
    add.add("integer", "seed", 0, "Of prompts and noise.")
    add.add("string", "sampler", None, "Default: the config's sample.sampler.")
    add.add("integer", "steps", None, "Sampler steps; default: the config's sample.steps.")
    add.add("float", "guidance_scale", None, "Default: the config's sample.guidance_scale.")
    add.add("enum", "weights", "ema", "Averaged or raw parameters.", ["ema", "raw"])
    add.add("string", "out", None, "Default: DIR/evaluation.json.")


def main(values: flags.FlagValues) -> None:
    directory = pathlib.Path(cli.require(values, "workdir"))
    results = evaluate(
        directory,
        values.metrics or [],
        pathlib.Path(values.classifier) if values.classifier else None,
        values.num,
        values.num_held_out,
        values.seed,
        values.weights,
        sampler=values.sampler,
        steps=values.steps,
        guidance_scale=values.guidance_scale,
    )
    out = pathlib.Path(values.out or directory / "evaluation.json")
    workdir.write_whole(out, json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
