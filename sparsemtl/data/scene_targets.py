"""Targets of a cast room, all from its geometry.

H, W: rows and columns; N = H·W. The picture plays no part: a target is exact wherever it is valid.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from sparsemtl.data.scene_geometry import Camera, Floats, Hits, Primitives, Surface, corners, dot
from sparsemtl.data.scene_paint import room_rows
from sparsemtl.data.scene_rooms import Room

_OCCLUSION = 0.05  # a step of 5 % of the depth off the tangent plane is a full edge
_VISIBLE = 0.02  # a corner counts as seen if the picture's depth is within 2 % of its own
_REACH = 3.0  # Gaussians are cut at three standard deviations


def segmentation(room: Room, hits: Hits, surface: Surface) -> npt.NDArray[np.int64]:
    """Class of every pixel, [N] in 0..12."""
    labels = room.looks.label[hits.primitive]
    shell = hits.primitive == 0
    labels[shell] = room.walls.label[room_rows(surface.face[shell])]
    return labels


def edges(points: Floats, normals: Floats, sigma: float) -> npt.NDArray[np.float32]:
    """Nearness to an occlusion or a crease, [H, W] in [0, 1].

    points:  [H, W, 3] metres, camera's frame    normals: [H, W, 3] unit, same frame
    sigma:   pixels
    Between two neighbours p, q the strength is min(1, max(crease, occlusion)) with
    crease = |n_p - n_q| / sqrt(2) (a right angle is 1) and occlusion = the larger of
    |n_p · (x_q - x_p)| and |n_q · (x_q - x_p)| over 5 % of the nearer depth; both pixels get it.
    The map is the largest of strength · exp(-distance² / 2 sigma²) over the pixels around.
    """
    strength = np.zeros(points.shape[:2])
    for axis in (0, 1):
        here, there = [slice(None)] * 2, [slice(None)] * 2
        here[axis], there[axis] = slice(None, -1), slice(1, None)
        p, q = tuple(here), tuple(there)
        step, bend = points[q] - points[p], normals[q] - normals[p]
        crease = np.sqrt(dot(bend, bend) / 2.0)
        off = np.maximum(np.abs(dot(normals[p], step)), np.abs(dot(normals[q], step)))
        occlusion = off / (_OCCLUSION * np.minimum(points[p][..., 1], points[q][..., 1]))
        edge = np.minimum(np.maximum(crease, occlusion), 1.0)
        np.maximum(strength[p], edge, out=strength[p])
        np.maximum(strength[q], edge, out=strength[q])
    return _spread(strength.astype(np.float32), sigma)


def keypoints(
    solids: Primitives, camera: Camera, depth: Floats, sigma: float
) -> npt.NDArray[np.float32]:
    """Nearness to a visible corner, [H, W] in [0, 1].

    depth: [H, W] metres    sigma: pixels
    A corner is one of the eight of a solid's bounding box (the room's included) that lies in the
    picture and whose depth agrees with the picture's, to 2 %, in one of the 3 x 3 pixels around it.
    The map is the largest of exp(-distance² / 2 sigma²) over the corners.
    """
    height, width = depth.shape
    column, row, far = (x.ravel() for x in camera.project(corners(solids), height, width))
    x, y = np.rint(column).astype(np.int64), np.rint(row).astype(np.int64)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (far > 0)
    x, y, far = x[inside], y[inside], far[inside]
    padded = np.pad(depth, 1, mode="edge")
    seen = np.zeros(len(x), dtype=bool)
    for dy in range(3):
        for dx in range(3):
            seen |= np.abs(padded[y + dy, x + dx] - far) < _VISIBLE * far
    strength = np.zeros((height, width), dtype=np.float32)
    strength[y[seen], x[seen]] = 1.0
    return _spread(strength, sigma)


def _spread(strength: npt.NDArray[np.float32], sigma: float) -> npt.NDArray[np.float32]:
    """Grey dilation by a Gaussian: max over offsets of strength · exp(-|offset|² / 2 sigma²)."""
    result = strength
    for axis in (0, 1):  # a Gaussian is a product over the axes, so the maximum separates
        wider = result.copy()
        for offset in range(1, min(math.ceil(_REACH * sigma), result.shape[axis])):
            faded = result * np.float32(math.exp(-(offset**2) / (2.0 * sigma**2)))
            before, after = [slice(None)] * 2, [slice(None)] * 2
            before[axis], after[axis] = slice(None, -offset), slice(offset, None)
            b, a = tuple(before), tuple(after)
            np.maximum(wider[a], faded[b], out=wider[a])
            np.maximum(wider[b], faded[a], out=wider[b])
        result = wider
    return result
