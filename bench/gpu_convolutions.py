"""G2, G3 and G4 of `make gpu`: single convolutions against cuDNN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bench.gpu_common import RATES, Jobs, Row, Setting, agree, speedup
from bench.gpu_timing import graphed, times
from sparsemtl.ops import sparse_conv2d_triton as on_gpu
from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_tiles import Tile, fitted, tiles_of


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
        if batch == 1 and s.device.type == "cuda":  # small: launches count, so graphs of both too
            calls |= {f"{n} graph": partial(_graph_once, call, {}) for n, call in [*calls.items()]}
        if name == "forward" and rate in (RATES[0], RATES[-1]) and block is None and not s.small:
            compiled = torch.compile(conv2d, dynamic=False)
            calls["dense compiled"] = partial(compiled, x, weight, None, 1, rate, rate)
        found = times(calls, s.device, s.budget)
        rows[name] = {**found, **speedup(found)}
    return rows


def _graph_once(call: Callable[[], object], kept: dict[str, Callable[[], object]]) -> object:
    """Replay the call's graph, made when it is first called."""
    if "graph" not in kept:
        kept["graph"] = graphed(call)
    return kept["graph"]()


def g2(s: Setting) -> Jobs:
    """Dense dilated convolutions that skip padding taps, against cuDNN."""
    for batch in s.batches:
        rng = torch.Generator().manual_seed(0)
        weight = torch.randn(s.outputs, s.channels, 3, 3, generator=rng) / 50
        weight = weight.to(s.device, s.dtype, memory_format=torch.channels_last)
        for rate in RATES[: 1 if s.small else None]:
            job = partial(conv_rows, s, batch, rate, weight, None)
            yield f"dense, rate {rate}, b{batch}", job


def g3(s: Setting) -> Jobs:
    """Block-sparse convolutions, three passes."""
    jobs = [(16, 0.5)] if s.small else [(64, 0.1), (64, 0.05), (32, 0.1), (128, 0.1), (64, 0.3)]
    for block, density in jobs:
        weight = block_weight(s, block, density)
        for rate in (6,) if s.small else (6, 18):
            name = f"block {block} at {1 - density:.0%}, rate {rate}, b{s.batches[-1]}"
            yield name, partial(conv_rows, s, s.batches[-1], rate, weight, block)


def g4(s: Setting) -> Jobs:
    """Single live weights in CUDA C++, against cuDNN in bfloat16 and in exact float32."""
    for density in (0.1,) if s.small else (0.1, 0.06, 0.04, 0.02, 0.01):
        for rate in (6,) if s.small else (6, 18):
            name = f"unstructured at {1 - density:.0%}, rate {rate}, b{s.batches[-1]}"
            yield name, partial(single_rows, s, density, rate)


def single_rows(s: Setting, density: float, rate: int) -> Row:
    """Forward pass and input gradient of a weight of which that share is alive."""
    from sparsemtl.ops import SPARSE_CONV2D, pack_pattern, use_backend

    backend = "reference" if s.small else "cuda"
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(s.outputs, s.channels, 3, 3, generator=rng) / 50
    weight *= torch.rand(weight.shape, generator=rng) < density
    g = Geometry((1, 1), (rate, rate), (rate, rate), (3, 3), 1)
    row: Row = {}
    for dtype in (s.dtype,) if s.small else (torch.bfloat16, torch.float32):
        w = weight.to(s.device, dtype)
        x = images(s, s.batches[-1], s.channels).to(dtype)
        grad = images(s, s.batches[-1], s.outputs, 2).to(dtype)
        flat, flat_grad = x.contiguous(), grad.contiguous()
        reason = SPARSE_CONV2D.explain(flat, w)[backend]
        if reason is not None:
            return {"ours": {"error": reason}}
        pattern = pack_pattern(w)
        with use_backend(backend):
            chosen = SPARSE_CONV2D.choose(flat, w)

        def dense(x=x, w=w) -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                return conv2d(x, w, None, 1, rate, rate)

        def dense_grad(x=x, w=w, grad=grad) -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                return torch.ops.aten.convolution_backward(
                    grad, x, w, None, g.stride, g.padding, g.dilation, False, (0, 0), 1,
                    (True, False, False),
                )[0]  # fmt: skip

        ours = partial(chosen.forward, flat, w, pattern, g, None, None, None)
        back = partial(chosen.backward, flat_grad, flat, w, pattern, g, (True, False))
        pairs = {"forward": (ours, dense), "input-grad": (lambda back=back: back()[0], dense_grad)}
        for name, (mine, theirs) in pairs.items():
            agree(mine(), theirs(), f"unstructured at {density:.0%}, {name}")
            found = times({"ours": mine, "dense cudnn": theirs}, s.device, s.budget / 2)
            row[f"{str(dtype)[6:]} {name}"] = {**found, **speedup(found)}
    return row
