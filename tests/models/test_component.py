"""Components of our networks and of a user's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsemtl.models import (
    Component,
    ModelConfig,
    build_model,
    find_components,
    merge_components,
)


class Own(nn.Module):
    """A network that knows nothing of components."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.encoder2 = nn.Conv2d(8, 8, 1)
        self.decoders = nn.ModuleDict({"depth": nn.Conv2d(8, 1, 1), "label": nn.Linear(8, 4)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.encoder2(self.encoder(x))
        pooled = x.mean((2, 3))
        return {"depth": self.decoders["depth"](x), "label": self.decoders["label"](pooled)}


MAP = {"backbone": ["encoder", "encoder2"], "head:depth": "decoders.depth"}


def names(component: Component) -> list[str]:
    return [name for name, _ in component.layers]


def test_own_components_of_the_multitask_model():
    model = build_model(ModelConfig("deeplab-resnet18", width=0.125), {"seg": 4, "depth": 1})
    components = find_components(model)
    assert list(components) == ["backbone", "head:seg", "head:depth"]
    modules = dict(model.named_modules())
    for name, component in components.items():
        assert component.name == name
        assert all(modules[layer_name] is layer for layer_name, layer in component.layers)
    layers = {id(layer) for c in components.values() for _, layer in c.layers}
    assert layers == {id(m) for m in model.modules() if isinstance(m, nn.Conv2d)}


def test_components_follow_replaced_layers():
    model = build_model(ModelConfig("mobilenetv2", width=0.125), {"depth": 1})
    new = nn.Conv2d(8, 1, 1)
    model.heads["depth"].branches[0][6] = new
    assert any(layer is new for _, layer in model.components()["head:depth"].layers)


def test_map_of_names():
    components = find_components(Own(), MAP)
    assert names(components["backbone"]) == ["encoder.0", "encoder.2", "encoder2"]
    assert names(components["head:depth"]) == ["decoders.depth"]
    assert components["backbone"].numel == 8 * 3 * 9 + 8 * 8 * 9 + 8 * 8
    assert [w.shape for w in components["head:depth"].weights] == [(1, 8, 1, 1)]


def test_a_name_is_no_text_prefix():
    assert names(find_components(Own(), {"a": "encoder"})["a"]) == ["encoder.0", "encoder.2"]


def test_map_of_modules_and_mixed_entries():
    model = Own()
    components = find_components(
        model, {"backbone": [model.encoder2, "encoder"], "label": model.decoders["label"]}
    )
    assert names(components["backbone"]) == ["encoder.0", "encoder.2", "encoder2"]
    assert names(components["label"]) == ["decoders.label"]


def test_layers_of_no_component_are_logged(caplog):
    with caplog.at_level("INFO"):
        find_components(Own(), MAP)
    assert "stay dense: decoders.label" in caplog.text


def test_empty_name_is_the_whole_model():
    assert len(find_components(Own(), {"all": ""})["all"].layers) == 5


def test_components_method_may_return_a_map():
    model = Own()
    model.components = lambda: MAP
    assert list(find_components(model)) == list(MAP)


def test_a_map_goes_before_the_models_own():
    model = build_model(ModelConfig("mobilenetv2", width=0.125), {"depth": 1})
    assert list(find_components(model, {"only": "heads"})) == ["only"]


ERRORS = {
    "misspelt": ({"backbone": "encodr"}, ValueError, r"got 'encodr'. Close: \['encoder'"),
    "far-off": ({"backbone": "xyz"}, ValueError, "Top-level modules"),
    "overlap": (
        {"backbone": "encoder", "head": "encoder.0"},
        ValueError,
        "layer 'encoder.0' in both 'backbone' and 'head'",
    ),
    "no-layer": ({"norm": "encoder.1"}, ValueError, "'norm' to hold at least one Conv2d or Linear"),
    "empty-entry": ({"norm": []}, ValueError, "'norm' to hold at least one"),
    "empty-map": ({}, ValueError, "at least one component"),
    "foreign": ({"x": nn.Conv2d(1, 1, 1)}, ValueError, "component 'x' to be part of the model"),
    "number": ({"x": [3]}, TypeError, "component 'x'.* got int"),
    "not-a-map": (["encoder"], TypeError, "component_map to be a dict, got list"),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_bad_maps_get_a_clear_error(case):
    component_map, error, text = case
    with pytest.raises(error, match=text):
        find_components(Own(), component_map)


def test_no_map_and_no_components():
    with pytest.raises(TypeError, match=r"model with components\(\), got Own with neither"):
        find_components(Own())
    model = Own()
    model.components = lambda: ["encoder"]
    with pytest.raises(TypeError, match="to return a dict, got list"):
        find_components(model)


def test_a_shared_weight_counts_once_inside_a_component():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    component = find_components(model, {"all": ""})["all"]
    assert len(component.layers) == 3
    assert len(component.weights) == 2
    assert component.numel == 16 + 8


def test_a_shared_weight_in_two_components_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="the weight of '0' and '1' in both 'a' and 'b'"):
        find_components(model, {"a": "0", "b": "1"})


def test_a_module_used_twice_is_one_layer():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert names(find_components(model, {"all": ["0", "2"]})["all"]) == ["0"]


def test_weights_that_are_no_plain_parameters_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrizations.orthogonal(model[0])
    with pytest.raises(ValueError, match=r"weight of layer '0' .* Remove its parametrization"):
        find_components(model, {"all": ""})
    with pytest.raises(ValueError, match="an initialised"):
        find_components(nn.Sequential(nn.LazyLinear(3)), {"all": ""})


@pytest.fixture
def components() -> dict[str, Component]:
    model = build_model(ModelConfig("mobilenetv2", width=0.125), {"a": 1, "b": 2})
    return model.components()


GROUPS = {"component": 3, "one": 1, "two": 2, "layer": 52 + 24}


@pytest.mark.parametrize("how", GROUPS)
def test_merging_keeps_every_weight_once(components, how):
    merged = merge_components(components, how)
    assert len(merged) == GROUPS[how]
    before = [id(w) for c in components.values() for w in c.weights]
    after = [id(w) for c in merged.values() for w in c.weights]
    assert sorted(before) == sorted(after)
    assert [c.name for c in merged.values()] == list(merged)


def test_merged_names(components):
    assert list(merge_components(components, "one")) == ["all"]
    assert list(merge_components(components, "two")) == ["backbone", "heads"]
    assert next(iter(merge_components(components, "layer"))) == "backbone.layers.0.0"


def test_layers_that_share_a_weight_share_a_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    merged = merge_components(find_components(model, {"all": ""}), "layer")
    assert [names(c) for c in merged.values()] == [["0", "1"], ["2"]]


def test_bad_merges(components):
    with pytest.raises(ValueError, match=r"how to be one of .* got 'three'"):
        merge_components(components, "three")
    with pytest.raises(ValueError, match="a component 'backbone'"):
        merge_components({"a": components["head:a"]}, "two")
    with pytest.raises(ValueError, match="at least one other"):
        merge_components({"backbone": components["backbone"]}, "two")


def test_components_live_through_deepcopy_of_the_model():
    import copy

    model = build_model(ModelConfig("mobilenetv2", width=0.125), {"a": 1})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.components()["head:a"].weights:
            weight.zero_()
    assert all(bool(w.any()) for w in model.components()["head:a"].weights)
