"""The table of a plan: every layer, how dense it is, who runs it and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsemtl.engine.graph import Graph, Node

if TYPE_CHECKING:
    from sparsemtl.engine.engine import Plan

_HEADINGS = ("layer", "op", "shape", "density", "runs as", "because")


@dataclass(frozen=True)
class Row:
    """One node.

    op:         ours, or the operator of torch
    output:     shape of its (first) output
    density:    share of nonzero weights; None without weights
    runs_as:    who runs it, and in which form
    because:    why so, in words
    candidates: seconds of every form that was timed
    """

    layer: str
    op: str
    output: tuple[int, ...]
    density: float | None
    runs_as: str
    because: str
    candidates: dict[str, float]

    def cells(self) -> tuple[str, ...]:
        density = "" if self.density is None else f"{100 * self.density:.1f} %"
        shape = "x".join(map(str, self.output))
        return (self.layer, self.op, shape, density, self.runs_as, self.because)


@dataclass(frozen=True)
class Explanation:
    """What a plan does; `str` of it is a plain table.

    rewrites: pass → how much it changed
    where: on which device, in which type and whether as one graph; empty for the CPU executors
    through_torch: operators that torch runs, in order
    chosen:   where the choices of kernels come from, in words
    """

    rows: tuple[Row, ...]
    rewrites: dict[str, int]
    inputs: tuple[tuple[int, ...], ...]
    peak_bytes: int
    where: str = ""
    chosen: str = ""

    @property
    def through_torch(self) -> list[str]:
        return [row.op for row in self.rows if row.runs_as == "torch"]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        rows = [
            {**vars(row), "output": list(row.output), "candidates": dict(row.candidates)}
            for row in self.rows
        ]
        inputs = [list(shape) for shape in self.inputs]
        return {
            "inputs": inputs,
            "rewrites": self.rewrites,
            "peak_bytes": self.peak_bytes,
            "where": self.where,
            "chosen": self.chosen,
            "through_torch": self.through_torch,
            "layers": rows,
        }

    def __str__(self) -> str:
        table = [_HEADINGS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        changed = ", ".join(f"{name}: {count}" for name, count in self.rewrites.items() if count)
        torch_runs = ", ".join(sorted(set(self.through_torch))) or "nothing"
        return "\n".join(
            [
                f"inputs {', '.join('x'.join(map(str, shape)) for shape in self.inputs)}",
                *([f"runs on {self.where}"] if self.where else []),
                *lines,
                f"rewritten  {changed or 'nothing'}",
                f"memory     {self.peak_bytes / 1e6:.1f} MB for values at most",
                *([f"choices    {self.chosen}"] if self.chosen else []),
                f"through torch  {torch_runs}",
            ]
        )


def explain_plan(plan: Plan, rewrites: dict[str, int]) -> Explanation:
    """The table of one plan.   rewrites: of the passes that went before it"""
    graph = plan.graph
    return Explanation(
        tuple(_row(node, graph, plan) for node in graph.nodes),
        {**rewrites, **plan.rewrites},
        tuple(graph.shape(name) for name in graph.inputs),
        plan.peak_bytes,
        plan.executor.where,
        plan.chosen,
    )


def _row(node: Node, graph: Graph, plan: Plan) -> Row:
    choice = plan.executor.choice(node)
    return Row(
        node.name,
        str(node.attrs["target"]) if node.op == "torch" else node.op,
        graph.shape(node.outputs[0]),
        plan.densities.get(node.name),
        choice.runs_as,
        choice.because,
        choice.candidates,
    )
