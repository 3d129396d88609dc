"""The state of a training run: all that a step reads and changes, and all that resuming needs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparsemtl.errors import CheckpointError
from sparsemtl.methods.base import Method
from sparsemtl.models.component import Component, find_components
from sparsemtl.sparsity.choice import CHOICES
from sparsemtl.sparsity.mask import check_sparsity
from sparsemtl.sparsity.sparsify import Sparsity
from sparsemtl.training import distributed, runtime
from sparsemtl.training.balance import Balance, BalanceConfig
from sparsemtl.training.batches import training_batches
from sparsemtl.training.checkpoint import check_same_model
from sparsemtl.training.fast import Call, fast_forward
from sparsemtl.training.mining import hardest
from sparsemtl.training.optim import OptimConfig, build_optimizer, build_schedule
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.weighting import Weighting, WeightingConfig, build_weighting


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, balance and bookkeeping of a run."""

    steps: int = 20_000
    batch_size: int = 16
    seed: int = 0
    loss_weights: Mapping[str, float] = field(default_factory=dict)  # λ per task; 1 if not named
    weighting: WeightingConfig | None = None  # None: the method's own
    balance: BalanceConfig | None = None  # combine the tasks' gradients by a rule, not a sum
    mining: float = 1.0  # learn from this share of a batch, its hardest samples; 1: from all
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint_every: int | None = None  # steps; None: a tenth of the schedule, at most 1 000
    evaluate_every: int | None = None  # steps; None: only at the end
    log_every: int | None = None  # steps between sparsity counts; None: 200 times a run

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: Expected {name} >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"TrainConfig: Expected seed in [0, 2^63), got {self.seed}")
        for name in ("checkpoint_every", "evaluate_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"TrainConfig: Expected {name} >= 1 or None, got {value}")
        if not 0.0 < self.mining <= 1.0:
            raise ValueError(f"TrainConfig: Expected mining in (0, 1], got {self.mining}")
        for task, weight in self.loss_weights.items():
            if not weight >= 0.0:
                raise ValueError(f"TrainConfig: Expected loss_weights[{task!r}] >= 0, got {weight}")


@dataclass
class TrainState:
    """One run. Build it with `TrainState.create`; `train` moves it to its last step."""

    config: TrainConfig
    model: nn.Module
    tasks: Mapping[str, Any]  # name → sparsemtl.tasks.Task, in order
    dataset: Any
    method: Method
    optimizer: Optimizer
    schedule: LambdaLR
    weighting: Weighting
    components: Mapping[str, Component]
    device: torch.device
    balance: Balance | None = None
    fast: Call | None = None  # what a step calls in place of the model
    batch: Any = None  # of the step under way
    step: int = 0  # finished steps
    seconds: float = 0.0  # of training, over all sessions
    losses: dict[str, float] = field(default_factory=dict)  # of the last step, per task
    factors: dict[str, float] = field(default_factory=dict)  # of the last step, per task
    total: float = 0.0  # the loss that was minimised
    pruning: dict[str, Any] = field(default_factory=dict)  # sparsity and thresholds, last counted
    gradient_norm: float | None = None  # before clipping; None if not clipping
    last_checkpoint: Path | None = None
    stop_requested: bool = False

    @classmethod
    def create(
        cls,
        model: nn.Module,
        tasks: Mapping[str, Any],
        dataset: Any,
        method: Method,
        config: TrainConfig,
        components: Mapping[str, Any] | None = None,
    ) -> TrainState:
        """Set a run up: seeds are the caller's (`runtime.start`), as they decide the model's init.

        model:      forward([B, 3, H, W]) → dict[task, Tensor]
        components: a component map, for a model without `components()`
        """
        check_sparsity(method.name, "sparsity", method.sparsity_target)
        unknown = [t for t in config.loss_weights if t not in tasks]
        if unknown:
            raise ValueError(
                f"TrainState: Expected loss_weights for {list(tasks)}, got unknown tasks {unknown}"
            )
        _check_batch(config)
        device = next(model.parameters()).device
        adapted = method.adapt(model, list(tasks))
        # A map names modules of the network that was given; another one knows its own.
        found = find_components(adapted, components if adapted is model else None)
        model = adapted
        method.prepare(model, config.steps)
        sparsity = getattr(model, "sparsity", None)
        if isinstance(sparsity, Sparsity):
            sparsity.sparse_kernels = config.runtime.sparse_kernels
            if sparsity.sparse_kernels:
                sparsity.lay_out_for_kernels()
        weighting = build_weighting(
            config.weighting or WeightingConfig(method.default_weighting),
            list(tasks),
            config.steps,
            backbone_to_heads(found),
            config.loss_weights,
            epoch=-(-len(dataset) // config.batch_size),
        )
        groups = method.parameter_groups(model)
        if learned := weighting.parameters():
            groups.append({"params": learned, "weight_decay": 0.0})
        optimizer = build_optimizer(config.optim, groups, sparsity)
        runtime.part_streams(config.seed)
        return cls(
            config=config,
            model=model,
            tasks=dict(tasks),
            dataset=dataset,
            method=method,
            optimizer=optimizer,
            schedule=build_schedule(config.optim, optimizer, config.steps, method.schedule_step),
            weighting=weighting,
            components=found,
            device=device,
            balance=Balance(config.balance, config.seed) if config.balance else None,
            fast=fast_forward(model, config.runtime, config.balance is not None),
        )

    @property
    def total_steps(self) -> int:
        return self.config.steps

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset) // self.config.batch_size)

    def loss_weight(self, task: str) -> float:
        return float(self.config.loss_weights.get(task, 1.0))

    def batches(self, workers: int | None = None) -> Iterator[Any]:
        """This process's part of the batches from the present step to the last.

        workers: other than the run's own
        """
        return self._batches(self.step, self.config.steps, workers)

    def scoring_batches(self, count: int) -> Iterator[Any]:
        """This process's part of the first `count` batches of the run."""
        return self._batches(0, count, 0)

    def _batches(self, start: int, stop: int, workers: int | None) -> Iterator[Any]:
        config = self.config
        return training_batches(
            self.dataset,
            config.batch_size,
            config.seed,
            start,
            stop,
            config.runtime.workers if workers is None else workers,
            part=(distributed.rank(), distributed.size()),
        )

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        distributed.average(tensors)

    def forward(self, batch: Any, *, fast: bool = False) -> dict[str, Tensor]:
        """Per-task losses of one batch, scalars with gradient: of its hardest samples if mining.

        fast:   as the run's `compile` and `cuda_graph` say; of a graph one gradient can be taken
        raises: TypeError or ValueError if the model does not return one tensor per task.
        """
        batch = to_device(batch, self.device)
        with runtime.autocast(self.device, self.config.runtime.precision):
            outputs = (self.fast or self.model)(batch.image) if fast else self.model(batch.image)
        check_outputs(outputs, list(self.tasks))
        if self.config.mining < 1.0:
            each = {
                name: self._sample_losses(name, outputs[name].float(), batch) for name in self.tasks
            }
            weights = {name: self.loss_weight(name) for name in self.tasks}
            return hardest(each, self.config.mining, weights)
        return {
            name: task.loss(outputs[name].float(), batch.targets[name], batch.valid[name])
            for name, task in self.tasks.items()
        }

    def _sample_losses(self, name: str, output: Tensor, batch: Any) -> Tensor:
        """[B]: one task's loss of each sample; 0 for a sample without a valid pixel."""
        task, target, valid = self.tasks[name], batch.targets[name], batch.valid[name]
        places = [slice(i, i + 1) for i in range(len(output))]
        return torch.stack([task.loss(output[i], target[i], valid[i]) for i in places])

    def resume_state(self) -> dict[str, Any]:
        """Everything a bit-exact continuation needs, as tensors and plain values."""
        return {
            "step": self.step,
            "samples": len(self.dataset),
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "method_name": self.method.name,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "weighting": self.weighting.state_dict(),
            "choices": CHOICES.state_dict(),
            "ranks": distributed.gather(runtime.rng_state()),
        }

    def load_resume_state(self, state: Mapping[str, Any], path: Path) -> None:
        """Continue from a checkpoint.   raises: CheckpointError if it is of another run's model."""
        if state["method_name"] != self.method.name:
            raise CheckpointError(
                f"{path}: Expected a checkpoint of method {self.method.name!r}, "
                f"got one of {state['method_name']!r}"
            )
        try:
            self.method.before_load(self.model, self.optimizer, state["method"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{path} is a checkpoint of another run: {error}") from error
        check_same_model(path, self.model.state_dict(), state["model"])
        if state["samples"] != len(self.dataset):
            raise CheckpointError(
                f"{path}: Expected the {state['samples']} training samples that the run began "
                f"with, got {len(self.dataset)}: the data set has changed"
            )
        if len(state["ranks"]) != distributed.size():
            raise CheckpointError(
                f"{path}: Expected the {len(state['ranks'])} processes that the run began with, "
                f"got {distributed.size()}: a step's statistics depend on their number"
            )
        try:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is a checkpoint of another run: {error}") from error
        self.model.load_state_dict(state["model"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.weighting.load_state_dict(state["weighting"])
        CHOICES.load_state_dict(state["choices"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.last_checkpoint = path
        runtime.set_rng_state(state["ranks"][distributed.rank()])


REQUIRED = (  # of a checkpoint that `load_resume_state` takes
    *("step", "samples", "seconds", "model", "method_name", "method", "optimizer", "schedule"),
    *("weighting", "choices", "ranks"),
)


class Stopwatch:
    """Adds the time between two calls of `lap` to a run's seconds."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


def _check_batch(config: TrainConfig) -> None:
    if config.batch_size % distributed.size():
        raise ValueError(
            f"TrainState: Expected batch_size to be a multiple of the {distributed.size()} "
            f"processes, got {config.batch_size}"
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """A MultitaskSample's tensors on `device`."""
    if device.type == "cpu":
        return batch
    move = {"device": device, "non_blocking": True}
    return type(batch)(
        batch.image.to(**move),
        {k: v.to(**move) for k, v in batch.targets.items()},
        {k: v.to(**move) for k, v in batch.valid.items()},
        batch.index,
    )


def check_outputs(outputs: Any, tasks: Sequence[str]) -> None:
    """raises unless `outputs` is a dict with a tensor for each task."""
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"model: Expected forward to return a dict of task → Tensor, got "
            f"{type(outputs).__name__}"
        )
    missing = [t for t in tasks if not isinstance(outputs.get(t), Tensor)]
    if missing:
        raise ValueError(
            f"model: Expected forward to return a tensor for each of {list(tasks)}, "
            f"got {sorted(map(str, outputs))}"
        )


def backbone_to_heads(components: Mapping[str, Component]) -> float:
    """|W_backbone| / Σ|W_head|: prunable weights of the first component over all others'."""
    sizes = [component.numel for component in components.values()]
    return sizes[0] / sum(sizes[1:]) if len(sizes) > 1 else 1.0
