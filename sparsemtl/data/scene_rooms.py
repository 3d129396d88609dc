"""A furnished room, its lights and a camera that looks into it, all drawn from one generator.

The room spans [0, X] x [0, Y] x [0, Z] metres. The camera stands near y = 0 and looks roughly
along +y, so furniture goes to the left, far and right walls and to the middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsemtl.data import scene_furniture as furniture
from sparsemtl.data.scene_builder import LABEL, Builder, Colour, Dice, Looks, Paint, Piece
from sparsemtl.data.scene_geometry import BOX, Camera, Floats, Primitives

FLOOR, CEILING, WALL = LABEL["floor"], LABEL["ceiling"], LABEL["wall"]
Rectangle = tuple[float, float, float, float]  # x0, y0, x1, y1
Maker = Callable[[Piece, Dice, float, float], None]

# maker, probability, width and depth in metres; big pieces come first, while there is room
_AGAINST_WALLS: tuple[tuple[Maker, float, tuple[float, float], tuple[float, float]], ...] = (
    (furniture.bed, 0.5, (1.0, 1.8), (1.9, 2.1)),
    (furniture.sofa, 0.6, (1.5, 2.2), (0.8, 0.95)),
    (furniture.tv_stand, 0.55, (1.0, 1.5), (0.38, 0.5)),
    (furniture.bookshelf, 0.65, (0.7, 1.2), (0.26, 0.34)),
    (furniture.cabinet, 0.6, (0.7, 1.4), (0.4, 0.6)),
    (furniture.table, 0.35, (1.0, 1.4), (0.5, 0.7)),
    (furniture.cabinet, 0.35, (0.5, 0.9), (0.35, 0.5)),
    (furniture.bookshelf, 0.3, (0.6, 0.9), (0.26, 0.32)),
    (furniture.floor_lamp, 0.35, (0.35, 0.45), (0.35, 0.45)),
    (furniture.plant, 0.4, (0.4, 0.5), (0.4, 0.5)),
)
_STANDING: tuple[tuple[Maker, float, tuple[float, float], tuple[float, float]], ...] = (
    (furniture.chair, 0.6, (0.4, 0.5), (0.4, 0.5)),
    (furniture.chair, 0.4, (0.4, 0.5), (0.4, 0.5)),
    (furniture.ball, 0.35, (0.25, 0.45), (0.25, 0.45)),
    (furniture.carton, 0.35, (0.3, 0.5), (0.3, 0.5)),
)


@dataclass(frozen=True)
class Room:
    """Everything a picture needs."""

    solids: Primitives
    looks: Looks
    walls: Looks  # 3 rows: walls, floor, ceiling
    camera: Camera
    lamp: Floats  # [3] metres
    lamp_colour: Floats  # [3]
    daylight: Floats  # [3] metres: the middle of the window, or of the far wall
    ambient: float


def make_room(generator: np.random.Generator, field_of_view: float) -> Room:
    """Draw a room.   field_of_view: horizontal, degrees"""
    dice = Dice(generator)
    size = (dice(3.2, 5.4), dice(3.4, 6.2), dice(2.35, 3.0))
    camera = _camera(dice, size, field_of_view)
    builder = Builder()
    shell = Paint("wall", "plain", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    middle = (size[0] / 2, size[1] / 2, size[2] / 2)
    builder.add(BOX, (*middle, *middle, 1.0, 0.0), shell, shades=False)
    taken = [_around(camera.position[0], camera.position[1], 0.75)]
    daylight = _hang(builder, dice, size)
    _furnish(builder, dice, size, taken)
    solids, looks = builder.finish()
    return Room(
        solids,
        looks,
        _shell(dice),
        camera,
        lamp=np.array((size[0] * dice(0.3, 0.7), size[1] * dice(0.3, 0.7), size[2] - 0.15)),
        lamp_colour=np.array(dice.colour((0.08, 0.14), (0.0, 0.22), (0.95, 1.0))),
        daylight=np.array(daylight),
        ambient=dice(0.38, 0.52),
    )


def _camera(dice: Dice, size: tuple[float, float, float], field_of_view: float) -> Camera:
    x, y, z = size[0] * dice(0.25, 0.75), dice(0.3, 0.8), dice(1.25, 1.75)
    aim = math.atan2(size[1] * 0.75 - y, size[0] * dice(0.25, 0.75) - x)
    pitch, roll = math.radians(dice(-21.0, -5.0)), math.radians(dice(-2.0, 2.0))
    heading = np.array((math.cos(aim), math.sin(aim), 0.0))
    level = np.array((math.sin(aim), -math.cos(aim), 0.0))  # to the right, in the horizontal plane
    forward = math.cos(pitch) * heading + np.array((0.0, 0.0, math.sin(pitch)))
    upright = np.cross(level, forward)
    right = math.cos(roll) * level + math.sin(roll) * upright
    up = math.cos(roll) * upright - math.sin(roll) * level
    focal = 0.5 / math.tan(math.radians(field_of_view) / 2)
    return Camera(np.array((x, y, z)), np.stack((right, forward, up)), focal)


def _shell(dice: Dice) -> Looks:
    """Paints of the walls, the floor and the ceiling, in this order."""
    builder = Builder()
    wall = dice.colour((0.0, 1.0), (0.03, 0.28), (0.72, 0.95))
    trim = (wall[0] * 0.88, wall[1] * 0.88, wall[2] * 0.88)
    boards = dice.pick(("wood", "wood", "tiles", "carpet"))
    if boards == "wood":
        floor = dice.colour((0.05, 0.1), (0.35, 0.65), (0.4, 0.7))
    elif boards == "tiles":
        floor = dice.colour((0.05, 0.6), (0.02, 0.15), (0.5, 0.8))
    else:
        floor = dice.colour((0.0, 1.0), (0.1, 0.35), (0.35, 0.6))
    seam = (floor[0] * 0.72, floor[1] * 0.72, floor[2] * 0.72)
    scale = {"wood": dice(0.1, 0.18), "tiles": dice(0.3, 0.5), "carpet": 0.06}[boards]
    white = dice.colour((0.1, 0.16), (0.0, 0.06), (0.9, 1.0))
    here = builder.at(0.0, 0.0, 0.0)
    cube = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    paper = dice.pick(("wallpaper", "plain", "plain"))
    here.box(*cube, Paint("wall", paper, wall, trim, dice(0.15, 0.35)))
    here.box(*cube, Paint("floor", boards, floor, seam, scale))
    here.box(*cube, Paint("ceiling", "plain", white, white))
    return builder.finish()[1]


def _against(
    wall: str, size: tuple[float, float, float], along: float, off: float
) -> tuple[float, float, float]:
    """x, y and angle of a frame that looks into the room from `off` metres before a wall."""
    if wall == "left":
        return off, along, -math.pi / 2
    if wall == "right":
        return size[0] - off, along, math.pi / 2
    return along, size[1] - off, math.pi


def _length(wall: str, size: tuple[float, float, float]) -> float:
    return size[0] if wall == "far" else size[1]


def _around(x: float, y: float, radius: float) -> Rectangle:
    return (x - radius, y - radius, x + radius, y + radius)


def _free(taken: list[Rectangle], new: Rectangle, margin: float = 0.04) -> bool:
    x0, y0, x1, y1 = new
    return all(
        x1 + margin <= a0 or a1 + margin <= x0 or y1 + margin <= b0 or b1 + margin <= y0
        for a0, b0, a1, b1 in taken
    )


def _furnish(
    builder: Builder, dice: Dice, size: tuple[float, float, float], taken: list[Rectangle]
) -> None:
    for maker, probability, widths, depths in _AGAINST_WALLS:
        if not dice.chance(probability):
            continue
        width, depth = dice(*widths), dice(*depths)
        for _ in range(6):
            wall = dice.pick(("left", "far", "far", "right"))
            room = _length(wall, size) - width - 0.1
            x, y, angle = _against(
                wall, size, width / 2 + 0.05 + max(room, 0.0) * dice(), depth / 2 + 0.03
            )
            across, along = (width, depth) if wall == "far" else (depth, width)
            spot = (x - across / 2, y - along / 2, x + across / 2, y + along / 2)
            if room > 0 and spot[1] > 1.0 and _free(taken, spot):
                taken.append(spot)
                maker(builder.at(x, y, angle), dice, width, depth)
                break
    _dining(builder, dice, size, taken)
    for maker, probability, widths, depths in _STANDING:
        if not dice.chance(probability):
            continue
        width, depth = dice(*widths), dice(*depths)
        for _ in range(6):
            x, y = dice(0.5, size[0] - 0.5), dice(1.6, size[1] - 0.5)
            spot = _around(x, y, math.hypot(width, depth) / 2)
            if _free(taken, spot):
                taken.append(spot)
                maker(builder.at(x, y, dice(-math.pi, math.pi)), dice, width, depth)
                break


def _dining(
    builder: Builder, dice: Dice, size: tuple[float, float, float], taken: list[Rectangle]
) -> None:
    """A table in the middle with chairs around it, on a rug now and then."""
    if not dice.chance(0.7):
        return
    width, depth = dice(0.8, 1.5), dice(0.7, 0.95)
    for _ in range(8):
        x, y, angle = dice(1.0, size[0] - 1.0), dice(2.0, size[1] - 1.0), dice(-0.5, 0.5)
        if _free(taken, _around(x, y, max(width, depth) / 2 + 0.1)):
            break
    else:
        return
    piece = builder.at(x, y, angle)
    furniture.table(piece, dice, width, depth)
    taken.append(_around(x, y, max(width, depth) / 2))
    for dx, dy, turn in (
        (0, 0.75, math.pi),
        (0, -0.75, 0.0),
        (0.9, 0, math.pi / 2),
        (-0.9, 0, -math.pi / 2),
    ):
        px, py = piece.place(dx * width * 0.8, dy * (depth + 0.15))
        spot = _around(px, py, 0.27)
        inside = 0.3 < px < size[0] - 0.3 and 1.3 < py < size[1] - 0.3
        if dice.chance(0.75) and inside and _free(taken[:-1], spot):
            facing = angle + turn + dice(-0.3, 0.3)
            furniture.chair(builder.at(px, py, facing), dice, dice(0.4, 0.48), dice(0.4, 0.48))
    if dice.chance(0.5):
        colour = dice.colour((0, 1), (0.3, 0.7), (0.4, 0.8))
        rug = Paint("floor", "plaid", colour, dice.colour((0, 1), (0.2, 0.6), (0.4, 0.9)), 0.3)
        piece.box((0, 0, 0.006), (width + 1.0, depth + 0.9, 0.012), rug)


def _hang(
    builder: Builder, dice: Dice, size: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Windows, pictures, a door, a screen on the walls; returns where the daylight comes from."""
    daylight = (size[0] / 2, size[1], size[2] * 0.6)
    used: dict[str, list[tuple[float, float]]] = {"left": [], "far": [], "right": []}
    wishes = ("window", "picture", "picture", "door", "tv", "window", "picture")
    for wish, probability in zip(wishes, (0.85, 0.8, 0.6, 0.5, 0.25, 0.35, 0.4), strict=True):
        if not dice.chance(probability):
            continue
        width, height, middle = {
            "window": (dice(0.8, 1.6), dice(0.9, 1.3), dice(1.45, 1.6)),
            "picture": (dice(0.4, 1.0), dice(0.4, 0.75), dice(1.5, 1.75)),
            "door": (dice(0.8, 0.95), 2.05, 1.025),
            "tv": (dice(0.9, 1.3), dice(0.55, 0.75), dice(1.3, 1.6)),
        }[wish]
        for _ in range(4):
            wall = dice.pick(("left", "far", "far", "right"))
            low = 0.2 if wall == "far" else 1.2
            along = dice(low + width / 2, _length(wall, size) - 0.2 - width / 2)
            if all(abs(along - a) > (width + w) / 2 + 0.08 for a, w in used[wall]):
                break
        else:
            continue
        used[wall].append((along, width))
        thick = 0.05
        x, y, angle = _against(wall, size, along, thick / 2)
        paint = _panel(wish, dice)
        builder.at(x, y, angle).box((0, 0, middle), (width, thick, height), paint)
        if wish == "window":
            daylight = (*_against(wall, size, along, 0.5)[:2], middle)
    return daylight


def _panel(wish: str, dice: Dice) -> Paint:
    if wish == "window":
        sky = dice.colour((0.52, 0.62), (0.15, 0.5), (0.85, 1.0))
        return Paint("window", "window", sky, dice.colour((0.1, 0.15), (0, 0.1), (0.85, 1.0)), 2.0)
    if wish == "picture":
        frame: Colour = dice.pick((furniture.BLACK, furniture.wood_colour(dice), (0.75, 0.62, 0.3)))
        return Paint("picture", "picture", dice.colour((0, 1), (0.3, 0.9), (0.4, 0.9)), frame)
    if wish == "door":
        wood = furniture.wood_colour(dice) if dice.chance(0.5) else (0.88, 0.87, 0.84)
        return Paint("wall", "doors", wood, (wood[0] * 0.6, wood[1] * 0.6, wood[2] * 0.6), 1.0)
    return Paint("tv", "screen", furniture.BLACK, dice.colour((0.5, 0.7), (0.1, 0.5), (0.1, 0.3)))
