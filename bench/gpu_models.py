"""G5 and G6 of `make gpu`: inference and a training step of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.gpu_common import Jobs, Row, Setting, agree, speedup
from bench.gpu_timing import best, graphed, times

TARGETS = (0.9, 0.5, 0.0)  # sparsities of the training step


def network(s: Setting) -> torch.nn.Module:
    from sparsemtl.models.config import ModelConfig, build_model

    torch.manual_seed(0)
    width = 0.125 if s.small else 1.0
    heads = {"segmentation": 40, "normals": 3, "depth": 1}
    model = build_model(ModelConfig("deeplab-resnet34", width=width), heads)
    return model.to(s.device, memory_format=torch.channels_last)


def pruned(s: Setting, target: float, heads_only: bool) -> torch.nn.Module:
    """The network in blocks of 64, its masks fixed at that sparsity."""
    from sparsemtl.sparsity.controller import freeze_exactly
    from sparsemtl.sparsity.sparsify import sparsify

    model = network(s)
    heads = {f"head:{name}": head for name, head in model.heads.items()} if heads_only else None
    sparsify(model, heads, structure="block(16,16)" if s.small else "block(64,64)")
    freeze_exactly(model.sparsity, target)
    return model


def agree_with_dense(s: Setting, model: torch.nn.Module, x: Tensor, what: str) -> None:
    """The kernels' outputs against torch's dense ones, of the same pruned network; kernels on."""
    training = model.training
    model.eval()
    found = []
    for kernels in (False, True):
        model.sparsity.sparse_kernels = kernels
        with torch.no_grad(), autocast(s):
            found.append(model(x))
    for name, expected in found[0].items():
        agree(found[1][name], expected, f"{what}, {name}", 5e-2)
    model.train(training)


def autocast(s: Setting) -> torch.autocast:
    return torch.autocast(s.device.type, torch.bfloat16, enabled=not s.small)


def g6(s: Setting) -> Jobs:
    """A training step, blocks of 64, against the dense step eager, compiled and as graphs."""
    batch, side = (1, 33) if s.small else (16, 321)
    yield f"training step, {side}x{side}, b{batch}", partial(_training, s, batch, side)


def _training(s: Setting, batch: int, side: int) -> Row:
    from sparsemtl.training.fast import GraphedCall

    x = torch.randn(batch, 3, side, side, device=s.device).to(memory_format=torch.channels_last)

    def step_of(model: torch.nn.Module, call: Callable[[Tensor], dict]) -> Callable[[], object]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, 1e-5, fused=s.device.type == "cuda")

        def step() -> None:
            with autocast(s):
                outputs = call(x)
            sum(y.float().square().mean() for y in outputs.values()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    dense = network(s)
    calls = {"dense eager": step_of(dense, dense)}
    if not s.small:
        calls["dense compiled"] = step_of(dense, torch.compile(dense))
        other = network(s)
        calls["dense graph"] = step_of(other, GraphedCall(other, other))
        third = network(s)
        reduced = torch.compile(third, mode="reduce-overhead")
        calls["dense compiled graph"] = step_of(third, reduced)
    for target in TARGETS[: 1 if s.small else None]:
        sparse = pruned(s, target, False)
        agree_with_dense(s, sparse, x, f"the network at {target:.0%}")
        calls[f"ours at {target:.0%} eager"] = step_of(sparse, sparse)
        if not s.small:
            twin = pruned(s, target, False)
            twin.sparsity.sparse_kernels = True
            calls[f"ours at {target:.0%} graph"] = step_of(twin, GraphedCall(twin, twin))
    # The first calls compile, choose the layers' kernels and make the graphs.
    found = times(calls, s.device, 10 * s.budget, warm=1 if s.small else 6)
    row: Row = {**found}
    reference = best(found, "dense")
    for target in TARGETS:
        ours = best(found, f"ours at {target:.0%}")
        if ours and reference:
            row[f"speedup at {target:.0%}" if target != TARGETS[0] else "speedup"] = (
                reference / ours
            )
    return row


def g5(s: Setting) -> Jobs:
    """Inference with heads in blocks of 64, the backbone dense: eager, graph and engine."""
    side = 33 if s.small else 321
    for batch in s.batches:
        yield (
            f"inference, heads at 96 %, {side}x{side}, b{batch}",
            partial(_inference, s, batch, side),
        )


def _inference(s: Setting, batch: int, side: int) -> Row:
    x = torch.randn(batch, 3, side, side, device=s.device, dtype=s.dtype)
    x = x.to(memory_format=torch.channels_last)
    dense = network(s).eval().to(s.dtype)
    sparse = pruned(s, 0.96, True).eval().to(s.dtype)
    agree_with_dense(s, sparse, x, "the network")
    with torch.inference_mode():
        calls = {"dense eager": lambda: dense(x), "ours eager": lambda: sparse(x)}
        if not s.small:
            compiled = torch.compile(dense)
            calls["dense compiled"] = lambda: compiled(x)
            compiled(x)
            calls["dense compiled graph"] = graphed(calls["dense compiled"])
            sparse(x)
            calls["dense graph"] = graphed(calls["dense eager"])
            calls["ours graph"] = graphed(calls["ours eager"])
        found = times(calls, s.device, 3 * s.budget)
    return {**found, **speedup(found)}
