"""`bench model`: peers that fail are left out with the reason, a wrong engine gives no number."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from sparsemtl.measure import bench_model
from sparsemtl.measure.bench_model import Candidate, check, fastest, prepare, row, time_in_turns
from sparsemtl.measure.peers import PEERS, Peer, PeerMissing, file_bytes
from sparsemtl.measure.pruned import prune
from sparsemtl.measure.rows import WrongResult
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.ops.block_pattern import occupied_blocks
from sparsemtl.sparsity.structure import parse_structure


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.heads = nn.ModuleDict({"depth": nn.Conv2d(8, 1, 1), "edges": nn.Conv2d(8, 2, 1)})

    def forward(self, x):
        y = self.stem(x).relu()
        return {name: head(y) for name, head in self.heads.items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoHeads().eval()


X = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["torch", "torch-channels-last", "torch-bf16"])
def test_torch_peers_predict_what_the_model_does(name, model, tmp_path):
    (found,) = prepare([PEERS[name]], model, X, tmp_path)
    assert found.why_not == ""
    with torch.no_grad():
        expected = model(X)
    check([found], expected, X)
    assert found.predict is not None
    assert found.error < (0.1 if name == "torch-bf16" else 1e-6)
    assert not any(y.requires_grad for y in found.predict(X).values())
    count = sum(p.numel() for p in model.parameters())
    assert file_bytes(found.saved) > count * (2 if name == "torch-bf16" else 4)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_peer_that_is_not_installed_says_how_to_get_it(name, model, tmp_path):
    needed = ("onnx", "onnxscript", "onnxruntime") if name == "onnxruntime" else ("openvino",)
    if all(importlib.util.find_spec(package) for package in needed):
        pytest.skip("it is installed")
    (found,) = prepare([PEERS[name]], model, X, tmp_path)
    assert found.predict is None
    assert "pip install" in found.why_not


def test_failures_are_reasons(model, tmp_path):
    def broken(*_):
        raise RuntimeError("out of order\nsecond line")

    def missing(*_):
        raise PeerMissing("not here")

    peers = [Peer("a", broken, broken), Peer("b", lambda m, x, f: f, missing)]
    assert [c.why_not for c in prepare(peers, model, X, tmp_path)] == ["out of order", "not here"]


def test_a_wrong_engine_stops_it_and_a_wrong_peer_is_left_out(model):
    with torch.no_grad():
        expected = model(X)
    off = lambda x: {k: v * 1.001 for k, v in expected.items()}  # noqa: E731
    peer = Candidate("torch-compile", predict=off)
    check([peer], expected, X)
    assert peer.predict is None
    assert "relative error of 1.0e-03" in peer.why_not
    with pytest.raises(WrongResult, match="the engine's outputs within"):
        check([Candidate("engine", predict=off)], expected, X)


def test_rows_compare_with_the_fastest_peer_of_the_same_precision():
    made = {"engine": [1.0, 2.0, 3.0], "torch": [4.0, 4.0, 4.0], "torch-bf16": [1.0, 1.0, 1.0]}
    candidates = [Candidate(name, seconds=seconds) for name, seconds in made.items()]
    candidates.append(Candidate("openvino", why_not="not installed"))
    assert fastest(candidates, bf16=False) is candidates[1]
    assert fastest(candidates, bf16=True) is candidates[2]
    found = row(candidates[0], "x", 0.9, 8, candidates[1], {"file_mb": 1.0})
    assert found["median_ms"] == 2000.0
    assert found["speedup"] == 2.0
    assert found["images_per_second"] == 4.0
    assert found["p95_ms"] == pytest.approx(2900.0)
    assert found["spread"] == 0.5
    assert found["file_mb"] == 1.0
    skipped = row(candidates[3], "x", 0.9, 8, candidates[1], {})
    assert skipped["skipped"] == "not installed"
    assert skipped["median_ms"] is skipped["speedup"] is None


def test_candidates_take_turns_behind_a_call_of_their_own():
    order = []
    call = lambda name: lambda x: order.append(name) or {}  # noqa: E731
    candidates = [Candidate(n, predict=call(n)) for n in "ab"] + [Candidate("c", why_not="no")]
    time_in_turns(candidates, X, rounds=50, budget=0.0)
    assert order == ["a", "a", "b", "b"] * 3
    assert [len(c.seconds) for c in candidates] == [3, 3, 0]
    assert bench_model.CONVENTION.startswith("multiply-adds")


def test_a_runtime_of_another_device_is_left_out_with_the_reason(tmp_path):
    names = ["torch-compile-graph", "torch-compile-graph-bf16"]
    found = prepare([PEERS[name] for name in names], nn.Identity(), X, tmp_path)
    assert {c.why_not for c in found} == {"it runs on cuda, not on cpu"}
    assert not any(tmp_path.iterdir())


def test_heads_lose_whole_blocks_where_they_have_them():
    model = build_model(ModelConfig("deeplab-resnet18", width=0.25), {"depth": 1}).eval()
    prune(model, {"backbone": 0.5, "head:depth": 0.75}, parse_structure("block(64,64)"))
    layers = [m for m in model.heads["depth"].modules() if isinstance(m, nn.Conv2d)]
    wide = [m.weight for m in layers if min(m.weight.shape[:2]) >= 64]
    assert len(wide) >= 4
    for weight in wide:
        blocks = occupied_blocks(weight != 0, 1, 64, 64)
        assert int((weight != 0).sum()) == int(blocks.sum()) * 64 * 64
        assert 0.6 < float((weight == 0).float().mean()) < 0.9
    (last,) = {m.weight.shape[0] for m in layers if m.weight.shape[0] < 64}
    assert last == 1
    backbone = next(m.weight for m in model.backbone.modules() if isinstance(m, nn.Conv2d))
    assert abs(float((backbone == 0).float().mean()) - 0.5) < 0.01
