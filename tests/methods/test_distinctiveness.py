"""Distinctiveness: merging by hand, real shrinking, bit-exact resume, a network of one's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.data.scenes import CLASSIFICATION
from sparsemtl.methods import Distinctiveness, DistinctivenessConfig, OwnLoop
from sparsemtl.methods.unit_merging import (
    Patterns,
    cosines,
    merge_plan,
    merge_units,
    smallest_angle,
)
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.models.joint import HiddenLayer, JointClassifier
from sparsemtl.tasks import make_task
from sparsemtl.training import runtime
from sparsemtl.training.balance import BalanceConfig
from sparsemtl.training.callbacks import Checkpointer, every
from sparsemtl.training.checkpoint import checkpoints, load_checkpoint
from sparsemtl.training.evaluate import evaluate
from sparsemtl.training.loop import train
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.state import TrainConfig, TrainState


def layer(units: int, seed: int = 0) -> HiddenLayer:
    torch.manual_seed(seed)
    producer, readers = nn.Linear(5, units), (nn.Linear(units, 3), nn.Linear(units, 2))
    return HiddenLayer(producer, nn.BatchNorm1d(units), readers)


def outputs(hidden: HiddenLayer, units: torch.Tensor) -> torch.Tensor:
    return torch.cat([reader(units) for reader in hidden.readers], dim=1)


# --- merging by hand


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["similar", "opposed"])
def test_a_copy_of_a_unit_merges_without_a_trace(sign):
    hidden, h = layer(4), torch.randn(50, 4)
    h[:, 3] = sign * h[:, 1]
    before = outputs(hidden, h)
    weights = [r.weight.detach().clone() for r in hidden.readers]
    merge_units(hidden, Patterns.of(h), DistinctivenessConfig())
    assert hidden.size == hidden.norm.num_features == 3
    torch.testing.assert_close(outputs(hidden, h[:, :3]), before, rtol=1e-5, atol=1e-6)
    for reader, old in zip(hidden.readers, weights, strict=True):
        torch.testing.assert_close(reader.weight[:, 1], old[:, 1] + sign * old[:, 3])
        assert torch.equal(reader.weight[:, [0, 2]], old[:, [0, 2]])
        assert reader.in_features == 3


@pytest.mark.parametrize("degrees", [10.0, 29.0, 151.0, 175.0])
def test_equation_12_between(degrees):
    """h_x = (1, 0), h_y = (cos, sin): w_px ← w_px + w_py · cos, opposed or not."""
    hidden = layer(2)
    angle = math.radians(degrees)
    h = torch.tensor([[1.0, math.cos(angle)], [0.0, math.sin(angle)]])
    old = [r.weight.detach().clone() for r in hidden.readers]
    biases = [r.bias.detach().clone() for r in hidden.readers]
    merge_units(hidden, Patterns.of(h), DistinctivenessConfig())
    for reader, weight, bias in zip(hidden.readers, old, biases, strict=True):
        expected = weight[:, :1] + math.cos(angle) * weight[:, 1:]
        torch.testing.assert_close(reader.weight, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(reader.bias, bias)


@pytest.mark.parametrize(("degrees", "left"), [(29.9, 1), (30.1, 2), (149.9, 2), (150.1, 1)])
def test_the_threshold_is_thirty_degrees(degrees, left):
    hidden, angle = layer(2), math.radians(degrees)
    h = torch.tensor([[1.0, math.cos(angle)], [0.0, math.sin(angle)]])
    merge_units(hidden, Patterns.of(h), DistinctivenessConfig())
    assert hidden.size == left


def test_least_squares_keeps_outputs_for_unequal_norms_and_eq_12_does_not():
    h = torch.randn(40, 3)
    h[:, 2] = -3.0 * h[:, 0]
    for factor, same in (("least-squares", True), ("cosine", False)):
        hidden = layer(3)
        before = outputs(hidden, h)
        merge_units(hidden, Patterns.of(h), DistinctivenessConfig(factor=factor))
        assert torch.allclose(outputs(hidden, h[:, :2]), before, atol=1e-5) is same


def test_centred_patterns_leave_their_means_to_the_biases():
    """h_y = 1 - h_x: opposed once centred, at an acute angle as they are."""
    h = torch.rand(60, 3)
    h[:, 2] = 1.0 - h[:, 1]
    hidden = layer(3)
    before = outputs(hidden, h)
    merge_units(hidden, Patterns.of(h), DistinctivenessConfig(activations="centred"))
    assert hidden.size == 2
    torch.testing.assert_close(outputs(hidden, h[:, :2]), before, rtol=1e-4, atol=1e-5)
    raw = cosines(Patterns.of(h).second_moments(centred=False))
    assert 0.0 < float(raw[1, 2]) < math.cos(math.radians(30))


def test_a_unit_that_is_always_zero_goes_and_one_always_stays():
    h = torch.randn(20, 3)
    h[:, 1] = 0.0
    hidden = layer(3)
    before = outputs(hidden, h)
    merge_units(hidden, Patterns.of(h), DistinctivenessConfig(theta=0.0))
    assert hidden.size == 2
    torch.testing.assert_close(outputs(hidden, h[:, [0, 2]]), before)
    hidden = layer(3)
    merge_units(hidden, Patterns.of(torch.zeros(5, 3)), DistinctivenessConfig())
    assert hidden.size == 1


def test_orders_and_appetite():
    """Directions 0°, 20°, 25°: the closest pair is (1, 2); by index it is (0, 1)."""
    angles = torch.tensor([0.0, 20.0, 25.0]).deg2rad()
    moments = Patterns.of(torch.stack([angles.cos(), angles.sin()])).second_moments(False)

    def removed(**options):
        return [(y, x) for y, x, _ in merge_plan(moments, DistinctivenessConfig(**options))]

    assert removed() == [(2, 1), (1, 0)]
    assert removed(order="index") == [(1, 0), (2, 0)]
    assert removed(absorb="once") == [(2, 1)]
    assert removed(order="index", absorb="once") == [(1, 0)]
    assert removed(smallest=2) == [(2, 1)]


def test_the_smallest_angle_counts_opposed_units_as_alike():
    h = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, 1.0]])
    found = smallest_angle(Patterns.of(h), DistinctivenessConfig())
    assert found == pytest.approx(45.0)


# --- in training


@pytest.fixture(scope="module")
def data():
    config = ScenesConfig(height=32, width=40, frames_train=8, frames_test=6)
    return build_dataset(config, "train", CLASSIFICATION)


def make_state(data, steps: int = 6, hidden: int = 24, train_options=None, **options) -> TrainState:
    config = TrainConfig(
        steps=steps,
        batch_size=4,
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=5e-3),
        runtime=RuntimeConfig(device="cpu"),
        **(train_options or {}),
    )
    runtime.start(config.runtime, config.seed)
    tasks = {n: make_task(n, s.kind, s.channels) for n, s in data.spec.targets.items()}
    shape = ModelConfig("vgg11", width=0.125, head="joint", hidden=hidden)
    model = build_model(shape, {n: t.channels for n, t in tasks.items()})
    method = Distinctiveness(DistinctivenessConfig(**options))
    return TrainState.create(model, tasks, data, method, config)


@pytest.mark.parametrize("patterns", ["pass", "epoch", "batch"])
def test_the_layer_shrinks_at_epochs_ends_and_the_optimizer_follows(data, patterns):
    state = make_state(data, theta=60.0, patterns=patterns)
    sizes: list[int] = []
    train(state, [lambda s: sizes.append(s.model.hidden_layer().size)])
    assert sizes[0] == 24  # not before the end of the first epoch, which has two steps
    assert sizes[1] < 24
    assert sizes[5] <= sizes[3] <= sizes[1]
    assert state.method.sizes == [24, *sizes[1::2]]
    model = state.model
    for module, name in ((model.joint, "weight"), (model.norm, "bias")):
        parameter = getattr(module, name)
        assert len(parameter) == sizes[-1]
        assert state.optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    for head in model.heads.values():
        assert head.weight.shape[1] == head.in_features == sizes[-1]
        assert state.optimizer.state[head.weight]["exp_avg_sq"].shape == head.weight.shape
    finished = state.method.finalize(model)
    found = evaluate(finished, state.tasks, data)
    assert set(found) == set(CLASSIFICATION)
    assert not finished.heads["camera_pose"]._forward_pre_hooks


@pytest.mark.parametrize(
    "options",
    [
        {"theta": 60.0},
        {"theta": 60.0, "patterns": "epoch", "activations": "centred"},
        {"theta": 60.0, "train_options": {"mining": 0.7, "balance": BalanceConfig("pcgrad")}},
    ],
    ids=["pass", "epoch", "mining and PCGrad"],
)
def test_resuming_at_any_step_gives_the_same_bits(data, tmp_path, options):
    whole = make_state(data, **options)
    train(whole, [every(1, Checkpointer(tmp_path, keep=100))])
    assert whole.method.sizes[-1] < 24
    for path in checkpoints(tmp_path)[:-1]:
        again = make_state(data, **options)
        again.load_resume_state(load_checkpoint(path), path)
        train(again)
        assert again.method.sizes == whole.method.sizes
        for (name, a), b in zip(
            whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), (path.name, name)


def test_a_warm_up_comes_before_the_first_merging(data):
    state = make_state(data, theta=60.0, warmup=2)
    train(state)
    first, second, third, last = state.method.sizes
    assert first == second == third == 24
    assert last < 24


def test_patterns_are_those_of_training_and_leave_nothing_behind(data):
    """Running statistics far off, as early in training, change no angle and are not touched."""
    found = []
    for offset in (0.0, 50.0):
        state = make_state(data)
        state.model.train()
        state.model.norm.running_mean.fill_(offset)
        before = {k: v.clone() for k, v in state.model.state_dict().items()}
        patterns = state.method._pass(state)
        assert all(torch.equal(before[k], v) for k, v in state.model.state_dict().items())
        assert all(module.training for module in state.model.modules())
        assert float(patterns.samples) == 8
        found.append(patterns.gram)
    assert torch.equal(*found)


class Own(nn.Module):
    """A user's network with other names, and no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        self.left, self.right = nn.Linear(16, 2), nn.Linear(16, 3, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        units = self.encoder(x)
        return {"left": self.left(units), "right": self.right(units)}


def test_a_network_and_a_loop_of_ones_own():
    torch.manual_seed(0)
    model, x = Own(), torch.randn(32, 4)
    method = Distinctiveness(
        DistinctivenessConfig(theta=40.0, hidden="encoder.0", readers=("left", "right"))
    )
    method.prepare(model, 3)
    optimizer = torch.optim.Adam(method.parameter_groups(model)[0]["params"])
    state = OwnLoop(
        model, optimizer, lambda b: {k: v.square().mean() for k, v in model(b).items()}, [x]
    )
    for _ in range(3):
        method.on_forward(state)
        optimizer.zero_grad()
        sum(state.losses(x).values()).backward()
        optimizer.step()
        state.step += 1
        method.on_step(state)
    assert len(method.sizes) == 4
    assert model.encoder[0].out_features == model.left.in_features == method.sizes[-1] < 16


def test_what_cannot_be_pruned_is_named():
    dense = build_model(ModelConfig("deeplab-resnet18", width=0.125), {"depth": 1})
    with pytest.raises(ValueError, match=r"joint hidden layer \(model.head=joint"):
        Distinctiveness(DistinctivenessConfig()).prepare(dense, 1)
    with pytest.raises(ValueError, match=r"'encodr\.0'"):
        Distinctiveness(DistinctivenessConfig(hidden="encodr.0")).prepare(Own(), 1)
    with pytest.raises(TypeError, match="'encoder' to be a Linear, got Sequential"):
        Distinctiveness(DistinctivenessConfig(hidden="encoder")).prepare(Own(), 1)
    with pytest.raises(ValueError, match="readers of 16 units, got none"):
        Distinctiveness(DistinctivenessConfig(hidden="encoder.0")).prepare(Own(), 1)
    with pytest.raises(ValueError, match=r"theta in \[0, 90\) degrees, got 90"):
        DistinctivenessConfig(theta=90.0)
    with pytest.raises(ValueError, match=r"'centered'.*Did you mean 'centred'"):
        DistinctivenessConfig(activations="centered")
    hidden, h = layer(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    bare = HiddenLayer(hidden.producer, None, (nn.Linear(2, 1, bias=False),))
    with pytest.raises(ValueError, match="readers with a bias for centred"):
        merge_units(bare, Patterns.of(h), DistinctivenessConfig(activations="centred"))
    assert isinstance(
        build_model(ModelConfig("vgg11", width=0.125, head="joint"), {"a": 2}), JointClassifier
    )
