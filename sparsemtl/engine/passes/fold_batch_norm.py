"""Fold batch norm into the convolution or linear layer before it.

(W x + b − mean) / √(var + ε) · γ + β = (s W) x + s (b − mean) + β with s = γ / √(var + ε), computed
in float64 and rounded once: equal up to the rounding of the products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemtl.engine.graph import Graph, Node


def fold_batch_norm(graph: Graph) -> int:
    """Fold where the layer is read by its batch norm alone; returns how many were folded."""
    folded = 0
    for norm in [node for node in graph.nodes if node.op == "batch_norm"]:
        layer = graph.producers.get(norm.inputs[0])
        if layer is None or not _takes(layer, norm, graph):
            continue
        layer.weights = _folded(layer, norm)
        graph.nodes.remove(norm)
        graph.replace_reads(norm.output, layer.output)
        del graph.values[norm.output]
        folded += 1
    return folded


def _takes(layer: Node, norm: Node, graph: Graph) -> bool:
    if layer.op not in ("conv2d", "linear") or graph.reads(layer.output) != 1:
        return False
    if layer.op == "linear" and len(graph.shape(layer.output)) != 2:
        return False  # batch norm's channels are then not the layer's
    return len(layer.inputs) == 1 and layer.attrs["activation"] == ""


def _folded(layer: Node, norm: Node) -> dict[str, Tensor]:
    weight = layer.weights["weight"]
    n = {name: tensor.double() for name, tensor in norm.weights.items()}
    scale = torch.rsqrt(n["var"] + norm.attrs["eps"])
    if "weight" in n:
        scale = scale * n["weight"]
    shift = (layer.weights["bias"].double() if "bias" in layer.weights else 0.0) - n["mean"]
    bias = shift * scale + n.get("bias", torch.zeros_like(scale))
    scaled = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return {"weight": scaled.to(weight.dtype), "bias": bias.to(weight.dtype)}
