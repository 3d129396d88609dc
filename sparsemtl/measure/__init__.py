"""Work, memory and machine: what stands beside every number."""

from sparsemtl.measure.environment import environment, machine_line
from sparsemtl.measure.flops import FlopReport, LayerFlops, Work, count_flops
from sparsemtl.measure.memory import (
    MemoryPeak,
    peak_rss_bytes,
    rss_bytes,
    track_peak,
)

__all__ = [
    "FlopReport",
    "LayerFlops",
    "MemoryPeak",
    "Work",
    "count_flops",
    "environment",
    "machine_line",
    "peak_rss_bytes",
    "rss_bytes",
    "track_peak",
]
