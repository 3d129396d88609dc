"""Our engine as one of the peers, and what it executes."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn

from sparsemtl.engine.engine import Engine, compile
from sparsemtl.measure.peers import PEERS, Peer, Predict
from sparsemtl.measure.rows import digits

ENGINE_FILE = "plan.json"


def _save(model: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "engine"
    compile(model, x).save(path)
    return path


def _load(path: Path, x: Tensor) -> Predict:
    engine = Engine.load(path)
    engine.plan(tuple(x.shape))
    return engine


ENGINE = Peer("engine", _save, _load)
EVERYONE = {ENGINE.name: ENGINE, **PEERS}


def executed_macs(folder: Path | None, x: Tensor) -> float | None:
    """10^9 multiply-adds that the engine runs for this input: dense layers whole, sparse ones'
    nonzero weights; padding counted, removed channels and taps not."""
    if folder is None:
        return None
    engine = Engine.load(folder)
    shape = tuple(x.shape)
    graph = engine.plan(shape).graph
    total = 0
    for node, row in zip(graph.nodes, engine.explain(shape).rows, strict=True):
        weight = node.weights.get("weight")
        if row.op not in ("conv2d", "linear") or weight is None:
            continue
        sparse = not row.runs_as.startswith(("dense", "torch"))
        density = row.density if sparse and row.density is not None else 1.0
        live = round(density * weight.numel())
        total += live * math.prod(row.output) // max(1, weight.shape[0])
    return digits(total / 1e9)
