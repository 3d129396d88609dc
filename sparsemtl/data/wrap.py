"""A user's own dataset as ours: any map-style dataset plus a DataSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsemtl.data.base import (
    DataError,
    DataSpec,
    MultitaskDataset,
    MultitaskSample,
    TargetSpec,
    check_sample,
)
from sparsemtl.data.image import check_normalisation


class SizedDataset(Protocol):
    """What `as_multitask` takes: `len(dataset)` and `dataset[index]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def as_multitask(
    dataset: SizedDataset,
    spec: DataSpec,
    *,
    ignore_index: int = 255,
    image_normalisation: str = "unit",
) -> MultitaskDataset:
    """Wrap a dataset that yields MultitaskSample, or dicts {"image": ..., task: ...}.

    A dict holds tensors or numpy arrays: image [3, H, W] floating; segmentation [H, W] whole
    numbers; classification one whole number; normals [3, H, W]; depth, keypoints and edges
    [1, H, W] or [H, W]; and optionally "valid": {task: [H, W] bool}. A task without a mask is
    valid where its label is not `ignore_index`, its class is not negative, its normal is not 0,
    its depth is above 0; keypoints and edges everywhere.

    image_normalisation: what the images already are, so that pictures can be shown
    raises: TypeError if `dataset` has no length or items; each sample is checked when it is read
            and raises DataError naming the index, the task, what was expected and what was found
    """
    for method in ("__len__", "__getitem__"):
        if not hasattr(dataset, method):
            raise TypeError(
                f"as_multitask: Expected a dataset with {method}, got {type(dataset).__name__}"
            )
    check_normalisation("as_multitask", image_normalisation)
    return _Wrapped(dataset, spec, ignore_index, image_normalisation)


class _Wrapped(MultitaskDataset):
    def __init__(
        self, dataset: SizedDataset, spec: DataSpec, ignore_index: int, image_normalisation: str
    ) -> None:
        if len(dataset) == 0:
            raise DataError(f"{spec.name}: Expected at least one sample, got none")
        self.spec, self.image_normalisation = spec, image_normalisation
        self._dataset, self._ignore = dataset, ignore_index

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, index: int, epoch: int = 0) -> MultitaskSample:
        """Sample `index`; a dataset with its own `sample(index, epoch)` is asked for that epoch."""
        index = self._checked_index(index)
        own = getattr(self._dataset, "sample", None)
        item = own(index, epoch) if callable(own) else self._dataset[index]
        who = f"{self.spec.name}[{index}]"
        if not isinstance(item, MultitaskSample):
            item = self._from_mapping(who, item)
        tasks = self.spec.targets
        missing = [task for task in tasks if task not in item.targets or task not in item.valid]
        if missing:
            raise DataError(f"{who}: Expected targets {list(tasks)}, got none for {missing}")
        sample = MultitaskSample(
            item.image,
            {task: item.targets[task] for task in tasks},
            {task: item.valid[task] for task in tasks},
            index,
        )
        check_sample(who, sample, self.spec)
        return sample

    def _from_mapping(self, who: str, item: object) -> MultitaskSample:
        if not isinstance(item, Mapping):
            raise DataError(
                f"{who}: Expected a MultitaskSample or a dict with 'image' and "
                f"{list(self.spec.targets)}, got {type(item).__name__}"
            )
        missing = [key for key in ("image", *self.spec.targets) if key not in item]
        if missing:
            raise DataError(f"{who}: Expected the keys {missing}, got only {list(item)}")
        masks = item.get("valid", {})
        targets, valid = {}, {}
        for task, target_spec in self.spec.targets.items():
            target = _tensor(who, task, item[task])
            target, mask = self._target(who, task, target, target_spec)
            if task in masks:
                mask = _tensor(who, f"valid {task}", masks[task])
            targets[task], valid[task] = _zeroed(target, mask), mask
        image = _tensor(who, "image", item["image"])
        if not image.is_floating_point():
            raise DataError(f"{who}: Expected a floating point image, got {image.dtype}")
        return MultitaskSample(image.to(torch.float32), targets, valid, 0)

    def _target(
        self, who: str, task: str, target: Tensor, spec: TargetSpec
    ) -> tuple[Tensor, Tensor]:
        if spec.kind in ("segmentation", "classification"):
            if spec.kind == "classification" and target.numel() == 1:
                target = target.reshape(1, 1)
            if target.is_floating_point():
                raise DataError(f"{who}: Expected whole labels in {task}, got {target.dtype}")
            target = target.to(torch.int64)
            if spec.kind == "classification":  # any number of classes: 255 may be one
                return target, target >= 0
            return target, target != self._ignore
        target = target.to(torch.float32)
        if target.dim() == 2:
            target = target[None]
        if spec.kind == "normals":
            return target, (target != 0).any(dim=0)
        if spec.kind == "depth":
            return target, ~(target[0] <= 0)  # NaN stays valid, so that the check below meets it
        return target, torch.ones(target.shape[-2:], dtype=torch.bool)


def _zeroed(target: Tensor, mask: Tensor) -> Tensor:
    """0 where invalid; a mask of another shape is left for the check to name."""
    if mask.shape != target.shape[-2:] or mask.dtype != torch.bool:
        return target
    return torch.where(mask, target, torch.zeros((), dtype=target.dtype))


def _tensor(who: str, name: str, value: object) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{who}: Expected {name} as a tensor or an array, got {type(value).__name__}"
        ) from error
