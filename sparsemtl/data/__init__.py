"""Datasets: what they yield (base), the registry, and the ways to write, check and wrap them."""

from __future__ import annotations

from collections.abc import Sequence

from sparsemtl.data import nyuv2, scenes, vehiclex
from sparsemtl.data.base import (
    DataError,
    DataSpec,
    MultitaskDataset,
    MultitaskSample,
    Problem,
    TargetSpec,
    collate,
)
from sparsemtl.data.check import CheckReport, check_dataset
from sparsemtl.data.nyuv2 import NYUv2, NYUv2Config
from sparsemtl.data.scenes import Scenes, ScenesConfig
from sparsemtl.data.vehiclex import VehicleX, VehicleXConfig
from sparsemtl.data.vehiclex_write import VehicleXMiniature, write_vehiclex
from sparsemtl.data.wrap import as_multitask
from sparsemtl.data.write import write_dataset
from sparsemtl.errors import unknown_choice

DataConfig = ScenesConfig | NYUv2Config | VehicleXConfig
DATASETS: dict[str, type[ScenesConfig] | type[NYUv2Config] | type[VehicleXConfig]] = {
    "scenes": ScenesConfig,
    "nyuv2": NYUv2Config,
    "vehiclex": VehicleXConfig,
}


def dataset_config(
    name: str,
) -> type[ScenesConfig] | type[NYUv2Config] | type[VehicleXConfig]:
    """The config class of a dataset.   raises: ValueError listing the choices"""
    if name not in DATASETS:
        raise ValueError(unknown_choice("dataset", name, DATASETS))
    return DATASETS[name]


def build_dataset(
    config: DataConfig, split: str = "train", tasks: Sequence[str] | None = None
) -> MultitaskDataset:
    """The samples of one split.

    split:  "train", "val" or "test"    tasks: names among the dataset's targets; None for all
    raises: ValueError on an unknown split or task (the choices are listed), TypeError on another
            config, DataError if the data cannot be read or the split is empty
    """
    if isinstance(config, ScenesConfig):
        return Scenes(config, split, tasks)
    if isinstance(config, NYUv2Config):
        return NYUv2(config, split, tasks)
    if isinstance(config, VehicleXConfig):
        return VehicleX(config, split, tasks)
    names = [cls.__name__ for cls in DATASETS.values()]
    raise TypeError(f"build_dataset: Expected a config of {names}, got {type(config).__name__}")


def count_frames(config: DataConfig) -> dict[str, int]:
    """Frames of "train", "val" and "test"; 0 for a split that would be empty."""
    if isinstance(config, ScenesConfig):
        return scenes.frame_counts(config)
    if isinstance(config, VehicleXConfig):
        return vehiclex.frame_counts(config)
    return nyuv2.frame_counts(config)


__all__ = [
    "DATASETS",
    "CheckReport",
    "DataConfig",
    "DataError",
    "DataSpec",
    "MultitaskDataset",
    "MultitaskSample",
    "NYUv2",
    "NYUv2Config",
    "Problem",
    "Scenes",
    "ScenesConfig",
    "TargetSpec",
    "VehicleX",
    "VehicleXConfig",
    "VehicleXMiniature",
    "as_multitask",
    "build_dataset",
    "check_dataset",
    "collate",
    "count_frames",
    "dataset_config",
    "write_dataset",
    "write_vehiclex",
]
