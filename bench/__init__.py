"""Benches, one file per op; a number is printed with its machine, baseline and a green check.

Where the package was not installed, kernels/ stands beside it and is mapped in here as an install
would: `python -m bench.gpu` then runs from a bare checkout.
"""

import importlib.util
import sys
from pathlib import Path

_kernels = Path(__file__).parent.parent / "kernels" / "__init__.py"
if importlib.util.find_spec("sparsemtl.kernels") is None and _kernels.exists():
    _spec = importlib.util.spec_from_file_location(
        "sparsemtl.kernels", _kernels, submodule_search_locations=[str(_kernels.parent)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["sparsemtl.kernels"] = _module
    _spec.loader.exec_module(_module)
