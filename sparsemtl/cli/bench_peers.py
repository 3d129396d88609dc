"""Our engine as one of the peers, and what it executes."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn

from sparsemtl.engine.engine import Engine, compile
from sparsemtl.measure.peers import PEERS, Peer, Predict
from sparsemtl.measure.rows import digits

ENGINE_FILE = "plan.json"


def engine_peer(precision: str = "float32") -> Peer:
    """The engine on the device of its example input.

    precision: that a CUDA device computes in. There its outputs are the graph's own, as those of
               other runtimes' graphs are, and saving measures nothing on the CPU.
    """

    def save(model: nn.Module, x: Tensor, folder: Path) -> Path:
        path = folder / "engine"
        executor = "torch" if x.is_cuda else "auto"
        compile(model, tuple(x.shape), executor=executor, device="cpu").save(path)
        return path

    def load(path: Path, x: Tensor) -> Predict:
        engine = Engine.load(path, device=x.device, dtype=precision, copy_outputs=not x.is_cuda)
        engine.plan(tuple(x.shape))
        return engine

    return Peer("engine", save, load)


ENGINE = engine_peer()
EVERYONE = {ENGINE.name: ENGINE, **PEERS}


def executed_macs(engine: Engine, x: Tensor) -> float:
    """10^9 multiply-adds that the engine runs for this input: dense layers whole, sparse ones'
    nonzero weights; padding counted, removed channels and taps not."""
    shape = tuple(x.shape)
    graph = engine.plan(shape).graph
    total = 0
    for node, row in zip(graph.nodes, engine.explain(shape).rows, strict=True):
        weight = node.weights.get("weight")
        if row.op not in ("conv2d", "linear") or weight is None:
            continue
        dense = row.runs_as.startswith(("dense", "torch", "library", "together skip"))
        density = 1.0 if dense or row.density is None else row.density
        live = round(density * weight.numel())
        total += live * math.prod(row.output) // max(1, weight.shape[0])
    return digits(total / 1e9)
