"""The real step, compiled by the real compiler of a TPU or of GPUs that are not here.

    python -m experiments.plan --config=C --target=h100:8|v5e:2x4 [--sample] [--largest_batch]

`--sample`: not the train step but the whole program of `sample` (`sampling.py`).

The compilers are `requirements-tpu-target.txt`'s and `requirements-gpu-target.txt`'s, the targets
`topology.py`'s; `parallel.fsdp` and `parallel.data` of the config divide them. The process that
compiles is one of its own, since the compilers read their settings when they are loaded. Memory and
kernels are those of the compiled program; the bound by kernel (`hlo.py`) is no forecast: it is what
no run can be faster than, each kernel at the peak or at full bandwidth. Of GPUs, cuDNN's workspaces
are not in the memory, and nothing is tuned by trial.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion import wording
from diffusion.models.unet import REMAT_POLICIES
from diffusion.training.parallel import Parallel, check_batch, make_mesh
from experiments.plan import cost, hlo, provenance, sampling
from experiments.plan.mesh import HARDWARE, abstract_step, shard_bytes
from experiments.plan.topology import Topology, parse
from experiments.run import tasks

LAUNCH_SECS = 2.5e-6  # of a GPU's kernel, at least
UNTILED = "Couldn't find output tile sizes"


# -- compiling, in a process of its own ----------------------------------------------------------


def compiled(config: ConfigDict, topology: Topology, sample: bool = False) -> dict[str, Any]:
    """What the compiler says of one train step, or of the whole program that samples."""
    devices = topology.devices()
    chip = HARDWARE[topology.kind]
    found: dict[str, Any] = {"target": topology.text, "memory_bytes": int(chip.memory)}
    if sample:
        placed = Parallel("jit", make_mesh(devices=devices))
        step, arguments, facts = sampling.program(config, placed)
        found |= {"mesh": dict(placed.mesh.shape), "state_bytes": shard_bytes(arguments[0])}
        found |= {**facts, "step_flops": cost.flops(step, *arguments)}
    else:
        placed = Parallel("jit", make_mesh(config.parallel.data, config.parallel.fsdp, devices))
        task, *arguments = abstract_step(config, placed)
        shardings = jax.tree.map(lambda x: x.sharding, arguments[0])
        step = placed.jitted(task.train_step, shardings)
        found |= {"mesh": dict(placed.mesh.shape), "state_bytes": shard_bytes(arguments[0])}
        found |= {"batch_size": config.train.batch_size}
        found |= {"step_flops": cost.flops(task.train_step, *arguments)}
    started = time.perf_counter()
    try:
        program = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # "Used 21.03G of 15.75G hbm", or "... (7.44T) exceeds available HBM (15.75G)"
        used = re.search(r"(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds)", str(error))
        peak = int(float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1)) if used else None
        return found | {"fits": False, "peak_bytes": peak}
    found["compile_secs"] = round(time.perf_counter() - started, 1)
    memory, text = program.memory_analysis(), program.as_text()
    peak = int(memory.peak_memory_in_bytes)
    found |= {"fits": peak <= chip.memory, "peak_bytes": peak}
    found |= {"temporary_bytes": int(memory.temp_size_in_bytes)}
    found |= {"program_bytes": int(memory.generated_code_size_in_bytes)}
    found |= hlo.summary(text, chip.flops, chip.bandwidth, LAUNCH_SECS if topology.gpu else 0)
    travels = provenance.Flow(text).travels()
    found["collectives"] = provenance.totals(travels)
    networks = arguments[0] if sample else {**arguments[0].params, **arguments[2]}
    return found | {"gathers_a_weight": provenance.gathers(travels, networks)}


# -- the command's side --------------------------------------------------------------------------


def planned(
    config: ConfigDict, target: str, largest_batch: bool = False, sample: bool = False
) -> dict[str, Any]:
    """The plan for a target; ValueError for one that is not known, or whose mesh does not fit."""
    topology = parse(target)
    data, fsdp = config.parallel.data, config.parallel.fsdp
    if sample:
        sampling.check(config)
    elif topology.chips % fsdp or (data != -1 and data * fsdp != topology.chips):
        raise ValueError(
            f"--target={target} has {topology.chips} devices, which parallel.data={data} and "
            f"parallel.fsdp={fsdp} do not make up: set parallel.data=-1, and a divisor as fsdp"
        )
    else:
        check_batch(config.train.batch_size, config.train.accumulate, topology.chips)
    tasks.task(config)  # whatever the config is wrong in, before a process is started
    found = in_a_process(config, target, sample)
    if largest_batch:
        known = {found["batch_size"]: found["fits"]}
        found["largest_batch"] = largest(config, target, sample, known)
    return found


def largest(
    config: ConfigDict, target: str, sample: bool, known: dict[int, bool]
) -> dict[str, int]:
    """{parallel.remat: batch} by powers of two times the least that the devices divide; 0: none.

    From the config's batch, each policy from the last one's. known: what fits as the config is.
    """
    own, least = config.parallel.remat, parse(target).chips
    least, of = (least, "sample") if sample else (least * config.train.accumulate, "train")
    size = least * 2 ** max(0, (config[of].batch_size // least).bit_length() - 1)
    policies = ("none", *REMAT_POLICIES) if config.task == "denoiser" else ("none", "full")
    found: dict[str, int] = {}
    for policy in (own,) if sample else policies:
        changed = ConfigDict(config.to_dict())
        changed.parallel.remat = policy
        asked = known if policy == own else {}
        found[policy] = _by_two(functools.partial(_fits, changed, target, of, asked), size, least)
        size = max(found[policy], least)
    return found


def _fits(config: ConfigDict, target: str, of: str, known: dict[int, bool], size: int) -> bool:
    config[of].batch_size = size
    return known[size] if size in known else in_a_process(config, target, of == "sample")["fits"]


def _by_two(fits: Callable[[int], bool], size: int, least: int) -> int:
    if fits(size):
        while fits(2 * size):
            size *= 2
        return size
    while size > least:
        size //= 2
        if fits(size):
            return size
    return 0


def in_a_process(
    config: ConfigDict, target: str, sample: bool = False, triton: bool = True
) -> dict[str, Any]:
    """`compiled`. Where XLA finds no tiles for a product that is left to Triton, which on the GPU
    itself trials would decide, all products are cuBLAS's: "triton" says which."""
    environment = parse(target).environment()
    if not triton:
        environment["XLA_FLAGS"] += " --xla_gpu_enable_triton_gemm=false"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan.target"],
        input=json.dumps({"config": config.to_dict(), "target": target, "sample": sample}),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    if not done.returncode:
        return json.loads(done.stdout.splitlines()[-1]) | {"triton": triton}
    if triton and UNTILED in done.stderr:
        return in_a_process(config, target, sample, triton=False)
    said = done.stderr.strip().splitlines() or ["no word"]
    named = [line for line in said if re.match(r"[\w.]+(Error|Exception): ", line)]
    raise ValueError(f"--target={target} did not compile: {(named or said)[-1][:500]}")


def show(found: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [f"{found['target']}: mesh {found['mesh']}, batch {found['batch_size']}"]
    peak = found["peak_bytes"]
    verb = "fits" if found["fits"] else "does not fit"
    memory = f"{wording.size(peak) if peak else 'more'} of {wording.size(found['memory_bytes'])}"
    lines.append(f"{verb}: {memory} a device, {wording.size(found['state_bytes'])} of it state")
    for policy, size in found.get("largest_batch", {}).items():
        lines.append(f"largest batch by powers of two, remat {policy}: {size or 'none'}")
    if not found["fits"]:
        return "\n".join(lines)
    lines.append(
        f"{found['kernels']:,} kernels, {found['copies']:,} of them copies; "
        f"{found['bytes_moved'] / 1e9:,.1f} GB moved, {found['flops'] / 1e12:,.3f} TFLOP"
    )
    for name, one in found["kinds"].items():
        lines.append(f"{one['count']:>7,} {name:<32} {one['bytes'] / 1e9:>8,.2f} GB")
    rate, of = found["batch_size"] / found["bound_secs"], ("a step", "examples")
    if "evaluations" in found:
        of = f"for {found['evaluations']} evaluations of the network", "images"
    lines.append(
        f"bound by kernel {found['bound_secs'] * 1e3:,.2f} ms {of[0]} ({rate:,.3g} {of[1]}/s), "
        f"{found['peak_share']:.0%} of the peak"
    )
    for name, entry in found["collectives"].items():
        lines.append(f"{name:<12} {wording.size(entry['bytes']):>12} in {entry['count']}")
    for one in found["dearest"]:
        lines.append(f"{one['secs'] * 1e6:>10,.1f} us  {one['kind']:<18} {one['place'][-90:]}")
    return "\n".join(lines)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    config = ConfigDict(asked["config"])
    print(json.dumps(compiled(config, parse(asked["target"]), asked["sample"])))
