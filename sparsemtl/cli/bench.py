"""`sparsemtl bench conv|threshold|adam|step`: what sparsity buys on this machine.

Every number comes with its machine, its baseline and a correctness check of the same run: where
the check fails there is no number, and the exit code is 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from sparsemtl.cli.bench_options import BenchOptions, check_positive, check_sparsities, pick
from sparsemtl.cli.bench_tables import COLUMNS, Lines, begin
from sparsemtl.errors import unknown_choice
from sparsemtl.measure import bench_adam, bench_conv, bench_step, bench_threshold
from sparsemtl.measure.conv_cases import all_cases
from sparsemtl.measure.dense_conv import Compiler
from sparsemtl.measure.pruned import parse_prune, parse_tasks
from sparsemtl.measure.roof import measure_roof
from sparsemtl.models.config import MODELS
from sparsemtl.ops.pattern import STRUCTURES
from sparsemtl.tasks import TASKS

Find = Callable[[Any, Sequence[float], int], Iterator[dict[str, Any]]]  # cases, sparsities, rounds


@dataclass(kw_only=True)
class BenchConv(BenchOptions):
    """Sparse convolution against the fastest dense one, on the layers of our networks."""

    sparsity: tuple[float, ...] = (0.9,)
    """Fractions of zeros."""
    structure: str = "element"
    """element, vector(4), vector(8) or vector(16)."""
    case: tuple[str, ...] = ()
    """Layers, by name or part of it (deeplab, 3x3-512, dw); all by default."""
    passes: Annotated[tuple[str, ...], tyro.conf.arg(name="pass", metavar="PASS")] = ()
    """forward, training (forward and both gradients); both by default."""
    compile_seconds: float = 45.0
    """Time for the compiled dense path, which goes to the most costly layers; 0: leave it out."""
    seconds: float | None = None
    """Time of one row, after which no further round begins; 3 rounds are always done."""
    isa: str | None = None
    """Force the instruction set of our kernels: generic, avx2, avx512."""

    def run(self) -> int:
        check_sparsities(self.sparsity)
        if self.structure not in STRUCTURES:
            raise ValueError(unknown_choice("--structure", self.structure, STRUCTURES))
        if not self.compile_seconds >= 0.0:
            raise ValueError(f"Expected --compile-seconds >= 0, got {self.compile_seconds:g}")
        if self.seconds is not None and not self.seconds > 0.0:
            raise ValueError(f"Expected --seconds > 0, got {self.seconds:g}")
        for name in self.passes:
            if name not in bench_conv.PASSES:
                raise ValueError(unknown_choice("--pass", name, bench_conv.PASSES))
        cases = all_cases()
        names = pick("--case", self.case, cases)
        self.prepare()
        force_isa(self.isa)
        bench_conv.steady_memory()
        roof = measure_roof()
        begin(roof)
        compiler = Compiler(self.compile_seconds) if self.compile_seconds > 0.0 else None
        lines, rows, start = Lines(COLUMNS), [], time.monotonic()
        for row in bench_conv.measure_cases(
            [cases[name] for name in names],
            self.passes or bench_conv.PASSES,
            self.structure,
            self.sparsity,
            roof,
            compiler,
            seconds=self.seconds,
        ):
            rows.append(row)
            lines.show(row)
        skipped = {} if compiler is None else compiler.skipped
        for reason, count in skipped.items():
            print(f"compiled: left out of {count} forward rows, because {reason}")
        print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s")
        notes = {"isa": self.isa, "compiled_skipped": skipped}
        self.finish("conv", rows, roof, draw_speedups, **notes)
        return 0


@dataclass(kw_only=True)
class ElementwiseOptions(BenchOptions):
    """What the benches of elementwise ops share: their roof is a copy of the same bytes."""

    sparsity: tuple[float, ...] = (0.9,)
    """Fractions of dead weights."""
    weights: int | None = None
    """Measure one tensor of so many weights instead."""
    rounds: int = 7
    """Interleaved rounds."""

    def check(self) -> None:
        """raises: ValueError naming the flag"""
        check_sparsities(self.sparsity)
        check_positive("--rounds", self.rounds)
        if self.weights is not None:
            check_positive("--weights", self.weights)

    def measure(self, bench: str, find: Find, cases: Any) -> None:
        """Show, compare with a copy, and write the rows that `find` yields for the cases."""
        self.prepare()
        roof = measure_roof()
        begin(roof)
        lines, rows = Lines(COLUMNS), []
        for row in find(cases, self.sparsity, self.rounds):
            rows.append(row)
            lines.show(row)
        print_roof_note(rows)
        self.finish(bench, rows, roof, draw_speedups)


@dataclass(kw_only=True)
class BenchThreshold(ElementwiseOptions):
    """The fused soft threshold against eager torch and a copy of the same bytes."""

    case: tuple[str, ...] = ()
    """20M, head or stage-1; all by default."""
    rounds: int = 15
    """Interleaved rounds."""

    def run(self) -> int:
        self.check()
        names = pick("--case", self.case, bench_threshold.SHAPES)
        cases = {name: bench_threshold.SHAPES[name] for name in names}
        if self.weights is not None:
            cases = {f"{self.weights:,} weights": [(self.weights,)]}
        self.measure("threshold", bench_threshold.measure_threshold, cases)
        return 0


@dataclass(kw_only=True)
class BenchAdam(ElementwiseOptions):
    """Adam, threshold and next S(W) in one pass against eager torch and a copy of the bytes."""

    case: tuple[str, ...] = ("deeplab-resnet34",)
    """deeplab-resnet34 (90.7 M weights), deeplab-resnet34/bf16, backbone, stage-1."""

    def run(self) -> int:
        self.check()
        names = pick("--case", self.case, bench_adam.CASES)
        if self.weights is not None:
            cases: dict[str, Any] = {f"{self.weights:,} weights": [[(self.weights,)]]}
        else:
            cases = {name: bench_adam.component_shapes(name) for name in names}
        self.measure("adam", bench_adam.measure_adam, cases)
        return 0


@dataclass(kw_only=True)
class BenchStep(BenchOptions):
    """A whole training step, dense and sparse, of a model of the registry."""

    model: str = "deeplab-resnet34"
    """deeplab-resnet18, deeplab-resnet34 or mobilenetv2."""
    tasks: str = "segmentation:40,normals:3,depth:1"
    """Heads: names with their channels."""
    sparsity: tuple[str, ...] = ("adapmtl-split",)
    """Fractions of zeros, adapmtl-split, or component=fraction pairs; one row each."""
    mask: tuple[str, ...] = ("fixed",)
    """fixed (after the ramp), open (during it), or both."""
    masked: bool = False
    """Time the step that computes with zeros, too."""
    image: tuple[int, int] = (321, 321)
    """Height and width."""
    batch: int = 1
    rounds: int = 5
    """Interleaved rounds."""

    def run(self) -> int:
        tasks = parse_tasks("--tasks", self.tasks)
        splits = {text: parse_prune("--sparsity", text, tasks) for text in self.sparsity}
        if not splits:
            raise ValueError("Expected --sparsity to name at least one split, got none")
        for name in self.mask:
            if name not in bench_step.MASKS:
                raise ValueError(unknown_choice("--mask", name, bench_step.MASKS))
        for name in tasks:
            if name not in TASKS:
                raise ValueError(unknown_choice("a task of --tasks", name, TASKS))
        if self.model not in MODELS:
            raise ValueError(unknown_choice("--model", self.model, MODELS))
        for flag, value in (("--batch", self.batch), ("--rounds", self.rounds)):
            check_positive(flag, value)
        check_positive("--image", min(self.image))
        self.prepare()
        bench_conv.steady_memory()
        begin(None)
        setup = bench_step.StepSetup(self.model, tasks, self.image, self.batch)
        lines, rows = Lines({**COLUMNS, "mask": ("mask", 5, "s")}), []
        masks = self.mask or ("fixed",)
        found = bench_step.measure_step(setup, splits, masks, self.rounds, with_masked=self.masked)
        for row in found:
            rows.append(row)
            lines.show(row)
        self.finish("step", rows, None, draw_steps)
        return 0


def force_isa(name: str | None) -> None:
    """Switch the kernels' instruction set.   raises: ValueError naming the flag"""
    from sparsemtl.ops.availability import native_module, why_not_native

    if name is None or why_not_native() is not None:
        return
    usable = native_module().usable_isas()
    if name not in usable:
        raise ValueError(unknown_choice("--isa", name, usable))
    native_module().force_isa(name)


def print_roof_note(rows: list[dict[str, Any]]) -> None:
    """What the roof of an elementwise op is."""
    for row in rows:
        print(
            f"{row['case']}, {row['pass']}, {row['sparsity']:g}: {row['times_copy']:.2f}× the time "
            f"of a copy of the same bytes ({row['copy_ms']:.4g} ms), on {row['backend']}"
        )


def draw_steps(rows: Any, machine: str) -> Any:
    from sparsemtl.report.bench_plots import step_times

    return step_times(rows, machine)


def draw_speedups(rows: Any, machine: str) -> Any:
    from sparsemtl.report.bench_plots import speedups

    return speedups(rows, machine)
