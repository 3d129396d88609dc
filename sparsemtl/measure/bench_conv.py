"""sparse_conv2d against the fastest dense convolution that torch has, one layer at a time.

A row is made only if the result agrees with float64. Candidates take turns within one run, each
timed call behind an untimed one of its own, so that all meet their own caches.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from sparsemtl.measure.conv_cases import ConvCase
from sparsemtl.measure.dense_conv import Call, Compiler, dense_calls, training_call
from sparsemtl.measure.roof import Roof
from sparsemtl.measure.rows import WrongResult, digits
from sparsemtl.ops import pack_pattern, sparse_conv2d
from sparsemtl.ops.pattern import STRUCTURES, Pattern
from sparsemtl.timing import interleave

PASSES = ("forward", "training")  # training: forward and the gradients of input and weight
TOLERANCE = 1e-5  # of the largest entry
SAMPLED = 24  # channels of each result that are computed in float64; the others in float32
SECONDS = {"forward": 0.35, "training": 0.6}  # after which no further round of a row begins
ROUNDS, LEAST = 15, 3


@dataclass(frozen=True)
class Problem:
    """Seeded tensors of one case at one sparsity."""

    case: ConvCase
    x: Tensor
    weight: Tensor
    grad: Tensor  # of the output
    pattern: Pattern


def make_problem(case: ConvCase, sparsity: float, structure: str = "element") -> Problem:
    """Random input, weight, gradient; the dead weights are drawn, vector by vector."""
    rng = torch.Generator().manual_seed(0)
    rows, *rest = case.weight
    groups, vector = case.geometry.groups, STRUCTURES[structure]
    own = rows // groups  # output channels of a group; a vector never crosses its border
    live = torch.rand(groups, -(-own // vector), *rest, generator=rng) >= sparsity
    live = live.repeat_interleave(vector, 1)[:, :own].reshape(case.weight)
    scale = math.sqrt(math.prod(rest) * max(1.0 - sparsity, 1e-3))
    weight = torch.randn(case.weight, generator=rng) / scale * live
    x = torch.randn(case.x, generator=rng)
    grad = torch.randn(case.out, generator=rng)
    return Problem(case, x, weight, grad, pack_pattern(weight, groups=groups, structure=structure))


def relative_error(problem: Problem, training: bool) -> float:
    """Largest error of the results of a pass, as a share of their largest entry.

    Against float64 at `SAMPLED` evenly spaced channels, and against torch's float32 at all.
    """
    case, options = problem.case, problem.case.options
    leaves = [t.clone().requires_grad_(training) for t in (problem.x, problem.weight)]
    y = sparse_conv2d(*leaves, pattern=problem.pattern, **options)  # type: ignore[arg-type]
    found = [y, *torch.autograd.grad(y, leaves, problem.grad)] if training else [y]
    every = _results(problem, range(case.weight[0]), range(case.x[1]), torch.float32, training)
    worst = max(_error(f.detach(), e) for f, e in zip(found, every, strict=True))
    grouped = case.geometry.groups > 1
    rows = range(case.weight[0]) if grouped else _spaced(case.weight[0])
    channels = range(case.x[1]) if grouped else _spaced(case.x[1])
    wide = _results(problem, rows, channels, torch.float64, training)
    sampled = [found[0][:, rows]]
    if training:
        sampled += [found[1][:, channels], found[2][rows]]
    errors = [_error(f.detach(), e) for f, e in zip(sampled, wide, strict=True)]
    return max(errors) if worst <= 2 * TOLERANCE else worst


def _results(
    problem: Problem, rows: Sequence[int], channels: Sequence[int], dtype: torch.dtype, all_: bool
) -> list[Tensor]:
    """Output at `rows`; then the input's gradient at `channels` and the weight's at `rows`."""
    options: dict[str, Any] = problem.case.options
    whole = len(rows) == problem.case.weight[0]
    x, weight, grad = (t.detach().to(dtype) for t in (problem.x, problem.weight, problem.grad))
    part = (weight if whole else weight[rows]).requires_grad_(all_)
    y = conv2d(x, part, **options)
    if not all_:
        return [y]
    (grad_weight,) = torch.autograd.grad(y, part, grad if whole else grad[:, rows])
    mask = problem.pattern.mask()
    every = len(channels) == x.shape[1]
    few = (x if every else x[:, channels]).requires_grad_()
    part = (weight if every else weight[:, channels]).detach()
    (grad_x,) = torch.autograd.grad(conv2d(few, part, **options), few, grad)
    return [y, grad_x, grad_weight * (mask if whole else mask[rows])]


def _spaced(count: int) -> list[int]:
    if count <= SAMPLED:
        return list(range(count))
    return sorted({round(i * (count - 1) / (SAMPLED - 1)) for i in range(SAMPLED)})


def _error(found: Tensor, expected: Tensor) -> float:
    size = expected.abs().max().item()
    return (
        ((found - expected).abs().max() / size).item() if size > 0.0 else found.abs().max().item()
    )


def measure_case(
    problem: Problem,
    kind: str,
    structure: str,
    sparsity: float,
    roof: Roof,
    compiler: Compiler | None = None,
    *,
    rounds: int = ROUNDS,
    seconds: float | None = None,
    settle: int = 1,
) -> dict[str, Any]:
    """One row: the gate, then the candidates in turn.

    settle: untimed calls of a candidate before each timed one

    raises: WrongResult where the result does not agree with the reference
    """
    case, training = problem.case, kind == "training"
    error = relative_error(problem, training)
    if not error <= TOLERANCE:
        raise WrongResult(
            f"bench conv: Expected {case.name} {kind} {structure} at sparsity {sparsity:g} within "
            f"{TOLERANCE:g} of the reference, got a relative error of {error:.1e}"
        )
    calls = dense_calls(case, problem.x, problem.weight, problem.grad, training)
    if compiler is not None and not training:  # a frozen weight cannot be trained
        compiled = compiler.call(case, problem.x, problem.weight)
        if compiled is not None:
            calls["compiled"] = compiled
    dense = list(calls)
    calls["sparse"] = sparse_call(problem, training)
    with torch.set_grad_enabled(training):
        limit = SECONDS[kind] if seconds is None else seconds
        times = interleave(calls, rounds, warmup=1, budget=limit, settle=settle, least=LEAST)
    fastest = min(dense, key=lambda name: times[name].median)
    sparse = times["sparse"]
    flops = 2 * case.in_bounds(problem.pattern.mask()) * (3 if training else 1)
    return {
        "case": case.name,
        "pass": kind,
        "structure": structure,
        "sparsity": sparsity,
        "dense_path": fastest,
        "dense_ms": digits(1e3 * times[fastest].median),
        "sparse_ms": digits(1e3 * sparse.median),
        "speedup": digits(times[fastest].median / sparse.median),
        "spread": round(sparse.spread, 3),
        "rel_err": float(f"{error:.2g}"),
        "fraction_of_roof": digits(flops / sparse.median / roof.flops),
        "speedup_of_best": digits(min(times[n].best for n in dense) / sparse.best),
        "dense_spread": round(times[fastest].spread, 3),
        "density": round(problem.pattern.nonzeros / max(1, problem.weight.numel()), 4),
        "dense_paths_ms": {name: digits(1e3 * times[name].median) for name in dense},
        "rounds": sparse.rounds,
    }


def sparse_call(problem: Problem, training: bool) -> Call:
    """The op on a known pattern, as a layer with a fixed mask calls it."""
    options: dict[str, Any] = problem.case.options

    def convolve(a: Tensor, b: Tensor) -> Tensor:
        return sparse_conv2d(a, b, pattern=problem.pattern, **options)

    if training:
        return training_call(convolve, problem.x, problem.weight, problem.grad)
    return lambda: convolve(problem.x, problem.weight)


def measure_cases(
    cases: Sequence[ConvCase],
    kinds: Sequence[str],
    structure: str,
    sparsities: Sequence[float],
    roof: Roof,
    compiler: Compiler | None,
    *,
    seconds: float | None = None,
) -> Iterator[dict[str, Any]]:
    """All rows, the most costly cases first: what a compiler's time is best spent on."""
    for case in sorted(cases, key=lambda c: -c.dense_flops * c.times):
        for sparsity in sparsities:
            problem = make_problem(case, sparsity, structure)
            for kind in kinds:
                yield measure_case(
                    problem, kind, structure, sparsity, roof, compiler, seconds=seconds
                )


def steady_memory() -> None:
    """Keep freed memory mapped, for every candidate alike: otherwise each call pays page faults
    for its output, as many for a dense as for a sparse one, and hides what is measured."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its most: more is refused
