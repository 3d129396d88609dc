"""The parts of `make gpu`, each run by itself: python -m bench.gpu_sections NAME --out FILE.

A section checks what it is about to time against torch, then times ours and the dense baselines in
turn, and writes after every row. G1 to G6 are the goals of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bench.gpu_engine import engine_rows
from bench.gpu_timing import best, graphed, times
from bench.machine import machine
from sparsemtl.ops import sparse_conv2d_triton as on_gpu
from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.sparse_conv2d_pixels import pixel_order
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_tiles import Tile, fitted, tiles_of

RATES = (6, 12, 18, 24)
COPY, PEAK = 4.3e12, 790e12  # bytes and bfloat16 FLOP per second of an H200, assumed for floors
WEIGHTS = 90_651_648  # of the 72 convolutions of the 3-task DeepLab-ResNet34
Row = dict[str, object]


class Setting:
    """Sizes; small ones serve to try the sections out in the interpreter."""

    def __init__(self, device: str, small: bool = False) -> None:
        self.device = torch.device(device)
        self.dtype = torch.float32 if small else torch.bfloat16
        self.channels, self.outputs, self.size = (32, 32, 7) if small else (512, 1024, 41)
        self.batches = (1,) if small else (1, 16)
        self.budget = 0.01 if small else 2.0
        self.small = small


def in_bounds(rate: int, size: int) -> float:
    """Share of a 3x3 convolution's taps that read the map."""
    g = Geometry((1, 1), (rate, rate), (rate, rate), (3, 3), 1)
    order = pixel_order(g, 1, (size, size), 1, False, torch.device("cpu"))
    return order.tile_taps / (9 * size * size)


def plan() -> Iterator[tuple[str, float | None]]:
    """Every case and its floor in milliseconds: FLOP that remain at the peak, or bytes."""
    yield "G1 threshold_adam, 90.7 M weights", 1e3 * WEIGHTS * (28 + 2 + 1 / 8) / COPY
    work = 2 * 512 * 1024 * 9 * 41 * 41
    share = sum(in_bounds(rate, 41) for rate in RATES)
    for batch in (1, 16):
        yield f"G2 dense ASPP 3x3, four rates, b{batch}", 1e3 * batch * work * share / PEAK
    for block, density in ((64, 0.1), (64, 0.05), (32, 0.1)):
        for name in ("forward", "input-grad", "weight-grad"):
            floor = 1e3 * 16 * work * share * density / PEAK
            yield f"G3 block {block}x{block} at {1 - density:.0%}, {name}, b16", floor
    for density in (0.1, 0.06, 0.04, 0.02, 0.01):
        yield (
            f"G4 unstructured at {1 - density:.0%}, 512→1024 3x3, b16",
            (1e3 * 16 * work * share / 4 * density / 16.7e12),
        )
    yield "G5 inference, heads in blocks of 64, b1", 1e3 * 24.8e9 / PEAK
    yield "G5 inference, heads in blocks of 64, b16", 1e3 * 16 * 24.8e9 / PEAK
    yield "G6 training step, block 64 at 90 %, b16", 1e3 * 3 * 16 * 221e9 * 0.1 / PEAK


def block_weight(s: Setting, block: int, density: float, seed: int = 0) -> Tensor:
    """[K, C, 3, 3] with that share of its blocks alive, channels_last."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(s.outputs, s.channels, 3, 3, generator=rng) / 50
    keep = torch.rand(s.outputs // block, s.channels // block, 3, 3, generator=rng) < density
    weight *= keep.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return weight.to(s.device, s.dtype, memory_format=torch.channels_last)


def images(s: Setting, batch: int, channels: int, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, s.size, s.size, generator=rng)
    return x.to(s.device, s.dtype, memory_format=torch.channels_last)


def agree(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise unless found is expected within a few roundings: no number on a red gate."""
    scale = expected.float().abs().max().item()
    error = (found.float() - expected.float()).abs().max().item()
    if not error <= 2e-2 * scale + 1e-6:
        raise AssertionError(f"{what} differs from torch by {error:g} of {scale:g}")


def candidates(
    s: Setting, kind: str, grad: bool, call: Callable[[Tile], object], block, dims
) -> dict[str, Callable[[], object]]:
    """One call for each tile that fits, named by it."""
    found: dict[str, Callable[[], object]] = {}
    for tile in tiles_of(s.dtype, grad=grad)[: 1 if s.small else None]:
        fit = fitted(tile, *dims, block)
        name = f"{kind} {fit.pixels}x{fit.dest}x{fit.source}x{fit.panel}"
        found.setdefault(name, lambda fit=fit: call(fit))
    return found


def conv_rows(s: Setting, batch: int, rate: int, weight: Tensor, block: int | None) -> Row:
    """Three passes of one layer: ours by every tile, cuDNN's, and cuDNN's deterministic."""
    g = Geometry((1, 1), (rate, rate), (rate, rate), (3, 3), 1)
    x, grad = images(s, batch, s.channels), images(s, batch, s.outputs, 2)
    blocks = BlockPattern(weight, 1, None if block is None else (block, block))
    square = None if block is None else (block, block)
    dims = (s.outputs, s.channels)

    def dense_grad(needs: tuple[bool, bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, g.stride, g.padding, g.dilation, False, (0, 0), 1,
            (*needs, False),
        )  # fmt: skip

    passes = {
        "forward": (
            lambda: conv2d(x, weight, None, 1, rate, rate),
            lambda t: on_gpu.conv_blocks(x, weight, blocks, g, tile=t),
            False, dims,
        ),
        "input-grad": (
            lambda: dense_grad((True, False))[0],
            lambda t: on_gpu.conv_blocks_input_grad(grad, x, weight, blocks, g, t),
            False, dims[::-1],
        ),
        "weight-grad": (
            lambda: dense_grad((False, True))[1],
            lambda t: on_gpu.conv_blocks_weight_grad(grad, x, weight, blocks, g, t),
            True, dims,
        ),
    }  # fmt: skip
    rows: Row = {}
    for name, (dense, ours, is_grad, sides) in passes.items():
        expected = dense()
        if is_grad and block is not None:
            expected = expected * (weight != 0)
        calls = candidates(s, "ours", is_grad, ours, square, sides)
        agree(next(iter(calls.values()))(), expected, f"{name} at rate {rate}")

        def deterministic(dense=dense) -> object:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True):
                return dense()

        calls |= {"dense cudnn": dense, "deterministic cudnn": deterministic}
        found = times(calls, s.device, s.budget)
        rows[name] = {**found, **_speedup(found)}
    return rows


def _speedup(found: dict) -> Row:
    ours, dense, strict = (best(found, p) for p in ("ours", "dense", "deterministic"))
    row: Row = {}
    if ours and dense:
        row["speedup"] = dense / ours
    if ours and strict:
        row["speedup over deterministic"] = strict / ours
    return row


def g1(s: Setting) -> Iterator[tuple[str, Row]]:
    """threshold_adam against eager soft threshold and torch's fused Adam."""
    from sparsemtl.ops import AdamRule, soft_threshold_component, threshold_adam

    shapes = [(64, 64, 3, 3)] if s.small else [(1024, 512, 3, 3)] * 12 + [(1024, 1024)] * 12
    if not s.small:
        shapes += [(512, 512, 3, 3)] * 5 + [(256, 256, 3, 3)] * 11 + [(128, 128, 3, 3)] * 13
    weights = [torch.randn(shape, device=s.device) * 0.02 for shape in shapes]
    state = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    grads = [torch.randn_like(w) for w in weights]
    alpha, rule = torch.full((1,), 0.02, device=s.device), AdamRule(lr=1e-4, weight_decay=1e-4)
    rules, owners = [rule] * len(weights), [0] * len(weights)
    out = threshold_adam(weights, grads, *state, rules, alpha, owners, dtype=s.dtype, bitmask=True)
    values = soft_threshold_component(weights, alpha)
    for found, expected in zip(out.values, values, strict=True):
        agree(found, expected, "threshold_adam's values")
    leaves = [torch.nn.Parameter(w.clone()) for w in weights]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    fused = torch.optim.Adam(leaves, 1e-4, weight_decay=1e-4, fused=True)

    def eager() -> None:
        fused.step()
        with torch.no_grad():
            for leaf in leaves:
                torch.where(leaf.abs() <= alpha, 0.0, leaf - alpha * leaf.sign()).to(s.dtype)

    calls = {
        "ours": lambda: threshold_adam(
            weights, grads, *state, rules, alpha, owners, dtype=s.dtype, bitmask=True, out=out
        ),
        "dense eager threshold + fused Adam": eager,
    }
    found = times(calls, s.device, s.budget)
    count = sum(w.numel() for w in weights)
    yield f"threshold_adam, {count / 1e6:.1f} M weights", {**found, **_speedup(found)}


def g2(s: Setting) -> Iterator[tuple[str, Row]]:
    """Dense dilated convolutions that skip padding taps, against cuDNN."""
    for batch in s.batches:
        rng = torch.Generator().manual_seed(0)
        weight = torch.randn(s.outputs, s.channels, 3, 3, generator=rng) / 50
        weight = weight.to(s.device, s.dtype, memory_format=torch.channels_last)
        for rate in RATES[: 1 if s.small else None]:
            yield f"dense, rate {rate}, b{batch}", conv_rows(s, batch, rate, weight, None)


def g3(s: Setting) -> Iterator[tuple[str, Row]]:
    """Block-sparse convolutions, three passes."""
    jobs = [(16, 0.5)] if s.small else [(64, 0.1), (64, 0.05), (32, 0.1), (128, 0.1), (64, 0.3)]
    for block, density in jobs:
        weight = block_weight(s, block, density)
        for rate in (6,) if s.small else (6, 18):
            name = f"block {block} at {1 - density:.0%}, rate {rate}, b{s.batches[-1]}"
            yield name, conv_rows(s, s.batches[-1], rate, weight, block)


def g4(s: Setting) -> Iterator[tuple[str, Row]]:
    """Single live weights in CUDA C++, against cuDNN in bfloat16 and in exact float32."""
    from sparsemtl.ops import SPARSE_CONV2D, pack_pattern, sparse_conv2d, use_backend

    backend = "reference" if s.small else "cuda"
    for density in (0.1,) if s.small else (0.1, 0.06, 0.04, 0.02, 0.01):
        rng = torch.Generator().manual_seed(0)
        weight = torch.randn(s.outputs, s.channels, 3, 3, generator=rng) / 50
        weight *= torch.rand(weight.shape, generator=rng) < density
        for rate in (6,) if s.small else (6, 18):
            row: Row = {}
            for dtype in (s.dtype,) if s.small else (torch.bfloat16, torch.float32):
                w = weight.to(s.device, dtype)
                x = images(s, s.batches[-1], s.channels).to(dtype)
                flat = x.contiguous()
                reason = SPARSE_CONV2D.explain(flat, w)[backend]
                if reason is not None:
                    yield "unstructured", {"ours": {"error": reason}}
                    return
                pattern = pack_pattern(w)
                options = {"padding": rate, "dilation": rate}

                def ours(flat=flat, w=w, pattern=pattern, options=options) -> Tensor:
                    with use_backend(backend), torch.no_grad():
                        return sparse_conv2d(flat, w, pattern=pattern, **options)

                def dense(x=x, w=w, rate=rate) -> Tensor:
                    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                        return conv2d(x, w, None, 1, rate, rate)

                agree(ours(), dense(), f"unstructured at {density:.0%}")
                found = times({"ours": ours, "dense cudnn": dense}, s.device, s.budget / 2)
                row[str(dtype)[6:]] = {**found, **_speedup(found)}
            yield f"unstructured at {1 - density:.0%}, rate {rate}, b{s.batches[-1]}", row


def g6(s: Setting) -> Iterator[tuple[str, Row]]:
    """A training step, blocks of 64 at 90 %, against the dense step eager and compiled."""
    from sparsemtl.sparsity.controller import freeze_exactly
    from sparsemtl.sparsity.sparsify import sparsify

    batch, side = (1, 33) if s.small else (16, 321)
    x = torch.randn(batch, 3, side, side, device=s.device).to(memory_format=torch.channels_last)

    def step_of(model: torch.nn.Module, call: torch.nn.Module) -> Callable[[], object]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, 1e-5, fused=s.device.type == "cuda")

        def step() -> None:
            with torch.autocast(s.device.type, torch.bfloat16, enabled=not s.small):
                outputs = call(x)
            sum(y.float().square().mean() for y in outputs.values()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    dense = _network(s)
    calls = {"dense eager": step_of(dense, dense)}
    if not s.small:
        calls["dense compiled"] = step_of(dense, torch.compile(dense))
    for target in (0.9, 0.5) if not s.small else (0.9,):
        sparse = _network(s)
        sparsify(sparse, structure="block(16,16)" if s.small else "block(64,64)")
        freeze_exactly(sparse.sparsity, target)
        sparse.sparsity.sparse_kernels = True
        calls[f"ours at {target:.0%}"] = step_of(sparse, sparse)
    found = times(calls, s.device, 10 * s.budget)
    row: Row = {**found, **_speedup(found)}
    if "ours at 50%" in found and best(found, "dense"):
        row["speedup at 50%"] = best(found, "dense") / found["ours at 50%"]["ms"]
    yield f"training step, {side}x{side}, b{batch}", row


def g5(s: Setting) -> Iterator[tuple[str, Row]]:
    """Inference with heads in blocks of 64, the backbone dense, eager and as a CUDA graph."""
    from sparsemtl.sparsity.controller import freeze_exactly
    from sparsemtl.sparsity.sparsify import sparsify

    for batch in s.batches:
        side = 33 if s.small else 321
        x = torch.randn(batch, 3, side, side, device=s.device, dtype=s.dtype)
        x = x.to(memory_format=torch.channels_last)
        dense = _network(s).eval().to(s.dtype)
        sparse = _network(s).eval()
        heads = {f"head:{name}": head for name, head in sparse.heads.items()}
        sparsify(sparse, heads, structure="block(16,16)" if s.small else "block(64,64)")
        freeze_exactly(sparse.sparsity, 0.96)
        sparse.to(s.dtype)
        sparse.sparsity.sparse_kernels = True
        with torch.inference_mode():
            calls = {"dense eager": lambda m=dense, x=x: m(x)}
            calls["ours eager"] = lambda m=sparse, x=x: m(x)
            if not s.small:
                compiled = torch.compile(dense)
                calls["dense compiled"] = lambda m=compiled, x=x: m(x)
                sparse(x)
                calls["dense graph"] = graphed(calls["dense eager"])
                calls["ours graph"] = graphed(calls["ours eager"])
            found = times(calls, s.device, 3 * s.budget)
        yield f"inference, heads at 96 %, {side}x{side}, b{batch}", {**found, **_speedup(found)}


def _network(s: Setting) -> torch.nn.Module:
    from sparsemtl.models.config import ModelConfig, build_model

    torch.manual_seed(0)
    width = 0.125 if s.small else 1.0
    model = build_model(
        ModelConfig("deeplab-resnet34", width=width), {"segmentation": 40, "normals": 3, "depth": 1}
    )
    return model.to(s.device, memory_format=torch.channels_last)


def roofs(s: Setting) -> Iterator[tuple[str, Row]]:
    """What this GPU does at best: copy, and a bfloat16 product."""
    n = 64 if s.small else 8192
    a = torch.randn(n, n, device=s.device, dtype=s.dtype)
    b, c = torch.randn_like(a), torch.empty_like(a)
    big = torch.empty((1 << 10) if s.small else (1 << 28), device=s.device)
    other = torch.empty_like(big)
    found = times(
        {"copy": lambda: other.copy_(big), "product": lambda: torch.mm(a, b, out=c)},
        s.device, s.budget,
    )  # fmt: skip
    yield (
        "roofs",
        {
            **found,
            "copy TB/s": 2 * big.nbytes / found["copy"]["ms"] / 1e9,
            "product TFLOP/s": 2 * n**3 / found["product"]["ms"] / 1e9,
        },
    )


SECTIONS: dict[str, Callable[[Setting], Iterator[tuple[str, Row]]]] = {
    "roofs": roofs, "G1": g1, "G2": g2, "G3": g3, "G6": g6, "G4": g4, "G5": g5,
    "engine": lambda s: engine_rows(s.device, s.small, 3 * s.budget),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the code out")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    setting = Setting(args.device, args.small)
    rows: Row = {}
    for name, row in SECTIONS[args.section](setting):
        rows[name] = row
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        Path(args.out).write_text(text)
        print(f"{args.section}: {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
