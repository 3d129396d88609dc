"""Each pass: what it finds, what it leaves, and that the outputs stay equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemtl.engine.graph import Graph
from sparsemtl.engine.passes import FOR_A_SIZE, GENERAL, adapt, optimise
from sparsemtl.engine.passes.constants import fold_constants
from sparsemtl.engine.passes.dead_channels import remove_dead_channels
from sparsemtl.engine.passes.drop_identity import drop_identity
from sparsemtl.engine.passes.fold_batch_norm import fold_batch_norm
from sparsemtl.engine.passes.fuse import fuse_activation, fuse_residual
from sparsemtl.engine.passes.merge_branches import merge_branches
from sparsemtl.engine.passes.round_channels import round_channels
from sparsemtl.engine.passes.trim_taps import trim_taps
from sparsemtl.engine.shapes import specialise
from sparsemtl.models.config import ModelConfig, build_model
from tests.engine.networks import TimmStyle, TwoHeads
from tests.engine.support import assert_close_tasks, captured, expected_of, randomise, run


class Net(nn.Module):
    """Layers c0, c1, ... and a forward pass given as a function of (net, x)."""

    def __init__(self, forward: Callable[..., object], *layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for place, layer in enumerate(layers):
            setattr(self, f"c{place}", layer)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def graph_of(forward, *layers, x: Tensor, sparsity=0.3, seed=0) -> tuple[nn.Module, Graph]:
    model = randomise(Net(forward, *layers), sparsity, seed=seed)
    return model, captured(model, x)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def check(model: nn.Module, graph: Graph, x: Tensor, relative: float = 1e-5) -> None:
    assert_close_tasks(run(graph, x), expected_of(model, x), relative)


X = torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(1))


def conv(i=4, o=6, k=3, **kw) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=kw.pop("padding", k // 2), **kw)


def test_identities_go():
    model, graph = graph_of(
        lambda n, x: {"a": F.dropout(n.c0(x), 0.5, n.training).clone().contiguous()}, conv(), x=X
    )
    assert drop_identity(graph) >= 2
    assert ops(graph) == ["conv2d"]
    check(model, graph, X, 0.0)


def test_an_output_stays_a_tensor_of_its_own():
    _, graph = graph_of(lambda n, x: {"a": F.dropout(x, 0.5, n.training)}, x=X)
    drop_identity(graph)
    found = run(graph, X)
    assert found["a"].equal(X)
    assert graph.outputs["a"] != graph.inputs[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_folds_into_a_convolution(bias, affine):
    norm = nn.BatchNorm2d(6, affine=affine)
    model = Net(lambda n, x: {"a": n.c1(n.c0(x))}, conv(bias=bias), norm).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3.0)
    graph = captured(model, X)
    assert fold_batch_norm(graph) == 1
    assert ops(graph) == ["conv2d"]
    check(model, graph, X, 1e-6)


LEFT_ALONE = {
    "read-twice": (lambda n, x: {"a": n.c1(y := n.c0(x)), "b": y * y}, 1),
    "after-an-activation": (lambda n, x: {"a": n.c1(F.relu(n.c0(x)))}, 1),
    "on-the-input": (lambda n, x: {"a": n.c0(n.c2(x))}, 1),
}


@pytest.mark.parametrize(("forward", "norms"), LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_batch_norm_that_cannot_fold_stays(forward, norms):
    model, graph = graph_of(forward, conv(), nn.BatchNorm2d(6), nn.BatchNorm2d(4), x=X)
    assert fold_batch_norm(graph) == 0
    assert ops(graph).count("batch_norm") == norms
    check(model, graph, X)


def test_residual_and_activation_fuse():
    model, graph = graph_of(
        lambda n, x: {"a": F.relu(x + n.c1(F.relu6(n.c0(x)))), "b": n.c0(x)},
        conv(),
        conv(6, 4),
        x=X,
    )
    assert fuse_residual(graph) == 1
    assert fuse_activation(graph) == 2
    assert ops(graph).count("conv2d") == 3
    assert len(graph.nodes) == 3
    check(model, graph, X)


NOT_FUSED = {
    "broadcast": lambda n, x: {"a": n.c0(x) + x.mean((2, 3), keepdim=True)[:, :1]},
    "read-twice": lambda n, x: {"a": (y := n.c0(x)) + x[:, :1], "b": y * 2},
    "with-itself": lambda n, x: {"a": (y := n.c0(x)) + y},
    "after-an-activation": lambda n, x: {"a": F.relu(n.c0(x)) + n.c0(x).sigmoid()},
}


@pytest.mark.parametrize("forward", NOT_FUSED.values(), ids=NOT_FUSED.keys())
def test_what_is_no_residual_stays_an_addition(forward):
    model, graph = graph_of(forward, conv(), x=X)
    fuse_activation(graph)
    assert fuse_residual(graph) == 0
    check(model, graph, X)


def test_of_two_layers_the_later_takes_the_sum():
    model, graph = graph_of(
        lambda n, x: {"a": n.c1(n.c0(x)) + n.c2(x) + n.c3(x)},
        conv(),
        conv(6, 6),
        conv(),
        conv(),
        x=X,
    )
    assert fuse_residual(graph) == 2
    assert ops(graph) == ["conv2d"] * 4
    check(model, graph, X)


def test_a_sum_of_pointwise_layers_becomes_one():
    def forward(n, x):
        return {"a": n.c0(x) + n.c1(F.relu(x)) + (n.c2(x.sigmoid()) + n.c3(x)) + x[:, :1]}

    layers = [conv(k=1), conv(k=1, bias=False), conv(k=1), conv(k=3)]
    model, graph = graph_of(lambda n, x: _sum_of(n, x), *layers, x=X)
    assert merge_branches(graph) == 2
    assert ops(graph).count("concat") == 1
    assert ops(graph).count("conv2d") == 2
    check(model, graph, X)
    _, broadcast = graph_of(forward, *layers, x=X)
    assert merge_branches(broadcast) == 2, "the tree below a broadcast is still a sum"


def _sum_of(n: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"a": n.c0(x) + n.c1(F.relu(x)) + (n.c2(x.sigmoid()) + n.c3(x))}


def test_branches_that_somebody_else_reads_stay():
    model, graph = graph_of(
        lambda n, x: {"a": (y := n.c0(x)) + n.c1(F.relu(x)), "b": F.relu(y)},
        conv(k=1),
        conv(k=1),
        x=X,
    )
    assert merge_branches(graph) == 0
    check(model, graph, X)


def test_the_heads_of_ours_end_in_one_layer_each():
    model = randomise(build_model(ModelConfig(width=0.1), {"seg": 3, "depth": 1}), 0.5)
    x = torch.randn(1, 3, 33, 41)
    graph = captured(model, x)
    assert merge_branches(graph) == 6
    check(model, graph, x)


@pytest.mark.parametrize("size", [(9, 9), (5, 13), (25, 7), (3, 3)])
@pytest.mark.parametrize("rate", [2, 6, 12])
def test_taps_beyond_the_map_go(size, rate):
    layer = nn.Conv2d(4, 5, 3, padding=rate, dilation=rate)
    x = torch.randn(1, 4, *size)
    model, graph = graph_of(lambda n, x: {"a": n.c0(x)}, layer, x=x)
    trim_taps(graph)
    kernel = graph.nodes[0].weights["weight"].shape[2:]
    assert tuple(kernel) == tuple(3 if rate < n else 1 for n in size)
    check(model, graph, x, 1e-6)


def test_taps_that_some_pixel_reads_stay():
    cases = [(5, 2, 4, 1), (3, 1, 0, 1), (7, 2, 3, 1), (5, 3, 8, 4), (1, 2, 3, 1), (4, 1, 9, 5)]
    for kernel, stride, padding, dilation in cases:
        layer = nn.Conv2d(4, 5, kernel, stride, padding, dilation)
        x = torch.randn(2, 4, 6, 17)
        model, graph = graph_of(lambda n, x: {"a": n.c0(x)}, layer, x=x)
        trim_taps(graph)
        check(model, graph, x, 1e-6)


def _kill(layer: nn.Conv2d, *rows: int) -> None:
    with torch.no_grad():
        layer.weight[list(rows)] = 0


def dead_case(forward, *layers, rows=(1, 3), x=X):
    model = randomise(Net(forward, *layers), 0.2)
    _kill(model.c0, *rows)
    return model, captured(model, x)


def test_a_dead_filter_becomes_a_bias_without_padding():
    model, graph = dead_case(
        lambda n, x: {"a": n.c1(F.relu(n.c0(x)))}, conv(), conv(6, 5, 3, padding=0)
    )
    assert remove_dead_channels(graph) == 2
    first, _, second = graph.nodes
    assert first.weights["weight"].shape[0] == 4
    assert second.weights["weight"].shape == (5, 4, 3, 3)
    check(model, graph, X)


def test_behind_padding_only_a_dead_zero_goes():
    model = randomise(Net(lambda n, x: {"a": n.c1(F.relu(n.c0(x)))}, conv(), conv(6, 5)), 0.2)
    _kill(model.c0, 1, 3)
    with torch.no_grad():
        model.c0.bias[1], model.c0.bias[3] = 0.7, -0.7  # relu: 0.7 everywhere, and 0 everywhere
    graph = captured(model, X)
    assert remove_dead_channels(graph) == 1
    check(model, graph, X)


def test_what_nobody_reads_goes_backwards_through_the_layers():
    model = randomise(
        Net(
            lambda n, x: {"a": n.c2(F.relu(n.c1(F.relu(n.c0(x)))))}, conv(), conv(6, 8), conv(8, 3)
        ),
        0.2,
    )
    with torch.no_grad():
        model.c2.weight[:, :5] = 0  # five channels of c1 are not read,
        model.c1.weight[5:, 2] = 0  # and the rest do not read one of c0
    graph = captured(model, X)
    assert remove_dead_channels(graph) == 6
    check(model, graph, X)


TIED = {
    "residual": lambda n, x: {"a": n.c2(y := F.relu(n.c0(x))) + n.c1(y)},
    "sum-of-both": lambda n, x: {"a": n.c2(F.relu(n.c0(x) + n.c1(x.sigmoid())[:, :6]))},
    "concatenation": lambda n, x: {"a": n.c3(torch.cat([n.c0(x), x, n.c0(x)], 1))},
    "pooling": lambda n, x: {"a": n.c2(F.avg_pool2d(F.max_pool2d(n.c0(x), 2), 3, 1, 1))},
    "resize": lambda n, x: {"a": n.c2(F.interpolate(n.c0(x), scale_factor=2, mode="bilinear"))},
    "gate": lambda n, x: {"a": n.c2((y := n.c0(x)) * y.mean((2, 3), keepdim=True).sigmoid())},
    "depthwise": lambda n, x: {"a": n.c2(n.c4(n.c0(x)))},
    "grouped": lambda n, x: {"a": n.c2(n.c5(n.c0(x)))},
    "seen-by-torch": lambda n, x: {"a": n.c2(F.gelu(n.c0(x)))},
    "flattened": lambda n, x: {"a": n.c0(x).flatten(1), "b": n.c2(n.c0(x))},
    "an-output-itself": lambda n, x: {"a": n.c0(x), "b": n.c2(n.c0(x))},
    "batch-norm": lambda n, x: {"a": n.c2(n.c6(F.relu(n.c0(x))))},
    "added-to-itself": lambda n, x: {"a": n.c2((y := n.c0(x)) + F.relu(y))},
}


@pytest.mark.parametrize("forward", TIED.values(), ids=TIED.keys())
@pytest.mark.parametrize("rows", [(1, 3), (0, 1, 2, 3, 4, 5)], ids=["two", "all"])
def test_tied_channels_keep_the_outputs(forward, rows):
    layers = (conv(), conv(4, 6), conv(6, 6), conv(16, 3, 1))
    more = (conv(6, 6, groups=6), conv(6, 6, groups=2), nn.BatchNorm2d(6))
    if forward is TIED["residual"]:
        layers = (conv(), conv(6, 6), *layers[2:])
    model, graph = dead_case(forward, *layers, *more, rows=rows)
    folded = graph.copy()
    fold_constants(folded)
    check(model, folded, X)
    remove_dead_channels(graph)
    check(model, graph, X)
    check(model, optimise(captured(model, X))[0], X)


def test_a_network_that_is_all_dead_still_answers():
    model = build_model(ModelConfig("mobilenetv2", width=0.1), {"seg": 3, "depth": 1})
    randomise(model, 1.0)
    x = torch.randn(1, 3, 32, 32)
    graph, _ = optimise(captured(model, x))
    check(model, graph, x)
    assert all(min(node.weights["weight"].shape) >= 1 for node in graph.nodes if node.weights)


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("network", ["deeplab-resnet18", "mobilenetv2", TwoHeads, TimmStyle])
def test_all_passes_together_keep_the_outputs(network, sparsity):
    if isinstance(network, str):
        model = build_model(ModelConfig(network, width=0.1), {"seg": 4, "normals": 3})
    else:
        model = network()
    randomise(model, sparsity, dead=0.3 if sparsity else 0.0)
    x = torch.randn(1, 3, 40, 33)
    graph = captured(model, x)
    general, found = optimise(graph)
    assert list(found) == list(GENERAL)
    assert len(general.nodes) < len(graph.nodes)
    for size in ((1, 3, 40, 33), (2, 3, 33, 72)):
        y = torch.randn(size)
        special, found = adapt(specialise(general, [size]))
        assert list(found) == list(FOR_A_SIZE)
        check(model, special, y)


def test_channels_are_rounded_up_where_convolutions_alone_read_them():
    def forward(net, x):
        y = F.relu(net.c0(x))
        left, right = net.c1(y), F.relu6(net.c2(y))
        z = torch.cat([x, left, right], 1)
        deep = torch.cat([net.c3(z), z], 1)
        return {"a": net.c4(deep), "b": net.c5(right)}

    layers = [conv(4, 7), conv(7, 5), conv(7, 9, 1), conv(18, 3), conv(21, 6), conv(9, 2)]
    model, graph = graph_of(forward, *layers, x=X)
    fuse_activation(graph)
    graph.prune()
    assert round_channels(graph, 8) == 1 + 3 + 7 + 5  # c4 and c5 are outputs
    widths = [n.weights["weight"].shape[:2] for n in graph.nodes if n.op == "conv2d"]
    assert sorted(widths) == sorted([(8, 4), (8, 8), (16, 8), (8, 28), (6, 36), (2, 16)])
    check(model, graph, X)
    assert round_channels(graph, 8) == 0


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: {"a": net.c0(x)},
        lambda net, x: {"a": net.c1(net.c0(x) * 2)},
        lambda net, x: {"a": net.c1(y := net.c0(x)), "b": y.mean((2, 3))},
        lambda net, x: {"a": net.c1(y := net.c0(x)) + y},
        lambda net, x: {"a": net.c2(torch.cat([(y := net.c0(x)), y], 1))},
        lambda net, x: {"a": net.c1(torch.cat([(y := net.c0(x)), y], 2))},
        lambda net, x: {"a": net.c3(net.c0(x))},
    ],
    ids=["output", "arithmetic", "mean", "residual", "twice", "rows", "groups"],
)
def test_channels_that_others_read_stay(forward):
    layers = [conv(4, 6), conv(6, 6), conv(12, 8), conv(6, 6, groups=2)]
    _, graph = graph_of(forward, *layers, x=X)
    fuse_residual(graph)
    graph.prune()
    before = str(graph)
    assert round_channels(graph, 8) == 0
    assert str(graph) == before
