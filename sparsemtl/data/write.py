"""Write procedural rooms to disk in the layouts that the NYUv2 readers read.

Files appear under their own names only when whole, and a manifest says what the folder holds, so an
interrupted write goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemtl.data.base import DataError
from sparsemtl.data.nyuv2 import LIST_FILE
from sparsemtl.data.nyuv2_labels import to_40
from sparsemtl.data.nyuv2_layouts import MTAN_SPLITS
from sparsemtl.data.scenes import SPLITS, Frame, ScenesConfig, frame_counts, render
from sparsemtl.errors import unknown_choice

MANIFEST = "sparsemtl-scenes.json"
WRITE_LAYOUTS = ("nyuv2", "mtan")
Placed = tuple[str, int, dict[str, str]]  # split, index, relative path of each file
_LARGEST_CODE = 254  # a valid normal never encodes to 255: readers take that for "no normal"


def write_dataset(
    config: ScenesConfig,
    out: str | Path,
    layout: str = "nyuv2",
    splits: Sequence[str] = ("train", "test"),
    *,
    overwrite: bool = False,
) -> dict[str, int]:
    """Render and write whole splits.

    layout:    nyuv2: img/, seg/ (one of 40 classes for each of the 13), seg13/, normal_mask/,
               depth/ and nyu_v2_3task.json; train1 and train2 are two halves of train
               mtan: {train,val}/{image,label,depth,normal}/{i}.npy; `val` holds the test split
    splits:    among train, val, test; val only with nyuv2, and not by default: readers hold out
               their own part of train
    overwrite: replace an earlier dataset of this function; nothing else is ever removed
    returns:   frames written per split
    raises:    ValueError on an unknown layout or split; DataError if `out` holds anything else

    Keypoints and edges have no place in these layouts and are left out. Normals are rounded to
    8 bits in layout nyuv2; depth, labels and colours are exact.
    """
    out = Path(out)
    counts = _checked_counts(config, layout, splits)
    settings = asdict(config)
    settings.pop("cache_bytes")  # changes no frame
    manifest: dict[str, Any] = {"layout": layout, "splits": counts, "config": settings}
    if _prepare(out, manifest, overwrite):
        return counts
    write_atomically(out / MANIFEST, _json({**manifest, "complete": False}))
    if layout == "nyuv2":
        _write_nyuv2(config, out, counts)
    else:
        _write_frames(config, out, list(_mtan_frames(counts)), _mtan_files)
    write_atomically(out / MANIFEST, _json({**manifest, "complete": True}))
    return counts


def encode_normals(normals: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Unit normals [H, W, 3] -> (n + 1) · 127.5, rounded, at most 254, as 8-bit codes."""
    codes = np.rint((normals + np.float32(1.0)) * np.float32(127.5))
    return np.clip(codes, 0, _LARGEST_CODE).astype(np.uint8)


def _checked_counts(config: ScenesConfig, layout: str, splits: Sequence[str]) -> dict[str, int]:
    if layout not in WRITE_LAYOUTS:
        raise ValueError(f"write_dataset: {unknown_choice('layout', layout, WRITE_LAYOUTS)}")
    allowed = SPLITS if layout == "nyuv2" else tuple(MTAN_SPLITS)
    if not splits or isinstance(splits, str):
        raise ValueError(f"write_dataset: Expected splits among {allowed}, got {splits!r}")
    for split in splits:
        if split not in allowed:
            raise ValueError(f"write_dataset: {unknown_choice('each split', split, allowed)}")
    counts = {split: count for split, count in frame_counts(config).items() if split in splits}
    empty = [split for split, count in counts.items() if count == 0]
    if empty:
        raise ValueError(f"write_dataset: Expected frames_{empty[0]} >= 1 to write it, got 0")
    return counts


def _prepare(out: Path, manifest: dict[str, Any], overwrite: bool) -> bool:
    """Make `out` ready; True if it already holds exactly this dataset, complete."""
    if out.exists() and not out.is_dir():
        raise DataError(f"write_dataset: Expected out to be a folder, got the file {out}")
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        return False
    before = _read_manifest(out)
    if before is None:
        return _share(out, manifest, overwrite)
    complete = before.pop("complete", False)
    if overwrite:
        _remove(out, before)
    elif before != json.loads(json.dumps(manifest)):
        raise DataError(
            f"write_dataset: Expected {out} to hold this dataset, got one of other settings; "
            "pass overwrite=True to replace it"
        )
    return bool(complete) and not overwrite


def _share(out: Path, manifest: dict[str, Any], overwrite: bool) -> bool:
    """Allow a folder of somebody else's files only if asked to, and only beside them."""
    expected = f"write_dataset: Expected {out} to be new, empty or written by write_dataset"
    if not overwrite:
        raise DataError(f"{expected}, got a folder with other files")
    in_the_way = sorted({path.split("/")[0] for path in _all_paths(manifest)})
    in_the_way = [name for name in in_the_way if (out / name).exists()]
    if in_the_way:
        raise DataError(f"{expected}, got one with {in_the_way} of unknown origin; left alone")
    return False


def _all_paths(manifest: dict[str, Any]) -> list[str]:
    """Relative paths of the files of a dataset, its list included."""
    counts = {str(split): int(count) for split, count in manifest["splits"].items()}
    if manifest["layout"] == "nyuv2":
        frames, extra = _nyuv2_frames(counts), [LIST_FILE]
    else:
        frames, extra = _mtan_frames(counts), []
    return extra + [path for _, _, paths in frames for path in paths.values()]


def _read_manifest(out: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(manifest, dict) and manifest.get("layout") in WRITE_LAYOUTS
    return manifest if good and isinstance(manifest.get("splits"), dict) else None


def _remove(out: Path, manifest: dict[str, Any]) -> None:
    """Delete the files that the earlier manifest accounts for."""
    for path in _all_paths(manifest):
        (out / path).unlink(missing_ok=True)


def _nyuv2_frames(counts: dict[str, int]) -> Iterable[Placed]:
    """Split, index and relative paths of every frame; ids run on from split to split."""
    number = 0
    for split, count in counts.items():
        for index in range(count):
            yield (
                split,
                index,
                {
                    "image": f"img/{number:04d}.png",
                    "segmentation": f"seg/{number:04d}.png",
                    "normals": f"normal_mask/{number:04d}.png",
                    "depth": f"depth/{number:04d}.npy",
                    "seg13": f"seg13/{number:04d}.png",
                },
            )
            number += 1


def _mtan_frames(counts: dict[str, int]) -> Iterable[Placed]:
    for split, count in counts.items():
        base = MTAN_SPLITS[split]
        for index in range(count):
            yield (
                split,
                index,
                {
                    name: f"{base}/{name}/{index}.npy"
                    for name in ("image", "label", "normal", "depth")
                },
            )


def _write_nyuv2(config: ScenesConfig, out: Path, counts: dict[str, int]) -> None:
    lists: dict[str, list[list[str]]] = {key: [] for key in ("train", "train1", "train2", "test")}
    frames = list(_nyuv2_frames(counts))
    for split, _, paths in frames:
        entry = [paths[key] for key in ("image", "segmentation", "normals", "depth")]
        lists.setdefault(split, []).append(entry)
    _write_frames(config, out, frames, _nyuv2_files)
    lists["train1"], lists["train2"] = lists["train"][::2], lists["train"][1::2]
    write_atomically(out / LIST_FILE, _json(lists))


def _nyuv2_files(frame: Frame, max_depth: float) -> dict[str, bytes]:
    return {
        "image": _png(frame.image),
        "segmentation": _png(to_40(frame.segmentation)),
        "normals": _png(encode_normals(frame.normals)),
        "depth": _npy(_within(frame, max_depth)),
        "seg13": _png((frame.segmentation + 1).astype(np.uint8)),
    }


def _mtan_files(frame: Frame, max_depth: float) -> dict[str, bytes]:
    return {
        "image": _npy(frame.image.astype(np.float32) / np.float32(255.0)),
        "label": _npy(frame.segmentation.astype(np.float32)),
        "normal": _npy(frame.normals),
        "depth": _npy(_within(frame, max_depth)[..., None]),
    }


def _write_frames(
    config: ScenesConfig,
    out: Path,
    frames: Sequence[Placed],
    encode: Callable[[Frame, float], dict[str, bytes]],
) -> None:
    """Render and write the frames of which a file is missing, on all cores."""

    def write(placed: Placed) -> None:
        split, index, paths = placed
        if all((out / path).exists() for path in paths.values()):
            return
        files = encode(render(config, split, index), config.max_depth)
        for key, data in files.items():
            write_atomically(out / paths[key], data)

    # Threads suffice: numpy and the picture encoder release the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in pool.map(write, frames):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a full disk or Ctrl-C: start no further frame
            raise


def _within(frame: Frame, max_depth: float) -> npt.NDArray[np.float32]:
    """Depth with 0, "unknown" in both layouts, beyond max_depth."""
    return np.where(frame.depth <= max_depth, frame.depth, np.float32(0.0))


def _png(array: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _npy(array: npt.NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the name and rename: a reader, or a rerun, sees all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
