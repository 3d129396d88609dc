"""Mutated engine folders: each must be refused with a ValueError, or run and compute what it says.

    python -m tests.engine.fuzz_folder --count 10000 --seed 0

A folder that loads runs through `--executor`, and what it gives is held against plain torch on the
same folder; with its checksums as they were, against the folder before the mutation. A crash or a
hang ends the run; memory is limited to 4 GB beyond what the process has at the start, and time to
a minute for a folder.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch import Tensor

from sparsemtl.engine.deferred import values
from sparsemtl.engine.engine import Engine, compile
from tests.engine.mutations import mutate
from tests.engine.networks import TwoHeads
from tests.engine.support import randomise

LONGEST = 60  # seconds for a folder
TAME = 1e3  # beyond such weights sums cancel or overflow, and two executors may differ


def make_folder(path: Path, executor: str = "torch") -> None:
    """A small engine that has every coding, a torch operator, and open sizes."""
    torch.manual_seed(0)
    model = randomise(TwoHeads(), 0.5)
    with torch.no_grad():
        model.second.weight.mul_(torch.rand_like(model.second.weight) < 0.1)
    compile(model, (2, 3, 16, 20), executor=executor).save(path)


def fuzz(count: int, seed: int, executor: str = "torch") -> Counter[str]:
    """Load and run `count` mutated folders; what became of them, by kind.

    raises: whatever is not refused properly, with the seed of the folder in a note
    """
    outcomes: Counter[str] = Counter()
    before = signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory() as temporary:
        good, bad = Path(temporary, "good"), Path(temporary, "bad")
        make_folder(good, executor)
        expected = _run(Engine.load(good, executor="torch"))
        for place in range(count):
            rng = random.Random(f"{seed}/{place}")
            shutil.copytree(good, bad)
            done, fresh = mutate(bad, rng)
            signal.alarm(LONGEST)
            try:
                outcomes[_try(bad, executor, None if fresh else expected)] += 1
            except BaseException as error:
                if hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"folder {seed}/{place}: {done}")
                raise
            finally:
                signal.alarm(0)
            shutil.rmtree(bad)
    signal.signal(signal.SIGALRM, before)
    return outcomes


def _try(folder: Path, executor: str, expected: dict[str, Tensor] | None) -> str:
    try:
        engine = Engine.load(folder, executor=executor)
    except ValueError:
        return "refused at load"
    if sum(torch.Size(shape).numel() for shape in engine.input_shapes) > 1 << 24:
        return "another input size"  # consistent, and larger than a test should allocate
    try:
        found = _run(engine)
    except ValueError:
        return "refused before running"
    for task, name in engine.graph.outputs.items():
        assert tuple(found[task].shape) == engine.graph.shape(name)
    if expected is None and executor != "torch" and _is_tame(engine):
        expected = _run(Engine.load(folder, executor="torch"))
    if expected is None:
        return "runs"
    for task, value in expected.items():
        assert_same(found[task], value)
    return "runs, and right"


def assert_same(found: Tensor, expected: Tensor) -> None:
    size = expected.abs().max() if expected.numel() else torch.zeros(())
    if expected.is_floating_point():
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-4 * float(size.nan_to_num(1.0)), equal_nan=True
        )
    else:
        assert found.shape == expected.shape


def _run(engine: Engine) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return engine(
        *(
            torch.rand(shape, generator=generator).to(engine.graph.values[name].dtype)
            for shape, name in zip(engine.input_shapes, engine.graph.inputs, strict=True)
        )
    )


def _is_tame(engine: Engine) -> bool:
    weights = [values(w) for node in engine.graph.nodes for w in node.weights.values()]
    return all(bool((w.float().abs() <= TAME).all()) for w in weights)


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise AssertionError(f"a folder took more than {LONGEST} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", default="torch")
    parser.add_argument("--no-memory-limit", action="store_true", help="for address sanitizers")
    options = parser.parse_args()
    if not options.no_memory_limit:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        limit = used + (4 << 30) + (16 << 30)  # of addresses: libraries reserve more than they use
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = time.perf_counter()
    total = fuzz(options.count, options.seed, options.executor)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{dict(total)} {seconds:.0f} s, peak {peak:.0f} MB\n")
