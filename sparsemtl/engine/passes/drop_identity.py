"""Drop what does nothing: dropout and clones in evaluation, reshapes to the same shape.

Exact: the same bits.
"""

from __future__ import annotations

from sparsemtl.engine.graph import Graph, Node


def drop_identity(graph: Graph) -> int:
    """Let readers of a node that changes nothing read its input; returns how many there were."""
    found = [node for node in graph.nodes if _changes_nothing(node, graph)]
    for node in found:
        # An output that is an input would be the caller's own tensor, not one of its own.
        if node.inputs[0] in graph.inputs and node.output in graph.outputs.values():
            continue
        graph.replace_reads(node.output, node.inputs[0])
        graph.nodes.remove(node)
        del graph.values[node.output]
    return len(found)


def _changes_nothing(node: Node, graph: Graph) -> bool:
    if node.op == "identity":
        return True
    same = graph.shape(node.inputs[0]) == graph.shape(node.output) if node.inputs else False
    # At another size a reshape may do something, so only those that depend on no size count.
    always = "dynamic" not in node.attrs and not graph.freedom.sizes
    return node.op in ("flatten", "reshape") and same and always
