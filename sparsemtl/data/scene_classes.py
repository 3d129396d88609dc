"""Classes of a whole room, for classification: exact to what was built and is seen.

A thing counts as seen if it covers at least `SEEN` of the picture. H, W: rows and columns.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
import numpy.typing as npt

from sparsemtl.data.scene_builder import LABEL
from sparsemtl.data.scene_geometry import Hits, Surface
from sparsemtl.data.scene_paint import room_rows
from sparsemtl.data.scene_rooms import Room

SEEN = 0.004  # of the picture's pixels: 0.4 %, about 8 × 6 pixels of 96 × 128
COLOURS = ("neutral", "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
_GREY = 0.12  # saturation below which a colour has no hue
_HUES = (0.04, 0.10, 0.18, 0.43, 0.53, 0.70, 0.80, 0.95)  # upper ends of red, orange, … pink; red
ROOM_TYPES = ("bedroom", "living room", "dining room", "other")
COUNTS = ("0-4", "5-6", "7-8", "9-10", "11+")
_COUNT_ENDS = (5, 7, 9, 11)
POSES = ("left down", "left level", "ahead down", "ahead level", "right down", "right level")
_TURN = 9.0  # degrees of heading off the room's axis that count as left or right
_PITCH = -13.0  # degrees


def dominant_colour(room: Room, hits: Hits, surface: Surface) -> int:
    """The colour that covers most of the picture, of paints as built: no light, no pattern."""
    which = hits.primitive
    shell = which == 0
    counts = np.zeros(len(COLOURS), dtype=np.int64)
    solids = np.bincount(which[~shell], minlength=len(room.looks.colour))
    walls = np.bincount(room_rows(surface.face[shell]), minlength=3)
    for colours, pixels in ((room.looks.colour, solids), (room.walls.colour, walls)):
        for colour, count in zip(colours, pixels, strict=True):
            if count:
                counts[colour_name(colour)] += count
    return int(counts.argmax())


def colour_name(colour: npt.ArrayLike) -> int:
    """Index in COLOURS of an RGB colour in [0, 1]."""
    red, green, blue = np.asarray(colour, dtype=np.float64).tolist()
    hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < _GREY:
        return 0
    return 1 + int(np.searchsorted(_HUES, hue, side="right")) % len(_HUES)


def room_type(room: Room, hits: Hits) -> int:
    """By what is seen: a bed, else a sofa, else a table or a chair, else other."""
    pixels = np.bincount(room.looks.label[hits.primitive[hits.primitive > 0]], minlength=len(LABEL))
    seen = pixels >= SEEN * len(hits.primitive)
    for kind, names in enumerate((("bed",), ("sofa",), ("table", "chair"))):
        if any(seen[LABEL[name]] for name in names):
            return kind
    return len(ROOM_TYPES) - 1


def object_count(room: Room, hits: Hits) -> int:
    """Bin of COUNTS for the things seen: pieces of furniture and what hangs on the walls."""
    inside = hits.primitive[hits.primitive > 0]
    pixels = np.bincount(room.looks.piece[inside])
    things = int((pixels >= SEEN * len(hits.primitive)).sum())
    return int(np.searchsorted(_COUNT_ENDS, things, side="right"))


def camera_pose(room: Room) -> int:
    """Bin of POSES: where the camera looks, left or right of the room's axis, down or level."""
    forward = room.camera.axes[1]
    turn = math.degrees(math.atan2(forward[0], forward[1]))  # clockwise from +y, seen from above
    pitch = math.degrees(math.asin(forward[2]))
    side = 0 if turn < -_TURN else 2 if turn > _TURN else 1
    return 2 * side + int(pitch >= _PITCH)


def mirrored_pose(pose: int) -> int:
    """The pose of the mirrored picture: left and right change places."""
    side, level = divmod(pose, 2)
    return 2 * (2 - side) + level
