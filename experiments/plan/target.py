"""The real step, compiled by the real compiler of a TPU or of GPUs that are not here.

    python -m experiments.plan --config=C --target=h100:8|v5e:2x4 [--largest_batch] [--json]

The compilers are `requirements-tpu-target.txt`'s and `requirements-gpu-target.txt`'s, the targets
`topology.py`'s; `parallel.fsdp` and `parallel.data` of the config divide them. The process that
compiles is one of its own, since the compilers read their settings when they are loaded. Memory and
kernels are those of the compiled program; the bound by kernel (`hlo.py`) is no forecast: it is what
no run can be faster than, each kernel at the peak or at full bandwidth. Of GPUs, cuDNN's workspaces
are not in the memory, and nothing is tuned by trial.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion import wording
from diffusion.training.parallel import Parallel, check_batch, make_mesh, partition
from experiments.plan import cost, hlo
from experiments.plan.mesh import HARDWARE, abstract_step, shard_bytes
from experiments.plan.topology import Topology, parse
from experiments.run import tasks

LAUNCH_SECS = 2.5e-6  # of a GPU's kernel, at least
UNTILED = "Couldn't find output tile sizes"
SCALARS = 32  # more than a step's metrics: a longer sum carries gradients


# -- compiling, in a process of its own ----------------------------------------------------------


def compiled(config: ConfigDict, topology: Topology) -> dict[str, Any]:
    """What the compiler says of one train step."""
    devices = topology.devices()
    data = config.parallel.data
    mesh = make_mesh(data, config.parallel.fsdp, devices)
    placed = Parallel("jit", mesh)
    task, state, batch, frozen = abstract_step(config, placed)
    step = placed.jitted(task.train_step, jax.tree.map(lambda x: x.sharding, state))
    chip = HARDWARE[topology.kind]
    found: dict[str, Any] = {
        "target": topology.text,
        "mesh": dict(mesh.shape),
        "batch_size": config.train.batch_size,
        "memory_bytes": int(chip.memory),
        "state_bytes": shard_bytes(state),
        "step_flops": cost.flops(task.train_step, state, batch, frozen),
    }
    started = time.perf_counter()
    try:
        program = step.lower(state, batch, frozen).compile()
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
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    found["collectives"] = classed(text, sizes, config.train.batch_size, placed)
    return found


def classed(
    text: str, weights: set[tuple[int, ...]], batch_size: int, placed: Parallel
) -> dict[str, dict[str, int]]:
    """Collectives by what they carry: gradients and weights have a parameter's shape, or a shard's;
    so has a flat sum, into which a GPU's compiler joins many; activations have the examples
    of a device or of all in their first axis; others are scalars."""
    totals = {k: {"count": 0, "bytes": 0} for k in ("gradients", "weights", "activations", "other")}
    shards = weights | {_split(shape, placed.mesh.shape["fsdp"]) for shape in weights}
    examples = {batch_size, batch_size // placed.mesh.size}
    for kernel in hlo.Module(text).kernels():
        if kernel.kind not in hlo.COLLECTIVES:
            continue
        summed = kernel.kind in ("all-reduce", "reduce-scatter")
        flat = summed and any(len(s) == 1 and s[0] > SCALARS for s in kernel.shapes)
        if flat or any(shape in shards and math.prod(shape) > 1 for shape in kernel.shapes):
            name = "gradients" if summed else "weights"
        elif any(len(shape) > 1 and shape[0] in examples for shape in kernel.shapes):
            name = "activations"
        else:
            name = "other"
        totals[name]["count"] += kernel.times
        totals[name]["bytes"] += kernel.times * kernel.result_bytes
    return totals


def _split(shape: tuple[int, ...], fsdp: int) -> tuple[int, ...]:
    spec = partition(shape, fsdp)
    return tuple(n // fsdp if i < len(spec) and spec[i] else n for i, n in enumerate(shape))


# -- the command's side --------------------------------------------------------------------------


def planned(config: ConfigDict, target: str, largest_batch: bool = False) -> dict[str, Any]:
    """The plan for a target; ValueError for one that is not known, or whose mesh does not fit."""
    topology = parse(target)
    data, fsdp = config.parallel.data, config.parallel.fsdp
    if topology.chips % fsdp or (data != -1 and data * fsdp != topology.chips):
        raise ValueError(
            f"--target={target} has {topology.chips} devices, which parallel.data={data} and "
            f"parallel.fsdp={fsdp} do not make up: set parallel.data=-1, and a divisor as fsdp"
        )
    check_batch(config.train.batch_size, config.train.accumulate, topology.chips)
    tasks.task(config)  # whatever the config is wrong in, before a process is started
    found = in_a_process(config, target)
    if largest_batch:
        found["largest_batch"] = _largest(config, target, found)
    return found


def _largest(config: ConfigDict, target: str, first: dict[str, Any]) -> int:
    """By powers of two from the config's; 0 where none fits."""
    best, size, fits = 0, config.train.batch_size, first["fits"]
    grows, least = fits, parse(target).chips * config.train.accumulate
    while fits == grows and (size > least or grows):
        best = size if fits else best
        size = size * 2 if grows else size // 2
        changed = ConfigDict(config.to_dict())
        changed.train.batch_size = size
        fits = in_a_process(changed, target)["fits"]
    return best if grows else (size if fits else 0)


def in_a_process(config: ConfigDict, target: str, triton: bool = True) -> dict[str, Any]:
    """`compiled`. Where XLA finds no tiles for a product that is left to Triton, which on the GPU
    itself trials would decide, all products are cuBLAS's: "triton" says which."""
    environment = parse(target).environment()
    if not triton:
        environment["XLA_FLAGS"] += " --xla_gpu_enable_triton_gemm=false"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan.target"],
        input=json.dumps({"config": config.to_dict(), "target": target}),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    if not done.returncode:
        return json.loads(done.stdout.splitlines()[-1]) | {"triton": triton}
    if triton and UNTILED in done.stderr:
        return in_a_process(config, target, triton=False)
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
    if "largest_batch" in found:
        lines.append(f"largest batch by powers of two: {found['largest_batch']}")
    if not found["fits"]:
        return "\n".join(lines)
    lines.append(
        f"{found['kernels']:,} kernels, {found['copies']:,} of them copies; "
        f"{found['bytes_moved'] / 1e9:,.1f} GB moved, {found['flops'] / 1e12:,.3f} TFLOP"
    )
    for name, one in found["kinds"].items():
        lines.append(f"{one['count']:>7,} {name:<32} {one['bytes'] / 1e9:>8,.2f} GB")
    rate = found["batch_size"] / found["bound_secs"]
    lines.append(
        f"bound by kernel {found['bound_secs'] * 1e3:,.2f} ms a step ({rate:,.0f} examples/s), "
        f"{found['peak_share']:.0%} of the peak"
    )
    for name, entry in found["collectives"].items():
        lines.append(f"{name:<12} {wording.size(entry['bytes']):>12} in {entry['count']}")
    for one in found["dearest"]:
        lines.append(f"{one['secs'] * 1e6:>10,.1f} us  {one['kind']:<18} {one['place'][-90:]}")
    return "\n".join(lines)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(compiled(ConfigDict(asked["config"]), parse(asked["target"]))))
