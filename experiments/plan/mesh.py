"""What a step costs on a mesh that is not here: the real train step, compiled for fake devices.

`experiments.plan --devices=256 --mesh=data=32,fsdp=8 [--hardware=h100]` starts this as a process of
its own, since the number of devices must be known before JAX starts; a JSON goes in and one comes
out. Of what it finds

- parameters, averages and optimiser state a device are exact: the shards as they would lie there;
- the collectives and their bytes are those of the compiled module, inside loops times their trip
  counts. XLA for CPU writes a reduce-scatter as an all-reduce and a slice, and does not merge small
  ones, so that a GPU or TPU moves at most these bytes in fewer pieces;
- FLOPs are counted from the step's jaxpr (products and convolutions, loops times their length);
- activations are an ESTIMATE: the temporary buffers of XLA for CPU, which keeps other buffers than
  a GPU's or TPU's compiler, and computes bfloat16 in float32.

The step time is a bound and no forecast: the longest of three times, nothing else taking any.

    compute = FLOPs / (devices x peak),             every FLOP at the bfloat16 peak     (1)
    memory  = 2 x state bytes / memory bandwidth,   state read and written once         (2)
    network = wire bytes / link bandwidth,          a ring, at full speed               (3)

with wire bytes 2 (n - 1)/n B for an all-reduce of B bytes over n devices and (n - 1)/n B for the
others. The link is the one within a node or slice while the mesh fits there, else the network's.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion import wording
from diffusion.training.parallel import AXES, BATCH, Parallel, check_batch, make_mesh, unsharded
from experiments.plan import cost, hlo
from experiments.run import tasks


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Of one device, from its maker's data sheet: dense bfloat16, bytes, bytes a second.

    `link` is one direction, among `together` devices; `network` beyond them.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    together: int
    network: float


# NVIDIA's data sheets of A100 80 GB SXM, H100 SXM and H200 SXM: NVLink 600 and 900 GB/s both ways;
# one adapter a GPU as DGX A100 (200 Gb/s) and DGX H100 (400 Gb/s) have.
# docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e: 1,600 and 4,800 Gb/s a chip; 800 GB/s both
# ways. Among slices: 4 adapters of 200 Gb/s for 8 chips (v6e), taken for the others as well.
HARDWARE = {
    "a100": Hardware(312e12, 80e9, 2.039e12, 300e9, 8, 25e9),
    "h100": Hardware(989e12, 80e9, 3.35e12, 450e9, 8, 50e9),
    "h200": Hardware(989e12, 141e9, 4.8e12, 450e9, 8, 50e9),
    "v5e": Hardware(197e12, 16 * 2**30, 819e9, 200e9, 256, 12.5e9),
    "v5p": Hardware(459e12, 95e9, 2.765e12, 600e9, 8960, 12.5e9),
    "v6e": Hardware(918e12, 32e9, 1.638e12, 400e9, 256, 12.5e9),
}

WHOLE = PartitionSpec()

# -- the plan ------------------------------------------------------------------------------------


def shard_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def abstract_step(config: ConfigDict, placed: Parallel) -> tuple[Any, ...]:
    """The task, and the shapes and shardings that its step takes: state, batch, frozen."""
    task = tasks.task(config)
    state = placed.abstract(task.init, jax.random.key(0))
    frozen = laid(cost.frozen_shapes(config, task, state) | cost.judges(task), placed)
    examples = cost.abstract_batch(config, task, config.train.batch_size)
    return task, state, laid(examples, placed, BATCH), frozen


def laid(tree: Any, placed: Parallel, spec: PartitionSpec = WHOLE) -> Any:
    """Shapes, as they would lie on the mesh: by default whole on every device."""
    sharding = NamedSharding(placed.mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_plan(config: ConfigDict, data: int, fsdp: int) -> dict[str, Any]:
    """What `experiments.plan --mesh` prints, but the hardware; needs data x fsdp devices."""
    placed = Parallel("jit", make_mesh(data, fsdp, jax.devices()[: data * fsdp]))
    task, state, batch, frozen = abstract_step(config, placed)
    started = time.perf_counter()
    step = placed.jitted(task.train_step, jax.tree.map(lambda x: x.sharding, state))
    # Optimising machine code that never runs is most of the time.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compiled = step.lower(state, batch, frozen).compile(compiler_options=options)
    memory = compiled.memory_analysis()
    return {
        "mesh": dict(zip(AXES, (data, fsdp))),
        "batch_size": config.train.batch_size,
        "bytes_per_device": {
            "params": shard_bytes(state.params),
            "ema": shard_bytes((state.ema, state.profiles)),
            "optimizer": shard_bytes(state.opt_state),
            "state": shard_bytes(state),
            "frozen": shard_bytes(frozen),
            "activations_estimate": int(memory.temp_size_in_bytes) if memory else None,
        },
        "unsharded": unsharded(placed.mesh, state),
        "collectives_per_step": hlo.collectives(compiled.as_text()),
        "flops_per_step": cost.flops(task.train_step, state, batch, frozen),
        "compile_secs": round(time.perf_counter() - started, 1),
    }


def roofline(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Equations 1 to 3, in seconds a step, and whether the state fits."""
    device = HARDWARE[name]
    n = math.prod(found["mesh"].values())
    wire = sum(
        (2 if kind == "all-reduce" else 1) * (n - 1) / n * entry["bytes"]
        for kind, entry in found["collectives_per_step"].items()
    )
    link = device.link if n <= device.together else device.network
    state = found["bytes_per_device"]["state"]
    times = {
        "compute": found["flops_per_step"] / (n * device.flops),
        "memory": 2 * state / device.bandwidth,
        "network": wire / link,
    }
    return {
        "hardware": name,
        "secs": times,
        "step_secs": max(times.values()),
        "bound_by": max(times, key=times.__getitem__),
        "examples_per_sec": found["batch_size"] / max(times.values()),
        "state_of_memory": state / device.memory,
    }


def parse_mesh(text: str, devices: int) -> tuple[int, int]:
    """`data=32,fsdp=8` to (32, 8). Raises ValueError when it does not make up the devices."""
    try:
        pairs = [word.split("=") for word in text.split(",")]
        sizes = {"data": 1, "fsdp": 1, **{axis: int(size) for axis, size in pairs}}
    except ValueError as error:
        raise ValueError(f"--mesh={text} is not like data=32,fsdp=8") from error
    if sizes.keys() - set(AXES) or min(sizes.values()) < 1:
        raise ValueError(f"--mesh={text} must give {' and '.join(AXES)} sizes of 1 or more")
    if sizes["data"] * sizes["fsdp"] != devices:
        raise ValueError(
            f"--mesh={text} makes {sizes['data'] * sizes['fsdp']} devices, but --devices={devices}:"
            " their product must be that"
        )
    return sizes["data"], sizes["fsdp"]


def planned(
    config: ConfigDict, devices: int, mesh: str | None, hardware: str | None
) -> dict[str, Any]:
    """The plan of a mesh, with its bounds where hardware is named; in a process of its own."""
    if not mesh:
        raise ValueError(f"--hardware={hardware} needs --mesh=data=D,fsdp=F")
    if hardware is not None and hardware not in HARDWARE:
        raise ValueError(f"--hardware={hardware} is unknown: use one of {', '.join(HARDWARE)}")
    data, fsdp = parse_mesh(mesh, devices)
    check_batch(config.train.batch_size, config.train.accumulate, devices)
    tasks.task(config)  # whatever the config is wrong in, before a process is started
    found = in_a_process(config, data, fsdp)
    return found | ({"roofline": roofline(found, hardware)} if hardware else {})


def in_a_process(config: ConfigDict, data: int, fsdp: int) -> dict[str, Any]:
    """`compile_plan` in a process that has data x fsdp fake devices."""
    asked = {"config": config.to_dict(), "data": data, "fsdp": fsdp}
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(data * fsdp)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan.mesh"],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | devices,
    )
    if done.returncode:
        raise ValueError(f"the step did not compile for {data * fsdp} devices; see above")
    return json.loads(done.stdout.splitlines()[-1])


def show(found: dict[str, Any]) -> str:
    """The plan as text, a line a fact."""
    n = math.prod(found["mesh"].values())
    lines = [f"mesh {found['mesh']}: {n} devices, batch {found['batch_size']}"]
    for name, count in found["bytes_per_device"].items():
        if count is not None:
            lines.append(f"{name:<22} {wording.size(count):>16} a device")
    for kind, entry in found["collectives_per_step"].items():
        lines.append(f"{kind:<22} {wording.size(entry['bytes']):>16} in {entry['count']} a step")
    lines.append(f"{'FLOPs':<22} {found['flops_per_step'] / 1e12:>12,.3f} TFLOP a step")
    if found["unsharded"]:
        lines.append(f"not split: {', '.join(found['unsharded'])}")
    if bound := found.get("roofline"):
        secs = ", ".join(f"{name} {value * 1e3:,.2f}" for name, value in bound["secs"].items())
        lines.append(
            f"{bound['hardware']}: at least {bound['step_secs'] * 1e3:,.2f} ms a step "
            f"({bound['examples_per_sec']:,.0f} examples/s), bound by {bound['bound_by']} "
            f"(ms: {secs}); assumed: bfloat16 peak, state read and written once, ring collectives "
            "at link speed, all three at once"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    planned = compile_plan(ConfigDict(asked["config"]), asked["data"], asked["fsdp"])
    print(json.dumps(planned))
