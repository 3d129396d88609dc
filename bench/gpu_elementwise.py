"""Roofs and G1 of `make gpu`: what memory bandwidth bounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.gpu_common import Jobs, Row, Setting, agree, speedup
from bench.gpu_timing import times


def roofs(s: Setting) -> Jobs:
    """What this GPU does at best: copy, and a bfloat16 product."""
    yield "roofs", partial(_roofs, s)


def _roofs(s: Setting) -> Row:
    n = 64 if s.small else 8192
    a = torch.randn(n, n, device=s.device, dtype=s.dtype)
    b, c = torch.randn_like(a), torch.empty_like(a)
    big = torch.rand((1 << 10) if s.small else (1 << 28), device=s.device)
    other = torch.empty_like(big)
    calls = {"copy": lambda: other.copy_(big), "product": lambda: torch.mm(a, b, out=c)}
    found = times(calls, s.device, s.budget)
    return {
        **found,
        "copy TB/s": 2 * big.nbytes / found["copy"]["ms"] / 1e9,
        "product TFLOP/s": 2 * n**3 / found["product"]["ms"] / 1e9,
    }


def g1(s: Setting) -> Jobs:
    """threshold_adam against torch's fused Adam and an eager or compiled soft threshold."""
    yield "threshold_adam", partial(_adam, s, None)
    yield "threshold_adam, blocks", partial(_adam, s, (16, 16) if s.small else (64, 64))


def _adam(s: Setting, tile: tuple[int, int] | None) -> Row:
    from sparsemtl.ops import THRESHOLD_ADAM, AdamRule, threshold_adam, use_backend
    from sparsemtl.ops.group_threshold import group_threshold_reference
    from sparsemtl.ops.soft_threshold import soft_threshold_reference
    from sparsemtl.ops.tiles import Tile

    shapes = [(64, 64, 3, 3)] if s.small else [(1024, 512, 3, 3)] * 12 + [(1024, 1024)] * 12
    if not s.small:
        shapes += [(512, 512, 3, 3)] * 5 + [(256, 256, 3, 3)] * 11 + [(128, 128, 3, 3)] * 13
    weights = [torch.randn(shape, device=s.device) * 0.02 for shape in shapes]
    state = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    grads = [torch.randn_like(w) for w in weights]
    alpha, rule = torch.full((1,), 0.02, device=s.device), AdamRule(lr=1e-4, weight_decay=1e-4)
    rules, owners = [rule] * len(weights), [0] * len(weights)
    group = None if tile is None else Tile(*tile)

    def shrink(w: torch.Tensor) -> torch.Tensor:
        if group is None:
            return soft_threshold_reference(w, alpha[0]).to(s.dtype)
        return group_threshold_reference(w, alpha[0], group).to(s.dtype)

    options = {"dtype": s.dtype, "bitmask": tile is None, "tile": tile}
    calls: dict[str, Callable[[], object]] = {}
    row: Row = {"weights, millions": sum(w.numel() for w in weights) / 1e6}
    given = (weights, grads, *state, rules, alpha, owners)
    reasons = THRESHOLD_ADAM.explain(*given, None, group)
    for backend in ("reference",) if s.small else ("triton", "cuda"):
        if reasons[backend] is not None:
            row[f"ours {backend}"] = {"error": reasons[backend]}
            continue
        with use_backend(backend):
            out = threshold_adam(*given, **options)
        for found, weight in zip(out.values, weights, strict=True):
            agree(found, shrink(weight), f"threshold_adam's values on {backend}")

        def ours(backend=backend, out=out) -> None:
            with use_backend(backend):
                threshold_adam(*given, **options, out=out)

        calls[f"ours {backend}"] = ours
    leaves = [torch.nn.Parameter(w.clone()) for w in weights]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    fused = torch.optim.Adam(leaves, 1e-4, weight_decay=1e-4, fused=True)

    def dense(shrink=shrink) -> None:
        fused.step()
        with torch.no_grad():
            for leaf in leaves:
                shrink(leaf)

    calls["dense eager threshold + fused Adam"] = dense
    if not s.small:
        calls["dense compiled threshold + fused Adam"] = partial(
            dense, torch.compile(shrink, dynamic=False)
        )
    found = times(calls, s.device, s.budget)
    return {**row, **found, **speedup(found)}
