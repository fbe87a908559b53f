"""Our side of `--suite=features`: Inception's features of noise, as the metrics take them.

    python -m experiments.benchmark.features prepare|measure|ceiling DIR < work.json

Weights are random, under the names of the published file, which both sides read.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion import files
from diffusion.interop.inception import load_inception
from diffusion.models.inception import Inception, preprocess
from diffusion.training.parallel import BATCH, make_mesh
from experiments.benchmark.ours import ceiling, memory
from experiments.benchmark.workload import INPUTS, resident_bytes, timed
from experiments.plan import cost

RANDOM = "random.pth"
PREPROCESSING = "pytorch-fid"


def network(params: Any, images: jax.Array) -> jax.Array:
    x = preprocess(images, PREPROCESSING)
    return Inception().apply({"params": params}, x)["pool"]


def prepare(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    from experiments.benchmark.features_peer import write_weights  # PyTorch: not in `measure`

    write_weights(directory / RANDOM)
    side = work["side"]
    shape = (work["batch"], side, side, 3)
    images = np.random.default_rng(work["seed"]).integers(0, 256, shape).astype(np.uint8)
    params = load_inception(directory / RANDOM)[0]
    out = np.asarray(jax.jit(network)(params, images[:2]))
    files.write_arrays(directory / INPUTS, x=images, out=out)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "flops": cost.flops(network, params, images),
    }


def measure(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    before = resident_bytes()
    mesh, call = make_mesh(devices=jax.devices()[: work["devices"]]), jax.jit(network)
    params = jax.device_put(load_inception(directory / RANDOM)[0], NamedSharding(mesh, P()))
    images = jax.device_put(np.load(directory / INPUTS)["x"], NamedSharding(mesh, BATCH))
    held: dict[str, Any] = {}

    def once():
        held["result"] = call(params, images)

    found = timed(once, lambda: jax.block_until_ready(held["result"]), work)
    return found | memory(before, call, (params, images))


if __name__ == "__main__":
    do = {"prepare": prepare, "measure": measure, "ceiling": ceiling}[sys.argv[1]]
    print(json.dumps(do(json.load(sys.stdin), pathlib.Path(sys.argv[2]))))
