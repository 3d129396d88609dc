"""Convolutions that read the same input through the same taps run as one.

The heads of a multitask network all read the backbone's features, at the same dilations. What a
tile of pixels reads is then gathered once for all of them, which at high sparsity costs more than
the arithmetic. The merged node writes several values, channels of one buffer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsemtl.engine.deferred import joined
from sparsemtl.engine.graph import Graph, Node

# Output channels whose sums, of four vectors of pixels each, stay in a core's L2 cache of 1 MiB.
_MOST_CHANNELS = 3072


def merge_parallel(graph: Graph, wanted: Callable[[Node], bool]) -> Graph:
    """A graph in which the conv2d nodes that are wanted are merged where they can be.

    A merged node goes by its first member's name; its outputs are those of its members, in order.
    Nodes follow what they read as closely as they can, so that large values die early. Such a graph
    is for the native executor only.
    """
    groups: dict[tuple[object, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.op == "conv2d" and len(node.inputs) == 1 and wanted(node):
            key = (node.inputs, *sorted(node.attrs.items()), node.weights["weight"].shape[2:])
            if node.attrs["groups"] == 1:
                groups.setdefault(key, []).append(node)
    into: dict[str, Node | None] = {}
    for members in groups.values():
        for part in _parts(members):
            if len(part) > 1:
                into |= dict.fromkeys((node.name for node in part), None)
                into[part[0].name] = _merged(part)
    merged = graph.copy()
    nodes = ((node, into.get(node.name, node)) for node in graph.nodes)
    merged.nodes = _depth_first([kept for _, kept in nodes if kept is not None])
    return merged


def _depth_first(nodes: list[Node]) -> list[Node]:
    """An order in which a node runs as soon as the last of its inputs is there."""
    written = {name for node in nodes for name in node.outputs}
    missing = {node.name: {name for name in node.inputs if name in written} for node in nodes}
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in missing[node.name]:
            readers.setdefault(name, []).append(node)
    ready = [node for node in reversed(nodes) if not missing[node.name]]
    ordered: list[Node] = []
    while ready:
        node = ready.pop()
        ordered.append(node)
        following = {r.name: r for name in node.outputs for r in readers.get(name, ())}
        for reader in following.values():
            missing[reader.name].difference_update(node.outputs)
        ready += [r for r in reversed(following.values()) if not missing[r.name]]
    return ordered


def _parts(members: list[Node]) -> list[list[Node]]:
    parts: list[list[Node]] = [[]]
    channels = 0
    for node in members:
        count = node.weights["weight"].shape[0]
        if parts[-1] and channels + count > _MOST_CHANNELS:
            parts.append([])
            channels = 0
        parts[-1].append(node)
        channels += count
    return parts


def _merged(members: list[Node]) -> Node:
    first = members[0].copy()
    first.outputs = tuple(node.output for node in members)
    weights = [node.weights["weight"] for node in members]
    first.weights = {"weight": joined(weights)}
    if any("bias" in node.weights for node in members):
        zeros = [weight.new_zeros(weight.shape[0]) for weight in weights]
        biases = [n.weights.get("bias", zero) for n, zero in zip(members, zeros, strict=True)]
        first.weights["bias"] = torch.cat(biases)
    return first
