"""Every op on the device against torch in float64: the gate of `make gpu`, without pytest.

    python -m bench.gpu_gate [--device cuda] [--cuda-only]

--cuda-only runs the CUDA C++ kernels alone, once each, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from sparsemtl.ops import (
    GROUP_THRESHOLD,
    SOFT_THRESHOLD,
    SPARSE_CONV2D,
    THRESHOLD_ADAM,
    AdamRule,
    group_threshold_component,
    soft_threshold_component,
    sparse_conv2d,
    threshold_adam,
    use_backend,
)
from sparsemtl.ops import sparse_conv2d_triton as on_gpu
from sparsemtl.ops.availability import INTERPRETING, why_not_triton
from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.group_threshold import group_threshold_reference
from sparsemtl.ops.soft_threshold import soft_threshold_reference
from sparsemtl.ops.sparse_conv2d_grouped import conv_branches
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_tiles import default_tile
from sparsemtl.ops.tiles import Tile

RELATIVE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # tf32 in the first
Check = tuple[str, Tensor, Tensor]


def dtypes() -> list[torch.dtype]:
    return [torch.float32, torch.float16, *([] if INTERPRETING else [torch.bfloat16])]


def random(shape, device, dtype, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def thresholds(device: torch.device, backends: tuple[str, ...]) -> Iterator[Check]:
    """Values and gradients of a component, elements and blocks."""
    tile = Tile(16, 16)
    for dtype in dtypes():
        weights = [random(s, device, dtype) for s in ((33, 20, 3, 3), (7,), (1030,))]
        shaped = weights[:1]
        alpha = torch.tensor(0.7, device=device)
        for backend in backends:
            for op, call, reference, given in (
                (SOFT_THRESHOLD, soft_threshold_component, soft_threshold_reference, weights),
                (
                    GROUP_THRESHOLD,
                    lambda w, a: group_threshold_component(w, a, tile),
                    lambda w, a: group_threshold_reference(w, a, tile),
                    shaped,
                ),
            ):
                arguments = (given, alpha) if op is SOFT_THRESHOLD else (given, alpha, tile)
                if op.explain(*arguments).get(backend, "absent") is not None:
                    continue
                leaves = [w.clone().requires_grad_() for w in given]
                a = alpha.clone().requires_grad_()
                with use_backend(backend):
                    values = call(leaves, a)
                found = torch.autograd.grad([v.sum() for v in values], [*leaves, a])
                wide = [w.double().requires_grad_() for w in given]
                b = alpha.double().requires_grad_()
                expected = [reference(w, b) for w in wide]
                grads = torch.autograd.grad([v.sum() for v in expected], [*wide, b])
                for f, e in zip((*values, *found), (*expected, *grads), strict=True):
                    yield f"{op.name} on {backend}, {dtype}", f, e


def adam(device: torch.device, backends: tuple[str, ...]) -> Iterator[Check]:
    """A step of threshold_adam by each backend against its reference."""
    rule = AdamRule(lr=0.01, weight_decay=0.1)
    for backend in backends:
        states = []
        for name in (backend, "reference"):
            state = [[random((40, 33), device, torch.float32, i)] for i in range(2)]
            state += [[torch.zeros_like(state[0][0])] for _ in range(2)]
            arguments = (*state, [rule], torch.full((1,), 0.5, device=device), [0])
            if name == backend and THRESHOLD_ADAM.explain(*arguments).get(name, "") is not None:
                break
            with use_backend(name):
                out = threshold_adam(*arguments, bitmask=True)
            states.append([*state[0], *state[2], *state[3], *out.values, out.nonzeros])
            assert out.bitmasks is not None
            states[-1] += out.bitmasks
        if len(states) == 2:
            for f, e in zip(*states, strict=True):
                yield f"threshold_adam on {backend}", f, e


def convolutions(device: torch.device) -> Iterator[Check]:
    """Three passes for each type, dense and in blocks, at a small and a large rate."""
    size, channels = (7, 32) if INTERPRETING else (41, 128)
    for dtype in dtypes():
        for rate in (1, 6) if INTERPRETING else (1, 18):
            g = Geometry((1, 1), (rate, rate), (rate, rate), (3, 3), 1)
            x = random((2, channels, size, size), device, dtype)
            weight = random((2 * channels, channels, 3, 3), device, dtype, 1) / 8
            weight[:channels, : channels // 2] = 0.0
            grad = random((2, 2 * channels, size, size), device, dtype, 2)
            wide = [x.double().requires_grad_(), weight.double().requires_grad_()]
            y = conv2d(*wide, None, 1, rate, rate)
            grads = torch.autograd.grad(y, wide, grad.double())
            for side in sorted({0, 16, min(32, channels // 2), channels // 2}):
                block = None if side == 0 else (side, side)
                blocks = BlockPattern(weight, 1, block)
                name = f"sparse_conv2d, {dtype}, rate {rate}, blocks {block}"
                yield f"{name}, forward", on_gpu.conv_blocks(x, weight, blocks, g), y
                found = on_gpu.conv_blocks_input_grad(grad, x, weight, blocks, g)
                yield f"{name}, input-grad", found, grads[0]
                found = on_gpu.conv_blocks_weight_grad(grad, x, weight, blocks, g)
                alive = 1.0 if block is None else weight != 0
                yield f"{name}, weight-grad", found, grads[1] * alive
            many = [BlockPattern(weight, 1, (16, 16)) for _ in range(3)]
            for found in conv_branches([x] * 3, [weight] * 3, many, [g] * 3):
                yield f"sparse_conv2d, {dtype}, rate {rate}, grouped", found, y


def unstructured(device: torch.device) -> Iterator[Check]:
    """The CUDA C++ convolution with single live weights, forward and backward."""
    rng = torch.Generator().manual_seed(0)
    for dtype in dtypes():
        x = random((2, 70, 19, 19), device, dtype)
        weight = random((130, 70, 3, 3), device, dtype, 1)
        weight *= (torch.rand(weight.shape, generator=rng) < 0.05).to(device)
        bias = random((130,), device, dtype, 3)
        if SPARSE_CONV2D.explain(x, weight)["cuda"] is not None:
            return
        for options in ({"padding": 6, "dilation": 6}, {"padding": 1, "stride": 2}):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            wide = [t.double().requires_grad_() for t in (x, weight, bias)]
            with use_backend("cuda"):
                y = sparse_conv2d(*leaves, **options)
            expected = conv2d(*wide, **options)
            grad = random(y.shape, device, dtype, 2)
            found = torch.autograd.grad(y, leaves, grad)
            grads = list(torch.autograd.grad(expected, wide, grad.double()))
            grads[1] = grads[1] * (weight != 0)
            name = f"sparse_conv2d on cuda, {dtype}, {options}"
            for f, e in zip((y, *found), (expected, *grads), strict=True):
                yield name, f, e


def whole(check: Iterator[Check]) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """The results of a check; where it fails, its traceback in place of those that are left."""
    try:
        yield from check
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
            ValueError):  # fmt: skip
        yield traceback.format_exc(), None, torch.zeros(0)


def fused(device: torch.device) -> Iterator[Check]:
    """Weight gradients that go on through a threshold of single weights, and of blocks."""
    block = (16, 16) if INTERPRETING else (64, 64)
    side = 2 * block[0]
    g = Geometry((1, 1), (2, 2), (2, 2), (3, 3), 1)
    for dtype in dtypes():
        x = random((2, side, 9, 9), device, dtype)
        grad = random((2, side, 9, 9), device, dtype, 2)
        master = random((side, side, 3, 3), device, torch.float32, 1)
        master[: block[0], : block[1]] *= 0.1
        for name, tile in (("elements", None), ("blocks", Tile(*block))):
            alpha = torch.tensor(0.5, device=device)
            wide = [master.double().requires_grad_(), alpha.double().requires_grad_()]
            values = soft_threshold_reference(*wide)
            if tile is not None:
                values = group_threshold_reference(*wide, tile)
            y = conv2d(x.double(), values, None, 1, 2, 2)
            expected = torch.autograd.grad(y, wide, grad.double())
            weight = values.detach().to(dtype)
            blocks = BlockPattern(weight, 1, tile)
            cut = default_tile(weight, blocks, g, grad=True)
            if tile is not None and not on_gpu.fits_groups(cut, block):
                continue
            found = on_gpu.conv_blocks_weight_grad(
                grad, x, weight, blocks, g, cut, (master, alpha), tile is not None
            )
            for part, f, e in zip(("W", "α"), found, expected, strict=True):
                yield f"sparse_conv2d, {dtype}, gradient of {part} through {name}", f.to(dtype), e


def pairs(device: torch.device) -> Iterator[Check]:
    """1x1 convolutions of 2:4 weights through torch's tensors."""
    from sparsemtl.ops.semi_structured import (
        SemiStructured,
        semi_structured_conv,
        why_not_semi_structured,
    )
    from sparsemtl.sparsity.structure import n_of_m_mask

    g = Geometry((1, 1), (0, 0), (1, 1), (1, 1), 1)
    for dtype in (torch.bfloat16, torch.float16):
        x, weight = (random(s, device, dtype, 5) for s in ((2, 128, 9, 9), (64, 128, 1, 1)))
        weight = weight * n_of_m_mask(weight.abs(), 2, 4)
        reason = why_not_semi_structured(x, weight, g)
        if reason is not None:
            print(f"gpu_gate: 2:4 tensors are not used: {reason}")
            return
        bias = random((64,), device, dtype, 6)
        y = semi_structured_conv(x, SemiStructured().follow(weight, None), bias)
        yield f"2:4, {dtype}", y, conv2d(x.double(), weight.double(), bias.double())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cuda-only", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    backends = ("cuda",) if args.cuda_only else ("triton", "cuda")
    checks = [thresholds(device, backends), adam(device, backends), unstructured(device)]
    reason = why_not_triton(torch.empty(1, device=device))
    if reason is not None:
        print(f"gpu_gate: Triton is not used: {reason}")
    elif not args.cuda_only:
        checks += [convolutions(device), fused(device), pairs(device)]
    count, wrong = 0, 0
    for check in checks:
        for name, found, expected in whole(check):
            count += 1
            if found is None:
                wrong += 1
                print(f"gpu_gate: {name}")
                continue
            scale = expected.double().abs().max().item() if expected.numel() else 0.0
            difference = (found.double() - expected.double()).abs()
            error = difference.max().item() if difference.numel() else 0.0
            if not error <= RELATIVE.get(found.dtype, 0.0) * max(scale, 1e-6):
                wrong += 1
                print(f"gpu_gate: {name} is off by {error:g} of {scale:g}")
    print(f"gpu_gate: {count} results compared, {wrong} wrong")
    return 1 if wrong or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
