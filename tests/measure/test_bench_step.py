"""`bench step`: its splits, its gate and its rows, on a small network."""

from __future__ import annotations

import os

import pytest
import torch

from sparsemtl.measure import bench_step
from sparsemtl.measure.bench_step import (
    FixedSplit,
    StepSetup,
    check_step,
    fresh_choices,
    make_state,
    measure_step,
)
from sparsemtl.measure.pruned import (
    ADAPMTL_SPLIT,
    build,
    magnitude_masks,
    parse_prune,
    parse_tasks,
    prune,
)
from sparsemtl.measure.rows import WrongResult
from sparsemtl.models import config as models
from sparsemtl.ops.availability import why_not_native
from sparsemtl.sparsity import choice, passes
from sparsemtl.sparsity.mask import kept_count

TASKS = {"segmentation": 5, "normals": 3, "depth": 1}
native = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")


@pytest.fixture
def setup(monkeypatch):
    """A network of a hundredth of the weights under the registry's name."""
    small = lambda _, tasks: models.build_model(  # noqa: E731
        models.ModelConfig("deeplab-resnet18", width=0.1), tasks
    )
    monkeypatch.setattr("sparsemtl.measure.pruned.build_model", small)
    return StepSetup("deeplab-resnet34", TASKS, (49, 41))


def test_tasks_and_splits_are_read():
    assert parse_tasks("--tasks", "segmentation:40, depth:1") == {"segmentation": 40, "depth": 1}
    assert parse_prune("--prune", "adapmtl-split", TASKS) == ADAPMTL_SPLIT
    assert parse_prune("--prune", "0.9", {"depth": 1}) == {"backbone": 0.9, "head:depth": 0.9}
    pairs = parse_prune("--prune", "head:depth=0.5", TASKS)
    assert pairs["head:depth"] == 0.5
    assert pairs["backbone"] == 0.0


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (parse_tasks, "segmentation", "Expected --x like segmentation:40"),
        (parse_tasks, "depth:0", "got 'depth:0'"),
        (parse_tasks, "a:1,a:2", "each task once"),
        (parse_tasks, "", "got ''"),
    ],
)
def test_bad_tasks_are_refused(read, text, message):
    with pytest.raises(ValueError, match=message):
        read("--x", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.0", r"Expected --x in \[0, 1\)"),
        ("nan", r"Expected --x in \[0, 1\)"),
        ("dense", "Expected --x to be a fraction of zeros, adapmtl-split or pairs"),
        ("backbones=0.5", "Did you mean 'backbone'"),
        ("backbone=x", "got 'backbone=x'"),
    ],
)
def test_bad_splits_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_prune("--x", text, TASKS)


def test_the_published_split_needs_its_tasks():
    with pytest.raises(ValueError, match="head:edges"):
        parse_prune("--prune", "adapmtl-split", {"edges": 1})


@pytest.mark.parametrize("across_layers", [False, True])
def test_masks_keep_the_largest_exactly(setup, across_layers):
    split = {"backbone": 0.7, "head:segmentation": 0.9, "head:normals": 0.0, "head:depth": 0.99}
    model = build(setup.model, TASKS)
    found = magnitude_masks(model, split, across_layers=across_layers)
    for component, masks in zip(model.components().values(), found, strict=True):
        pairs = list(zip(component.weights, masks, strict=True))
        for part in [pairs] if across_layers else [[pair] for pair in pairs]:
            numel = sum(w.numel() for w, _ in part)
            assert sum(int((~m).sum()) for _, m in part) == numel - kept_count(
                numel, split[component.name]
            )
            kept = torch.cat([w[m].abs() for w, m in part])
            lost = torch.cat([w[~m].abs() for w, m in part])
            assert min(lost.numel(), kept.numel()) == 0 or lost.max() <= kept.min()
    masks = magnitude_masks(model, split)
    pruned = prune(build(setup.model, TASKS), split)
    for component, group in zip(pruned.components().values(), masks, strict=True):
        for weight, mask in zip(component.weights, group, strict=True):
            assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("open_mask", [False, True])
def test_a_state_has_the_split_that_was_asked_for(setup, open_mask):
    split = parse_prune("--prune", "0.8", TASKS)
    state = make_state(setup, split, open_mask)
    sparsity = state.model.sparsity
    assert sparsity.frozen is not open_mask
    assert isinstance(state.method, FixedSplit)
    for group, name in enumerate(sparsity.group_names):
        weights = sparsity.weights(group)
        dead = sum(sparsity.dead_count(group, i) for i in range(len(weights)))
        assert dead / sum(w.numel() for w in weights) == pytest.approx(0.8, abs=2e-3), name


@native
@pytest.mark.parametrize("kind", ["fixed", "open"])
def test_rows_compare_dense_and_sparse_steps(setup, kind):
    splits = {"0.9": parse_prune("--prune", "0.9", TASKS)}
    (row,) = measure_step(setup, splits, [kind], rounds=2, warmup=1, with_masked=True)
    assert row["mask"] == kind
    assert row["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert row["dense_path"] in bench_step.DENSE
    assert row["dense_ms"] == row["medians_ms"][row["dense_path"]]
    assert set(row["medians_ms"]) == {*bench_step.DENSE, "masked", "sparse"}
    assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"], rel=1e-3)
    assert row["layer_shapes"] > 0


@native
def test_the_gate_sees_a_wrong_pass(setup, monkeypatch):
    split = parse_prune("--prune", "0.9", TASKS)

    monkeypatch.setattr(choice, "measure", lambda *_: choice.SPARSE)
    with fresh_choices():
        assert check_step(setup, split, False) < 1e-5
    right = passes.sparse_conv2d_grads

    def wrong(*args):
        grad_x, grad_weight = right(*args)
        return grad_x, None if grad_weight is None else grad_weight * 1.01

    monkeypatch.setattr(passes, "sparse_conv2d_grads", wrong)
    with fresh_choices(), pytest.raises(WrongResult, match="the gradient of"):
        check_step(setup, split, False)
    forward = passes.sparse_conv2d_values
    monkeypatch.setattr(passes, "sparse_conv2d_values", lambda *a: forward(*a) * 1.01)
    with fresh_choices(), pytest.raises(WrongResult, match="Expected losses within"):
        check_step(setup, split, False)


def test_choices_of_a_bench_are_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "CHOICES", choice.Choices())
    choice.CHOICES.keep("a", passes.DENSE)
    with fresh_choices():
        assert choice.CHOICES.find("a") is None
        choice.CHOICES.keep("a", passes.PassChoice(True, True, True))
    assert choice.CHOICES.find("a") == passes.DENSE
    assert os.environ["SPARSEMTL_CACHE"] == str(tmp_path)
