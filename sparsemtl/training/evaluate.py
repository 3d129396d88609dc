"""Every metric of every task over a data set, and the same for the best constant prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.training import distributed
from sparsemtl.training.batches import evaluation_batches
from sparsemtl.training.state import check_outputs, to_device

Metrics = dict[str, dict[str, float]]


def evaluate(
    model: nn.Module,
    tasks: Mapping[str, Any],
    dataset: Any,
    *,
    batch_size: int = 1,
    workers: int = 0,
) -> Metrics:
    """Task → metric → value, in fp32 and eval mode; the model's mode is restored."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _measure(lambda b: model(b.image), tasks, dataset, device, batch_size, workers)
    finally:
        model.train(was_training)


def evaluate_constant(
    tasks: Mapping[str, Any],
    train_set: Any,
    test_set: Any,
    *,
    batch_size: int = 1,
    workers: int = 0,
    limit: int = 256,
) -> Metrics:
    """The metrics of predicting each task's best constant, learned from `limit` training frames."""
    first = _First(train_set, limit)
    constants = {}
    for name, task in tasks.items():
        seen = evaluation_batches(first, batch_size, workers)
        with contextlib.suppress(ValueError):  # not one valid pixel: its metrics are NaN
            constants[name] = task.constant_predictor(
                (b.targets[name], b.valid[name]) for b in seen
            )
    with torch.no_grad():
        found = _measure(
            lambda batch: {
                name: constant(len(batch.image), *batch.image.shape[-2:])
                for name, constant in constants.items()
            },
            {name: tasks[name] for name in constants},
            test_set,
            torch.device("cpu"),
            batch_size,
            workers,
        )
    return {n: found[n] if n in found else t.metrics().compute() for n, t in tasks.items()}


class _First:
    """The first `limit` samples of a data set."""

    def __init__(self, dataset: Any, limit: int) -> None:
        self.dataset, self.limit = dataset, limit

    def __len__(self) -> int:
        return min(self.limit, len(self.dataset))

    def sample(self, index: int, epoch: int) -> Any:
        return self.dataset.sample(index, epoch)


def _measure(
    predict: Callable[[Any], Mapping[str, Tensor]],
    tasks: Mapping[str, Any],
    dataset: Any,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> Metrics:
    """Each process measures its part; torchmetrics joins the sums, so all get all of it."""
    metrics = {name: task.metrics().to(device) for name, task in tasks.items()}
    part = (distributed.rank(), distributed.size())
    for batch in evaluation_batches(dataset, batch_size, workers, part):
        batch = to_device(batch, device)
        outputs = predict(batch)
        check_outputs(outputs, list(tasks))
        for name, metric in metrics.items():
            metric.update(outputs[name].float(), batch.targets[name], batch.valid[name])
    return {name: metric.compute() for name, metric in metrics.items()}
