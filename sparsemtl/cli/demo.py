"""`sparsemtl demo`: the whole story in minutes, dense against sparse, with pictures."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparsemtl import config as configs
from sparsemtl.cli.bench_model import BenchModel
from sparsemtl.cli.compile import Compile
from sparsemtl.cli.display import live_display
from sparsemtl.cli.report import write_report
from sparsemtl.cli.run_folder import RunFolder, read_json
from sparsemtl.cli.runner import Interrupted, execute, new_run, resume_run
from sparsemtl.cli.tables import print_summary


@dataclass
class Demo:
    """Train AdapMTL to 90 % and its dense twin on procedural rooms; compare, compile, draw."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/demo")
    """Run folder; an unfinished demo is continued, a finished one is shown again."""
    steps: int | None = None
    """Optimizer steps of each of the two runs."""

    def run(self) -> int:
        folder = RunFolder(self.out)
        config = configs.demo()
        if self.steps is not None:
            train = dataclasses.replace(config.train, steps=self.steps)
            config = dataclasses.replace(config, train=train)
        if folder.config.exists():
            found = folder.load_config()
            if (found.preset, found.train.steps) != (config.preset, config.train.steps):
                raise ValueError(
                    f"Expected {self.out} to be free or to hold a demo of {config.train.steps} "
                    f"steps, got a run of {found.train.steps} steps of preset {found.preset!r}"
                )
        if folder.summary.exists() and folder.baseline.summary.exists():
            print(f"{self.out} holds a finished demo; remove it to train again", file=sys.stderr)
            return self._show(folder)
        run = resume_run(folder) if folder.config.exists() else new_run(config, folder)
        try:
            execute(run, live_display(quiet=False))
        except Interrupted as stopped:
            print(f"{stopped} (or run the demo again)", file=sys.stderr)
            return 130
        return self._show(folder)

    def _show(self, folder: RunFolder) -> int:
        print_summary(read_json(folder.summary, "a run"), folder)
        self._compile(folder)
        page = folder.root / "report.html"
        try:
            write_report(folder, page)
        except ImportError as error:
            print(f"no page: {error}", file=sys.stderr)
        else:
            print(f"the same as a page: {page}")
        return 0

    def _compile(self, folder: RunFolder) -> None:
        """An engine of the finished model, beside torch on the same model."""
        _, _, height, width = read_json(folder.summary, "a run")["flops"]["input"]
        shape = f"1,3,{height},{width}"
        if not folder.engine.exists():
            Compile(folder.root, shape, folder.engine, quiet=True).run()
        if not folder.inference.exists():
            peers = "torch,torch-channels-last"
            BenchModel(
                target=folder.root, input=shape, against=peers, seconds=10.0, json=folder.inference
            ).run()
