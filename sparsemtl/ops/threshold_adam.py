"""One step of Adam on many weights and S(W, α) of what it leaves, in one pass over memory.

With g the gradient, λ the weight decay and t the number of the step, in this order:

    coupled:    g ← g + λ W           decoupled:  W ← (1 − lr λ) W
    m ← m + (1 − β₁)(g − m)           v ← β₂ v + (1 − β₂) g²
    W ← W − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
    S = sign(W) max(|W| − α, 0)       B = not (|W| ≤ α)

The kernels multiply √v + ε √(1 − β₂ᵗ) and lr √(1 − β₂ᵗ) instead, which saves a division and moves
W by at most a few roundings of the step. S and B are those of `soft_threshold` for the W that is
stored, bit for bit. α is an argument: whoever learns it updates it before.

Sources: Kingma and Ba, 2015; Loshchilov and Hutter, 2019 (decoupled); docs of torch.optim.Adam.

P: number of weights of one tensor. n: number of tensors. G: number of thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemtl.ops import threshold_adam_backends as backends
from sparsemtl.ops.dispatch import Backend, Op, in_functorch, through_torch
from sparsemtl.ops.group_threshold import group_norms, group_threshold_reference
from sparsemtl.ops.soft_threshold import (
    SOFT_THRESHOLD,
    ThresholdStats,
    _SoftThreshold,
    soft_threshold_component,
    soft_threshold_reference,
)
from sparsemtl.ops.soft_threshold_backends import count_reference
from sparsemtl.ops.threshold_adam_checks import (
    check_alpha,
    check_groups,
    check_out,
    check_state,
)
from sparsemtl.ops.tiles import Tile, grid, tile_sizes


@dataclass(frozen=True)
class AdamRule:
    """The numbers of one step, shared by the tensors that have them in common.

    raises: ValueError for a number out of its range
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False  # weight decay on the weight (AdamW) rather than on the gradient
    step: int = 1  # from 1, for the bias corrections

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"AdamRule: Expected {name} ≥ 0, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"AdamRule: Expected two betas in [0, 1), got {self.betas}")
        if self.step < 1:
            raise ValueError(f"AdamRule: Expected step ≥ 1, got {self.step}")

    @property
    def corrections(self) -> tuple[float, float]:
        """1 − β₁ᵗ and √(1 − β₂ᵗ)."""
        first, second = self.betas
        return 1.0 - first**self.step, (1.0 - second**self.step) ** 0.5


def threshold_adam(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    rules: Sequence[AdamRule],
    alpha: Tensor | None = None,
    owners: Sequence[int] = (),
    *,
    dtype: torch.dtype | None = None,
    bitmask: bool = False,
    out: ThresholdStats | None = None,
    tile: Tile | tuple[int, int] | None = None,
) -> ThresholdStats:
    """Step every weight by Adam, in place, and return S of the new weights; without autograd.

    weights: n different tensors of any shape, of one floating type, on one device; changed
    grads:   n tensors shaped like the weights, strided
    means:   n running means m like the weights; changed     squares: as means, for v
    rules:   n, what each tensor's step is made of
    alpha:   [G] ≥ 0 on the weights' device; None: Adam alone, and the result is empty
    owners:  n indices into alpha, which threshold shrinks each tensor
    dtype:   type of the values; None: the weights'
    bitmask: whether to return one bit per weight as well
    out:     an earlier result for the same weights, to be overwritten and returned
    tile:    groups that live or die together: S is that of `group_threshold`, and the result
             holds their norms; not together with bitmask
    returns: the new S(W), as `soft_threshold_stats` gives them
    raises:  TypeError, ValueError for other arguments; BackendUnavailable
    """
    state = [list(given) for given in (weights, grads, means, squares)]
    rules, owners = list(rules), list(owners)
    for rule in rules:
        if not isinstance(rule, AdamRule):
            raise TypeError(
                f"threshold_adam: Expected rules of AdamRule, got {type(rule).__name__}"
            )
    check_state(state, len(rules))
    check_alpha(state[0], alpha, owners)
    tile = None if tile is None else Tile(*tile)
    check_groups(tile, alpha, bitmask)
    if alpha is None or not state[0]:
        out = _empty_result(state[0])
    elif out is None:
        out = _outputs(state[0], dtype, bitmask, tile)
    else:
        check_out(state[0], out, dtype, bitmask, tile)
    with torch.no_grad():
        chosen = THRESHOLD_ADAM.choose(*state, rules, alpha, owners, out, tile)
        chosen.forward(*state, rules, alpha, owners, out, tile)
    return out


@torch.no_grad()
def threshold_adam_reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    rules: Sequence[AdamRule],
    alpha: Tensor | None = None,
    owners: Sequence[int] = (),
    *,
    dtype: torch.dtype | None = None,
    bitmask: bool = False,
    out: ThresholdStats | None = None,
    tile: Tile | None = None,
) -> ThresholdStats:
    """The meaning of threshold_adam: torch's own sequence, any float type, device and layout."""
    for weight, grad, mean, square, rule in zip(weights, grads, means, squares, rules, strict=True):
        _adam_reference(weight, grad.to(weight.dtype), mean, square, rule)
    if alpha is None or not weights:
        return _empty_result(weights)
    out = _outputs(list(weights), dtype, bitmask, tile) if out is None else out
    for i, (weight, owner) in enumerate(zip(weights, owners, strict=True)):
        if tile is not None:
            assert out.norms is not None
            value = group_threshold_reference(weight, alpha[owner], tile)
            norm = group_norms([weight], tile)[0]
            out.values[i].copy_(value)
            out.norms[i].copy_(norm)
            sizes = tile_sizes(weight.shape, tile).to(weight.device)
            dead = norm / sizes.to(norm.dtype).sqrt() <= alpha[owner].to(norm.dtype)
            out.nonzeros[i] = (sizes * ~dead).sum()
            continue
        out.values[i].copy_(soft_threshold_reference(weight, alpha[owner]))
        counts, masks = count_reference([weight], alpha[owner], out.bitmasks is not None)
        out.nonzeros[i] = counts[0]
        if out.bitmasks is not None and masks is not None:
            out.bitmasks[i].copy_(masks[0])
    return out


def _adam_reference(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, rule: AdamRule
) -> None:
    first, second = rule.betas
    mean_correction, root_correction = rule.corrections
    if rule.decoupled:
        weight.mul_(1.0 - rule.lr * rule.weight_decay)
    elif rule.weight_decay != 0.0:  # 0 · inf would be NaN
        grad = grad.add(weight, alpha=rule.weight_decay)
    mean.lerp_(grad, 1.0 - first)
    square.mul_(second).addcmul_(grad, grad, value=1.0 - second)
    divisor = (square.sqrt() / root_correction).add_(rule.eps)
    weight.addcdiv_(mean, divisor, value=-rule.lr / mean_correction)


def ready_values(
    weights: Sequence[Tensor], alpha: Tensor, values: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """S(W, α) that is already known, differentiable as `soft_threshold_component` makes it.

    weights: n tensors   alpha: one value
    values:  n tensors, what `threshold_adam` wrote for these very weights and this alpha
    returns: the values, sharing their memory; where torch must see the computation, computed anew
    """
    if in_functorch() or through_torch(alpha, *weights):
        return soft_threshold_component(weights, alpha)
    if torch.is_grad_enabled() and (alpha.requires_grad or any(w.requires_grad for w in weights)):
        return _Ready.apply(alpha, list(values), *weights)
    return tuple(value.detach() for value in values)


class _Ready(_SoftThreshold):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, values: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(alpha, *weights)
        ctx.backend = SOFT_THRESHOLD.choose(weights, alpha)  # of the backward pass
        return tuple([value.detach() for value in values])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _SoftThreshold.backward(ctx, *grads)


def threshold_adam_bytes(weights: Sequence[Tensor], dtype: torch.dtype | None = None) -> int:
    """Memory traffic: W, g, m and v read, W, m and v written, S written, one bit per weight.

    An elementwise op has no multiply-adds to count; bytes are what bounds it.
    """
    total = 0
    for weight in weights:
        value = (dtype or weight.dtype).itemsize
        total += weight.numel() * (7 * weight.element_size() + value) + -(-weight.numel() // 8)
    return total


def _outputs(
    weights: list[Tensor], dtype: torch.dtype | None, bitmask: bool, tile: Tile | None
) -> ThresholdStats:
    device = weights[0].device
    values = tuple(torch.empty_like(weight, dtype=dtype) for weight in weights)
    counts = torch.empty(len(weights), dtype=torch.int64, device=device)
    if tile is not None:
        norms = [
            torch.empty(grid(w.shape, tile), dtype=torch.float32, device=device) for w in weights
        ]
        return ThresholdStats(values, counts, None, tuple(norms))
    if not bitmask:
        return ThresholdStats(values, counts, None)
    masks = [torch.empty(-(-w.numel() // 8), dtype=torch.uint8, device=device) for w in weights]
    return ThresholdStats(values, counts, tuple(masks))


def _empty_result(weights: Sequence[Tensor]) -> ThresholdStats:
    device = weights[0].device if weights else None
    return ThresholdStats((), torch.empty(0, dtype=torch.int64, device=device), None)


def _reference(*args: Any) -> None:
    *given, out, tile = args
    threshold_adam_reference(*given, out=out, tile=tile)


THRESHOLD_ADAM = Op(
    "threshold_adam",
    (
        Backend("triton", backends.triton, None, backends.why_not_triton_here),
        Backend("cuda", backends.cuda, None, backends.why_not_cuda_here),
        Backend("native", backends.native, None, backends.why_not_native_here),
        Backend("reference", _reference, None, lambda *_: None),
    ),
)
