"""data, info, and the shape of the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparsemtl import config as configs
from sparsemtl.cli import main


@pytest.mark.parametrize("layout", ["nyuv2", "mtan"])
def test_scenes_are_written_checked_and_trained_on(layout, tmp_path, capsys):
    root = tmp_path / "set"
    size = ["--height", "40", "--width", "48"]
    words = ["data", "scenes", "--layout", layout, "--out", str(root), "--frames", "3", *size]
    assert main([*words, "--frames-test", "2"]) == 0
    assert main(["data", "check", str(root), "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["ok"]
    victim = next(root.rglob("*.npy"))
    victim.write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["data", "check", str(root)]) == 1
    assert victim.name in capsys.readouterr().out


def test_info_names_backends_and_reasons(tmp_path, capsys):
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 0
    text = capsys.readouterr().out
    assert "soft_threshold" in text
    assert "reference" in text
    ops = json.loads((tmp_path / "info.json").read_text())["ops"]
    assert ops["soft_threshold"]["reference"] is None


@pytest.mark.parametrize("name", list(configs.PRESETS))
def test_presets_survive_json(name):
    config = configs.preset(name)
    assert configs.from_json(json.loads(json.dumps(configs.to_json(config)))) == config


def test_damaged_configs_name_the_field():
    value = configs.to_json(configs.demo())
    value["train"]["step"] = 5
    with pytest.raises(ValueError, match=r"a field of config\.train .* got 'step'"):
        configs.from_json(value)
    with pytest.raises(ValueError, match="Expected format 1"):
        configs.from_json({})
    with pytest.raises(ValueError, match="Expected a section 'data'"):
        configs.from_json({"format": 1})


def test_help_needs_nothing():
    for words in (["--help"], ["train", "--help"], ["data", "scenes", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "sparsemtl", *words], capture_output=True, check=True
        )
        assert b"usage: sparsemtl" in done.stdout


WRONG = {
    "train.steps": "abc",
    "train.optim": None,
    "method.controller": None,
    "train.runtime": "x",
    "train.loss_weights": [1],
    "data.flip": "maybe",
    "tasks": "depth",
    "train.seed": True,
    "model.rates": ["a"],
}


@pytest.mark.parametrize(("path", "value"), WRONG.items(), ids=WRONG.keys())
def test_wrong_kinds_in_a_config_name_the_field(path, value):
    with pytest.raises(ValueError, match=rf"config: Expected .*{path.split('.')[-1]}"):
        configs.with_changes(configs.demo(), {path: value})


def test_any_field_can_be_changed():
    config = configs.with_changes(
        configs.demo(),
        {
            "train.weighting.window": 7,
            "method.controller.floor": 0,
            "task_options.segmentation.miou_convention": "released",
        },
    )
    assert config.train.weighting.window == 7
    assert config.method.controller.floor == 0.0
    assert config.task_options["segmentation"] == {"miou_convention": "released"}
    with pytest.raises(ValueError, match=r"a field of method.controller.*mean 'floor'"):
        configs.with_changes(configs.demo(), {"method.controller.flor": 0})
    with pytest.raises(ValueError, match="a section of the run"):
        configs.with_changes(configs.demo(), {"trian.steps": 0})


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparsemtl 0.")
