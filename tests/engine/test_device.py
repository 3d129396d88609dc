"""The device executor on a CPU: equal to torch, static buffers, graphs kept, shared and dropped."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsemtl
from sparsemtl.engine.capture import capture
from sparsemtl.engine.engine import Engine
from sparsemtl.engine.graph import Graph
from sparsemtl.engine.passes import optimise
from sparsemtl.engine.target import Target, make_target
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.ops.dispatch import BackendUnavailable
from tests.engine.networks import Standardised, TimmStyle, TwoHeads
from tests.engine.recorded_graph import RecordedGraph
from tests.engine.support import assert_close_tasks, expected_of, randomise

CPU = torch.device("cpu")
# Of a task's largest value, against the model in float32: what 20 to 70 layers in that type cost.
NARROW = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Awkward(nn.Module):
    """Integers, a part that insists on float32, values that depend on no input, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        y = F.relu6(self.conv(x) + self.embed(kinds)[:, :, None, None])
        rows = torch.arange(x.shape[2], dtype=torch.float32) / x.shape[2]
        weights = F.softmax(y.float(), dim=1, dtype=torch.float32)
        y = self.head(y * weights + rows[:, None])
        return {"class": y.argmax(1), "scores": y.softmax(1), "same": x, "kinds": kinds}


def graph_of(model: nn.Module, *inputs: Tensor) -> Graph:
    return optimise(capture(model.eval(), list(inputs)))[0]


def engine_of(graph: Graph, dtype: torch.dtype | None = None, **options) -> Engine:
    most = options.pop("most_plans", 8)
    target = Target(CPU, dtype, capture=RecordedGraph, **options)
    return Engine(graph, executor="device", target=target, most_plans=most)


def recorded(engine: Engine, *shapes) -> RecordedGraph:
    """The graph behind a plan."""
    replay = engine.plan(*(shapes or engine.input_shapes)).executor.run._replay
    return replay.__self__


NETWORKS = {
    "two-heads": (TwoHeads, (2, 3, 18, 25)),
    "timm-style": (TimmStyle, (1, 3, 17, 24)),
    "standardised": (Standardised, (2, 3, 9, 12)),
    "deeplab": (
        lambda: build_model(ModelConfig("deeplab-resnet18", width=0.1), {"a": 3, "b": 1}),
        (2, 3, 33, 40),
    ),
}


@pytest.fixture(scope="module")
def known() -> dict[str, tuple[nn.Module, Graph, tuple[int, ...]]]:
    """Name → a pruned network, its graph, the shape of its input."""
    found = {}
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        model = randomise(make(), 0.7)
        found[name] = (model, graph_of(model, torch.zeros(shape)), shape)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_equals_torch_again_and_again(known, name):
    model, graph, shape = known[name]
    engine = engine_of(graph)
    for _ in range(3):
        x = torch.randn(shape)
        assert_close_tasks(engine(x), expected_of(model, x))
    assert recorded(engine).replays == 3


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_narrow_types_are_as_near_as_torchs_own(known, name, dtype):
    model, graph, shape = known[name]
    x = torch.randn(shape)
    expected, found = expected_of(model, x), engine_of(graph, dtype)(x)
    narrow = copy.deepcopy(model).to(dtype)
    own = {k: y.float() for k, y in expected_of(narrow, x.to(dtype)).items()}
    for task, value in expected.items():
        assert found[task].dtype is dtype
        size = value.abs().max()
        error = (found[task].float() - value).abs().max() / size
        theirs = (own[task] - value).abs().max() / size
        assert error <= NARROW[dtype]
        assert error <= 2.5 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_integers_constants_and_parts_in_float32(dtype):
    torch.manual_seed(0)
    model = Awkward()
    x, kinds = torch.rand(2, 3, 6, 7), torch.tensor([1, 4])
    engine = engine_of(graph_of(model, x, kinds), dtype)
    for kinds in (torch.tensor([1, 4]), torch.tensor([0, 2])):
        found, expected = engine(x, kinds), expected_of(model, x, kinds)
        assert torch.equal(found["kinds"], kinds)
        assert found["kinds"] is not kinds
        assert found["class"].dtype is torch.int64
        assert torch.equal(found["same"].float(), x if dtype is None else x.to(dtype).float())
        error = (found["scores"].float() - expected["scores"]).abs().max()
        assert error <= (1e-6 if dtype is None else 2e-2)
        sure = expected["scores"].max(1).values > 0.5 + 2e-2
        assert torch.equal(found["class"][sure], expected["class"][sure])
    rows = engine.explain(*engine.input_shapes).rows
    in_float32 = [row for row in rows if "computes in torch.float32" in row.because]
    assert len(in_float32) == (0 if dtype is None else len(in_float32))
    assert dtype is None or in_float32


def test_every_kernel_that_a_cpu_has_gives_the_same(known):
    def clock(calls, device):
        for call in calls.values():
            call()
        return {name: 1.0 if name == "dense" else 0.5 for name in calls}

    torch.manual_seed(1)
    model = randomise(TimmStyle(), 0.97)
    x = torch.randn(2, 3, 17, 24)
    engine = Engine(graph_of(model, x), executor="device", target=Target(CPU, clock=clock))
    rows = {row.layer: row for row in engine.explain().rows}
    single = [row for row in rows.values() if row.runs_as == "single"]
    assert single
    assert all(row.because == "2.00x as fast as dense" for row in single)
    assert_close_tasks(engine(x), expected_of(model, x))


def test_a_kernel_that_differs_from_dense_is_left_out(known, monkeypatch, caplog):
    from sparsemtl.engine.executors.device_forms import Single

    call = Single.__call__
    monkeypatch.setattr(Single, "__call__", lambda self, *inputs: 1.01 * call(self, *inputs))
    torch.manual_seed(1)
    model = randomise(TimmStyle(), 0.97)
    graph = graph_of(model, torch.zeros(1, 3, 17, 24))
    clock = lambda calls, device: {name: 1.0 / len(name) for name in calls}  # noqa: E731
    engine = Engine(graph, executor="device", target=Target(CPU, clock=clock))
    assert {row.runs_as for row in engine.explain().rows if row.op == "conv2d"} == {"dense"}
    assert "is left out: it differs from torch by" in caplog.text


def test_the_graphs_own_input_is_not_copied(known):
    model, graph, shape = known["two-heads"]
    engine = engine_of(graph)
    (buffer,) = engine.input_buffer()
    assert buffer.shape == shape
    assert buffer.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(shape)
    buffer.copy_(x)
    version = buffer._version
    for own in (buffer, buffer[:]):
        assert_close_tasks(engine(own), expected_of(model, x))
    assert buffer._version == version
    engine(x.clone())
    assert buffer._version > version


def test_what_a_call_leaves_behind_does_not_matter(known):
    model, graph, shape = known["timm-style"]
    engine = engine_of(graph)
    x = torch.randn(shape)
    expected = expected_of(model, x)
    for _ in range(2):
        for buffer in engine.input_buffer():
            buffer.fill_(torch.nan)
        assert_close_tasks(engine(x), expected)
        assert bool(engine(torch.full(shape, torch.nan))["mask"].isnan().all())


def test_outputs_are_the_callers_own_unless_asked_otherwise(known):
    _, graph, shape = known["deeplab"]
    x, other = torch.randn(shape), torch.randn(shape)
    engine = engine_of(graph)
    first = engine(x)
    kept = {task: value.clone() for task, value in first.items()}
    again = engine(other)
    assert all(value.is_contiguous() and not value.is_inference() for value in first.values())
    assert all(torch.equal(first[task], kept[task]) for task in first)
    engine = engine_of(graph, copy_outputs=False)
    static = engine(x)
    assert all(torch.equal(static[task], kept[task]) for task in static)
    assert {v.data_ptr() for v in engine(other).values()} == {v.data_ptr() for v in static.values()}
    assert all(torch.equal(static[task], again[task]) for task in static)


def test_a_graph_for_each_size_weights_shared_and_the_oldest_dropped(known):
    model, graph, _ = known["timm-style"]
    engine = engine_of(graph, most_plans=2)
    sizes = [(1, 3, 17, 24), (3, 3, 16, 20), (2, 3, 9, 31)]
    for size in sizes[:2] * 2:
        x = torch.randn(size)
        assert_close_tasks(engine(x), expected_of(model, x))
    plans = [engine.plan(size) for size in sizes[:2]]
    assert [recorded(engine, size).replays for size in sizes[:2]] == [2, 2]
    one, two = (_weights(plan) for plan in plans)
    assert one
    assert one == two
    oldest = weakref.ref(plans[0].executor.run)
    del plans
    x = torch.randn(sizes[2])
    assert_close_tasks(engine(x), expected_of(model, x))
    gc.collect()
    assert oldest() is None
    assert_close_tasks(engine(torch.zeros(sizes[0])), expected_of(model, torch.zeros(sizes[0])))


def _weights(plan) -> set[int]:
    steps = plan.executor.run.selection.forms.values()
    return {form.weight.data_ptr() for form in steps}


def test_several_callers_of_several_sizes_at_once(known):
    model, graph, _ = known["two-heads"]
    engine = engine_of(graph, most_plans=4)
    inputs = [torch.randn(1 + i % 3, 3, 16, 16 + i % 2) for i in range(24)]
    found: dict[int, dict[str, Tensor]] = {}

    def work(start: int) -> None:
        for place in range(start, len(inputs), 4):
            found[place] = engine(inputs[place])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, x in enumerate(inputs):
        assert_close_tasks(found[place], expected_of(model, x))


def test_what_cannot_be_captured_runs_call_by_call_and_says_why(known, caplog):
    model, graph, shape = known["two-heads"]

    class Refuses:
        def __init__(self, call, device):
            call()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    engine = Engine(graph, executor="device", target=Target(CPU, capture=Refuses))
    x = torch.randn(shape)
    assert_close_tasks(engine(x), expected_of(model, x))
    assert "cannot be one CUDA graph: operation not permitted" in caplog.text
    assert "operation not permitted" in str(engine.explain())


def test_the_recorder_refuses_what_a_capture_does():
    x = torch.ones(3)
    for call in (lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="not permitted"):
            RecordedGraph(call, CPU)
    graph = RecordedGraph(lambda: (x * 2).relu_(), CPU)
    assert bool(graph.result.isnan().all())
    x.fill_(4.0)
    graph.replay()
    assert graph.result.tolist() == [8.0] * 3


def test_bad_inputs_are_refused_before_anything_runs(known):
    _, graph, shape = known["two-heads"]
    engine = engine_of(graph, torch.bfloat16)
    assert engine(torch.zeros(shape, dtype=torch.bfloat16))
    for x, error, words in (
        (torch.zeros(shape).double(), TypeError, "float32 or torch.bfloat16, got torch.float64"),
        (torch.zeros(shape).half(), TypeError, "float32 or torch.bfloat16, got torch.float16"),
        (torch.zeros(shape, device="meta"), ValueError, "on cpu, got meta"),
        (torch.zeros(2, 4, 18, 25), ValueError, "3 channels"),
    ):
        with pytest.raises(error, match=words):
            engine(x)
    with pytest.raises(ValueError, match="of a CUDA device for input_buffer"):
        Engine(graph, executor="torch").input_buffer()


def test_targets_are_checked_first():
    assert make_target("compile", None, None) is None
    assert make_target("compile", "cpu", "float32") is None
    for device, dtype, error, words in (
        (None, torch.bfloat16, ValueError, "device='cuda' with dtype torch.bfloat16"),
        ("cpu", "fp16", ValueError, "float32 on the CPU, got torch.float16"),
        ("cpu", "int8", ValueError, "dtype to be one of"),
        ("cpu", torch.float64, ValueError, "float32, bfloat16 or float16, got torch.float64"),
        ("gpu", None, ValueError, "like 'cuda' or 'cpu', got 'gpu'"),
        ("meta", None, ValueError, "cuda or cpu, got meta"),
    ):
        with pytest.raises(error, match=words):
            make_target("compile", device, dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    with pytest.raises(BackendUnavailable, match="compile: Expected a CUDA device for cuda"):
        sparsemtl.compile(TwoHeads(), (1, 3, 16, 16), device="cuda", dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match=r"Engine\.load: Expected a CUDA device"):
        Engine.load(tmp_path / "nothing", device="cuda")


def test_executors_of_the_cpu_are_not_for_a_device(known):
    _, graph, _ = known["two-heads"]
    engine = Engine(graph, executor="native", target=Target(CPU))
    with pytest.raises(BackendUnavailable, match="computes on the CPU"):
        engine.plan(*engine.input_shapes)


def test_a_model_in_double_precision_is_refused(known):
    model = TwoHeads().double()
    graph = graph_of(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="float32, bfloat16 or float16 for a device"):
        Engine(graph, executor="device").plan((1, 3, 8, 8))


def test_saved_and_loaded_it_is_the_same_engine(known, tmp_path):
    model, graph, shape = known["deeplab"]
    engine_of(graph, torch.bfloat16).save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine", executor="device")
    x = torch.randn(shape)
    assert_close_tasks(loaded(x), expected_of(model, x))
    assert replace(Target(CPU), copy_outputs=False).copy_outputs is False
