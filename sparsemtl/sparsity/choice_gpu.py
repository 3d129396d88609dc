"""Which kernel computes each pass of a convolution on a GPU: whichever was measured faster there.

candidates_gpu.py holds the candidates: cuDNN's dense convolution, the dense one that skips padding
taps, the block-sparse one, the one over single weights, and 2:4 tensors. A layer is measured once
for each density bucket, on the tensors at hand; choices are kept where those of the CPU are
(choice.py), so a resumed run decides as before. `SPARSEMTL_AUTOTUNE=0` leaves one tile of each.

Where a weight gradient is computed by our kernels and the threshold still moves, its epilogue goes
on to the gradients of W and α, and the threshold's own backward pass is not run for that layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsemtl.ops.dispatch import requested_backend, through_torch
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_triton import why_not_geometry, why_not_here
from sparsemtl.sparsity.candidates_gpu import (
    PASSES,
    GpuLayer,
    capturing,
    names_of,
    options_of,
    run_forward,
    run_input_grad,
    run_threshold_grad,
    run_weight_grad,
)
from sparsemtl.sparsity.choice import (
    BUDGET,
    CHOICES,
    MARGIN,
    ROUNDS,
    density_bucket,
    layer_key,
)
from sparsemtl.sparsity.passes import DENSE, PassChoice, dense_forward
from sparsemtl.timing import interleave

log = logging.getLogger(__name__)

EVERY = 100  # forward passes after which an open mask's density is looked at again
Through = tuple[Tensor, Tensor]  # W in float32, and α, of which a weight is S(W, α)


def why_not_on_gpu(x: Tensor, weight: Tensor, g: Geometry) -> str | None:
    """Why a layer cannot use these kernels; None if it can."""
    if x.dim() != 4 or through_torch(x):
        return "x is not a plain batch of images"
    if requested_backend() not in (None, "triton"):
        return f"the backend {requested_backend()!r} was asked for"
    return why_not_here(x, weight) or why_not_geometry(x, g)


def convolve(
    layer: GpuLayer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    through: Through | None = None,
    stamp: object = None,
) -> Tensor:
    """The convolution with the effective weight, each pass by the kernel that was measured best.

    through: what the weight is the threshold's value of; None where no gradient goes there
    stamp:   equal for equal weights, for what is packed once; None where nothing is known
    """
    layer.stamp = stamp
    if not capturing(x) and (layer.picked is None or (not layer.fixed and layer.since >= EVERY)):
        layer.picked, layer.since = _choose(layer, x, weight, bias, g), 0
    layer.since += 1
    picked = layer.picked
    if picked is None or not picked.any:
        return dense_forward(x, weight, bias, g)
    if layer.blocks is not None and not layer.fixed and any("block" in n for n in names_of(picked)):
        layer.blocks.follow(weight)  # a block may have come back to life
    fused = through is not None and layer.carries_threshold(str(picked.weight_grad or ""))
    if through is not None and fused and torch.is_grad_enabled():
        y: Tensor = _Chosen.apply(x, weight.detach(), bias, g, layer, picked, *through)
    else:
        y = _Chosen.apply(x, weight, bias, g, layer, picked, None, None)
    return y


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: Geometry,
        layer: GpuLayer,
        picked: PassChoice,
        master: Tensor | None,
        alpha: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, master, alpha)
        ctx.g, ctx.layer, ctx.picked = g, layer, picked
        return run_forward(layer, str(picked.forward or ""), x, weight, bias, g)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, master, alpha = ctx.saved_tensors
        layer, picked, g = ctx.layer, ctx.picked, ctx.g
        needs = ctx.needs_input_grad
        grad_x = grad_weight = grad_master = grad_alpha = None
        if needs[0]:
            name = str(picked.input_grad or "")
            grad_x = run_input_grad(layer, name, grad, x, weight, g)
        name = str(picked.weight_grad or "")
        if needs[1]:
            grad_weight = run_weight_grad(layer, name, grad, x, weight, g)
        if needs[6] or needs[7]:
            through = (master, alpha)
            grad_master, grad_alpha = run_threshold_grad(layer, name, grad, x, weight, g, through)
        grad_bias = grad.sum((0, 2, 3)) if needs[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, grad_master, grad_alpha


def _choose(
    layer: GpuLayer, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry
) -> PassChoice:
    layer.options = options_of(layer, x, weight, g)
    density = 1.0
    if layer.single is not None:
        density = layer.single.nonzeros / max(1, weight.numel())
    elif layer.blocks is not None:
        if not layer.fixed:
            layer.blocks.follow(weight)
        rows, columns = layer.blocks.block or (1, 1)
        density = float(layer.blocks.occupied(rows, columns).float().mean())
    bucket = density_bucket(density)
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else "interpreter"
    shape = layer_key(x, weight, g, -1 if bucket is None else bucket, layer.fixed)
    # Above the buckets one measurement serves all: there the blocks hardly matter.
    level = "any density" if bucket is None else ""
    kind = "single" if layer.single is not None else "pair" if layer.pairs is not None else ""
    key = f"{device} {x.dtype} {layer.blocks and layer.blocks.block} {kind}{level} {shape}"
    known = CHOICES.find(key)
    if known is not None and all(n in layer.options for n in names_of(known)):
        return known
    return CHOICES.keep(key, measure(layer, x, weight, bias, g))


def measure(
    layer: GpuLayer, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry
) -> PassChoice:
    """Time every candidate of the passes that will run, on these very tensors."""
    training, x_needs_grad = torch.is_grad_enabled(), x.requires_grad
    x, weight = x.detach(), weight.detach()
    if training:
        layer.stamp = None  # a weight that each step changes is packed each time
    shift = None if bias is None else bias.detach()
    picked: dict[str, str] = {}
    with torch.no_grad():
        y = dense_forward(x, weight, shift, g)
        grad = torch.ones_like(y, memory_format=torch.preserve_format)
        refresh = 0.0
        if layer.blocks is not None and not layer.fixed:
            calls: dict[str, Callable[[], object]] = {"": partial(layer.blocks.follow, weight)}
            refresh = interleave(calls, ROUNDS, 1, x.device, BUDGET)[""].best
        for name in PASSES:
            if name != "forward" and not (training and (name == "weight_grad" or x_needs_grad)):
                continue
            calls = {"": _call(layer, name, "", x, weight, shift, grad, g)}
            for option in layer.options:
                if name in option:
                    call = _call(layer, name, option, x, weight, shift, grad, g)
                    if _runs(option, call):
                        calls[option] = call
            seconds = {n: t.best for n, t in interleave(calls, ROUNDS, 1, x.device, BUDGET).items()}
            # Lists of a mask that still moves are made anew each step, for all passes together.
            cost = {n: s + (refresh if n.startswith("block") else 0.0) for n, s in seconds.items()}
            best = min(cost, key=lambda n: cost[n])
            if cost[best] < MARGIN * seconds[""]:
                picked[name] = best
    return PassChoice(**picked) if picked else DENSE


def _runs(option: str, call: Callable[[], object]) -> bool:
    """Whether a candidate runs at all; one that does not is no reason to stop."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        log.warning("%s is left out: %s", option, error)
        return False
    return True


def _call(
    layer: GpuLayer,
    name: str,
    option: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    g: Geometry,
) -> Callable[[], object]:
    if name == "input_grad":
        return partial(run_input_grad, layer, option, grad, x, weight, g)
    if name == "weight_grad":
        return partial(run_weight_grad, layer, option, grad, x, weight, g)
    return partial(run_forward, layer, option, x, weight, bias, g)
