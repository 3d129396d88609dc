"""What `sparsemtl similarity` computes: records of seeds, and measured co-training gains."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsemtl.cli.run_folder import build_split, build_tasks
from sparsemtl.cli.similarity_folder import SimilarityFolder
from sparsemtl.config import RunConfig
from sparsemtl.data import MultitaskDataset
from sparsemtl.data.copies import with_copies
from sparsemtl.methods import Dense, DenseConfig
from sparsemtl.models.config import build_model
from sparsemtl.similarity import SeedRecord, SimilarityConfig, score_seed
from sparsemtl.similarity.gains import Metrics, cells_of, gain_matrix
from sparsemtl.tasks import Task
from sparsemtl.training import runtime
from sparsemtl.training.evaluate import evaluate
from sparsemtl.training.loop import train
from sparsemtl.training.state import TrainState
from sparsemtl.training.weighting import WeightingConfig

Say = Callable[[str], None]
Cell = tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """Data, tasks and network of one analysis.

    config: its tasks are the data set's own; copies: new name → the target that it repeats
    names:  all tasks in the order asked for, copies included
    """

    config: RunConfig
    names: tuple[str, ...]
    copies: Mapping[str, str]

    def split(self, split: str, names: Sequence[str], *, augmented: bool) -> MultitaskDataset:
        """One split with the targets `names`."""
        dataset = build_split(self.config, split, augmented=augmented)
        return with_copies(dataset, self.copies, list(names))

    def tasks(self, dataset: MultitaskDataset) -> dict[str, Task]:
        """Task objects of the data set's targets, options of a copy's source included."""
        options = dict(self.config.task_options)
        for name, source in self.copies.items():
            options[name] = options.get(source, {})
        names = tuple(dataset.spec.targets)
        kept = {name: value for name, value in options.items() if name in names}
        config = dataclasses.replace(self.config, tasks=names, task_options=kept)
        return build_tasks(config, dataset)


def collect_records(
    work: Work, settings: SimilarityConfig, folder: SimilarityFolder, say: Say
) -> list[SeedRecord]:
    """The records of all seeds; those already in the folder are not computed again."""
    records = []
    dataset = work.split("train", work.names, augmented=False)
    tasks = work.tasks(dataset)
    for seed in settings.seeds:
        record = folder.record(seed)
        if record is None:
            begin = time.perf_counter()
            device = runtime.start(work.config.train.runtime, seed)

            def fresh(name: str, seed: int, device: torch.device = device) -> nn.Module:
                torch.manual_seed(seed)
                return build_model(work.config.model, {name: tasks[name].channels}).to(device)

            record = score_seed(fresh, tasks, dataset, settings, seed)
            folder.add_record(record)
            say(f"seed {seed}: {len(tasks)} tasks scored in {time.perf_counter() - begin:.1f} s")
        records.append(record)
    return records


def measure_gains(
    work: Work, seeds: Sequence[int], folder: SimilarityFolder, say: Say
) -> list[np.ndarray]:
    """Train every task alone and every pair; one directed gain matrix [T, T] per seed."""
    train_set = work.split("train", work.names, augmented=True)
    held_out = work.split("val", work.names, augmented=False)
    directions = {n: t.higher_is_better for n, t in work.tasks(train_set).items()}
    matrices = []
    cells = cells_of(work.names)
    for seed in seeds:
        measured: dict[Cell, Metrics] = {}
        for number, cell in enumerate(cells, start=1):
            result = folder.cell(cell, seed)
            if result is None:
                result = _train_cell(work, cell, seed, train_set, held_out)
                folder.add_cell(cell, seed, result)
                say(
                    f"gains, seed {seed}, {number}/{len(cells)}: {' + '.join(cell)} trained in "
                    f"{result['seconds']:.1f} s"
                )
            measured[cell] = {
                task: {k: float("nan") if v is None else v for k, v in values.items()}
                for task, values in result["metrics"].items()
            }
        matrices.append(gain_matrix(work.names, measured, directions))
    return matrices


def _train_cell(
    work: Work, cell: Cell, seed: int, train_set: MultitaskDataset, held_out: MultitaskDataset
) -> dict[str, Any]:
    """Train a dense network on the tasks of one cell and measure them on the held-out split."""
    begin = time.perf_counter()
    dataset = with_copies(train_set, {}, list(cell))
    tasks = work.tasks(dataset)
    weights = work.config.train.loss_weights
    config = dataclasses.replace(
        work.config.train,
        seed=seed,
        weighting=WeightingConfig("fixed"),
        loss_weights={
            name: weights[source]
            for name in cell
            if (source := work.copies.get(name, name)) in weights
        },
    )
    device = runtime.start(config.runtime, seed)
    model = build_model(work.config.model, {n: t.channels for n, t in tasks.items()})
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState.create(model, tasks, dataset, Dense(DenseConfig()), config)
    train(state)
    metrics = evaluate(model, tasks, with_copies(held_out, {}, list(cell)), batch_size=8)
    return {
        "tasks": list(cell),
        "seed": seed,
        "steps": state.step,
        "seconds": round(time.perf_counter() - begin, 2),
        "metrics": metrics,
    }
