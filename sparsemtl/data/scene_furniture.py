"""Pieces of furniture. Each function adds one piece in its own frame and returns nothing.

Front is +y of the piece; a piece against a wall has its back at y = -depth / 2. Metres throughout.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsemtl.data.scene_builder import Colour, Dice, Paint, Piece

BLACK: Colour = (0.05, 0.05, 0.06)


def wood_colour(dice: Dice) -> Colour:
    return dice.colour((0.05, 0.11), (0.35, 0.7), (0.3, 0.75))


def _darker(colour: Colour, factor: float = 0.7) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _legs(piece: Piece, x: float, y: float, height: float, thick: float, paint: Paint) -> None:
    for side in (-1.0, 1.0):
        for end in (-1.0, 1.0):
            centre = (side * (x - thick) / 2, end * (y - thick) / 2, height / 2)
            piece.box(centre, (thick, thick, height), paint)


def bed(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    frame = wood_colour(dice)
    cover = dice.colour((0.0, 1.0), (0.25, 0.7), (0.55, 0.95))
    accent = dice.colour((0.0, 1.0), (0.1, 0.5), (0.7, 1.0))
    wood = Paint("bed", "wood", frame, _darker(frame), 0.15)
    cloth = Paint("bed", dice.pick(("stripes", "plaid", "plain")), cover, accent, dice(0.12, 0.35))
    sheet = Paint("bed", "plain", (0.92, 0.91, 0.88), cover)
    top = dice(0.42, 0.58)
    piece.box((0, 0, 0.14), (width, depth, 0.24), wood, shades=True)
    piece.box(
        (0, 0, (0.26 + top) / 2), (width * 0.97, depth * 0.97, top - 0.26), sheet, shades=True
    )
    piece.box(
        (0, depth * 0.14, (0.3 + top) / 2 + 0.02), (width * 1.02, depth * 0.74, top - 0.28), cloth
    )
    piece.box((0, 0.04 - depth / 2, 0.5), (width * 1.04, 0.08, dice(0.85, 1.1)), wood, shades=True)
    pillow = Paint("objects", "plain", dice.colour((0, 1), (0.05, 0.6), (0.75, 1.0)), cover)
    for side in (-1, 1) if width > 1.2 else (0,):
        piece.ellipsoid(
            (side * width * 0.24, 0.32 - depth / 2, top + 0.08), (0.62, 0.4, 0.24), pillow
        )


def sofa(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    colour = dice.colour((0.0, 1.0), (0.2, 0.75), (0.2, 0.6))
    cloth = Paint(
        "sofa", dice.pick(("plain", "carpet", "stripes")), colour, _darker(colour, 0.8), 0.1
    )
    seat, arm, back = dice(0.4, 0.46), dice(0.16, 0.24), dice(0.75, 0.95)
    piece.box((0, 0, 0.16), (width, depth, 0.24), cloth, shades=True)
    piece.box((0, 0.1 - depth / 2, back / 2 + 0.05), (width, 0.22, back - 0.1), cloth, shades=True)
    for side in (-1.0, 1.0):
        centre = (side * (width - arm) / 2, 0.0, 0.34)
        piece.box(centre, (arm, depth, 0.56), cloth, shades=True)
    inner = (width - 2 * arm) / 2
    for side in (-0.5, 0.5):
        piece.box((side * inner, 0.1, seat - 0.06), (inner * 0.97, depth - 0.24, 0.16), cloth)
        piece.ellipsoid((side * inner, 0.27 - depth / 2, seat + 0.22), (inner, 0.3, 0.44), cloth)
    if dice.chance(0.6):
        cushion = Paint("objects", "plaid", dice.colour((0, 1), (0.4, 0.9), (0.6, 1.0)), (1, 1, 1))
        piece.ellipsoid((inner * dice(-0.7, 0.7), 0.1, seat + 0.2), (0.42, 0.2, 0.4), cushion)


def table(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    colour = dice.colour((0.06, 0.12), (0.4, 0.75), (0.5, 0.85))
    paint = Paint("table", "wood", colour, _darker(colour), dice(0.08, 0.2))
    height = dice(0.68, 0.78) if width > 0.95 else dice(0.4, 0.6)
    if dice.chance(0.3):
        size = min(width, depth)
        piece.cylinder((0, 0, height - 0.025), size, 0.05, paint, shades=True)
        piece.cylinder((0, 0, height / 2), 0.1, height - 0.05, paint)
        piece.cylinder((0, 0, 0.02), size * 0.5, 0.04, paint)
    else:
        piece.box((0, 0, height - 0.025), (width, depth, 0.05), paint, shades=True)
        _legs(piece, width * 0.95, depth * 0.92, height - 0.05, dice(0.05, 0.09), paint)
    clutter(piece, dice, width * 0.7, depth * 0.6, height)


def chair(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    colour = dice.colour((0.0, 0.08), (0.55, 0.95), (0.35, 0.75))
    if dice.chance(0.3):
        colour = dice.colour((0.0, 1.0), (0.0, 0.15), (0.12, 0.25))
    paint = Paint("chair", dice.pick(("plain", "stripes")), colour, _darker(colour), 0.08)
    seat, thick = dice(0.43, 0.48), dice(0.035, 0.055)
    piece.box((0, 0, seat), (width, depth, 0.05), paint, shades=True)
    _legs(piece, width, depth, seat, thick, paint)
    top = seat + dice(0.4, 0.55)
    for side in (-1.0, 1.0):
        centre = (side * (width - thick) / 2, (thick - depth) / 2, (seat + top) / 2)
        piece.box(centre, (thick, thick, top - seat), paint)
    for low, high in ((0.15, 0.45), (0.6, 0.95)):
        centre_z, extent = seat + (top - seat) * (low + high) / 2, (top - seat) * (high - low)
        piece.box((0, (thick - depth) / 2, centre_z), (width, 0.03, extent), paint)


def cabinet(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    white = dice.chance(0.35)
    colour = dice.colour((0.08, 0.14), (0.03, 0.12), (0.8, 0.95)) if white else wood_colour(dice)
    height = dice.pick((dice(0.7, 1.0), dice(1.7, 2.1)))
    doors = Paint("furniture", "doors", colour, _darker(colour, 0.45), dice.pick((2.0, 3.0)))
    piece.box((0, 0, height / 2), (width, depth, height), doors, shades=True)
    if height < 1.2:
        clutter(piece, dice, width * 0.8, depth * 0.5, height)


def bookshelf(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    colour = wood_colour(dice)
    wood = Paint("furniture", "wood", colour, _darker(colour), 0.12)
    height, rows = dice(1.5, 2.1), dice.pick((4, 5))
    piece.box((0, 0.015 - depth / 2, height / 2), (width, 0.03, height), wood, shades=True)
    for side in (-1.0, 1.0):
        piece.box(
            (side * (width - 0.04) / 2, 0, height / 2), (0.04, depth, height), wood, shades=True
        )
    step = (height - 0.04) / rows
    for row in range(rows + 1):
        piece.box((0, 0, 0.02 + row * step), (width, depth, 0.03), wood)
        if row == rows or dice.chance(0.12):
            continue
        length = (width - 0.1) * dice(0.6, 1.0)
        tall = step * dice(0.65, 0.88)
        offset = (width - 0.1 - length) / 2 * dice.pick((-1.0, 1.0))
        centre = (offset, -0.02, 0.035 + row * step + tall / 2)
        piece.box(centre, (length, depth * 0.7, tall), _books(dice))


def tv_stand(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    colour = wood_colour(dice)
    height, tall = dice(0.4, 0.6), width * dice(0.42, 0.55)
    doors = Paint("furniture", "doors", colour, _darker(colour, 0.5), 3.0)
    piece.box((0, 0, height / 2), (width, depth, height), doors, shades=True)
    screen = Paint("tv", "screen", BLACK, dice.colour((0.5, 0.7), (0.1, 0.5), (0.1, 0.3)))
    piece.box((0, 0, height + 0.02), (width * 0.35, 0.2, 0.04), Paint("tv", "plain", BLACK, BLACK))
    piece.box((0, 0, height + 0.06 + tall / 2), (width * 0.92, 0.06, tall), screen, shades=True)


def floor_lamp(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    metal = Paint("objects", "plain", dice.colour((0.1, 0.15), (0, 0.3), (0.2, 0.6)), BLACK)
    shade = Paint("objects", "lamp", dice.colour((0.08, 0.16), (0.1, 0.4), (0.9, 1.0)), (1, 1, 0.9))
    height = dice(1.3, 1.7)
    piece.cylinder((0, 0, 0.02), min(width, depth) * 0.8, 0.04, metal)
    piece.cylinder((0, 0, height / 2), 0.035, height, metal)
    piece.cylinder((0, 0, height), min(width, depth), 0.32, shade)


def plant(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    pot = Paint("objects", "plain", dice.colour((0.0, 0.1), (0.2, 0.7), (0.4, 0.8)), BLACK)
    size = min(width, depth)
    leaves = dice.colour((0.25, 0.38), (0.5, 0.9), (0.25, 0.6))
    green = Paint("objects", "carpet", leaves, _darker(leaves, 0.6), 0.05)
    piece.cylinder((0, 0, 0.17), size * 0.6, 0.34, pot, shades=True)
    for _ in range(4):
        centre = (dice(-0.12, 0.12), dice(-0.12, 0.12), dice(0.5, 0.95))
        piece.ellipsoid(centre, (dice(0.2, 0.4), dice(0.2, 0.4), dice(0.3, 0.55)), green)


def ball(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    size = min(width, depth)
    paint = Paint(
        "objects", "stripes", dice.colour((0, 1), (0.6, 1.0), (0.6, 1.0)), (1, 1, 1), 0.15
    )
    piece.ellipsoid((0, 0, size / 2), (size, size, size), paint, shades=True)


def carton(piece: Piece, dice: Dice, width: float, depth: float) -> None:
    paint = Paint("objects", "plain", dice.colour((0, 1), (0.3, 0.8), (0.5, 0.9)), (1, 1, 1))
    height = dice(0.2, 0.45)
    piece.box((0, 0, height / 2), (width, depth, height), paint, shades=True)


def clutter(piece: Piece, dice: Dice, width: float, depth: float, height: float) -> None:
    """Up to three small things on a top of the given height."""
    for slot in (-0.33, 0.0, 0.33):
        if dice.chance(0.35):
            continue
        x, y = slot * width + dice(-0.04, 0.04), dice(-0.3, 0.3) * depth
        px, py = piece.place(x, y)
        small = Piece(piece.builder, px, py, height, piece.cosine, piece.sine, piece.number)
        dice.pick(SMALL)(small, dice)


def _books(dice: Dice) -> Paint:
    return Paint(
        "books", "spines", dice.colour((0, 1), (0.4, 0.8), (0.4, 0.9)), BLACK, dice(0.03, 0.05)
    )


def _stack(piece: Piece, dice: Dice) -> None:
    z = 0.0
    for _ in range(dice.pick((2, 3, 4))):
        thick = dice(0.03, 0.05)
        piece.box(
            (dice(-0.02, 0.02), 0, z + thick / 2), (dice(0.24, 0.3), 0.2, thick), _books(dice)
        )
        z += thick


def _row(piece: Piece, dice: Dice) -> None:
    piece.box((0, 0, 0.12), (dice(0.2, 0.35), 0.18, 0.24), _books(dice))


def _vase(piece: Piece, dice: Dice) -> None:
    colour = dice.colour((0, 1), (0.5, 1.0), (0.5, 1.0))
    paint = Paint("objects", "plain", colour, _darker(colour))
    piece.ellipsoid((0, 0, 0.1), (0.17, 0.17, 0.2), paint)
    piece.cylinder((0, 0, 0.22), 0.07, 0.12, paint)


def _mug(piece: Piece, dice: Dice) -> None:
    paint = Paint("objects", "plain", dice.colour((0, 1), (0.3, 1.0), (0.6, 1.0)), BLACK)
    piece.cylinder((0, 0, 0.07), 0.1, 0.14, paint)


def _table_lamp(piece: Piece, dice: Dice) -> None:
    base = Paint("objects", "plain", dice.colour((0, 1), (0.1, 0.6), (0.3, 0.8)), BLACK)
    shade = Paint("objects", "lamp", dice.colour((0.08, 0.16), (0.1, 0.4), (0.9, 1.0)), (1, 1, 0.9))
    piece.cylinder((0, 0, 0.12), 0.07, 0.24, base)
    piece.cylinder((0, 0, 0.33), 0.26, 0.2, shade)


SMALL: tuple[Callable[[Piece, Dice], None], ...] = (_stack, _row, _vase, _mug, _table_lamp, _stack)
