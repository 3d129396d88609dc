"""Every method: exact budget, bit-exact resume, precision, a network of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.methods import METHODS, build_method, method_config_type
from sparsemtl.models.component import find_components
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.sparsity.stats import sparsity_report
from sparsemtl.sparsity.structure import parse_structure
from sparsemtl.tasks import make_task
from sparsemtl.training import runtime
from sparsemtl.training.callbacks import Checkpointer, every
from sparsemtl.training.checkpoint import checkpoints, load_checkpoint
from sparsemtl.training.loop import train
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.state import TrainConfig, TrainState

TASKS = ("segmentation", "normals", "depth")
SPARSE = [name for name in METHODS if "sparsity" in method_config_type(name).__dataclass_fields__]
NAMES = ["dense", "single-task", *SPARSE]  # others prune no weights and have tests of their own
SMALL = {  # what makes a run of 16 steps show each phase
    "snip": {"batches": 2},
    "disparse-static": {"batches": 2},
    "disparse-pt": {"batches": 2, "scores": "taylor"},
    "disparse-dynamic": {"update_every": 2},
    "rigl": {"update_every": 2},
    "imp": {"fraction": 0.4},
    "lth": {"rewind_to": 0.25},
}


@pytest.fixture(scope="module")
def data():
    config = ScenesConfig(height=32, width=40, frames_train=6, frames_val=2, frames_test=3)
    return build_dataset(config, "train", TASKS)


def make_state(data, name: str, steps: int = 16, precision: str = "fp32", **options) -> TrainState:
    config = TrainConfig(
        steps=steps,
        batch_size=2,
        optim=OptimConfig(lr=2e-3, weight_decay=1e-5),
        runtime=RuntimeConfig(device="cpu", precision=precision),
    )
    runtime.start(config.runtime, config.seed)
    tasks = {n: make_task(n, s.kind, s.channels) for n, s in data.spec.targets.items()}
    shape = ModelConfig("deeplab-resnet18", width=0.125, dropout=0.1, rates=(1, 2))
    model = build_model(shape, {n: t.channels for n, t in tasks.items()})
    kind = method_config_type(name)
    chosen = kind(**{**SMALL.get(name, {}), **options})
    return TrainState.create(model, tasks, data, build_method(chosen), config)


def final(state: TrainState) -> dict[str, torch.Tensor]:
    return state.method.finalize(state.model).state_dict()


@pytest.mark.parametrize("name", SPARSE)
def test_the_budget_is_exact_and_the_zeros_are_real(data, name):
    state = make_state(data, name, sparsity=0.8)
    train(state)
    model = state.method.finalize(state.model)
    report = sparsity_report(model, find_components(model))
    assert abs(report.overall - 0.8) < 1e-3
    assert len(set(report.components.values())) > 1 or name in ("rigl", "disparse-dynamic")


@pytest.mark.parametrize("structure", ["vector(4)", "block(4,4)", "channel"])
@pytest.mark.parametrize("name", ["rigl", "disparse-dynamic"])
def test_groups_that_move_stay_whole_and_meet_the_budget(data, name, structure):
    state = make_state(data, name, sparsity=0.8, structure=structure)
    train(state)
    masks = [m for group in state.model.sparsity.masks for m in group]
    kinds = parse_structure(structure)
    for mask in masks:
        assert set(kinds.scores(mask.float()).unique().tolist()) <= {0.0, 1.0}
    model = state.method.finalize(state.model)
    assert abs(sparsity_report(model, find_components(model)).overall - 0.8) < 1e-3
    start = make_state(data, name, steps=1, sparsity=0.8, structure=structure)
    start.method.on_start(start)
    first = [m for group in start.model.sparsity.masks for m in group]
    assert any(not torch.equal(a, b) for a, b in zip(first, masks, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_resuming_at_any_step_gives_the_same_bits(data, tmp_path, name):
    whole = make_state(data, name)
    train(whole, [every(1, Checkpointer(tmp_path, keep=100))])
    expected = final(whole)
    for step in (1, 5, 11):
        path = next(p for p in checkpoints(tmp_path) if p.stem.endswith(f"_{step:08d}"))
        torch.manual_seed(99)  # whatever the new process did before
        resumed = make_state(data, name)
        resumed.load_resume_state(load_checkpoint(path), path)
        train(resumed, [])
        found = final(resumed)
        assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


@pytest.mark.parametrize("name", SPARSE)
def test_bf16_keeps_the_budget(data, name):
    state = make_state(data, name, steps=8, precision="bf16", sparsity=0.7)
    train(state)
    model = state.method.finalize(state.model)
    assert abs(sparsity_report(model, find_components(model)).overall - 0.7) < 1e-3
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Own(nn.Module):
    """A network with no `components`, one shared linear layer, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
        )
        self.normals = nn.Conv2d(16, 3, 1)
        self.depth = nn.Sequential(nn.Conv2d(16, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        shared = torch.relu(self.trunk(x))
        return {"normals": self.normals(shared), "depth": self.depth(shared)}


PARTS = {"backbone": "trunk", "head:normals": "normals", "head:depth": "depth"}


@pytest.mark.parametrize("name", SPARSE)
def test_each_works_on_a_users_network(data, name):
    torch.manual_seed(0)
    tasks = {n: make_task(n, n, c) for n, c in (("normals", 3), ("depth", 1))}
    config = method_config_type(name)(**{**SMALL.get(name, {}), "sparsity": 0.6})
    method = build_method(config, PARTS)
    state = TrainState.create(
        Own(), tasks, data, method, TrainConfig(steps=16, batch_size=2), PARTS
    )
    train(state)
    model = method.finalize(state.model)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == pytest.approx(0.6 * total, abs=2)
