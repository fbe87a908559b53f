"""Samples from a trained run: PNGs with how they were made inside, a grid, or an .npz.

    python -m experiments.sample --workdir=DIR --num=64 --prompt="..." --seed=0 --out=DIR

The same seed gives the same noise, and so the same images, for any batch size and device count.
"""

import pathlib

import numpy as np
from absl import flags

from experiments import cli, generate, pictures

_WORKDIR = flags.DEFINE_string("workdir", None, "A run with task='denoiser'.")
_OUT = flags.DEFINE_string("out", None, "Folder for the images (default: DIR/samples).")
_NUM = flags.DEFINE_integer("num", 16, "How many images.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "A caption; may be given several times.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file of captions, one a line.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise.")
_SAMPLER = flags.DEFINE_string("sampler", None, "Default: the config's sample.sampler.")
_STEPS = flags.DEFINE_integer("steps", None, "Sampler steps; default: the config's sample.steps.")
_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: the config's.")
_BATCH = flags.DEFINE_integer("batch_size", None, "Default: the config's sample.batch_size.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "Averaged or raw parameters.")
_NPZ = flags.DEFINE_bool("npz", False, "Write one samples.npz instead of PNGs.")


def prompts() -> list[str] | None:
    """From the flags; None when no prompt was given."""
    if _PROMPT.value and _PROMPTS_FILE.value:
        raise ValueError("--prompt and --prompts_file were both given: use one")
    if _PROMPTS_FILE.value:
        path = pathlib.Path(_PROMPTS_FILE.value)
        if not path.is_file():
            raise ValueError(f"--prompts_file={path} does not exist: name a text file")
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        found = [line for line in found if line]
        if not found:
            raise ValueError(f"--prompts_file={path} holds no prompt: write one a line")
        return found
    return _PROMPT.value


def main() -> None:
    directory = pathlib.Path(cli.require("workdir"))
    wanted = prompts()
    model = generate.load(directory, _WEIGHTS.value)
    options = {
        "sampler": _SAMPLER.value,
        "steps": _STEPS.value,
        "guidance_scale": _SCALE.value,
    }
    batches = generate.images(model, _NUM.value, wanted, _SEED.value, _BATCH.value, **options)
    pixels = np.concatenate(list(batches))
    out = pathlib.Path(_OUT.value or directory / "samples")
    out.mkdir(parents=True, exist_ok=True)
    if _NPZ.value:
        np.savez(out / "samples.npz", images=pixels)
        print(f"{len(pixels)} images in {out / 'samples.npz'}")
        return
    used = {k: v if v is not None else model.config.sample[k] for k, v in options.items()}
    text = {
        "seed": str(_SEED.value),
        **{key: str(value) for key, value in used.items()},
        "weights": _WEIGHTS.value,
        "checkpoint": model.checkpoint_hash,
        "step": str(model.step),
    }
    for i, image in enumerate(pixels):
        prompt = wanted[i % len(wanted)] if wanted else ""
        metadata = {"prompt": prompt, "index": str(i), **text}
        pictures.save_png(out / f"{i:05d}.png", image, metadata)
    pictures.save_grid(out / "grid.png", pixels[:256], scale=max(1, 64 // pixels.shape[1]))
    print(f"{len(pixels)} images and grid.png in {out}")


if __name__ == "__main__":
    cli.run(main)
