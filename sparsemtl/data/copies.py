"""A data set with some of its targets under a second name: the same task twice."""

from __future__ import annotations

from collections.abc import Mapping

from sparsemtl.data.base import DataSpec, MultitaskDataset, MultitaskSample


def with_copies(
    dataset: MultitaskDataset, copies: Mapping[str, str], order: list[str]
) -> MultitaskDataset:
    """The same samples with the targets `order`.

    copies: new name → name of the target it repeats
    order:  names of the targets to keep, copies included
    raises: ValueError for a copy of a target that there is not, or a new name that is taken
    """
    check_copies(dataset, copies)
    return _Copies(dataset, copies, order)


def check_copies(dataset: MultitaskDataset, copies: Mapping[str, str]) -> None:
    """raises: ValueError for a copy of a target that there is not, or a new name that is taken"""
    known = list(dataset.spec.targets)
    for name, source in copies.items():
        if source not in known or name in known:
            raise ValueError(
                f"{dataset.spec.name}: Expected a copy NAME=TARGET with a new name and a target of "
                f"{known}, got {name}={source}"
            )


class _Copies(MultitaskDataset):
    def __init__(
        self, dataset: MultitaskDataset, copies: Mapping[str, str], order: list[str]
    ) -> None:
        self._dataset = dataset
        self._source = {name: copies.get(name, name) for name in order}
        targets = {name: dataset.spec.targets[source] for name, source in self._source.items()}
        self.spec = DataSpec(dataset.spec.name, targets, dataset.spec.image_size)
        self.image_normalisation = dataset.image_normalisation

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, index: int, epoch: int = 0) -> MultitaskSample:
        found = self._dataset.sample(index, epoch)
        return MultitaskSample(
            found.image,
            {name: found.targets[source] for name, source in self._source.items()},
            {name: found.valid[source] for name, source in self._source.items()},
            found.index,
        )
