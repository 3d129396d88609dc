"""A miniature of Vehicle-X in its exact layout: drawn cars, to try reader and training with.

A picture is a function of (seed, split, number). A vehicle has one colour and one type, as in the
original; the camera decides the ground and how large the car stands.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsemtl.data.base import DataError
from sparsemtl.data.vehiclex import COLOURS, LABELS, SPLITS, TYPES, VEHICLES
from sparsemtl.data.write import write_atomically

SIZE = 256  # pixels, both ways
_RGB = {
    **{"yellow": (230, 210, 40), "orange": (230, 130, 30), "green": (40, 140, 60)},
    **{"gray": (128, 128, 128), "red": (190, 30, 35), "blue": (35, 60, 170)},
    **{"white": (240, 240, 240), "golden": (200, 165, 80), "brown": (105, 70, 45)},
    **{"black": (25, 25, 28), "purple": (110, 50, 140), "pink": (235, 130, 170)},
}
# Length, height and roof (start, end) of each type, in parts of the picture.
_SHAPES = (
    *((0.62, 0.22, 0.25, 0.75), (0.60, 0.30, 0.15, 0.85), (0.64, 0.36, 0.05, 0.95)),
    *((0.50, 0.25, 0.20, 0.90), (0.60, 0.33, 0.10, 0.90), (0.66, 0.28, 0.15, 0.50)),
    *((0.80, 0.40, 0.00, 1.00), (0.76, 0.42, 0.70, 1.00), (0.68, 0.24, 0.20, 0.98)),
    *((0.58, 0.17, 0.35, 0.65), (0.72, 0.38, 0.08, 1.00)),
)


@dataclass(frozen=True)
class VehicleXMiniature:
    """How large the miniature is."""

    train: int = 96  # pictures
    val: int = 32
    test: int = 32
    vehicles: int = 24  # different vehicles, at most 1362
    cameras: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "val", "test", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"VehicleXMiniature: Expected {name} >= 0, got {getattr(self, name)}"
                )
        if not 1 <= self.vehicles <= VEHICLES:
            raise ValueError(
                f"VehicleXMiniature: Expected vehicles in 1..{VEHICLES}, got {self.vehicles}"
            )
        if not 1 <= self.cameras <= 999:
            raise ValueError(f"VehicleXMiniature: Expected cameras in 1..999, got {self.cameras}")


def write_vehiclex(config: VehicleXMiniature, out: str | Path) -> dict[str, int]:
    """Write pictures, labels and the two lists.

    returns: pictures per split
    raises:  DataError if `out` holds anything: nothing is ever replaced
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"write_vehiclex: Expected {out} to be new or an empty folder, got another")
    counts = {split: getattr(config, split) for split in SPLITS}
    root = ElementTree.Element("TrainingImages")
    items = ElementTree.SubElement(root, "Items", number=str(sum(counts.values())))
    number = 0
    for place, split in enumerate(SPLITS):
        (out / split).mkdir(parents=True)
        for index in range(counts[split]):
            number += 1
            attributes, picture = _draw(config, place, index, number)
            ElementTree.SubElement(items, "Item", attributes)
            write_atomically(out / split / attributes["imageName"], picture)
    ElementTree.indent(root)
    write_atomically(out / LABELS, ElementTree.tostring(root, "utf-8", xml_declaration=True))
    for file, names in (("list_color.txt", COLOURS), ("list_type.txt", TYPES)):
        text = "".join(f"{i} {name}\n" for i, name in enumerate(names))
        write_atomically(out / file, text.encode())
    return counts


def _draw(
    config: VehicleXMiniature, split: int, index: int, number: int
) -> tuple[dict[str, str], bytes]:
    """The attributes and the jpg of one picture."""
    key = np.random.SeedSequence(config.seed, spawn_key=(split, index))
    dice = np.random.default_rng(key)
    vehicle, camera = int(dice.integers(config.vehicles)), int(dice.integers(config.cameras))
    own = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(9, vehicle)))
    colour, kind = int(own.integers(len(COLOURS))), int(own.integers(len(TYPES)))
    light = float(dice.uniform(0.7, 1.1))
    name = f"{vehicle + 1:04d}_c{camera + 1:03d}_{number}.jpg"
    attributes = {
        "imageName": name,
        "vehicleID": f"{vehicle + 1:04d}",
        "cameraID": f"c{camera + 1:03d}",
        "colorID": str(colour),
        "typeID": str(kind),
        "orientation": f"{dice.uniform(0, 360):.2f}",
        "lightInt": f"{light:.3f}",
        "lightDir": f"{dice.uniform(0, 180):.2f}",
        "camHei": f"{1.0 + camera:.2f}",
        "camDis": f"{6.0 + camera:.2f}",
    }
    return attributes, _picture(dice, own, colour, kind, camera / max(1, config.cameras - 1), light)


def _picture(
    dice: np.random.Generator,
    own: np.random.Generator,
    colour: int,
    kind: int,
    far: float,
    light: float,
) -> bytes:
    from PIL import Image, ImageDraw

    ground = tuple(int(v) for v in (np.array((90, 95, 100)) + 60 * far * np.array((1, 0.6, 0.2))))
    image = Image.new("RGB", (SIZE, SIZE), (150, 175 + int(40 * far), 200))
    canvas = ImageDraw.Draw(image)
    horizon = SIZE * (0.3 + 0.25 * far)
    canvas.rectangle((0, horizon, SIZE, SIZE), fill=ground)
    length, height, start, end = _SHAPES[kind]
    scale = SIZE * (1.0 - 0.35 * far)
    width, tall = length * scale, height * scale
    left = (SIZE - width) / 2 + float(dice.uniform(-12, 12))
    bottom = SIZE * 0.78 + float(dice.uniform(-10, 10))
    paint = tuple(int(min(255, v * light)) for v in _RGB[COLOURS[colour]])
    body = bottom - 0.55 * tall
    canvas.rounded_rectangle((left, body, left + width, bottom), 6, fill=paint)
    roof = (left + start * width, bottom - tall, left + end * width, body + 4)
    canvas.rounded_rectangle(roof, 6, fill=paint)
    inset = 0.12 * tall
    glass = (roof[0] + inset, roof[1] + inset, roof[2] - inset, body)
    if glass[2] > glass[0] and glass[3] > glass[1]:
        canvas.rectangle(glass, fill=(40, 55, 70))
    for place in (0.2, 0.8):
        x, radius = left + place * width, 0.16 * tall + 6
        canvas.ellipse(
            (x - radius, bottom - radius, x + radius, bottom + radius), fill=(20, 20, 20)
        )
    mark = tuple(int(v) for v in own.integers(0, 256, 3))  # tells vehicles of one kind apart
    x, y = left + float(own.uniform(0.3, 0.6)) * width, body + 0.15 * tall
    canvas.rectangle((x, y, x + 0.12 * width, y + 0.12 * tall + 3), fill=mark)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
