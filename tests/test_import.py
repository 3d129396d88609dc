"""`import sparsemtl` is cheap, silent and needs nothing optional; its names are there."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import sparsemtl

OPTIONAL = ("matplotlib", "PIL", "rich", "safetensors", "torchjd", "torchmetrics", "triton", "tyro")


def test_import_loads_nothing_optional_and_prints_nothing():
    code = (
        "import sys; import sparsemtl; import sparsemtl.ops; "
        f"print([n for n in {OPTIONAL!r} if n in sys.modules], end='')"
    )
    # torch itself loads triton where it is installed; what counts is what we add to it.
    torch_alone = "import sys; import torch; print([n for n in ('triton',) if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    base = subprocess.run([sys.executable, "-c", torch_alone], capture_output=True, text=True)
    allowed = ast.literal_eval(base.stdout)
    assert [n for n in ast.literal_eval(done.stdout) if n not in allowed] == []
    assert done.stderr == ""


@pytest.mark.parametrize("name", sparsemtl.__all__)
def test_every_public_name_loads(name):
    assert getattr(sparsemtl, name) is not None


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'sparsfy'"):
        _ = sparsemtl.sparsfy
