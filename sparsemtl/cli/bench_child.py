"""A process that loads one saved candidate, predicts and says what that took.

    python -m sparsemtl.cli.bench_child '{"candidate": …, "saved": …, "shape": …, "threads": …}'

Load time runs from the file to the first result; the peak is that of the resident set, with torch
and the interpreter in it, while predicting after that; on a CUDA device, what torch holds there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from sparsemtl.cli.bench_peers import EVERYONE, engine_peer
from sparsemtl.measure.memory import track_peak


def main(text: str) -> int:
    """Do what the JSON text says and print the numbers as JSON."""
    task = json.loads(text)
    torch.set_num_threads(task["threads"])
    x = torch.randn(task["shape"], generator=torch.Generator().manual_seed(0)).to(task["device"])
    everyone = {**EVERYONE, "engine": engine_peer(task["precision"])}
    begin = time.perf_counter()
    predict = everyone[task["candidate"]].load(Path(task["saved"]), x)
    predict(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    with track_peak() as peak:
        for _ in range(3):
            predict(x)
    found = {"load_s": round(seconds, 3), "peak_mb": None}
    # A CUDA graph's memory is reserved for good, and only part of it counts as allocated.
    taken = torch.cuda.memory_reserved() if x.is_cuda else peak.resident
    if taken is not None:
        found["peak_mb"] = round(taken / 1e6, 1)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
