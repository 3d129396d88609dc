"""Vehicle-X, v2 layout: pictures of rendered cars with four classification tasks.

`{train,val,test}/{vehicle:04d}_{camera}_{n}.jpg` and `finegrained_label.xml`, whose items carry
imageName, vehicleID, cameraID, colorID, typeID and more. Names in the XML and files of a split
need not match: what has no partner is left out, and counted.
Source: Yao et al., "Simulating content consistent vehicle datasets with attribute descent".
"""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsemtl.data.base import (
    DataError,
    DataSpec,
    MultitaskDataset,
    MultitaskSample,
    Problem,
    TargetSpec,
    select_tasks,
)
from sparsemtl.data.image import check_normalisation, normalise

log = logging.getLogger(__name__)

LABELS = "finegrained_label.xml"
SPLITS = ("train", "val", "test")
PARENTS = ("", "Classification Task", "vehicle-x_v2/Classification Task")  # root may be above
COLOURS = (
    *("yellow", "orange", "green", "gray", "red", "blue", "white", "golden", "brown", "black"),
    *("purple", "pink"),
)
TYPES = (
    *("sedan", "suv", "van", "hatchback", "mpv", "pickup", "bus", "truck", "estate", "sportscar"),
    "RV",
)
VEHICLES = 1362
AUGMENTATIONS = ("flip_crop", "none")
_CAMERA = re.compile(r"c(\d+)")


@dataclass(frozen=True)
class VehicleXConfig:
    """Vehicle-X below `root`; the paper gives flip, random crop and ImageNet normalisation."""

    root: str = ""
    crop: int | None = 224  # pixels: random when augmenting, else the centre; None: whole pictures
    augmentation: str = "flip_crop"  # flip_crop | none; of train
    image_normalisation: str = "imagenet"  # caffe_bgr | imagenet | unit
    seed: int = 0

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(
                f"VehicleXConfig: Expected augmentation in {AUGMENTATIONS}, "
                f"got {self.augmentation!r}"
            )
        if self.crop is not None and self.crop < 1:
            raise ValueError(f"VehicleXConfig: Expected crop >= 1 or None, got {self.crop}")
        if self.seed < 0:
            raise ValueError(f"VehicleXConfig: Expected seed >= 0, got {self.seed}")
        check_normalisation("VehicleXConfig", self.image_normalisation)


@dataclass(frozen=True)
class Item:
    """One item of the XML; classes from 0, the camera's as its number."""

    name: str
    vehicle: int
    camera: int
    colour: int
    type: int


@dataclass(frozen=True)
class VehicleXFiles:
    """What a folder holds.

    items:     by picture name
    pictures:  split → picture names that have an item, sorted
    unmatched: (file, reason) of what was left out
    problems:  of items that cannot be read
    """

    folder: Path
    items: dict[str, Item]
    pictures: dict[str, tuple[str, ...]]
    unmatched: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]

    @property
    def cameras(self) -> tuple[int, ...]:
        """Numbers of all cameras in the XML, ascending: the classes of the task `camera`."""
        return tuple(sorted({item.camera for item in self.items.values()}))


def find_vehiclex(root: str | Path) -> Path | None:
    """The folder with the XML at or below `root`, None if there is none."""
    for parent in PARENTS:
        if (Path(root) / parent / LABELS).is_file():
            return Path(root) / parent
    return None


def list_vehiclex(root: str | Path) -> VehicleXFiles:
    """Read the XML and list the splits.   raises: DataError without a readable XML"""
    folder = find_vehiclex(root)
    if folder is None:
        expected = f"{LABELS} there or in {list(PARENTS[1:])}"
        raise DataError.of(Problem(str(root), "missing", expected, "none"))
    items, problems = _read_items(folder / LABELS)
    pictures: dict[str, tuple[str, ...]] = {}
    unmatched = []
    for split in SPLITS:
        names = sorted(path.name for path in (folder / split).glob("*.jpg"))
        pictures[split] = tuple(name for name in names if name in items)
        unmatched += [
            (f"{split}/{name}", "no item in the XML") for name in names if name not in items
        ]
    return VehicleXFiles(folder, items, pictures, tuple(unmatched), tuple(problems))


class VehicleX(MultitaskDataset):
    """The pictures of one split; tasks colour, vehicle_type, vehicle and camera."""

    def __init__(
        self, config: VehicleXConfig, split: str = "train", tasks: Sequence[str] | None = None
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"vehiclex: Expected split in {list(SPLITS)}, got {split!r}")
        self.config, self.split = config, split
        self.image_normalisation = config.image_normalisation
        self.files = list_vehiclex(config.root)
        if self.files.problems:
            raise DataError.of(self.files.problems[0])
        self.names = self.files.pictures[split]
        if not self.names:
            raise DataError(
                f"vehiclex: Expected pictures in {self.files.folder / split} that {LABELS} "
                "names, got none"
            )
        self.skipped = [pair for pair in self.files.unmatched if pair[0].startswith(f"{split}/")]
        if self.skipped:
            log.warning("vehiclex: %d pictures of %s have no labels", len(self.skipped), split)
        self._camera = {number: place for place, number in enumerate(self.files.cameras)}
        names = tuple(f"c{number:03d}" for number in self._camera)
        available = {
            "colour": TargetSpec("classification", len(COLOURS), COLOURS),
            "vehicle_type": TargetSpec("classification", len(TYPES), TYPES),
            "vehicle": TargetSpec("classification", VEHICLES),
            "camera": TargetSpec("classification", len(names), names),
        }
        targets = select_tasks("vehiclex", available, tasks)
        if "camera" in targets and len(names) < 2:
            raise DataError(f"vehiclex: Expected at least 2 cameras to tell apart, got {names}")
        height, width = read_picture(self.files.folder / split / self.names[0]).shape[1:]
        if config.crop is not None and config.crop > min(height, width):
            raise ValueError(
                f"VehicleXConfig: Expected crop <= {min(height, width)}, the pictures' size, "
                f"got {config.crop}"
            )
        size = (height, width) if config.crop is None else (config.crop, config.crop)
        self.spec = DataSpec("vehiclex", targets, size)

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int, epoch: int = 0) -> MultitaskSample:
        index = self._checked_index(index)
        name = self.names[index]
        image = read_picture(self.files.folder / self.split / name)
        image = self._augmented(image, index, epoch)
        item = self.files.items[name]
        labels = {
            "colour": item.colour,
            "vehicle_type": item.type,
            "vehicle": item.vehicle,
            "camera": self._camera[item.camera],
        }
        targets = {task: torch.full((1, 1), labels[task]) for task in self.spec.targets}
        valid = {task: torch.ones(1, 1, dtype=torch.bool) for task in targets}
        image = normalise(image, self.config.image_normalisation).contiguous()
        return MultitaskSample(image, targets, valid, index)

    def _augmented(self, image: Tensor, index: int, epoch: int) -> Tensor:
        """Crop, and flip: by chance in training, the centre and never otherwise."""
        crop = self.config.crop
        spare = (0, 0) if crop is None else (image.shape[1] - crop, image.shape[2] - crop)
        top, left = spare[0] // 2, spare[1] // 2
        if self.split == "train" and self.config.augmentation == "flip_crop":
            key = np.random.SeedSequence(self.config.seed, spawn_key=(epoch, index))
            dice = np.random.default_rng(key)
            top, left = (int(dice.integers(0, max(0, room) + 1)) for room in spare)
            if dice.random() < 0.5:
                image = image.flip(-1)
        return image if crop is None else image[:, top : top + crop, left : left + crop]


def frame_counts(config: VehicleXConfig) -> dict[str, int]:
    """Pictures of each split."""
    return {s: len(names) for s, names in list_vehiclex(config.root).pictures.items()}


def read_picture(path: Path) -> Tensor:
    """RGB [3, H, W] uint8.   raises: DataError naming the file if it is missing or damaged"""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except FileNotFoundError as error:
        raise DataError.of(Problem(str(path), "missing", "a picture", "no such file")) from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError.of(
            Problem(str(path), "unreadable", "a readable jpg", str(error) or "damage")
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _read_items(path: Path) -> tuple[dict[str, Item], list[Problem]]:
    """Items by picture name, and a problem for each that is not usable."""
    try:
        # The declared encoding is not always one that the parser knows; names are ASCII.
        text = re.sub(rb"^\s*<\?xml[^>]*\?>", b"", path.read_bytes()).decode("utf-8", "replace")
        root = ElementTree.fromstring(text)
    except (OSError, ElementTree.ParseError) as error:
        raise DataError.of(Problem(str(path), "unreadable", "readable XML", str(error))) from error
    items: dict[str, Item] = {}
    problems = []
    for element in root.iter():
        if "imageName" not in element.attrib:
            continue
        name = element.attrib["imageName"]
        item = _item(element.attrib)
        if item is None:
            expected = (
                f"vehicleID 1..{VEHICLES}, cameraID cNNN, colorID 0..{len(COLOURS) - 1} and "
                f"typeID 0..{len(TYPES) - 1} for {name}"
            )
            problems.append(Problem(str(path), "labels", expected, str(dict(element.attrib))))
        elif name in items:
            problems.append(Problem(str(path), "duplicate", f"{name} once", "twice"))
        else:
            items[name] = item
    if not items and not problems:
        raise DataError.of(Problem(str(path), "list", "items with imageName", "none"))
    return items, problems


def _item(attributes: dict[str, str]) -> Item | None:
    """None for labels that are missing, no numbers or out of range."""
    camera = _CAMERA.fullmatch(attributes.get("cameraID", ""))
    try:
        vehicle = int(attributes["vehicleID"])
        colour, kind = int(attributes["colorID"]), int(attributes["typeID"])
    except (KeyError, ValueError):
        return None
    inside = 1 <= vehicle <= VEHICLES and 0 <= colour < len(COLOURS) and 0 <= kind < len(TYPES)
    if camera is None or not inside:
        return None
    return Item(attributes["imageName"], vehicle - 1, int(camera[1]), colour, kind)
