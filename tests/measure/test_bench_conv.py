"""The cases of `bench conv`, its gate and its rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import conv2d

from sparsemtl.measure import bench_conv
from sparsemtl.measure.bench_conv import make_problem, measure_case, relative_error
from sparsemtl.measure.conv_cases import ConvCase, all_cases
from sparsemtl.measure.dense_conv import Compiler, dense_calls
from sparsemtl.measure.roof import Roof
from sparsemtl.measure.rows import WrongResult
from sparsemtl.ops.availability import why_not_native
from sparsemtl.ops.sparse_conv2d_plan import Geometry

ROW = (
    *("case", "pass", "structure", "sparsity", "dense_path", "dense_ms", "sparse_ms", "speedup"),
    *("spread", "rel_err", "fraction_of_roof"),
)
native = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")


def small(groups: int = 1, stride: int = 1, padding: int = 2, dilation: int = 2) -> ConvCase:
    g = Geometry((stride, stride), (padding, padding), (dilation, dilation), (3, 3), groups)
    return ConvCase("small", (2, 12, 9, 11), (36, 12 // groups, 3, 3), g)


def test_the_cases_are_the_layers_of_both_networks():
    cases = all_cases()
    deeplab = [c for c in cases.values() if c.name.startswith("deeplab/")]
    assert sum(c.times for c in deeplab) == 72
    assert sum(math.prod(c.weight) * c.times for c in deeplab) == 90_653_888
    head = cases["deeplab/3x3-512-1024-d24@41"]
    assert head.geometry == Geometry((1, 1), (24, 24), (24, 24), (3, 3), 1)
    assert head.dense_flops == 2 * 1024 * 41 * 41 * 512 * 9
    depthwise = cases["mobilenetv2/3x3-dw-960@11"]
    assert (depthwise.x, depthwise.weight) == ((1, 960, 11, 11), (960, 1, 3, 3))
    assert depthwise.geometry.groups == 960


@pytest.mark.parametrize("case", [small(), small(3, 2), small(12, 1, 0, 1)])
def test_work_in_bounds_is_what_a_convolution_of_ones_counts(case):
    mask = torch.rand(case.weight, generator=torch.Generator().manual_seed(1)) < 0.3
    counted = conv2d(torch.ones(case.x), mask.float(), **case.options).sum().item()
    assert case.in_bounds(mask) == round(counted)


@native
@pytest.mark.parametrize("structure", ["element", "vector(8)"])
@pytest.mark.parametrize("case", [small(), small(3, 2), small(12, 1, 0, 1)])
def test_the_gate_is_green_for_right_results(case, structure):
    problem = make_problem(case, 0.7, structure)
    assert 0.0 < relative_error(problem, training=True) < 1e-6
    assert not problem.x.requires_grad
    assert not problem.weight.requires_grad


@native
@pytest.mark.parametrize("kind", ["forward", "training"])
@pytest.mark.parametrize("spoil", ["scale", "one entry"])
def test_a_red_gate_gives_no_number(kind, spoil, monkeypatch):
    right = bench_conv.sparse_conv2d

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        if spoil == "scale":
            return y * 1.0001
        one = torch.zeros_like(y)
        one[1, 1, 3, 3] = 0.01  # a channel that is not sampled
        return y + one

    monkeypatch.setattr(bench_conv, "sparse_conv2d", wrong)
    with pytest.raises(WrongResult, match=f"small {kind} element at sparsity 0.5 within 1e-05"):
        measure_case(make_problem(small(), 0.5), kind, "element", 0.5, Roof(1e9, 1e9))


@native
@pytest.mark.parametrize("kind", ["forward", "training"])
def test_a_row_has_every_column_and_names_the_fastest_path(kind):
    row = measure_case(
        make_problem(small(), 0.9), kind, "element", 0.9, Roof(1e11, 1e9), seconds=0.1
    )
    assert tuple(row)[: len(ROW)] == ROW
    assert row["dense_path"] in row["dense_paths_ms"]
    assert row["dense_ms"] == min(row["dense_paths_ms"].values())
    assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"], rel=1e-3)
    assert row["rounds"] >= 3


@pytest.mark.parametrize("training", [False, True])
def test_every_dense_path_computes_the_same(training):
    problem = make_problem(small(3, 2), 0.5)
    calls = dense_calls(problem.case, problem.x, problem.weight, problem.grad, training)
    assert {"nchw", "channels_last"} <= set(calls)
    expected = conv2d(problem.x, problem.weight, **problem.case.options)
    for name, call in calls.items():
        found = call()
        if not training:
            found = found.to_dense() if found.is_mkldnn else found
            torch.testing.assert_close(found, expected, msg=name)


def test_a_compiler_without_time_or_program_says_so(monkeypatch):
    problem = make_problem(small(), 0.5)
    compiler = Compiler(seconds=0.0)
    assert compiler.call(problem.case, problem.x, problem.weight) is None
    assert "0 s for compiling were spent" in next(iter(compiler.skipped))
    monkeypatch.setattr("sparsemtl.measure.dense_conv._has_compiler", lambda: False)
    compiler = Compiler(seconds=10.0)
    assert compiler.call(problem.case, problem.x, problem.weight) is None
    assert compiler.skipped == {"no C++ compiler was found": 1}
