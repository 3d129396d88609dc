"""Exact rewrites of a graph, one file each; what «exact» means stands at the top of each file.

`optimise` does what holds for every input size, once; `adapt` what depends on it, for each plan.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsemtl.engine.graph import Graph
from sparsemtl.engine.passes.dead_channels import remove_dead_channels
from sparsemtl.engine.passes.drop_identity import drop_identity
from sparsemtl.engine.passes.fold_batch_norm import fold_batch_norm
from sparsemtl.engine.passes.fuse import fuse_activation, fuse_residual
from sparsemtl.engine.passes.merge_branches import merge_branches
from sparsemtl.engine.passes.trim_taps import trim_taps

Pass = Callable[[Graph], int]  # changes the graph in place; returns how much it found

GENERAL: dict[str, Pass] = {
    "drop identity": drop_identity,
    "fold batch norm": fold_batch_norm,
    "remove dead channels": remove_dead_channels,
    "merge branches": merge_branches,
    "fuse residual": fuse_residual,
    "fuse activation": fuse_activation,
}
FOR_A_SIZE: dict[str, Pass] = {"trim taps": trim_taps}


def optimise(graph: Graph) -> tuple[Graph, dict[str, int]]:
    """A rewritten copy that serves the same input sizes, and what each pass found."""
    return _run(graph, GENERAL)


def adapt(graph: Graph) -> tuple[Graph, dict[str, int]]:
    """A rewritten copy for the graph's own input size, and what each pass found."""
    return _run(graph, FOR_A_SIZE)


def _run(graph: Graph, passes: dict[str, Pass]) -> tuple[Graph, dict[str, int]]:
    graph = graph.copy()
    found = {name: run(graph) for name, run in passes.items()}
    graph.prune()
    return graph, found
