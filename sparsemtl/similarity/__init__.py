"""Which tasks belong together, told from fresh networks: saliency, similarity, grouping."""

from sparsemtl.similarity.analysis import (
    SeedRecord,
    SimilarityConfig,
    pairs_of,
    score_seed,
    similarity_matrix,
)
from sparsemtl.similarity.correlation import correlate, ordering_agreement
from sparsemtl.similarity.grouping import Grouping, best_grouping
from sparsemtl.similarity.layer_weights import AGGREGATES, INDEXINGS, WEIGHTS
from sparsemtl.similarity.metrics import METRICS
from sparsemtl.similarity.saliency import Saliency, saliency

__all__ = [
    "AGGREGATES",
    "INDEXINGS",
    "METRICS",
    "WEIGHTS",
    "Grouping",
    "Saliency",
    "SeedRecord",
    "SimilarityConfig",
    "best_grouping",
    "correlate",
    "ordering_agreement",
    "pairs_of",
    "saliency",
    "score_seed",
    "similarity_matrix",
]
