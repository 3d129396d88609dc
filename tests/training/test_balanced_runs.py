"""Runs with balancing, mining and learned weightings: they learn, and resume to the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.methods import AdapMTLConfig, build_method
from sparsemtl.tasks import make_task
from sparsemtl.training import runtime
from sparsemtl.training.balance import BalanceConfig
from sparsemtl.training.callbacks import Checkpointer, every
from sparsemtl.training.checkpoint import checkpoints, load_checkpoint
from sparsemtl.training.loop import train
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.state import TrainConfig, TrainState
from sparsemtl.training.weighting import WeightingConfig

PARTS = {"backbone": "trunk", "head:normals": "normals", "head:depth": "depth"}


class Net(nn.Module):
    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)
        )
        self.normals, self.depth = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        shared = self.trunk(x)
        seen = shared.detach() if self.detached else shared
        return {"normals": self.normals(shared), "depth": self.depth(seen)}


@pytest.fixture(scope="module")
def data():
    config = ScenesConfig(height=16, width=24, frames_train=6, frames_test=2)
    return build_dataset(config, "train", ("normals", "depth"))


def make_state(data, detached: bool = False, **fields) -> TrainState:
    config = TrainConfig(
        **{
            "steps": 12,
            "batch_size": 4,
            "optim": OptimConfig(lr=5e-3),
            "runtime": RuntimeConfig(device="cpu"),
            **fields,
        }
    )
    runtime.start(config.runtime, config.seed)
    tasks = {n: make_task(n, n, c) for n, c in (("normals", 3), ("depth", 1))}
    method = build_method(AdapMTLConfig(sparsity=0.5), PARTS)
    return TrainState.create(Net(detached), tasks, data, method, config, PARTS)


FIELDS = {
    "pcgrad": {"balance": BalanceConfig("pcgrad")},
    "graddrop-all": {"balance": BalanceConfig("graddrop", scope="all")},
    "mining": {"mining": 0.5},
    "dwa": {"weighting": WeightingConfig("dwa")},
    "uncertainty": {"weighting": WeightingConfig("uncertainty")},
    "random-clipped": {
        "weighting": WeightingConfig("random"),
        "optim": OptimConfig(lr=5e-3, clip_norm=1.0),
    },
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_balanced_runs_resume_to_the_same_bits(data, tmp_path, fields):
    whole = make_state(data, **fields)
    totals: list[float] = []
    save = every(1, Checkpointer(tmp_path, keep=100))
    train(whole, [save, lambda s: totals.append(sum(s.losses.values()))])
    assert totals[-1] < totals[0]
    expected = whole.method.finalize(whole.model).state_dict()
    path = checkpoints(tmp_path)[4]
    torch.manual_seed(99)
    resumed = make_state(data, **fields)
    resumed.load_resume_state(load_checkpoint(path), path)
    train(resumed)
    found = resumed.method.finalize(resumed.model).state_dict()
    assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


def test_thresholds_learn_under_balancing(data):
    state = make_state(data, balance=BalanceConfig("pcgrad"), steps=40)
    train(state)
    theta = state.model.sparsity.theta.detach()
    assert len(set(theta.tolist())) > 1  # the joint split saw their gradients


def test_a_detached_head_is_named(data):
    state = make_state(data, detached=True, balance=BalanceConfig("pcgrad"))
    with pytest.raises(ValueError, match=r"a gradient in the backbone, got none"):
        train(state)
