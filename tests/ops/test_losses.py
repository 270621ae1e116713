from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.errors import InputError

PAIRS = [(7, 3), (1, 2), (5, 1), (3, 127)]


@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_soft_cross_entropy_agrees_with_torch(judge, randn, shape):
    teacher = 3 * randn(*shape)

    def ours(student):
        return ops.soft_cross_entropy(student, teacher.to(student.dtype))

    def plain(student):
        target = teacher.to(student.dtype).to(_loss_type(student)).softmax(-1)
        return F.cross_entropy(student.to(target.dtype), target)

    judge(ours, plain, [3 * randn(*shape)])


@pytest.mark.parametrize("shape", [*PAIRS, (2, 3, 5)], ids=str)
def test_hidden_mse_agrees_with_torch(judge, randn, shape):
    teacher = randn(*shape)

    def plain(student):
        wide = _loss_type(student)
        return F.mse_loss(student.to(wide), teacher.to(student.dtype).to(wide))

    judge(lambda s: ops.hidden_mse(s, teacher.to(s.dtype)), plain, [randn(*shape)])


def _loss_type(x):
    return torch.promote_types(x.dtype, torch.float32)


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
def test_gradcheck(randn, op):
    student, teacher = randn(5, 3).requires_grad_(), randn(5, 3)
    assert torch.autograd.gradcheck(lambda s: op(s, teacher), [student])
    assert torch.autograd.gradcheck(lambda s: 2.5 * op(s, teacher), [student])


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
def test_no_gradient_flows_to_the_teacher(randn, op):
    student, teacher = randn(5, 3).requires_grad_(), randn(5, 3).requires_grad_()
    op(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_is_at_least_float32(randn, op, dtype, result):
    assert op(randn(5, 3).to(dtype), randn(5, 3).to(dtype)).dtype == result


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


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
def test_bad_input(op):
    with pytest.raises(InputError, match=r"of one shape, got \[5, 3\] and \[5, 2\]"):
        op(torch.zeros(5, 3), torch.zeros(5, 2))
