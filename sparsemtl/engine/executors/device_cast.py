"""A graph brought to a device and a floating type.

Values and weights of the model's own floating type become those of the target; others stay as they
are. An operator that only torch knows is asked, on tensors without memory, whether it computes in
the target's type; one that insists on the model's (as a model does that writes `.float()`) gets
its inputs and weights in that, and its results are cast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparsemtl.engine.aten import overload
from sparsemtl.engine.graph import Graph, Node
from sparsemtl.engine.ops import compute, infer_outputs
from sparsemtl.engine.passes.round_channels import round_channels
from sparsemtl.errors import GraphError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MULTIPLE = 8  # channels; 16 bytes of a narrow type, which tensor cores' loads need


@dataclass(frozen=True)
class Cast:
    """What the device executor works from.

    graph:     nodes that depend on an input, in the target's type, weights on the device
    constants: values that depend on no input
    wide:      nodes that compute in the types of the model → those of their inputs
    own:       the model's floating type
    """

    graph: Graph
    constants: dict[str, Tensor]
    wide: dict[str, tuple[torch.dtype, ...]]
    own: torch.dtype


class DeviceWeights:
    """Weights on a device, shared by the plans of an engine for as long as one of them lives."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()

    def place(
        self, node: Node, name: str, weight: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The weight there, in that type; channels_last where it is a kernel."""
        found = weight.detach().to(device, dtype)
        if node.op == "conv2d" and found.dim() == 4:
            found = found.contiguous(memory_format=torch.channels_last)
        elif found.data_ptr() == weight.data_ptr() and found.numel() > 0:
            found = found.clone()  # never the caller's own
        key = (node.name, name, tuple(found.shape), dtype)
        known = self._known.get(key)  # trimmed kernels of one shape may differ
        if known is not None and torch.equal(known, found):
            return known
        self._known[key] = found
        return found


def cast_graph(
    graph: Graph, device: torch.device, dtype: torch.dtype | None, weights: DeviceWeights
) -> Cast:
    """A copy for a device.   dtype: None for the model's own

    raises: ValueError for a model of another floating type than FLOATS
    """
    own = _own_type(graph)
    if own not in FLOATS:
        raise ValueError(
            f"engine: Expected a model of float32, bfloat16 or float16 for a device, got {own}"
        )
    dtype = dtype or own
    graph = graph.copy()
    round_channels(graph, _MULTIPLE)
    constants = _constants(graph)
    there = {
        name: value.to(device, dtype if value.dtype is own else value.dtype)
        for name, value in constants.items()
    }
    found = graph.copy()
    found.nodes = [n for n in found.nodes if not constants.keys() >= set(n.outputs)]
    found.values = {
        name: replace(value, dtype=dtype) if value.dtype is own else value
        for name, value in graph.values.items()
    }
    wide: dict[str, tuple[torch.dtype, ...]] = {}
    for node in found.nodes:
        kind = dtype
        if node.op == "torch" and dtype is not own and not _narrow(node, found, own, dtype):
            wide[node.name] = tuple(graph.values[name].dtype for name in node.inputs)
            kind = own
        node.weights = {
            name: weights.place(node, name, w, device, kind if w.dtype is own else w.dtype)
            for name, w in node.weights.items()
        }
    return Cast(found, there, wide, own)


def _own_type(graph: Graph) -> torch.dtype:
    """The floating type of the weights, or of the values where there are none."""
    kinds = [w.dtype for node in graph.nodes for w in node.weights.values()]
    kinds += [value.dtype for value in graph.values.values()]
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def _constants(graph: Graph) -> dict[str, Tensor]:
    """Values that depend on no input, computed now where the graph's weights are."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if all(name in found for name in node.inputs) and not _random(node):
                results = compute(node, *(found[name] for name in node.inputs))
                found.update(zip(node.outputs, results, strict=True))
    return found


def _random(node: Node) -> bool:
    if node.op != "torch":
        return False
    return torch.Tag.nondeterministic_seeded in overload(str(node.attrs["target"])).tags


def _narrow(node: Node, graph: Graph, own: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether torch's operator gives results of the type that the graph now says."""
    shadow = node.copy()
    shadow.weights = {
        name: torch.empty(w.shape, dtype=dtype if w.dtype is own else w.dtype, device="meta")
        for name, w in node.weights.items()
    }
    try:
        found = infer_outputs(shadow, [graph.values[name] for name in node.inputs])
    except GraphError:
        return False
    return [kind for _, kind in found] == [graph.values[name].dtype for name in node.outputs]
