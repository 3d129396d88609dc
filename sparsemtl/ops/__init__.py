"""The ops and the only door to the kernels below them.

An op is a function with a plain-torch reference beside it; which backend computes it is chosen
for each call (see dispatch.py).
"""

from sparsemtl.ops.dispatch import (
    Backend,
    BackendUnavailable,
    Op,
    Reasons,
    all_ops,
    use_backend,
)
from sparsemtl.ops.soft_threshold import (
    SOFT_THRESHOLD,
    SOFT_THRESHOLD_STATS,
    ThresholdStats,
    soft_threshold,
    soft_threshold_component,
    soft_threshold_reference,
    soft_threshold_stats,
)

__all__ = [
    "SOFT_THRESHOLD",
    "SOFT_THRESHOLD_STATS",
    "Backend",
    "BackendUnavailable",
    "Op",
    "Reasons",
    "ThresholdStats",
    "all_ops",
    "soft_threshold",
    "soft_threshold_component",
    "soft_threshold_reference",
    "soft_threshold_stats",
    "use_backend",
]
