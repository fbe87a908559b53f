"""One of two processes: statistics and order of the same 10,000 vectors, each reading half.

python stream_worker.py ADDRESS INDEX OUT
"""

import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from diffusion.metrics.frechet import empty_statistics
from experiments.evaluate import stream


def vectors():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((10_000, 16)) @ rng.standard_normal((16, 16)) + 100).astype("f4")


def batches(size):
    x = vectors()
    return (x[start : start + size] for start in range(0, len(x), size))


def main(address, index, out):
    jax.distributed.initialize(address, 2, int(index))
    found = {}
    for size in (7, 64, 1000):
        own = empty_statistics(16)
        rows = stream.through(stream.split(batches(size)), {"n": lambda x, i: {"x": x, "i": i}})
        for _, part in stream.split(batches(size)):
            own = own.update(part) if len(part) else own
        whole = stream.gather_statistics(own)
        found |= {f"mean{size}": whole.mean, f"covariance{size}": whole.covariance}
        found |= {f"count{size}": whole.count, f"rows{size}": rows["n"]["x"]}
    measured = {"of_index": int(index), "third": 1 / 3}  # 1/3 is no float32
    found["first"] = list(stream.of_first(("third", "of_index"), lambda: measured).values())
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
