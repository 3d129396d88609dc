"""Small datasets on disk, made once: scenes in both layouts, and the real sample where present."""

import os
import shutil
from pathlib import Path

import pytest

from sparsemtl.data import ScenesConfig, write_dataset

SMALL = ScenesConfig(height=48, width=64, frames_train=4, frames_val=2, frames_test=2)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """{layout: folder} of SMALL on disk; do not change the files."""
    base = tmp_path_factory.mktemp("written")
    for layout in ("nyuv2", "mtan"):
        write_dataset(SMALL, base / layout, layout)
    return {layout: base / layout for layout in ("nyuv2", "mtan")}


@pytest.fixture
def copied(written, tmp_path):
    """{layout: folder}: copies to damage."""
    for layout, folder in written.items():
        shutil.copytree(folder, tmp_path / layout)
    return {layout: tmp_path / layout for layout in written}


@pytest.fixture(scope="session")
def sample_root():
    """Four real NYUv2 frames; the test is skipped where they are absent."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "nyuv2_sample"
    root = Path(os.environ.get("SPARSEMTL_NYUV2_SAMPLE", default))
    if not (root / "nyu_v2_3task.json").is_file():
        pytest.skip(f"no NYUv2 sample frames in {root}; set SPARSEMTL_NYUV2_SAMPLE")
    return root
