from __future__ import annotations

import logging
import threading

import pytest
import torch

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.ops import reference, registry
from dynabert_fast.ops.registry import Backend, resolve

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def only_reference(monkeypatch):
    """A registry that holds the reference alone, whatever is installed; the real one comes back."""
    monkeypatch.setattr(registry, "_backends", {"reference": registry._backends["reference"]})
    monkeypatch.setattr(registry, "_resolved", {})
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def calls():
    return []


def marked(name, calls, kernels=("expand", "expand_backward"), **limits):
    """A backend that notes its calls and leaves the work to the reference."""

    def kernel(which):
        def run(*args):
            calls.append(f"{name} {which}")
            return reference.KERNELS[which](*args)

        return run

    return Backend(kernels={k: kernel(k) for k in kernels}, **limits)


def expand(dtype=torch.float32, requires_grad=False):
    x = torch.ones(3, 4, dtype=dtype, requires_grad=requires_grad)
    return ops.expand(x, torch.ones(5, 4, dtype=dtype), torch.ones(5, dtype=dtype), 2)


def test_priority_is_fixed_whatever_the_order_of_registration(calls):
    for name in ("cpp", "cuda", "triton"):
        registry.register(name, marked(name, calls))
    assert list(ops.backends()) == ["cuda", "triton", "cpp", "reference"]
    expand()
    assert calls == ["cuda expand"]


def test_registration_replaces_and_forgets_earlier_choices(calls):
    expand()
    registry.register("cpp", marked("old", calls))
    expand()
    registry.register("cpp", marked("new", calls))
    expand()
    assert calls == ["old expand", "new expand"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"kernels": ("contract",)}, "has no expand"),
        ({"devices": ("cuda", "xpu")}, "runs on cuda, xpu, not on cpu"),
        ({"dtypes": (torch.bfloat16,)}, "takes torch.bfloat16, not torch.float32"),
        ({"supports": lambda *call: "needs AVX-512"}, "needs AVX-512"),
    ],
    ids=["kernel", "device", "dtype", "supports"],
)
def test_a_refusal_falls_back_with_its_reason_or_raises_it_when_forced(
    calls, caplog, limits, reason
):
    registry.register("cpp", marked("cpp", calls, **limits))
    with caplog.at_level(logging.INFO, registry.logger.name):
        expand()
    assert calls == []
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    message = f"expand on cpu torch.float32: reference, because cpp {reason}"
    # That a GPU's backend does not serve a CPU goes without saying.
    assert said == ([] if "devices" in limits else [(logging.INFO, message)])
    with ops.use_backend("cpp"), pytest.raises(InputError) as error:
        expand()
    assert str(error.value) == f"the forced backend 'cpp' cannot compute expand: it {reason}"


def test_fallback_is_said_once_for_each_choice(calls, caplog):
    registry.register("cpp", marked("cpp", calls, dtypes=(torch.bfloat16,)))
    with caplog.at_level(logging.INFO, registry.logger.name):
        for dtype in (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float32):
            expand(dtype)
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    assert said == ["expand on cpu torch.float32", "expand on cpu torch.float64"]
    assert calls == ["cpp expand"]


def test_nothing_is_said_where_nothing_falls_back(calls, caplog):
    registry.register("cpp", marked("cpp", calls))
    with caplog.at_level(logging.DEBUG, registry.logger.name):
        expand()
        with ops.use_backend("reference"):
            expand()
    assert caplog.records == []


def test_supports_is_asked_about_the_call_after_devices_and_dtypes(calls):
    asked = []

    def supports(*call):
        asked.append(call)

    limits = {"dtypes": (torch.float32,), "supports": supports}
    registry.register("cpp", marked("cpp", calls, **limits))
    expand(torch.float64)
    expand()
    assert asked == [("expand", CPU, torch.float32)]


def test_every_reason_is_given_where_no_backend_serves(calls):
    registry.register("cpp", marked("cpp", calls, devices=("cuda",)))
    with pytest.raises(InputError) as error:
        resolve("transmogrify", CPU, torch.float32)
    assert str(error.value) == (
        "no backend computes transmogrify on cpu torch.float32: "
        "cpp has no transmogrify; reference has no transmogrify"
    )


def test_use_backend_forces_nests_and_ends(calls):
    for name in ("triton", "cpp"):
        registry.register(name, marked(name, calls))
    assert ops.forced_backend() is None
    with ops.use_backend("cpp"):
        expand()
        with ops.use_backend("reference"):
            assert ops.forced_backend() == "reference"
            expand()
        expand()
    expand()
    assert ops.forced_backend() is None
    assert calls == ["cpp expand", "cpp expand", "triton expand"]


def test_use_backend_ends_when_the_block_raises(calls):
    registry.register("cpp", marked("cpp", calls))
    with pytest.raises(RuntimeError, match="stop"), ops.use_backend("cpp"):
        raise RuntimeError("stop")
    assert ops.forced_backend() is None


def test_environment_variable_forces_and_use_backend_overrides_it(calls, monkeypatch):
    for name in ("triton", "cpp"):
        registry.register(name, marked(name, calls))
    monkeypatch.setenv("DYNABERT_FAST_BACKEND", "cpp")
    assert ops.forced_backend() == "cpp"
    expand()
    with ops.use_backend("triton"):
        expand()
    monkeypatch.setenv("DYNABERT_FAST_BACKEND", "")  # as good as unset
    assert ops.forced_backend() is None
    expand()
    assert calls == ["cpp expand", "triton expand", "triton expand"]


@pytest.mark.parametrize("how", ["use_backend", "environment"])
def test_an_unknown_or_absent_backend_lists_those_there_are(how, monkeypatch):
    message = r"one of reference \(those installed here\), got 'triton'"
    if how == "use_backend":
        with pytest.raises(InputError, match=message), ops.use_backend("triton"):
            pass
    else:
        monkeypatch.setenv("DYNABERT_FAST_BACKEND", "triton")
        with pytest.raises(InputError, match=message):
            expand()


def test_only_known_names_register(calls):
    with pytest.raises(InputError, match="one of cuda, triton, cpp, reference, got 'mine'"):
        registry.register("mine", marked("mine", calls))


def test_threads_choose_apart(calls):
    registry.register("cpp", marked("cpp", calls))
    seen = {}
    both_forced = threading.Barrier(2)

    def force(name):
        with ops.use_backend(name):
            both_forced.wait(timeout=10)
            seen[name] = ops.forced_backend()

    with ops.use_backend("cpp"):
        threads = [threading.Thread(target=force, args=(name,)) for name in ("cpp", "reference")]
        outsider = threading.Thread(target=lambda: seen.update(new=ops.forced_backend()))
        for thread in (*threads, outsider):
            thread.start()
        for thread in (*threads, outsider):
            thread.join()
    assert seen == {"cpp": "cpp", "reference": "reference", "new": None}


@pytest.mark.parametrize("thread", [False, True], ids=["this thread", "another thread"])
def test_backward_runs_on_the_backend_that_forward_was_forced_to(calls, thread):
    """On a GPU autograd runs it in a thread of its own."""
    for name in ("triton", "cpp"):
        registry.register(name, marked(name, calls))
    with ops.use_backend("cpp"):
        loss = expand(requires_grad=True).sum()
    if thread:
        other = threading.Thread(target=loss.backward)
        other.start()
        other.join()
    else:
        loss.backward()
    assert calls == ["cpp expand", "cpp expand_backward"]


def test_forward_and_backward_kernels_choose_one_by_one(calls):
    registry.register("cpp", marked("cpp", calls, kernels=("expand",)))
    registry.register("triton", marked("triton", calls, kernels=("expand_backward",)))
    expand(requires_grad=True).sum().backward()
    assert calls == ["cpp expand", "triton expand_backward"]


def test_reference_serves_every_kernel_of_every_op():
    names = {name for name in ops.__all__ if callable(getattr(ops, name))}
    kernels = names - {"backends", "forced_backend", "use_backend"}
    assert set(reference.KERNELS) == kernels | {f"{name}_backward" for name in kernels}
