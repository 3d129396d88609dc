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
from sparsemtl.ops.group_threshold import (
    GROUP_THRESHOLD,
    group_threshold,
    group_threshold_component,
    group_threshold_reference,
)
from sparsemtl.ops.pattern import Pattern, pack_pattern
from sparsemtl.ops.soft_threshold import (
    SOFT_THRESHOLD,
    SOFT_THRESHOLD_STATS,
    ThresholdStats,
    soft_threshold,
    soft_threshold_component,
    soft_threshold_reference,
    soft_threshold_stats,
)
from sparsemtl.ops.sparse_conv2d import (
    SPARSE_CONV2D,
    sparse_conv2d,
    sparse_conv2d_reference,
)
from sparsemtl.ops.sparse_conv2d_library import register_flops
from sparsemtl.ops.sparse_linear import pack_linear, sparse_linear, sparse_linear_reference
from sparsemtl.ops.threshold_adam import (
    THRESHOLD_ADAM,
    AdamRule,
    ready_values,
    threshold_adam,
    threshold_adam_reference,
)

__all__ = [
    "GROUP_THRESHOLD",
    "SOFT_THRESHOLD",
    "SOFT_THRESHOLD_STATS",
    "SPARSE_CONV2D",
    "THRESHOLD_ADAM",
    "AdamRule",
    "Backend",
    "BackendUnavailable",
    "Op",
    "Pattern",
    "Reasons",
    "ThresholdStats",
    "all_ops",
    "group_threshold",
    "group_threshold_component",
    "group_threshold_reference",
    "pack_linear",
    "pack_pattern",
    "ready_values",
    "register_flops",
    "soft_threshold",
    "soft_threshold_component",
    "soft_threshold_reference",
    "soft_threshold_stats",
    "sparse_conv2d",
    "sparse_conv2d_reference",
    "sparse_linear",
    "sparse_linear_reference",
    "threshold_adam",
    "threshold_adam_reference",
    "use_backend",
]
