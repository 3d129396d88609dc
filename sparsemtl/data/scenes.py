"""`scenes`: furnished rooms, ray-cast on demand, with five targets exact to the geometry.

Four more are classes of the whole picture; they have to be named to be had.

A frame is a function of (seed, split, index) and the picture's size alone. Axes of the camera, of
the points and of the normals: x right, y forward (into the picture), z up, as in the published
NYUv2 normal files. Depth is perpendicular (along y) in metres, not along the ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsemtl.data import scene_classes, scene_targets
from sparsemtl.data.base import (
    DataSpec,
    MultitaskDataset,
    MultitaskSample,
    TargetSpec,
    select_tasks,
)
from sparsemtl.data.image import check_normalisation, normalise
from sparsemtl.data.scene_builder import CLASSES
from sparsemtl.data.scene_geometry import Hits, Surface, cast, surface
from sparsemtl.data.scene_paint import paint
from sparsemtl.data.scene_rooms import Room, make_room

SPLITS = ("train", "val", "test")
TARGETS = {
    "segmentation": TargetSpec("segmentation", len(CLASSES), CLASSES),
    "normals": TargetSpec("normals", 3),
    "depth": TargetSpec("depth", 1),
    "keypoints": TargetSpec("keypoints", 1),
    "edges": TargetSpec("edges", 1),
    "dominant_colour": TargetSpec(
        "classification", len(scene_classes.COLOURS), scene_classes.COLOURS
    ),
    "room_type": TargetSpec(
        "classification", len(scene_classes.ROOM_TYPES), scene_classes.ROOM_TYPES
    ),
    "object_count": TargetSpec("classification", len(scene_classes.COUNTS), scene_classes.COUNTS),
    "camera_pose": TargetSpec("classification", len(scene_classes.POSES), scene_classes.POSES),
}
CLASSIFICATION = tuple(name for name, spec in TARGETS.items() if spec.kind == "classification")
DENSE = tuple(name for name in TARGETS if name not in CLASSIFICATION)  # what "all" means


@dataclass(frozen=True)
class ScenesConfig:
    """Procedural rooms, each determined by its index and the seed."""

    height: int = 96  # pixels
    width: int = 128  # pixels
    frames_train: int = 512
    frames_val: int = 64
    frames_test: int = 64
    max_depth: float = 10.0  # metres; anything farther is invalid
    field_of_view: float = 62.0  # degrees, horizontal; about that of the NYUv2 camera
    keypoint_sigma: float = 0.05  # of the height
    edge_sigma: float = 0.03  # of the height
    flip: bool = True  # mirror half of the training samples
    antialias: int = 1  # the picture is averaged over n x n rays per pixel; targets take one ray
    image_normalisation: str = "imagenet"  # caffe_bgr | imagenet | unit
    cache_bytes: int = 256 * 2**20  # rendered frames kept in memory, per process
    seed: int = 0

    def __post_init__(self) -> None:
        whole = (
            "height",
            "width",
            "frames_train",
            "frames_val",
            "frames_test",
            "antialias",
            "seed",
        )
        for name in whole:
            if not isinstance(getattr(self, name), int):
                raise ValueError(
                    f"ScenesConfig: Expected {name} as a whole number, got {getattr(self, name)!r}"
                )
        positive = ("height", "width", "max_depth", "keypoint_sigma", "edge_sigma", "antialias")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"ScenesConfig: Expected {name} > 0, got {getattr(self, name)}")
        for name in ("frames_train", "frames_val", "frames_test", "cache_bytes", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"ScenesConfig: Expected {name} >= 0, got {getattr(self, name)}")
        if not 10.0 <= self.field_of_view <= 120.0:
            raise ValueError(
                f"ScenesConfig: Expected field_of_view in 10..120 degrees, got {self.field_of_view}"
            )
        check_normalisation("ScenesConfig", self.image_normalisation)


@dataclass(frozen=True)
class Frame:
    """One rendered room before normalisation and augmentation.

    image [H, W, 3] uint8 RGB; segmentation [H, W] int64; normals [H, W, 3], depth, keypoints,
    edges [H, W] float32; the four classes of the whole picture [1, 1] int64
    """

    image: npt.NDArray[np.uint8]
    segmentation: npt.NDArray[np.int64]
    normals: npt.NDArray[np.float32]
    depth: npt.NDArray[np.float32]
    keypoints: npt.NDArray[np.float32]
    edges: npt.NDArray[np.float32]
    dominant_colour: npt.NDArray[np.int64]
    room_type: npt.NDArray[np.int64]
    object_count: npt.NDArray[np.int64]
    camera_pose: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())


class Scenes(MultitaskDataset):
    """The rooms of one split as training samples; see ScenesConfig."""

    def __init__(
        self, config: ScenesConfig, split: str = "train", tasks: Sequence[str] | None = None
    ) -> None:
        counts = frame_counts(config)
        if split not in counts:
            raise ValueError(f"scenes: Expected split in {list(counts)}, got {split!r}")
        if counts[split] == 0:
            raise ValueError(f"scenes: Expected frames_{split} >= 1 to use {split!r}, got 0")
        self.config, self.split = config, split
        self.image_normalisation = config.image_normalisation
        targets = select_tasks("scenes", TARGETS, DENSE if tasks is None else tasks)
        self.spec = DataSpec("scenes", targets, (config.height, config.width))
        self._frames: dict[int, Frame] = {}
        self._cached = 0

    def __len__(self) -> int:
        return frame_counts(self.config)[self.split]

    def frame(self, index: int) -> Frame:
        """The rendered room of `index`, from memory when it is still there."""
        index = self._checked_index(index)
        frame = self._frames.get(index)
        if frame is None:
            frame = render(self.config, self.split, index)
            if self._cached + frame.nbytes <= self.config.cache_bytes:
                self._frames[index] = frame
                self._cached += frame.nbytes
        return frame

    def sample(self, index: int, epoch: int = 0) -> MultitaskSample:
        index = self._checked_index(index)
        frame = self.frame(index)
        mirrored = False
        if self.split == "train" and self.config.flip:
            key = np.random.SeedSequence(self.config.seed, spawn_key=(len(SPLITS), epoch, index))
            mirrored = bool(np.random.default_rng(key).random() < 0.5)
        targets = {task: _target(frame, task) for task in self.spec.targets}
        everywhere = torch.ones(frame.depth.shape, dtype=torch.bool)
        once = torch.ones(1, 1, dtype=torch.bool)
        valid = {t: (once if t in CLASSIFICATION else everywhere).clone() for t in targets}
        if "depth" in targets:
            valid["depth"] = targets["depth"][0] <= self.config.max_depth
            targets["depth"] = targets["depth"] * valid["depth"]
        image = torch.from_numpy(frame.image).permute(2, 0, 1)
        if mirrored:
            image, targets, valid = _mirror(image, targets, valid)
        image = normalise(image, self.config.image_normalisation).contiguous()
        return MultitaskSample(image, targets, valid, index)

    def __getstate__(self) -> dict[str, object]:
        """Workers and copies render their own frames: the cache stays behind."""
        return {**self.__dict__, "_frames": {}, "_cached": 0}


def frame_counts(config: ScenesConfig) -> dict[str, int]:
    """Frames of each split."""
    return {"train": config.frames_train, "val": config.frames_val, "test": config.frames_test}


def room_of(config: ScenesConfig, split: str, index: int) -> Room:
    """The room behind a frame: solids, paint, lights and camera."""
    return make_room(_generator(config, split, index), config.field_of_view)


def render(config: ScenesConfig, split: str, index: int) -> Frame:
    """Render frame `index` of `split`, without cache, normalisation or augmentation."""
    generator = _generator(config, split, index)
    room = make_room(generator, config.field_of_view)
    height, width, fine = config.height, config.width, config.antialias
    camera = room.camera
    hits = cast(room.solids, camera, height, width)
    seen = surface(room.solids, camera, hits)
    points = camera.rays(height, width) * hits.depth.reshape(height, width, 1)
    normals = camera.to_camera(seen.normal).reshape(height, width, 3)
    depth = hits.depth.reshape(height, width)
    if fine == 1:
        image = _picture(room, generator, height, width, hits, seen)
    else:
        image = _picture(room, generator, height * fine, width * fine)
        blocks = image.reshape(height, fine, width, fine, 3)
        image = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
    return Frame(
        image,
        scene_targets.segmentation(room, hits, seen).reshape(height, width),
        normals.astype(np.float32),
        depth.astype(np.float32),
        scene_targets.keypoints(room.solids, camera, depth, config.keypoint_sigma * height),
        scene_targets.edges(points, normals, config.edge_sigma * height),
        *(
            np.array([[label]], dtype=np.int64)
            for label in (
                scene_classes.dominant_colour(room, hits, seen),
                scene_classes.room_type(room, hits),
                scene_classes.object_count(room, hits),
                scene_classes.camera_pose(room),
            )
        ),
    )


def _picture(
    room: Room,
    generator: np.random.Generator,
    height: int,
    width: int,
    hits: Hits | None = None,
    seen: Surface | None = None,
) -> npt.NDArray[np.uint8]:
    if hits is None or seen is None:
        hits = cast(room.solids, room.camera, height, width)
        seen = surface(room.solids, room.camera, hits)
    world = room.camera.position + hits.depth[:, None] * hits.ray
    noise = generator.standard_normal((height * width, 3), dtype=np.float32)
    return paint(room, hits, seen, world, noise).reshape(height, width, 3)


def _target(frame: Frame, task: str) -> Tensor:
    array = torch.from_numpy(getattr(frame, task))
    if array.dtype == torch.int64:
        return array.clone()
    if task == "normals":
        return array.permute(2, 0, 1).contiguous()
    return array[None].clone()


def _mirror(
    image: Tensor, targets: dict[str, Tensor], valid: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Left becomes right: every map is mirrored and the normals' x changes sign."""
    targets = {task: target.flip(-1) for task, target in targets.items()}
    if "normals" in targets:
        targets["normals"][0].neg_()
    if "camera_pose" in targets:
        pose = scene_classes.mirrored_pose(int(targets["camera_pose"]))
        targets["camera_pose"] = torch.full((1, 1), pose)
    return image.flip(-1), targets, {task: mask.flip(-1) for task, mask in valid.items()}


def _generator(config: ScenesConfig, split: str, index: int) -> np.random.Generator:
    key = np.random.SeedSequence(config.seed, spawn_key=(SPLITS.index(split), index))
    return np.random.Generator(np.random.PCG64(key))
