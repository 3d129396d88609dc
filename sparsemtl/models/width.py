"""The width multiplier: the same network with fewer channels, for small machines."""

from __future__ import annotations

_MULTIPLE = 8  # channel counts stay whole vectors of 8 floats


def scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded to the nearest multiple of 8 and at least 8.

    At width 1 the count is returned as it is, so that the papers' networks stay exact.
    """
    if width == 1.0:
        return channels
    return max(_MULTIPLE, int(channels * width + _MULTIPLE / 2) // _MULTIPLE * _MULTIPLE)
