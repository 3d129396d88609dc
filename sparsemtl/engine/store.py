"""A graph with its weights coded, as in a file, for as long as nobody needs them.

A plan packs the weights in forms of its own. The graph that plans are made from is needed again
only for another input size, or to be saved; until then a sparse model takes the memory of its
nonzeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemtl.engine import codec
from sparsemtl.engine.graph import Graph

Coded = tuple[str, dict[str, Tensor]]  # coding and its parts, see `codec.py`


class StoredGraph:
    """What `graph` was, with coded weights.

    graph: left as it is
    coded: by id of the weight, where it is known already
    light: the graph with weights that have shape and dtype, and no memory
    """

    def __init__(self, graph: Graph, coded: dict[int, Coded] | None = None) -> None:
        known = dict(coded or {})
        self._coded: dict[tuple[str, str], Coded] = {}
        for node in graph.nodes:
            for name, weight in node.weights.items():
                if id(weight) not in known:
                    on_cpu = weight.device.type == "cpu"
                    known[id(weight)] = (
                        codec.encode(weight) if on_cpu else ("dense", {"values": weight})
                    )
                self._coded[node.name, name] = known[id(weight)]
        self.light = without_weights(graph)

    def graph(self) -> Graph:
        """The graph as it was."""
        graph = self.light.copy()
        for node in graph.nodes:
            for name, weight in node.weights.items():
                coding, parts = self._coded[node.name, name]
                node.weights[name] = codec.decode(coding, tuple(weight.shape), parts, weight.dtype)
        return graph


def without_weights(graph: Graph) -> Graph:
    """A copy whose weights have shape and dtype only."""
    light = graph.copy()
    for node in light.nodes:
        node.weights = {name: weight.to("meta") for name, weight in node.weights.items()}
    return light


def densities(graph: Graph) -> dict[str, float]:
    """Node → share of its weights that are not zero, where it has a matrix or kernels."""
    found = {}
    for node in graph.nodes:
        weight = node.weights.get("weight") if node.op != "torch" else None
        if weight is not None and weight.dim() >= 2:
            found[node.name] = int(torch.count_nonzero(weight)) / max(1, weight.numel())
    return found
