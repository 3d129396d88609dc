"""`sparsemtl report`: a finished run as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparsemtl.cli.run_folder import RunFolder, read_json
from sparsemtl.report.html import inference_of, run_page
from sparsemtl.training.checkpoint import atomic_write


@dataclass
class Report:
    """Write a finished run as one self-contained HTML page."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run folder that `sparsemtl train` left."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The page; report.html in the run folder by default."""

    def run(self) -> int:
        path = self.out or self.run_folder / "report.html"
        if self.out is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"Expected --out to be a file in a folder that exists, got {path}")
        write_report(RunFolder(self.run_folder), path)
        print(path)
        return 0


def write_report(folder: RunFolder, path: Path) -> None:
    """raises: ValueError if the run is not finished; ImportError without jinja2"""
    config = read_json(folder.config, "a run folder")
    if not folder.summary.exists():
        raise ValueError(
            f"Expected a finished run in {folder.root} (summary.json), got none; "
            f"`sparsemtl train --resume {folder.root}` finishes it"
        )
    summary = read_json(folder.summary, "a finished run")
    command = f"sparsemtl train --preset {folder.config} --out NEW_FOLDER"
    try:
        measured = None
        if folder.inference.exists():
            measured = inference_of(read_json(folder.inference, "a measurement"))
        page = run_page(summary, config, folder.plots, command, measured)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected {folder.summary} to be a run's summary, got one without {error}"
        ) from error
    atomic_write(path, lambda file: file.write(page.encode("utf-8")))
