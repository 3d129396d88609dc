"""Saliency by hand on two layers, duplicates, memory, and what cannot be scored."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.data.base import MultitaskSample
from sparsemtl.data.copies import with_copies
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.similarity import (
    METRICS,
    SeedRecord,
    SimilarityConfig,
    saliency,
    score_seed,
    similarity_matrix,
)
from sparsemtl.tasks import make_task

DEPTH = make_task("depth", "depth", 1)


class Tiny(nn.Module):
    """1x1 convolutions: a backbone [3 → 2] and a head [2 → 1] per task."""

    def __init__(self, *tasks: str, bypass: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 2, 1, bias=False)
        self.tails = nn.ModuleDict({t: nn.Conv2d(3 if bypass else 2, 1, 1) for t in tasks})
        self.bypass = bypass

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x if self.bypass else self.body(x)
        return {name: tail(y) for name, tail in self.tails.items()}

    def components(self) -> dict[str, str]:
        return {"backbone": "body", **{f"head:{t}": f"tails.{t}" for t in self.tails}}


def batch(image: list[float], depth: float, valid: bool = True) -> MultitaskSample:
    return MultitaskSample(
        torch.tensor(image).view(1, 3, 1, 1),
        {"depth": torch.full((1, 1, 1, 1), depth)},
        {"depth": torch.full((1, 1, 1), valid)},
        torch.tensor([0]),
    )


def test_scores_by_hand():
    """L = |v·(Wx) + b - d|, so |w_ij · ∂L/∂w_ij| = |w_ij · v_i · x_j| and |v_i · (Wx)_i|."""
    net = Tiny("depth")
    weights, tail = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]), torch.tensor([2.0, -1.0])
    with torch.no_grad():
        net.body.weight.copy_(weights.view(2, 3, 1, 1))
        net.tails["depth"].weight.copy_(tail.view(1, 2, 1, 1))
        net.tails["depth"].bias.zero_()
    images = [[1.0, 2.0, -1.0], [0.5, 0.0, 4.0]]
    found = saliency(net, DEPTH, [batch(x, 100.0) for x in images], (0.5,), init="own")
    x = torch.tensor(images)
    body = sum((weights * tail[:, None] * row).abs() for row in x)
    head = sum((tail * (weights @ row)).abs() for row in x)
    assert list(found.scores) == ["body"]
    torch.testing.assert_close(found.scores["body"].view(2, 3), body)
    assert found.total == pytest.approx(float(body.sum() + head.sum()))
    assert found.numel == 8
    # half of all eight scores, the head's included, decides what the backbone keeps
    cut = torch.cat([body.flatten(), head]).sort(descending=True).values[3]
    assert torch.equal(found.masks(0.5)["body"].view(2, 3), body >= cut)
    assert net.body.weight.grad is None
    assert net.body.weight.requires_grad


def test_many_exact_zeros_do_not_keep_everything():
    net = Tiny("depth")
    found = saliency(net, DEPTH, [batch([1.0, 0.0, 0.0], 9.0)], (0.75,), seed=3)
    assert int((found.scores["body"] == 0).sum()) == 4
    # 6 of 8: the head's two, two of the body, and of its zeros the first two
    assert found.masks(0.75)["body"].flatten().tolist() == [True] * 4 + [False] * 2
    few = saliency(net, DEPTH, [batch([1.0, 0.0, 0.0], 9.0)], (0.625,), seed=3).masks(0.625)
    assert int(few["body"].sum()) == 3


def test_the_network_is_left_as_it_was():
    net = Tiny("depth")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    saliency(net, DEPTH, [batch([1.0, 2.0, 3.0], 5.0)])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("net", "batches"),
    [
        (Tiny("depth", bypass=True), [batch([1.0, 2.0, 3.0], 5.0)]),
        (Tiny("depth"), [batch([1.0, 2.0, 3.0], 5.0, valid=False)]),
    ],
    ids=["the head does not use it", "no valid pixel"],
)
def test_a_task_without_gradient_in_the_backbone_is_refused(net, batches):
    with pytest.raises(ValueError, match="'depth' to reach the backbone, got no gradient"):
        saliency(net, DEPTH, batches)


def test_bad_arguments_are_named():
    net, good = Tiny("depth"), [batch([1.0, 2.0, 3.0], 5.0)]
    with pytest.raises(ValueError, match="Expected components"):
        saliency(Tiny("normals"), DEPTH, good)
    with pytest.raises(ValueError, match=r"keep_ratios in \(0, 1\], got 1.5"):
        saliency(net, DEPTH, good, (1.5,))
    with pytest.raises(ValueError, match=r"'xaver'.*Did you mean 'xavier'"):
        saliency(net, DEPTH, good, init="xaver")
    with pytest.raises(ValueError, match="finite loss of task 'depth', got inf in batch 1"):
        saliency(_huge(), DEPTH, [*good, batch([1e38, 1e38, 1e38], 5.0)], init="own")


def _huge() -> Tiny:
    net = Tiny("depth")
    with torch.no_grad():
        net.body.weight.fill_(2.0)
        net.tails["depth"].weight.fill_(2.0)
    return net


# --- on scenes


@pytest.fixture(scope="module")
def scenes():
    return build_dataset(ScenesConfig(height=32, width=40, frames_train=6), "train")


def fresh(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    channels = {"segmentation": 13, "normals": 3}.get(name, 1)
    return build_model(ModelConfig("deeplab-resnet18", width=0.125), {name: channels})


@pytest.fixture(scope="module")
def with_a_duplicate(scenes):
    names = ["segmentation", "normals", "depth", "again"]
    data = with_copies(scenes, {"again": "depth"}, names)
    tasks = {n: make_task(n, s.kind, s.channels) for n, s in data.spec.targets.items()}
    config = SimilarityConfig(seeds=(0, 1), batches=2, batch_size=2)
    return [score_seed(fresh, tasks, data, config, seed) for seed in config.seeds]


@pytest.mark.parametrize("weights", ["equal", "linear", "sparsity"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_duplicate_of_a_task_is_its_nearest(with_a_duplicate, metric, weights):
    mean, std = similarity_matrix(with_a_duplicate, metric, weights)
    pairs = {(a, b): mean[a, b] for a in range(4) for b in range(a + 1, 4)}
    assert pairs.pop((2, 3)) == pytest.approx(1.0, abs=1e-12)
    assert max(pairs.values()) < 1.0 - 1e-6
    assert mean[0, 2] == mean[0, 3]  # the duplicate is to the others what the task is
    assert std[2, 3] == pytest.approx(0.0, abs=1e-12)
    assert std[0, 1] > 0


def test_a_record_survives_json(with_a_duplicate):
    record = with_a_duplicate[0]
    again = SeedRecord.from_json(record.to_json())
    for metric in METRICS:
        for indexing in ("layer", "filter"):
            expected = similarity_matrix([record], metric, "linear", indexing)[0]
            assert (similarity_matrix([again], metric, "linear", indexing)[0] == expected).all()
    assert again.layers == record.layers
    with pytest.raises(ValueError, match="complete record"):
        SeedRecord.from_json({"seed": 0})


def test_a_pair_does_not_depend_on_the_company(scenes, with_a_duplicate):
    tasks = {n: make_task(n, *_kind(scenes, n)) for n in ("segmentation", "depth")}
    config = SimilarityConfig(seeds=(0,), batches=2, batch_size=2)
    record = score_seed(fresh, tasks, scenes, config, 0)
    for metric in METRICS:
        alone, among = (similarity_matrix(r, metric)[0] for r in ([record], with_a_duplicate[:1]))
        assert alone[0, 1] == pytest.approx(among[0, 2], abs=1e-12)


def test_the_backbone_keeps_its_share_and_layers_stay_in_order(with_a_duplicate):
    record = with_a_duplicate[0]
    assert record.layers[0] == "backbone.stem.0"
    assert [name.split(".")[1] for name in record.layers[-3:]] == ["shortcuts"] * 3
    assert (record.kept <= record.numel).all()
    assert (record.kept[1:] <= record.kept[:-1]).all()  # sparser keeps less, layer by layer
    assert record.iou_profile.shape == (6, len(record.layers))


def _kind(data, name):
    spec = data.spec.targets[name]
    return spec.kind, spec.channels


def test_one_task_repeated_seeds_and_unlike_backbones_are_refused(scenes):
    depth = {"depth": DEPTH}
    with pytest.raises(ValueError, match=r"at least two tasks to compare, got \['depth'\]"):
        score_seed(fresh, depth, scenes, SimilarityConfig(), 0)
    with pytest.raises(ValueError, match="seeds without repetition"):
        SimilarityConfig(seeds=(0, 1, 0))
    with pytest.raises(ValueError, match="at least one of seeds"):
        SimilarityConfig(seeds=())
    with pytest.raises(ValueError, match=r"sparsity in \(0, 1\), got 1.0"):
        SimilarityConfig(sparsities=(0.5, 1.0))

    def unlike(name: str, seed: int) -> nn.Module:
        kind = "deeplab-resnet18" if name == "depth" else "mobilenetv2"
        return build_model(ModelConfig(kind, width=0.125), {name: 1})

    tasks = {**depth, "edges": make_task("edges", "edges", 1)}
    with pytest.raises(ValueError, match="backbone of 'depth', got another for 'edges'"):
        score_seed(unlike, tasks, scenes, SimilarityConfig(batches=1, batch_size=2), 0)


# --- memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that ops made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


class Deep(nn.Module):
    """Many equal layers whose weights are far larger than their activations."""

    LAYERS, WIDTH = 24, 256

    def __init__(self, task: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, self.WIDTH, 8, stride=8),
            *(nn.Conv2d(self.WIDTH, self.WIDTH, 1) for _ in range(self.LAYERS)),
        )
        self.tail = nn.Conv2d(self.WIDTH, 1, 1)
        self.task = task

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.task: self.tail(self.body(x))}

    def components(self) -> dict[str, str]:
        return {"backbone": "body", f"head:{self.task}": "tail"}


def test_memory_stays_near_one_gradient_copy_per_task(scenes):
    """Scores of T tasks, and a few layers on top: never a whole gradient beside them."""
    names = ["depth", "keypoints", "edges"]
    tasks = {n: make_task(n, *_kind(scenes, n)) for n in names}
    config = SimilarityConfig(seeds=(0,), batches=1, batch_size=1, sparsities=(0.9,))
    networks = {n: Deep(n) for n in names}  # built before: parameters are not the scorer's
    with LiveBytes() as live:
        score_seed(lambda name, seed: networks[name], tasks, scenes, config, 0)
    copy = sum(4 * w.numel() for w in networks["depth"].parameters())
    assert live.peak > 2.9 * copy  # the count sees the scores
    assert live.peak < 3.5 * copy
