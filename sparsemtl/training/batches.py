"""Which samples a step sees: a function of (seed, step) alone, so resuming needs no sampler state.

The stream is one random permutation of the training set after another, cut into full batches; a
sample's augmentation is seeded by (seed, epoch, index) in its data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sparsemtl.data.base import DataError, collate

Place = tuple[int, int]  # (index, epoch)


class BatchStream(Sampler[list[Place]]):
    """Batches number `start`, `start + 1`, … up to `stop`, each a list of (index, epoch).

    part: (number, count) of the process: each takes one of `count` equal runs of every batch
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if size < 1:
            raise ValueError(f"BatchStream: Expected at least one training sample, got {size}")
        if batch_size < 1:
            raise ValueError(f"BatchStream: Expected batch_size >= 1, got {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.stop = start, stop
        self.own = batch_size // part[1]
        self.offset = self.own * part[0]

    def __iter__(self) -> Iterator[list[Place]]:
        for batch in range(self.start, self.stop):
            first = batch * self.batch_size + self.offset
            yield [self._place(p) for p in range(first, first + self.own)]

    def __len__(self) -> int:
        return self.stop - self.start

    def _place(self, position: int) -> Place:
        epoch, offset = divmod(position, self.size)
        return int(_permutation(self.seed, epoch, self.size)[offset]), epoch


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, 1, epoch]).permutation(size)


class _Placed(Dataset[Any]):
    """Addresses a multitask data set by (index, epoch)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, place: Place) -> Any:
        try:
            return self.dataset.sample(*place)
        except DataError as error:  # raised in a worker it would come back as a traceback's text
            return error


def training_batches(
    dataset: Any,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Any]:
    """Collated batches from number `start` on.

    workers: loader processes, 0 for none   part: (number, count) of the process
    """
    stream = BatchStream(len(dataset), batch_size, seed, start, stop, part)
    return _batches(_Placed(dataset), stream, workers)


def evaluation_batches(
    dataset: Any, batch_size: int, workers: int = 0, part: tuple[int, int] = (0, 1)
) -> Iterator[Any]:
    """Every sample once, in order, unaugmented; the last batch may be smaller.

    part: (number, count) of the process: batch i goes to process i modulo count
    """
    places = [(i, 0) for i in range(len(dataset))]
    batches = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
    batches = batches[part[0] :: part[1]]
    return _batches(_Placed(dataset), batches, workers)


def _batches(dataset: Dataset[Any], batches: Any, workers: int) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: the loader otherwise draws from torch's, which dropout shares.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _collate(samples: list[Any]) -> Any:
    """The batch, or the first sample's error, or the error of putting the samples together."""
    errors = [sample for sample in samples if isinstance(sample, DataError)]
    try:
        return errors[0] if errors else collate(samples)
    except DataError as error:
        return error
