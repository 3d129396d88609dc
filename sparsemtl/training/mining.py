"""Hard-sample mining: a step learns from the hardest samples of its batch only.

Source: distinctiveness pruning paper, which takes the mean loss over the hardest 70 % of a batch,
ranked by the summed (weighted) multitask loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def hardest(
    losses: Mapping[str, Tensor], share: float, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """The mean of each task's losses over the samples whose summed loss is largest.

    losses:  task → [B] loss of each sample, with gradient
    share:   of the batch to keep, in (0, 1]; rounded up to whole samples
    weights: task → λ of the sum that ranks the samples
    returns: task → scalar, the mean over the same ceil(share · B) samples; ties by lower index
    """
    with torch.no_grad():
        summed = torch.stack([losses[t].detach() * weights[t] for t in losses]).sum(dim=0)  # [B]
        order = torch.argsort(summed, descending=True, stable=True)
    kept = order[: max(1, math.ceil(share * len(order) - 1e-9))]
    return {task: values[kept].mean() for task, values in losses.items()}
