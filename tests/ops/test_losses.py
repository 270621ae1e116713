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


@pytest.fixture(params=["reference", "cpp"])
def backend(request, dtype):
    cpp = ops.backends()["cpp"]
    if request.param == "cpp" and cpp.reason_against("hidden_mse", torch.device("cpu"), dtype):
        pytest.skip("cpp does not serve this type here")
    with ops.use_backend(request.param):
        yield


def _rows_apart(t):
    """The values between others: a view whose rows do not follow one another."""
    wide = torch.full((t.shape[0] + 2, t.shape[1] + 3), math.nan, dtype=t.dtype)
    wide[1:-1, 2:-1] = t
    return wide[1:-1, 2:-1]


@pytest.mark.parametrize("weights", [None, [0.5, -3, 1.75, 0.0]], ids=["no weights", "weights"])
@pytest.mark.usefixtures("backend")
def test_many_pairs_agree_with_the_sum_of_single_ones(judge, randn, weights):
    shapes = [(7, 13), (1, 2), (71, 3), (2, 3, 5)]
    teachers = [randn(*shape) for shape in shapes]

    def ours(*students):
        students = [_rows_apart(students[0]), students[1], students[2].t(), students[3]]
        targets = [t.to(students[0].dtype) for t in teachers]
        targets = [targets[0], _rows_apart(targets[1]), targets[2].t(), targets[3]]
        return ops.hidden_mse(students, targets, weights)

    def plain(*students):
        wide = _loss_type(students[0])
        pairs = zip(students, teachers, weights or [1] * 4, strict=True)
        return sum(
            w * F.mse_loss(s.to(wide), t.to(students[0].dtype).to(wide)) for s, t, w in pairs
        )

    judge(ours, plain, [randn(*shape) for shape in shapes])


@pytest.mark.parametrize("teachers", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("backend")
def test_a_pair_of_two_types_counts_in_the_wider_one(randn, dtype, teachers):
    student, teacher = randn(7, 13).to(dtype).requires_grad_(), randn(7, 13).to(teachers)
    loss = ops.hidden_mse([student, student], [student.detach(), teacher], [1.0, 2.5])
    wide = student.detach().double().requires_grad_()
    want = 2.5 * F.mse_loss(wide, teacher.double())
    (grad,), (truth,) = torch.autograd.grad(loss, student), torch.autograd.grad(want, wide)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), truth, rtol=rtol, atol=rtol * truth.abs().max())


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
@pytest.mark.parametrize("dtype", [torch.float16], indirect=True, ids=str)
def test_a_gradient_wider_than_its_tensors_is_computed_in_theirs(judge, randn, op):
    """The backward kernel is chosen by the tensors: another type's would read beyond their end."""
    teacher = randn(7, 13)

    def on_reference(student):
        with ops.use_backend("reference"):
            return op(student, teacher.to(student.dtype))

    judge(lambda s: op(s, teacher.to(s.dtype)), on_reference, [randn(7, 13)])


@pytest.mark.usefixtures("backend")
def test_a_pair_of_nothing_is_nan_and_has_no_gradient(randn, dtype):
    nothing, some = (torch.empty(n, 3, dtype=dtype, requires_grad=True) for n in (0, 2))
    assert ops.hidden_mse(nothing, nothing.detach()).isnan()
    loss = ops.hidden_mse([some, nothing], [randn(2, 3).to(dtype), nothing.detach()])
    assert loss.isnan()
    loss.backward()
    assert nothing.grad.shape == (0, 3)


def _loss_type(x):
    return torch.promote_types(x.dtype, torch.float32)


@pytest.mark.parametrize("op", [ops.soft_cross_entropy, ops.hidden_mse])
def test_gradcheck(randn, op):
    student, teacher = randn(5, 3).requires_grad_(), randn(5, 3)
    assert torch.autograd.gradcheck(lambda s: op(s, teacher), [student])
    assert torch.autograd.gradcheck(lambda s: 2.5 * op(s, teacher), [student])


def test_gradcheck_of_many_pairs(randn):
    students = [randn(5, 3).requires_grad_(), randn(2), randn(2, 2).requires_grad_()]
    teachers = [torch.randn_like(s) for s in students]
    assert torch.autograd.gradcheck(
        lambda *s: ops.hidden_mse(s, teachers, [0.5, 2.0, -1.0]), students
    )


def test_a_tensor_in_several_pairs_gets_all_their_gradients(randn):
    student, first, second = randn(5, 3).requires_grad_(), randn(5, 3), randn(5, 3)
    ops.hidden_mse([student, student], [first, second], [1.0, 2.0]).backward()
    want = 2 / 15 * ((student - first) + 2 * (student - second))
    torch.testing.assert_close(student.grad, want.detach())


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
    with pytest.raises(InputError, match="on one device, got cpu, meta"):
        op(torch.zeros(5, 3), torch.zeros(5, 3, device="meta"))


def test_logits_are_a_row_for_each_example():
    with pytest.raises(InputError, match=r"needs logits \[B, C\], got \[2, 3, 4\]"):
        ops.soft_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("students", "teachers", "weights", "message"),
    [
        ([], [], None, "got 0, 0 and 0"),
        ([(5, 3)], [], None, "got 1, 0 and 1"),
        ([(5, 3), (5, 3)], [(5, 3), (5, 3)], [1.0], "got 2, 2 and 1"),
        ([(5, 3), (5, 3)], [(5, 3), (5, 2)], None, r"one shape, got \[5, 3\] and \[5, 2\]"),
    ],
)
def test_bad_pairs(students, teachers, weights, message):
    pairs = ([torch.zeros(shape) for shape in shapes] for shapes in (students, teachers))
    with pytest.raises(InputError, match=message):
        ops.hidden_mse(*pairs, weights)


def test_students_of_two_types_are_refused():
    students = [torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.bfloat16)]
    with pytest.raises(InputError, match="one type, got float32, bfloat16; cast them"):
        ops.hidden_mse(students, students)
