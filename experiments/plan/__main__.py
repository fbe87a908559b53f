"""What a run costs, without running it: no array is made, so it answers for any size in seconds.

    python -m experiments.plan --config=configs/X.py [--devices=N] [--json]
        [--mesh=data=32,fsdp=8 [--hardware=h100|h200|v5e|v5p|v6e]]
        [--target=h100:8|h200:1|a100:8|v5e:2x4|v6e:4x4|v5p:2x2x1 [--sample] [--largest_batch]]

Parameters per network, FLOPs of one example forward and in a training step, bytes of parameters,
averages and optimiser state on each of N devices (parallel.fsdp shards them). FLOPs are counted
from the traced program, without what no result needs: 2 m n k for each matrix product, and the like
for convolutions; loops count once for each pass. What is not a product is not counted. --mesh
compiles the real train step for so many fake devices: minutes (`experiments/plan/mesh.py`).
--target compiles it by the own compiler of GPUs or TPUs, without one: whether it fits, kernels,
bytes moved, the bound by kernel, collectives by what they carry (`experiments/plan/target.py`);
with --sample not the step but the program that makes `sample.batch_size` pictures, all its steps,
guidance and decoder in it. --largest_batch tries powers of two, with each way to recompute.
"""

import json
import sys

from absl import flags

from diffusion import wording
from experiments.host import cli
from experiments.plan import cost, mesh, target


def define(add: cli.Flags) -> None:
    add.config()
    add.add("integer", "devices", 1, "How many devices to divide the state over.")
    add.add("string", "mesh", None, "data=32,fsdp=8: compile the step for such a mesh.")
    add.add("string", "hardware", None, "With --mesh: a100, h100, h200, v5e, v5p or v6e.")
    add.add("string", "target", None, "h100:8, v5e:2x4: compile the step for such.")
    add.add("bool", "sample", False, "With --target: the program that samples, not the step.")
    add.add("bool", "largest_batch", False, "With --target: search it, by powers of two.")
    add.add("bool", "json", False, "Print one JSON object.")


def main(values: flags.FlagValues) -> None:
    config = cli.require(values, "config")
    for name in ("sample", "largest_batch"):
        if values[name].value and (values.target is None or values.mesh or values.hardware):
            raise ValueError(f"--{name} is of --target=h100:1, say, without --mesh: give that")
    if values.mesh or values.hardware:
        found = mesh.planned(config, values.devices, values.mesh, values.hardware)
        print(json.dumps(found, indent=2) if values.json else mesh.show(found))
        return
    if values.target is not None:
        found = target.planned(config, values.target, values.largest_batch, values.sample)
        print(json.dumps(found, indent=2) if values.json else target.show(found))
        return
    found = cost.plan(config, values.devices)
    if values.json:
        print(json.dumps(found, indent=2))
        return
    for name, network in found["networks"].items():
        print(f"{name:<16} {network['parameters']:>15,} parameters")
    flops = found["flops_per_example"]
    print(f"{'forward':<16} {flops['forward'] / 1e9:>15,.3f} GFLOP an example")
    print(f"{'training':<16} {flops['train'] / 1e9:>15,.3f} GFLOP an example")
    for name, count in found["bytes_per_device"].items():
        print(f"{name:<16} {wording.size(count):>19} on each of {found['devices']} devices")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
