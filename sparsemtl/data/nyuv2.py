"""NYUv2 from disk, in either published layout.

Axes of decoded normals are those of the files: red = x right, green = y forward (into the picture),
blue = z up; they face the camera, so y is mostly negative.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsemtl.data.augment import (
    AUGMENTATIONS,
    RawFrame,
    View,
    apply_view,
    central_view,
    draw_view,
    resized_view,
)
from sparsemtl.data.base import (
    NORMALS_SPACES,
    DataError,
    DataSpec,
    MultitaskDataset,
    MultitaskSample,
    TargetSpec,
    select_tasks,
)
from sparsemtl.data.image import check_normalisation
from sparsemtl.data.nyuv2_files import (
    Layer,
    read_depth,
    read_image,
    read_normals,
    read_segmentation,
    refuse,
)
from sparsemtl.data.nyuv2_labels import NAMES_13, NAMES_40
from sparsemtl.data.nyuv2_layouts import (
    LAYOUTS,
    LIST_KEYS,
    FrameFiles,
    Listing,
    find_layout,
    list_frames,
    split_frames,
)

LIST_FILE = "nyu_v2_3task.json"
CROP = (321, 321)  # of the adashare layout; the mtan layout trains on whole frames
ON_ERROR = ("raise", "skip")
TRAINING_SPLITS = ("train", "train1", "train2")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NYUv2Config:
    """NYUv2 frames below `root`; the defaults are the papers' definitions."""

    root: str = ""
    layout: str = "auto"  # auto | adashare | mtan
    list_file: str = LIST_FILE  # the adashare layout's json
    classes: int = 13  # 13 (papers) | 40 (released code)
    normals: str = (
        "decoded"  # decoded (angles between normals) | encoded (0..255 BGR, released code)
    )
    augmentation: str = "geometric"  # geometric | as_published | none
    scale: tuple[float, float] = (0.5, 1.5)  # range of the zoom
    crop: tuple[int, int] | None = (
        None  # (H, W) pixels; None: 321 x 321 (adashare), whole frame (mtan)
    )
    eval_resize: tuple[int, int] | None = None  # (321, 321) is the AdapMTL release, distorted
    image_normalisation: str = "caffe_bgr"  # caffe_bgr | imagenet | unit
    val_fraction: float = 0.05  # of train, held out where the list has no val; 0: none
    on_error: str = (
        "raise"  # raise | skip: read all frames first, leave out and report the bad ones
    )
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "layout": ("auto", *LAYOUTS),
            "classes": (13, 40),
            "normals": NORMALS_SPACES,
            "augmentation": AUGMENTATIONS,
            "on_error": ON_ERROR,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"NYUv2Config: Expected {name} in {allowed}, got {getattr(self, name)!r}"
                )
        if len(self.scale) != 2 or not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"NYUv2Config: Expected scale 0 < low <= high, got {self.scale}")
        for name in ("crop", "eval_resize"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise ValueError(f"NYUv2Config: Expected {name} (H, W) with both >= 1, got {size}")
        if not 0.0 <= self.val_fraction < 1.0:
            raise ValueError(
                f"NYUv2Config: Expected 0 <= val_fraction < 1, got {self.val_fraction}"
            )
        if self.seed < 0:
            raise ValueError(f"NYUv2Config: Expected seed >= 0, got {self.seed}")
        if self.layout == "mtan":
            _check_mtan(self)
        check_normalisation("NYUv2Config", self.image_normalisation)


class NYUv2(MultitaskDataset):
    """One split of NYUv2 as samples.

    split:   train | val | test | train1 | train2; only the trainings are augmented and cropped
    skipped: (file, reason) of each frame left out under on_error="skip"
    raises:  DataError naming the file or list if nothing can be read; with on_error="raise" a bad
             file raises when it is read
    """

    def __init__(
        self, config: NYUv2Config, split: str = "train", tasks: Sequence[str] | None = None
    ) -> None:
        listing = open_listing(config)
        if listing.layout == "mtan":
            _check_mtan(config)
        if split not in LIST_KEYS:
            raise ValueError(f"nyuv2: Expected split in {list(LIST_KEYS)}, got {split!r}")
        self.config, self.split, self.layout = config, split, listing.layout
        self.image_normalisation = config.image_normalisation
        self._targets = select_tasks("nyuv2", _target_specs(config), tasks)
        # Decided once for the whole root: a mix of stored and mapped classes would be hard to see.
        self._stored_13 = config.classes == 13 and (Path(config.root) / "seg13").is_dir()
        self.frames = split_frames(listing, split, config.val_fraction, config.seed)
        if not self.frames:
            raise DataError(_empty_split(listing, config, split))
        self.skipped: tuple[tuple[str, str], ...] = ()
        if config.on_error == "skip":
            self._leave_out_bad_frames()
        self.spec = DataSpec("nyuv2", self._targets, self._sample_size())

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, index: int) -> RawFrame:
        """Frame `index` as stored, with the layers of the asked-for tasks.

        raises: DataError naming the file: missing, unreadable, of another size than the image,
                labels out of range, NaN or inf
        """
        return self._read(self.frames[self._checked_index(index)])

    def sample(self, index: int, epoch: int = 0) -> MultitaskSample:
        index = self._checked_index(index)
        frame = self._read(self.frames[index])
        view = self._view(frame.size, index, epoch)
        published = self.split in TRAINING_SPLITS and self.config.augmentation == "as_published"
        image, targets, valid = apply_view(
            frame, view, self.image_normalisation, self.config.normals, as_published=published
        )
        return MultitaskSample(image, targets, valid, index)

    def _view(self, size: tuple[int, int], index: int, epoch: int) -> View:
        config = self.config
        if self.split not in TRAINING_SPLITS:
            return resized_view(config.eval_resize or size)
        window = self._crop() or size
        if config.augmentation == "none":
            return central_view(size, window)
        stream = TRAINING_SPLITS.index(self.split)
        key = np.random.SeedSequence(config.seed, spawn_key=(2, stream, epoch, index))
        return draw_view(np.random.default_rng(key), size, window, config.scale)

    def _crop(self) -> tuple[int, int] | None:
        """The training window, None for the whole frame."""
        if self.config.crop is None and self.layout == "adashare":
            return CROP
        return self.config.crop

    def _sample_size(self) -> tuple[int, int]:
        fixed = self._crop() if self.split in TRAINING_SPLITS else self.config.eval_resize
        if fixed is not None:
            return fixed
        height, width = read_image(self.frames[0].image, self.layout).shape[:2]
        return height, width

    def _read(self, files: FrameFiles) -> RawFrame:
        config, layout = self.config, self.layout
        image = read_image(files.image, layout)
        layers: dict[str, Layer] = {}
        for task in self._targets:
            file: Path = getattr(files, task)
            if task == "segmentation":
                file = stored_13(file) if self._stored_13 else file
                layer = read_segmentation(file, layout, config.classes, stored_13=self._stored_13)
            elif task == "normals":
                layer = read_normals(file, layout, config.normals)
            else:
                layer = read_depth(file)
            if layer.valid.shape != image.shape[:2]:
                expected = f"{list(image.shape[:2])} (H, W) as in {files.image}"
                raise refuse(file, "size", expected, f"{list(layer.valid.shape)}")
            layers[task] = layer
        return RawFrame(image, layers)

    def _leave_out_bad_frames(self) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            reasons = list(pool.map(self._reason_to_skip, self.frames))
        bad = [(files, r) for files, r in zip(self.frames, reasons, strict=True) if r is not None]
        self.skipped = tuple(reason for _, reason in bad)
        for _, text in self.skipped:
            _logger.warning("nyuv2: skipped a frame of %r: %s", self.split, text)
        if len(bad) == len(self.frames):
            raise DataError(
                f"nyuv2: Expected a readable frame in {self.split!r}, got {len(bad)} bad ones; "
                f"the first: {self.skipped[0][1]}"
            )
        self.frames = tuple(f for f, r in zip(self.frames, reasons, strict=True) if r is None)

    def _reason_to_skip(self, files: FrameFiles) -> tuple[str, str] | None:
        try:
            self._read(files)
        except DataError as error:
            file = error.problem.file if error.problem else str(files.image)
            return file, str(error)
        return None


def open_listing(config: NYUv2Config) -> Listing:
    """The frames below the config's root.

    raises: DataError naming the root, the list or its first faulty entry
    """
    if not config.root:
        raise ValueError("NYUv2Config: Expected root to be the folder with NYUv2, got ''")
    root = Path(config.root)
    listing = list_frames(
        root, find_layout(root, config.layout, config.list_file), config.list_file
    )
    # A json without some split fails where that is asked for; a malformed one fails at once.
    # Other files in the mtan folders harm nothing: `check_dataset` reports them.
    broken = [problem for problem in listing.problems if problem.kind == "list"]
    if broken and listing.layout == "adashare":
        raise DataError.of(broken[0])
    return listing


def frame_counts(config: NYUv2Config) -> dict[str, int]:
    """Frames of each split, 0 for one that is empty (before any are skipped)."""
    listing = open_listing(config)
    return {
        split: len(split_frames(listing, split, config.val_fraction, config.seed))
        for split in ("train", "val", "test")
    }


def stored_13(segmentation: Path) -> Path:
    """The 13-class twin of a 40-class file: seg/0001.png -> seg13/0001.png."""
    return segmentation.parent.with_name("seg13") / segmentation.name


def _target_specs(config: NYUv2Config) -> dict[str, TargetSpec]:
    names = NAMES_13 if config.classes == 13 else NAMES_40
    return {
        "segmentation": TargetSpec("segmentation", config.classes, names),
        "normals": TargetSpec("normals", 3, normals_space=config.normals),
        "depth": TargetSpec("depth", 1),
    }


def _check_mtan(config: NYUv2Config) -> None:
    for name, only in (("classes", 13), ("normals", "decoded")):
        if getattr(config, name) != only:
            raise ValueError(
                f"NYUv2Config: Expected {name} = {only!r} with layout mtan, "
                f"which stores nothing else, got {getattr(config, name)!r}"
            )


def _empty_split(listing: Listing, config: NYUv2Config, split: str) -> str:
    text = f"nyuv2: Expected at least one frame in split {split!r} of {listing.source}, got none"
    if split == "val":
        frames = len(listing.frames.get("train", ()))
        text += (
            f" (val_fraction {config.val_fraction} of {frames} training frames); "
            "raise val_fraction or evaluate on 'test'"
        )
    return text
