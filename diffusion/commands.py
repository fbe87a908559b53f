"""The console scripts: `diffusion-train` is `python -m experiments.train`, from any folder.

The commands are the clone's: `pip install -e .` there gives them, and a wheel, which holds the
library alone, says so.
"""

import pathlib
import runpy
import sys


def main() -> int:
    """Runs the command that the script is named after. Status 2 where there is no clone."""
    name = pathlib.Path(sys.argv[0]).stem.removeprefix("diffusion-").replace("-", "_")
    clone = pathlib.Path(__file__).parents[1]
    if not (clone / "experiments" / "host" / "cli.py").is_file():
        text = "the commands are no part of the installed library: `pip install -e .` in a clone"
        print(f"error: {text} of its repository gives them", file=sys.stderr)
        return 2
    if str(clone) not in sys.path:
        sys.path.append(str(clone))
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    return 0
