"""`sparsemtl data`: make and check data sets."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparsemtl.data import ScenesConfig
from sparsemtl.data.check import check_dataset
from sparsemtl.data.write import write_dataset
from sparsemtl.training.checkpoint import write_json


@dataclass
class WriteScenes:
    """Render procedural rooms into a folder that the NYUv2 readers read."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New folder."""
    layout: str = "nyuv2"
    """nyuv2 (AdaShare: json, png, npy) or mtan (npy folders)."""
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
        write_dataset(config, self.out, layout=self.layout, overwrite=self.overwrite)
        print(f"{self.frames} training and {self.frames_test} test frames in {self.out}")
        return 0


@dataclass
class CheckData:
    """Report each unreadable, missing or mis-sized file of a data set."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    layout: str | None = None
    """nyuv2 or mtan; found out if not given."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the report here too."""

    def run(self) -> int:
        report = check_dataset(self.folder, self.layout)
        if self.json is not None:
            write_json(self.json, report.to_json())
        for problem in report.problems:
            print(problem, file=sys.stderr)
        print(f"{self.folder}: {report.counts}, {len(report.problems)} problems")
        return 0 if report.ok else 1
