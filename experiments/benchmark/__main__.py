r"""How fast a config runs here, alone or against Diffusers with PyTorch on the same machine.

    python -m experiments.benchmark --suite=train|sample|autoencoder|compile --config=configs/X.py \
        --batch=32 [--peer=diffusers] [--rounds=5] [--out=FILE.json] [--plot=FILE.png]
    python -m experiments.benchmark --suite=data|checkpoint|attention|growth --config=configs/X.py
    python -m experiments.benchmark --suite=pictures --workdir=STUDENT,TEACHER --steps=1,4

With a peer the two sides alternate in fresh processes (A, B, A, B, ...), `--rounds` times each, on
the same weights and inputs, and nothing is timed before the gate: the peer loads the weights that
we wrote and must give our output, our gradient and our samples in float32, or the ratio is void.

train        the U-Net's whole step: noise, forward, backward, clipping, AdamW, EMA; the condition
             is given, so that text encoders are no part of it
autoencoder  the first stage's whole step, without its discriminator and LPIPS
sample       DDIM, all steps, guided where there is a context
compile      the first step: with an empty compilation cache (cold) and with a filled one (warm)
features     Inception's features of uint8 images, as FID takes them; --peer=pytorch-fid; no config
data         the input pipeline of a config's prepared data, and the step fed by it
checkpoint   saving and restoring the state, and what the hashes of the manifest add
pictures     of trained runs, as they are sampled, a second (`pictures.py`)
attention    kernels by length, on accelerators that have more than one
device       all that a machine with an accelerator owes, in --budget_secs (`device.py`)
growth       the step's time by batch (a + b B), by side, and by devices with their collectives

A ratio is ours/peer in examples a second, of medians over all timed calls of all rounds. MFU is the
FLOPs of the traced program (`experiments/plan/cost.py`) over the time and over the
measured speed of a square matrix product on the same device. Peak memory is the device's; on CPU
the growth of the resident set, XLA's compiler included, and beside it the bytes of all buffers of
the compiled program (`buffer_bytes`): arguments, results and temporaries.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from diffusion import files
from diffusion.training.parallel import check_batch
from diffusion.wording import Progress
from experiments.benchmark import alone, device, growth, pictures, show
from experiments.benchmark.workload import describe, summary
from experiments.host import cli
from experiments.run import build

PEERS = {
    "diffusers": "experiments.benchmark.peer",
    "pytorch-fid": "experiments.benchmark.features_peer",
}
OURS = "experiments.benchmark.ours"
COMPARED = ("train", "sample", "autoencoder", "compile")
FEATURES = "features"  # the suite, whose peer is pytorch-fid
GROWTH, PICTURES = "growth", "pictures"
ENVIRONMENT = ("GLIBC_TUNABLES", "XLA_FLAGS")  # what both sides inherit, and the JSON says
GATE = {"output": 1e-4, "gradient": 1e-3, "sampled": 1e-3}  # relative, float32


def benchmark(work: dict[str, Any], peer: str | None, rounds: int) -> dict[str, Any]:
    """Gate, then `rounds` alternations; see the module's docstring."""
    cold = work["suite"] == "compile"
    mine = "experiments.benchmark.features" if work["suite"] == FEATURES else OURS
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        sides = {"ours": mine} | ({peer: PEERS[peer]} if peer else {})
        prepared = run(mine, "prepare", work, directory)
        gate = _gate(run(PEERS[peer], "gate", work, directory), prepared) if peer else None
        found: dict[str, list] = {name: [] for name in sides}
        progress = Progress("rounds", rounds, every_secs=0)
        for i in range(rounds):
            for name, module in sides.items():
                # A compile suite fills a cache anew in every even round, and finds it in the next.
                where = directory / f"cache_{i // 2 if cold else 0}"
                found[name].append(run(module, "measure", work, directory, where))
                progress.at(i + 1, name)
        progress.close()
        ceiling = run(mine, "ceiling", work, directory)
    results = {name: _side(work, prepared, ceiling, of, cold) for name, of in found.items()}
    out = {**_shown(work), **prepared, "gate": gate, "ceiling": ceiling, "sides": results}
    if peer and gate["passed"]:
        fast, slow = (results[n]["examples_per_sec"]["median"] for n in ("ours", peer))
        out["ratio"] = fast / slow
        out["memory_ratio"] = results["ours"]["peak_bytes"] / results[peer]["peak_bytes"]
        out["buffer_ratio"] = results["ours"]["buffer_bytes"] / results[peer]["peak_bytes"]
    return out


def run(
    module: str, what: str, work: dict, directory: pathlib.Path, cache: pathlib.Path | None = None
) -> dict[str, Any]:
    """One side in a process of its own."""
    environment = {"JAX_NUM_CPU_DEVICES": str(work["devices"])}  # where there is nothing better
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
    done = subprocess.run(
        [sys.executable, "-m", module, what, str(directory)],
        input=json.dumps(work),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    if done.returncode:
        raise ValueError(f"{module} {what} ended with status {done.returncode}; see above")
    return json.loads(done.stdout.splitlines()[-1])


def _gate(found: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    same = found.get("parameters", prepared["parameters"]) == prepared["parameters"]
    passed = same and all(found[k] < limit for k, limit in GATE.items() if k in found)
    return found | {"limits": GATE, "passed": passed}


def _side(work, prepared, ceiling, rounds, cold) -> dict[str, Any]:
    secs = summary([s for one in rounds for s in one["secs"]])
    rate = {k: work["batch"] / v for k, v in secs.items()}
    per_sec = {"median": rate["median"], "p10": rate["p90"], "p90": rate["p10"]}
    first = [one["first_secs"] for one in rounds]
    firsts = {"cold": first[::2], "warm": first[1::2]} if cold else {"cold": first[:1]}
    if not cold and len(first) > 1:
        firsts["warm"] = first[1:]
    return {
        "examples_per_sec": per_sec,
        "step_secs": secs,
        "round_medians": [summary(one["secs"])["median"] for one in rounds],
        "first_step_secs": {k: summary(v)["median"] for k, v in firsts.items() if v},
        # Compiling takes memory too: of the rounds that find the compilation cache filled.
        "peak_bytes": max(one["peak_bytes"] for one in rounds[1:] or rounds),
        "resident_bytes": max(one["resident_bytes"] for one in rounds[1:] or rounds),
        "buffer_bytes": rounds[0].get("buffer_bytes"),
        "mfu": prepared["flops"] / secs["median"] / ceiling["matmul_flops_per_sec"],
        "device": rounds[0]["device"],
        "versions": rounds[0]["versions"],
    }


def _shown(work: dict[str, Any]) -> dict[str, Any]:
    """The workload as it is reported: all but the config, which its command names."""
    return {k: v for k, v in work.items() if k != "config"}


def fitted(config: ConfigDict) -> tuple[ConfigDict, dict[str, Any]]:
    """The config as both sides can run it, and what that changed; so without a peer as well."""
    changed = {}
    config = ConfigDict(config.to_dict())
    if config.task == "denoiser" and getattr(build.denoiser_network(config), "pool_context", False):
        config.model.denoiser.pool_context = False  # Diffusers has no such thing
        changed["model.denoiser.pool_context"] = False
    if config.task == "autoencoder" and build.autoencoder(config.model.autoencoder).patch > 1:
        # Nor this one, which is a reshaping of its images before and after: the same network is
        # given the images reshaped.
        patch, space = config.model.autoencoder.patch, build.image_shape(config)[:-1]
        changed["model.autoencoder.patch"] = config.model.autoencoder.patch = 1
        changed["data.image_size"] = config.data.image_size = space[0] // patch
        changed["data.channels"] = config.data.channels * patch ** len(space)
        config.data.channels = config.model.autoencoder.image_channels = changed["data.channels"]
    return config, changed


def define(add: cli.Flags) -> None:
    add.config()
    suites = [*COMPARED, FEATURES, *alone.SUITES, GROWTH, PICTURES, device.SUITE]
    add.add("enum", "suite", "train", "What is measured.", suites)
    add.add("string", "peer", None, f"{', '.join(PEERS)}: measured beside us.")
    add.add("integer", "batch", None, "Examples a call; default: the config's train.batch_size.")
    add.add("integer", "rounds", 5, "Fresh processes of each side.")
    add.add("integer", "warmup", 3, "Calls before the timed ones, after the first.")
    add.add("integer", "repeats", 20, "Timed calls (or groups of --sync_every) of a process.")
    add.add("integer", "sync_every", 1, "Calls between two waits; 10 on accelerators.")
    add.add("list", "workdir", None, "Of --suite=pictures: trained runs.")
    add.add("list", "steps", None, "Of --suite=pictures: of the first run; default: its config's.")
    add.add("integer", "sample_steps", 50, "Of --suite=sample.")
    add.add("float", "guidance_scale", 7.5, "Of --suite=sample, where there is a context.")
    add.add("integer", "seed", 0, "Of weights and inputs.")
    add.add("integer", "side", 32, "Pixels a side of the images of --suite=features.")
    add.add("integer", "devices", 1, "That our side splits a batch over; CPUs: one a core, say.")
    modes = ["", "default", "reduce-overhead", "max-autotune"]
    add.add("enum", "peer_compile", "", "torch.compile's mode; empty: eager.", modes)
    add.add("bool", "peer_channels_last", False, "Channels-last memory for the peer.")
    add.add("string", "out", None, "A JSON file of all numbers; of --suite=device a folder.")
    add.add("float", "budget_secs", 500.0, "Of --suite=device: when it stops.")
    add.add("bool", "smoke", False, "Of --suite=device: at the sizes of smoke.")
    add.add("string", "plot", None, "A PNG of examples a second.")


def main(values: flags.FlagValues) -> None:
    for name in ("rounds", "repeats", "sync_every", "sample_steps", "devices"):
        if values[name].value < 1:
            raise ValueError(f"--{name}={values[name].value} must be at least 1")
    if values.peer is not None and values.peer not in PEERS:
        raise ValueError(f"--peer={values.peer} is unknown: use one of {', '.join(PEERS)}")
    if values.peer is not None and (values.peer == "pytorch-fid") != (values.suite == FEATURES):
        raise ValueError(f"--peer={values.peer} does not measure --suite={values.suite}")
    if values.suite == device.SUITE:
        if not values.out:
            raise ValueError("--suite=device needs --out=DIR, where a JSON a row is kept")
        device.device(pathlib.Path(values.out), values.budget_secs, values.smoke)
        return
    if values.suite == FEATURES:
        work = _sizes(values) | {"suite": FEATURES, "batch": values.batch or 50}
        work |= {"dtype": "float32", "side": values.side}
        check_batch(work["batch"], 1, values.devices)
        found = benchmark(work, values.peer, values.rounds)
    elif values.suite in alone.SUITES:
        config = cli.require(values, "config")
        found = alone.SUITES[values.suite](config, values.batch, values.repeats)
    elif values.suite == PICTURES:
        runs, steps = cli.require(values, "workdir"), cli.numbers(values, "steps", int)
        batch = values.batch or 64
        found = pictures.pictures(runs, steps, batch, values.rounds, values.seed)
    elif values.suite == GROWTH:
        config, _ = fitted(cli.require(values, "config"))
        options = _sizes(values) | {"sample_steps": 1, "guidance_scale": 1.0, "peer_options": {}}
        batch = values.batch or config.train.batch_size
        found = growth.growth(config, batch, values.rounds, options, run)
    else:
        found = _compared(cli.require(values, "config"), values)
    found["command"] = " ".join(["python -m experiments.benchmark", *sys.argv[1:]])
    found["environment"] = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if values.out:
        files.write_json(pathlib.Path(values.out), found)
    if values.plot:
        show.plot(pathlib.Path(values.plot), found)
    print(show.table(found))
    if found.get("gate") and not found["gate"]["passed"]:
        raise ValueError(f"the two sides do not compute the same: {found['gate']}; no ratio")


def _sizes(values: flags.FlagValues) -> dict[str, int]:
    names = ("warmup", "repeats", "sync_every", "seed", "devices")
    return {name: values[name].value for name in names}


def _compared(config: ConfigDict, values: flags.FlagValues) -> dict[str, Any]:
    wanted = "autoencoder" if values.suite == "autoencoder" else "denoiser"
    if config.task != wanted:
        raise ValueError(
            f"--suite={values.suite} is of a config with task={wanted!r}, not {config.task!r}"
        )
    check_batch(values.batch or config.train.batch_size, 1, values.devices)
    config, changed = fitted(config)
    work = describe(
        config,
        values.suite,
        batch=values.batch or config.train.batch_size,
        sample_steps=values.sample_steps,
        guidance_scale=values.guidance_scale,
        **_sizes(values),
        peer_options={"compile": values.peer_compile, "channels_last": values.peer_channels_last},
    )
    return benchmark(work | {"changed": changed}, values.peer, values.rounds)


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
