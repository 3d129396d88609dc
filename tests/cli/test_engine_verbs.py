"""`compile`, `run` and `explain` on a model folder, as a user types them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sparsemtl.cli.main import main
from sparsemtl.engine.engine import Engine
from sparsemtl.models.config import ModelConfig, build_model

HEADS = {"segmentation": 5, "normals": 3, "depth": 1, "own": 2}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model(ModelConfig("mobilenetv2", width=0.1), HEADS)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    saved = {
        "format": 1,
        "model": {"name": "mobilenetv2", "width": 0.1},
        "heads": HEADS,
        "data": {"image_normalisation": "caffe_bgr"},
    }
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


@pytest.fixture(scope="module")
def engine_folder(model_folder):
    out = model_folder.parent / "engine"
    words = ["compile", str(model_folder), "--input", "1,3,48,64", "--out", str(out)]
    assert main([*words, "--executor", "torch", "--quiet"]) == 0
    return out


def test_compile_writes_an_engine_that_knows_its_images(engine_folder):
    engine = Engine.load(engine_folder, executor="torch")
    assert engine.tasks == list(HEADS)
    assert engine.input_shapes == [(1, 3, 48, 64)]
    assert engine.about["image_normalisation"] == "caffe_bgr"


def test_every_form_of_a_model_is_found(model_folder, tmp_path):
    for place, path in enumerate((model_folder.parent, model_folder / "model.safetensors")):
        words = ["compile", str(path), "--input", "1,3,33,33", "--out", str(tmp_path / str(place))]
        assert main([*words, "--executor", "torch", "--dtype", "bf16", "--quiet"]) == 0


def test_nothing_is_overwritten(model_folder, engine_folder, capsys):
    words = ["compile", str(model_folder), "--input", "1,3,48,64", "--out", str(engine_folder)]
    assert main(words) == 2
    assert "new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["3,48,64", "1,3,0,9", "a,b,c,d", "1,3,-4,4"])
def test_a_bad_shape_is_named(model_folder, tmp_path, capsys, shape):
    words = ["compile", str(model_folder), "--input", shape, "--out", str(tmp_path / "e")]
    assert main(words) == 2
    assert "four positive sizes" in capsys.readouterr().err


def test_no_model_is_named(tmp_path, capsys):
    words = ["compile", str(tmp_path), "--input", "1,3,8,8", "--out", str(tmp_path / "e")]
    assert main(words) == 2
    assert "sparsemtl.compile" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["engine", "own"])
def test_run_paints_every_task_in_the_size_of_the_image(engine_folder, tmp_path, size):
    rng = np.random.default_rng(0)
    paths = []
    for place, shape in enumerate(((70, 50, 3), (33, 90, 3))):
        paths.append(tmp_path / f"photo{place}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    out = tmp_path / "out"
    words = ["run", str(engine_folder), *map(str, paths), "--out", str(out), "--size", size]
    assert main([*words, "--executor", "torch"]) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"photo{i}_{task}.png" for i in range(2) for task in HEADS
    )
    with Image.open(out / "photo1_depth.png") as picture:
        assert picture.size == (90, 33)
        assert picture.mode == "RGB"
        assert np.array(picture).std() > 0


def test_run_names_what_is_no_image(engine_folder, tmp_path, capsys):
    (tmp_path / "letter.png").write_text("dear")
    words = ["run", str(engine_folder), str(tmp_path / "letter.png"), "--out", str(tmp_path / "o")]
    assert main(words) == 2
    assert "letter.png" in capsys.readouterr().err


def test_explain_prints_and_writes_the_table(engine_folder, tmp_path, capsys):
    file = tmp_path / "table.json"
    words = ["explain", str(engine_folder), "--executor", "sparse", "--json", str(file)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "conv2d" in text
    assert "because" in text
    assert json.loads(file.read_text())["through_torch"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["compile", "run", "explain", "bench"])
def test_without_a_gpu_one_line_says_so(model_folder, engine_folder, tmp_path, capsys, verb):
    words = {
        "compile": [str(model_folder), "--input", "1,3,48,64", "--out", str(tmp_path / "engine")],
        "run": [str(engine_folder), "no.png", "--out", str(tmp_path)],
        "explain": [str(engine_folder)],
        "bench": ["model", "--input", "1,3,33,33"],
    }[verb]
    assert main([verb, *words, "--device", "cuda", "--precision", "bf16"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "Expected a CUDA device for cuda, torch sees none here" in lines[0]
    assert main([verb, *words, "--precision", "fp16"]) == 2
    assert "Expected dtype float32 on the CPU, got torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()
