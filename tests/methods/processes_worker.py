"""What each process of tests/methods/test_processes.py runs, under torchrun."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.data.scenes import CLASSIFICATION
from sparsemtl.methods import (
    METHODS,
    Distinctiveness,
    DistinctivenessConfig,
    build_method,
    method_config_type,
)
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.tasks import make_task
from sparsemtl.training import distributed, runtime
from sparsemtl.training.balance import BalanceConfig
from sparsemtl.training.callbacks import Checkpointer, every
from sparsemtl.training.checkpoint import checkpoints, load_checkpoint
from sparsemtl.training.evaluate import evaluate
from sparsemtl.training.loop import train
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.state import TrainConfig, TrainState

PARTS = {"backbone": "trunk", "head:normals": "normals", "head:depth": "depth"}
SPARSE = [name for name in METHODS if "sparsity" in method_config_type(name).__dataclass_fields__]
NAMES = ["dense", "single-task", *SPARSE]
SMALL = {
    "snip": {"batches": 2},
    "disparse-static": {"batches": 2},
    "disparse-pt": {"batches": 2, "scores": "taylor"},
    "disparse-dynamic": {"update_every": 2},
    "rigl": {"update_every": 2},
}


class Net(nn.Module):
    """norm: with batch norm and dropout, which see one process's samples only."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        between = [nn.BatchNorm2d(8), nn.Dropout(0.2)] if norm else []
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), *between, nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
        )
        self.normals, self.depth = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 1, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        shared = torch.relu(self.trunk(x))
        return {"normals": self.normals(shared), "depth": self.depth(shared)}


def dataset(split: str):
    config = ScenesConfig(height=16, width=24, frames_train=8, frames_test=3)
    return build_dataset(config, split, ("normals", "depth"))


def build(name: str, norm: bool, steps: int, **fields) -> TrainState:
    config = TrainConfig(
        steps=steps,
        batch_size=4,
        optim=OptimConfig(lr=2e-3),
        runtime=RuntimeConfig(device="cpu", threads=1),
        **fields,
    )
    runtime.start(config.runtime, config.seed)
    data = dataset("train")
    tasks = {n: make_task(n, n, c) for n, c in (("normals", 3), ("depth", 1))}
    kind = method_config_type(name)
    options = dict(SMALL.get(name, {}))
    if "sparsity" in kind.__dataclass_fields__:
        options["sparsity"] = 0.6
    method = build_method(kind(**options), PARTS)
    return TrainState.create(Net(norm), tasks, data, method, config, PARTS)


def build_classes(patterns: str) -> TrainState:
    """Four classification tasks on a joint layer that shrinks, with mining and PCGrad."""
    config = TrainConfig(
        steps=6,
        batch_size=4,
        mining=0.5,
        balance=BalanceConfig("pcgrad"),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=5e-3),
        runtime=RuntimeConfig(device="cpu", threads=1),
    )
    runtime.start(config.runtime, config.seed)
    rooms = ScenesConfig(height=32, width=40, frames_train=8, frames_test=3)
    data = build_dataset(rooms, "train", CLASSIFICATION)
    tasks = {n: make_task(n, s.kind, s.channels) for n, s in data.spec.targets.items()}
    shape = ModelConfig("vgg11", width=0.125, head="joint", hidden=24)
    model = build_model(shape, {n: t.channels for n, t in tasks.items()})
    method = Distinctiveness(DistinctivenessConfig(theta=60.0, patterns=patterns))
    return TrainState.create(model, tasks, data, method, config)


def fingerprint(state: TrainState) -> str:
    """Of masks, weights and running statistics."""
    digest = hashlib.sha256()
    for value in state.method.finalize(state.model).state_dict().values():
        digest.update(value.detach().numpy().tobytes())
    sparsity = getattr(state.model, "sparsity", None)
    for mask in [m for g in (getattr(sparsity, "masks", None) or []) for m in g]:
        digest.update(mask.numpy().tobytes())
    return digest.hexdigest()


def main(out: Path) -> None:
    found: dict[str, object] = {}
    for name in NAMES:
        state = build(name, norm=True, steps=8)
        train(state)
        found[name] = distributed.gather(fingerprint(state))
    state = build("rigl", norm=True, steps=8, balance=BalanceConfig("pcgrad"), mining=0.5)
    train(state)
    found["balanced"] = distributed.gather(fingerprint(state))
    for patterns in ("pass", "epoch"):
        state = build_classes(patterns)
        train(state)
        found[f"distinctiveness, {patterns}"] = distributed.gather(fingerprint(state))
        found[f"sizes, {patterns}"] = distributed.gather(state.method.sizes)
    found["resumed"] = resumed(out, lambda: build("rigl", norm=True, steps=8))
    found["resumed, distinctiveness"] = resumed(out, lambda: build_classes("epoch"))
    plain = build("dense", norm=False, steps=6)
    train(plain)
    found["losses"] = plain.losses
    found["metrics"] = evaluate(plain.model, plain.tasks, dataset("test"))
    found["processes"] = distributed.size()
    if distributed.is_main():
        (out / f"found{distributed.size()}.json").write_text(json.dumps(found))
    distributed.leave()


def resumed(out: Path, fresh: Callable[[], TrainState]) -> list[bool]:
    """Whether, in each process, a run resumed from step 3 ends as the whole one did."""
    whole = fresh()
    folder = out / f"{whole.method.name}{distributed.size()}"
    train(whole, [every(1, Checkpointer(folder, keep=100))])
    distributed.barrier()
    path = checkpoints(folder)[2]
    again = fresh()
    torch.manual_seed(99)
    again.load_resume_state(load_checkpoint(path), path)
    train(again)
    return distributed.gather(fingerprint(again) == fingerprint(whole))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
