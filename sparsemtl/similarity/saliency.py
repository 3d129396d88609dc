"""SNIP-style saliency of one task on a fresh network: how much each backbone weight matters to it.

A weight's score is Σ_batches |∂L/∂m| at mask m = 1, which is |w · ∂L/∂w|, over the backbone and
the task's own head. Source: SNIP (Lee et al., 2019) as DiSparse and Meta-Sparse use it: unweighted
single-task loss, several batches, train mode, weights drawn anew for scoring only.

Gradients are folded into the scores layer by layer while the backward pass runs, so a whole
gradient never exists; a head's scores live only until the cuts are known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.errors import unknown_choice
from sparsemtl.models.component import BACKBONE, ComponentMap, find_components, head_name
from sparsemtl.similarity.masks import Cut, cut_masks, find_cut, kept_count
from sparsemtl.training.state import check_outputs, to_device

INITS = ("xavier", "own")


@dataclass(frozen=True)
class Saliency:
    """One task's scores over the backbone.

    scores: layer name → float32 of the weight's shape, in module order; divide by `total` for
            scores that sum to 1 over the backbone and the task's head
    total:  sum of all scores, the head's included
    numel:  number of scored weights, the head's included
    cuts:   keep ratio → the cut that keeps that part of all scored weights
    """

    task: str
    scores: dict[str, Tensor]
    total: float
    numel: int
    cuts: dict[float, Cut]

    def masks(self, keep: float) -> dict[str, Tensor]:
        """Layer name → bool mask of the task's dominant sub-network in the backbone."""
        layers = list(self.scores.values())
        return dict(zip(self.scores, cut_masks(layers, self.cuts[keep]), strict=True))


def saliency(
    network: nn.Module,
    task: Any,
    batches: Iterable[Any],
    keep_ratios: Sequence[float] = (0.1,),
    *,
    components: ComponentMap | None = None,
    seed: int = 0,
    init: str = "xavier",
    in_place: bool = False,
) -> Saliency:
    """Score the backbone of a network for one task.

    network:     forward(image [B, 3, H, W]) → dict with a tensor for `task.name`; a copy is used
                 unless `in_place`
    batches:     MultitaskSample batches; read once
    keep_ratios: fractions in (0, 1] for which cuts are found over backbone and own head
    components:  a component map with `backbone` and `head:<task>`, for a network without its own
    seed:        of the weights drawn for scoring, and of dropout
    init:        "xavier": every scored weight is drawn anew, xavier-normal; "own": the network's
    raises:      ValueError for a loss that is not finite, or one that reaches no backbone weight
    """
    if init not in INITS:
        raise ValueError(f"saliency: {unknown_choice('init', init, INITS)}")
    for keep in keep_ratios:
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"saliency: Expected keep_ratios in (0, 1], got {keep}")
    network = network if in_place else copy.deepcopy(network)
    backbone, head = _scored(network, task.name, components)
    if init == "xavier":
        draw_weights([*backbone.values(), *head.values()], seed)
    scores = _accumulate(network, task, batches, {**backbone, **head}, seed)
    layers = list(scores.values())
    if not any(bool(scores[name].any()) for name in backbone):
        raise ValueError(
            f"saliency: Expected the loss of task {task.name!r} to reach the backbone, got no "
            f"gradient in any of its {len(backbone)} layers (no valid pixel in the batches, or a "
            "head that does not use the backbone)"
        )
    numel = sum(layer.numel() for layer in layers)
    cuts = {keep: find_cut(layers, kept_count(numel, keep)) for keep in keep_ratios}
    total = sum(float(layer.sum(dtype=torch.float64)) for layer in layers)
    return Saliency(task.name, {name: scores[name] for name in backbone}, total, numel, cuts)


def draw_weights(weights: Iterable[Tensor], seed: int) -> None:
    """Draw weights xavier-normal, in order, from one generator on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            fresh = torch.empty(weight.shape)
            weight.copy_(nn.init.xavier_normal_(fresh, generator=generator))


def _scored(
    network: nn.Module, task: str, components: ComponentMap | None
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The backbone's and the head's weights by layer name, a shared one once."""
    found = find_components(network, components)
    missing = [name for name in (BACKBONE, head_name(task)) if name not in found]
    if missing:
        raise ValueError(f"saliency: Expected components {missing}, got {list(found)}")
    parts = []
    seen: set[int] = set()
    for name in (BACKBONE, head_name(task)):
        part = {}
        for layer, module in found[name].layers:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            if id(weight) not in seen:
                seen.add(id(weight))
                part[layer] = weight
        parts.append(part)
    return parts[0], parts[1]


def _accumulate(
    network: nn.Module,
    task: Any,
    batches: Iterable[Any],
    weights: dict[str, nn.Parameter],
    seed: int,
) -> dict[str, Tensor]:
    """Σ |w · ∂L/∂w| per layer."""
    device = next(iter(weights.values())).device
    scores = {n: torch.zeros(w.shape, device=device) for n, w in weights.items()}
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(_fold(scores[name])))
    network.train()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for number, batch in enumerate(batches):
                batch = to_device(batch, device)
                outputs = network(batch.image)
                check_outputs(outputs, [task.name])
                prediction = outputs[task.name].float()
                loss = task.loss(prediction, batch.targets[task.name], batch.valid[task.name])
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"saliency: Expected a finite loss of task {task.name!r}, "
                        f"got {loss.item()} in batch {number}"
                    )
                if loss.requires_grad:
                    loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return scores


def _fold(score: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds |w · ∂L/∂w| to `score` and lets the gradient go."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        with torch.no_grad():
            score.add_(weight.grad.mul_(weight).abs_())
        weight.grad = None

    return hook
