"""The op seam: order, reasons, requests by name, and that nothing falls back in silence."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
import torch

from sparsemtl.ops import (
    SOFT_THRESHOLD,
    Backend,
    BackendUnavailable,
    Op,
    all_ops,
    dispatch,
    soft_threshold,
    use_backend,
)


@pytest.fixture
def op(monkeypatch):
    monkeypatch.setattr(dispatch, "_ops", {})

    def needs_positive(*args):
        return None if not args or args[0] > 0 else "x is not positive"

    return Op(
        "toy",
        (
            Backend("triton", lambda x: "triton", None, lambda *_: "no GPU here"),
            Backend("native", lambda x: "native", None, needs_positive),
            Backend("reference", lambda x: "reference", None, lambda *_: None),
        ),
    )


def test_the_first_backend_that_can_run_runs(op):
    assert op.choose(1).name == "native"
    assert op.choose(-1).name == "reference"


def test_explain_gives_every_reason_and_prints_as_a_table(op):
    reasons = op.explain(-1)
    assert reasons == {"triton": "no GPU here", "native": "x is not positive", "reference": None}
    assert reasons.usable == ["reference"]
    assert str(reasons).splitlines() == [
        "triton     no GPU here",
        "native     x is not positive",
        "reference  usable",
    ]
    assert op.explain()["native"] is None  # no arguments: the machine alone


def test_a_request_by_name_never_falls_back(op):
    with use_backend("reference"):
        assert op.choose(1).name == "reference"
    with use_backend("triton"), pytest.raises(BackendUnavailable) as caught:
        op.choose(1)
    text = str(caught.value)
    assert "toy cannot run on 'triton': no GPU here" in text
    assert "Usable here: native, reference" in text
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="it has no cuda backend"):
        op.choose(1)


def test_requests_nest_and_end(op):
    with use_backend("reference"):
        with use_backend("native"):
            assert op.choose(1).name == "native"
        assert op.choose(1).name == "reference"
        with use_backend(None):
            assert op.choose(1).name == "native"
    assert op.choose(1).name == "native"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert op.choose(1).name == "native"


def test_the_variable_asks_for_a_backend(op, monkeypatch):
    monkeypatch.setenv("SPARSEMTL_BACKEND", "reference")
    assert op.choose(1).name == "reference"
    with use_backend("native"):
        assert op.choose(1).name == "native"
    monkeypatch.setenv("SPARSEMTL_BACKEND", "")
    assert op.choose(1).name == "native"
    monkeypatch.setenv("SPARSEMTL_BACKEND", "fast")
    with pytest.raises(ValueError, match="SPARSEMTL_BACKEND: Expected one of triton, cuda, native"):
        op.choose(1)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="triton, cuda, native, reference, got 'numpy'"):
        use_backend("numpy").__enter__()
    with pytest.raises(TypeError, match="str"):
        use_backend(3).__enter__()
    with pytest.raises(ValueError, match="Backend: expected name"):
        Backend("numpy", print, None, print)


def test_a_name_is_taken_once(op):
    with pytest.raises(ValueError, match="'toy', which exists"):
        Op("toy", ())


def test_no_backend_at_all_gives_all_reasons(monkeypatch):
    monkeypatch.setattr(dispatch, "_ops", {})
    lonely = Op("lonely", (Backend("triton", print, None, lambda *_: "no GPU here"),))
    with pytest.raises(BackendUnavailable, match="lonely cannot run here:\ntriton  no GPU here"):
        lonely.choose()


def test_an_exception_while_asking_is_not_swallowed(monkeypatch):
    monkeypatch.setattr(dispatch, "_ops", {})

    def broken(*_):
        raise AttributeError("misspelt")

    with pytest.raises(AttributeError, match="misspelt"):
        Op("broken", (Backend("native", print, None, broken),)).choose()


def test_a_request_holds_for_its_own_thread_and_task(op):
    seen = {}

    def look(key):
        seen[key] = op.choose(1).name

    async def ask(name):
        with use_backend(name):
            await asyncio.sleep(0)
            look(name)

    async def both():
        await asyncio.gather(ask("native"), ask("reference"))

    with use_backend("reference"):
        thread = threading.Thread(target=look, args=("thread",))
        thread.start()
        thread.join()
    asyncio.run(both())
    assert seen == {"thread": "native", "native": "native", "reference": "reference"}


def test_the_choice_is_logged_once(op, caplog):
    with caplog.at_level(logging.INFO, logger="sparsemtl"):
        op.choose(1)
        op.choose(1)
    assert [r.message for r in caplog.records] == ["toy runs on native (first that can run)"]


def test_the_backward_pass_keeps_the_backend_of_its_forward(device):
    weight = torch.ones(4, device=device, requires_grad=True)
    with use_backend("reference"):
        value = soft_threshold(weight, torch.tensor(0.5, device=device))
    assert value.grad_fn.backend.name == "reference"


def test_all_ops_holds_ours():
    assert all_ops()["soft_threshold"] is SOFT_THRESHOLD
    all_ops().clear()
    assert "soft_threshold" in all_ops()


def test_a_gpu_that_is_too_old_is_refused_by_name(monkeypatch):
    from sparsemtl.ops import availability

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "An old GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    availability.why_not_capability.cache_clear()
    try:
        reason = availability.why_not_on_gpu(None)
        assert reason == "An old GPU has compute capability 7.5, it needs 8.0"
    finally:
        availability.why_not_capability.cache_clear()
