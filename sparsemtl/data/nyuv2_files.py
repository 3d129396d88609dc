"""Read one file of a frame and say what is wrong with it.

H, W: rows and columns as stored. Every reader raises DataError with the file, what was expected
and what was found; none replaces a value.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemtl.data.base import DataError, Problem
from sparsemtl.data.nyuv2_labels import VOID_13, VOID_40, to_13

DEPTH_FLOOR = 3e-5  # metres; at or below it a pixel has no depth (AdaShare)
UNIT_FLOOR = 0.5  # a decoded normal shorter than this is no normal: zero vectors mark holes
Singles = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Layer:
    """Values of one target, [H, W] or [H, W, C], and the pixels [H, W] where they count."""

    values: npt.NDArray[Any]
    valid: Mask


def refuse(file: Path, kind: str, expected: str, found: str) -> DataError:
    """The error to raise about a file."""
    return DataError.of(Problem(str(file), kind, expected, found))


def read_png(file: Path, mode: str) -> npt.NDArray[np.uint8]:
    """An 8-bit picture: [H, W, 3] for mode "RGB", [H, W] for "L" (palettes give their index).

    Checksums are compared first: a flipped bit is an error, not a wrong pixel.
    """
    from PIL import Image, UnidentifiedImageError

    expected = f"a readable 8-bit {'RGB' if mode == 'RGB' else 'gray'} picture"
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            picture.verify()
        with Image.open(io.BytesIO(data)) as picture:
            found = picture.mode
            array = np.array(picture)
    except FileNotFoundError as error:
        raise refuse(file, "missing", "a picture", "no such file") from error
    except UnidentifiedImageError as error:
        raise refuse(file, "unreadable", expected, f"{_size_of(file)} of another kind") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise refuse(file, "unreadable", expected, f"a damaged file ({error})") from error
    except Image.DecompressionBombError as error:
        raise refuse(file, "unreadable", expected, str(error)) from error
    if found not in (("RGB",) if mode == "RGB" else ("L", "P")):
        raise refuse(file, "dtype", expected, f"mode {found}")
    return array


def read_npy(file: Path, kind: str = "an array saved by numpy") -> npt.NDArray[Any]:
    """A numeric array of an npy file; pickled objects are refused."""
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise refuse(file, "missing", kind, "no such file") from error
    except (OSError, ValueError, EOFError, SyntaxError, struct.error) as error:
        raise refuse(file, "unreadable", kind, f"a damaged file ({_first(error)})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        found = str(array.dtype) if isinstance(array, np.ndarray) else type(array).__name__
        raise refuse(file, "dtype", f"{kind}, one numeric array", found)
    return array


def read_image(file: Path, layout: str) -> Singles | npt.NDArray[np.uint8]:
    """RGB [H, W, 3] in 0..255: uint8 of a png, float32 of an npy that holds [0, 1]."""
    if layout == "adashare":
        return read_png(file, "RGB")
    array = _with_shape(file, read_npy(file), channels=3)
    _require_float(file, array)
    _require_finite(file, array)
    low, high = float(array.min()), float(array.max())
    if low < -1e-3 or high > 1.0 + 1e-3:
        raise refuse(file, "values", "an image in [0, 1]", f"values in {low:g}..{high:g}")
    return array.astype(np.float32) * np.float32(255.0)


def read_segmentation(file: Path, layout: str, classes: int, *, stored_13: bool = False) -> Layer:
    """Labels 0..classes-1 as int64.

    stored_13: the png counts 13 classes from 1, with 0 = void; other pngs hold 0..39 and 255,
               and are mapped if 13 classes are asked for
    """
    if layout == "mtan":
        return _mtan_labels(file)
    labels = read_png(file, "L")
    if stored_13:
        _require_labels(file, labels, labels <= 13, "0 (void) and 1..13")
        valid = labels != VOID_13
        return Layer(np.where(valid, labels.astype(np.int64) - 1, 0), valid)
    _require_labels(file, labels, (labels < 40) | (labels == VOID_40), "0..39 and 255 (void)")
    valid = labels != VOID_40
    if classes == 13:
        labels = to_13(labels)
    return Layer(np.where(valid, labels.astype(np.int64), 0), valid)


def read_normals(file: Path, layout: str, space: str) -> Layer:
    """Normals [H, W, 3] float32: unit vectors of the file's RGB order, or 0..255 in BGR order.

    Valid where the largest channel is below 255, as released; decoded ones must be vectors too.
    """
    if layout == "mtan":
        array = _with_shape(file, read_npy(file), channels=3)
        _require_float(file, array)
        _require_finite(file, array)
        return _unit(array.astype(np.float32), np.ones(array.shape[:2], dtype=bool))
    codes = read_png(file, "RGB")
    # Channel by channel: numpy reduces a short last axis several times slower.
    largest = np.maximum(np.maximum(codes[..., 0], codes[..., 1]), codes[..., 2])
    valid = largest < 255
    if space == "encoded":
        return Layer(codes[..., ::-1].astype(np.float32) * valid[..., None], valid)
    return _unit(codes.astype(np.float32) / np.float32(127.5) - np.float32(1.0), valid)


def read_depth(file: Path) -> Layer:
    """Depth [H, W] float32 in metres; valid above 3e-5."""
    array = read_npy(file)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    array = _with_shape(file, array, channels=None)
    _require_float(file, array)
    _require_finite(file, array)
    valid = array > DEPTH_FLOOR
    return Layer(np.where(valid, array, 0.0).astype(np.float32), valid)


def _mtan_labels(file: Path) -> Layer:
    array = _with_shape(file, read_npy(file), channels=None)
    _require_finite(file, array)
    labels = array.astype(np.int64)
    whole = labels == array
    if not whole.all():
        found = f"{int((~whole).sum())} fractions"
        raise refuse(file, "labels", "whole labels in -1..12", found)
    _require_labels(file, labels, (labels >= -1) & (labels < 13), "-1 (void) and 0..12")
    valid = labels >= 0
    return Layer(np.where(valid, labels, 0), valid)


def _unit(vectors: Singles, valid: Mask) -> Layer:
    """Vectors scaled to length 1; shorter than UNIT_FLOOR is invalid and 0."""
    length = np.sqrt(vectors[..., 0] ** 2 + vectors[..., 1] ** 2 + vectors[..., 2] ** 2)
    valid = valid & (length >= UNIT_FLOOR)
    scale = valid / np.maximum(length, UNIT_FLOOR)
    return Layer((vectors * scale[..., None]).astype(np.float32), valid)


def _with_shape(file: Path, array: npt.NDArray[Any], channels: int | None) -> npt.NDArray[Any]:
    if channels is None:
        good, expected = array.ndim == 2, "[H, W]"
    else:
        good, expected = array.ndim == 3 and array.shape[2] == channels, f"[H, W, {channels}]"
    if not good or 0 in array.shape:
        raise refuse(file, "size", f"an array {expected}", f"{list(array.shape)}")
    return array


def _require_float(file: Path, array: npt.NDArray[Any]) -> None:
    if array.dtype.kind != "f":
        raise refuse(file, "dtype", "floating point values", str(array.dtype))


def _require_finite(file: Path, array: npt.NDArray[Any]) -> None:
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise refuse(file, "values", "finite values", f"{bad} NaN or inf")


def _require_labels(file: Path, labels: npt.NDArray[Any], good: Mask, allowed: str) -> None:
    if not good.all():
        wrong = np.unique(labels[~good]).tolist()
        found = f"{wrong[:8]} in {int((~good).sum())} pixels"
        raise refuse(file, "labels", f"labels {allowed}", found)


def _size_of(file: Path) -> str:
    return f"a file of {file.stat().st_size} bytes"


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
