"""Where NYUv2 frames lie on disk: the two published layouts, listed and split.

adashare: a json with the keys train, train1, train2, test (and val, if wanted); each is a list of
          [image, segmentation, normals, depth] paths relative to the root
mtan:     {train,val}/{image,label,normal,depth}/{i}.npy; the folder `val` is the test set
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsemtl.data.base import DataError, Problem

LAYOUTS = ("adashare", "mtan")
LIST_KEYS = ("train", "train1", "train2", "val", "test")
KINDS = ("image", "segmentation", "normals", "depth")  # also the order in the json
MTAN_FOLDERS = {"image": "image", "segmentation": "label", "normals": "normal", "depth": "depth"}
MTAN_SPLITS = {"train": "train", "test": "val"}


@dataclass(frozen=True)
class FrameFiles:
    """The four files of a frame."""

    image: Path
    segmentation: Path
    normals: Path
    depth: Path


@dataclass(frozen=True)
class Listing:
    """What a root holds: frames by list name, and what is wrong with the lists themselves."""

    layout: str
    source: Path
    frames: dict[str, tuple[FrameFiles, ...]]
    problems: tuple[Problem, ...]


def find_layout(root: Path, layout: str, list_file: str) -> str:
    """`layout`, or for "auto" the one that the root holds.

    raises: DataError naming the root if there is no such folder, or nothing of either layout in it
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing there"
        raise DataError.of(Problem(str(root), "missing", "a folder with NYUv2 frames", found))
    has_list = (root / list_file).is_file()
    has_folders = any((root / split / "image").is_dir() for split in MTAN_SPLITS.values())
    if layout == "auto":
        layout = "adashare" if has_list else "mtan"
    if not (has_list if layout == "adashare" else has_folders):
        names = sorted(path.name for path in root.iterdir())[:8]
        expected = f"{list_file} (layout adashare) or train/image and val/image (layout mtan)"
        raise DataError.of(Problem(str(root), "missing", expected, f"{names}"))
    return layout


def list_frames(root: Path, layout: str, list_file: str) -> Listing:
    """Every frame that the root lists.   layout: adashare | mtan

    raises: DataError if the list cannot be read at all; faults of single entries are returned
    """
    return _read_json(root, list_file) if layout == "adashare" else _read_folders(root)


def split_frames(
    listing: Listing, split: str, val_fraction: float, seed: int
) -> tuple[FrameFiles, ...]:
    """Frames of a split; the same for the same listing, val_fraction and seed.

    val:    the list's own `val`, else floor(val_fraction · n) frames of train, drawn by the seed
    train:  the list's `train` without the frames of val
    train1, train2: the list's own, without val; else two halves of train, drawn by the seed
    """
    train = listing.frames.get("train", ())
    if "val" in listing.frames:
        val = listing.frames["val"]
    else:
        val = _draw(train, int(val_fraction * len(train)), seed, stream=0)
    if split in ("val", "test"):
        return val if split == "val" else listing.frames.get("test", ())
    held_out = set(val)
    train = tuple(frame for frame in train if frame not in held_out)
    if split == "train":
        return train
    if split in listing.frames:
        return tuple(frame for frame in listing.frames[split] if frame not in held_out)
    first = _draw(train, (len(train) + 1) // 2, seed, stream=1)
    chosen = set(first)
    return first if split == "train1" else tuple(f for f in train if f not in chosen)


def _draw(
    frames: Sequence[FrameFiles], count: int, seed: int, stream: int
) -> tuple[FrameFiles, ...]:
    """`count` of the frames, in their order."""
    key = np.random.SeedSequence(seed, spawn_key=(stream,))
    order = np.random.default_rng(key).permutation(len(frames))
    return tuple(frames[i] for i in sorted(order[:count].tolist()))


def _read_json(root: Path, list_file: str) -> Listing:
    source = root / list_file
    try:
        lists = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        expected = "a json with lists of frames"
        raise DataError.of(Problem(str(source), "list", expected, str(error))) from error
    if not isinstance(lists, dict):
        expected = f"a dict with keys of {list(LIST_KEYS)}"
        raise DataError.of(Problem(str(source), "list", expected, type(lists).__name__))
    problems, frames = [], {}
    for key, entries in lists.items():
        if key not in LIST_KEYS:
            problems.append(_list_problem(source, f"keys of {list(LIST_KEYS)}", repr(key)))
        elif not isinstance(entries, list):
            problems.append(_list_problem(source, f"a list at {key!r}", type(entries).__name__))
        else:
            good = []
            for position, entry in enumerate(entries):
                if _is_entry(entry):
                    good.append(FrameFiles(*(root / path for path in entry)))
                else:
                    expected = f"four paths {list(KINDS)} at {key!r}[{position}]"
                    problems.append(_list_problem(source, expected, repr(entry)[:120]))
            frames[key] = tuple(good)
    problems += [
        Problem(str(source), "missing", f"the key {key!r}", f"the keys {list(lists)}")
        for key in ("train", "test")
        if key not in lists
    ]
    return Listing("adashare", source, frames, tuple(problems))


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 4 and all(isinstance(p, str) for p in entry)


def _list_problem(source: Path, expected: str, found: str) -> Problem:
    return Problem(str(source), "list", expected, found)


def _read_folders(root: Path) -> Listing:
    problems, frames = [], {}
    for split, folder in MTAN_SPLITS.items():
        base = root / folder
        numbers: set[int] = set()
        for name in MTAN_FOLDERS.values():
            if not (base / name).is_dir():
                problems.append(Problem(str(base / name), "missing", "a folder", "nothing there"))
                continue
            for path in sorted((base / name).iterdir()):
                if path.suffix == ".npy" and path.stem.isdecimal():
                    numbers.add(int(path.stem))
                elif not path.name.startswith("."):
                    problems.append(_list_problem(path, "files named {i}.npy only", path.name))
        if numbers and max(numbers) >= len(numbers):
            found = f"{len(numbers)} numbers up to {max(numbers)}"
            problems.append(_list_problem(base, "files 0.npy .. N-1.npy without a gap", found))
        frames[split] = tuple(
            FrameFiles(*(base / MTAN_FOLDERS[kind] / f"{i}.npy" for kind in KINDS))
            for i in sorted(numbers)
        )
    return Listing("mtan", root, frames, tuple(problems))
