"""Weights that a graph holds by shape and type, and decodes when a plan wants their values.

A deferred weight is a tensor on torch's meta device that knows how to come by its values. Its shape
and type are the weight's; `values` makes the weight, anew each time, for whoever packs it and lets
it go: a sparse model takes the memory of its nonzeros, and of one dense layer while it is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsemtl.engine import codec
from sparsemtl.engine.graph import Graph, Node

_SOURCE = "_sparsemtl_source"


@dataclass(frozen=True)
class _Source:
    """make: the weight   live: how many of its entries are not zero, where that is known"""

    make: Callable[[], Tensor]
    live: int | None = None


def from_coded(
    coding: str, shape: tuple[int, ...], parts: dict[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """The weight of a checked coding; matrices and kernels with zeros are deferred.

    raises: ValueError if the index does not fit the values or the shape
    """
    if coding == "dense" or len(shape) < 2:
        return codec.decode(coding, shape, parts, dtype)
    codec.check_places(coding, shape, parts)
    return _deferred(
        shape, dtype, lambda: codec.decode(coding, shape, parts, dtype), len(parts["values"])
    )


def defer(graph: Graph) -> Graph:
    """A copy whose weights with zeros are coded; others stay, and so do those of another device."""
    found, known = graph.copy(), dict[int, Tensor]()
    for node in found.nodes:
        for name, weight in node.weights.items():
            if id(weight) not in known:
                known[id(weight)] = _coded(weight)
            node.weights[name] = known[id(weight)]
    return found


def values(weight: Tensor) -> Tensor:
    """The weight itself, decoded if it is deferred."""
    source = _source(weight)
    if source is not None:
        return source.make()
    assert not weight.is_meta, "a weight whose values were let go"
    return weight


def decoded(graph: Graph) -> Graph:
    """A copy that has the values of all weights."""
    found = graph.copy()
    for node in found.nodes:
        node.weights = with_values(node).weights
    return found


def with_values(node: Node) -> Node:
    """A copy that has the values of its weights."""
    found = node.copy()
    found.weights = {name: values(weight) for name, weight in node.weights.items()}
    return found


def live(weight: Tensor) -> int:
    """How many entries are not zero; of a weight that is rounded, those that were not."""
    source = _source(weight)
    if source is not None and source.live is not None:
        return source.live
    return int(torch.count_nonzero(values(weight)))


def density(weight: Tensor) -> float:
    """Share of entries that are not zero; 0 for an empty weight."""
    return live(weight) / max(1, weight.numel())


def cut(weight: Tensor, place: Any) -> Tensor:
    """weight[place], contiguous; deferred if the weight is.   place: slices"""
    if _source(weight) is None:
        return weight[place].contiguous()
    shape = tuple(weight[place].shape)
    return _deferred(shape, weight.dtype, lambda: values(weight)[place].contiguous())


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Their concatenation along the first axis; deferred if any of them is."""
    if all(_source(weight) is None for weight in weights):
        return torch.cat(list(weights))
    known = [live(weight) for weight in weights]
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    return _deferred(
        shape, weights[0].dtype, lambda: torch.cat([values(w) for w in weights]), sum(known)
    )


def densities(graph: Graph) -> dict[str, float]:
    """Node → share of its weights that are not zero, where it has a matrix or kernels."""
    found = {}
    for node in graph.nodes:
        weight = node.weights.get("weight") if node.op != "torch" else None
        if weight is not None and weight.dim() >= 2:
            found[node.name] = density(weight)
    return found


def without_weights(graph: Graph) -> Graph:
    """A copy whose weights have shape and dtype only."""
    light = graph.copy()
    for node in light.nodes:
        node.weights = {
            name: torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            for name, weight in node.weights.items()
        }
    return light


def _coded(weight: Tensor) -> Tensor:
    if weight.device.type != "cpu" or weight.dim() < 2:
        return weight
    coding, parts = codec.encode(weight)
    if coding == "dense":
        return weight
    return from_coded(coding, tuple(weight.shape), parts, weight.dtype)


def _deferred(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    make: Callable[[], Tensor],
    live: int | None = None,
) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device="meta")
    setattr(weight, _SOURCE, _Source(make, live))
    return weight


def _source(weight: Tensor) -> _Source | None:
    found: _Source | None = getattr(weight, _SOURCE, None)
    return found
