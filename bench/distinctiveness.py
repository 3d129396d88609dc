"""Distinctiveness pruning on the rooms' four classification tasks: the paper's tables 1, 2 and 3.

    python -m bench.distinctiveness --table 1 --out bench/results

Table 1: accuracy after pruning against a network trained at the final size from the start.
Table 2: the hidden size that is left, over backbones. Table 3: the same, over the number of tasks.
Settings follow the paper where it gives them (128 units, θ = 30°, 20 epochs, Adam 1e-3, L2 5e-3,
hardest 70 % of a batch, PCGrad). Data, backbone widths and lr decay are ours; in place of ImageNet
weights, `--warmup` epochs before the first merging. All of it is printed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.data.scenes import CLASSIFICATION
from sparsemtl.measure.environment import environment, machine_line
from sparsemtl.methods import Dense, DenseConfig, Distinctiveness, DistinctivenessConfig
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.tasks import make_task
from sparsemtl.training import runtime
from sparsemtl.training.balance import BalanceConfig
from sparsemtl.training.checkpoint import atomic_write, write_json
from sparsemtl.training.evaluate import evaluate
from sparsemtl.training.loop import train
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.state import TrainConfig, TrainState

BACKBONES = ("mobilenetv2", "deeplab-resnet18", "deeplab-resnet34", "vgg11")
BATCH = 32
WARMUP = 10  # epochs: fewer, and random weights' units still look alike


class Runs:
    """Trainings on one data set; the rooms are rendered once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        size = {"height": 48, "width": 64}
        counts = {"frames_train": arguments.frames, "frames_test": arguments.frames // 2}
        self.data = {
            split: build_dataset(
                ScenesConfig(**size, **counts, flip=split == "train"), split, CLASSIFICATION
            )
            for split in ("train", "test")
        }

    def run(
        self, backbone: str, hidden: int, tasks: tuple[str, ...], seed: int, prune: bool
    ) -> dict[str, Any]:
        """One training: accuracies on the test rooms, hidden sizes after each epoch."""
        begin = time.perf_counter()
        a = self.arguments
        epoch = -(-a.frames // BATCH)
        config = TrainConfig(
            steps=a.epochs * epoch,
            batch_size=BATCH,
            seed=seed,
            mining=0.7,
            balance=BalanceConfig("pcgrad") if len(tasks) > 1 else None,
            optim=OptimConfig(
                lr=1e-3,
                betas=(0.9, 0.999),
                weight_decay=5e-3,
                schedule="step",
                lr_factor=0.1,
                lr_every=max(1, a.epochs * 2 // 3) * epoch,
            ),
            runtime=RuntimeConfig(device="cpu", threads=a.threads),
        )
        runtime.start(config.runtime, seed)
        kinds = {
            t: make_task(t, "classification", self.data["train"].spec.targets[t].channels)
            for t in tasks
        }
        shape = ModelConfig(backbone, width=a.width, head="joint", hidden=hidden)
        model = build_model(shape, {t: k.channels for t, k in kinds.items()})
        parameters = sum(p.numel() for p in model.backbone.parameters())
        method = (
            Distinctiveness(DistinctivenessConfig(warmup=a.warmup))
            if prune
            else Dense(DenseConfig())
        )
        state = TrainState.create(model, kinds, self.data["train"], method, config)
        train(state)
        model = state.method.finalize(state.model)
        found = evaluate(model, kinds, self.data["test"], batch_size=64)
        return {
            "backbone": backbone,
            "backbone_parameters": parameters,
            "seed": seed,
            "tasks": list(tasks),
            "accuracy": {t: found[t]["accuracy"] for t in tasks},
            "sizes": method.sizes if isinstance(method, Distinctiveness) else [hidden],
            "angles": method.angles if isinstance(method, Distinctiveness) else [],
            "seconds": round(time.perf_counter() - begin, 1),
        }


def table_1(runs: Runs) -> tuple[list[dict[str, Any]], list[str]]:
    """D-Prune against a baseline of its final size, per seed."""
    results, lines = [], []
    for seed in runs.arguments.seeds:
        pruned = runs.run(runs.arguments.backbone, 128, CLASSIFICATION, seed, prune=True)
        direct = runs.run(
            runs.arguments.backbone, pruned["sizes"][-1], CLASSIFICATION, seed, prune=False
        )
        results += [pruned | {"row": "D-Prune"}, direct | {"row": "baseline"}]
        say(pruned)
        say(direct)
    lines += ["| task | D-Prune | baseline of the same final size |", "|---|---|---|"]
    averages: dict[str, list[float]] = {}
    for task in (*CLASSIFICATION, "average"):
        cells = []
        for row in ("D-Prune", "baseline"):
            values = [
                100
                * (
                    statistics.mean(r["accuracy"].values())
                    if task == "average"
                    else r["accuracy"][task]
                )
                for r in results
                if r["row"] == row
            ]
            averages[row] = values
            cells.append(mean_and_deviation(values))
        lines.append(f"| {task} | {cells[0]} | {cells[1]} |")
    ahead = sum(a > b for a, b in zip(averages["D-Prune"], averages["baseline"], strict=True))
    lines += [
        "",
        "Accuracy on the test rooms, %. On average over the tasks D-Prune is ahead in "
        f"{ahead} of {len(averages['baseline'])} seeds.",
    ]
    lines += ["", "Hidden units after each epoch (and the smallest angle before each merging):", ""]
    for r in results:
        if r["row"] == "D-Prune":
            sizes = " → ".join(map(str, r["sizes"]))
            angles = ", ".join(f"{x:.0f}°" for x in r["angles"])
            lines.append(f"- seed {r['seed']}: {sizes} ({angles})")
    return results, lines


def table_2(runs: Runs) -> tuple[list[dict[str, Any]], list[str]]:
    """Feature utilisation over backbones."""
    rows = [(f"{name}, {{parameters}}", runs_of(runs, name, CLASSIFICATION)) for name in BACKBONES]
    return utilisation("backbone, its parameters", rows)


def table_3(runs: Runs) -> tuple[list[dict[str, Any]], list[str]]:
    """Feature utilisation over the number of tasks."""
    rows = [
        (", ".join(CLASSIFICATION[:n]), runs_of(runs, runs.arguments.backbone, CLASSIFICATION[:n]))
        for n in range(1, len(CLASSIFICATION) + 1)
    ]
    return utilisation("tasks", rows)


def runs_of(runs: Runs, backbone: str, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    found = [runs.run(backbone, 128, tasks, seed, prune=True) for seed in runs.arguments.seeds]
    for result in found:
        say(result)
    return found


def utilisation(
    heading: str, rows: list[tuple[str, list[dict[str, Any]]]]
) -> tuple[list[dict[str, Any]], list[str]]:
    lines = [
        f"| {heading} | initial hidden size | final hidden size | compression % "
        "| utilisation % | mean accuracy % |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows:
        final = [float(r["sizes"][-1]) for r in found]
        used = [100 * r["sizes"][-1] / r["sizes"][0] for r in found]
        accuracy = [100 * statistics.mean(r["accuracy"].values()) for r in found]
        name = name.format(parameters=f"{found[0]['backbone_parameters']:,}")
        lines.append(
            f"| {name} | {found[0]['sizes'][0]} | {mean_and_deviation(final, 1)} | "
            f"{100 - statistics.mean(used):.1f} | {statistics.mean(used):.1f} | "
            f"{mean_and_deviation(accuracy, 1)} |"
        )
    return [r for _, found in rows for r in found], lines


def mean_and_deviation(values: list[float], digits: int = 2) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def say(result: dict[str, Any]) -> None:
    accuracy = " ".join(f"{t} {100 * v:.1f}" for t, v in result["accuracy"].items())
    print(
        f"{result['backbone']} seed {result['seed']}: {result['sizes'][0]} → {result['sizes'][-1]} "
        f"units, {accuracy} ({result['seconds']} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--table", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=WARMUP, help="epochs before merging")
    parser.add_argument("--frames", type=int, default=512, help="training rooms; half as many test")
    parser.add_argument("--backbone", choices=BACKBONES, default="deeplab-resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    make = {1: table_1, 2: table_2, 3: table_3}[arguments.table]
    results, lines = make(Runs(arguments))
    env = environment()
    command = shlex.join(["python", "-m", "bench.distinctiveness", *sys.argv[1:]])
    backbone = "" if arguments.table == 2 else f"{arguments.backbone} "
    text = [
        f"# Distinctiveness pruning, table {arguments.table}\n",
        f"Machine: {machine_line(env)}.\n",
        f"Command, {time.perf_counter() - begin:.0f} s: `{command}`\n",
        f"{arguments.frames} procedural rooms of 48×64, {backbone}at width {arguments.width:g} "
        f"from random weights, {arguments.epochs} epochs, batch {BATCH}, Adam 1e-3 (× 0.1 after "
        "two thirds), L2 5e-3, hardest 70 %, PCGrad, θ = 30°, merging at the end of each epoch "
        f"after the first {arguments.warmup}; mean ± standard deviation over seeds "
        f"{', '.join(map(str, arguments.seeds))}.\n",
        *lines,
    ]
    stem = f"distinctiveness_table{arguments.table}"
    document = "\n".join(text) + "\n"
    atomic_write(arguments.out / f"{stem}.md", lambda file: file.write(document.encode()))
    write_json(
        arguments.out / f"{stem}.json",
        {"command": command, "environment": env, "runs": json.loads(json.dumps(results))},
    )
    print(document)


if __name__ == "__main__":
    main()
