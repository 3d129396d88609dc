"""Procedural materials and light: the colour of every pixel of a cast room.

N: pixels. u, v: metres along a face; s, t: the same in [-1, 1]. A material takes the pixels that
carry it and returns their colours [n, 3]; MATERIALS of scene_builder names and numbers them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsemtl.data.scene_builder import MATERIALS
from sparsemtl.data.scene_geometry import BOX, CURVED, Floats, Hits, Primitives, Surface, dot
from sparsemtl.data.scene_rooms import Room

Singles = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_SHADOW = 0.45  # light left where the lamp is hidden: walls reflect
_LIFT = 0.01  # metres above the surface where a shadow ray starts
_GLOWING = ("window", "lamp", "screen")  # materials that shine by themselves
_CASTERS = 14  # at most this many solids cast shadows: the largest


@dataclass(frozen=True)
class Patch:
    """The pixels of one material: coordinates, and the colours, scale and number of their solid."""

    u: Singles
    v: Singles
    s: Singles
    t: Singles
    colour: Singles
    accent: Singles
    scale: Singles
    solid: npt.NDArray[np.int64]


def room_rows(face: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Row of Room.walls for faces of the room: walls 0, floor 1 (normal up), ceiling 2."""
    return np.where(face < 4, 0, np.where(face == 5, 1, 2))


def paint(room: Room, hits: Hits, surface: Surface, world: Floats, noise: Singles) -> Bytes:
    """RGB of every pixel, [N, 3] uint8.

    world: [N, 3] points in metres    noise: [N, 3] standard normal, the sensor's grain
    """
    which = hits.primitive
    shell = which == 0
    rows = room_rows(surface.face[shell])
    looks, walls = room.looks, room.walls
    material = looks.material[which]
    colour, accent, scale = looks.colour[which], looks.accent[which], looks.scale[which]
    material[shell] = walls.material[rows]
    colour[shell], accent[shell] = walls.colour[rows], walls.accent[rows]
    scale[shell] = walls.scale[rows]
    u, v, s, t = _coordinates(surface, hits, room.solids)
    albedo = np.empty_like(colour)
    glow = np.zeros(len(which), dtype=np.float32)
    for number in np.unique(material):
        mine = np.flatnonzero(material == number)
        name = MATERIALS[number]
        patch = Patch(
            u[mine], v[mine], s[mine], t[mine], colour[mine], accent[mine], scale[mine], which[mine]
        )
        albedo[mine] = _PAINTERS[name](patch)
        glow[mine] = name in _GLOWING
    light = _light(room, surface.normal.astype(np.float32), world.astype(np.float32))
    light += glow[:, None] * (1.0 - light)
    shaded = np.clip(albedo * light, 0.0, 1.0) * 255.0 + 2.0 * noise
    return np.clip(np.rint(shaded), 0.0, 255.0).astype(np.uint8)


def _coordinates(
    surface: Surface, hits: Hits, solids: Primitives
) -> tuple[Singles, Singles, Singles, Singles]:
    """u, v in metres and s, t in [-1, 1] on the face of every pixel. [N] each"""
    point, unit = surface.point.astype(np.float32), surface.unit.astype(np.float32)
    axis = surface.face // 2
    first, second = np.where(axis == 0, 1, 0), np.where(axis == 2, 1, 2)
    row = np.arange(len(axis))
    u, v, s, t = point[row, first], point[row, second], unit[row, first], unit[row, second]
    bent = np.flatnonzero(surface.face == CURVED)
    turn = np.arctan2(unit[bent, 1], unit[bent, 0])
    u[bent] = turn * solids.half[hits.primitive[bent], 0].astype(np.float32)
    v[bent], s[bent], t[bent] = point[bent, 2], turn / np.float32(np.pi), unit[bent, 2]
    return u, v, s, t


def _light(room: Room, normal: Singles, world: Singles) -> Singles:
    """Light on every pixel: ambient from above, the lamp with shadows, daylight. [N, 3]"""
    sky = room.ambient * (0.85 + 0.15 * normal[:, 2])
    total = sky[:, None] * np.ones(3, dtype=np.float32)
    lamp = room.lamp.astype(np.float32) - world
    shine = 0.75 * _facing(normal, lamp, 0.05) * _shadow(room, normal, world)
    total += shine[:, None] * room.lamp_colour.astype(np.float32)
    day = room.daylight.astype(np.float32) - world
    total += (0.4 * _facing(normal, day, 0.12))[:, None] * np.array((0.92, 0.97, 1.0), np.float32)
    return np.asarray(total, dtype=np.float32)


def _facing(normal: Singles, towards: Singles, fading: float) -> Singles:
    square = dot(towards, towards)
    cosine = dot(normal, towards) / np.sqrt(square + 1e-6)
    return np.asarray((0.15 + 0.85 * np.maximum(cosine, 0.0)) / (1.0 + fading * square))


def _shadow(room: Room, normal: Singles, world: Singles) -> Singles:
    """1 where the lamp is seen, _SHADOW where a large solid hides it. [N]

    Cylinders and ellipsoids shade as the boxes around them; one slab test per solid and pixel.
    """
    solids = room.solids
    candidates = np.flatnonzero(room.looks.shades)
    size = solids.half[candidates].prod(axis=1)
    candidates = candidates[np.argsort(-size, kind="stable")[:_CASTERS]]
    start = world + _LIFT * normal
    ray = room.lamp.astype(np.float32) - start
    hidden = np.zeros(len(world), dtype=bool)
    for i in candidates:
        c, s = solids.turn[i].astype(np.float32)
        x0, y0, z0 = solids.centre[i].astype(np.float32)
        hx, hy, hz = solids.half[i].astype(np.float32)
        if solids.kind[i] != BOX:
            hx, hy = hx * np.float32(0.85), hy * np.float32(0.85)
        # Slabs one axis at a time, on flat arrays: the vectors are short-lived and stay in cache.
        x, y = start[:, 0] - x0, start[:, 1] - y0
        enter, leave = _slab(c * x + s * y, c * ray[:, 0] + s * ray[:, 1], hx)
        near, far = _slab(c * y - s * x, c * ray[:, 1] - s * ray[:, 0], hy)
        np.maximum(enter, near, out=enter)
        np.minimum(leave, far, out=leave)
        near, far = _slab(start[:, 2] - z0, ray[:, 2], hz)
        np.maximum(enter, near, out=enter)
        np.minimum(leave, far, out=leave)
        hidden |= (enter < leave) & (leave > 0) & (enter < 1)
    return np.where(hidden, np.float32(_SHADOW), np.float32(1.0))


def _slab(origin: Singles, ray: Singles, half: np.float32) -> tuple[Singles, Singles]:
    inverse = 1.0 / np.where(np.abs(ray) < 1e-6, np.float32(1e-6), ray)
    middle, far = -origin * inverse, half * np.abs(inverse)
    return middle - far, middle + far


def _hash(
    x: npt.NDArray[np.int64], y: npt.NDArray[np.int64], solid: npt.NDArray[np.int64]
) -> Singles:
    """Repeatable numbers in [0, 1) from whole coordinates and a solid's number. [n]"""
    mixed = (x * 374761393 + y * 668265263 + solid * 1274126177) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 1103515245) & 0xFFFFFFFF
    return np.asarray(((mixed ^ (mixed >> 16)) & 0xFFFF) / 65536.0, dtype=np.float32)


def _cell(values: Singles, size: npt.NDArray[Any] | float) -> npt.NDArray[np.int64]:
    return np.floor(values / size).astype(np.int64)


def _mix(patch: Patch, share: npt.NDArray[np.floating]) -> Singles:
    """share 0 gives the colour, 1 the accent."""
    return np.asarray(
        patch.colour + (patch.accent - patch.colour) * share[:, None], dtype=np.float32
    )


def _plain(patch: Patch) -> Singles:
    return patch.colour


def _wood(patch: Patch) -> Singles:
    board = _cell(patch.v, patch.scale)
    joint = patch.v / patch.scale - board
    tone = _hash(board, _cell(patch.u + board * 0.37, 0.9), patch.solid)
    grain = 0.5 + 0.5 * np.sin(patch.u * 9.0 + np.sin(patch.v * 55.0) * 1.6 + tone * 6.0)
    share = 0.25 * tone + 0.3 * grain + 0.7 * (joint < 0.07)
    return _mix(patch, np.minimum(share, 1.0))


def _tiles(patch: Patch) -> Singles:
    across, down = patch.u / patch.scale, patch.v / patch.scale
    seam = (across - np.floor(across) < 0.06) | (down - np.floor(down) < 0.06)
    tone = _hash(_cell(patch.u, patch.scale), _cell(patch.v, patch.scale), patch.solid)
    return _mix(patch, np.where(seam, 1.0, 0.2 * tone))


def _stripes(patch: Patch) -> Singles:
    return _mix(patch, 0.5 + 0.5 * np.sign(np.sin(patch.u * (2 * np.pi) / patch.scale)))


def _plaid(patch: Patch) -> Singles:
    across, down = _cell(patch.u, patch.scale / 2) % 2, _cell(patch.v, patch.scale / 2) % 2
    return _mix(patch, 0.45 * across + 0.45 * down)


def _wallpaper(patch: Patch) -> Singles:
    return _mix(patch, (_cell(patch.u, patch.scale / 2) % 2).astype(np.float32))


def _carpet(patch: Patch) -> Singles:
    return _mix(patch, _hash(_cell(patch.u, 0.03), _cell(patch.v, 0.03), patch.solid))


def _doors(patch: Patch) -> Singles:
    """Panels (their number is the scale) with dark joints and a handle each."""
    column = (patch.s + 1.0) / 2.0 * patch.scale
    inside = (
        np.abs(column - np.floor(column) - 0.5) * 2.0
    )  # 0 in the middle of a panel, 1 at a joint
    edge = (inside > 0.9) | (np.abs(patch.t) > 0.94)
    handle = (np.abs(inside - 0.72) < 0.08) & (np.abs(patch.t) < 0.14)
    raised = (inside > 0.6) | (np.abs(patch.t) > 0.75)
    return _mix(patch, np.where(edge | handle, 1.0, 0.15 * raised))


def _spines(patch: Patch) -> Singles:
    book = _cell(patch.u, patch.scale)
    hue = _hash(book, np.zeros_like(book), patch.solid)
    tone = 0.45 + 0.5 * _hash(book, np.ones_like(book), patch.solid)
    wheel = np.stack(
        [0.5 + 0.5 * np.cos(2 * np.pi * (hue + shift)) for shift in (0, 0.33, 0.67)], 1
    )
    gap = patch.u / patch.scale - book < 0.12
    band = np.abs(np.abs(patch.t) - 0.55) < 0.08
    colour = (0.2 + 0.8 * wheel) * tone[:, None]
    colour[band] = colour[band] * 0.4 + 0.55
    colour[gap] *= 0.25
    return np.asarray(colour, dtype=np.float32)


def _window(patch: Patch) -> Singles:
    """Sky above, something green below, behind a frame with a cross."""
    frame = (np.abs(patch.s) > 0.9) | (np.abs(patch.t) > 0.9)
    frame |= (np.abs(patch.s) < 0.05) | (np.abs(patch.t - 0.1) < 0.05)
    colour = patch.colour * (0.9 + 0.1 * patch.t[:, None])
    hills = patch.t < -0.45 + 0.15 * np.sin(patch.s * 4.0 + patch.solid)
    colour[hills] = colour[hills] * np.array((0.55, 0.75, 0.5), dtype=np.float32)
    colour[frame] = patch.accent[frame]
    return np.asarray(colour, dtype=np.float32)


def _screen(patch: Patch) -> Singles:
    bezel = (np.abs(patch.s) > 0.94) | (np.abs(patch.t) > 0.92)
    glare = np.clip(0.5 + 0.4 * patch.t - 0.3 * np.abs(patch.s + 0.2), 0.0, 1.0)
    return _mix(patch, np.where(bezel, 0.0, glare))


def _picture(patch: Patch) -> Singles:
    """A frame, a mat, and inside it a sky, a hill and a round thing."""
    outer = np.maximum(np.abs(patch.s), np.abs(patch.t))
    seed = np.zeros_like(patch.solid)
    shift = _hash(seed, seed, patch.solid) * 6.0
    hill = patch.t < 0.35 * np.sin(patch.s * 3.0 + shift) - 0.1
    disc = (patch.s - 0.3 * np.cos(shift)) ** 2 + (patch.t - 0.35) ** 2 < 0.05
    colour = patch.colour.copy()
    colour[hill] = colour[hill][:, ::-1] * np.float32(0.7)
    colour[disc] = 1.0 - 0.5 * colour[disc]
    colour[outer > 0.7] = 0.95
    return np.where((outer > 0.88)[:, None], patch.accent, colour)


def _lamp(patch: Patch) -> Singles:
    return _mix(patch, 0.5 + 0.5 * patch.t)


_PAINTERS: dict[str, Callable[[Patch], Singles]] = {
    "plain": _plain,
    "wood": _wood,
    "tiles": _tiles,
    "stripes": _stripes,
    "plaid": _plaid,
    "doors": _doors,
    "spines": _spines,
    "window": _window,
    "screen": _screen,
    "picture": _picture,
    "wallpaper": _wallpaper,
    "carpet": _carpet,
    "lamp": _lamp,
}
