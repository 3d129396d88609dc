"""Facts about the package: what is installed, what the build promises, what the pins cover."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import sparsemtl
from sparsemtl.ops.availability import native_module, why_not_native

ROOT = Path(__file__).parent.parent
PINS = (ROOT / "constraints.txt").read_text()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> set[str]:
    return {normal(name) for name in re.findall(r"^([\w.-]+)==", PINS, re.M)}


def test_the_version_is_said_once():
    assert metadata.version("sparsemtl") == sparsemtl.__version__


def test_the_command_leads_to_the_cli():
    (command,) = metadata.entry_points(group="console_scripts", name="sparsemtl")
    assert command.value == "sparsemtl.cli:main"


def test_kernels_are_inside_the_package():
    import sparsemtl.kernels

    assert sparsemtl.kernels.__name__ == "sparsemtl.kernels"
    assert (Path(sparsemtl.kernels.__file__).parent / "soft_threshold.py").exists()


def test_torch_is_no_build_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    requires = text[text.index("requires = [") : text.index("build-backend")]
    assert not re.search(r'"torch', requires)


def test_every_direct_dependency_of_a_development_install_is_pinned():
    extras = ("extra == 'report'", "extra == 'dev'", "extra == 'triton'")
    wanted = set()
    for line in metadata.requires("sparsemtl") or []:
        needed = "extra ==" not in line or any(e in line.replace('"', "'") for e in extras)
        name = re.match(r"[\w.-]+", line).group()
        if needed and normal(name) != "sparsemtl":
            wanted.add(normal(name))
    assert wanted <= pinned()


def test_pins_carry_no_local_version():
    assert not re.search(r"==[^;\s]*\+", PINS)


@pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_wide_registers_stay_behind_their_switch():
    """zmm registers appear only in the AVX-512 object, which the run-time choice guards."""
    if "avx512" not in native_module().usable_isas():
        pytest.skip("this machine has no AVX-512")
    for path in sorted((ROOT / "build").rglob("kernels_*.o")):
        if "sanitize" in path.parts:
            continue
        code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True).stdout
        has_zmm, has_ymm = "%zmm" in code, "%ymm" in code
        assert has_zmm == (path.stem == "kernels_avx512"), path.name
        assert has_ymm <= (path.stem != "kernels_generic"), path.name


def test_the_native_module_does_not_link_torch_or_a_shared_cuda_runtime():
    if why_not_native() is not None or shutil.which("ldd") is None:
        pytest.skip("no native module to look at")
    linked = subprocess.run(
        ["ldd", native_module().__file__], capture_output=True, text=True
    ).stdout
    assert "torch" not in linked
    assert "libcudart" not in linked


def test_without_the_native_module_everything_runs_on_the_reference():
    code = """
import sys
sys.modules["sparsemtl._C"] = None
import torch
from sparsemtl.ops import SOFT_THRESHOLD, soft_threshold, soft_threshold_stats, use_backend
w, a = torch.randn(9, requires_grad=True), torch.tensor(0.5, requires_grad=True)
soft_threshold(w, a).sum().backward()
assert SOFT_THRESHOLD.choose([w], a).name == "reference" and a.grad is not None
assert soft_threshold_stats([w], a, bitmask=True).bitmasks[0].numel() == 2
print(SOFT_THRESHOLD.explain([w], a)["native"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "sparsemtl._C is not built" in done.stdout
    assert "C++17 compiler" in done.stdout
