"""group_threshold on the layers of a DeepLab-ResNet34 model, against the elementwise op.

    python -m bench.bench_group_threshold [--device cuda] [--rounds N] [--out FILE]

Prints nothing but the reason where the backend does not agree with the reference.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from bench.machine import RESULTS, machine, text
from sparsemtl.ops import GROUP_THRESHOLD, group_threshold_component, soft_threshold_component
from sparsemtl.ops.group_threshold import group_threshold_reference
from sparsemtl.ops.tiles import Tile
from sparsemtl.timing import interleave

SHAPES = [(1024, 512, 3, 3)] * 4 + [(1024, 1024, 1, 1)] * 4  # one head
TILES = (Tile(64, 64), Tile(32, 32), Tile(8, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default=str(RESULTS / "group_threshold.json"))
    args = parser.parse_args()
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng) for shape in SHAPES]
    weights = [
        w.to(args.device, memory_format=torch.channels_last).requires_grad_() for w in weights
    ]
    alpha = torch.tensor(1.0, device=args.device, requires_grad=True)
    grads = [torch.ones_like(w) for w in weights]
    for tile in TILES:
        found = group_threshold_component(weights[:1], alpha, tile)[0]
        expected = group_threshold_reference(weights[0], alpha, tile)
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
            print(f"group_threshold: {tile} does not agree with the reference", file=sys.stderr)
            return 1

    def step(values: tuple[torch.Tensor, ...]) -> None:
        torch.autograd.grad(values, [*weights, alpha], grads)
        if args.device == "cuda":
            torch.cuda.synchronize()

    calls = {"element": lambda: step(soft_threshold_component(weights, alpha))}
    for tile in TILES:
        calls[f"{tile.rows}x{tile.columns}"] = lambda t=tile: step(
            group_threshold_component(weights, alpha, t)
        )
    timings = interleave(calls, args.rounds, 1)
    line = machine()
    backend = GROUP_THRESHOLD.choose(weights, alpha, TILES[0]).name
    rows = {name: {"median_ms": 1e3 * t.median} for name, t in timings.items()}
    with open(args.out, "w") as file:
        json.dump({"machine": line, "backend": backend, "cases": rows}, file, indent=1)
    print(text(line))
    for name, row in rows.items():
        print(f"{name:>8}  {row['median_ms']:.2f} ms forward and backward ({backend})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
