"""The papers' networks: counts, sizes, order, initialisation, and what torch does to modules."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from sparsemtl.models import MODELS, ModelConfig, MultitaskModel, build_model
from sparsemtl.models.backbones import DeepLabResNet, MobileNetV2
from sparsemtl.models.width import scaled

HEADS = {"segmentation": 40, "normals": 3, "depth": 1}
FAMILIES = ("deeplab-resnet18", "mobilenetv2")  # 34 is 18 with more of the same blocks
TWO_HEADS = {"segmentation": 40, "normals": 3}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, heads: dict[str, int]) -> MultitaskModel:
    with torch.device("meta"):
        return build_model(ModelConfig(name), heads).eval()


def small(name: str = "deeplab-resnet18", **options: float) -> MultitaskModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(name, width=0.125, **options), {"a": 5, "b": 1})


COUNTS = {  # model, heads → total, backbone, each head
    "r34-3": ("deeplab-resnet34", HEADS, 90_695_664, 21_284_672),
    "r34-2": ("deeplab-resnet34", TWO_HEADS, 67_614_700, 21_284_672),
    "r34-13-classes": ("deeplab-resnet34", {**HEADS, "segmentation": 13}, 90_584_964, 21_284_672),
    "mobilenetv2-3": ("mobilenetv2", HEADS, 156_569_520, 2_223_872),
}


@pytest.mark.parametrize("case", COUNTS.values(), ids=COUNTS.keys())
def test_parameter_counts_are_the_papers_networks(case):
    name, heads, total, backbone = case
    model = on_meta(name, heads)
    assert parameters(model) == total
    assert parameters(model.backbone) == backbone


def test_parameter_counts_of_parts():
    r18, r34 = on_meta("deeplab-resnet18", HEADS), on_meta("deeplab-resnet34", HEADS)
    mobile = on_meta("mobilenetv2", HEADS)
    assert parameters(r18.backbone) == 11_176_512
    heads = [parameters(h) for h in r34.heads.values()]
    assert heads == [23_240_864, 23_089_164, 23_080_964]
    heads = [parameters(h) for h in mobile.heads.values()]
    assert heads == [51_552_416, 51_400_716, 51_392_516]
    weights = {m: sum(c.numel for c in m.components().values()) for m in (r18, r34, mobile)}
    assert weights[r34] == 90_653_888
    assert weights[mobile] == 156_510_656
    assert r18.components()["backbone"].numel == 11_166_912
    assert r34.components()["backbone"].numel == 21_267_648
    assert mobile.components()["backbone"].numel == 2_189_760


SIZES = {  # model, image → map
    "r34-224": ("deeplab-resnet34", (224, 224), (29, 29)),
    "r34-256": ("deeplab-resnet34", (256, 256), (33, 33)),
    "r34-321": ("deeplab-resnet34", (321, 321), (41, 41)),
    "r34-nyuv2": ("deeplab-resnet34", (480, 640), (61, 81)),
    "r34-cityscapes": ("deeplab-resnet34", (256, 512), (33, 65)),
    "r18-odd": ("deeplab-resnet18", (97, 131), (13, 17)),
    "r18-one-pixel": ("deeplab-resnet18", (1, 1), (1, 1)),
    "mobilenetv2-224": ("mobilenetv2", (224, 224), (7, 7)),
    "mobilenetv2-321": ("mobilenetv2", (321, 321), (11, 11)),
    "mobilenetv2-nyuv2": ("mobilenetv2", (480, 640), (15, 20)),
    "mobilenetv2-one-pixel": ("mobilenetv2", (1, 1), (1, 1)),
}


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
def test_output_sizes(case):
    name, image, size = case
    model = on_meta(name, HEADS)
    out = model(torch.empty(2, 3, *image, device="meta"))
    assert {task: tuple(t.shape) for task, t in out.items()} == {
        task: (2, channels, *size) for task, channels in HEADS.items()
    }


def test_backbone_convolutions_come_in_the_published_order():
    layers = on_meta("deeplab-resnet34", HEADS).components()["backbone"].layers
    shapes = [tuple(layer.weight.shape) for _, layer in layers]
    assert len(shapes) == 36
    assert shapes[0] == (64, 3, 7, 7)
    assert shapes[-3:] == [(128, 64, 1, 1), (256, 128, 1, 1), (512, 256, 1, 1)]
    assert all(shape[2:] == (3, 3) for shape in shapes[1:-3])
    strides = [layer.stride[0] for _, layer in layers]
    assert strides.count(2) == 3  # stem, first of stage 2, its shortcut
    dilations = [layer.dilation[0] for _, layer in layers[1:-3]]
    assert dilations == [1] * 6 + [1] * 8 + [2] * 12 + [4] * 6


def test_skip_is_outside_the_block():
    backbone = small().backbone.eval()
    x = torch.randn(1, 3, 40, 40)
    features = backbone.stem(x)
    for blocks, shortcut in zip(backbone.stages, backbone.shortcuts, strict=True):
        r = shortcut(features)
        for block in blocks:
            features = torch.relu(r + block(features))
            r = features
    assert torch.equal(features, backbone(x))


def test_head_is_the_sum_of_four_branches():
    model = small().eval()
    head = model.heads["a"]
    features = torch.randn(2, 64, 9, 11)
    expected = sum(branch(features) for branch in head.branches)
    torch.testing.assert_close(head(features), expected)
    assert [branch[0].dilation[0] for branch in head.branches] == [6, 12, 18, 24]
    assert [branch[0].padding[0] for branch in head.branches] == [6, 12, 18, 24]
    assert [type(m).__name__ for m in head.branches[0]] == [
        "Conv2d",
        "ReLU",
        "Dropout",
        "Conv2d",
        "ReLU",
        "Dropout",
        "Conv2d",
    ]


def test_initialisation():
    torch.manual_seed(0)
    resnet = DeepLabResNet(18)
    weights = torch.cat(
        [m.weight.detach().flatten() for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    )
    assert weights.mean().abs() < 1e-4
    assert abs(float(weights.std()) - 0.01) < 1e-5
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.requires_grad
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    last = MobileNetV2().layers[-1][0]
    assert float(last.weight.detach().std()) == pytest.approx((2 / 1280) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_seed_decides_the_weights(name):
    first, second = small(name).state_dict(), small(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(1)
    other = build_model(ModelConfig(name, width=0.125), {"a": 5, "b": 1}).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [0.01, 0.125, 0.25, 0.6, 1.5])
def test_any_width_runs(name, width):
    with torch.device("meta"):
        model = build_model(ModelConfig(name, width=width), {"depth": 1}).eval()
        assert model(torch.empty(1, 3, 33, 47))["depth"].shape[:2] == (1, 1)
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels % 8 == 0


def test_scaled_channels():
    assert scaled(1280, 1.0) == 1280
    assert scaled(64, 0.125) == 8
    assert scaled(1024, 0.125) == 128
    assert scaled(64, 0.01) == 8
    assert scaled(96, 0.3) == 32  # 28.8


@pytest.mark.parametrize("name", FAMILIES)
def test_deepcopy_and_state_dict_keep_the_function(name):
    model = small(name).eval()
    x = torch.randn(2, 3, 40, 56)
    expected = model(x)
    torch.manual_seed(5)
    loaded = build_model(ModelConfig(name, width=0.125), {"a": 5, "b": 1}).eval()
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), loaded):
        assert all(torch.equal(other(x)[task], expected[task]) for task in expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_export_with_any_batch_size(name):
    model = small(name).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(2, 3, 40, 56),), dynamic_shapes={"x": {0: batch}}
    )
    x = torch.randn(3, 3, 40, 56)
    found, expected = program.module()(x), model(x)
    assert list(found) == list(expected)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task])


@pytest.mark.parametrize("name", ["deeplab-resnet18"])
def test_compile_in_one_graph(name):
    model = small(name, dropout=0.0)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 64, 64)
    expected, found = model(x), compiled(x)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient(name):
    model = small(name)
    sum(out.square().mean() for out in model(torch.randn(2, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_empty_batch_in_evaluation():
    assert small().eval()(torch.empty(0, 3, 32, 32))["a"].shape == (0, 5, 5, 5)


def test_autocast_takes_float32_images():
    with torch.autocast("cpu", torch.bfloat16):
        assert small().eval()(torch.randn(1, 3, 32, 32))["a"].dtype == torch.bfloat16


BAD_IMAGES = {
    "no-batch": (torch.zeros(3, 32, 32), ValueError, r"\[B, 3, H, W\], got \[3, 32, 32\]"),
    "channels-last": (torch.zeros(1, 32, 32, 3), ValueError, r"\[B, 3, H, W\]"),
    "gray": (torch.zeros(1, 1, 32, 32), ValueError, r"got \[1, 1, 32, 32\]"),
    "no-pixel": (torch.zeros(1, 3, 0, 32), ValueError, "at least one pixel"),
    "bytes": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "torch.uint8"),
    "double": (torch.zeros(1, 3, 32, 32).double(), TypeError, "got torch.float64"),
}


@pytest.mark.parametrize("case", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images_get_a_clear_error(case):
    image, error, text = case
    with pytest.raises(error, match=text):
        small().eval()(image)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (0, 3, 64, 64)])
def test_training_on_one_feature_pixel_is_refused(shape):
    model = small().train()
    with pytest.raises(ValueError, match="batch norm needs them"):
        model(torch.randn(shape))
    assert all(b.isfinite().all() for b in model.buffers())


BAD_CONFIGS = {
    "name": ({"name": "deeplab-resnet43"}, "Did you mean 'deeplab-resnet34'"),
    "width": ({"width": 0.0}, "width > 0, got 0.0"),
    "nan-width": ({"width": float("nan")}, "width > 0"),
    "dropout": ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
    "no-rates": ({"rates": ()}, "rates"),
    "zero-rate": ({"rates": (6, 0)}, r"got \(6, 0\)"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_config_gets_a_clear_error(case):
    options, text = case
    with pytest.raises(ValueError, match=text):
        ModelConfig(**options)


BAD_HEADS = {
    "none": ({}, "at least one head"),
    "dot": ({"a.b": 1}, "'a.b'"),
    "attribute": ({"type": 1}, "'type_task'"),
    "empty-name": ({"": 1}, "without dots"),
    "no-channels": ({"a": 0}, "at least 1 channel, got 0"),
}


@pytest.mark.parametrize("case", BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_bad_heads_get_a_clear_error(case):
    heads, text = case
    with pytest.raises(ValueError, match=text):
        build_model(ModelConfig(width=0.125), heads)


def test_config_survives_json():
    config = ModelConfig(rates=(1, 2))
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_unknown_depth():
    with pytest.raises(ValueError, match=r"one of \[18, 34\], got 50"):
        DeepLabResNet(50)
