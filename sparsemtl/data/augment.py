"""Scale, flip, crop and pad an image together with its targets.

geometric:    a zoom by f divides depth by f; a flip negates the normals' x; labels and depth are
              sampled at the pixel whose centre is nearest; padding is invalid, and 0 in the
              normalised image
as_published: depth and normals keep their values; labels are sampled at floor(i / f); the image is
              padded with 0 before the mean is subtracted (AdaShare and its descendants)
none:         a centred crop, nothing drawn
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from sparsemtl.data.image import normalise
from sparsemtl.data.nyuv2_files import Layer, Singles

AUGMENTATIONS = ("geometric", "as_published", "none")
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RawFrame:
    """A frame as stored: image [H, W, 3] RGB 0..255 and a Layer per task."""

    image: Singles | npt.NDArray[np.uint8]
    layers: dict[str, Layer]

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class View:
    """What becomes of a frame: resized, mirrored or not, then a window of the padded result.

    resized: (h, w) in pixels    zoom: the factor drawn, by which depth is divided
    start:   (row, column) of the window in the resized frame, negative where padding comes first
    window:  (h, w) of the result
    """

    resized: tuple[int, int]
    zoom: float
    mirrored: bool
    start: tuple[int, int]
    window: tuple[int, int]


def draw_view(
    generator: np.random.Generator,
    size: tuple[int, int],
    window: tuple[int, int],
    scale: tuple[float, float],
) -> View:
    """A random zoom, flip and crop: scale ~ U(scale), flip with probability 1/2, any position."""
    zoom = float(generator.uniform(*scale))
    mirrored = bool(generator.random() < 0.5)
    resized = (max(1, round(size[0] * zoom)), max(1, round(size[1] * zoom)))
    start = []
    for have, want in zip(resized, window, strict=True):
        room = have - want
        start.append(int(generator.integers(0, room + 1)) if room > 0 else -(-room // 2))
    return View(resized, zoom, mirrored, (start[0], start[1]), window)


def central_view(size: tuple[int, int], window: tuple[int, int]) -> View:
    """The middle of the frame, or all of it with padding around."""
    start = [
        (have - want) // 2 if have >= want else -((want - have) // 2)
        for have, want in zip(size, window, strict=True)
    ]
    return View(size, 1.0, False, (start[0], start[1]), window)


def resized_view(size: tuple[int, int]) -> View:
    """All of the frame at another size; depth keeps its values, as no camera zooms like that."""
    return View(size, 1.0, False, (0, 0), size)


def apply_view(
    frame: RawFrame, view: View, normalisation: str, normals_space: str, *, as_published: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The image [3, h, w] normalised, the targets and their valid masks, see MultitaskSample."""
    rows, inside_rows = _sources(frame.size[0], view, axis=0, floor=as_published)
    columns, inside_columns = _sources(frame.size[1], view, axis=1, floor=as_published)
    if view.mirrored:
        columns, inside_columns = columns[::-1], inside_columns[::-1]
    inside = inside_rows[:, None] & inside_columns
    grid = np.ix_(rows, columns)
    targets, valid = {}, {}
    for task, layer in frame.layers.items():
        mask = layer.valid[grid] & inside
        values = layer.values[grid]
        if task == "depth" and not as_published:
            values = values / np.float32(view.zoom)
        if task == "normals" and view.mirrored and not as_published:
            values = _mirror_normals(values, normals_space)
        values = values * (mask if values.ndim == 2 else mask[..., None])
        targets[task] = _planes(task, values)
        valid[task] = torch.from_numpy(mask)
    return _image(frame, view, normalisation, as_published), targets, valid


def _sources(
    length: int, view: View, axis: int, *, floor: bool
) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """For each row (or column) of the window: the stored one it shows, and whether there is one."""
    resized = view.resized[axis]
    at = np.arange(view.window[axis]) + view.start[axis]
    inside = (at >= 0) & (at < resized)
    source = (at + (0.0 if floor else 0.5)) * length / resized
    return np.clip(np.floor(source).astype(np.int64), 0, length - 1), inside


def _mirror_normals(normals: Singles, space: str) -> Singles:
    """x of mirrored normals: negated if decoded; 255 - x if encoded, where x is last (BGR)."""
    normals = normals.copy()
    if space == "decoded":
        normals[..., 0] = -normals[..., 0]
    else:
        normals[..., 2] = 255.0 - normals[..., 2]
    return normals


def _planes(task: str, values: npt.NDArray[np.generic]) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if task == "segmentation":
        return tensor
    return tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1).contiguous()


def _image(frame: RawFrame, view: View, normalisation: str, as_published: bool) -> Tensor:
    image = torch.from_numpy(np.ascontiguousarray(frame.image)).permute(2, 0, 1).to(torch.float32)
    if view.resized != frame.size:
        image = functional.interpolate(
            image[None], size=view.resized, mode="bilinear", align_corners=False
        )[0]
    top, left = max(view.start[0], 0), max(view.start[1], 0)
    bottom, right = view.start[0] + view.window[0], view.start[1] + view.window[1]
    cut = image[:, top : min(bottom, view.resized[0]), left : min(right, view.resized[1])]
    around = (  # left, right, top, bottom
        left - view.start[1],
        max(right - view.resized[1], 0),
        top - view.start[0],
        max(bottom - view.resized[0], 0),
    )
    if as_published:
        image = normalise(functional.pad(cut, around), normalisation)
    else:
        image = functional.pad(normalise(cut, normalisation), around)
    return (image.flip(-1) if view.mirrored else image).contiguous()
