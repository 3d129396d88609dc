"""Step by step, a device program's values are where, what and laid out as they should be.

On the meta device, an operand that was left on the CPU is an error, as it is on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsemtl.engine.capture import capture
from sparsemtl.engine.device_select import DeviceSelection
from sparsemtl.engine.executors.device import Program
from sparsemtl.engine.executors.device_cast import DeviceWeights, cast_graph
from sparsemtl.engine.executors.device_forms import Dense
from sparsemtl.engine.passes import optimise
from sparsemtl.models.config import ModelConfig, build_model
from tests.engine.networks import Standardised, TimmStyle, TwoHeads
from tests.engine.support import randomise
from tests.engine.test_device import Awkward

KINDS = torch.tensor([1, 2])
NETWORKS = {
    "two-heads": (TwoHeads, (torch.zeros(2, 3, 18, 25),)),
    "timm-style": (TimmStyle, (torch.zeros(1, 3, 17, 24),)),
    "standardised": (Standardised, (torch.zeros(2, 3, 9, 12),)),
    "awkward": (Awkward, (torch.zeros(2, 3, 6, 7), KINDS)),
    "deeplab": (
        lambda: build_model(ModelConfig("deeplab-resnet18", width=0.25), {"a": 3, "b": 1}),
        (torch.zeros(1, 3, 65, 65),),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_values_are_where_and_what_the_graph_says(name):
    make, inputs = NETWORKS[name]
    model: nn.Module = randomise(make(), 0.9)
    graph, _ = optimise(capture(model, list(inputs)))
    for device in (torch.device("meta"), torch.device("cpu")):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with torch.no_grad():
                walk(graph, inputs, device, dtype)


def walk(graph, inputs, device: torch.device, dtype: torch.dtype) -> None:
    cast = cast_graph(graph, device, dtype, DeviceWeights())
    convolutions = [node for node in cast.graph.nodes if node.op == "conv2d"]
    forms = {node.name: Dense(node) for node in convolutions}
    program = Program(cast, DeviceSelection(forms, {}, {}))
    assert convolutions
    values = dict(program._constants)
    for name, x in zip(graph.inputs, inputs, strict=True):
        like = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        values[name] = x.to(device, cast.graph.values[name].dtype).contiguous(memory_format=like)
    for step in program.steps:
        found = step.call(*(values[name] for name in step.inputs))
        for name, y in zip(step.outputs, found, strict=True):
            said = cast.graph.values[name]
            assert (y.device.type, y.dtype, tuple(y.shape)) == (device.type, said.dtype, said.shape)
            # Meta convolutions do not know layouts; torch's softmax on the CPU knows one.
            if device.type == "cpu" and y.dim() == 4 and "softmax" not in name:
                assert y.is_contiguous(memory_format=torch.channels_last), name
        values.update(zip(step.outputs, found, strict=True))
        for name in step.drop:
            del values[name]
    assert set(values) <= {*program._constants, *graph.outputs.values()}
