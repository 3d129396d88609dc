"""Where a pruned network's time goes in the engine's CPU executor, step by step.

    python -m bench.bench_engine --prune adapmtl-split --threads 2      the slowest steps
    pytest bench/bench_engine.py                                        pytest-benchmark

`sparsemtl bench model` compares whole models with other runtimes.
"""

from __future__ import annotations

import argparse
import sys

import pytest
import torch
from torch import Tensor

from bench.machine import machine, text
from sparsemtl.engine.capture import capture
from sparsemtl.engine.executors.dense import DenseExecutor
from sparsemtl.engine.executors.native import NativeExecutor
from sparsemtl.engine.graph import Graph
from sparsemtl.engine.passes import adapt, optimise
from sparsemtl.engine.select import Selection, executor_of, select
from sparsemtl.engine.shapes import specialise
from sparsemtl.measure.pruned import SPLIT_NAME, build, parse_prune, prune
from sparsemtl.models import MultitaskModel

HEADS = {"segmentation": 40, "normals": 3, "depth": 1}
TOLERANCE = 1e-4


def pruned(name: str, text: str) -> MultitaskModel:
    """A seeded model of the registry; every layer gets its component's share of zeros."""
    model = build(name, HEADS).eval()
    prune(model, parse_prune("--prune", text, HEADS))
    return model


def plan(model: MultitaskModel, x: Tensor) -> Graph:
    """The model's graph as an engine would run it at this size."""
    graph, _ = optimise(capture(model, (x[:1],)))
    graph, _ = adapt(specialise(graph, [tuple(x.shape)]))
    return graph


def worst_error(
    executor: NativeExecutor | DenseExecutor, model: MultitaskModel, x: Tensor
) -> float:
    """Largest difference from the model's outputs, relative to the largest output of its task."""
    with torch.no_grad():
        expected = model(x)
    got = executor(x)
    errors = [(got[t] - y).abs().max() / y.abs().max() for t, y in expected.items()]
    return max(error.item() for error in errors)


def slowest(executor: NativeExecutor, selection: Selection, x: Tensor, count: int) -> list[str]:
    """The steps that take longest, the best of three runs each."""
    runs = [executor.profile(x) for _ in range(3)]
    steps = [min(times, key=lambda t: t.seconds) for times in zip(*runs, strict=True)]
    steps.sort(key=lambda step: -step.seconds)
    lines = [f"{sum(step.seconds for step in steps) * 1e3:9.3f} ms  in {len(steps)} steps"]
    for step in steps[:count]:
        choice = selection.layers.get(step.node)
        kernel = "" if choice is None else f"{choice.choice}, density {choice.density:.3f}"
        lines.append(f"{step.seconds * 1e3:9.3f} ms  {step.what:10s} {step.node}  {kernel}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="deeplab-resnet34")
    parser.add_argument("--prune", default=SPLIT_NAME, help="adapmtl-split, 0.9, or shares by name")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=321)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=20, help="how many of the slowest steps")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(text(machine()), flush=True)
    model = pruned(args.model, args.prune)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(1))
    graph = plan(model, x)
    selection = select(graph, "measured")
    executor = executor_of(graph, selection)
    if not isinstance(executor, NativeExecutor):
        print(f"the whole runs {selection.whole}, which is not the native executor")
        return 1
    error = worst_error(executor, model, x)
    if not error < TOLERANCE:
        print(f"engine: outputs differ by {error:.1e}, nothing is reported")
        return 1
    print("\n".join(slowest(executor, selection, x, args.steps)))
    return 0


@pytest.mark.parametrize("kind", ["engine", "dense"])
def bench_engine(benchmark, kind):
    model = pruned("mobilenetv2", "0.9")
    x = torch.randn(1, 3, 97, 97, generator=torch.Generator().manual_seed(1))
    graph = plan(model, x)
    executor = executor_of(graph, select(graph, "sparse" if kind == "engine" else "dense"))
    assert worst_error(executor, model, x) < TOLERANCE
    benchmark.extra_info.update(machine())
    benchmark.pedantic(executor, args=(x,), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
