"""Rays against boxes, ellipsoids and cylinders, in closed form.

Axes of the world and of the camera: x right, y forward, z up. A ray has a forward component of 1 in
the camera's frame, so its parameter t is the perpendicular depth in metres.

P: primitives, N: pixels (H·W), M: pairs of a primitive and a pixel inside its bounding rectangle.
Each primitive is a unit shape in its own frame (turned about z, divided by its half sizes), so one
formula serves all sizes. Primitive 0 is the room: a box seen from inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Real = TypeVar("Real", np.float32, np.float64)

BOX, ELLIPSOID, CYLINDER = 0, 1, 2
NEAR = 0.05  # metres; nothing nearer to the camera is drawn
_PARALLEL = 1e-12  # a direction this small divides like a parallel ray, without 0/0
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)


# Reductions over the last axis, of length 3, written out: numpy's are several times slower there.


def dot(a: npt.NDArray[Real], b: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """Scalar products over the last axis. [..., 3] x [..., 3] -> [...]"""
    return np.asarray(a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2])


def _largest(a: Floats) -> Floats:
    """[n, 3] -> [n]"""
    return np.asarray(np.maximum(np.maximum(a[:, 0], a[:, 1]), a[:, 2]))


def _argmax(a: Floats) -> Ints:
    """[n, 3] -> [n] in 0..2, the first of equals"""
    second = a[:, 1] > a[:, 0]
    third = a[:, 2] > np.where(second, a[:, 1], a[:, 0])
    return np.where(third, 2, second.astype(np.int64))


@dataclass(frozen=True)
class Primitives:
    """P solids standing upright.

    kind [P], centre [P, 3] metres, half [P, 3] metres (radii of an ellipsoid or a cylinder, half
    height last), turn [P, 2] (cosine and sine of the angle about z)
    """

    kind: npt.NDArray[np.int8]
    centre: Floats
    half: Floats
    turn: Floats

    def to_local(self, which: Ints, points: Floats, *, directions: bool = False) -> Floats:
        """World points (or directions) [..., 3] -> unit frame of primitive `which` [...]."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        centre, half, turn = self.centre[which], self.half[which], self.turn[which]
        if not directions:
            x, y, z = x - centre[..., 0], y - centre[..., 1], z - centre[..., 2]
        c, s = turn[..., 0], turn[..., 1]
        return np.stack((c * x + s * y, c * y - s * x, z), axis=-1) / half


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: position [3] metres, axes [3, 3] (rows: right, forward, up in the world).

    focal: focal length in units of the image width
    """

    position: Floats
    axes: Floats
    focal: float

    def rays(self, height: int, width: int) -> Floats:
        """Rays through the pixel centres in the camera's frame, [H, W, 3], forward component 1."""
        focal = self.focal * width
        right = (np.arange(width) + 0.5 - width / 2) / focal
        up = (height / 2 - np.arange(height) - 0.5) / focal
        rays = np.ones((height, width, 3))
        rays[..., 0], rays[..., 2] = right, up[:, None]
        return rays

    def to_world(self, directions: Floats) -> Floats:
        """Directions [..., 3] of the camera's frame -> of the world."""
        right, forward, up = self.axes
        return (
            directions[..., :1] * right + directions[..., 1:2] * forward + directions[..., 2:] * up
        )

    def to_camera(self, directions: Floats) -> Floats:
        """Directions [..., 3] of the world -> of the camera's frame."""
        return np.stack([dot(directions, axis) for axis in self.axes], axis=-1)

    def project(self, points: Floats, height: int, width: int) -> tuple[Floats, Floats, Floats]:
        """World points [..., 3] -> column, row (pixel centres at whole numbers) and depth [...]."""
        local = self.to_camera(points - self.position)
        depth = local[..., 1]
        safe = np.where(depth > NEAR, depth, NEAR)
        focal = self.focal * width
        column = local[..., 0] / safe * focal + width / 2 - 0.5
        row = height / 2 - local[..., 2] / safe * focal - 0.5
        return column, row, depth


@dataclass(frozen=True)
class Hits:
    """The first surface of each ray: depth [N] metres, primitive [N], ray [N, 3] in the world."""

    depth: Floats
    primitive: Ints
    ray: Floats


@dataclass(frozen=True)
class Surface:
    """Where the rays end, N pixels.

    point:  [N, 3] in metres, in the frame of the primitive (turned, not scaled)
    unit:   [N, 3] the same divided by the half sizes, in [-1, 1]
    face:   [N] 0..5 = axis·2 + (1 if the normal points along +axis); 6 for a curved side
    normal: [N, 3] unit vectors in the world's frame, facing the camera
    """

    point: Floats
    unit: Floats
    face: Ints
    normal: Floats


CURVED = 6


def cast(primitives: Primitives, camera: Camera, height: int, width: int) -> Hits:
    """Depth and primitive of the nearest surface of every pixel; ties go to the lower primitive."""
    rays = camera.to_world(camera.rays(height, width)).reshape(-1, 3)  # [N, 3]
    depth = _leave_room(primitives, camera, rays)
    first = np.zeros(len(rays), dtype=np.int64)
    which, pixel = _pairs(primitives, camera, height, width)
    origin = primitives.to_local(np.arange(len(primitives.kind)), camera.position)  # [P, 3]
    found = []
    for kind, enter in (
        (BOX, _enter_box),
        (ELLIPSOID, _enter_ellipsoid),
        (CYLINDER, _enter_cylinder),
    ):
        mine = primitives.kind[which] == kind
        w, p = which[mine], pixel[mine]
        t = enter(origin[w], primitives.to_local(w, rays[p], directions=True))
        hit = t > NEAR  # False for NaN, which marks a miss
        found.append((w[hit], p[hit], t[hit]))
    which, pixel, t = (np.concatenate(parts) for parts in zip(*found, strict=True))
    np.minimum.at(depth, pixel, t)
    nearest = t == depth[pixel]
    order = np.argsort(-which[nearest], kind="stable")  # the lowest is written last and stays
    first[pixel[nearest][order]] = which[nearest][order]
    return Hits(depth, first, rays)


def surface(primitives: Primitives, camera: Camera, hits: Hits) -> Surface:
    """Points, faces and analytic normals of the hits."""
    which = hits.primitive
    origin = primitives.to_local(np.arange(len(primitives.kind)), camera.position)[which]
    ray = primitives.to_local(which, hits.ray, directions=True)  # [N, 3]
    half, turn, kind = primitives.half[which], primitives.turn[which], primitives.kind[which]
    unit = origin + hits.depth[:, None] * ray
    normal, face = _local_normals(kind, which, origin, ray, unit, half)
    c, s = turn[:, 0], turn[:, 1]
    world = np.stack(
        (c * normal[:, 0] - s * normal[:, 1], s * normal[:, 0] + c * normal[:, 1], normal[:, 2]), 1
    )
    return Surface(unit * half, unit, face, world)


def corners(primitives: Primitives) -> Floats:
    """The eight corners of every primitive's bounding box in the world, [P, 8, 3]."""
    local = _CORNERS * primitives.half[:, None]  # [P, 8, 3]
    c, s = primitives.turn[:, :1], primitives.turn[:, 1:]
    x, y, z = local[..., 0], local[..., 1], local[..., 2]
    return np.stack((c * x - s * y, s * x + c * y, z), axis=-1) + primitives.centre[:, None]


def _local_normals(
    kind: npt.NDArray[np.int8], which: Ints, origin: Floats, ray: Floats, unit: Floats, half: Floats
) -> tuple[Floats, Ints]:
    count = len(kind)
    sign = np.where(ray < 0, -1.0, 1.0)
    safe = _safe(ray)
    enter = (-sign - origin) / safe  # [N, 3] where the ray crosses each near face
    leave = (sign - origin) / safe
    axis = np.where(which == 0, _argmax(-leave), _argmax(enter))
    curved = kind == ELLIPSOID
    cylinder = kind == CYLINDER
    axis[cylinder] = 2
    # On the side of a cylinder the ray was already between the caps when it reached the radius.
    curved |= cylinder & (np.abs(unit[:, 2]) < 1.0 - 1e-9)
    facing = -sign[np.arange(count), axis]
    normal = np.zeros((count, 3))
    normal[np.arange(count), axis] = facing
    face = axis * 2 + (facing > 0)
    if curved.any():
        gradient = unit[curved] / half[curved]
        gradient[kind[curved] == CYLINDER, 2] = 0.0
        normal[curved] = gradient / np.sqrt(dot(gradient, gradient))[:, None]
        face[curved] = CURVED
    return normal, face


def _leave_room(primitives: Primitives, camera: Camera, rays: Floats) -> Floats:
    """Depth at which each ray meets the inside of primitive 0. [N]"""
    room = np.zeros((), dtype=np.int64)
    origin = primitives.to_local(room, camera.position)
    ray = _safe(primitives.to_local(room, rays, directions=True))
    return -_largest((origin - np.where(ray < 0, -1.0, 1.0)) / ray)


def _pairs(primitives: Primitives, camera: Camera, height: int, width: int) -> tuple[Ints, Ints]:
    """Primitives but the room with the pixels of their bounding rectangles. [M], [M]"""
    column, row, depth = camera.project(corners(primitives), height, width)  # [P, 8]
    behind = depth <= NEAR
    crossing = behind.any(
        axis=1
    )  # a corner behind the camera projects nowhere: take the whole image
    x0 = np.where(crossing, 0, np.floor(column.min(axis=1)))
    x1 = np.where(crossing, width, np.ceil(column.max(axis=1)) + 1)
    y0 = np.where(crossing, 0, np.floor(row.min(axis=1)))
    y1 = np.where(crossing, height, np.ceil(row.max(axis=1)) + 1)
    x0, x1 = (np.clip(x, 0, width).astype(np.int64) for x in (x0, x1))
    y0, y1 = (np.clip(y, 0, height).astype(np.int64) for y in (y0, y1))
    size = np.where(behind.all(axis=1), 0, (x1 - x0) * (y1 - y0))
    size[0] = 0
    which = np.repeat(np.arange(len(size)), size)
    offset = np.arange(len(which)) - np.repeat(np.cumsum(size) - size, size)
    down, across = np.divmod(offset, np.maximum(x1 - x0, 1)[which])
    return which, (y0[which] + down) * width + x0[which] + across


def _enter_box(origin: Floats, ray: Floats) -> Floats:
    """t at which a ray enters the unit cube, NaN where it misses or starts inside. [M]"""
    ray = _safe(ray)
    inverse = 1.0 / ray
    far = np.abs(inverse)  # half the time spent between two faces
    middle = -origin * inverse
    enter, leave = _largest(middle - far), -_largest(-middle - far)
    return np.where(enter < leave, enter, np.nan)


def _enter_ellipsoid(origin: Floats, ray: Floats) -> Floats:
    """t at which a ray enters the unit sphere, NaN where it misses. [M]"""
    a, b = dot(ray, ray), dot(origin, ray)
    c = dot(origin, origin) - 1.0
    root = b * b - a * c
    return np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0.0))) / a, np.nan)


def _enter_cylinder(origin: Floats, ray: Floats) -> Floats:
    """t at which a ray enters the unit cylinder x² + y² ≤ 1, |z| ≤ 1, NaN where it misses. [M]"""
    ray = _safe(ray)
    a = ray[:, 0] ** 2 + ray[:, 1] ** 2
    b = origin[:, 0] * ray[:, 0] + origin[:, 1] * ray[:, 1]
    c = origin[:, 0] ** 2 + origin[:, 1] ** 2 - 1.0
    root = b * b - a * c
    reach = np.sqrt(np.maximum(root, 0.0)) / a
    middle, far = -origin[:, 2] / ray[:, 2], np.abs(1.0 / ray[:, 2])
    enter = np.maximum(-b / a - reach, middle - far)
    leave = np.minimum(-b / a + reach, middle + far)
    return np.where((root > 0) & (enter < leave), enter, np.nan)


def _safe(ray: Floats) -> Floats:
    return np.where(np.abs(ray) < _PARALLEL, _PARALLEL, ray)
