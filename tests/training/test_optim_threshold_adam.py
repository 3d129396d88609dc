"""ThresholdAdam is torch's Adam, and its values are the next forward's."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.methods import AdapMTL, AdapMTLConfig, Dense, DenseConfig
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.ops.soft_threshold import soft_threshold_stats
from sparsemtl.sparsity.controller import ControllerConfig, freeze_exactly
from sparsemtl.sparsity.sparsify import sparsify
from sparsemtl.tasks import make_task
from sparsemtl.training import runtime
from sparsemtl.training.callbacks import Checkpointer, every
from sparsemtl.training.checkpoint import checkpoints, load_checkpoint
from sparsemtl.training.loop import train as run_training
from sparsemtl.training.optim import OptimConfig
from sparsemtl.training.optim_threshold_adam import ThresholdAdam
from sparsemtl.training.runtime import RuntimeConfig
from sparsemtl.training.state import TrainConfig, TrainState
from sparsemtl.training.weighting import WeightingConfig

HEADS = {"segmentation": 5, "depth": 1}


def make_model(grouping="component"):
    torch.manual_seed(0)
    model = build_model(ModelConfig("deeplab-resnet18", width=0.125, dropout=0.0), HEADS)
    return sparsify(model, grouping=grouping, theta_init=-5.0)


@pytest.fixture
def image():
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def loss_of(model, image):
    return sum(v.square().mean() for v in model(image).values())


def train(model, optimizer, image, steps=4, schedule=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, image)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_near(found, expected, tolerance=2e-6):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=tolerance)


def small(seed=0):
    """Two tensors without a model, and their gradients."""
    rng = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=rng).requires_grad_() for s in ((5, 3), (7,))]
    grads = [[torch.randn(p.shape, generator=rng) for p in params] for _ in range(4)]
    return params, grads


def run(optimizer, params, grads):
    for given in grads:
        for param, grad in zip(params, given, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return params


OPTIONS = {
    "coupled": {"weight_decay": 1e-2, "betas": (0.5, 0.999)},
    "decoupled": {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    "eps": {"lr": 1e-2, "eps": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_model_trains_as_under_adam(image, options):
    ours, theirs = make_model(), make_model()
    options = {"lr": 1e-4, **options}
    found = train(ours, ThresholdAdam(ours.parameters(), sparsity=ours.sparsity, **options), image)
    expected = train(theirs, torch.optim.Adam(theirs.parameters(), **options), image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[-1] < found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_parameters_of_every_type_are_those_of_adam(options, dtype):
    def make(kind):
        params, grads = small()
        params = [p.detach().to(dtype).requires_grad_() for p in params]
        return run(kind(params, **options), params, [[g.to(dtype) for g in gs] for gs in grads])

    for found, expected in zip(make(ThresholdAdam), make(torch.optim.Adam), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("grouping", ["component", "one", "layer"])
def test_the_next_forward_finds_its_values(image, grouping):
    model = make_model(grouping)
    optimizer = ThresholdAdam(model.parameters(), lr=1e-3, sparsity=model.sparsity)
    before = model.sparsity.theta.detach().clone()
    for _ in range(2):
        train(model, optimizer, image, steps=1)
        assert not torch.equal(model.sparsity.theta, before), "θ moves, and first"
        alpha = torch.sigmoid(model.sparsity.theta.detach())
        for g in range(len(model.sparsity.groups)):
            weights = model.sparsity.weights(g)
            ready = model.sparsity.ready.find(g, weights, model.sparsity.theta)
            stats = soft_threshold_stats(weights, alpha[g], bitmask=True)
            assert torch.equal(ready.nonzeros, stats.nonzeros)
            for found, expected in ((ready.values, stats.values), (ready.bitmasks, stats.bitmasks)):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_values_memory_serves_again(image):
    model = make_model()
    optimizer = ThresholdAdam(model.parameters(), sparsity=model.sparsity)

    def addresses():
        train(model, optimizer, image, steps=1)
        return [v.data_ptr() for v in model.sparsity.ready._groups[0][1].values]

    assert addresses() == addresses()


def test_ready_values_change_no_bit(image):
    ours, other = make_model(), make_model()
    first = ThresholdAdam(ours.parameters(), sparsity=ours.sparsity, weight_decay=1e-4)
    second = ThresholdAdam(other.parameters(), weight_decay=1e-4)  # Adam alone
    assert train(ours, first, image) == train(other, second, image)
    a, b = parameters(ours), parameters(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_values_change_no_bit_under_autocast(image):
    def run(**options):
        model = make_model()
        optimizer = ThresholdAdam(model.parameters(), **options, sparsity=model.sparsity)
        with torch.autocast("cpu", torch.bfloat16):
            return train(model, optimizer, image)

    assert run(value_dtype=torch.bfloat16) == run()


def test_a_frozen_model_is_stepped_without_thresholds(image):
    ours, theirs = make_model(), make_model()
    optimizer = ThresholdAdam(ours.parameters(), lr=1e-3, sparsity=ours.sparsity)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for model, stepping in ((ours, optimizer), (theirs, adam)):
        train(model, stepping, image, steps=1)
        freeze_exactly(model.sparsity, 0.8)
        train(model, stepping, image, steps=2)
    assert ours.sparsity.ready._groups == {}
    assert optimizer._written == {}
    assert_near(parameters(ours), parameters(theirs), 1e-4)


def test_a_weight_without_gradient_leaves_its_group_to_the_forward(image):
    model = make_model()
    optimizer = ThresholdAdam(model.parameters(), sparsity=model.sparsity)
    model.sparsity.weights(1)[0].requires_grad_(False)
    train(model, optimizer, image, steps=1)
    assert sorted(model.sparsity.ready._groups) == [0, 2]
    before = model.sparsity.weights(1)[0].clone()
    train(model, optimizer, image, steps=1)
    assert torch.equal(before, model.sparsity.weights(1)[0])


def test_groups_have_their_own_numbers_and_schedules():
    def make(kind):
        params, grads = small()
        groups = [{"params": params[:1], "lr": 0.1, "weight_decay": 0.1}, {"params": params[1:]}]
        optimizer = kind(groups, lr=torch.tensor(0.01) if kind is ThresholdAdam else 0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for given in grads:
            run(optimizer, params, [given])
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.1 / 16
        return params

    for found, expected in zip(make(ThresholdAdam), make(torch.optim.Adam), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_parameter_may_join_later_and_one_may_pause():
    def make(kind):
        params, grads = small()
        optimizer = kind(params[:1], lr=0.1)
        run(optimizer, params, grads[:1])
        optimizer.add_param_group({"params": params[1:], "lr": 0.2})
        run(optimizer, params, grads[1:2])
        params[0].grad = None
        params[1].grad = grads[2][1].clone()
        optimizer.step()
        return run(optimizer, params, grads[3:])

    for found, expected in zip(make(ThresholdAdam), make(torch.optim.Adam), strict=True):
        torch.testing.assert_close(found, expected)


def test_resuming_from_a_file_gives_the_same_bits(image):
    def make():
        model = make_model()
        optimizer = ThresholdAdam(model.parameters(), lr=1e-3, sparsity=model.sparsity)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    whole, optimizer, schedule = make()
    train(whole, optimizer, image, 3, schedule)
    file = io.BytesIO()
    state = {"model": whole.state_dict(), "theta": whole.sparsity.theta.detach()}
    state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, file)
    train(whole, optimizer, image, 3, schedule)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model, optimizer, schedule = make()
    model.load_state_dict(state["model"])
    with torch.no_grad():
        model.sparsity.theta.copy_(state["theta"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    train(model, optimizer, image, 3, schedule)
    a, b = parameters(whole), parameters(model)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fused", [False, True])
def test_state_is_exchanged_with_torchs_adam(fused):
    params, grads = small()
    adam = torch.optim.Adam(params, lr=0.1, fused=fused)
    run(adam, params, grads[:2])
    twins = [p.detach().clone().requires_grad_() for p in params]
    ours = ThresholdAdam(twins, lr=0.5)
    ours.load_state_dict(copy.deepcopy(adam.state_dict()))
    run(adam, params, grads[2:])
    run(ours, twins, grads[2:])
    for found, expected in zip(twins, params, strict=True):
        torch.testing.assert_close(found, expected)
    back = torch.optim.AdamW(params)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    run(back, params, grads[:1])


def test_gradients_may_be_scaled():
    params, grads = small()
    optimizer = ThresholdAdam(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for scale, bad in ((64.0, False), (64.0, True), (32.0, False)):
        before = [p.detach().clone() for p in params]
        for param, grad in zip(params, grads[0], strict=True):
            param.grad = grad * scale
        if bad:
            params[0].grad[0, 0] = float("inf")
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(b, p) for b, p in zip(before, params, strict=True)]
        assert changed == [not bad] * 2
    other, grads = small()
    run(torch.optim.Adam(other, lr=0.1), other, [grads[0]] * 2)
    for found, expected in zip(params, other, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_closure_runs_with_gradients_and_its_loss_is_returned():
    param = torch.ones(3, requires_grad=True)
    optimizer = ThresholdAdam([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))
    assert optimizer.step() is None


def test_a_nan_gradient_spreads_as_in_adam():
    def make(kind):
        params, grads = small()
        grads[1][0][0, 1] = float("nan")
        return run(kind(params), params, grads)

    for found, expected in zip(make(ThresholdAdam), make(torch.optim.Adam), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.isnan().sum() == expected.isnan().sum()


def test_strides_may_change_between_steps(image):
    model = make_model()
    optimizer = ThresholdAdam(model.parameters(), lr=1e-3, sparsity=model.sparsity)
    plain = make_model()
    reference = ThresholdAdam(plain.parameters(), lr=1e-3)
    train(model, optimizer, image, 1)
    model.to(memory_format=torch.channels_last)
    train(model, optimizer, image, 2)
    train(plain, reference, image, 3)
    assert_near(parameters(model), parameters(plain), 1e-4)


def test_a_copy_steps_alone(image):
    model = make_model()
    optimizer = ThresholdAdam(model.parameters(), lr=1e-3, sparsity=model.sparsity)
    train(model, optimizer, image, 1)
    twin, copied = copy.deepcopy((model, optimizer))
    assert train(twin, copied, image) == train(model, optimizer, image)


def test_no_parameter_and_no_gradient_is_nothing_to_do():
    with pytest.raises(ValueError, match="empty parameter list"):
        ThresholdAdam([])
    param = torch.ones(3, requires_grad=True)
    optimizer = ThresholdAdam([param])
    optimizer.step()
    assert torch.equal(param, torch.ones(3))
    assert optimizer.state_dict()["state"] == {}
    empty = torch.ones(0, 3, requires_grad=True)
    run(ThresholdAdam([empty]), [empty], [[torch.ones(0, 3)]])


# In a run of the training loop.


@pytest.fixture(scope="module")
def data():
    config = ScenesConfig(height=32, width=40, frames_train=6, frames_val=2, frames_test=3)
    return build_dataset(config, "train", ("segmentation", "normals", "depth"))


def make_state(data, optimizer="threshold-adam", **method):
    config = TrainConfig(
        steps=12,
        batch_size=2,
        # Not Eq. 6: over windows of two losses it divides their rounding by itself.
        weighting=WeightingConfig("fixed"),
        optim=OptimConfig(optimizer=optimizer, lr=2e-4, weight_decay=1e-5),  # no chaos
        runtime=RuntimeConfig(device="cpu"),
    )
    device = runtime.start(config.runtime, config.seed)
    tasks = {n: make_task(n, s.kind, s.channels) for n, s in data.spec.targets.items()}
    model = build_model(
        ModelConfig("deeplab-resnet18", width=0.125, dropout=0.1),
        {n: t.channels for n, t in tasks.items()},
    ).to(device)
    chosen = AdapMTL(AdapMTLConfig(sparsity=0.8, **method)) if method else Dense(DenseConfig())
    return TrainState.create(model, tasks, data, chosen, config)


METHODS = {
    "exact": {"split": "joint"},  # the controller moves θ after the optimizer
    "free": {
        "split": "adam",
        "theta_init": -6.0,
        "controller": ControllerConfig(control="free"),
    },
    "dense": {},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_run_has_the_losses_of_one_under_adam(data, method):
    rows = {}
    for optimizer in ("adam", "threshold-adam"):
        state, totals = make_state(data, optimizer, **method), []
        run_training(state, [lambda s, kept=totals: kept.append(s.total)])
        rows[optimizer] = totals
    assert isinstance(state.optimizer, ThresholdAdam)
    torch.testing.assert_close(rows["threshold-adam"], rows["adam"], rtol=2e-3, atol=2e-3)


def test_a_shift_of_theta_after_the_step_is_never_missed(data):
    """The controller moves θ when the weights have moved; S of the optimizer's own θ is stale."""
    state, stepped, shifts = make_state(data, **METHODS["exact"]), [], []
    sparsity = state.model.sparsity
    state.optimizer.register_step_post_hook(
        lambda *_: stepped.append(sparsity.theta.detach().clone())
    )

    def check(state):
        shifts.append(not torch.equal(stepped[-1], sparsity.theta.detach()))
        if sparsity.frozen:
            return
        sparsity.compute_values()  # as the next forward pass does
        alpha = torch.sigmoid(sparsity.theta.detach())
        for g in range(len(sparsity.groups)):
            expected = soft_threshold_stats(sparsity.weights(g), alpha[g]).values
            assert all(map(torch.equal, sparsity._values[g], expected))
        sparsity.drop_values()

    run_training(state, [check])
    assert any(shifts)
    assert sparsity.frozen


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_run_resumes_with_the_same_bits(data, method, tmp_path):
    whole = make_state(data, **method)
    run_training(whole, [every(1, Checkpointer(tmp_path, keep=100))])
    expected = whole.method.finalize(whole.model).state_dict()
    for path in (checkpoints(tmp_path)[i] for i in (2, 9)):
        resumed = make_state(data, **method)
        resumed.load_resume_state(load_checkpoint(path), path)
        run_training(resumed, [])
        found = resumed.method.finalize(resumed.model).state_dict()
        assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


ONE = lambda: [torch.ones(3, requires_grad=True)]  # noqa: E731
BAD = {
    "lr": (lambda: ThresholdAdam(ONE(), lr=-1.0), ValueError, "lr ≥ 0, got -1.0"),
    "betas": (lambda: ThresholdAdam(ONE(), betas=(0.9, 1.0)), ValueError, "betas"),
    "eps": (lambda: ThresholdAdam(ONE(), eps=float("nan")), ValueError, "eps ≥ 0, got nan"),
    "decay": (lambda: ThresholdAdam(ONE(), weight_decay=-0.1), ValueError, "weight_decay ≥ 0"),
    "group": (lambda: ThresholdAdam([{"params": ONE(), "lr": -2.0}]), ValueError, "lr ≥ 0"),
    "sparsity": (lambda: ThresholdAdam(ONE(), sparsity=nn.Linear(1, 1)), TypeError, "got Linear"),
    "values": (
        lambda: ThresholdAdam(ONE(), value_dtype=torch.int8),
        ValueError,
        "value_dtype in .* got torch.int8",
    ),
    "complex": (
        lambda: ThresholdAdam([torch.ones(2, dtype=torch.complex64, requires_grad=True)]),
        TypeError,
        "complex64",
    ),
}


@pytest.mark.parametrize(("call", "error", "names"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names) as caught:
        call()
    assert "ThresholdAdam: Expected" in str(caught.value)


def test_sparse_gradients_are_refused_before_anything_moves():
    params, _ = small()
    optimizer = ThresholdAdam(params)
    params[0].grad, params[1].grad = torch.ones(5, 3), torch.ones(7).to_sparse()
    before = params[0].detach().clone()
    with pytest.raises(TypeError, match=r"Expected dense gradients, got torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(before, params[0])
    assert optimizer.state_dict()["state"] == {}


def changed_state(change):
    params, grads = small()
    optimizer = ThresholdAdam(params)
    run(optimizer, params, grads)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    return optimizer, state


STATES = {
    "no-groups": (lambda s: s.pop("param_groups"), "with state and param_groups"),
    "other-counts": (
        lambda s: s["param_groups"][0]["params"].pop(),
        r"\[2\] parameters, got \[1\]",
    ),
    "amsgrad": (lambda s: s["param_groups"][0].update(amsgrad=True), "without amsgrad"),
    "maximize": (lambda s: s["param_groups"][0].update(maximize=True), "without maximize"),
    "lr": (lambda s: s["param_groups"][0].update(lr=-1.0), "lr ≥ 0"),
    "shape": (
        lambda s: s["state"][0].update(exp_avg=torch.ones(2)),
        r"exp_avg of parameter 0.*\[5, 3\], got \[2\]",
    ),
    "missing": (lambda s: s["state"][1].pop("step"), "step, exp_avg and exp_avg_sq"),
    "unknown": (lambda s: s["state"].update({7: s["state"][0]}), "parameter 7"),
}


@pytest.mark.parametrize(("change", "names"), STATES.values(), ids=STATES.keys())
def test_a_state_that_does_not_fit_is_refused_whole(change, names):
    optimizer, state = changed_state(change)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=names):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(after["state"][i][key], before["state"][i][key])
        for i in before["state"]
        for key in before["state"][i]
    )
