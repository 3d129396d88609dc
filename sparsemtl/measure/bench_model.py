"""A finished model, compiled by us and run by others: time, memory, bytes, work.

Peers run the same pruned model, zeros included, as their own best: whoever is missing is left out
with the reason. All take turns in one process; memory and load time are measured afterwards, for
each in a process of its own. Outputs are compared with torch's in float32 before any number.

Work is counted in multiply-adds (1 MAC = 2 FLOP), those on padding included:
dense        of every weight
theoretical  of nonzero weights alone
executed     of what the engine really runs: all of a dense layer's weights, the nonzero ones of a
             sparse layer's, none of a channel's that was removed
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsemtl.measure.peers import Peer, PeerMissing, Predict
from sparsemtl.measure.rows import WrongResult, digits

TOLERANCE = 1e-4  # of the largest entry of each output, in float32
NARROW_TOLERANCE = 0.1  # the same, in bfloat16 and float16
CONVENTION = "multiply-adds (1 MAC = 2 FLOP), padding counted"


@dataclass
class Candidate:
    """Somebody who predicts: prepared for one input, or the reason why not."""

    name: str
    saved: Path | None = None
    predict: Predict | None = None
    why_not: str = ""
    seconds: list[float] = field(default_factory=list)
    error: float = 0.0  # against torch in float32


def prepare(peers: Sequence[Peer], model: nn.Module, x: Tensor, folder: Path) -> list[Candidate]:
    """Save, load and run every candidate once; those that cannot give the reason.

    x: on the device that is measured; the model stays on the CPU
    """
    found = []
    for peer in peers:
        if x.device.type not in peer.devices:
            reason = f"it runs on {' and '.join(peer.devices)}, not on {x.device.type}"
            found.append(Candidate(peer.name, why_not=reason))
            continue
        own = folder / peer.name
        own.mkdir(parents=True)
        try:
            saved = peer.save(model, x, own)
            predict = peer.load(saved, x)
            predict(x)
            found.append(Candidate(peer.name, saved, predict))
        except (PeerMissing, ImportError, RuntimeError, ValueError, OSError) as error:
            found.append(Candidate(peer.name, why_not=first_line(error)))
    return found


def check(
    candidates: Sequence[Candidate],
    expected: Mapping[str, Tensor],
    x: Tensor,
    *,
    narrow_engine: bool = False,
) -> None:
    """The gate: every output of ours agrees with torch's; a peer that does not is left out.

    expected: of torch in float32
    raises: WrongResult if the engine is wrong
    """
    for candidate in candidates:
        if candidate.predict is None:
            continue
        found = candidate.predict(x)
        candidate.error = max(_error(found[task], value) for task, value in expected.items())
        narrow = narrow_engine if candidate.name == "engine" else "bf16" in candidate.name
        limit = NARROW_TOLERANCE if narrow else TOLERANCE
        if candidate.error <= limit:
            continue
        text = f"a relative error of {candidate.error:.1e}"
        if candidate.name == "engine":
            raise WrongResult(
                f"bench model: Expected the engine's outputs within {limit:g} of torch's, "
                f"got {text}"
            )
        candidate.predict, candidate.why_not = None, f"its outputs have {text}"


def at_once() -> None:
    """What waiting is on a CPU, where a call returns when it is done."""


def time_in_turns(
    candidates: Sequence[Candidate],
    x: Tensor,
    rounds: int,
    budget: float,
    wait: Callable[[], object] = at_once,
) -> None:
    """Fill in the seconds of every candidate; each call behind an untimed one of its own.

    wait: returns when the device has done all that it was given
    """
    live = [c for c in candidates if c.predict is not None]
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - begin > budget:
            break
        for candidate in live:
            assert candidate.predict is not None
            candidate.predict(x)
            wait()
            start = time.perf_counter()
            candidate.predict(x)
            wait()
            candidate.seconds.append(time.perf_counter() - start)


def row(
    candidate: Candidate,
    case: str,
    sparsity: float,
    batch: int,
    best_peer: Candidate | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """One candidate's row; `speedup` is over the fastest peer of the same precision."""
    seconds = sorted(candidate.seconds)
    median = statistics.median(seconds) if seconds else None
    quarters = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else None
    peer = None if best_peer is None else statistics.median(best_peer.seconds)
    return {
        "case": case,
        "candidate": candidate.name,
        "batch": batch,
        "sparsity": sparsity,
        "skipped": candidate.why_not or None,
        "median_ms": None if median is None else digits(1e3 * median),
        "p95_ms": None if median is None else digits(1e3 * _percentile(seconds, 0.95)),
        "best_ms": None if median is None else digits(1e3 * seconds[0]),
        "spread": None
        if quarters is None or median is None
        else round((quarters[2] - quarters[0]) / median, 3),
        "images_per_second": None if median is None else digits(batch / median),
        "against": None if best_peer is None else best_peer.name,
        "speedup": None if median is None or peer is None else digits(peer / median),
        "rel_err": float(f"{candidate.error:.2g}"),
        "rounds": len(seconds),
        **more,
    }


def fastest(candidates: Sequence[Candidate], bf16: bool) -> Candidate | None:
    """The fastest peer of one precision that was timed."""
    timed = [
        c for c in candidates if c.seconds and c.name != "engine" and ("bf16" in c.name) is bf16
    ]
    return min(timed, key=lambda c: statistics.median(c.seconds)) if timed else None


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _error(found: Tensor, expected: Tensor) -> float:
    size = expected.abs().max().item()
    return ((found.float() - expected).abs().max() / max(size, 1e-30)).item()


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
