"""Batches as a pure function of (seed, step).

All examples that a run will ever read form one stream. With N examples, batches of B and the
permutation pi(seed, epoch), position p = step B + j of the stream holds

    epoch = p // N,    index = pi(seed, epoch)[p mod N],                                       (1)

so an epoch visits each example once, a batch may span two epochs, and nothing is dropped. Process r
of R reads positions j in [r B / R, (r + 1) B / R) of every batch. An example's content depends on
its index and epoch alone: the same run on another number of processes, or resumed at any step, sees
the same batches.

Grain runs eq. 1 and the transforms over batch numbers in threads, ahead of the consumer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import grain
import numpy as np

from diffusion.data import counter
from diffusion.data.sources import Batch, Source
from diffusion.data.transforms import Transform

FOREVER = 2**40  # steps


def process_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    """The part of a global batch that a process reads.

    Raises:
      ValueError: the processes do not divide the batch.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} is not a positive multiple of the {process_count} processes: "
            "change one of them"
        )
    part = batch_size // process_count
    return slice(process_index * part, (process_index + 1) * part)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Eq. 1: `Batches(...)[step]` is this process's part of that step's batch."""

    source: Source
    batch_size: int
    seed: int
    transforms: Sequence[Transform]
    part: slice

    def __getitem__(self, step: int) -> Batch:
        inside = np.arange(self.part.start, self.part.stop)
        epoch, place = np.divmod(int(step) * self.batch_size + inside, len(self.source))
        index = np.empty_like(place)
        for e in np.unique(epoch).tolist():
            index[epoch == e] = counter.permutation(len(self.source), self.seed, e)[
                place[epoch == e]
            ]
        return fetch(self.source, index, epoch, inside, self.transforms)


def fetch(
    source: Source,
    index: np.ndarray,
    epoch: np.ndarray,
    position: np.ndarray,
    transforms: Sequence[Transform],
) -> Batch:
    """The examples `index` in their `epoch`, through the transforms."""
    batch: Batch = {
        **source.batch(index),
        "index": index.astype(np.int64),
        "epoch": epoch.astype(np.int64),
        "position": position.astype(np.int32),
    }
    for transform in transforms:
        batch = transform(batch)
    batch.pop("epoch", None)
    return batch


class Loader:
    """Endless batches for training; an iterator with a state.

    Each is a dict of arrays: what source and transforms give, "index" (int64), and "position"
    (int32), the place within the global batch.

    Args:
      source: where examples come from.
      batch_size: examples a step, over all processes.
      seed: of the order.
      transforms: applied to each batch in turn, in the reading threads.
      process_index, process_count: which part of each batch to read.
      workers: reading threads; 0 reads in the consumer's.
      prefetch: batches read ahead.

    Raises:
      ValueError: no examples, or a batch that the processes do not divide.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        transforms: Sequence[Transform] = (),
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 2,
        prefetch: int = 4,
    ) -> None:
        if not len(source):
            raise ValueError("the data has 0 examples: prepare a set or a split that has some")
        part = process_slice(batch_size, process_index, process_count)
        self.batches = Batches(source, batch_size, seed, tuple(transforms), part)
        self.options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=prefetch)
        self.step = 0
        self._iterator: Any = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            numbers = grain.MapDataset.range(self.step, FOREVER)
            dataset = numbers.map(self.batches.__getitem__)
            self._iterator = iter(dataset.to_iter_dataset(self.options))
        batch = next(self._iterator)
        self.step += 1
        return batch

    def _identity(self) -> dict[str, int]:
        b = self.batches
        return {"seed": b.seed, "batch_size": b.batch_size, "examples": len(b.source)}

    def get_state(self) -> dict[str, int]:
        """Where the next batch is, as JSON: independent of the number of processes."""
        return {"step": self.step, **self._identity()}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from `get_state()` of a loader of the same data.

        Raises:
          ValueError: the state is of another seed, batch size or number of examples.
        """
        for key, value in self._identity().items():
            if state[key] != value:
                raise ValueError(
                    f"the saved data position has {key}={state[key]}, the loader {key}={value}: "
                    "resume with what the run was started with"
                )
        self.close()
        self.step = int(state["step"])

    def close(self) -> None:
        """Stops reading ahead; the next batch starts again where the loader stands."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def one_pass(
    source: Source,
    batch_size: int,
    transforms: Sequence[Transform] = (),
    process_index: int = 0,
    process_count: int = 1,
    epochs: int = 1,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Batch]:
    """Every example in order, once an epoch: for evaluation, and for storing latents.

    Positions p = start .. stop - 1 (default: all `epochs * len(source)`) hold index p mod N of
    epoch p // N. The last batch is padded with repeats of its last example to full size; "valid"
    (bool) marks the real ones.
    """
    part = process_slice(batch_size, process_index, process_count)
    inside = np.arange(part.start, part.stop)
    stop = epochs * len(source) if stop is None else stop
    for first in range(start, stop, batch_size):
        place = first + inside
        epoch, index = np.divmod(np.minimum(place, stop - 1), len(source))
        batch = fetch(source, index, epoch, inside, transforms)
        yield {**batch, "valid": place < stop}


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, the next one made in a thread while this one is used."""
    with futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
