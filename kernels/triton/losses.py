"""The two losses of distillation, and their gradients; the incoming gradient stays on the device.

    soft_cross_entropy = -sum over b, c of softmax(teacher)[b, c] * log_softmax(student)[b, c] / B
    hidden_mse = sum over pairs of weight * sum of (student - teacher)^2 / count

Sums are taken in a fixed order: one program adds all rows of the logits, which are few; those of
hidden states are added by a number of programs that follows from the shape, and their partial sums
by one. With one configuration, the bits are the same on every card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynabert_fast.kernels.common import Config, Specimen, bucket, choose, type_name
from dynabert_fast.kernels.residual_norm import dense, specimen

# TILE: values in a program's tile of logits, rows times C rounded up to a power of two. A call
# takes the first that holds a row: a loss is one program's work, there is nothing to tune.
CONFIGS = (
    Config.of(warps=4, TILE=1024),
    Config.of(warps=8, TILE=4096),
    Config.of(warps=16, TILE=16384),
)
# BLOCK: values of a row that a program takes at a time, two 16-byte accesses of bf16 to a thread
# and tensor in the first; AHEAD as in `residual_norm`.
MSE_CONFIGS = (
    Config.of(warps=4, BLOCK=2048, AHEAD=1),
    Config.of(warps=8, BLOCK=4096, AHEAD=1),
    Config.of(warps=4, BLOCK=1024, AHEAD=3),
)
MSE_BACKWARD_CONFIGS = (
    Config.of(warps=4, BLOCK=1024),
    Config.of(warps=4, BLOCK=2048),
    Config.of(warps=8, BLOCK=4096),
)
# Programs of `hidden_mse`: 132 processors hold them all at once, each with a block in flight.
_PROGRAMS = 1024
_SUM = Config.of(warps=4, BLOCK=1024)


# --- soft cross-entropy ---------------------------------------------------------------------------


@triton.jit
def _logits(base, stride, rows, columns, count, C: tl.constexpr):
    """Logits `[ROWS, BLOCK_C]`, float32, less their row's largest; -inf beyond C.

    Rows beyond the last are that one again: a row of -inf would be NaN.
    """
    rows = tl.minimum(rows, count - 1)
    at = base + rows[:, None] * stride + columns[None, :]
    x = tl.load(at, mask=(columns < C)[None, :], other=float("-inf")).to(tl.float32)
    return x - tl.max(x, 1)[:, None]


@triton.jit(do_not_specialize=["count"])
def _soft_cross_entropy(
    student,
    teacher,
    out,
    count,
    student_stride,
    teacher_stride,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // BLOCK_C
    columns = tl.arange(0, BLOCK_C)
    losses = tl.zeros([ROWS], tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        s = _logits(student, student_stride, rows, columns, count, C)
        t = _logits(teacher, teacher_stride, rows, columns, count, C)
        log_student = s - tl.log(tl.sum(tl.exp(s), 1))[:, None]
        log_student = tl.where((columns < C)[None, :], log_student, 0.0)  # 0 * -inf is NaN
        weights = tl.exp(t)
        row_losses = tl.sum(weights * log_student, 1) / tl.sum(weights, 1)
        losses -= tl.where(rows < count, row_losses, 0.0)
    tl.store(out, tl.sum(losses, 0) / count)


@triton.jit(do_not_specialize=["count"])
def _soft_cross_entropy_backward(
    grad,
    student,
    teacher,
    out,
    count,
    student_stride,
    teacher_stride,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // BLOCK_C
    columns = tl.arange(0, BLOCK_C)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < count)[:, None] & (columns < C)[None, :]
    s = tl.exp(_logits(student, student_stride, rows, columns, count, C))
    t = tl.exp(_logits(teacher, teacher_stride, rows, columns, count, C))
    s *= (1.0 / tl.sum(s, 1))[:, None]
    t *= (1.0 / tl.sum(t, 1))[:, None]
    difference = tl.load(grad).to(tl.float32) / count * (s - t)
    at = out + rows[:, None] * C + columns[None, :]
    tl.store(at, difference.to(out.dtype.element_ty), mask=inside)


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of `-(softmax(teacher) * log_softmax(student)).sum(-1)`.

    Args:
        student: Logits `[B, C]`, fp32, bf16 or fp16.
        teacher: Logits `[B, C]`.

    Returns:
        A float32 scalar; NaN where B is 0.
    """
    count, classes = student.shape
    if not count:
        return _nan(student)
    student, teacher = dense(student, teacher)
    out = student.new_empty((), dtype=torch.float32)
    block = triton.next_power_of_2(classes)
    _soft_cross_entropy[(1,)](
        student, teacher, out, count, student.stride(0), teacher.stride(0), classes, block,
        **_that_holds(block).arguments,
    )  # fmt: skip
    return out


def soft_cross_entropy_backward(grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Gradient of the student's logits: `grad * (softmax(student) - softmax(teacher)) / B`."""
    count, classes = student.shape
    student, teacher = dense(student, teacher)
    out = student.new_empty(count, classes)
    block = triton.next_power_of_2(classes)
    config = _that_holds(block)
    if count:
        _soft_cross_entropy_backward[(triton.cdiv(count, config["TILE"] // block),)](
            grad, student, teacher, out, count, student.stride(0), teacher.stride(0), classes,
            block, **config.arguments,
        )  # fmt: skip
    return out


def _that_holds(block: int) -> Config:
    """The smallest configuration that holds a row; beyond 16384 classes one that is slow."""
    found = (c for c in CONFIGS if c["TILE"] >= block)
    return next(found, Config.of(warps=16, TILE=block))


def _nan(like: Tensor) -> Tensor:
    """The mean of nothing."""
    return like.new_full((), math.nan, dtype=torch.float32)


# --- hidden states --------------------------------------------------------------------------------


@triton.jit
def _difference(
    student, teacher, tile, columns, student_stride, teacher_stride, BLOCK: tl.constexpr
):
    """One tile's row, columns, which of them exist, and student - teacher there, float32."""
    across = tl.cdiv(columns, BLOCK)
    tile = tl.cast(tile, tl.int64)
    row = tile // across
    at = tile % across * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(student + row * student_stride + at, mask=at < columns, other=0.0)
    t = tl.load(teacher + row * teacher_stride + at, mask=at < columns, other=0.0)
    return row, at, s.to(tl.float32) - t.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _square_sums(
    student,
    teacher,
    partial,
    rows,
    columns,
    student_stride,
    teacher_stride,
    scale,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Each program's `scale * sum of (student - teacher)^2` of its tiles."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    tiles = rows * tl.cdiv(columns, BLOCK)
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=AHEAD):
        _, _, d = _difference(
            student, teacher, tile, columns, student_stride, teacher_stride, BLOCK
        )
        total += d * d
    tl.store(partial + program, tl.sum(total, 0) * scale)


@triton.jit(do_not_specialize=["count"])
def _sum(partial, out, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < count, other=0.0)
    tl.store(out, tl.sum(total, 0))


@triton.jit
def _square_sums_backward(
    grad,
    student,
    teacher,
    out,
    columns,
    student_stride,
    teacher_stride,
    scale,
    BLOCK: tl.constexpr,
):
    row, at, d = _difference(
        student, teacher, tl.program_id(0), columns, student_stride, teacher_stride, BLOCK
    )
    value = d * (tl.load(grad).to(tl.float32) * scale)
    tl.store(out + row * columns + at, value.to(out.dtype.element_ty), mask=at < columns)


def hidden_mse(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Sum over pairs of `weight * mean((student - teacher)^2)`.

    One launch for each pair, and one for their sum. One for all would need the tensors' addresses
    in a table on the device, to be copied there by every call, or as arguments, whose number is
    compiled in and changes with the depth.

    Args:
        students: Of any shape, fp32, bf16 or fp16.
        teachers: One of each student's shape.
        weights: One for each pair.

    Returns:
        A float32 scalar; NaN where a pair has no values.
    """
    if not all(s.numel() for s in students):
        return _nan(students[0])
    pairs = [_rows(s, t) for s, t in zip(students, teachers, strict=True)]
    # Few values need no more programs than there are tiles of the smallest size.
    programs = [min(_PROGRAMS, len(s) * triton.cdiv(s.shape[1], _SUM["BLOCK"])) for s, _ in pairs]
    partial = students[0].new_empty(sum(programs), dtype=torch.float32)
    for (s, t), weight, mine in zip(pairs, weights, partial.split(programs), strict=True):
        launch = _square_sums_launch(s, t, weight / s.numel(), mine)
        key = (type_name(s.dtype), bucket(s.numel()))
        launch(choose("hidden_mse", key, MSE_CONFIGS, launch))
    out = partial.new_empty(())
    _sum[(1,)](partial, out, len(partial), **_SUM.arguments)
    return out


def _square_sums_launch(
    s: Tensor, t: Tensor, scale: float, partial: Tensor
) -> Callable[[Config], None]:
    def launch(config: Config) -> None:
        _square_sums[(len(partial),)](
            s, t, partial, *s.shape, s.stride(0), t.stride(0), scale, **config.arguments
        )

    return launch


def hidden_mse_backward(
    grad: Tensor, students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float]
) -> list[Tensor]:
    """Gradients of the students: `grad * weight * 2 (student - teacher) / count`, a launch each."""
    pairs = zip(students, teachers, weights, strict=True)
    return [_hidden_gradient(grad, s, t, weight) for s, t, weight in pairs]


def _hidden_gradient(grad: Tensor, student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    out = student.new_empty(student.shape)
    if not out.numel():
        return out
    s, t = _rows(student, teacher)
    scale = 2 * weight / s.numel()

    def launch(config: Config) -> None:
        _square_sums_backward[(len(s) * triton.cdiv(s.shape[1], config["BLOCK"]),)](
            grad, s, t, out, s.shape[1], s.stride(0), t.stride(0), scale, **config.arguments
        )

    key = (type_name(s.dtype), bucket(s.numel()))
    launch(choose("hidden_mse_backward", key, MSE_BACKWARD_CONFIGS, launch))
    return out


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As matrices: of one row if nothing lies between the values, else of rows of the last size."""
    if all(t.is_contiguous() for t in tensors):
        return tuple(t.view(1, -1) for t in tensors)
    return tuple(t.reshape(-1, t.shape[-1]) for t in dense(*tensors))


# --- counts and specimens -------------------------------------------------------------------------


def bytes_and_flops(kernel: str, count: int, item: int) -> tuple[int, int]:
    """Bytes that a call moves at least, and its floating-point operations.

    Args:
        kernel: One of the four.
        count: Values of the student.
        item: Bytes of a value.

    Returns:
        Bytes, and twice the multiply-adds: for logits, two shifts, two sums of exponentials, and a
        product (the exponentials themselves are not counted); for hidden states, a difference and
        a square or a product.
    """
    moved = item * count * (3 if kernel.endswith("_backward") else 2) + 4
    return moved, 2 * (2 if kernel.startswith("hidden_mse") else 5) * count


def specimens() -> Iterator[Specimen]:
    """Every configuration; the logits' with rows that fill a tile and with 3 classes.

    Sizes and strides are constants here, for then they are known to be round.
    """
    for kind in ("bf16", "fp16", "fp32"):
        pair = {"student": f"*{kind}", "teacher": f"*{kind}"}
        logits = pair | {"count": "i32"}
        for config, classes in [(CONFIGS[0], 3), *((c, c["TILE"]) for c in CONFIGS)]:
            sizes = {"student_stride": classes, "teacher_stride": classes, "C": classes}
            sizes |= {"BLOCK_C": triton.next_power_of_2(classes)}
            types = logits | {"out": "*fp32"}
            name = f"{kind} soft cross-entropy C={classes}"
            yield specimen(_soft_cross_entropy, name, types, sizes, config)
            types = logits | {"out": f"*{kind}", "grad": "*fp32"}
            name = f"{kind} soft cross-entropy backward C={classes}"
            yield specimen(_soft_cross_entropy_backward, name, types, sizes, config)
        sizes = {"columns": 768, "student_stride": 768, "teacher_stride": 768}
        for config in MSE_CONFIGS:
            types = pair | {"partial": "*fp32", "rows": "i32", "scale": "fp32"}
            yield specimen(_square_sums, f"{kind} hidden mse", types, sizes, config)
        for config in MSE_BACKWARD_CONFIGS:
            types = pair | {"grad": "*fp32", "out": f"*{kind}", "scale": "fp32"}
            name = f"{kind} hidden mse backward"
            yield specimen(_square_sums_backward, name, types, sizes, config)
    types = {"partial": "*fp32", "out": "*fp32", "count": "i32"}
    yield specimen(_sum, "sum of partial sums", types, {}, _SUM)
