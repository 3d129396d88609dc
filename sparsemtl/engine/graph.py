"""The engine's own graph: a list of nodes in execution order over named, shaped values.

A graph has static shapes, batch included. What each op means, and which attributes and weights
it takes, stands in `engine/ops.py`. Weights are shared between copies and never written to:
a pass that changes one puts another tensor in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsemtl.engine.ops import check_node, infer_outputs
from sparsemtl.errors import GraphError


@dataclass(frozen=True)
class Value:
    """What flows between nodes.   shape: static, batch included"""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the value, contiguous."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def __str__(self) -> str:
        return f"{self.name}{list(self.shape)}"


@dataclass(eq=False)  # a node is itself, whatever it holds
class Node:
    """One operation.

    op:      a key of `engine.ops.OPS`
    name:    unique in its graph; what tables and errors call it
    inputs:  values that it reads, in the op's order
    outputs: values that it writes; one, but for some that torch runs
    attrs:   int, float, bool, str or tuple of int, by name, as `engine.ops.OPS` lists them
    weights: constant tensors, by the op's names
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """The only output."""
        (only,) = self.outputs
        return only

    def copy(self) -> Node:
        return replace(self, attrs=dict(self.attrs), weights=dict(self.weights))

    def bare(self) -> Node:
        """A copy without weights, for who has them in another form."""
        return replace(self, attrs=dict(self.attrs), weights={})


@dataclass(frozen=True)
class Freedom:
    """Which input sizes may change without another capture.

    sizes:  symbol `d<input>_<dim>` → smallest and largest size (-1: no limit)
    guards: Python comparisons over these symbols that must hold, see `engine/expression.py`
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    guards: tuple[str, ...] = ()


@dataclass
class Graph:
    """Nodes in execution order.

    values:  name → Value, of every value, inputs first
    inputs:  names of the values that the caller gives
    outputs: task → name of the value that answers it
    freedom: the input sizes that the same nodes serve, see `engine/shapes.py`
    """

    nodes: list[Node]
    values: dict[str, Value]
    inputs: tuple[str, ...]
    outputs: dict[str, str]
    freedom: Freedom = field(default_factory=Freedom)

    def copy(self) -> Graph:
        """A graph whose lists and dicts are its own; values and weights are shared."""
        return Graph(
            [node.copy() for node in self.nodes],
            dict(self.values),
            self.inputs,
            dict(self.outputs),
            self.freedom,
        )

    def bare(self) -> Graph:
        """A copy without weights."""
        return replace(self.copy(), nodes=[node.bare() for node in self.nodes])

    @property
    def producers(self) -> dict[str, Node]:
        """Value → the node that writes it; graph inputs have none."""
        return {output: node for node in self.nodes for output in node.outputs}

    @property
    def consumers(self) -> dict[str, list[Node]]:
        """Value → the nodes that read it, in order, a node once for each time it does."""
        readers: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in node.inputs:
                readers[name].append(node)
        return readers

    def shape(self, value: str) -> tuple[int, ...]:
        return self.values[value].shape

    def reads(self, value: str) -> int:
        """How often a value is read, by nodes and as an output of the graph."""
        inside = sum(node.inputs.count(value) for node in self.nodes)
        return inside + sum(name == value for name in self.outputs.values())

    def add_value(self, like: str, shape: Iterable[int], dtype: torch.dtype) -> str:
        """Enter a value under a name that is still free, made from `like`; returns the name."""
        name = free_name(like, self.values)
        self.values[name] = Value(name, tuple(shape), dtype)
        return name

    def free_node_name(self, like: str) -> str:
        return free_name(like, {node.name for node in self.nodes})

    def replace_reads(self, old: str, new: str) -> None:
        """Let every reader of `old`, the graph's outputs included, read `new`."""
        for node in self.nodes:
            if old in node.inputs:
                node.inputs = tuple(new if name == old else name for name in node.inputs)
        self.outputs = {task: new if v == old else v for task, v in self.outputs.items()}

    def prune(self) -> None:
        """Drop nodes whose outputs nobody reads, and values that nobody has."""
        wanted = set(self.outputs.values())
        kept = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.inputs)
        self.nodes = kept[::-1]
        alive = {name for node in self.nodes for name in (*node.inputs, *node.outputs)}
        alive.update(self.inputs, self.outputs.values())
        self.values = {name: v for name, v in self.values.items() if name in alive}

    def sort(self) -> None:
        """Put nodes into an order in which each comes after what it reads; stable.

        raises: GraphError for a cycle
        """
        have = set(self.inputs)
        waiting, ordered = self.nodes, []
        while waiting:
            later = []
            for node in waiting:
                if have.issuperset(node.inputs):
                    ordered.append(node)
                    have.update(node.outputs)
                else:
                    later.append(node)
            if len(later) == len(waiting):
                raise GraphError(f"Graph: Expected no cycle, got one through {later[0].name!r}")
            waiting = later
        self.nodes = ordered

    def validate(self) -> None:
        """Check names, order, attributes, weights and shapes; nothing is computed.

        raises: GraphError naming the first node or value that is wrong
        """
        self._check_names()
        for node in self.nodes:
            check_node(node)
            found = infer_outputs(node, [self.values[name] for name in node.inputs])
            declared = [(v.shape, v.dtype) for v in map(self.values.__getitem__, node.outputs)]
            if found != declared:
                raise GraphError(
                    f"Graph: Expected {node.name!r} ({node.op}) to write {declared}, got {found}"
                )

    def _check_names(self) -> None:
        for name, value in self.values.items():
            if name != value.name or not name:
                raise GraphError(
                    f"Graph: Expected value {name!r} under its name, got {value.name!r}"
                )
            if any(size < 0 for size in value.shape):
                raise GraphError(f"Graph: Expected sizes ≥ 0 of {name!r}, got {list(value.shape)}")
        have: set[str] = set()
        for name in self.inputs:
            self._define(name, "the inputs", have)
        seen: set[str] = set()
        for node in self.nodes:
            if not node.name or node.name in seen:
                raise GraphError(f"Graph: Expected unique node names, got {node.name!r} again")
            seen.add(node.name)
            for name in node.inputs:
                if name not in have:
                    raise GraphError(
                        f"Graph: Expected {node.name!r} to read values written before it, "
                        f"got {name!r}"
                    )
            for name in node.outputs:
                self._define(name, repr(node.name), have)
        if not self.outputs:
            raise GraphError("Graph: Expected at least one output, got none")
        for task, name in self.outputs.items():
            if name not in have:
                raise GraphError(f"Graph: Expected output {task!r} to be written, got {name!r}")
        if unknown := set(self.values) - have:
            raise GraphError(f"Graph: Expected every value to be written, got {sorted(unknown)}")

    def _define(self, name: str, who: str, have: set[str]) -> None:
        if name not in self.values:
            raise GraphError(f"Graph: Expected {who} to write known values, got {name!r}")
        if name in have:
            raise GraphError(f"Graph: Expected {name!r} to be written once, got {who} again")
        have.add(name)

    def __str__(self) -> str:
        lines = [f"inputs: {', '.join(str(self.values[name]) for name in self.inputs)}"]
        lines += [self._line(node) for node in self.nodes]
        lines += [f"output {task}: {self.values[name]}" for task, name in self.outputs.items()]
        return "\n".join(lines)

    def _line(self, node: Node) -> str:
        written = ", ".join(str(self.values[name]) for name in node.outputs)
        weights = [f"{name}{list(w.shape)}" for name, w in node.weights.items()]
        attrs = [f"{name}={value}" for name, value in node.attrs.items()]
        return f"{written} = {node.op}({', '.join([*node.inputs, *weights, *attrs])})"


def free_name(like: str, taken: Iterable[str]) -> str:
    """`like`, or `like.1`, `like.2` ...: the first that is not taken."""
    names = taken if isinstance(taken, set | dict) else set(taken)
    name, count = like, 0
    while name in names:
        count += 1
        name = f"{like}.{count}"
    return name
