"""A graph as JSON and back; its weights as numbers into a list of coded tensors.

Reading trusts nothing: every field has a type, every number a range, every name a meaning. What
remains, the graph's own rules, is `Graph.validate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsemtl.engine.expression import evaluate
from sparsemtl.engine.graph import Freedom, Graph, Node, Value
from sparsemtl.engine.ops import DYNAMIC, LARGEST

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
_MOST_AXES = 8
_FLOATS = ("inf", "-inf", "nan")


def to_json(graph: Graph, add_weight: Callable[[Tensor], int]) -> dict[str, Any]:
    """Plain JSON.   add_weight: keeps a weight and returns its number"""
    return {
        "inputs": list(graph.inputs),
        "outputs": [[task, name] for task, name in graph.outputs.items()],
        "values": [[v.name, list(v.shape), dtype_name(v.dtype)] for v in graph.values.values()],
        "nodes": [
            {
                "op": node.op,
                "name": node.name,
                "inputs": list(node.inputs),
                "outputs": list(node.outputs),
                "attrs": {name: _attribute(value) for name, value in node.attrs.items()},
                "weights": {name: add_weight(w) for name, w in node.weights.items()},
            }
            for node in graph.nodes
        ],
        "freedom": {
            "sizes": {name: list(limits) for name, limits in graph.freedom.sizes.items()},
            "guards": list(graph.freedom.guards),
        },
    }


def from_json(plan: dict[str, Any], weight_of: Callable[[int], Tensor]) -> Graph:
    """The graph, not yet validated.   raises: ValueError naming the field that is wrong"""
    values = [_value(item) for item in _list(plan, "values")]
    graph = Graph(
        [_node(item, weight_of) for item in _list(plan, "nodes")],
        {value.name: value for value in values},
        tuple(_texts(plan, "inputs")),
        dict(_pair_of_texts(item) for item in _list(plan, "outputs")),
        _freedom(_dict(plan, "freedom")),
    )
    if len(graph.values) != len(values) or len(graph.outputs) != len(plan["outputs"]):
        raise ValueError("Expected each value and each output once, got one twice")
    return graph


def shape_of(value: Any, what: str) -> tuple[int, ...]:
    """A shape from JSON.   raises: ValueError for anything but a few sizes in range"""
    if not isinstance(value, list) or len(value) > _MOST_AXES:
        raise ValueError(f"Expected {what} to be a list of sizes, got {_short(value)}")
    return tuple(integer(size, what, 0, LARGEST) for size in value)


def integer(value: Any, what: str, low: int, high: int) -> int:
    """raises: ValueError unless value is an integer in [low, high]"""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"Expected {what} to be an integer in [{low}, {high}], got {_short(value)}"
        )
    return value


def _value(item: Any) -> Value:
    if not isinstance(item, list) or len(item) != 3:
        raise ValueError(f"Expected a value of name, shape and dtype, got {_short(item)}")
    name = _text(item[0], "the name of a value")
    return Value(name, shape_of(item[1], f"the shape of {name!r}"), dtype_of(item[2]))


def dtype_of(name: Any) -> torch.dtype:
    """raises: ValueError for a name that no value may have"""
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"Expected a dtype in {DTYPES}, got {_short(name)}")
    return getattr(torch, name)


def _node(item: Any, weight_of: Callable[[int], Tensor]) -> Node:
    if not isinstance(item, dict):
        raise ValueError(f"Expected a node, got {_short(item)}")
    weights = {
        _text(name, "the name of a weight"): weight_of(integer(number, "a weight", 0, LARGEST))
        for name, number in _dict(item, "weights").items()
    }
    attrs = {name: _from_attribute(value) for name, value in _dict(item, "attrs").items()}
    node = Node(
        _text(item.get("op"), "an op"),
        _text(item.get("name"), "the name of a node"),
        tuple(_texts(item, "inputs")),
        tuple(_texts(item, "outputs")),
        attrs,
        weights,
    )
    if not isinstance(attrs.get(DYNAMIC, ""), str):
        raise ValueError(f"Expected text in {DYNAMIC!r} of {node.name!r}")
    return node


def _freedom(item: dict[str, Any]) -> Freedom:
    sizes = {}
    for name, limits in _dict(item, "sizes").items():
        if not isinstance(limits, list) or len(limits) != 2:
            raise ValueError(f"Expected two limits of {name!r}, got {_short(limits)}")
        low, high = (integer(limit, f"a limit of {name!r}", -1, LARGEST) for limit in limits)
        sizes[name] = (low, high)
    return Freedom(sizes, tuple(_texts(item, "guards")))


def check_freedom(graph: Graph) -> None:
    """raises: ValueError unless the graph's own sizes fulfil its guards and limits"""
    shapes = [graph.shape(name) for name in graph.inputs]
    sizes = {f"d{i}_{d}": size for i, shape in enumerate(shapes) for d, size in enumerate(shape)}
    for name, (low, high) in graph.freedom.sizes.items():
        if name not in sizes or sizes[name] < low or 0 <= high < sizes[name]:
            raise ValueError(f"Expected limits around the sizes {sizes}, got {name}: {low, high}")
    for guard in graph.freedom.guards:
        if not evaluate(guard, sizes):
            raise ValueError(f"Expected guards that hold at {sizes}, got {guard}")


def _attribute(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float) and value - value != 0.0:
        return {"float": str(value)}
    return value


def _from_attribute(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(integer(n, "an attribute", -LARGEST, LARGEST) for n in value)
    if isinstance(value, dict):
        if set(value) != {"float"} or value["float"] not in _FLOATS:
            raise ValueError(f"Expected an attribute, got {_short(value)}")
        return float(value["float"])
    if not isinstance(value, int | float | str | bool):
        raise ValueError(f"Expected an attribute, got {_short(value)}")
    return value


def dtype_name(dtype: torch.dtype) -> str:
    """raises: ValueError for a dtype that no value may have"""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"engine: Expected values of {DTYPES} to save, got {name}")
    return name


def _list(item: dict[str, Any], key: str) -> list[Any]:
    value = item.get(key)
    if not isinstance(value, list):
        raise ValueError(f"Expected {key!r} to be a list, got {_short(value)}")
    return value


def _dict(item: dict[str, Any], key: str) -> dict[str, Any]:
    value = item.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"Expected {key!r} to be an object, got {_short(value)}")
    return value


def _texts(item: dict[str, Any], key: str) -> list[str]:
    return [_text(value, f"an item of {key!r}") for value in _list(item, key)]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"Expected {what} to be text, got {_short(value)}")
    return value


def _pair_of_texts(item: Any) -> tuple[str, str]:
    if not isinstance(item, list) or len(item) != 2:
        raise ValueError(f"Expected a task and its value, got {_short(item)}")
    return _text(item[0], "a task"), _text(item[1], "a value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
