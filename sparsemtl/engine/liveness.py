"""How much memory the values of a graph take at once, each freed after its last reader."""

from __future__ import annotations

from sparsemtl.engine.graph import Graph


def peak_bytes(graph: Graph) -> int:
    """Largest sum of the values that are alive at one time, inputs left out (the caller's)."""
    last = {name: place for place, node in enumerate(graph.nodes) for name in node.inputs}
    outputs = set(graph.outputs.values())
    alive, peak = 0, 0
    for place, node in enumerate(graph.nodes):
        alive += sum(graph.values[name].bytes for name in node.outputs)
        peak = max(peak, alive)
        for name in {*node.inputs, *node.outputs}:
            if name not in graph.inputs and name not in outputs and last.get(name, -1) <= place:
                alive -= graph.values[name].bytes
    return peak
