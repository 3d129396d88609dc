"""What every dataset yields: an image, a target per task, and a mask of the pixels that count.

B: batch, H W: rows and columns of one sample. A dataset is a function of (index, epoch) and of its
frozen config, so any worker, process or resumed run gets the same bits for the same pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsemtl.data.image import denormalise

TARGET_KINDS = (
    "segmentation",
    "normals",
    "depth",
    "keypoints",
    "edges",
    "classification",
)  # also their order
NORMALS_SPACES = ("decoded", "encoded")
_PLANES = {"normals": 3, "depth": 1, "keypoints": 1, "edges": 1}  # channels of a dense target


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a file or a list.

    kind: missing | unreadable | size | dtype | labels | values | list | duplicate
    """

    file: str
    kind: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: Expected {self.expected}, got {self.found}"


class DataError(ValueError):
    """Bad data: the message names the file or argument, what was expected and what was found."""

    problem: Problem | None = None

    @classmethod
    def of(cls, problem: Problem) -> DataError:
        """An error about one file. A text alone makes it, so that it survives a loader's worker."""
        error = cls(str(problem))
        error.problem = problem
        return error


@dataclass(frozen=True)
class TargetSpec:
    """What one target is.

    kind:          one of TARGET_KINDS
    channels:      of the head that predicts it: classes for segmentation and classification, 3 for
                   normals, else 1
    class_names:   of the classes; empty, or one name per class
    normals_space: "decoded": components in [-1, 1]; "encoded": 0..255 as stored in 8-bit files
    raises:        ValueError naming the field
    """

    kind: str
    channels: int
    class_names: tuple[str, ...] = ()
    normals_space: str = "decoded"

    def __post_init__(self) -> None:
        if self.kind not in TARGET_KINDS:
            raise ValueError(f"TargetSpec: Expected kind in {TARGET_KINDS}, got {self.kind!r}")
        planes = _PLANES.get(self.kind)
        if planes is not None and self.channels != planes:
            raise ValueError(
                f"TargetSpec: Expected channels = {planes} for {self.kind}, got {self.channels}"
            )
        if self.channels < 1:
            raise ValueError(f"TargetSpec: Expected channels >= 1, got {self.channels}")
        if self.class_names and len(self.class_names) != self.channels:
            raise ValueError(
                f"TargetSpec: Expected {self.channels} class_names, got {len(self.class_names)}"
            )
        if self.normals_space not in NORMALS_SPACES:
            raise ValueError(
                f"TargetSpec: Expected normals_space in {NORMALS_SPACES}, "
                f"got {self.normals_space!r}"
            )


@dataclass(frozen=True)
class DataSpec:
    """What a dataset yields: its name, its targets by task name, and the (H, W) of its samples."""

    name: str
    targets: dict[str, TargetSpec]
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError(f"DataSpec: Expected at least one target for {self.name!r}, got none")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(
                f"DataSpec: Expected image_size (H, W) with both >= 1, got {self.image_size}"
            )


class MultitaskSample(NamedTuple):
    """One sample, or one batch (then every tensor has a leading B).

    image:   [3, H, W] float32, normalised as the config says
    targets: segmentation [H, W] int64; normals [3, H, W], depth (metres), keypoints and edges
             [1, H, W] float32; classification [1, 1] int64; 0 wherever invalid, never NaN, 255
             or -1
    valid:   task -> [H, W] bool, [1, 1] for classification, True where the target counts
    index:   the sample's dataset index; int64 [B] in a batch
    """

    image: Tensor
    targets: dict[str, Tensor]
    valid: dict[str, Tensor]
    index: Tensor | int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class MultitaskDataset(Dataset[MultitaskSample]):
    """A map-style dataset whose samples depend on (config, split, index, epoch) alone."""

    spec: DataSpec
    image_normalisation: str = "unit"

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int, epoch: int = 0) -> MultitaskSample:
        """Sample `index` as seen in `epoch`: augmentation is drawn from (seed, epoch, index)."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> MultitaskSample:
        return self.sample(index, epoch=0)

    def rgb(self, image: Tensor) -> Tensor:
        """Undo the normalisation, for pictures: [..., 3, H, W] -> RGB in [0, 1], float32."""
        return denormalise(image, self.image_normalisation)

    def _checked_index(self, index: int) -> int:
        """`index` in 0..len-1; negative ones count from the end, as in a list."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"{self.spec.name}: Expected an index in 0..{size - 1}, got {index}")
        return index % size


def collate(samples: Sequence[MultitaskSample]) -> MultitaskSample:
    """Stack samples into a batch.

    raises: DataError on no samples, or when tasks, shapes or dtypes of the samples differ
    """
    if not samples:
        raise DataError("collate: Expected at least one sample, got none")
    first = samples[0]
    for sample in samples[1:]:
        if list(sample.targets) != list(first.targets):
            raise DataError(
                f"collate: Expected the tasks {list(first.targets)} in every sample, "
                f"got {list(sample.targets)} in sample {sample.index}"
            )
    return MultitaskSample(
        image=_stack("image", [s.image for s in samples]),
        targets={k: _stack(k, [s.targets[k] for s in samples]) for k in first.targets},
        valid={k: _stack(f"valid {k}", [s.valid[k] for s in samples]) for k in first.valid},
        index=torch.tensor([int(s.index) for s in samples], dtype=torch.int64),
    )


def _stack(name: str, tensors: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(t.shape) for t in tensors})
    if len(shapes) > 1:
        raise DataError(
            f"collate: Expected {name} of one shape in a batch, got {shapes}; "
            "frames of different sizes need batch size 1, a crop or eval_resize"
        )
    return torch.stack(tensors)


def select_tasks(
    who: str, available: Mapping[str, TargetSpec], tasks: Sequence[str] | None
) -> dict[str, TargetSpec]:
    """The asked-for targets in the dataset's own order; all of them for None.

    raises: ValueError on an empty list, a repeated or an unknown task (the choices are listed)
    """
    if tasks is None:
        return dict(available)
    if isinstance(tasks, str):
        raise TypeError(f"{who}: Expected tasks as a list of names, got the text {tasks!r}")
    if not tasks:
        raise ValueError(f"{who}: Expected at least one task of {list(available)}, got none")
    unknown = [task for task in tasks if task not in available]
    if unknown:
        raise ValueError(f"{who}: Expected tasks among {list(available)}, got {unknown}")
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"{who}: Expected each task once, got {list(tasks)}")
    return {task: spec for task, spec in available.items() if task in tasks}


def check_sample(who: str, sample: MultitaskSample, spec: DataSpec) -> None:
    """Check one sample against its spec.

    raises: DataError naming the task, what was expected and what was found: missing tasks, wrong
            shapes or dtypes, NaN or inf, labels outside 0..C-1 where valid
    """
    image = sample.image
    if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.float32:
        raise DataError(
            f"{who}: Expected image [3, H, W] float32, got {list(image.shape)} {image.dtype}"
        )
    _check_finite(who, "image", image)
    size = tuple(image.shape[1:])
    for task, target_spec in spec.targets.items():
        if task not in sample.targets or task not in sample.valid:
            raise DataError(
                f"{who}: Expected a target and a valid mask for {task!r}, "
                f"got targets {list(sample.targets)} and masks {list(sample.valid)}"
            )
        _check_target(who, task, sample.targets[task], sample.valid[task], target_spec, size)


def _check_target(
    who: str, task: str, target: Tensor, valid: Tensor, spec: TargetSpec, size: tuple[int, ...]
) -> None:
    labels = spec.kind in ("segmentation", "classification")
    if spec.kind == "classification":
        size = (1, 1)
    shape = size if labels else (_PLANES[spec.kind], *size)
    dtype = torch.int64 if labels else torch.float32
    if tuple(target.shape) != shape or target.dtype != dtype:
        raise DataError(
            f"{who}: Expected {task} {list(shape)} {dtype}, got {list(target.shape)} {target.dtype}"
        )
    if tuple(valid.shape) != size or valid.dtype != torch.bool:
        raise DataError(
            f"{who}: Expected the valid mask of {task} {list(size)} torch.bool, "
            f"got {list(valid.shape)} {valid.dtype}"
        )
    if not labels:
        _check_finite(who, task, target)
        return
    wrong = target[valid & ((target < 0) | (target >= spec.channels))]
    if wrong.numel():
        raise DataError(
            f"{who}: Expected {task} labels in 0..{spec.channels - 1}, "
            f"got {wrong.unique().tolist()[:8]} in {wrong.numel()} pixels"
        )


def _check_finite(who: str, name: str, values: Tensor) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise DataError(f"{who}: Expected finite values in {name}, got {bad} NaN or inf")
