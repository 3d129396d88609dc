"""Capture: any module becomes a graph that computes the same, for the sizes that it allows."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from sparsemtl.engine.capture import capture
from sparsemtl.engine.capture_errors import CaptureError
from sparsemtl.engine.executors.torch import TorchExecutor
from sparsemtl.engine.graph import Graph
from sparsemtl.engine.shapes import specialise
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.sparsity.sparsify import sparsify
from tests.engine import networks


def assert_same(model: nn.Module, graph: Graph, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected = model.eval()(*inputs)
    if isinstance(expected, Tensor):
        expected = {"output": expected}
    graph = specialise(graph, [tuple(x.shape) for x in inputs])
    graph.validate()
    found = TorchExecutor(graph)(*inputs)
    assert list(found) == list(expected)
    for task, value in expected.items():
        torch.testing.assert_close(found[task], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["deeplab-resnet18", "mobilenetv2"])
def test_ours_is_captured_for_every_size_at_once(name):
    model = build_model(ModelConfig(name, width=0.1), {"seg": 3, "depth": 1}).eval()
    graph = capture(model, [torch.randn(1, 3, 33, 47)])
    assert all(node.op != "torch" for node in graph.nodes)
    for shape in ((1, 3, 33, 47), (3, 3, 40, 21), (2, 3, 65, 34)):
        assert_same(model, graph, torch.randn(shape))


@pytest.mark.parametrize("network", [networks.TwoHeads, networks.TimmStyle])
def test_a_network_of_anyones_is_captured_as_it_stands(network):
    model = network()
    graph = capture(model, [torch.randn(2, 3, 17, 24)])
    assert model.training, "the model is left as it was"
    for shape in ((2, 3, 17, 24), (1, 3, 12, 9), (4, 3, 8, 8)):
        assert_same(model, graph, torch.randn(shape))


def test_in_place_modules_are_left_in_place():
    model = networks.TimmStyle()
    capture(model, [torch.randn(1, 3, 16, 16)])
    assert model.stem[2].inplace


def test_what_torch_runs_keeps_its_operator():
    graph = capture(networks.TwoHeads(), [torch.randn(1, 3, 16, 16)])
    targets = {node.attrs["target"] for node in graph.nodes if node.op == "torch"}
    assert targets == {
        "aten::gelu.default",
        "aten::conv_transpose2d.input",
        "aten::log_softmax.int",
    }


def test_a_sparsified_model_gives_its_thresholded_weights():
    model = build_model(ModelConfig("mobilenetv2", width=0.1), {"seg": 3})
    sparsify(model, theta_init=-4.0)
    model.eval()
    graph = capture(model, [torch.randn(1, 3, 32, 32)])
    assert_same(model, graph, torch.randn(1, 3, 32, 32))
    convs = [node for node in graph.nodes if node.op == "conv2d"]
    assert sum(int((node.weights["weight"] == 0).sum()) for node in convs) > 1000
    assert all(node.op != "torch" for node in graph.nodes)


def test_what_does_not_depend_on_the_input_is_computed_once():
    model = networks.Standardised()
    graph = capture(model, [torch.randn(2, 3, 6, 6)])
    (conv,) = [node for node in graph.nodes if node.op == "conv2d"]
    assert conv.weights["weight"].mean().abs() < 1e-6
    assert_same(model, graph, torch.randn(2, 3, 6, 6))
    assert_same(model, graph, torch.randn(3, 3, 4, 10))


def test_a_size_that_the_model_compares_is_guarded():
    graph = capture(networks.Standardised(), [torch.randn(2, 3, 6, 6)])
    with pytest.raises(ValueError, match=r"d0_0 != 1.*got \[\[1, 3, 6, 6\]\]"):
        specialise(graph, [(1, 3, 6, 6)])
    with pytest.raises(ValueError, match="dimensions"):
        specialise(graph, [(2, 3, 6)])


def test_channels_cannot_change():
    graph = capture(networks.TwoHeads(), [torch.randn(2, 3, 16, 16)])
    with pytest.raises(ValueError, match="Expected size 3 in dimension 1 of input 'x'"):
        specialise(graph, [(2, 4, 16, 16)])


@pytest.mark.parametrize(
    "network",
    [
        networks.AsksAValue,
        networks.LoopsOverAValue,
        networks.SelectsByValue,
        networks.LeavesTorch,
    ],
)
def test_control_flow_over_values_is_refused_by_line(network, capfd):
    lines, first = inspect.getsourcelines(network)
    place = next(i for i, line in enumerate(lines) if "must name" in line)
    code = lines[place].split("#")[0].strip()
    with pytest.raises(CaptureError) as caught:
        capture(network(), [torch.randn(1, 3, 4, 4)])
    text = str(caught.value)
    assert str(first + place) in text
    assert code in text
    assert "networks.py" in text
    assert "torch.where" in text or "torch operations" in text
    assert capfd.readouterr().err == ""


def test_what_the_model_raises_itself_is_passed_on():
    with pytest.raises(ValueError, match="this network wants something else"):
        capture(networks.Refuses(), [torch.randn(1, 3, 4, 4)])


def test_an_output_that_ignores_the_input_is_named():
    with pytest.raises(CaptureError, match="'b' to be a tensor that depends on the input"):
        capture(networks.ConstantOutput(), [torch.randn(1, 3, 4, 4)])


def test_capture_changes_nothing():
    model = networks.TwoHeads()
    before = copy.deepcopy(model.state_dict())
    capture(model, [torch.randn(1, 3, 16, 16)])
    after = model.state_dict()
    assert all(before[name].equal(after[name]) for name in before)
