"""threshold_adam on every backend against torch.optim.Adam and the reference, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemtl.ops import (
    SOFT_THRESHOLD,
    THRESHOLD_ADAM,
    AdamRule,
    ready_values,
    soft_threshold_component,
    soft_threshold_stats,
    threshold_adam,
    threshold_adam_reference,
    use_backend,
)
from sparsemtl.ops.availability import INTERPRETING
from sparsemtl.ops.threshold_adam import threshold_adam_bytes
from tests.ops.support import backends_of, skip_if_unusable

NAN, INF = float("nan"), float("inf")
CHUNK = 1 << 16  # of the native kernel; a Triton block is 1024

SHAPES = {
    "one-weight": [(1,)],
    "scalar-weight": [()],
    "no-weights": [(0, 3)],
    "prime": [(131,)],
    "below-the-block": [(1023,)],
    "past-the-chunk": [(CHUNK + 1,)],
    "component": [(64, 3, 7, 7), (0,), (64,), (33, 64, 3, 3), (1, 1)],
}
RULES = {
    "plain": {},
    "coupled": {"weight_decay": 1e-2},
    "decoupled": {"weight_decay": 1e-2, "decoupled": True},
    "paper": {"betas": (0.5, 0.999), "weight_decay": 1e-4},
    "no-memory": {"betas": (0.0, 0.0), "weight_decay": 0.1, "eps": 1e-3},
    "still": {"lr": 0.0},
    "fast": {"lr": 0.3, "betas": (0.95, 0.9), "eps": 1e-3},
}


class Problem:
    """Weights, gradients of some steps and one threshold, seeded."""

    def __init__(self, shapes, steps=3, alpha=0.02, device="cpu", dtype=torch.float32, seed=0):
        rng = torch.Generator().manual_seed(seed)
        draw = lambda s: torch.randn(s, generator=rng).to(device, dtype)  # noqa: E731
        self.weights = [0.05 * draw(s) for s in shapes]
        self.grads = [[draw(s) * 10.0 ** (i - 2) for s in shapes] for i in range(steps)]
        self.alpha = torch.tensor([alpha, 2 * alpha], device=device)
        self.owners = [i % 2 for i in range(len(shapes))]

    def run(self, backend, rule, **options):
        """Weights, moments and the last result after all steps."""
        weights = [w.clone() for w in self.weights]
        means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        out = None
        for t, grads in enumerate(self.grads, 1):
            rules = [AdamRule(step=t, **rule)] * len(weights)
            args = (weights, grads, means, squares, rules, self.alpha, self.owners)
            skip_if_unusable(THRESHOLD_ADAM, backend, *args, out)
            with use_backend(backend):
                out = threshold_adam(*args, bitmask=True, out=out, **options)
        return weights, means, squares, out

    def oracle(self, rule):
        """The same by torch.optim.Adam in float64, on the CPU."""
        rule = dict(rule)
        rule["decoupled_weight_decay"] = rule.pop("decoupled", False)
        wide = [w.double().cpu().requires_grad_() for w in self.weights]
        adam = torch.optim.Adam(wide, foreach=False, **rule)
        for grads in self.grads:
            for weight, grad in zip(wide, grads, strict=True):
                weight.grad = grad.double().cpu()
            adam.step()
        moments = [[adam.state[w][key] for w in wide] for key in ("exp_avg", "exp_avg_sq")]
        return [w.detach() for w in wide], *moments


def assert_close(found, expected, rtol, scale=None):
    """Each tensor within rtol of itself, and of the largest term that went into it."""
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        atol = 0.0 if scale is None else rtol * scale[i]
        torch.testing.assert_close(f.double().cpu(), e, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("backend", backends_of(THRESHOLD_ADAM))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_steps_are_those_of_torch_adam(shapes, rule, backend, device):
    if backend == "triton" and INTERPRETING and shapes == SHAPES["past-the-chunk"]:
        pytest.skip("a chunk of the native kernel is slow to interpret")
    problem = Problem(shapes, device=device)
    weights, means, squares, out = problem.run(backend, rule)
    expected = problem.oracle(rule)
    rough = [max((g[i].abs().max().item() for g in problem.grads if g[i].numel()), default=0.0)
             for i in range(len(shapes))]  # the mean may cancel  # fmt: skip
    assert_close(means, expected[1], 1e-6, rough)
    assert_close([s.sqrt() for s in squares], [s.sqrt() for s in expected[2]], 1e-6, rough)
    steps = [3.0 * AdamRule(**rule).lr * 2] * len(shapes)
    assert_close(weights, expected[0], 1e-6, steps)
    check_values(weights, out, problem)


def check_values(weights, out, problem):
    """What was written is the soft threshold of the very weights that were written."""
    for i, weight in enumerate(weights):
        stats = soft_threshold_stats([weight], problem.alpha[problem.owners[i]], bitmask=True)
        assert torch.equal(out.values[i], stats.values[0].to(out.values[i].dtype))
        assert out.nonzeros[i] == stats.nonzeros[0]
        assert torch.equal(out.bitmasks[i], stats.bitmasks[0])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_reference_is_torch_adam_bit_for_bit(rule):
    problem = Problem([(50, 3), (17,)], dtype=torch.float64)
    weights, means, squares, _ = problem.run("reference", rule)
    expected = problem.oracle(rule)
    for found, wanted in zip((weights, means, squares), expected, strict=True):
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", backends_of(THRESHOLD_ADAM))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_may_be_stored_narrower(dtype, backend, device):
    if backend == "triton" and INTERPRETING and dtype is torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    problem = Problem([(300, 7), (64, 3, 3, 3)], device=device)
    weights, _, _, out = problem.run(backend, {}, dtype=dtype)
    assert all(value.dtype is dtype for value in out.values)
    check_values(weights, out, problem)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("backend", backends_of(THRESHOLD_ADAM))
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("rule", [{}, {"weight_decay": 0.1}], ids=["plain", "coupled"])
def test_what_is_not_finite_spreads_as_in_torch(rule, bad, backend, device):
    problem = Problem([(40,)], device=device)
    problem.grads[1][0][3::5] = bad
    problem.weights[0][4::5] = bad
    weights, means, squares, out = problem.run(backend, rule)
    expected = problem.oracle(rule)
    for found, wanted in zip((weights, means, squares), expected, strict=True):
        assert torch.equal(found[0].isnan().cpu(), wanted[0].isnan())
    assert torch.equal(out.values[0].isnan(), weights[0].isnan()), "a NaN weight is alive"
    assert int(weights[0].isnan().sum()) >= 8


@pytest.mark.parametrize("backend", backends_of(THRESHOLD_ADAM))
def test_each_tensor_may_have_its_own_rule(backend, device):
    problem = Problem([(70,), (300,), (5,)], steps=1, device=device)
    rules = [AdamRule(lr=0.1, step=3), AdamRule(weight_decay=0.5), AdamRule(eps=1e-2, step=9)]
    found = [[w.clone() for w in problem.weights] for _ in range(2)]
    state = [[torch.rand_like(w) for w in problem.weights] for _ in range(2)]
    skip_if_unusable(THRESHOLD_ADAM, backend, *found, *state, rules)
    with use_backend(backend):
        threshold_adam(found[0], problem.grads[0], *copy.deepcopy(state), rules)
    for i, rule in enumerate(rules):
        alone = [[t[i].clone()] for t in (found[1], problem.grads[0], *state)]
        with use_backend(backend):
            threshold_adam(*alone, [rule])
        assert torch.equal(found[0][i], alone[0][0])


@pytest.mark.parametrize("backend", backends_of(THRESHOLD_ADAM))
def test_without_alpha_it_is_adam_alone(backend, device):
    problem = Problem([(70,), (300,)], device=device)
    weights, means, squares, _ = problem.run(backend, {})
    problem.alpha, problem.owners = None, []
    plain = []
    for t, grads in enumerate(problem.grads, 1):
        plain = plain or [problem.weights, *([torch.zeros_like(w) for w in weights] for _ in "mv")]
        args = (plain[0], grads, *plain[1:], [AdamRule(step=t)] * 2)
        skip_if_unusable(THRESHOLD_ADAM, backend, *args)
        with use_backend(backend):
            result = threshold_adam(*args)
    assert result.values == ()
    assert result.nonzeros.shape == (0,)
    for found, wanted in zip(plain, (weights, means, squares), strict=True):
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


LAYOUTS = {
    "channels-last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1),
    "strided": lambda w: w[:, ::2],
}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_is_taken(lay):
    plain = Problem([(6, 10, 3, 5)])
    problem = copy.deepcopy(plain)
    plain.weights = [lay(w).contiguous() for w in plain.weights]
    plain.grads = [[lay(g).contiguous() for g in grads] for grads in plain.grads]
    problem.weights = [lay(w.clone()) for w in problem.weights]
    outs = []
    for p in (plain, problem):
        means, squares = ([torch.zeros_like(w) for w in p.weights] for _ in range(2))
        grads = plain.grads[0]  # contiguous in both: the kernel lays it out as the weight
        rules = [AdamRule(lr=0.1)]
        out = threshold_adam(p.weights, grads, means, squares, rules, p.alpha, [1], bitmask=True)
        outs.append((p.weights[0], means[0], squares[0], out.values[0]))
        assert out.values[0].stride() == torch.empty_like(p.weights[0]).stride()
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6 * 0.1)  # of a step


def test_what_native_cannot_take_runs_on_the_reference():
    weight, grad = torch.ones(4, 6), torch.ones(4, 6)
    why = lambda *args: THRESHOLD_ADAM.explain(*args)["native"]  # noqa: E731
    moments = [torch.zeros(4, 6)], [torch.zeros(4, 6)]
    if why() is not None:
        pytest.skip(why())
    rules = [AdamRule()]
    assert why([weight], [grad], *moments, rules) is None
    other = [torch.zeros(6, 4).t()]
    assert "strides" in why([weight], [grad], other, moments[1], rules)
    assert "gaps" in why([torch.ones(4, 12)[:, ::2]], [grad], *moments, rules)
    assert "float64" in why([weight.double()], [grad], *moments, rules)
    assert "share" in why([weight], [grad], moments[0], moments[0], rules)
    threshold_adam([weight], [grad], other, moments[1], rules)
    torch.testing.assert_close(weight, torch.full((4, 6), 1 - 1e-3))


def test_versions_tell_autograd_what_was_changed():
    problem = Problem([(5,)], steps=1)
    weight = problem.weights[0].requires_grad_()
    kept = (weight * weight).sum()
    mean, square = torch.zeros(5), torch.zeros(5)
    args = ([weight], problem.grads[0], [mean], [square], [AdamRule()], problem.alpha, [0])
    before = [t._version for t in (weight, mean, square)]
    out = threshold_adam(*args, bitmask=True)
    assert all(t._version > b for t, b in zip((weight, mean, square), before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    written = out.values[0]._version
    again = threshold_adam(*args, bitmask=True, out=out)
    assert again is out
    assert out.values[0]._version > written
    assert weight.requires_grad
    assert out.values[0].grad_fn is None


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 200),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.99),
    st.floats(0.0, 0.999),
    st.floats(1e-8, 1e-1),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_numbers_give_torchs_step(count, lr, first, second, eps, decay, decoupled, seed):
    rule = {
        **{"lr": lr, "betas": (first, second), "eps": eps},
        **{"weight_decay": decay, "decoupled": decoupled},
    }
    problem = Problem([(count,)], seed=seed)
    weights, *_, out = problem.run(THRESHOLD_ADAM.explain().usable[0], rule)
    assert_close(weights, problem.oracle(rule)[0], 2e-6, [20 * lr + 0.1])
    check_values(weights, out, problem)


# ready_values


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
def test_ready_values_have_the_gradients_of_the_soft_threshold(backend, device):
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=rng).to(device) for s in ((7, 5), (300,), (0,))]
    grads = [torch.randn(w.shape, generator=rng).to(device) for w in weights]
    theta = torch.zeros((), device=device, requires_grad=True)
    alpha = torch.sigmoid(theta)
    skip_if_unusable(SOFT_THRESHOLD, backend, weights, alpha)
    weights = [w.requires_grad_() for w in weights]
    with use_backend(backend):
        expected = soft_threshold_component(weights, alpha)
        known = [value.detach().clone() for value in expected]
        found = ready_values(weights, alpha, known)
    for f, k in zip(found, known, strict=True):
        assert f.data_ptr() == k.data_ptr()
        assert f.requires_grad
    wanted = torch.autograd.grad(expected, [*weights, theta], grads, retain_graph=True)
    gradients = torch.autograd.grad(found, [*weights, theta], grads, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
    (only,) = torch.autograd.grad(found[1].sum(), weights[1])
    assert torch.equal(only, (weights[1].abs() > alpha).float())


def test_ready_values_that_are_overwritten_before_their_backward_are_refused():
    weight = torch.randn(9, requires_grad=True)
    value = weight.detach().clone()
    (ready,) = ready_values([weight], torch.tensor(0.0), [value])
    kept = (ready * ready).sum()
    value.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_ready_values_without_gradients_are_the_values():
    value = torch.randn(9)
    with torch.no_grad():
        (found,) = ready_values([torch.ones(9, requires_grad=True)], torch.tensor(0.5), [value])
    assert found.data_ptr() == value.data_ptr()
    assert not found.requires_grad


def test_a_transform_of_torch_func_computes_anew():
    weight, alpha = torch.tensor([1.0, -2.0, 0.1]), torch.tensor(0.5)
    wrong = [torch.zeros(3)]
    call = lambda w: ready_values([w], alpha, wrong)[0].sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(call)(weight), torch.tensor([1.0, 1.0, 0.0]))


def test_bytes_are_counted():
    assert threshold_adam_bytes([torch.empty(80)]) == 80 * 32 + 10
    assert threshold_adam_bytes([torch.empty(80)], torch.bfloat16) == 80 * 30 + 10


def one(**changed):
    t = lambda: [torch.ones(3)]  # noqa: E731
    given = {"weights": t(), "grads": t(), "means": t(), "squares": t(), "rules": [AdamRule()]}
    return lambda: threshold_adam(**{**given, **changed})


BAD = {
    "weight": (one(weights=[1.0]), TypeError, "weights of Tensors, got float"),
    "count": (one(grads=[]), ValueError, "grads to hold 1 entries, got 0"),
    "rules": (one(rules=[]), ValueError, "rules to hold 1 entries, got 0"),
    "rule": (one(rules=[0.1]), TypeError, "AdamRule, got float"),
    "shape": (one(grads=[torch.ones(1, 3)]), ValueError, r"grads like the weights.*\[1, 3\]"),
    "moment-type": (one(means=[torch.ones(3).bfloat16()]), ValueError, "means like.*bfloat16"),
    "device": (one(squares=[torch.ones(3, device="meta")]), ValueError, "squares like.*meta"),
    "integer": (one(weights=[torch.ones(3, dtype=torch.int32)]), TypeError, "weights.*int32"),
    "sparse": (one(grads=[torch.ones(3).to_sparse()]), TypeError, "grads to be strided"),
    "alpha": (one(alpha=0.1), TypeError, "alpha to be a Tensor, got float"),
    "alpha-shape": (one(alpha=torch.tensor(0.1), owners=[0]), ValueError, r"\[G\].*\[\]"),
    "alpha-negative": (one(alpha=torch.tensor([-0.1]), owners=[0]), ValueError, "alpha ≥ 0"),
    "owner": (one(alpha=torch.tensor([0.1]), owners=[1]), ValueError, r"owners in \[0, 1\), got 1"),
    "owners": (one(alpha=torch.tensor([0.1])), ValueError, "owners to hold 1 entries, got 0"),
    "owners-alone": (one(owners=[0]), ValueError, "no owners without alpha"),
    "lr": (lambda: AdamRule(lr=NAN), ValueError, "lr ≥ 0, got nan"),
    "betas": (lambda: AdamRule(betas=(0.9, 1.0)), ValueError, "betas"),
    "step": (lambda: AdamRule(step=0), ValueError, "step ≥ 1, got 0"),
    "decay": (lambda: AdamRule(weight_decay=-1.0), ValueError, "weight_decay ≥ 0"),
}


@pytest.mark.parametrize(("call", "error", "names"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names) as caught:
        call()
    assert "Expected" in str(caught.value)


def test_one_weight_twice_and_an_unfit_out_are_refused():
    weight, moments = torch.ones(3), [torch.zeros(3), torch.zeros(3)]
    twice = ([weight] * 2, [weight] * 2, moments, [torch.zeros(3)] * 2, [AdamRule()] * 2)
    with pytest.raises(ValueError, match="to differ, got one twice"):
        threshold_adam(*twice)
    args = ([weight], [weight], [moments[0]], [moments[1]], [AdamRule()], torch.ones(1), [0])
    out = threshold_adam(*args)
    with pytest.raises(ValueError, match="Expected out to be an earlier result"):
        threshold_adam(*args, out=out, bitmask=True)
    with pytest.raises(ValueError, match="Expected out to be an earlier result"):
        threshold_adam(*args, out=out, dtype=torch.bfloat16)
    threshold_adam_reference(*args, out=out)
