"""Round channels up to a multiple that tensor cores take, with filters of zeros.

Removing dead channels leaves any number of them. A new filter and its bias are zero, so its output
is zero behind any of our activations; whoever reads it gets zeros in its weight for it. Exact, and
done for devices alone. A value is grown only if convolutions (without groups) read it and nothing
else, through concatenations of channels at most.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsemtl.engine.graph import Graph, Node


def round_channels(graph: Graph, multiple: int) -> int:
    """Grow values in place of the graph; returns how many channels were added."""
    added = 0
    consumers, outputs = graph.consumers, set(graph.outputs.values())
    for node in graph.nodes:
        if node.op != "conv2d" or node.attrs["groups"] != 1 or len(node.inputs) > 1:
            continue
        missing = -node.weights["weight"].shape[0] % multiple
        if missing == 0 or not _growable(node.output, consumers, outputs, set()):
            continue
        channels = graph.shape(node.output)[1]
        node.weights = {name: _pad(w, 0, channels, missing) for name, w in node.weights.items()}
        _grow(node.output, channels, missing, graph, consumers)
        added += missing
    return added


def _growable(
    value: str, consumers: dict[str, list[Node]], outputs: set[str], seen: set[str]
) -> bool:
    """Whether all that read a value can ignore new channels.   seen: concatenations on the way"""
    if value in outputs:
        return False
    for reader in consumers[value]:
        if reader.op == "conv2d":
            if reader.attrs["groups"] != 1 or value in reader.inputs[1:]:
                return False
            continue
        if reader.op != "concat" or reader.attrs["dim"] != 1 or reader.name in seen:
            return False  # seen: it holds the value twice
        seen.add(reader.name)
        if not _growable(reader.output, consumers, outputs, seen):
            return False
    return True


def _grow(value: str, at: int, count: int, graph: Graph, consumers: dict[str, list[Node]]) -> None:
    """Let a value have `count` channels of zeros more from `at` on, and its readers ignore them."""
    old = graph.values[value]
    shape = (old.shape[0], old.shape[1] + count, *old.shape[2:])
    graph.values[value] = replace(old, shape=shape)
    for reader in consumers[value]:
        if reader.op == "concat":
            before = reader.inputs[: reader.inputs.index(value)]
            place = at + sum(graph.shape(name)[1] for name in before)
            _grow(reader.output, place, count, graph, consumers)
        else:
            weight = _pad(reader.weights["weight"], 1, at, count)
            reader.weights = {**reader.weights, "weight": weight}


def _pad(tensor: Tensor, dim: int, at: int, count: int) -> Tensor:
    """Zeros for `count` places of a dimension, before place `at`."""
    shape = list(tensor.shape)
    shape[dim] = count
    before, after = tensor.split([at, tensor.shape[dim] - at], dim)
    return torch.cat([before, tensor.new_zeros(shape), after], dim)
