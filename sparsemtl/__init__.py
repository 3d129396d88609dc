"""Train sparse multitask networks and make them really faster.

`import sparsemtl` needs torch and numpy only; everything optional fails at its first use,
with the line that installs it. The names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Engine": "sparsemtl.engine.engine",
    "compile": "sparsemtl.engine.engine",
    "finalize": "sparsemtl.sparsity.finalize",
    "find_components": "sparsemtl.models.component",
    "freeze_exactly": "sparsemtl.sparsity.controller",
    "soft_threshold": "sparsemtl.ops.soft_threshold",
    "sparsify": "sparsemtl.sparsity.sparsify",
    "sparsity_report": "sparsemtl.sparsity.stats",
    "use_backend": "sparsemtl.ops.dispatch",
}

__all__ = [
    "Engine",
    "__version__",
    "compile",
    "finalize",
    "find_components",
    "freeze_exactly",
    "soft_threshold",
    "sparsify",
    "sparsity_report",
    "use_backend",
]

if TYPE_CHECKING:
    from sparsemtl.engine.engine import Engine, compile
    from sparsemtl.models.component import find_components
    from sparsemtl.ops.dispatch import use_backend
    from sparsemtl.ops.soft_threshold import soft_threshold
    from sparsemtl.sparsity.controller import freeze_exactly
    from sparsemtl.sparsity.finalize import finalize
    from sparsemtl.sparsity.sparsify import sparsify
    from sparsemtl.sparsity.stats import sparsity_report


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsemtl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
