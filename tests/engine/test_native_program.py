"""A native program as a whole: threads, bits, memory, and plans that it refuses."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from sparsemtl.engine.executors.buffers import Buffer, place
from sparsemtl.engine.executors.homes import Segment
from sparsemtl.engine.executors.native import NativeExecutor, prepared
from sparsemtl.engine.executors.steps import lower
from sparsemtl.engine.executors.torch import TorchExecutor
from sparsemtl.ops.availability import native_module, why_not_native
from tests.engine.native_graphs import (
    Maker,
    all_native,
    assert_near,
    assert_same,
    default_forms,
    native,
)

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")


def network(seed: int, batch: int = 1) -> Maker:
    """A small backbone with two heads of dilated branches."""
    maker = Maker(seed)
    x = maker.input(batch, 3, 37, 41)
    h = maker.conv(x, 12, 7, stride=(2, 2), padding=(3, 3), activation="relu")
    h = maker.node(
        "max_pool2d", h, kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1),
        ceil_mode=True,
    )  # fmt: skip
    for dilation in (1, 2, 4):
        d = (dilation, dilation)
        inner = maker.conv(h, 12, 3, padding=d, dilation=d, activation="relu")
        h = maker.conv(inner, 12, 3, padding=d, dilation=d, residual=h, activation="relu")
    heads = []
    for _ in range(2):
        branches = [
            maker.conv(
                maker.conv(
                    h, 20, 3, padding=(r, r), dilation=(r, r), sparsity=0.93, activation="relu"
                ),
                20,
                1,
                activation="relu",
            )
            for r in (3, 6)
        ]
        heads.append(maker.conv(maker.node("concat", *branches, dim=1), 4, 1))
    maker.outputs = heads
    return maker


def test_a_multitask_network():
    for batch in (1, 3):
        maker = network(3, batch)
        assert all_native(assert_same(maker, *maker.outputs))


def test_merged_convolutions_give_the_same():
    maker = network(4, 2)
    graph = maker.graph(*maker.outputs)
    merged = prepared(graph)
    assert len(merged.nodes) == len(graph.nodes) - 2  # one for each rate, out of two
    executor = NativeExecutor(merged, default_forms(merged))
    example = maker.example()
    for got, expected in zip(
        executor(*example).values(), TorchExecutor(graph)(*example).values(), strict=True
    ):
        assert_near(got, expected)


def test_what_is_merged_is_read_at_once():
    maker = network(4)
    nodes = prepared(maker.graph(*maker.outputs)).nodes
    at = {name: i for i, node in enumerate(nodes) for name in node.outputs}
    assert all(at[name] < i for i, n in enumerate(nodes) for name in n.inputs if name in at)
    merged = [i for i, node in enumerate(nodes) if len(node.outputs) == 2]
    assert merged[1] - merged[0] == 3  # one for each head stands between


def test_a_merged_output_of_the_graph_and_one_that_wants_zeros_around():
    maker = Maker(5)
    x = maker.input(2, 6, 9, 11)
    a, b, c = (
        maker.conv(x, 5, 3, padding=(1, 1), sparsity=0.95, bias=bias)
        for bias in (True, False, True)
    )
    y = maker.conv(b, 4, 3, padding=(2, 2), dilation=(2, 2))
    z = maker.node("concat", c, b, dim=1)
    graph = maker.graph(a, y, z)
    merged = prepared(graph)
    executor = NativeExecutor(merged, default_forms(merged))
    for _ in range(2):
        example = maker.example()
        expected = TorchExecutor(graph)(*example)
        for task, got in executor(*example).items():
            assert_near(got, expected[task])


def test_the_same_bits_in_each_run_and_at_each_number_of_threads():
    maker = network(6)
    graph, example = maker.graph(*maker.outputs), maker.example()
    executor, before = native(graph), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(executor(*example))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[task], results[0][task]) for task in other)


def test_two_engines_and_four_callers_each():
    makers = [network(7), network(8)]
    graphs = [maker.graph(*maker.outputs) for maker in makers]
    executors = [native(graph) for graph in graphs]
    examples = [[maker.example() for _ in range(4)] for maker in makers]
    expected = [
        [executor(*e) for e in each] for executor, each in zip(executors, examples, strict=True)
    ]
    wrong: list[tuple[int, int]] = []

    def call(engine: int, caller: int) -> None:
        for _ in range(5):
            got = executors[engine](*examples[engine][caller])
            known = expected[engine][caller]
            if not all(torch.equal(got[task], known[task]) for task in known):
                wrong.append((engine, caller))

    threads = [threading.Thread(target=call, args=(e, c)) for e in range(2) for c in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inputs_of_other_layouts_and_views():
    maker = network(9, 2)
    executor, (x,) = native(maker.graph(*maker.outputs)), maker.example()
    expected = executor(x)
    for other in (x.to(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 1]):
        assert torch.equal(executor(other)["t0"], expected["t0"])


def test_every_step_is_timed():
    maker = network(10)
    executor = native(maker.graph(*maker.outputs))
    times = executor.profile(*maker.example())
    assert {t.node for t in times} >= {n.name for n in executor.graph.nodes if n.op != "concat"}
    assert all(t.seconds >= 0 for t in times)


def test_memory_is_reused():
    maker = Maker()
    h = maker.input(1, 16, 64, 64)
    for _ in range(12):
        h = maker.conv(h, 16, 3, padding=(1, 1))
    executor = native(maker.graph(h))
    one = 16 * 64 * 64 * 4
    # Two values at a time, zeros around them, the copy of the input, and a tile's scratch.
    assert one < executor.peak_bytes < 5 * one


def test_buffers_that_live_together_are_apart():
    buffers = [
        Buffer((1, 4, 8, 8), gaps=(i % 2, i % 2), first=first, last=last)
        for i, (first, last) in enumerate([(0, 3), (1, 2), (2, 6), (3, 5), (4, 4), (6, 9), (7, 8)])
    ]
    arena = place(buffers)
    for i, a in enumerate(buffers):
        assert 0 <= a.offset <= arena - a.floats
        for b in buffers[i + 1 :]:
            together = a.first <= b.last and b.first <= a.last
            apart = a.offset + a.floats <= b.offset or b.offset + b.floats <= a.offset
            assert apart or (not together and a.geometry == b.geometry)


def lowered():
    maker = Maker(11)
    h = maker.conv(maker.input(1, 4, 9, 9), 6, 3, padding=(1, 1))
    h = maker.conv(h, 6, 3, groups=6, padding=(1, 1))
    h = maker.node("avg_pool2d", h, kernel=(3, 3), stride=(2, 2), padding=(1, 1), ceil_mode=False,
                   count_include_pad=True)  # fmt: skip
    h = maker.node("resize", h, mode="bilinear", align_corners=False, size=(7, 6))
    graph = maker.graph(h)
    segment = Segment(tuple(graph.nodes), graph.inputs, tuple(graph.outputs.values()))
    return lower(graph, segment, default_forms(graph))


def build(plan, steps):
    return native_module().EngineProgram(plan.arena, plan.externals, steps)


def test_a_plan_is_taken_as_it_was_lowered():
    plan = lowered()
    assert build(plan, plan.steps).bytes(1) > 0


def test_damaged_plans_are_refused_or_run():
    """Every number and every array entry of a plan in turn: an error, or a program that can run."""
    plan = lowered()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(1500):
        steps = [
            (kind, [list(v) for v in views], list(numbers), [a.copy() for a in arrays])
            for kind, views, numbers, arrays in plan.steps
        ]
        _, views, numbers, arrays = steps[random.integers(len(steps))]
        value = int(
            random.choice([-1, 0, 1, 2, 3, 7, 97, 1 << 20, 1 << 31, 1 << 40, 1 << 62, -(1 << 40)])
        )
        what = random.integers(3)
        if what == 0 and numbers:
            numbers[random.integers(len(numbers))] = float(value)
        elif what == 1:
            view = views[random.integers(len(views))]
            view[random.integers(9)] = value
        elif arrays:
            array = arrays[random.integers(len(arrays))]
            if array.size and array.dtype != np.float32:
                limits = np.iinfo(array.dtype)
                array.reshape(-1)[random.integers(array.size)] = min(
                    max(value, limits.min), limits.max
                )
        try:
            program = build(plan, steps)
        except (ValueError, MemoryError):
            refused += 1
            continue
        x, y = torch.zeros(plan.externals[0]), torch.zeros(plan.externals[1])
        program.run([x.data_ptr(), y.data_ptr()], 1)
    assert refused > 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: (s[0], s[1][:1], s[2], s[3]), "views of 9 integers"),
        (lambda s: (s[0], s[1], s[2][:-1], s[3]), "more numbers"),
        (lambda s: (s[0], s[1], [*s[2], 1.0], s[3]), "no more than it takes"),
        (lambda s: (s[0], s[1], s[2], s[3][:-1]), "more arrays"),
        (lambda s: (s[0], s[1], s[2], [a.astype(np.float64) for a in s[3]]), "the right type"),
        (lambda s: ("convolve", *s[1:]), "a known kind"),
        (lambda s: (s[0], s[1], [float("nan"), *s[2][1:]], s[3]), "integers"),
    ],
)
def test_a_refusal_says_what_was_expected(change, message):
    plan = lowered()
    place_ = next(i for i, step in enumerate(plan.steps) if step[0] == "conv")
    steps = [*plan.steps[:place_], change(plan.steps[place_]), *plan.steps[place_ + 1 :]]
    with pytest.raises(ValueError, match=f"EngineProgram: Expected .*{message}"):
        build(plan, steps)


def test_wrong_addresses_and_threads_are_refused():
    plan = lowered()
    program = build(plan, plan.steps)
    with pytest.raises(ValueError, match="Expected 2 addresses"):
        program.run([1], 1)
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        program.run([1, 2], 0)


def test_no_memory_is_an_error():
    program = native_module().EngineProgram(1 << 41, [], [])
    with pytest.raises(MemoryError):
        program.run([], 1)


@pytest.mark.parametrize("isa", native_module().usable_isas() if why_not_native() is None else [])
def test_every_instruction_set(isa):
    before = native_module().isa()
    maker = network(12, 2)
    graph, example = maker.graph(*maker.outputs), maker.example()
    try:
        native_module().force_isa(isa)
        executor = native(graph)
        got = executor(*example)
    finally:
        native_module().force_isa(before)
    for task, expected in TorchExecutor(graph)(*example).items():
        assert_near(got[task], expected)
    if isa != before:
        with pytest.raises(ValueError, match=f"instruction set {isa} .* got {before}"):
            executor(*example)
