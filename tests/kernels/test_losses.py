"""The losses in Triton's interpreter: several tiles of rows and of columns, several programs."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.kernels import common, losses
from dynabert_fast.kernels.common import Config
from dynabert_fast.ops import registry


def _shared():
    """`tests/ops/conftest.py`: the judge of all ops."""
    path = Path(__file__).parents[1] / "ops" / "conftest.py"
    spec = importlib.util.spec_from_file_location("judge_of_ops", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_OPS = _shared()
judge, randn = _OPS.judge, _OPS.randn
nan_in_new_memory = _OPS.nan_in_new_memory

LOGITS = [(7, 3), (1, 2), (5, 1), (3, 127), (37, 16), (67, 5)]
HIDDEN = [(7, 13), (1, 1), (2, 3, 5), (71,), (13, 16), ()]
SHIPPED = losses.CONFIGS
SMALL = {
    "hidden_mse": Config.of(BLOCK=16, AHEAD=1),
    "hidden_mse_backward": Config.of(BLOCK=16),
}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The backend serves the CPU, on which kernels are interpreted."""
    backend = replace(ops.backends()["triton"], devices=("cpu",), supports=lambda *_: None)
    monkeypatch.setitem(registry._backends, "triton", backend)
    monkeypatch.setattr(registry, "_resolved", {})
    with ops.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """16 logits or values at a time; 3 programs, whose sums are added 2 at a time."""
    monkeypatch.setattr(common, "_chooser", [lambda kernel, *_: SMALL[kernel]])
    monkeypatch.setattr(losses, "CONFIGS", (Config.of(TILE=16), Config.of(TILE=128)))
    monkeypatch.setattr(losses, "_PROGRAMS", 3)
    monkeypatch.setattr(losses, "_SUM", Config.of(BLOCK=2))


def agree_on_logits(judge, randn, shape):
    teacher = 3 * randn(*shape)

    def ours(student):
        return ops.soft_cross_entropy(student, teacher.to(student.dtype))

    def plain(student):
        target = teacher.to(student.dtype).to(wide(student)).softmax(-1)
        return F.cross_entropy(student.to(target.dtype), target)

    judge(ours, plain, [3 * randn(*shape)])


def agree_on_hidden(judge, randn, shape):
    teacher = randn(*shape)

    def plain(student):
        return F.mse_loss(student.to(wide(student)), teacher.to(student.dtype).to(wide(student)))

    judge(lambda s: ops.hidden_mse(s, teacher.to(s.dtype)), plain, [randn(*shape)])


def wide(x):
    return torch.promote_types(x.dtype, torch.float32)


@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_soft_cross_entropy_agrees_with_torch(judge, randn, shape):
    agree_on_logits(judge, randn, shape)


@pytest.mark.parametrize("shape", HIDDEN, ids=str)
def test_hidden_mse_agrees_with_torch(judge, randn, shape):
    agree_on_hidden(judge, randn, shape)


@pytest.mark.parametrize("classes", [3, 1025, 5000])
@pytest.mark.parametrize("dtype", [torch.float32], indirect=True, ids=str)
def test_shipped_configurations_of_logits(judge, randn, monkeypatch, classes):
    monkeypatch.setattr(losses, "CONFIGS", SHIPPED)
    agree_on_logits(judge, randn, (3, classes))


def test_more_classes_than_any_configuration(judge, randn):
    agree_on_logits(judge, randn, (3, 131))


@pytest.mark.parametrize("form", range(3))
@pytest.mark.parametrize("dtype", [torch.float32], indirect=True, ids=str)
def test_shipped_configurations_of_hidden_states(judge, randn, monkeypatch, form):
    monkeypatch.setattr(common, "_chooser", [lambda kernel, key, configs, launch: configs[form]])
    agree_on_hidden(judge, randn, (7, 1031))


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
def test_the_incoming_gradient_scales_ours(randn, dtype, op):
    student, teacher = (randn(7, 3).to(dtype) for _ in range(2))
    once, scaled = (student.clone().requires_grad_() for _ in range(2))
    op(once, teacher).backward()
    (-4 * op(scaled, teacher)).backward()
    assert once.grad.any()
    assert torch.equal(scaled.grad, -4 * once.grad)  # a power of two, no rounding


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
def test_no_gradient_flows_to_the_teacher(randn, op):
    student, teacher = (randn(5, 3).float().requires_grad_() for _ in range(2))
    op(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
def test_is_float32(randn, dtype, op):
    loss = op(randn(5, 3).to(dtype), randn(5, 3).to(dtype))
    assert loss.dtype == torch.float32
    assert loss.shape == ()


def test_values_worked_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, -5.0]])
    assert ops.soft_cross_entropy(student, teacher).item() == pytest.approx(math.log(2))
    pair = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert ops.hidden_mse(*pair).item() == pytest.approx((4 + 9) / 4)


def test_large_logits_do_not_overflow():
    student = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = ops.soft_cross_entropy(student, -student.detach())
    assert loss.item() == pytest.approx(2e4)
    loss.backward()
    assert student.grad.isfinite().all()


def kernels(name):
    """Forward and backward of one pair of tensors."""
    forward, backward = (getattr(losses, n) for n in (name, f"{name}_backward"))
    if name == "soft_cross_entropy":
        return forward, backward
    return (
        lambda s, t: forward([s], [t], [1.0]),
        lambda grad, s, t: backward(grad, [s], [t], [1.0])[0],
    )


@pytest.mark.parametrize("kernel", ["soft_cross_entropy", "hidden_mse"])
def test_no_rows(kernel, dtype):
    nothing = torch.zeros(0, 3, dtype=dtype)
    forward, backward = kernels(kernel)
    assert forward(nothing, nothing).isnan()
    assert backward(torch.tensor(1.0), nothing, nothing).shape == (0, 3)


def between_nans(t):
    """The values inside a wider matrix of NaN."""
    wide = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
    return wide[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)


@pytest.mark.parametrize("kernel", ["soft_cross_entropy", "hidden_mse"])
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize(
    "form", [between_nans, lambda t: t.t().contiguous().t()], ids=["between NaN", "transposed"]
)
def test_strided_views(randn, dtype, kernel, which, form):
    student, teacher = (randn(7, 19).to(dtype) for _ in range(2))
    pair = (
        student if which == "teacher" else form(student),
        teacher if which == "student" else form(teacher),
    )
    grad = torch.tensor(1.7)
    forward, backward = kernels(kernel)
    assert torch.equal(backward(grad, *pair), backward(grad, student, teacher))
    # Another shape of the same values may be added in another order.
    loss, want = forward(*pair), forward(student, teacher)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", [None, [0.5, -3.0, 1.75]], ids=["no weights", "weights"])
def test_many_pairs(judge, randn, weights):
    """Also where rows lie apart, and where a teacher is of another type."""
    shapes = [(7, 13), (3, 5), (71, 2)]
    teachers = [randn(*shape).bfloat16() for shape in shapes]

    def ours(first, *students):
        targets = [teachers[0], teachers[1].to(first.dtype), between_nans(teachers[2])]
        return ops.hidden_mse([between_nans(first), *students], targets, weights)

    def plain(*students):
        pairs = zip(students, teachers, weights or [1] * 3, strict=True)
        return sum(w * F.mse_loss(s.to(wide(s)), t.to(s.dtype).to(wide(s))) for s, t, w in pairs)

    judge(ours, plain, [randn(*shape) for shape in shapes])


def test_nothing_among_many_pairs_is_nan():
    pairs = [torch.ones(2, 3), torch.ones(0, 3)]
    assert losses.hidden_mse(pairs, pairs, [1.0, 1.0]).isnan()
    one, none = losses.hidden_mse_backward(torch.tensor(1.0), pairs, pairs, [1.0, 1.0])
    assert one.shape == (2, 3)
    assert none.shape == (0, 3)


@pytest.mark.parametrize("kernel", ["soft_cross_entropy", "hidden_mse"])
def test_counts_of_bytes_are_those_of_the_tensors(randn, dtype, kernel):
    pair = [randn(7, 3).to(dtype) for _ in range(2)]
    forward, backward = kernels(kernel)
    loss = forward(*pair)
    grad = backward(loss, *pair)
    read = sum(t.nbytes for t in pair)
    assert losses.bytes_and_flops(kernel, 21, dtype.itemsize)[0] == read + loss.nbytes
    backward = losses.bytes_and_flops(f"{kernel}_backward", 21, dtype.itemsize)[0]
    assert backward == read + loss.nbytes + grad.nbytes
