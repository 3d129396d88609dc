"""Collect solids piece by piece in the frame of a piece of furniture, and the dice that vary them.

A piece stands at (x, y) on the floor and is turned by an angle; its own frame has x to its right,
y towards its front and z up, all in metres.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sparsemtl.data.scene_geometry import BOX, CYLINDER, ELLIPSOID, Primitives

Colour = tuple[float, float, float]  # RGB in [0, 1]
Box3 = tuple[float, float, float]
Choice = TypeVar("Choice")

# The 13 classes of Couprie et al. (ICLR 2013) in the order of the published 40 -> 13 table.
CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects",
    "picture", "sofa", "table", "tv", "wall", "window",
)  # fmt: skip
LABEL = {name: label for label, name in enumerate(CLASSES)}

MATERIALS = (
    "plain", "wood", "tiles", "stripes", "plaid", "doors", "spines", "window", "screen",
    "picture", "wallpaper", "carpet", "lamp",
)  # fmt: skip
MATERIAL = {name: number for number, name in enumerate(MATERIALS)}


class Dice:
    """A stream of uniform numbers, drawn in blocks: cheaper than a generator's call for each."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._values: list[float] = []

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._values:
            self._values = self._generator.random(1024).tolist()
        return low + (high - low) * self._values.pop()

    def pick(self, choices: Sequence[Choice]) -> Choice:
        return choices[int(self() * len(choices))]

    def chance(self, probability: float) -> bool:
        return self() < probability

    def colour(
        self, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]
    ) -> Colour:
        """A colour from ranges of hue (may pass 1), saturation and value."""
        return colorsys.hsv_to_rgb(self(*hue) % 1.0, self(*saturation), self(*value))


@dataclass(frozen=True)
class Paint:
    """How a solid looks: a label, a material, two colours and the size of the pattern in metres."""

    label: str
    material: str
    colour: Colour
    accent: Colour
    scale: float = 0.2


@dataclass
class Builder:
    """Solids of one room, in lists until `finish`."""

    kind: list[int] = field(default_factory=list)
    shape: list[tuple[float, ...]] = field(default_factory=list)  # centre, half, cosine, sine
    label: list[int] = field(default_factory=list)
    material: list[int] = field(default_factory=list)
    colours: list[tuple[float, ...]] = field(default_factory=list)  # colour, accent, scale
    shades: list[bool] = field(default_factory=list)
    piece: list[int] = field(default_factory=list)
    pieces: int = 0

    def at(self, x: float, y: float, angle: float, z: float = 0.0) -> Piece:
        self.pieces += 1
        return Piece(self, x, y, z, math.cos(angle), math.sin(angle), self.pieces)

    def add(
        self, kind: int, shape: tuple[float, ...], paint: Paint, shades: bool, piece: int = 0
    ) -> None:
        self.kind.append(kind)
        self.shape.append(shape)
        self.label.append(LABEL[paint.label])
        self.material.append(MATERIAL[paint.material])
        self.colours.append((*paint.colour, *paint.accent, paint.scale))
        self.shades.append(shades)
        self.piece.append(piece)

    def finish(self) -> tuple[Primitives, Looks]:
        shape = np.array(self.shape)
        colours = np.array(self.colours, dtype=np.float32)
        solids = Primitives(
            np.array(self.kind, dtype=np.int8), shape[:, :3], shape[:, 3:6], shape[:, 6:]
        )
        looks = Looks(
            np.array(self.label, dtype=np.int64),
            np.array(self.material, dtype=np.int64),
            colours[:, :3],
            colours[:, 3:6],
            colours[:, 6],
            np.array(self.shades),
            np.array(self.piece, dtype=np.int64),
        )
        return solids, looks


@dataclass(frozen=True)
class Looks:
    """Per solid: label, material, scale, whether it casts a shadow, piece; colour, accent.

    Colours are [P, 3], all others [P].
    piece: number of the thing that the solid is part of, from 1; 0 for the room itself
    """

    label: npt.NDArray[np.int64]
    material: npt.NDArray[np.int64]
    colour: npt.NDArray[np.float32]
    accent: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    shades: npt.NDArray[np.bool_]
    piece: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A frame to add solids in; sizes are full extents, `centre` is in the frame."""

    builder: Builder
    x: float
    y: float
    z: float
    cosine: float
    sine: float
    number: int

    def box(self, centre: Box3, size: Box3, paint: Paint, *, shades: bool = False) -> None:
        self._add(BOX, centre, size, paint, shades)

    def ellipsoid(self, centre: Box3, size: Box3, paint: Paint, *, shades: bool = False) -> None:
        self._add(ELLIPSOID, centre, size, paint, shades)

    def cylinder(
        self, centre: Box3, diameter: float, height: float, paint: Paint, *, shades: bool = False
    ) -> None:
        self._add(CYLINDER, centre, (diameter, diameter, height), paint, shades)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point of this frame in the world."""
        return (
            self.x + self.cosine * x - self.sine * y,
            self.y + self.sine * x + self.cosine * y,
        )

    def _add(self, kind: int, centre: Box3, size: Box3, paint: Paint, shades: bool) -> None:
        x, y = self.place(centre[0], centre[1])
        half = (size[0] / 2, size[1] / 2, size[2] / 2)
        shape = (x, y, self.z + centre[2], *half, self.cosine, self.sine)
        self.builder.add(kind, shape, paint, shades, self.number)
