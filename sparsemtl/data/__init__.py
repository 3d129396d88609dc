"""Datasets: what they yield (base), procedural rooms (scenes), and the registry."""

from __future__ import annotations

from collections.abc import Sequence

from sparsemtl.data.base import (
    DataError,
    DataSpec,
    MultitaskDataset,
    MultitaskSample,
    TargetSpec,
    collate,
)
from sparsemtl.data.scenes import Scenes, ScenesConfig

DataConfig = ScenesConfig
DATASETS: dict[str, type[DataConfig]] = {"scenes": ScenesConfig}


def build_dataset(
    config: DataConfig, split: str = "train", tasks: Sequence[str] | None = None
) -> MultitaskDataset:
    return Scenes(config, split, tasks)


__all__ = [
    "DATASETS",
    "DataConfig",
    "DataError",
    "DataSpec",
    "MultitaskDataset",
    "MultitaskSample",
    "Scenes",
    "ScenesConfig",
    "TargetSpec",
    "build_dataset",
    "collate",
]
