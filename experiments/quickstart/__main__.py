"""From nothing to pictures by one command: of the default job's digits, or of a folder of yours.

    python -m experiments.quickstart [--workdir=runs/quickstart] [--smoke]
    python -m experiments.quickstart --images=FOLDER [--minutes=15] [--workdir=runs/NAME]

FOLDER holds pictures of 32 to 512 pixels; with captions (a metadata.jsonl of file_name and text, or
a .txt beside each), a sub-folder a class, or neither. Looks at it, chooses sizes that fit it, the
device and the minutes, and says so; trains, samples held-out captions, measures. Leaves in the
workdir config.py (the choices, to keep and edit), ldm/ or pixel/ (the denoiser's run), samples.png,
results.json and report.html. Run again after an interruption, it goes on where it stopped.
"""

import os
import pathlib
import sys
import time

import jax
from absl import flags

from experiments.host import cli
from experiments.quickstart import digits, folder, stages
from experiments.train import INTERRUPTED


def define(add: cli.Flags) -> None:
    add.add("string", "images", None, "A folder of your pictures; without it, digits.")
    add.add("float", "minutes", 15.0, "For everything, with --images.")
    add.add("string", "workdir", None, "Folder of the results.")
    add.add("bool", "smoke", False, "Without --images: every stage for a few steps, no quality.")
    add.add("integer", "started", None, "Unix time at which the installation began.")
    add.add("integer", "seed", 0, "Of every stage.")


def keep_compiled(directory: pathlib.Path) -> None:
    """Compilation is a good part of a short job: what one run compiled, the next one reads."""
    jax.config.update("jax_compilation_cache_dir", str(directory))


def main(values: flags.FlagValues) -> int:
    if values.images is not None and values.smoke:
        raise ValueError("--smoke is of the default job: give --minutes=2 with --images")
    if values.images is None and values["minutes"].present:
        raise ValueError(f"--minutes={values.minutes:g} needs --images: the default job is fixed")
    setup_secs = time.time() - values.started if values.started else 0.0
    name = (
        "quickstart" if values.images is None else pathlib.Path(os.path.abspath(values.images)).name
    )
    root = pathlib.Path(values.workdir or f"runs/{name}")
    keep_compiled(root.parent / ".jax_cache")
    try:
        if values.images is None:
            digits.main(root, values.smoke, values.seed, setup_secs)
        else:
            folder.main(pathlib.Path(values.images), root, values.minutes, values.seed, setup_secs)
    except stages.Stopped as stopped:
        print(f"stopped; {stopped} is saved: run the same command to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
