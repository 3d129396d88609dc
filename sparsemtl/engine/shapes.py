"""The same nodes for another input size: sizes that follow from it are computed anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sparsemtl.engine.expression import evaluate, sizes_of
from sparsemtl.engine.graph import Graph, Node, Value
from sparsemtl.engine.ops import DYNAMIC, MOST_BYTES, infer_outputs
from sparsemtl.errors import GraphError


def specialise(graph: Graph, shapes: Sequence[tuple[int, ...]]) -> Graph:
    """A graph for inputs of these shapes; it shares the weights.

    raises: ValueError naming the size that this graph cannot take, or the node that refuses it
    """
    shapes = [tuple(shape) for shape in shapes]
    if shapes == [graph.shape(name) for name in graph.inputs]:
        return graph
    _check_freedom(graph, shapes)
    sizes = sizes_of(shapes)
    nodes = [_resized(node, sizes) for node in graph.nodes]
    inputs = [
        Value(name, shape, graph.values[name].dtype)
        for name, shape in zip(graph.inputs, shapes, strict=True)
    ]
    values = infer_values(nodes, inputs)
    return Graph(nodes, values, graph.inputs, dict(graph.outputs), graph.freedom)


def infer_values(nodes: Iterable[Node], inputs: Iterable[Value]) -> dict[str, Value]:
    """Every value of these nodes, for these inputs.   raises: GraphError naming the node"""
    values = {value.name: value for value in inputs}
    for node in nodes:
        found = infer_outputs(node, [values[name] for name in node.inputs])
        if len(found) != len(node.outputs):
            raise GraphError(
                f"Graph: Expected {len(node.outputs)} outputs of {node.name!r}, got {len(found)}"
            )
        for name, (shape, dtype) in zip(node.outputs, found, strict=True):
            values[name] = Value(name, shape, dtype)
            if values[name].bytes > MOST_BYTES:
                raise GraphError(f"Graph: Expected a value that fits memory, got {values[name]}")
    return values


def _check_freedom(graph: Graph, shapes: Sequence[tuple[int, ...]]) -> None:
    freedom = graph.freedom
    for index, (name, shape) in enumerate(zip(graph.inputs, shapes, strict=True)):
        captured = graph.shape(name)
        if len(shape) != len(captured):
            raise ValueError(
                f"engine: Expected input {name!r} of {len(captured)} dimensions like "
                f"{list(captured)}, got {list(shape)}"
            )
        for dim, (size, old) in enumerate(zip(shape, captured, strict=True)):
            low, high = freedom.sizes.get(f"d{index}_{dim}", (old, old))
            if size < low or (size > high >= 0):
                allowed = str(low) if low == high else f"{low} to {'any' if high < 0 else high}"
                raise ValueError(
                    f"engine: Expected size {allowed} in dimension {dim} of input {name!r}, got "
                    f"{list(shape)}. Compile the model with an example of that shape"
                )
    sizes = sizes_of(list(shapes))
    for guard in freedom.guards:
        if not evaluate(guard, sizes):
            raise ValueError(
                f"engine: Expected input sizes with {guard}, as the captured example "
                f"{[list(graph.shape(name)) for name in graph.inputs]}, got "
                f"{[list(shape) for shape in shapes]}. Compile the model with an example of that "
                "shape"
            )


def _resized(node: Node, sizes: dict[str, int]) -> Node:
    if DYNAMIC not in node.attrs:
        return node
    node = node.copy()
    for name, template in json.loads(node.attrs[DYNAMIC]).items():
        filled = _filled(template, sizes)
        node.attrs[name] = json.dumps(filled) if name == "arguments" else tuple(filled)
    return node


def _filled(template: Any, sizes: dict[str, int]) -> Any:
    if isinstance(template, dict):
        if set(template) == {"size"}:
            return evaluate(template["size"], sizes)
        return {key: _filled(value, sizes) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, sizes) for value in template]
    return template
