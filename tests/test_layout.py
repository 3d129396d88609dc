"""The house rules that can be checked by looking: one stem per op, who may import kernels."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = ROOT / "sparsemtl" / "ops"


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def op_stems() -> list[str]:
    """Modules of ops that create an Op."""
    return sorted(
        p.stem for p in OPS.glob("*.py") if re.search(r"^\w+ = Op\(", p.read_text(), re.M)
    )


def test_the_first_op_is_found():
    assert "soft_threshold" in op_stems()


@pytest.mark.parametrize("stem", op_stems())
def test_an_op_has_its_reference_test_and_bench(stem):
    assert f"def {stem}_reference(" in (OPS / f"{stem}.py").read_text()
    assert (ROOT / "tests" / "ops" / f"test_{stem}.py").exists()
    assert (ROOT / "bench" / f"bench_{stem}.py").exists()


@pytest.mark.parametrize("folder", ["kernels", "csrc/cpu", "csrc/cuda"])
def test_a_kernel_has_the_stem_of_an_op(folder):
    """Triton and CUDA files, and C++ bodies, are named after the op that they compute."""
    suffix = {"kernels": "*.py", "csrc/cpu": "*.inc.h", "csrc/cuda": "*.cu"}[folder]
    stems = {p.name.split(".")[0] for p in (ROOT / folder).glob(suffix)} - {"__init__"}
    # pack_pattern makes the lists that sparse_conv2d walks, and has its test with the host kernels.
    found = stems - {"pack_pattern", "shared"}
    assert all(any(stem == op or stem.startswith(f"{op}_") for op in op_stems()) for stem in found)


def test_only_ops_imports_the_kernels():
    for path in (ROOT / "sparsemtl").rglob("*.py"):
        if OPS in path.parents:
            continue
        wrong = [n for n in imported(path) if re.match(r"sparsemtl\.(_C|kernels)\b", n)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        tops = {name.split(".")[0] for name in imported(path)}
        allowed = {"__future__", "collections", "functools", "typing", "torch", "triton"}
        assert tops <= allowed, path.name


def test_native_code_includes_no_torch_header():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path.name


BANNED = {
    "block pointers leave Triton": (r"make_block_ptr", ("kernels", "sparsemtl")),
    "swallows every error": (r"except Exception\b|except:\s*$", ("kernels", "sparsemtl")),
    "native code for one machine": (r"-march=native|-ffast-math", ("csrc", "setup.py")),
}


@pytest.mark.parametrize(("pattern", "places"), BANNED.values(), ids=BANNED.keys())
def test_nothing_banned(pattern, places):
    for place in places:
        root = ROOT / place
        files = [root] if root.is_file() else [p for p in root.rglob("*.*") if p.suffix != ".pyc"]
        for path in files:
            if path.suffix in (".py", ".h", ".cpp", ".cu"):
                assert not re.search(pattern, path.read_text(), re.M), path.relative_to(ROOT)


def test_importing_is_silent_and_loads_nothing_optional():
    optional = ("triton", "torchmetrics", "torchjd", "tyro", "rich", "PIL", "matplotlib", "jinja2")
    code = (
        "import sys, torch; before = set(sys.modules); import sparsemtl, sparsemtl.ops; "
        f"print([m for m in {optional} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
