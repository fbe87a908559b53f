"""The table of `experiments/results/targets`: configs by targets, a JSON a cell.

    python -m experiments.plan.table --out=experiments/results/targets [--budget_secs=600]

Cells are compiled in the order of CELLS, which is that of their worth and cost; one that is there
is not compiled again, and none is begun when the budget is spent (0: none). Then the table is
printed; a cell that was not compiled says so. bfloat16 throughout; eight devices have the config's
batch, one that of ONE; a program that samples (`+sample`) makes the config's `sample.batch_size`.
"""

import importlib
import json
import pathlib
import sys
import time
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from diffusion import files, wording
from experiments.host import cli
from experiments.plan import target

ONE = {  # examples on one device
    "ddpm_cifar10": 512,
    "ldm_imagenet256:f4": 64,
    "stable_diffusion:v1": 32,
    "autoencoder_kl:f8": 8,
    "autoencoder_vq:f4": 8,
    "stable_diffusion:v1,lora": 32,
    "ldm_celebahq256": 24,
    "ddpm_celebahq256": 8,
    "stable_diffusion:v1,controlnet": 16,
}
Cell = tuple[str, str, int | None]
SAMPLED = ("ddpm_cifar10", "ldm_imagenet256:f4", "stable_diffusion:v1")  # +sample: as `--sample`
CELLS: list[Cell] = [
    *(("ddpm_cifar10", "h100:1", batch) for batch in (512, 128)),
    *((name, "h100:1", batch) for name, batch in ONE.items() if batch != 512),
    *((f"{name}+sample", "h100:1", None) for name in SAMPLED),
    ("ddpm_cifar10", "v5e:1x1", 128),
    *((name, "h100:8", None) for name in ONE),
    *((name, kind, None) for kind in ("v5e:2x4", "v6e:2x4") for name in ONE),
]


def config_of(name: str, batch: int | None) -> ConfigDict:
    module, _, argument = name.removesuffix("+sample").partition(":")
    config = importlib.import_module(f"configs.{module}").get_config(argument or None).unlock()
    config.model.dtype = "bfloat16"
    config.train.batch_size = batch or config.train.batch_size
    return config.lock()


def path_of(out: pathlib.Path, name: str, aim: str, batch: int | None) -> pathlib.Path:
    words = [name, aim, str(batch or "config")]
    return out / ("_".join(words).translate(str.maketrans(":,+", "---")) + ".json")


def compile_cells(out: pathlib.Path, budget_secs: float) -> None:
    started = time.monotonic()
    for name, aim, batch in CELLS:
        path = path_of(out, name, aim, batch)
        if path.exists():
            continue
        if time.monotonic() - started >= budget_secs:
            return
        try:
            sample = name.endswith("+sample")
            found = target.planned(config_of(name, batch), aim, sample=sample)
        except ValueError as error:
            print(f"{name} on {aim}: {error}", file=sys.stderr, flush=True)
            continue
        files.write_json(path, {"config": name, **found})
        print(f"{name} on {aim}: {path.name}", flush=True)


def row(name: str, aim: str, batch: int | None, found: dict[str, Any] | None) -> str:
    """One line of the table."""
    size = str(batch) if batch else f"{found['batch_size'] if found else '?'}, the config's"
    start = f"| `{name}` | `{aim}` | {size} |"
    if found is None:
        return f"{start} not compiled |" + " |" * 7
    peak = wording.size(found["peak_bytes"]) if found["peak_bytes"] else "more"
    if "kernels" not in found:
        return f"{start} no, {peak} |" + " |" * 7
    fits = "yes" if found["fits"] else "no"
    fits += "" if found.get("triton", True) else " (no Triton)"
    moved = ", ".join(
        f"{k} {v['count']} of {wording.size(v['bytes'])}"
        for k, v in found["collectives"].items()
        if v["count"]
    )
    launched = found.get("launched_secs") or found["bound_secs"]
    return (
        f"{start} {fits}, {peak} | {found['kernels']:,} | {found['copies']:,} | "
        f"{found['bytes_moved'] / 1e9:,.1f} | {found['bound_secs'] * 1e3:,.1f} "
        f"({launched * 1e3:,.1f}) | {found['batch_size'] / found['bound_secs']:,.0f} | "
        f"{found['peak_share']:.0%} | {moved or 'none'} |"
    )


def table(out: pathlib.Path) -> str:
    lines = [
        "| config | target | batch | fits, peak a device | kernels | copies | GB moved | bound, ms "
        "(with 2.5 us a kernel) | examples/s | share of peak | collectives |",
        "|" + "---|" * 11,
    ]
    for name, aim, batch in CELLS:
        path = path_of(out, name, aim, batch)
        found = json.loads(path.read_text()) if path.exists() else None
        lines.append(row(name, aim, batch, found))
    return "\n".join(lines)


def define(add: cli.Flags) -> None:
    add.add("string", "out", "experiments/results/targets", "The folder of the cells.")
    add.add("float", "budget_secs", 0.0, "No cell is begun after so long.")


def main(values: flags.FlagValues) -> None:
    out = pathlib.Path(values.out)
    compile_cells(out, values.budget_secs)
    print(table(out))


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
