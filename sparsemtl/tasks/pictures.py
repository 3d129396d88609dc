"""Colours for targets and predictions. numpy only; arrays are [H, W] or [H, W, 3]."""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np
from torch import Tensor

INVALID = (64, 64, 64)
_GOLDEN = 0.618033988749895  # steps of the golden ratio keep neighbouring hues apart
_TONES = ((0.5, 0.98), (0.85, 0.70), (0.35, 0.78), (0.75, 0.45), (0.9, 0.9))  # saturation, value

_MAP = np.array(  # dark violet over green to yellow: even in lightness, readable in grey
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    dtype=np.float64,
)


@lru_cache(maxsize=8)
def palette(classes: int) -> np.ndarray:
    """Return distinct colours, uint8 [classes, 3]; the same class has the same one anywhere."""
    colours = [
        colorsys.hsv_to_rgb((0.58 + i * _GOLDEN) % 1.0, *_TONES[i % len(_TONES)])
        for i in range(classes)
    ]
    table = np.rint(np.array(colours) * 255).astype(np.uint8)
    table.setflags(write=False)  # the cache hands out one array
    return table


def paint_scale(
    values: np.ndarray, limits: tuple[float, float] | None, valid: np.ndarray | None
) -> np.ndarray:
    """Paint numbers [H, W] by a colour map over `limits`, default the valid extremes."""
    finite = np.isfinite(values)
    shown = finite if valid is None else finite & valid
    if limits is None:
        limits = (float(values[shown].min()), float(values[shown].max())) if shown.any() else (0, 1)
    low, high = limits
    span = max(high - low, np.finfo(np.float32).tiny)
    place = np.clip((np.where(finite, values, low) - low) / span, 0.0, 1.0) * (len(_MAP) - 1)
    anchors = np.arange(len(_MAP))
    picture = np.stack([np.interp(place, anchors, _MAP[:, c]) for c in range(3)], axis=-1)
    return paint_invalid(np.rint(picture).astype(np.uint8), finite if valid is None else shown)


def paint_invalid(picture: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Grey out [H, W, 3] where `valid` [H, W] is false."""
    if valid is None:
        return picture
    return np.where(valid[..., None], picture, np.array(INVALID, dtype=np.uint8))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Detach to a numpy array; reduced precision becomes float32."""
    tensor = tensor.detach().cpu()
    return np.asarray(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy())


def check_picture(name: str, tensor: Tensor, channels: int, valid: Tensor | None) -> None:
    """Raise ValueError unless tensor is [channels, H, W] and valid, if given, [H, W]."""
    if tensor.dim() != 3 or tensor.shape[0] != channels:
        raise ValueError(
            f"{name}: Expected picture tensor of shape [{channels}, H, W], got {list(tensor.shape)}"
        )
    if valid is not None and valid.shape != tensor.shape[-2:]:
        raise ValueError(
            f"{name}: Expected valid of shape {list(tensor.shape[-2:])}, got {list(valid.shape)}"
        )
