"""Bring predictions and labels to one size without inventing values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_nearest(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize the last two dimensions by torch's `nearest` rule, for any dtype.

    tensor:  [..., H, W]; bool and integer labels stay exact
    size:    (h, w)
    returns: [..., h, w]
    """
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    rows = _nearest_index(tensor.shape[-2], size[0], tensor.device)
    columns = _nearest_index(tensor.shape[-1], size[1], tensor.device)
    return tensor[..., rows[:, None], columns]


def resize_bilinear(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, C, H, W] to (h, w) with aligned corners, as MTAN and LibMTL upsample."""
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    return F.interpolate(tensor, size, mode="bilinear", align_corners=True)


def _nearest_index(before: int, after: int, device: torch.device) -> Tensor:
    # Asking torch itself keeps its rounding of the scale, whatever the two sizes are.
    index = torch.arange(before, dtype=torch.float32, device=device)
    return F.interpolate(index[None, None], size=after, mode="nearest")[0, 0].long()
