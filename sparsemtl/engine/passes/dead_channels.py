"""Remove channels that nobody needs: dead filters, and filters whose output nobody reads.

Channels of different values are tied where an op needs them at the same place: through sums,
activations, pooling, depthwise convolutions. Tied channels stay or go together, and those that an
op of another kind sees, or an output, stay. Constants are folded first (`constants.py`).

Exact: what is removed contributes zeros to everything that stays.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsemtl.engine.graph import Graph, Node
from sparsemtl.engine.passes.constants import fold_constants
from sparsemtl.engine.shapes import infer_values

_ACTIVATIONS = ("clamp", "hardswish", "relu", "relu6", "sigmoid", "silu")
_POOLS = ("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "resize")
_TIES = ("add", "batch_norm", "identity", "mul", "sum", *_ACTIVATIONS, *_POOLS)


def remove_dead_channels(graph: Graph) -> int:
    """Fold constants, then remove channels; returns how many channels of layers went."""
    fold_constants(graph)
    ties = _Ties(graph)
    _mark_needed(graph, ties)
    removed = 0
    for node in graph.nodes:
        removed += _shrink(node, ties)
    if removed:
        graph.values = infer_values(graph.nodes, [graph.values[name] for name in graph.inputs])
    return removed


class _Ties:
    """Which channels of which values go together, as a union-find over all channels.

    labels: value [B, C, H, W] → [C], the channel's place in `parent`
    needed: by the root's place
    """

    def __init__(self, graph: Graph) -> None:
        self.labels: dict[str, np.ndarray] = {}
        count = sum(v.shape[1] for v in graph.values.values() if len(v.shape) == 4)
        self.parent = np.arange(count)
        self.needed = np.zeros(count, dtype=bool)
        self._next = 0
        rigid: list[str] = list(graph.inputs)
        for name in graph.inputs:
            self._fresh(name, graph)
        for node in graph.nodes:
            rigid += self._visit(node, graph)
        for name in (*rigid, *graph.outputs.values()):
            if name in self.labels:
                self.needed[self.roots(name)] = True

    def roots(self, value: str) -> np.ndarray:
        """The root of each channel of a value."""
        labels = self.parent[self.labels[value]]
        while not np.array_equal(labels, above := self.parent[labels]):
            labels = above
        return labels

    def keep(self, value: str) -> Tensor:
        """[C] bool: which channels of a value stay."""
        return torch.from_numpy(self.needed[self.roots(value)])

    def _fresh(self, value: str, graph: Graph) -> None:
        shape = graph.shape(value)
        if len(shape) == 4:
            self.labels[value] = np.arange(self._next, self._next + shape[1])
            self._next += shape[1]

    def _visit(self, node: Node, graph: Graph) -> list[str]:
        """Label what a node writes; returns the values whose channels it needs as they are."""
        names = (*node.inputs, *node.outputs)
        images = all(name in self.labels for name in node.inputs) and all(
            len(graph.shape(name)) == 4 for name in node.outputs
        )
        channels = {graph.shape(name)[1] for name in names} if images else set()
        over_pixels = node.op == "mean" and sorted(d % 4 for d in node.attrs["dims"]) == [2, 3]
        if images and is_depthwise(node, graph):
            channels_tied = node.inputs
        elif images and node.op == "conv2d" and node.attrs["groups"] == 1:
            self._fresh(node.output, graph)
            channels_tied = (node.output, *node.inputs[1:])
        elif images and node.op == "concat" and node.attrs["dim"] in (1, -3):
            self.labels[node.output] = np.concatenate([self.labels[n] for n in node.inputs])
            return []
        elif images and len(channels) == 1 and (node.op in _TIES or over_pixels):
            channels_tied = node.inputs
        else:
            for name in node.outputs:
                self._fresh(name, graph)
            return list(names)
        for other in channels_tied[1:]:
            self._tie(channels_tied[0], other)
        self.labels[node.output] = self.labels[channels_tied[0]]
        return []

    def _tie(self, one: str, other: str) -> None:
        for a, b in zip(self.labels[one], self.labels[other], strict=True):
            self.parent[self._root(a)] = self._root(b)

    def _root(self, place: int) -> int:
        while self.parent[place] != place:
            self.parent[place] = self.parent[self.parent[place]]
            place = int(self.parent[place])
        return place


def is_depthwise(node: Node, graph: Graph) -> bool:
    """One filter for each channel."""
    if node.op != "conv2d" or node.attrs["groups"] == 1:
        return False
    rows = node.weights["weight"].shape[0]
    return bool(node.attrs["groups"] == rows == graph.shape(node.inputs[0])[1])


def _mark_needed(graph: Graph, ties: _Ties) -> None:
    """From the outputs back: a channel is needed if a needed filter reads it."""
    convs = [n for n in reversed(graph.nodes) if n.op == "conv2d" and n.attrs["groups"] == 1]
    reads = {n.name: (n.weights["weight"] != 0).any(3).any(2).numpy() for n in convs}
    before = -1
    while before != (before := int(ties.needed.sum())):
        for node in convs:
            if node.inputs[0] not in ties.labels or node.output not in ties.labels:
                continue
            rows = ties.needed[ties.roots(node.output)]
            columns = reads[node.name][rows].any(0)
            ties.needed[ties.roots(node.inputs[0])[columns]] = True
        for value in ties.labels:  # no value loses all its channels
            roots = ties.roots(value)
            if len(roots) and not ties.needed[roots].any():
                ties.needed[roots[0]] = True


def _shrink(node: Node, ties: _Ties) -> int:
    """Drop the channels that go from a node's weights; returns how many it writes no more."""
    if node.op not in ("conv2d", "batch_norm") or node.output not in ties.labels:
        return 0
    out = ties.keep(node.output)
    weights = dict(node.weights)
    if node.op == "conv2d":
        weights["weight"] = weights["weight"][out]
        if node.attrs["groups"] == 1:
            weights["weight"] = weights["weight"][:, ties.keep(node.inputs[0])]
        elif not bool(out.all()):
            node.attrs["groups"] = int(out.sum())
        weights["weight"] = weights["weight"].contiguous()
        if "bias" in weights:
            weights["bias"] = weights["bias"][out]
    else:
        weights = {name: tensor[out] for name, tensor in weights.items()}
    node.weights = weights
    return int((~out).sum()) if node.op == "conv2d" else 0
