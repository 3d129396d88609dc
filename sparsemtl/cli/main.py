"""Parses the command line, runs the verb, turns errors into one sentence and an exit code.

Exit codes: 0 done, 1 the work failed, 2 bad arguments or input, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Protocol, cast

import sparsemtl
from sparsemtl.errors import CheckpointError, DivergedError
from sparsemtl.ops.dispatch import BackendUnavailable


class Command(Protocol):
    """What every verb's dataclass is."""

    def run(self) -> int: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    try:
        import tyro
    except ImportError:
        print("the command line needs tyro: pip install tyro rich", file=sys.stderr)
        return 2
    from sparsemtl.cli.bench import BenchAdam, BenchConv, BenchStep, BenchThreshold
    from sparsemtl.cli.bench_model import BenchModel
    from sparsemtl.cli.compare import Compare
    from sparsemtl.cli.compile import Compile, Explain
    from sparsemtl.cli.data import CheckData, WriteScenes, WriteVehicleX
    from sparsemtl.cli.demo import Demo
    from sparsemtl.cli.evaluate import Evaluate
    from sparsemtl.cli.info import Info
    from sparsemtl.cli.prune import Prune
    from sparsemtl.cli.report import Report
    from sparsemtl.cli.run import Run
    from sparsemtl.cli.similarity import Similarity
    from sparsemtl.cli.train import Train

    data = (
        Annotated[WriteScenes, tyro.conf.subcommand("scenes")]
        | Annotated[WriteVehicleX, tyro.conf.subcommand("vehiclex")]
        | Annotated[CheckData, tyro.conf.subcommand("check")]
    )
    bench = (
        Annotated[BenchConv, tyro.conf.subcommand("conv")]
        | Annotated[BenchThreshold, tyro.conf.subcommand("threshold")]
        | Annotated[BenchAdam, tyro.conf.subcommand("adam")]
        | Annotated[BenchStep, tyro.conf.subcommand("step")]
        | Annotated[BenchModel, tyro.conf.subcommand("model")]
    )
    verbs = (
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Prune, tyro.conf.subcommand("prune")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Compile, tyro.conf.subcommand("compile")]
        | Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Explain, tyro.conf.subcommand("explain")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Similarity, tyro.conf.subcommand("similarity")]
        | Annotated[data, tyro.conf.subcommand("data", description="Make and check data sets.")]
        | Annotated[bench, tyro.conf.subcommand("bench", description="Time ops, steps, models.")]
        | Annotated[Info, tyro.conf.subcommand("info")]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"sparsemtl {sparsemtl.__version__}")
        return 0
    command = cast(
        Command,
        tyro.cli(
            verbs,  # type: ignore[arg-type]
            prog="sparsemtl",
            description="Train sparse multitask networks and make them really faster.",
            args=words,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        ),
    )
    return run(command)


def run(command: Command) -> int:
    """Run a parsed verb; expected failures become one line on stderr."""
    try:
        return command.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:  # ours, a backend that cannot run, memory that is not there
        return _failed(error, 1)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _failed(error, 2)


def _failed(error: Exception, code: int) -> int:
    if os.environ.get("SPARSEMTL_TRACEBACK"):
        raise error
    print(f"error: {error}", file=sys.stderr)
    if not isinstance(error, DivergedError | CheckpointError | BackendUnavailable):
        print("(SPARSEMTL_TRACEBACK=1 shows where)", file=sys.stderr)
    return code
