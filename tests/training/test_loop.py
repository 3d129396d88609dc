"""The loop on small real parts: it learns, resumes bit-exactly and stops where it must."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.errors import CheckpointError, DivergedError
from sparsemtl.methods import AdapMTL, AdapMTLConfig, Dense, DenseConfig
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.sparsity.stats import count_dead, overall_sparsity
from sparsemtl.tasks import make_task
from sparsemtl.training import runtime
from sparsemtl.training.callbacks import Checkpointer, MetricsLog, StopOnSignal, every
from sparsemtl.training.checkpoint import checkpoints, load_checkpoint
from sparsemtl.training.evaluate import evaluate, evaluate_constant
from sparsemtl.training.loop import train
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.state import TrainConfig, TrainState

TASKS = ("segmentation", "normals", "depth")


@pytest.fixture(scope="module")
def data():
    config = ScenesConfig(height=32, width=40, frames_train=6, frames_val=2, frames_test=3)
    return build_dataset(config, "train", TASKS)


def make_state(data, method="adapmtl", dropout=0.1, grouping="component", **fields) -> TrainState:
    config = TrainConfig(
        **{
            "steps": 12,
            "batch_size": 2,
            "optim": OptimConfig(lr=2e-3, weight_decay=1e-5),
            "runtime": RuntimeConfig(device="cpu"),
            **fields,
        }
    )
    device = runtime.start(config.runtime, config.seed)
    tasks = {n: make_task(n, s.kind, s.channels) for n, s in data.spec.targets.items()}
    model = build_model(
        ModelConfig("deeplab-resnet18", width=0.125, dropout=dropout),
        {n: t.channels for n, t in tasks.items()},
    ).to(device)
    chosen = (
        AdapMTL(AdapMTLConfig(sparsity=0.8, grouping=grouping))
        if method == "adapmtl"
        else Dense(DenseConfig())
    )
    return TrainState.create(model, tasks, data, chosen, config)


def final_weights(state: TrainState) -> dict[str, torch.Tensor]:
    return state.method.finalize(state.model).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize(
    ("precision", "clip", "grouping"),
    [("fp32", None, "component"), ("bf16", 1.0, "one"), ("fp32", 1.0, "layer")],
)
def test_resuming_at_any_step_gives_the_same_bits(data, tmp_path, precision, clip, grouping):
    fields = {
        "runtime": RuntimeConfig(device="cpu", precision=precision),
        "optim": OptimConfig(lr=2e-3, clip_norm=clip),
        "grouping": grouping,
    }
    whole = make_state(data, **fields)
    save = Checkpointer(tmp_path, keep=100)
    train(whole, [every(1, save)])
    expected = final_weights(whole)
    for path in (checkpoints(tmp_path)[i] for i in (0, 4, 8, 10)):  # dense, ramp, fixed
        torch.manual_seed(99)  # whatever the new process did before
        resumed = make_state(data, **fields)
        resumed.load_resume_state(load_checkpoint(path), path)
        train(resumed, [])
        assert_same(final_weights(resumed), expected)


def test_the_target_is_exact_and_components_differ(data):
    state = make_state(data)
    train(state)
    counts = count_dead(state.model.sparsity)
    assert abs(overall_sparsity(counts) - 0.8) < 1e-5
    assert len({round(d / n, 4) for d, n in counts.values()}) == 4


@pytest.mark.parametrize("method", ["dense", "adapmtl"])
def test_it_learns(data, method):
    state = make_state(data, method=method, dropout=0.0, steps=40, batch_size=3)
    totals = []
    train(state, [lambda s: totals.append(sum(s.losses.values()))])
    assert sum(totals[-5:]) < 0.7 * sum(totals[:5])


def test_a_nan_loss_names_task_step_and_checkpoint(data, tmp_path):
    state = make_state(data)

    def poison(state: TrainState) -> None:
        if state.step == 5:
            with torch.no_grad():
                state.model.heads["depth"].branches[0][-1].bias.fill_(float("nan"))

    before = []
    callbacks = [every(4, Checkpointer(tmp_path)), poison, lambda s: before.append(s.step)]
    expected = r"stopped at step 6: the loss of task 'depth' is nan.*step_00000004\.pt"
    with pytest.raises(DivergedError, match=expected):
        train(state, callbacks)
    assert before[-1] == 5


def test_no_checkpoint_is_written_of_a_broken_model(data, tmp_path):
    state = make_state(data)
    with torch.no_grad():
        next(state.model.parameters()).fill_(float("inf"))
    with pytest.raises(DivergedError, match=r"parameter 'backbone.* has NaN or inf"):
        Checkpointer(tmp_path)(state)
    assert checkpoints(tmp_path) == []


def test_an_infinite_gradient_is_caught_when_clipping(data):
    state = make_state(data, optim=OptimConfig(clip_norm=1.0), method="dense")
    next(state.model.parameters()).register_hook(lambda g: g * float("inf"))
    with pytest.raises(DivergedError, match="gradient norm is"):
        train(state)


def test_a_checkpoint_of_another_model_is_refused(data, tmp_path):
    state = make_state(data)
    Checkpointer(tmp_path)(state)
    path = checkpoints(tmp_path)[0]
    other = make_state(data, method="dense")
    with pytest.raises(CheckpointError, match="Expected a checkpoint of method 'dense'"):
        other.load_resume_state(load_checkpoint(path), path)
    wider = make_state(data)
    wider.model.backbone = nn.Conv2d(3, 4, 1)
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        wider.load_resume_state(load_checkpoint(path), path)


def test_signals_stop_after_the_step(data):
    state = make_state(data)
    with StopOnSignal() as stop:
        raise_at_3 = lambda s: os.kill(os.getpid(), signal.SIGINT) if s.step == 3 else None  # noqa: E731
        train(state, [raise_at_3, stop])
    assert state.step == 3
    assert stop.received == "SIGINT"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_log_forgets_what_a_resumed_run_repeats(data, tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", count_every=4)
    state = make_state(data)
    train(state, [log])
    log.close()
    lines = log.path.read_text().splitlines()
    assert len(lines) == 12
    assert "sparsity" in lines[3]
    assert "sparsity" not in lines[2]
    log.path.write_text("\n".join([*lines, '{"step": 13, "lo']))
    log.cut_after(7)
    assert log.path.read_text().splitlines() == lines[:7]


def test_a_users_network_trains_with_a_component_map(data):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)
            )
            self.depth = nn.Conv2d(8, 1, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"depth": self.depth(torch.relu(self.trunk(x)))}

    torch.manual_seed(0)
    parts = {"backbone": "trunk", "head:depth": "depth"}
    tasks = {"depth": make_task("depth", "depth", 1)}
    config = TrainConfig(steps=10, batch_size=2)
    method = AdapMTL(AdapMTLConfig(sparsity=0.5), parts)
    state = TrainState.create(Net(), tasks, data, method, config, parts)
    train(state)
    final = method.finalize(state.model)
    zeros = sum(int((m.weight == 0).sum()) for m in final.modules() if isinstance(m, nn.Conv2d))
    assert zeros == round(0.5 * sum(c.numel for c in state.components.values()))
    assert set(evaluate(final, tasks, data)) == {"depth"}


def test_wrong_outputs_are_explained(data):
    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 1, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.layer(x),)

    class Missing(Tuple):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"normals": self.layer(x)}

    tasks = {"depth": make_task("depth", "depth", 1)}
    for net, error, text in (
        (Tuple(), TypeError, "return a dict of task → Tensor, got tuple"),
        (Missing(), ValueError, r"a tensor for each of \['depth'\], got \['normals'\]"),
    ):
        state = TrainState.create(
            net, tasks, data, Dense(DenseConfig()), TrainConfig(steps=1, batch_size=1), {"all": ""}
        )
        with pytest.raises(error, match=text):
            train(state)


def test_constant_predictor_metrics_have_every_metric(data):
    tasks = {n: make_task(n, s.kind, s.channels) for n, s in data.spec.targets.items()}
    constant = evaluate_constant(tasks, data, data)
    model = make_state(data, method="dense").model
    assert {t: list(m) for t, m in evaluate(model, tasks, data).items()} == {
        t: list(m) for t, m in constant.items()
    }
    assert constant["depth"]["abs_err"] > 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "Expected steps >= 1, got 0"),
        ({"batch_size": 0}, "Expected batch_size >= 1"),
        ({"seed": -1}, r"Expected seed in \[0, 2\^63\), got -1"),
        ({"checkpoint_every": 0}, "Expected checkpoint_every >= 1"),
        ({"loss_weights": {"depth": float("nan")}}, r"loss_weights\['depth'\] >= 0"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_loss_weights_of_unknown_tasks_are_refused(data):
    with pytest.raises(ValueError, match=r"got unknown tasks \['keypoint'\]"):
        make_state(data, loss_weights={"keypoint": 1.0})


def test_unusable_devices_are_named():
    with pytest.raises(ValueError, match="Expected a usable device, got device='cuda:9'"):
        runtime.start(RuntimeConfig(device="cuda:9"), 0)
