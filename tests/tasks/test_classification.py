"""Classification: loss and accuracy by hand, the best constant, and shapes that do not fit."""

from __future__ import annotations

import math

import pytest
import torch

from sparsemtl.tasks import make_task

TASK = make_task("colour", "classification", 3)
TARGET = torch.tensor([0, 2, 1, 1]).view(4, 1, 1)
VALID = torch.tensor([True, True, True, False]).view(4, 1, 1)
SCORES = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [9.0, 0, 0]]).view(4, 3, 1, 1)


def test_loss_by_hand():
    """Right: log(e² + 2) - 2; wrong: log(e² + 2); the invalid sample counts nothing."""
    total = math.log(math.exp(2) + 2)
    expected = (2 * (total - 2) + total) / 3
    assert float(TASK.loss(SCORES, TARGET, VALID)) == pytest.approx(expected, rel=1e-6)


def test_no_valid_sample_gives_zero_and_no_gradient():
    scores = SCORES.clone().requires_grad_()
    loss = TASK.loss(scores, TARGET, torch.zeros_like(VALID))
    loss.backward()
    assert loss.item() == 0.0
    assert not scores.grad.any()


def test_accuracy_over_batches():
    metric = TASK.metrics()
    for part in (slice(0, 1), slice(1, 4)):
        metric.update(SCORES[part], TARGET[part], VALID[part])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
    assert TASK.higher_is_better == {"accuracy": True}
    empty = TASK.metrics()
    empty.update(SCORES, TARGET, torch.zeros_like(VALID))
    assert math.isnan(empty.compute()["accuracy"])


def test_the_best_constant_is_the_most_frequent_class():
    constant = TASK.constant_predictor([(TARGET, torch.ones_like(VALID))])
    prediction = constant(4, 96, 128)
    assert prediction.shape == (4, 3, 1, 1)
    metric = TASK.metrics()
    metric.update(prediction, TARGET, torch.ones_like(VALID))
    assert metric.compute()["accuracy"] == 0.5


def test_pictures_are_one_colour():
    labels = TASK.to_picture(TARGET[1], VALID[1])
    assert labels.shape == (1, 1, 3)
    same = TASK.to_picture(torch.tensor([0.0, 0.0, 5.0]).view(3, 1, 1).expand(3, 4, 5))
    assert same.shape == (4, 5, 3)
    assert (same == labels[0, 0]).all()


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.zeros(4, 3, 2, 2), TARGET, r"shape \[B, 3, 1, 1\].*model\.head=joint"),
        (SCORES, torch.zeros(4, 2, 2, dtype=torch.long), r"target of shape \[B, 1, 1\]"),
        (SCORES, TARGET + 1, r"labels in 0\.\.2, got 3 \(1 such samples\)"),
    ],
)
def test_what_does_not_fit_is_named(prediction, target, message):
    valid = torch.ones(target.shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        TASK.loss(prediction, target, valid)


def test_one_class_is_no_task():
    with pytest.raises(ValueError, match="channels ≥ 2 classes, got 1"):
        make_task("colour", "classification", 1)
