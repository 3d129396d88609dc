"""From what `torch.export` gives to our graph: constants folded, operators lowered, sizes kept.

An operator whose inputs are all constants runs once, here: S(W, α) of a sparsified layer, a
weight standardised or masked in the forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from sparsemtl.engine import aten
from sparsemtl.engine.capture_errors import CaptureError, depends_on_values, last_lines
from sparsemtl.engine.expression import evaluate, sizes_of, symbol
from sparsemtl.engine.graph import Freedom, Graph, Node, Value, free_name
from sparsemtl.engine.lower import Lowered, Read, Size, lower
from sparsemtl.engine.ops import DYNAMIC
from sparsemtl.engine.shapes import infer_values, specialise
from sparsemtl.errors import GraphError

_CHECKS = ("aten._assert", "aten.sym_constrain_range", "aten._functional_assert")


def build_graph(exported: Any, example: Sequence[Tensor], freedom: Freedom) -> Graph:
    """The graph of an exported program.

    freedom: which sizes may stay open; those that the graph turns out to hold fixed are closed
    raises:  CaptureError for a part that has no static form
    """
    builder = _Builder(exported, example)
    for node in exported.graph.nodes:
        builder.visit(node)
    graph = builder.finish(freedom)
    expected = builder.output_shapes()
    still = {
        name: limits for name, limits in freedom.sizes.items() if _opens(graph, name, expected)
    }
    graph.freedom = Freedom(still, freedom.guards) if still else Freedom()
    return graph


def _opens(graph: Graph, name: str, expected: dict[str, list[int | Size]]) -> bool:
    """Whether another size there gives outputs of the shapes that torch's capture tells."""
    shapes = [graph.shape(i) for i in graph.inputs]
    for larger in (lambda n: n + 1, lambda n: 2 * n):
        sizes = sizes_of(shapes)
        sizes[name] = larger(sizes[name])
        other = [tuple(sizes[symbol(i, d)] for d in range(len(s))) for i, s in enumerate(shapes)]
        try:
            found = specialise(graph, other)
            return all(
                list(found.shape(found.outputs[task]))
                == [evaluate(n.formula, sizes) if isinstance(n, Size) else n for n in shape]
                for task, shape in expected.items()
            )
        except GraphError:
            return False
        except ValueError:
            continue  # a size that the guards exclude
    return True


class _Builder:
    """Walks the exported graph; `known` holds what each of its nodes is.

    Read: a value of ours. Tensor: a constant. Size: an integer that follows from the input.
    A number, None or a list of these: itself. A tuple: an operator's several outputs.
    """

    def __init__(self, exported: Any, example: Sequence[Tensor]) -> None:
        self.exported = exported
        self.example = list(example)
        self.known: dict[Any, Any] = {}
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.inputs: list[str] = []
        self.names: set[str] = set()
        self.symbols: dict[Any, str] = {}
        self.hints: dict[str, int] = {}
        specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        self.specs: dict[str, Any] = specs
        self.outputs: list[Any] = []

    def visit(self, node: Any) -> None:
        if node.op == "placeholder":
            self.known[node] = self._placeholder(node)
        elif node.op == "get_attr":
            self.known[node] = getattr(self.exported.graph_module, node.target)
        elif node.op == "call_function":
            self.known[node] = self._call(node)
        elif node.op == "output":
            self.outputs = list(node.args[0])

    def finish(self, freedom: Freedom) -> Graph:
        specs = self.exported.graph_signature.output_specs
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in specs):
            raise CaptureError(
                "compile: Expected a model in evaluation mode that writes to no buffer of its own, "
                "got one that does"
            )
        tree = pytree.tree_unflatten(self.outputs, self.exported.call_spec.out_spec)
        outputs = {task: self._output(task, node) for task, node in _tasks(tree).items()}
        graph = Graph(self.nodes, self.values, tuple(self.inputs), outputs, freedom)
        graph.prune()
        graph.values = infer_values(graph.nodes, [self.values[name] for name in graph.inputs])
        return graph

    def output_shapes(self) -> dict[str, list[int | Size]]:
        """Task → shape, as formulas of the input's sizes where torch's capture has them."""
        tree = pytree.tree_unflatten(self.outputs, self.exported.call_spec.out_spec)
        found = {}
        for task, node in _tasks(tree).items():
            found[task] = self._formulas(node.meta["val"], node)
        return found

    def _output(self, task: str, node: Any) -> str:
        known = self.known.get(node)
        if not isinstance(known, Read):
            raise CaptureError(
                f"compile: Expected output {task!r} to be a tensor that depends on the input, got "
                f"{'a constant' if isinstance(known, Tensor) else type(known).__name__}"
            )
        return known.name

    def _placeholder(self, node: Any) -> Any:
        spec = self.specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            return self._input(node)
        state, constants = self.exported.state_dict, self.exported.constants
        found = state[spec.target] if spec.target in state else constants[spec.target]
        return found.detach() if isinstance(found, Tensor) else found

    def _input(self, node: Any) -> Any:
        index = len(self.inputs)
        if not isinstance(node.meta.get("val"), Tensor):
            return node.meta.get("val")
        x = self.example[index]
        for dim, size in enumerate(node.meta["val"].shape):
            self.hints[symbol(index, dim)] = x.shape[dim]
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                self.symbols.setdefault(size.node.expr, symbol(index, dim))
        name = free_name(node.name, self.names)
        self.names.add(name)
        self.inputs.append(name)
        self.values[name] = Value(name, tuple(x.shape), x.dtype)
        return Read(name, tuple(x.shape))

    def _call(self, node: Any) -> Any:
        value, target = node.meta.get("val"), node.target
        if str(target).startswith(_CHECKS):
            return None
        if isinstance(value, torch.SymInt):
            return self._size(value, node)
        if isinstance(value, torch.SymBool | torch.SymFloat):
            return value  # only checks read it, or a formula that holds it already
        args = pytree.tree_map(self._known, node.args)
        kwargs = pytree.tree_map(self._known, node.kwargs)
        if getattr(target, "__name__", "") == "getitem":
            return args[0][args[1]]
        if not isinstance(target, torch._ops.OpOverload):
            raise CaptureError(
                f"compile: Expected tensor operations only, got {target} at "
                f"{last_lines(node.meta.get('stack_trace'))}"
            )
        constant = not _holds(Read, (args, kwargs)) and not _holds(Size, (args, kwargs))
        if constant and torch.Tag.nondeterministic_seeded not in target.tags:
            return target(*args, **kwargs)
        return self._emit(node, target, args, kwargs)

    def _known(self, value: Any) -> Any:
        return self.known[value] if isinstance(value, torch.fx.Node) else value

    def _emit(self, node: Any, target: Any, args: Any, kwargs: Any) -> Any:
        value = node.meta["val"]
        several = isinstance(value, tuple | list)
        found = list(value) if several else [value]
        shapes = [self._hints(v, node) for v in found]
        lowered = None
        if not several or all(_takes_first(user) for user in node.users):
            arguments = _by_name(target, args, kwargs)
            lowered = lower(target, arguments, lambda: self._formulas(found[0], node))
        names = self._names(node.name, 1 if lowered else len(shapes))
        if lowered is None:
            self.nodes.append(_torch_node(node.name, target, args, kwargs, names))
        else:
            self.nodes.append(_own_node(node.name, lowered, names))
        reads = tuple(Read(n, s) for n, s in zip(names, shapes, strict=False))
        return reads if several else reads[0]

    def _names(self, like: str, count: int) -> tuple[str, ...]:
        names = []
        for place in range(count):
            name = free_name(like if count == 1 else f"{like}.{place}", self.names)
            self.names.add(name)
            names.append(name)
        return tuple(names)

    def _hints(self, value: Any, node: Any) -> tuple[int, ...]:
        """The shape that a tensor has for the example."""
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"compile: Expected operations that return tensors, got {node.target} at "
                f"{last_lines(node.meta.get('stack_trace'))}"
            )
        hints = [n.node.hint if isinstance(n, torch.SymInt) else n for n in value.shape]
        if any(hint is None for hint in hints):
            raise depends_on_values(node.meta.get("stack_trace"), str(node.target))
        return tuple(hints)

    def _formulas(self, value: Tensor, node: Any) -> list[int | Size]:
        return [self._size(n, node) if isinstance(n, torch.SymInt) else n for n in value.shape]

    def _size(self, value: Any, node: Any) -> int | Size:
        expression = value.node.expr
        if expression.is_Integer:
            return int(expression)
        if not expression.free_symbols <= set(self.symbols):
            raise depends_on_values(node.meta.get("stack_trace"), str(node.target))
        named = expression.xreplace(
            {old: old.__class__(new, integer=True) for old, new in self.symbols.items()}
        )
        text = PythonPrinter().doprint(named)
        try:
            return Size(text, int(evaluate(text, self.hints)))
        except ValueError as error:
            raise CaptureError(f"compile: no form for the size {text}") from error


def _takes_first(user: Any) -> bool:
    return getattr(user.target, "__name__", "") == "getitem" and user.args[1] == 0


def _own_node(name: str, lowered: Lowered, outputs: tuple[str, ...]) -> Node:
    node = Node(lowered.op, name, tuple(x.name for x in lowered.inputs), outputs)
    node.attrs = {**lowered.attrs, **{k: tuple(map(_hint, v)) for k, v in lowered.sizes.items()}}
    node.weights = {key: w.contiguous() for key, w in lowered.weights.items()}
    if _holds(Size, list(lowered.sizes.values())):
        node.attrs[DYNAMIC] = json.dumps({k: _formulas(v) for k, v in lowered.sizes.items()})
    return node


def _torch_node(name: str, target: Any, args: Any, kwargs: Any, outputs: tuple[str, ...]) -> Node:
    node = Node("torch", name, (), outputs)
    try:
        template = _encode({"args": list(args), "kwargs": dict(kwargs)}, node)
    except TypeError as error:
        raise CaptureError(f"compile: Expected plain arguments of {target}, got {error}") from error
    full = target.name() if "." in target.name() else f"{target.name()}.default"
    node.attrs = {"target": full, "arguments": json.dumps(_at_hints(template))}
    if _holds(Size, template):
        node.attrs[DYNAMIC] = json.dumps({"arguments": _formulas(template)})
    return node


def _encode(value: Any, node: Node) -> Any:
    """Arguments in the form of `engine/aten.py`, sizes still `Size`; fills inputs and weights."""
    if isinstance(value, Read):
        if value.name not in node.inputs:
            node.inputs = (*node.inputs, value.name)
        return {"input": node.inputs.index(value.name)}
    if isinstance(value, Tensor):
        name = f"constant{len(node.weights)}"
        node.weights[name] = value.contiguous()
        return {"weight": name}
    if isinstance(value, Size):
        return value
    if isinstance(value, dict):
        return {key: _encode(item, node) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, node) for item in value]
    return aten.encode(value)


def _at_hints(value: Any) -> Any:
    return pytree.tree_map(_hint, value, is_leaf=lambda v: isinstance(v, Size))


def _formulas(value: Any) -> Any:
    def formula(item: Any) -> Any:
        return {"size": item.formula} if isinstance(item, Size) else item

    return pytree.tree_map(formula, value, is_leaf=lambda v: isinstance(v, Size))


def _hint(size: Any) -> Any:
    return size.hint if isinstance(size, Size) else size


def _holds(kind: type, value: Any) -> bool:
    return any(isinstance(leaf, kind) for leaf in pytree.tree_leaves(value))


def _by_name(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the schema's names, defaults filled in."""
    named = {}
    for place, argument in enumerate(target._schema.arguments):
        if place < len(args):
            named[argument.name] = args[place]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def _tasks(tree: Any) -> dict[str, Any]:
    """Task → what the model returned for it; what is nested is joined by dots."""
    if not isinstance(tree, dict | list | tuple):
        return {"output": tree}
    return dict(_named("", tree))


def _named(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(f"{place}" if prefix else f"output{place}", v) for place, v in enumerate(tree)]
    else:
        yield prefix, tree
        return
    for name, value in items:
        yield from _named(f"{prefix}.{name}" if prefix else name, value)
