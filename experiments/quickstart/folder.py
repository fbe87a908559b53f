"""The one command for a folder of pictures: looked at, sizes chosen, trained, sampled, measured.

WORKDIR/data          the pictures at one size (`look.py`)
WORKDIR/config.py     what was chosen and why (`choose.py`); edited, the next start uses it
WORKDIR/autoencoder, WORKDIR/latents, WORKDIR/ldm   the runs of latent diffusion, or WORKDIR/pixel
WORKDIR/seconds.json  of each stage, over all starts
WORKDIR/samples.png, real.png, loss.png, results.json, report.html
"""

import functools
import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import files, pictures, wording
from diffusion.data import folder, sources
from experiments.encode_latents import encode
from experiments.evaluate import reconstructions
from experiments.evaluate.__main__ import versions
from experiments.quickstart import choose, look, measure
from experiments.quickstart.stages import Job, train_stage
from experiments.report import __main__ as report
from experiments.run import generate, networks

GRID = 32
SAMPLES = 500
BLURRED = 22  # dB of a first stage, below which samples cannot be good


def run(
    images: pathlib.Path, root: pathlib.Path, minutes: float, seed: int = 0, setup_secs: float = 0.0
) -> dict[str, Any]:
    """Every stage; returns what results.json holds. Raises ValueError, a sentence, for a folder
    that does not do, before anything is written."""
    if not 0 < minutes < 1e6:
        raise ValueError(f"--minutes={minutes} must be above 0")
    _check(root)
    job = Job(root)
    job.add("setup", setup_secs)
    with job.stage("data", f"the pictures of {images}"):
        found = look.look(images, seed)
        print(found.said())
        chosen, why = choose.sizes(found, root, seed)
        about = look.shrink(found, root / "data", chosen["image_size"])
    if not (root / "config.py").is_file():
        with job.stage("choose", "sizes and steps that fit the data, the device and the minutes"):
            spent, count = sum(job.seconds.values()), about["counts"]["train"]
            chosen, more = choose.with_steps(chosen, count, 60 * minutes, spent, SAMPLES)
            choose.write(root / "config.py", found, chosen, [*why, *more])
            print(*[f"- {line}" for line in [*why, *more]], sep="\n")
    else:
        print(f"note: steps and sizes are those of {root / 'config.py'}, whatever --minutes says")
    get = _configs(root / "config.py")
    if seed != get().seed:
        raise ValueError(f"--seed={seed}, but {root / 'config.py'} says {get().seed}: give that")
    last = _train(job, get)
    with job.stage("evaluate", "samples of held-out captions, and their numbers"):
        results = _evaluate(job, get, last, about, seed)
    seconds = job.spent
    results |= {"minutes": round(seconds["total"] / 60, 2), "seconds": seconds, "seed": seed}
    results |= {"versions": versions(), "device": jax.devices()[0].device_kind}
    files.write_json(root / "results.json", results)
    report.report([root], root / "report.html")
    return results


def _check(root: pathlib.Path) -> None:
    """Nothing of somebody else's is written over."""
    held = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if root.exists() and not root.is_dir():
        raise ValueError(f"--workdir={root} is a file: name a folder")
    strangers = {name for name in held if not name.startswith(".")}
    if strangers and "seconds.json" not in held:
        raise ValueError(
            f"--workdir={root} holds {min(strangers)!r} and is not of --images: name a new folder"
        )


def _configs(path: pathlib.Path) -> Any:
    """`get_config` of the workdir's config.py, as it stands there now.

    Raises ValueError, with the line's own words, for a file that does not load.
    """
    spec = importlib.util.spec_from_file_location("chosen_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if "latents" in module.get_config():
            module.get_config("autoencoder")
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}; mend or delete it") from error
    return module.get_config


def _train(job: Job, get: Any) -> str:
    """Trains what config.py says; returns the name of the denoiser's folder."""
    config, root = get(), job.root
    if "latents" not in config:
        with job.stage("pixel", "diffusion of pixels"):
            train_stage(config.lock(), root / "pixel")
        return "pixel"
    side = config.data.image_size
    with job.stage("autoencoder", f"first stage: a KL autoencoder of {side}x{side} pictures"):
        train_stage(get("autoencoder").lock(), root / "autoencoder")
    with job.stage("encode_latents", "latents, encoded once"):
        encode(config.lock())
    with job.stage("ldm", "latent diffusion"):
        train_stage(config.lock(), root / "ldm")
    return "ldm"


def _pictures(directory: pathlib.Path, split: str, size: int, classes: list[str]) -> Any:
    """The pictures of a split and what is said of each: a caption, or its class's name."""
    source = folder.open_folder(directory, split, size)
    columns = sources.in_memory(source).columns
    said = columns.get("caption")
    if "label" in columns:
        said = [row["path"].parent.name for row in source.rows]
    return measure.Pictures(columns["image"], said)


def _evaluate(job: Job, get: Any, last: str, about: dict, seed: int) -> dict[str, Any]:
    root, config = job.root, get()
    data, classes = root / "data", about["classes"]
    of = functools.partial(_pictures, data, size=config.data.image_size, classes=classes)
    train, held_out = of("train"), of("validation").shuffled(seed)  # classes lie one after another
    pipeline = generate.load(root / last).pipeline
    asked = None
    if held_out.said is not None:
        asked = [held_out.said[i % len(held_out.said)] for i in range(SAMPLES)]
    labels = [classes.index(name) for name in asked] if asked and classes else None
    columns = pipeline.columns(None if classes else asked, labels=labels)
    progress = wording.Progress("samples", SAMPLES)
    pixels = np.concatenate(list(progress.over(pipeline.images(columns, SAMPLES, [seed]))))
    _save(root, pixels, asked, held_out)
    job.losses(("autoencoder", "ldm") if last == "ldm" else ("pixel",))
    results: dict[str, Any] = {"reconstruction": {"psnr": None}}
    if last == "ldm":
        stage = networks.load_stage(root / "autoencoder")
        images = reconstructions.test_images(stage, SAMPLES)
        results = {"reconstruction": reconstructions.measure(stage, images)}
    results |= measure.measure(measure.Pictures(pixels, asked), held_out, train, seed)
    if asked and not classes:
        results["captions_unseen"] = measure.unseen(held_out.said[:SAMPLES], train.said)
    results["data"] = {key: about[key] for key in ("told", "counts", "classes")}
    results["data"] |= {"left_out": len(about["left_out"]), "images": about["made_from"]["images"]}
    return results | {"chosen": _said(config, get if last == "ldm" else None)}


def _said(config: ConfigDict, get: Any) -> dict[str, Any]:
    """What was chosen, or edited since, in a few numbers."""
    said = {"image_size": config.data.image_size, "first_stage": None}
    parts = {"denoiser": config}
    if get is not None:
        said["first_stage"] = config.model.autoencoder.to_dict()
        parts["autoencoder"] = get("autoencoder")
    for name, part in parts.items():
        said[f"{name}_steps"], said[f"{name}_batch"] = part.train.steps, part.train.batch_size
    sizes = config.model.denoiser
    return said | {"channels": sizes.channels if "channels" in sizes else None}


def _save(root: pathlib.Path, pixels: Any, asked: Any, held_out: Any) -> None:
    """samples.png and real.png (held-out pictures, to compare)."""
    for name, x, said in (("samples", pixels, asked), ("real", held_out.pixels, held_out.said)):
        if said is None:
            pictures.save_grid(root / f"{name}.png", x[:GRID], columns=8, scale=2)
        else:
            pictures.captioned(root / f"{name}.png", x[:GRID], said[:GRID])


def table(results: dict[str, Any]) -> str:
    """What the command prints at the end."""
    held_out, psnr = results["held_out"], results["reconstruction"]["psnr"]
    rows = [("", "samples", "held-out pictures")]
    for name in ("kid", "frechet_distance"):
        cells = (part[name] for part in (results, held_out))
        rows.append((name, *("-" if cell is None else f"{cell:.4f}" for cell in cells)))
    if results["adherence"]:
        one, other = (part["adherence"] for part in (results, held_out))
        rows.append(("captions matched", f"{one['value']:.3f}", f"{other['value']:.3f}"))
        rows.append(("a guess", f"{one['chance']:.3f}", f"{other['chance']:.3f}"))
    lines = [wording.table(rows, "<"), *results["warnings"]]
    if psnr is not None:
        lines.append(f"reconstruction by the first stage: {psnr:.1f} dB")
        if psnr < BLURRED:
            lines.append(
                f"note: below {BLURRED} dB shapes and colours are lost before anything is diffused:"
                " the first stage was trained too briefly, so give more --minutes and a new "
                "--workdir"
            )
    lines.append(f"{results['minutes']:.1f} minutes, all starts and the installation together")
    return "\n".join(lines)


def main(
    images: pathlib.Path, root: pathlib.Path, minutes: float, seed: int, setup_secs: float
) -> None:
    results = run(images, root, minutes, seed, setup_secs)
    last = "ldm" if results["reconstruction"]["psnr"] is not None else "pixel"
    print(f"\n{table(results)}\n")
    print("pictures:", *[root / f"{name}.png" for name in ("samples", "real", "loss")])
    print("config:  ", root / "config.py", " results:", root / "results.json")
    print("report:  ", root / "report.html")
    how = {"captions": " --prompt='…'", "classes": " --label=0", "nothing": ""}
    print("sample:   .venv/bin/python -m experiments.sample", f"--workdir={root}/{last}", end="")
    print(how[results["data"]["told"]], "--out=samples")
