"""The device executor over our Triton kernels in their interpreter, each form made to be chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemtl.engine.capture import capture
from sparsemtl.engine.device_select import depths_of
from sparsemtl.engine.engine import Engine
from sparsemtl.engine.passes import optimise
from sparsemtl.engine.target import Target
from sparsemtl.ops import sparse_conv2d_grouped as grouped
from sparsemtl.ops.availability import INTERPRETING
from sparsemtl.ops.sparse_conv2d_grouped import LateTable
from tests.engine.support import assert_close_tasks, expected_of

CPU = torch.device("cpu")


class Branches(nn.Module):
    """Two heads of equal branches at two rates, a residual block before them."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.one = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=groups)
        self.two = nn.Conv2d(16, 16, 3, padding=4, dilation=4, groups=groups)
        self.heads = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList((nn.Conv2d(16, 32, 3, padding=r, dilation=r), nn.Conv2d(32, 3, 1)))
                for r in (1, 3)
            )
            for _ in range(2)
        )
        with torch.no_grad():
            for conv in self.modules():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    _prune_blocks(conv.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.stem(x))
        y = F.relu(y + self.two(F.relu6(self.one(y))))
        return {
            str(i): sum(last(F.relu(first(y))) for first, last in head)
            for i, head in enumerate(self.heads)
        }


def _prune_blocks(weight: Tensor) -> None:
    """Leave about half of the blocks of 16x16, and something in each output and input channel."""
    rows, columns = -(-weight.shape[0] // 16), -(-weight.shape[1] // 16)
    keep = torch.rand(rows, columns, *weight.shape[2:]) < 0.4
    keep[:, :, 1, 1] = True
    spread = keep.repeat_interleave(16, 0).repeat_interleave(16, 1)
    weight.mul_(spread[: weight.shape[0], : weight.shape[1]])


def engine_of(model: nn.Module, x: Tensor, wanted: str, dtype=None) -> Engine:
    """An engine whose clock finds every form fastest whose name begins so."""

    def clock(calls, device):
        return {name: 0.1 if name.startswith(wanted) else 1.0 for name in calls}

    graph, _ = optimise(capture(model.eval(), [x]))
    target = Target(CPU, dtype, clock=clock)
    return Engine(graph, executor="device", target=target)


FORMS = {"block16": 3, "dense skip": 5, "together": 4}


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", FORMS)
def test_every_form_equals_torch(wanted, dtype, monkeypatch):
    monkeypatch.setenv("SPARSEMTL_AUTOTUNE", "0")
    model, x = Branches(), torch.randn(1, 3, 9, 14)
    engine = engine_of(model, x, wanted, dtype)
    chosen = [row for row in engine.explain().rows if row.runs_as.startswith(wanted)]
    assert len(chosen) >= FORMS[wanted]
    for size in (x.shape, (2, 3, 7, 9)):
        x = torch.randn(size)
        found = {task: y.float() for task, y in engine(x).items()}
        limit = 1e-4 if dtype is torch.float32 else 1e-2
        assert_close_tasks(found, expected_of(model, x), limit)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
def test_groups_of_channels_and_timing_for_real(monkeypatch):
    monkeypatch.setenv("SPARSEMTL_AUTOTUNE", "0")
    model, x = Branches(groups=2), torch.randn(1, 3, 9, 10)
    assert_close_tasks(engine_of(model, x, "block")(x), expected_of(model, x))
    graph, _ = optimise(capture(model.eval(), [x]))
    engine = Engine(graph, executor="device")
    rows = [row for row in engine.explain().rows if row.op == "conv2d"]
    assert any(len(row.candidates) > 1 for row in rows)
    assert all(seconds > 0 for row in rows for seconds in row.candidates.values())
    assert {row.runs_as for row in rows} == {"dense"}  # an interpreter is not fast
    assert_close_tasks(engine(x), expected_of(model, x))


def test_branches_of_one_depth_do_not_need_each_other():
    graph, _ = optimise(capture(Branches().eval(), [torch.zeros(1, 3, 13, 18)]))
    depths = depths_of(graph)
    wide = [n for n in graph.nodes if n.op == "conv2d" and n.weights["weight"].shape[0] == 32]
    assert len(wide) == 4
    assert len({depths[n.name] for n in wide}) == 1
    for node in graph.nodes:
        for other in graph.nodes:
            if set(other.outputs) & set(node.inputs):
                assert depths[other.name] < depths[node.name]


def test_a_table_is_written_after_the_capture_that_learns_it(monkeypatch):
    table = LateTable()
    table.write()  # nothing was launched yet
    first = table(((1, 2), (3, 4)), CPU)
    assert first.tolist() == [[1, 2], [3, 4]]
    monkeypatch.setattr(grouped, "_capturing", lambda device: True)
    second = table(((5, 6), (7, 8)), CPU)
    assert second is first
    assert first.tolist() == [[1, 2], [3, 4]]
    table.write()
    assert first.tolist() == [[5, 6], [7, 8]]
