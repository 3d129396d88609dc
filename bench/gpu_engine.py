"""The engine's CUDA graph against the compiled dense model's: a section of `make gpu`.

AdapMTL's split with the heads in blocks of 64, batch 1 and 16, bfloat16. The same with a table,
memory and load times: sparsemtl bench model --device cuda --precision bf16 --prune adapmtl-split
--head-structure "block(64,64)" --batch 1 16 --against torch-compile-graph-bf16,torch-bf16
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.gpu_common import Jobs, Row
from bench.gpu_timing import best, times
from sparsemtl.cuda_graph import CudaGraph
from sparsemtl.engine.engine import Engine, compile
from sparsemtl.measure.pruned import SPLIT_NAME, parse_prune, prune
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.sparsity.structure import parse_structure

TASKS = {"segmentation": 40, "normals": 3, "depth": 1}
GATE = 0.1  # of an output's largest value: what some 70 layers in bfloat16 may cost
MUST = 2.0  # times as fast as the compiled dense model under a CUDA graph


def pruned_model(width: float, block: int) -> nn.Module:
    """The seeded three-task network at AdapMTL's split, its heads in square blocks."""
    torch.manual_seed(0)
    model = build_model(ModelConfig("deeplab-resnet34", width=width), TASKS).eval()
    heads = parse_structure(f"block({block},{block})")
    prune(model, parse_prune("--prune", SPLIT_NAME, TASKS), heads)
    return model


def engine_of(model: nn.Module, x: Tensor) -> Engine:
    """The engine on x's device, its outputs the graph's own as the peer's are."""
    shape = tuple(x.shape)
    if x.is_cuda:
        return compile(model, shape, device=x.device, dtype=torch.bfloat16, copy_outputs=False)
    return compile(model, shape, executor="device")


def dense_calls(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The dense model, channels_last: eager, compiled, and compiled as one CUDA graph."""
    x = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], object]] = {"dense eager": lambda: model(x)}
    if not x.is_cuda:
        return calls
    compiled = torch.compile(model, dynamic=False)
    compiled(x)
    graph = CudaGraph(lambda: compiled(x), x.device)
    return {**calls, "dense compiled graph": graph.replay}


def engine_jobs(device: torch.device, small: bool, budget: float) -> Jobs:
    """A prediction at batch 1 and 16."""
    side = 33 if small else 321
    for batch in (1,) if small else (1, 16):
        name = f"engine at AdapMTL's split, heads in blocks, {side}x{side}, b{batch}"
        yield name, partial(engine_row, device, small, budget, batch, side)


def engine_row(device: torch.device, small: bool, budget: float, batch: int, side: int) -> Row:
    """Times of a prediction, inputs in place for everybody; nothing without the gate."""
    model = pruned_model(0.25 if small else 1.0, 16 if small else 64)
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    x = x.to(device)
    engine = engine_of(model, x)
    (buffer,) = engine.input_buffer(tuple(x.shape))
    buffer.copy_(x)
    with torch.no_grad():
        model.to(device, memory_format=torch.channels_last)
        expected = model(x)
        error = _worst(engine(buffer), expected)
        if not error <= GATE:
            raise AssertionError(f"the engine differs from torch by {error:.1e}")
        model.to(buffer.dtype)
        calls = dense_calls(model, x.to(buffer.dtype))
        found = times({"ours engine": partial(engine, buffer), **calls}, device, budget)
    row: Row = {**found, "where": engine.explain(tuple(x.shape)).where, "error": error}
    ours, dense = best(found, "ours"), best(found, "dense")
    if ours and dense:
        row |= {"speedup": dense / ours, "must": MUST}
    return row


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    errors = [(found[task].float() - y.float()).abs().max() / y.abs().max() for task, y in
              expected.items()]  # fmt: skip
    return max(float(error) for error in errors)
