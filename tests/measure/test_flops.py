"""Work: the published table, exact small cases, and odd networks."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from sparsemtl.measure import Work, count_flops
from sparsemtl.models import ModelConfig, build_model, find_components

HEADS = {"segmentation": 40, "normals": 3, "depth": 1}


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        names = {"r34": "deeplab-resnet34", "mbv2": "mobilenetv2"}
        return {key: build_model(ModelConfig(name), HEADS) for key, name in names.items()}


TABLE = {  # input → GMAC of (r34 backbone, heads, total, MBv2 backbone, heads, total)
    (224, 224): (18.53, 58.35, 76.88, 0.30, 7.56, 7.86),
    (256, 256): (24.00, 75.56, 99.56, 0.39, 9.88, 10.27),
    (321, 321): (37.06, 116.64, 153.70, 0.67, 18.67, 19.35),
    (288, 384): (39.97, 125.80, 165.76, 0.66, 16.67, 17.33),
    (256, 512): (47.29, 148.83, 196.12, 0.78, 19.75, 20.54),
    (480, 640): (108.98, 342.84, 451.81, 1.83, 46.30, 48.13),
}


@pytest.mark.parametrize("size", TABLE, ids=str)
def test_published_table(models, size):
    found = []
    for model in models.values():
        report = count_flops(model, size)
        backbone = report.components["backbone"].dense_mac
        found += [backbone, report.total.dense_mac - backbone, report.total.dense_mac]
    assert [round(mac / 1e9, 2) for mac in found] == list(TABLE[size])


IN_BOUNDS = {  # model, input → share of tap positions inside the map at rates 6, 12, 18, 24
    ("r34", (224, 224)): (0.743, 0.524, 0.344, 0.201),
    ("r34", (321, 321)): (0.814, 0.648, 0.500, 0.372),
    ("r34", (480, 640)): (0.888, 0.783, 0.684, 0.592),
    ("mbv2", (321, 321)): (0.405, 0.111, 0.111, 0.111),
    ("mbv2", (224, 224)): (0.184, 0.111, 0.111, 0.111),
}


@pytest.mark.parametrize("case", IN_BOUNDS, ids=str)
def test_in_bounds_shares_of_the_heads(models, case):
    name, size = case
    rows = {row.name: row.work for row in count_flops(models[name], size).layers}
    works = [rows[f"heads.depth.branches.{i}.0"] for i in range(4)]
    shares = tuple(round(work.in_bounds_mac / work.dense_mac, 3) for work in works)
    assert shares == IN_BOUNDS[case]


def test_in_bounds_totals(models):
    for size, expected in {(224, 224): 48.3, (321, 321): 110.5, (480, 640): 372.0}.items():
        total = count_flops(models["r34"], size).total
        assert round(total.in_bounds_mac / 1e9, 1) == expected
        assert total.sparse_mac == total.dense_mac  # weights on meta have no values


def test_backbone_by_part(models):
    report = count_flops(models["r34"], (224, 224))
    parts = dict.fromkeys(["stem", "0", "1", "2", "3"], 0)
    for row in report.layers:
        names = row.name.split(".")
        if names[0] == "backbone":
            parts["stem" if names[1] == "stem" else names[2]] += row.work.dense_mac
    assert [round(mac / 1e9, 2) for mac in parts.values()] == [0.12, 0.72, 0.94, 5.73, 11.02]


def brute_force(layer: nn.Conv2d, x: Tensor, out: Tensor) -> tuple[int, int]:
    """In-bounds and sparse in-bounds MACs of one convolution, tap by tap."""
    before = [0, 0]
    if layer.padding == "same":
        before = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    elif layer.padding != "valid":
        before = list(layer.padding)
    dense = sparse = 0
    for i in range(layer.kernel_size[0]):
        for j in range(layer.kernel_size[1]):
            rows = [
                r * layer.stride[0] - before[0] + i * layer.dilation[0] for r in range(out.shape[2])
            ]
            columns = [
                c * layer.stride[1] - before[1] + j * layer.dilation[1] for c in range(out.shape[3])
            ]
            inside = sum(0 <= r < x.shape[2] for r in rows) * sum(
                0 <= c < x.shape[3] for c in columns
            )
            dense += x.shape[0] * inside * layer.weight[:, :, i, j].numel()
            sparse += x.shape[0] * inside * int((layer.weight[:, :, i, j] != 0).sum())
    return dense, sparse


CONVS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "rectangular": {"kernel_size": (3, 5), "padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)},
    "dead-taps": {"kernel_size": 3, "padding": 24, "dilation": 24},
    "same-even": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "pointwise-stride": {"kernel_size": 1, "stride": 3},
}


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS.keys())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions_tap_by_tap(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, **options)
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.6] = 0
    x = torch.randn(2, 4, 11, 14)
    out = layer(x)
    row = count_flops(layer, x.shape).layers[0]
    dense, sparse = brute_force(layer, x, out)
    assert row.work.in_bounds_mac == dense
    assert row.work.sparse_in_bounds_mac == sparse
    pixels = out.shape[0] * out.shape[2] * out.shape[3]
    assert row.work.dense_mac == pixels * layer.weight.numel()
    assert row.work.sparse_mac == pixels * int((layer.weight != 0).sum())
    assert row.output == tuple(out.shape)
    assert count_flops(layer, x.shape, example=x) == count_flops(layer, x.shape)


def test_padding_with_data_is_in_bounds():
    work = count_flops(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (1, 2, 5, 5)).total
    assert work.in_bounds_mac == work.dense_mac == 25 * 36


def test_linear_over_any_leading_dimensions():
    work = count_flops(nn.Linear(5, 7), (2, 3, 4, 5)).total
    assert work == Work(24 * 35, 24 * 35, 24 * 35, 24 * 35, 35, 35)


def test_sparse_counts_follow_the_weights():
    torch.manual_seed(0)
    model = build_model(ModelConfig("deeplab-resnet18", width=0.125), HEADS)
    dense = count_flops(model, (40, 56))
    with torch.no_grad():
        for weight in model.components()["head:depth"].weights:
            weight[torch.rand_like(weight) < 0.9] = 0
    sparse = count_flops(model, (40, 56))
    assert sparse.total.dense_mac == dense.total.dense_mac
    head = sparse.components["head:depth"]
    nonzeros = [int((w != 0).sum()) for w in model.components()["head:depth"].weights]
    assert head.nonzeros == sum(nonzeros)
    assert head.sparse_mac == sum(nonzeros) * 6 * 8
    assert head.sparsity == pytest.approx(0.9, abs=0.01)
    assert sparse.components["backbone"] == dense.components["backbone"]


def test_effective_weights_replace_the_stored_ones():
    model = build_model(ModelConfig("mobilenetv2", width=0.125), {"depth": 1})
    _, layers = "head:depth", model.components()["head:depth"].layers
    weights = {name: torch.zeros_like(layer.weight) for name, layer in layers}
    report = count_flops(model, (32, 32), weights=weights)
    assert report.components["head:depth"].sparse_mac == 0
    assert report.components["head:depth"].sparsity == 1.0
    assert report.components["backbone"].sparsity == 0.0


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_as_it_was(mode):
    torch.manual_seed(0)
    model = build_model(ModelConfig("deeplab-resnet18", width=0.125), {"depth": 1}).train(mode)
    model.backbone.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    count_flops(model, (1, 1))
    with pytest.raises(ValueError, match="shape"):
        count_flops(model, (1, 5, 8, 8))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


class Fussy(nn.Conv2d):
    """A layer whose own kernel needs real memory."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.data_ptr()
        return super().forward(x)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Fussy(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x).relu()
        x = torch.cat([x, x])
        return {"label": self.head(x.mean((2, 3)))}


def test_a_users_own_network_with_subclasses_and_unused_layers():
    model = Own()
    components = find_components(model, {"backbone": "body"})
    report = count_flops(model, (6, 7), components=components)
    assert {row.name: row.calls for row in report.layers} == {"body": 1, "head": 1, "idle": 0}
    assert report.components["backbone"].dense_mac == 42 * 108
    assert report.components["(no component)"].dense_mac == 2 * 8
    assert report == count_flops(
        model, (6, 7), components=components, example=torch.ones(1, 3, 6, 7)
    )
    assert count_flops(model, (6, 7)).components.keys() == {"(no component)"}


def test_a_layer_that_runs_twice_counts_twice():
    layer = nn.Linear(4, 4)
    report = count_flops(nn.Sequential(layer, layer), (3, 4, 4))
    assert [(row.name, row.calls) for row in report.layers] == [("0", 2)]
    assert report.total.dense_mac == 2 * 12 * 16
    assert report.total.weights == 16


def test_batches_scale_everything():
    model = build_model(ModelConfig("mobilenetv2", width=0.125), {"depth": 1})
    one, three = (count_flops(model, (b, 3, 40, 56)).total for b in (1, 3))
    for field in ("dense_mac", "in_bounds_mac", "sparse_mac", "sparse_in_bounds_mac"):
        assert getattr(three, field) == 3 * getattr(one, field)


def test_the_report_is_json_and_states_its_convention():
    model = build_model(ModelConfig("mobilenetv2", width=0.125), {"depth": 1})
    report = count_flops(model, (40, 56))
    data = json.loads(json.dumps(report.to_json()))
    assert "1 MAC = 2 FLOP" in data["convention"]
    assert data["total"]["dense_mac"] == sum(row["work"]["dense_mac"] for row in data["layers"])
    assert list(data["components"]) == ["backbone", "head:depth"]
    assert data["input"] == [1, 3, 40, 56]


def test_an_empty_report():
    assert count_flops(nn.ReLU(), (3, 4)).total == Work()
    assert Work().sparsity == 0.0


@pytest.mark.parametrize("size", [(224,), (0, 5), (4.5, 4), ()])
def test_bad_input_sizes(size):
    with pytest.raises(ValueError, match="count_flops: Expected input_size"):
        count_flops(nn.Conv2d(3, 1, 1), size)


def test_bad_weights():
    layer = nn.Sequential(nn.Conv2d(3, 1, 1))
    with pytest.raises(ValueError, match=r"name Conv2d or Linear layers, got '0\.weight'"):
        count_flops(layer, (4, 4), weights={"0.weight": torch.ones(1, 3, 1, 1)})
    with pytest.raises(ValueError, match=r"shape \[1, 3, 1, 1\], got \[3\]"):
        count_flops(layer, (4, 4), weights={"0": torch.ones(3)})
