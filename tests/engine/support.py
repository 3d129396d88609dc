"""Comparing engines with the models that they come from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsemtl.engine.capture import capture
from sparsemtl.engine.executors.torch import TorchExecutor
from sparsemtl.engine.graph import Graph

RELATIVE = 1e-4  # of the largest value of a task: the promise of the engine in float32


def expected_of(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        found = model(*inputs)
    return found if isinstance(found, dict) else {"output": found}


def assert_close_tasks(
    found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = RELATIVE
) -> None:
    """Same tasks in order, shapes, dtypes; values within `relative` of the largest of the task."""
    assert list(found) == list(expected)
    for task, value in expected.items():
        assert found[task].shape == value.shape, task
        assert found[task].dtype == value.dtype, task
        error = (found[task] - value).abs().max()
        assert bool(error <= relative * value.abs().max()), (task, float(error))


def captured(model: nn.Module, *inputs: Tensor) -> Graph:
    return capture(model.eval(), list(inputs))


def run(graph: Graph, *inputs: Tensor) -> dict[str, Tensor]:
    graph.validate()
    return TorchExecutor(graph)(*inputs)


def randomise(model: nn.Module, sparsity: float, *, seed: int = 0, dead: float = 0.0) -> nn.Module:
    """Weights and statistics as after training and pruning, scaled so that signals survive.

    sparsity: share of zero weights of each layer   dead: share of whole filters that are zero
    """
    generator = torch.Generator().manual_seed(seed)

    def random(shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = module.weight
                fan_in = weight[0].numel() * max(1.0 - sparsity, 0.02)
                weight.copy_((2 * random(weight.shape) - 1) * (6 / fan_in) ** 0.5)
                weight.mul_(random(weight.shape) >= sparsity)
                rows = random(weight.shape[:1]) < dead
                weight[rows] = 0
                if module.bias is not None:
                    module.bias.copy_(random(module.bias.shape) - 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(random(module.running_mean.shape) - 0.5)
                module.running_var.copy_(random(module.running_var.shape) + 0.5)
                module.weight.copy_(random(module.weight.shape) + 0.5)
                module.bias.copy_(random(module.bias.shape) - 0.5)
    return model.eval()
