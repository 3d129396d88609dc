"""Bring predictions and labels to one size without inventing values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_nearest(tensor: Tensor, size: tuple[int, int], rule: str = "nearest-exact") -> Tensor:
    """Resize the last two dimensions by one of torch's nearest rules, for any dtype.

    tensor:  [..., H, W]; bool and integer labels stay exact
    size:    (h, w)
    rule:    "nearest-exact": the pixel whose centre is nearest; "nearest": its index rounded down,
             half a cell off towards the top left
    returns: [..., h, w]
    """
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    rows = _nearest_index(tensor.shape[-2], size[0], rule, tensor.device)
    columns = _nearest_index(tensor.shape[-1], size[1], rule, tensor.device)
    return tensor[..., rows[:, None], columns]


def resize_bilinear(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, C, H, W] to (h, w) with aligned corners, as MTAN and LibMTL upsample."""
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    return F.interpolate(tensor, size, mode="bilinear", align_corners=True)


def _nearest_index(before: int, after: int, rule: str, device: torch.device) -> Tensor:
    # Asking torch itself keeps its rounding of the scale, whatever the two sizes are.
    index = torch.arange(before, dtype=torch.float32, device=device)
    return F.interpolate(index[None, None], size=after, mode=rule)[0, 0].long()
