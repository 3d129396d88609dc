"""`sparsemtl data`: make and check data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparsemtl.data import (
    ScenesConfig,
    VehicleXMiniature,
    check_dataset,
    write_dataset,
    write_vehiclex,
)
from sparsemtl.training.checkpoint import write_json


@dataclass
class WriteScenes:
    """Render procedural rooms into a folder that the NYUv2 readers read."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New folder."""
    layout: str = "nyuv2"
    """nyuv2 (AdaShare: json, png, npy) or mtan (npy folders); keypoints and edges have no place
    in either."""
    frames: int = 512
    """Training frames."""
    frames_test: int = 64
    height: int = 480
    width: int = 640
    seed: int = 0
    overwrite: bool = False
    """Replace what is in the folder."""

    def run(self) -> int:
        config = ScenesConfig(
            height=self.height,
            width=self.width,
            frames_train=self.frames,
            frames_test=self.frames_test,
            seed=self.seed,
        )
        counts = write_dataset(config, self.out, self.layout, overwrite=self.overwrite)
        frames = ", ".join(f"{count} {split}" for split, count in counts.items())
        print(f"{self.out}: {frames} frames of {self.height}×{self.width} (layout {self.layout})")
        return 0


@dataclass
class WriteVehicleX:
    """Draw a miniature of Vehicle-X in its exact layout (v2: jpg and finegrained_label.xml)."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New folder."""
    frames: int = 96
    """Training pictures."""
    frames_val: int = 32
    frames_test: int = 32
    vehicles: int = 24
    """Different vehicles, at most 1362."""
    cameras: int = 5
    seed: int = 0

    def run(self) -> int:
        config = VehicleXMiniature(
            train=self.frames,
            val=self.frames_val,
            test=self.frames_test,
            vehicles=self.vehicles,
            cameras=self.cameras,
            seed=self.seed,
        )
        counts = write_vehiclex(config, self.out)
        pictures = ", ".join(f"{count} {split}" for split, count in counts.items())
        print(f"{self.out}: {pictures} pictures (layout vehiclex)")
        return 0


@dataclass
class CheckData:
    """Report each unreadable, missing or mis-sized file of a data set."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    layout: str | None = None
    """nyuv2 (AdaShare), mtan or vehiclex; found out if not given."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the report here too."""

    def run(self) -> int:
        report = check_dataset(self.folder, self.layout)
        if self.json is not None:
            write_json(self.json, report.to_json())
        print(report)
        return 0 if report.ok else 1
