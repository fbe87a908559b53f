"""The default job, end to end: text to image in a latent space, on real handwritten digits.

The commands of `experiments` one after the other in one process: prepare_data, train (first stage,
and the classifier beside it in a process of its own), encode_latents, train (latent diffusion),
evaluate; then results.json, the pictures and report.html, which shows all of it.
"""

import importlib
import os
import pathlib
from concurrent import futures

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import files, pictures, wording, writers
from diffusion.data.builders.captioned_digits import compose
from diffusion.data.prepare import prepare
from experiments.encode_latents import encode
from experiments.evaluate import __main__ as evaluate
from experiments.evaluate.features import Tools
from experiments.evaluate.samples import Run, Samples, Subject
from experiments.quickstart.stages import Job, beside, train_stage
from experiments.report import __main__ as report
from experiments.run import generate

GRID = 32  # captioned samples
STRIP = 8  # rows of denoising.png


def configs(root: pathlib.Path, smoke: bool, seed: int) -> dict[str, ConfigDict]:
    """The three configs of the job, with their folders under `root`."""
    made = {}
    for name in ("autoencoder", "classifier", "ldm"):
        config = importlib.import_module(f"configs.digits_{name}").get_config(
            "smoke" if smoke else ""
        )
        config.seed = seed
        config.data.dir = str(root / "data")
        made[name] = config
    made["ldm"].data.dir = str(root / "latents")
    made["ldm"].latents.data_dir = str(root / "data")
    made["ldm"].latents.first_stage = str(root / "autoencoder")
    return {name: config.lock() for name, config in made.items()}


def _command(name: str, config: ConfigDict, root: pathlib.Path, smoke: bool) -> list[str]:
    """What trains one of them in a process of its own."""
    file = pathlib.Path(__file__).parents[2] / "configs" / f"digits_{name}.py"
    changed = [f"--config.seed={config.seed}", f"--config.data.dir={config.data.dir}"]
    argument = ":smoke" if smoke else ""
    return ["experiments.train", f"--config={file}{argument}", f"--workdir={root / name}", *changed]


def quickstart(root: pathlib.Path, smoke: bool = False, seed: int = 0, setup_secs: float = 0.0):
    """Runs every stage; returns what results.json holds."""
    root.mkdir(parents=True, exist_ok=True)
    made, job = configs(root, smoke, seed), Job(root)
    job.add("setup", setup_secs)
    with job.stage("prepare_data", "data: 5,000 real handwritten digits to ArrayRecord"):
        prepare("captioned_digits", root / "data")
    judge = "the classifier that will judge the samples"
    with job.stage("autoencoder, classifier", "first stage: a KL autoencoder, 32x32x3 to 8x8x4"):
        if jax.default_backend() == "cpu":
            command = _command("classifier", made["classifier"], root, smoke)
            with beside("classifier", judge, command):
                train_stage(made["autoencoder"], root / "autoencoder")
        else:  # an accelerator is one process's
            train_stage(made["autoencoder"], root / "autoencoder")
            train_stage(made["classifier"], root / "classifier")
    with job.stage("encode_latents", "latents, encoded once"):
        encode(made["ldm"])
    with job.stage("ldm", "latent diffusion: text encoder and U-Net, jointly"):
        train_stage(made["ldm"], root / "ldm")
    with job.stage("evaluate", "evaluation: samples, adherence to the prompts"):
        with futures.ThreadPoolExecutor(1) as pool:  # one samples while the other compiles
            drawn = pool.submit(_pictures, root, seed)
            results = _evaluate(root, smoke, seed)
            drawn.result()
        job.losses(("autoencoder", "classifier", "ldm"))
    judged = last_logged(root / "classifier", "eval_accuracy")
    results |= {"classifier_test_accuracy": judged, "seconds": job.spent, "seed": seed}
    results |= {"processor_secs": job.processor_secs, "cores": os.cpu_count()}
    files.write_json(root / "results.json", results)
    report.report([root], root / "report.html")
    return results


def last_logged(directory: pathlib.Path, name: str) -> float:
    """What a run logged last under a name: one that was finished before logs nothing now."""
    return [row[name] for row in writers.read(directory) if name in row][-1]


def _evaluate(root: pathlib.Path, smoke: bool, seed: int) -> dict:
    directory = root / "ldm"
    num, held_out = (16, 8) if smoke else (1000, 250)
    samples = Samples(Run(directory), num, held_out, seed)
    subject = Subject(samples, Tools(root / "classifier"))
    found = evaluate.evaluate(subject, ["adherence", "frechet_distance", "psnr"])
    files.write_json(directory / "evaluation.json", found)
    kept = ("adherence", "adherence_held_out", "autoencoder", "frechet_distance", "versions")
    return {key: found[key] for key in (*kept, "device")}


def _pictures(root: pathlib.Path, seed: int) -> None:
    pipeline = generate.load(root / "ldm").pipeline
    prompts, _ = compose.prompts(GRID, seed + 1, held_out=False)
    columns = pipeline.columns(prompts)
    pixels = np.concatenate(list(pipeline.images(columns, GRID, [seed])))
    pictures.captioned(root / "samples.png", pixels, prompts)
    numbers = np.full(STRIP, seed, np.uint32), np.arange(STRIP, dtype=np.int32)
    first = {name: column[:STRIP] for name, column in columns.items()}
    _, steps = pipeline.compiled(trajectory=True)(pipeline.params, *numbers, first)
    shown = np.linspace(0, len(steps) - 1, min(13, len(steps))).round().astype(int)
    strip = np.asarray(steps)[shown].swapaxes(0, 1).reshape(-1, *steps.shape[2:])
    pictures.save_grid(root / "denoising.png", strip, columns=len(shown), scale=2)


def table(results: dict) -> str:
    """What the script prints at the end."""
    rows = [("attribute", "seen pairs", "held-out pairs")]
    for name in ("digit", "colour", "background", "size", "place", "all"):
        seen, held = (results[key][name] for key in ("adherence", "adherence_held_out"))
        rows.append((name, f"{seen:.3f}", f"{held:.3f}"))
    lines = [wording.table(rows, "<")]
    psnr, accuracy = results["autoencoder"]["psnr"], results["classifier_test_accuracy"]
    lines.append(f"first stage: {psnr:.1f} dB;  classifier: {accuracy:.3f} on test digits")
    lines.append(f"Frechet distance on its features: {results['frechet_distance']:.2f}")
    spent = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    lines.append(f"seconds: {spent}")
    return "\n".join(lines)


def main(root: pathlib.Path, smoke: bool, seed: int, setup_secs: float) -> None:
    results = quickstart(root, smoke, seed, setup_secs)
    print(f"\n{table(results)}\n")
    print("pictures:", *[root / f"{name}.png" for name in ("samples", "denoising", "loss")])
    print("results: ", root / "results.json")
    print("report:  ", root / "report.html")
    print("sample:   .venv/bin/python -m experiments.sample", f"--workdir={root}/ldm", end=" ")
    print("--prompt='a large blue four in the centre on white' --out=samples")
