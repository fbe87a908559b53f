"""Images through feature networks, a batch at a time, the rows of a batch split over processes.

A stream yields (index, images): the places of the images in the whole set, and the images. Each
process reads or keeps every R-th row of each batch. What comes out of it is small (a vector an
image); `gather` puts it together on every process, in the order of the set. Nothing is rounded on
the way: arrays travel between processes as bytes, since JAX's own exchange would make float64 into
float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion.metrics.frechet import FeatureStatistics, empty_statistics, merge_all
from experiments.host import cluster

Rows = dict[str, np.ndarray]
Stream = Iterable[tuple[np.ndarray, np.ndarray]]
CHUNK = 4096  # vectors that are accumulated at a time


def split(batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This process's rows of batches that every process has."""
    start, r, count = 0, jax.process_index(), jax.process_count()
    for batch in batches:
        place = np.arange(len(batch))[r::count]
        yield start + place, batch[place]
        start += len(batch)


def through(
    stream: Stream, networks: Mapping[str, Callable[[np.ndarray, np.ndarray], Rows]]
) -> dict[str, Rows]:
    """Rows of every network for all images of the stream, in order, on every process.

    A network is called with (images, index).
    """
    parts: dict[str, list[Rows]] = {name: [] for name in networks}
    places = []
    for index, images in stream:
        if not len(images):
            continue
        places.append(index)
        for name, network in networks.items():
            parts[name].append(network(images, index))
    order = gather(np.concatenate(places) if places else np.zeros(0, np.int64))
    found = {}
    for name, rows in parts.items():
        columns = {k: gather(np.concatenate([part[k] for part in rows])) for k in rows[0]}
        found[name] = {k: column[np.argsort(order)] for k, column in columns.items()}
    return found


def gather(array: np.ndarray) -> np.ndarray:
    """The processes' arrays one after the other, bit for bit; lengths may differ."""
    if jax.process_count() == 1:
        return array
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(array))))
    row = int(np.prod(array.shape[1:])) * array.itemsize
    padded = np.zeros((int(lengths.max()), row), np.uint8)
    padded[: len(array)] = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), row)
    every = np.asarray(multihost_utils.process_allgather(padded))
    parts = [np.ascontiguousarray(e[:n]) for e, n in zip(every, lengths)]
    joined = np.concatenate(parts).view(array.dtype)
    return joined.reshape(-1, *array.shape[1:])


def of_first(names: Sequence[str], measured: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Numbers called `names`, which the first process alone measures; on every process."""
    found = cluster.together(lambda: measured() if cluster.is_first() else {})
    own = [found[name] for name in names] if cluster.is_first() else []
    return dict(zip(names, gather(np.array(own, np.float64)).tolist(), strict=True))


def statistics(vectors: np.ndarray) -> FeatureStatistics:
    """Count, mean and scatter of vectors (n, dim), in float64, some thousands at a time."""
    total = empty_statistics(vectors.shape[1])
    for start in range(0, len(vectors), CHUNK):
        total = total.update(vectors[start : start + CHUNK])
    return total


def gather_statistics(own: FeatureStatistics) -> FeatureStatistics:
    """The statistics of what all processes have seen; the same bits on each."""
    if jax.process_count() == 1:
        return own
    counts = gather(np.array([own.count]))
    means, scatters = gather(own.mean[None]), gather(own.scatter[None])
    return merge_all(FeatureStatistics(int(n), m, s) for n, m, s in zip(counts, means, scatters))
