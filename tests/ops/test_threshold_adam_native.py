"""The native kernel of threshold_adam: the same bits on every instruction set and thread count."""

from __future__ import annotations

import pytest
import torch

from sparsemtl.ops import AdamRule, threshold_adam
from sparsemtl.ops.availability import native_module, why_not_native
from tests.ops.test_threshold_adam import CHUNK, RULES, Problem, check_values

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
ISAS = native_module().usable_isas() if why_not_native() is None else []
MIXED = [(64, 3, 7, 7), (0,), (31,), (CHUNK + 7,), (33, 64, 3, 3), (1, 1), (2 * CHUNK,)]


@pytest.fixture
def isa():
    before = native_module().isa()
    yield native_module().force_isa
    native_module().force_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(first, second):
    return all(
        torch.equal(a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def everything(result):
    weights, means, squares, out = result
    return weights, means, squares, out.values, out.bitmasks, [out.nonzeros]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_every_instruction_set_gives_the_same_bits(rule, dtype, isa):
    problem = Problem(MIXED)
    found = []
    for name in ISAS:
        isa(name)
        result = problem.run("native", rule, dtype=dtype)
        check_values(result[0], result[3], problem)
        found.append(everything(result))
    assert all(same(found[0], other) for other in found[1:])


def test_any_number_of_threads_gives_the_same_bits(threads):
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(everything(Problem(MIXED).run("native", {"weight_decay": 0.1})))
    assert all(same(found[0], other) for other in found[1:])


def test_streaming_stores_write_the_same(isa):
    count = (1 << 22) + 77  # 16 MiB of values and more goes past the caches
    whole, part = Problem([(count,)], steps=1), slice(1 << 21, (1 << 21) + 1000)
    small = Problem([(1000,)], steps=1)
    small.weights = [whole.weights[0][part].clone()]
    small.grads = [[whole.grads[0][0][part].clone()]]
    for name in ISAS:
        isa(name)
        large = whole.run("native", {})
        check_values(large[0], large[3], whole)
        assert torch.equal(large[3].values[0][part], small.run("native", {})[3].values[0])
        view = torch.empty(count + 1)[1:]  # not aligned: plain stores
        weights, *_, out = large
        state = [[w.abs() for w in weights] for _ in range(4)]
        rules = [AdamRule()]
        aligned = threshold_adam(*[[t.clone() for t in s] for s in state], rules, whole.alpha, [0])
        odd = out._replace(values=(view,), bitmasks=None)
        threshold_adam(*state, rules, whole.alpha, [0], out=odd)
        assert torch.equal(view, aligned.values[0])


def test_the_border_checks_what_python_hands_over():
    module, weight = native_module(), torch.ones(4)
    a, sizes, rule = [weight.data_ptr()], [4], [1.0] * 8
    call = module.threshold_adam
    with pytest.raises(ValueError, match="grads to hold 1 entries, got 0"):
        call(a, sizes, [], a, a, rule, [0], 0, [0.5], [0], [], 0, 1)
    with pytest.raises(ValueError, match="means to point at memory, got null"):
        call(a, sizes, a, [0], a, rule, [0], 0, [0.5], [0], [], 0, 1)
    with pytest.raises(ValueError, match="rules to hold 8 entries, got 9"):
        call(a, sizes, a, a, a, [*rule, 1.0], [0], 0, [0.5], [0], [], 0, 1)
    with pytest.raises(ValueError, match="rule_of below 1, got 1"):
        call(a, sizes, a, a, a, rule, [1], 0, [0.5], [0], [], 0, 1)
    with pytest.raises(ValueError, match="alphas to hold 1 entries, got 0"):
        call(a, sizes, a, a, a, rule, [0], 0, [], [0], [], 0, 1)
