"""The device executor on a GPU: captured for real, in every type, on several streams."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import sparsemtl
from sparsemtl.engine.engine import Engine
from tests.engine.networks import Standardised, TimmStyle, TwoHeads
from tests.engine.support import assert_close_tasks, expected_of, randomise
from tests.engine.test_device import NARROW
from tests.engine.test_device_kernels import Branches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NETWORKS = {"two-heads": TwoHeads, "timm": TimmStyle, "weights": Standardised, "blocks": Branches}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """float32 without tf32; one tile of each kernel."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setenv("SPARSEMTL_AUTOTUNE", "0")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = NETWORKS[name]()
    return made.eval() if name == "blocks" else randomise(made, 0.7)


def check(engine: Engine, model: nn.Module, x: Tensor, limit: float) -> None:
    found = {task: y.float().cpu() for task, y in engine(x.cuda()).items()}
    assert_close_tasks(found, expected_of(model, x), limit)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_one_graph_equals_torch(name, dtype):
    model = network(name)
    engine = sparsemtl.compile(model, (2, 3, 24, 33), device="cuda", dtype=dtype)
    for shape in ((2, 3, 24, 33), (1, 3, 17, 24), (2, 3, 24, 33)):
        for _ in range(2):
            check(engine, model, torch.randn(shape), NARROW.get(dtype, 1e-4))
        where = engine.explain(shape).where
        assert where == f"cuda:0 in {dtype}, as one graph", where


def test_buffers_and_outputs_of_the_graph():
    model = network("timm")
    engine = sparsemtl.compile(model, (1, 3, 24, 32), device="cuda", copy_outputs=False)
    (buffer,) = engine.input_buffer()
    first, second = torch.randn(1, 3, 24, 32), torch.randn(1, 3, 24, 32)
    buffer.copy_(first)
    found = engine(buffer)
    assert_close_tasks({k: y.cpu() for k, y in found.items()}, expected_of(model, first))
    engine(second.cuda())
    assert_close_tasks({k: y.cpu() for k, y in found.items()}, expected_of(model, second))


def test_callers_on_streams_of_their_own():
    model = network("two-heads")
    engine = sparsemtl.compile(model, (1, 3, 16, 16), device="cuda", most_plans=2)
    inputs = [torch.randn(1 + place % 3, 3, 16, 16) for place in range(24)]
    found: dict[int, dict[str, Tensor]] = {}

    def work(start: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for place in range(start, len(inputs), 4):
                found[place] = {k: y.cpu() for k, y in engine(inputs[place].cuda()).items()}

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, x in enumerate(inputs):
        assert_close_tasks(found[place], expected_of(model, x))


def test_inputs_of_another_device_are_refused():
    engine = sparsemtl.compile(network("two-heads"), (1, 3, 16, 16), device="cuda")
    with pytest.raises(ValueError, match="on cuda:0, got cpu"):
        engine(torch.zeros(1, 3, 16, 16))


def test_a_model_on_the_device_goes_there_by_itself(tmp_path):
    model = network("timm")
    x = torch.randn(1, 3, 24, 32)
    engine = sparsemtl.compile(model.cuda(), x.cuda())
    model.cpu()
    check(engine, model, x, 1e-4)
    engine.save(tmp_path / "engine")
    check(Engine.load(tmp_path / "engine", device="cuda"), model, x, 1e-4)
