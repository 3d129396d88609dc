"""Class names of NYUv2 and the table from 40 to 13 classes.

Sources: 40 classes, Gupta, Arbelaez and Malik, CVPR 2013; 13 classes, Couprie et al., ICLR 2013;
the table is class13Mapping.mat of github.com/ankurhanda/nyuv2-meta-data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

VOID_40 = 255  # in files that count classes from 0
VOID_13 = 0  # in seg13 files, which count classes from 1
NAMES_40 = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf",
    "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror",
    "floor mat", "clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel",
    "shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp",
    "bathtub", "bag", "other structure", "other furniture", "other prop",
)  # fmt: skip
NAMES_13 = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects",
    "picture", "sofa", "table", "tv", "wall", "window",
)  # fmt: skip
_13_OF_40 = (  # classes from 1, as published
    12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5,
    7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7,
)  # fmt: skip

# The first of the 40 classes that each of the 13 gathers, e.g. "wall" for wall and not "door".
_40_OF_13 = tuple(_13_OF_40.index(label + 1) for label in range(13))


def to_13(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """0..39 and 255 -> 0..12 and 255; any other value -> 255 (readers refuse those first)."""
    table = np.full(256, VOID_40, dtype=np.uint8)
    table[: len(_13_OF_40)] = np.array(_13_OF_40) - 1
    return table[labels]


def to_40(labels: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """0..12 -> one of the 40 classes that `to_13` takes back to it."""
    return np.array(_40_OF_13, dtype=np.uint8)[labels]
