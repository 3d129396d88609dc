"""Mutated engine folders: each must be refused with a ValueError, or run and give finite shapes.

    python -m tests.engine.fuzz_folder --count 10000 --seed 0

Half of the folders get fresh checksums after the mutation, so that the checks behind them are met.
A crash or a hang ends the run; memory is limited to 4 GB beyond what the process has at the start.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sparsemtl.engine.engine import Engine, compile
from sparsemtl.engine.file import PLAN, WEIGHTS
from tests.engine.networks import TwoHeads
from tests.engine.support import randomise

NUMBERS = (0, -1, 1, 2, 7, 255, 256, 1 << 16, 1 << 31, -(1 << 31), 1 << 40, 1 << 63, 1 << 200)
OTHERS = (None, True, False, "", "x", "relu", 0.5, -0.0, 1e308, [], {}, [[]], "d0_2*9", "9" * 5000)


def make_folder(path: Path) -> None:
    """A small engine that has every coding, a torch operator, and open sizes."""
    torch.manual_seed(0)
    model = randomise(TwoHeads(), 0.5)
    with torch.no_grad():
        model.second.weight.mul_(torch.rand_like(model.second.weight) < 0.1)
    compile(model, (2, 3, 16, 20), executor="torch").save(path)


def mutate(folder: Path, rng: random.Random) -> str:
    """Change a folder in one to three ways; returns what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice((PLAN, PLAN, WEIGHTS))
        done.append(rng.choice(FILE_MUTATIONS)(folder / name, rng))
        if rng.random() < 0.5:
            done.append(_mutate_json(folder, rng))
    if rng.random() < 0.7:
        done.append(_fresh_checksums(folder))
    return ", ".join(done)


def _flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    # The header of safetensors is where its structure stands.
    size = min(len(data), rng.choice((64, 4096, len(data))))
    for _ in range(rng.randint(1, 8)):
        if size:
            data[rng.randrange(size)] = rng.randrange(256)
    path.write_bytes(data)
    return f"bytes of {path.name}"


def _truncate(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    path.write_bytes(
        data[: rng.randrange(len(data) + 1)] if rng.random() < 0.8 else data + b"\0" * 9
    )
    return f"length of {path.name}"


def _move(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if len(data) > 2:
        a, b = sorted(rng.sample(range(len(data)), 2))
        data[a:b] = data[b - 1 : a - 1 if a else None : -1]
        path.write_bytes(data)
    return f"order in {path.name}"


def _nothing(path: Path, rng: random.Random) -> str:
    return "nothing"


FILE_MUTATIONS = (_flip, _truncate, _move, _nothing, _nothing, _nothing, _nothing)


def _mutate_json(folder: Path, rng: random.Random) -> str:
    """Another number or word in one place, or two places exchanged."""
    try:
        whole = json.loads((folder / PLAN).read_bytes())
    except ValueError:
        return "unreadable already"
    places = list(_places(whole))
    if not places:
        return "empty already"
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.4:
        other, other_key = rng.choice(places)
        holder[key], other[other_key] = other[other_key], holder[key]
    elif kind < 0.7:
        holder[key] = rng.choice(NUMBERS)
    elif kind < 0.8 and isinstance(holder[key], int | float):
        holder[key] += rng.choice((-1, 1))
    elif kind < 0.9:
        del holder[key]
    else:
        holder[key] = rng.choice(OTHERS)
    try:
        (folder / PLAN).write_text(json.dumps(whole, sort_keys=True))
    except (ValueError, RecursionError):
        return "no JSON"
    return f"field {key}"


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys:
            yield value, key
            yield from _places(value[key])


def _fresh_checksums(folder: Path) -> str:
    try:
        whole = json.loads((folder / PLAN).read_bytes())
        data = (folder / WEIGHTS).read_bytes()
        whole["plan"]["weights"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
        text = json.dumps(whole["plan"], sort_keys=True)
        whole["crc32"] = zlib.crc32(text.encode())
        (folder / PLAN).write_text(json.dumps(whole, sort_keys=True))
    except (ValueError, TypeError, KeyError, RecursionError):
        return "no checksums"
    return "checksums"


def fuzz(count: int, seed: int, executor: str = "torch") -> Counter[str]:
    """Load and run `count` mutated folders; what became of them, by kind.

    raises: whatever is not refused properly, with the seed of the folder in a note
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        good, bad = Path(temporary, "good"), Path(temporary, "bad")
        make_folder(good)
        for place in range(count):
            rng = random.Random(f"{seed}/{place}")
            shutil.copytree(good, bad)
            done = mutate(bad, rng)
            try:
                outcomes[_try(bad, executor)] += 1
            except BaseException as error:
                error.add_note(f"folder {seed}/{place}: {done}")
                raise
            shutil.rmtree(bad)
    return outcomes


def _try(folder: Path, executor: str) -> str:
    try:
        engine = Engine.load(folder, executor=executor)
    except ValueError:
        return "refused at load"
    shapes = engine.input_shapes
    if sum(torch.Size(shape).numel() for shape in shapes) > 1 << 24:
        return "another input size"  # consistent, and larger than a test should allocate
    try:
        inputs = [
            torch.zeros(shape, dtype=engine.graph.values[name].dtype)
            for shape, name in zip(shapes, engine.graph.inputs, strict=True)
        ]
        found = engine(*inputs)
    except ValueError:
        return "refused before running"
    for task, name in engine.graph.outputs.items():
        assert tuple(found[task].shape) == engine.graph.shape(name)
    return "runs"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", default="torch")
    options = parser.parse_args()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit = used + (4 << 30) + (16 << 30)  # address space: libraries reserve more than they use
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = time.perf_counter()
    outcomes = fuzz(options.count, options.seed, options.executor)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{dict(outcomes)} {seconds:.0f} s, peak {peak:.0f} MB\n")
