"""Matrix products bounded by extents: expand and contract, forward and backward.

Three of the four products are one kernel, `product`, because an extent always runs along the rows
of the stored weight `[K, D]`, and the weight's layout follows from where the extent stands:

| call                    | A                | B(k, n)        | extent bounds |
|-------------------------|------------------|----------------|---------------|
| expand                  | x `[T, D]`       | `weight[n, k]` | n             |
| contract_backward, x    | grad `[T, D]`    | `weight[n, k]` | n             |
| contract                | x `[T, >= k]`    | `weight[k, n]` | k             |
| expand_backward, x      | grad `[T, >= k]` | `weight[k, n]` | k             |

The fourth, `weight_gradient`, sums over rows: `out[i, c] = sum_r left[r, i] right[r, c]`.

**One extent or many.** With many, a program takes its rows and its extent from a table of row
tiles; with one, it computes them, and the table is None.

**No extent is a constant, and none is hinted**, so that a switch of sub-network compiles nothing.
But a mask `column < extent` of which the compiler knows nothing turns loads of 16 bytes, and the
asynchronous copies made of them, into loads of one element. So each mask is made with the extent
rounded down to `UNIT`, which the compiler sees, and what is left, nothing in any model whose sizes
are multiples of 8, is done apart. Strides keep their hints.

Where an argument may be None, the kernel is compiled without what it is for.

**Rows beyond a tile** are read from its last row instead (no mask) and not stored.

**Splits.** Where tiles are too few to fill a GPU, the sum is cut into parts, whose number depends
on shapes and configuration only; `add_parts` adds them in order. There are no atomics: results
repeat bit by bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynabert_fast.kernels import common
from dynabert_fast.kernels.common import (
    Config,
    Specimen,
    activate,
    activation_slope,
    bucket,
    choose,
    row_tiles,
)

INTERPRETED = tl.constexpr(common.INTERPRETED)
#: A mask whose bound is a multiple of this allows copies of 16 bytes (in float32, of 32).
UNIT = tl.constexpr(8)
#: Columns of a step of what is left: the least that a tensor core multiplies.
REST = tl.constexpr(16)
#: Row tiles that share a column of B before the next column is begun, so that both stay in L2.
GROUP = tl.constexpr(8)
#: Elements of a tile that is stored in halves: 64 of each thread of 8 warps.
LARGE = tl.constexpr(16384)
#: Row tiles whose extents are looked at together.
MANY = tl.constexpr(256)


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # where a bfloat16 is kept as its bits, which `tl.dot` would multiply
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _place(row_count, column_count):
    """Row and column of this program's tile: down `GROUP` rows, then to the next column."""
    program = tl.program_id(0)
    first = program // (GROUP * column_count) * GROUP
    height = tl.minimum(row_count - first, GROUP)
    inside = program % (GROUP * column_count)
    return first + inside % height, inside // height


@triton.jit
def _put(pointers, value, rows_in, columns, bound):
    """Store the columns below the bound of the rows that are in; wide stores where UNIT divides."""
    value = value.to(pointers.dtype.element_ty)
    if bound % UNIT == 0:
        inside = columns < bound // UNIT * UNIT
        tl.store(pointers, value, mask=rows_in[:, None] & inside[None, :])
    else:
        tl.store(pointers, value, mask=rows_in[:, None] & (columns < bound)[None, :])


@triton.jit
def _step(
    acc,
    a,
    b,
    k,
    bound,
    rows,
    columns,
    columns_in,
    a_stride,
    b_stride,
    BOUND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Acc plus the product over the BLOCK_K indices from k on, those below the bound.

    a and b point to the tile's first row of A and first column of B.
    """
    inner = tl.arange(0, BLOCK_K)
    inside = k + inner < bound
    a_tile = tl.load(
        a + k + (rows[:, None] * a_stride + inner[None, :]), mask=inside[None, :], other=0.0
    )
    if BOUND == "n":
        b_tile = tl.load(
            b + k + (columns[None, :] * b_stride + inner[:, None]), mask=inside[:, None], other=0.0
        )
    else:
        b_tile = tl.load(
            b + tl.cast(k, tl.int64) * b_stride + (inner[:, None] * b_stride + columns[None, :]),
            mask=inside[:, None] & columns_in[None, :],
            other=0.0,
        )
    return _dot(a_tile, b_tile, acc, PRECISION)


@triton.jit
def _gradient_steps(
    acc,
    sums,
    begin,
    end,
    left,
    right,
    table,
    rows,
    extent,
    i,
    c,
    D,
    left_stride,
    right_stride,
    REMAINDER: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Acc and sums plus the products and sums over the row tiles from begin to end.

    Of the columns i, those below the extent rounded down, or REMAINDER: those from there to it.
    """
    r = tl.arange(0, BLOCK_R)
    for tile in tl.range(begin, end, num_stages=STAGES):
        first, last = tile * BLOCK_R, rows
        if table is not None:
            first = tl.load(table + tile * 3)
            last = tl.load(table + tile * 3 + 1)
            extent = tl.load(table + tile * 3 + 2)
        rows_in = (r < last - first)[:, None]
        rounded = extent // UNIT * UNIT
        wanted = i < rounded
        if REMAINDER:
            wanted = (i >= rounded) & (i < extent)
        a = tl.load(
            left + tl.cast(first, tl.int64) * left_stride + (r[:, None] * left_stride + i[None, :]),
            mask=rows_in & wanted[None, :],
            other=0.0,
        )
        b = tl.load(
            right
            + tl.cast(first, tl.int64) * right_stride
            + (r[:, None] * right_stride + c[None, :]),
            mask=rows_in & (c < D)[None, :],
            other=0.0,
        )
        acc = _dot(tl.trans(a), b, acc, PRECISION)
        if BIAS == "left":
            sums += tl.sum(a.to(tl.float32), 0)
        if BIAS == "right" and not REMAINDER:
            sums += tl.sum(b.to(tl.float32), 0)
    return acc, sums


@triton.jit
def _gradient_tile(
    left,
    right,
    out,
    sums_out,
    table,
    begin,
    end,
    remainder,
    rows,
    extent,
    height,
    D,
    left_stride,
    right_stride,
    out_stride,
    i0,
    c0,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of `weight_gradient` over the row tiles from begin to end."""
    i = i0 + tl.arange(0, BLOCK_I)
    c = c0 + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_I, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_I if BIAS == "left" else BLOCK_C,), tl.float32)
    acc, sums = _gradient_steps(
        acc, sums, begin, end, left, right, table, rows, extent, i, c, D, left_stride, right_stride,
        False, None, BIAS, PRECISION, BLOCK_R,
    )  # fmt: skip
    acc, sums = _gradient_steps(
        acc, sums, begin, tl.where(remainder, end, begin), left, right, table, rows, extent, i, c,
        D, left_stride, right_stride, True, 1, BIAS, PRECISION, BLOCK_R,
    )  # fmt: skip
    near = out + i0.to(tl.int64) * out_stride
    tl.store(
        near + ((i - i0)[:, None] * out_stride + c[None, :]),
        acc.to(out.dtype.element_ty),
        mask=(i < height)[:, None] & (c < D)[None, :],
    )
    if BIAS == "left":
        tl.store(sums_out + i, sums.to(sums_out.dtype.element_ty), mask=i < height)
    if BIAS == "right":
        tl.store(sums_out + c, sums.to(sums_out.dtype.element_ty), mask=c < D)


@triton.jit
def _finish(
    acc,
    bias,
    out,
    pre,
    rows_in,
    m,
    n,
    valid,
    bound,
    out_stride,
    pre_stride,
    ACTIVATION: tl.constexpr,
    FILL: tl.constexpr,
):
    """Add the bias, activate and store the columns n; out and pre point to the tile's first row.

    Columns from valid to bound, if any, are stored as zeros (FILL) or as they come.
    """
    if bias is not None:
        acc += tl.load(bias + n, mask=n < valid, other=0.0).to(tl.float32)[None, :]
    if FILL:
        acc = tl.where((n < valid)[None, :], acc, 0.0)
    if pre is not None:
        _put(pre + (m[:, None] * pre_stride + n[None, :]), acc, rows_in, n, bound)
    acc = activate(acc, ACTIVATION)
    _put(out + (m[:, None] * out_stride + n[None, :]), acc, rows_in, n, bound)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "tile_count", "extent", "width"])
def product(
    a,
    b,
    bias,
    out,
    pre,
    tiles,
    rows,
    tile_count,
    extent,
    width,
    D,
    a_stride,
    b_stride,
    out_stride,
    pre_stride,
    part_stride,
    BOUND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FILL: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`out[m, n] = activation(sum_k A[m, k] B(k, n) + bias[n])`, see the head of this file.

    Bound by n: out `[T, width]`, columns beyond a row's extent are zeros if FILL, else not written.
    Bound by k: out `[T, D]`; if SPLIT, float32 `[parts, T, D]` of which program (., p) writes the
    p-th, a sum over a part of the indices, for `add_parts`.
    """
    column_count = tl.cdiv(width if BOUND == "n" else D, BLOCK_N)
    tile, column = _place(tile_count, column_count)
    if tiles is not None:
        first = tl.load(tiles + tile * 3)
        last = tl.load(tiles + tile * 3 + 1)
        extent = tl.load(tiles + tile * 3 + 2)
    else:
        first = tile * BLOCK_M
        last = rows
    n0 = column * BLOCK_N
    if BOUND == "n" and not FILL:  # noqa: SIM102 (a constant, unlike the inner condition)
        if n0 >= extent:
            return

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    rows_in = m < last - first
    near = tl.minimum(m, last - first - 1)
    a += first.to(tl.int64) * a_stride
    if BOUND == "n":
        columns_in = n0 + n < extent
        columns = tl.minimum(n, extent - n0 - 1)  # not adjacent in memory, so this costs nothing
        b += n0.to(tl.int64) * b_stride
        end = tl.where(n0 < extent, D, 0)
    else:
        columns_in = n0 + n < D
        columns = n
        b += n0
        end = extent
    begin = 0
    if SPLIT:
        part = tl.program_id(1)
        steps = tl.cdiv(tl.cdiv(end, BLOCK_K), tl.num_programs(1))
        begin = part * steps * BLOCK_K
        end = tl.minimum(end, begin + steps * BLOCK_K)
        out += part.to(tl.int64) * part_stride

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rounded = end // UNIT * UNIT
    for k in tl.range(begin, rounded, BLOCK_K):
        acc = _step(
            acc, a, b, k, rounded, near, columns, columns_in, a_stride, b_stride, BOUND, BLOCK_K,
            PRECISION,
        )  # fmt: skip
    for k in tl.range(tl.maximum(begin, rounded), end, REST, num_stages=1):
        acc = _step(
            acc, a, b, k, end, near, columns, columns_in, a_stride, b_stride, BOUND, REST,
            PRECISION,
        )  # fmt: skip

    valid = D if BOUND == "k" else extent
    bound = width if FILL else valid
    out += first.to(tl.int64) * out_stride
    if pre is not None:
        pre += first.to(tl.int64) * pre_stride
    if BLOCK_M * BLOCK_N >= LARGE:
        # In halves: whole, the activation of a large tile takes more registers than there are.
        first_half, second_half = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        n = n0 + tl.arange(0, BLOCK_N // 2)
        _finish(
            first_half, bias, out, pre, rows_in, m, n, valid, bound, out_stride, pre_stride,
            ACTIVATION, FILL,
        )  # fmt: skip
        _finish(
            second_half, bias, out, pre, rows_in, m, n + BLOCK_N // 2, valid, bound, out_stride,
            pre_stride, ACTIVATION, FILL,
        )  # fmt: skip
    else:
        _finish(
            acc, bias, out, pre, rows_in, m, n0 + n, valid, bound, out_stride, pre_stride,
            ACTIVATION, FILL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "extent"])
def slope(
    grad,
    pre,
    out,
    tiles,
    rows,
    extent,
    grad_stride,
    pre_stride,
    out_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`out = grad * activation'(pre)` within extents, all `[T, >= extent]`.

    A kernel of its own: the result is read by every column tile of the input's gradient and every
    column tile of the weight's, and made in their loops it would be made a dozen times, and would
    take the operand through registers on its way to the tensor cores.
    """
    tile = tl.program_id(0)
    if tiles is not None:
        first = tl.load(tiles + tile * 3)
        last = tl.load(tiles + tile * 3 + 1)
        extent = tl.load(tiles + tile * 3 + 2)
    else:
        first = tile * BLOCK_M
        last = rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    first = first.to(tl.int64)
    grads = grad + first * grad_stride + (m[:, None] * grad_stride + n[None, :])
    pres = pre + first * pre_stride + (m[:, None] * pre_stride + n[None, :])
    outs = out + first * out_stride + (m[:, None] * out_stride + n[None, :])
    rows_in = (m < last - first)[:, None]
    if extent % UNIT == 0:
        inside = rows_in & (n < extent // UNIT * UNIT)[None, :]
        g = tl.load(grads, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(pres, mask=inside, other=0.0).to(tl.float32)
        g *= activation_slope(p, ACTIVATION)
        tl.store(outs, g.to(out.dtype.element_ty), mask=inside)
    else:
        inside = rows_in & (n < extent)[None, :]
        g = tl.load(grads, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(pres, mask=inside, other=0.0).to(tl.float32)
        g *= activation_slope(p, ACTIVATION)
        tl.store(outs, g.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tile_count", "rows", "extent", "height", "part_tiles"])
def weight_gradient(
    left,
    right,
    out,
    sums_out,
    table,
    tile_count,
    rows,
    extent,
    height,
    part_tiles,
    D,
    left_stride,
    right_stride,
    out_stride,
    part_stride,
    sums_stride,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`out[i, c] = sum of left[r, i] right[r, c]` over the rows r whose extent is above i.

    left `[T, >= extent]`, right `[T, D]`, out `[height, D]`: every row is written once, those
    beyond the largest extent with zeros. BIAS "left": `sums_out[i] = sum of left[r, i]` over the
    same rows, by the programs of the first columns, which hold left's tile anyway; "right":
    `sums_out[c] = sum of right[r, c]` over all rows, by those of the first rows, as every extent
    is above 0. Program (., p) sums over the p-th `part_tiles` row tiles and writes the p-th out and
    sums_out.

    The table is of row tiles, widest first, so that the rows of a tile of i are a prefix of it and
    one loop. (A loop in a loop over row blocks took 80 registers more and spilt, for sm_80.)
    """
    row_tile, column = _place(tl.cdiv(height, BLOCK_I), tl.cdiv(D, BLOCK_C))
    i0 = row_tile * BLOCK_I
    c0 = column * BLOCK_C
    if table is not None:
        count, remainder = 0, 0
        for first in range(0, tile_count, MANY):
            tile = first + tl.arange(0, MANY)
            extents = tl.load(table + tile * 3 + 2, mask=tile < tile_count, other=0)
            above = extents > i0
            rounded = extents // UNIT * UNIT
            count += tl.sum(above.to(tl.int32))
            odd = above & (rounded != extents) & (rounded < i0 + BLOCK_I)
            remainder += tl.sum(odd.to(tl.int32))
    else:
        count = tl.where(i0 < extent, tile_count, 0)
        rounded = extent // UNIT * UNIT
        remainder = ((rounded != extent) & (rounded < i0 + BLOCK_I)).to(tl.int32)
    part = tl.program_id(1)
    begin = tl.minimum(part * part_tiles, count)
    end = tl.minimum(begin + part_tiles, count)
    out += part.to(tl.int64) * part_stride
    sums_out += part.to(tl.int64) * sums_stride
    # Two copies of the loop: only few programs pay for the sums.
    if (column if BIAS == "left" else row_tile) == 0:
        _gradient_tile(
            left, right, out, sums_out, table, begin, end, remainder > 0, rows, extent, height, D,
            left_stride, right_stride, out_stride, i0, c0, BIAS, PRECISION, BLOCK_I, BLOCK_C,
            BLOCK_R,
        )  # fmt: skip
    else:
        _gradient_tile(
            left, right, out, sums_out, table, begin, end, remainder > 0, rows, extent, height, D,
            left_stride, right_stride, out_stride, i0, c0, "", PRECISION, BLOCK_I, BLOCK_C, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["height", "bound", "part_count"])
def add_parts(
    parts,
    bias,
    out,
    height,
    bound,
    part_count,
    D,
    part_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`out[m, n] = sum_p parts[p, m, n] + bias[n]`, zero in the rows from bound to height.

    parts float32 `[part_count, bound, D]`, each part adjacent; out `[height, D]`.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_in = (n < D)[None, :]
    inside = (m < bound)[:, None] & columns_in
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    here = parts + (m.to(tl.int64)[:, None] * D + n[None, :])
    for part in range(part_count):
        acc += tl.load(here + tl.cast(part, tl.int64) * part_stride, mask=inside, other=0.0)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    there = out + (m.to(tl.int64)[:, None] * out_stride + n[None, :])
    tl.store(there, acc.to(out.dtype.element_ty), mask=(m < height)[:, None] & columns_in)


# --- configurations -------------------------------------------------------------------------------

#: Of `product`, from large tiles to small: the first that makes `_FILL` programs is the choice
#: where none is measured. Shared memory is `stages * (BLOCK_M + BLOCK_N) * BLOCK_K` elements, at
#: most 96 KB.
CONFIGS: tuple[Config, ...] = (
    Config.of(warps=8, stages=3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
    Config.of(warps=4, stages=4, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
    Config.of(warps=4, stages=5, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
    Config.of(warps=4, stages=6, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64),
    Config.of(warps=2, stages=5, BLOCK_M=16, BLOCK_N=32, BLOCK_K=128),
)
#: To be measured, on cards with 160 KB or more: wider tiles read less, deeper ones wait less.
WIDE_CONFIGS: tuple[Config, ...] = (
    Config.of(warps=8, stages=4, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64),
    Config.of(warps=8, stages=4, BLOCK_M=256, BLOCK_N=128, BLOCK_K=64),
    Config.of(warps=8, stages=5, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
)
#: In float32: by tensor cores in tf32, or by ordinary multiply-adds, which need no wide tiles.
TF32_CONFIGS: tuple[Config, ...] = (
    Config.of(warps=8, stages=3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
    Config.of(warps=4, stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    Config.of(warps=4, stages=4, BLOCK_M=32, BLOCK_N=32, BLOCK_K=64),
)
IEEE_CONFIGS: tuple[Config, ...] = (
    Config.of(warps=8, stages=3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=16),
    Config.of(warps=8, stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    Config.of(warps=4, stages=3, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
)
#: The same of `weight_gradient`.
GRADIENT_CONFIGS: tuple[Config, ...] = (
    Config.of(warps=8, stages=3, BLOCK_I=128, BLOCK_C=128, BLOCK_R=64),
    Config.of(warps=4, stages=4, BLOCK_I=64, BLOCK_C=64, BLOCK_R=64),
)
WIDE_GRADIENT_CONFIGS: tuple[Config, ...] = (
    Config.of(warps=8, stages=4, BLOCK_I=128, BLOCK_C=128, BLOCK_R=64),
)
TF32_GRADIENT_CONFIGS: tuple[Config, ...] = (
    Config.of(warps=8, stages=3, BLOCK_I=128, BLOCK_C=64, BLOCK_R=32),
    Config.of(warps=4, stages=3, BLOCK_I=64, BLOCK_C=64, BLOCK_R=32),
)
IEEE_GRADIENT_CONFIGS: tuple[Config, ...] = (
    Config.of(warps=4, stages=3, BLOCK_I=64, BLOCK_C=64, BLOCK_R=16),
)
#: Of `slope` and `add_parts`, which only read and write.
ELEMENTWISE_CONFIGS: tuple[Config, ...] = (
    Config.of(warps=4, stages=1, BLOCK_M=8, BLOCK_N=256),
    Config.of(warps=4, stages=1, BLOCK_M=2, BLOCK_N=1024),
    Config.of(warps=8, stages=1, BLOCK_M=16, BLOCK_N=256),
)

#: Programs that fill a GPU: the multiprocessors of an H200.
_FILL = 132
#: A part of a sum has at least so many steps, and a sum at most so many parts: adding them is not
#: free.
_LEAST_STEPS, _MOST_PARTS = 4, 8


def _precision(dtype: torch.dtype) -> str:
    """Of float32 operands; others have one precision."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@functools.cache
def _has_room(device: torch.device) -> bool:
    """Whether the wide configurations fit: cards of data centres, not the 8.6 and 8.9 of others."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _ROOMY


_ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))


def _select(
    half: tuple[Config, ...],
    wide: tuple[Config, ...],
    tf32: tuple[Config, ...],
    ieee: tuple[Config, ...],
    x: Tensor,
    height: int,
    width: int,
) -> tuple[Config, ...]:
    """The configurations for a type and device, first the largest tile that fills a GPU."""
    if x.dtype == torch.float32:
        safe, wide = tf32 if _precision(x.dtype) == "tf32" else ieee, ()
    else:
        safe, wide = half, wide if _has_room(x.device) else ()

    def fills(config: Config) -> bool:
        sizes = [size for _, size in config.blocks]
        return triton.cdiv(height, sizes[0]) * triton.cdiv(width, sizes[1]) >= _FILL

    first = next((c for c in safe if fills(c)), safe[-1])
    return first, *(c for c in safe + wide if c is not first)


def _stages(config: Config, stairs: bool) -> Config:
    """With a table, the pipeline is shared between its loads and what is loaded where they say.

    Twice the stages less one give the same number of tiles in shared memory (seen in Triton 3.9).
    """
    return dataclasses.replace(config, stages=2 * config.stages - 1) if stairs else config


def _parts(programs: int, steps: int) -> int:
    """Into how many parts a sum of so many steps is cut when so many programs make one each."""
    return max(1, min(_FILL // programs, steps // _LEAST_STEPS, _MOST_PARTS))


# --- launches -------------------------------------------------------------------------------------


def _adjacent(x: Tensor) -> Tensor:
    """With the last dimension's elements next to each other; all else is by strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(
    name: str, key: tuple[Any, ...], configs: tuple[Config, ...], launch: Callable[[Config], None]
) -> None:
    launch(choose(name, key, configs, launch))


def _product(
    bound: str,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out: Tensor,
    pre: Tensor | None,
    extents: Sequence[int],
    rows: Sequence[int],
    activation: str = "",
    fill: bool = False,
) -> None:
    """Run `product` into out `[T, columns]`, in parts where tiles are few and the sum is long."""
    total, columns = out.shape
    if not total:
        return
    stairs, widest, hidden = len(extents) > 1, max(extents), b.shape[1]
    summed = hidden if bound == "n" else widest
    precision = _precision(a.dtype)

    def launch(config: Config) -> None:
        tiles = row_tiles(extents, rows, config["BLOCK_M"], a.device) if stairs else None
        count = triton.cdiv(total, config["BLOCK_M"]) if tiles is None else tiles.shape[0]
        programs = count * triton.cdiv(columns, config["BLOCK_N"])
        steps = triton.cdiv(summed, config["BLOCK_K"])
        parts = _parts(programs, steps) if bound == "k" else 1
        split = parts > 1
        target = out.new_empty(parts, total, columns, dtype=torch.float32) if split else out
        product[(programs, parts)](
            a, b, None if split else bias, target, pre, tiles, total, count, widest, columns,
            hidden, a.stride(0), b.stride(0), target.stride(-2),
            0 if pre is None else pre.stride(0), target.stride(0) if split else 0, bound,
            activation, fill, split, precision, **config.arguments,
        )  # fmt: skip
        if split:
            _add_parts(target, bias, out)

    configs = _select(CONFIGS, WIDE_CONFIGS, TF32_CONFIGS, IEEE_CONFIGS, a, total, columns)
    flags = (bound, stairs, bias is None, activation, pre is None, fill, precision)
    key = (a.dtype, bucket(total), bucket(columns), bucket(summed), *flags)
    _launch("product", key, configs, launch)


def _add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Add parts `[p, m, n]` into the first m rows of out `[>= m, n]`, zeros into the others."""
    count, bound, columns = parts.shape
    height = out.shape[0]

    def launch(config: Config) -> None:
        grid = triton.cdiv(height, config["BLOCK_M"]), triton.cdiv(columns, config["BLOCK_N"])
        add_parts[grid](
            parts, bias, out, height, bound, count, columns, parts.stride(0), out.stride(0),
            **config.arguments,
        )  # fmt: skip

    key = (out.dtype, bucket(height), bucket(columns), bias is None)
    _launch("add_parts", key, ELEMENTWISE_CONFIGS, launch)


def _slope(
    grad: Tensor, pre: Tensor, extents: Sequence[int], rows: Sequence[int], activation: str
) -> Tensor:
    """The gradient of the pre-activation `[T, max(extents)]`, unspecified beyond extents."""
    total, widest, stairs = grad.shape[0], max(extents), len(extents) > 1
    out = grad.new_empty(total, widest)
    if not total:
        return out

    def launch(config: Config) -> None:
        tiles = row_tiles(extents, rows, config["BLOCK_M"], grad.device) if stairs else None
        count = triton.cdiv(total, config["BLOCK_M"]) if tiles is None else tiles.shape[0]
        slope[(count, triton.cdiv(widest, config["BLOCK_N"]))](
            grad, pre, out, tiles, total, widest, grad.stride(0), pre.stride(0), out.stride(0),
            activation, **config.arguments,
        )  # fmt: skip

    key = (grad.dtype, bucket(total), bucket(widest), stairs, activation)
    _launch("slope", key, ELEMENTWISE_CONFIGS, launch)
    return out


def _weight_gradient(
    side: str,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The weight's gradient `[K, D]`, and the bias', sums of the "left" `[K]` or "right" `[D]`."""
    height, hidden = weight.shape
    out = weight.new_empty(height, hidden)
    sums = weight.new_empty(height if side == "left" else hidden)
    total, stairs, widest = left.shape[0], len(extents) > 1, max(extents)
    if not total:
        return out.zero_(), sums.zero_()
    precision = _precision(left.dtype)

    def launch(config: Config) -> None:
        table = row_tiles(extents, rows, config["BLOCK_R"], left.device) if stairs else None
        count = triton.cdiv(total, config["BLOCK_R"]) if table is None else table.shape[0]
        across = triton.cdiv(hidden, config["BLOCK_C"])
        parts = _parts(triton.cdiv(widest, config["BLOCK_I"]) * across, count)
        part_tiles = triton.cdiv(count, parts)
        target, target_sums, target_height = out, sums, height
        if parts > 1:
            target_height = widest
            target = out.new_empty(parts, widest, hidden, dtype=torch.float32)
            target_sums = target.new_empty(parts, widest if side == "left" else hidden)
        arguments = _stages(config, stairs).arguments
        programs = triton.cdiv(target_height, config["BLOCK_I"]) * across
        weight_gradient[(programs, parts)](
            left, right, target, target_sums, table, count, total, widest, target_height,
            part_tiles, hidden, left.stride(0), right.stride(0), target.stride(-2),
            target.stride(0) if parts > 1 else 0, target_sums.stride(0) if parts > 1 else 0, side,
            precision, **arguments,
        )  # fmt: skip
        if parts > 1:
            _add_parts(target, None, out)
            if side == "left":
                _add_parts(target_sums.unsqueeze(2), None, sums.unsqueeze(1))
            else:
                _add_parts(target_sums.unsqueeze(1), None, sums.unsqueeze(0))

    configs = _select(
        GRADIENT_CONFIGS,
        WIDE_GRADIENT_CONFIGS,
        TF32_GRADIENT_CONFIGS,
        IEEE_GRADIENT_CONFIGS,
        left,
        widest,
        hidden,
    )
    key = (left.dtype, bucket(total), bucket(widest), bucket(hidden), side, stairs, precision)
    _launch("weight_gradient", key, configs, launch)
    return out, sums


# --- ops ------------------------------------------------------------------------------------------


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """`activation(x @ weight[:k].T + bias[:k])` `[T, max(k)]`, and what was activated if asked for.

    x `[T, D]`, weight `[K, D]`, bias `[K]`; beyond a row's extent both results are unspecified.
    """
    x, weight, bias = _adjacent(x), _adjacent(weight), _adjacent(bias)
    out = x.new_empty(x.shape[0], max(extents))
    pre = torch.empty_like(out) if activation and keep_pre else None
    _product("n", x, weight, bias, out, pre, extents, rows, activation)
    return out, x.new_empty(0) if pre is None else pre


def expand_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    activation: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x `[T, D]`, weight `[K, D]` and bias `[K]` (empty where not needed).

    With `g = grad * activation'(pre)` `[T, k]`: `g @ weight[:k]`, `g.T @ x`, `g.sum(0)`.
    """
    x, weight = _adjacent(x), _adjacent(weight)
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_weight = grad_bias = x.new_empty(0)
    if need_x or need_weight:
        grad = _adjacent(grad)
        if activation:
            grad = _slope(grad, _adjacent(pre), extents, rows, activation)
    if need_x:
        _product("k", grad, weight, None, grad_x, None, extents, rows)
    if need_weight:
        grad_weight, grad_bias = _weight_gradient("left", weight, grad, x, extents, rows)
    return grad_x, grad_weight, grad_bias


def contract(
    x: Tensor, weight_t: Tensor, bias: Tensor, extents: Sequence[int], rows: Sequence[int]
) -> Tensor:
    """`x[:, :k] @ weight_t[:k] + bias` `[T, D]`; x `[T, >= k]`, weight_t `[K, D]`, bias `[D]`."""
    x, weight_t, bias = _adjacent(x), _adjacent(weight_t), _adjacent(bias)
    out = x.new_empty(x.shape[0], weight_t.shape[1])
    _product("k", x, weight_t, bias, out, None, extents, rows)
    return out


def contract_backward(
    grad: Tensor,
    x: Tensor,
    weight_t: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight_t `[K, D]` and bias `[D]` (empty where not needed).

    `grad @ weight_t[:k].T`, zero beyond a row's extent; `x[:, :k].T @ grad`; `grad.sum(0)`.
    """
    grad, x, weight_t = _adjacent(grad), _adjacent(x), _adjacent(weight_t)
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_weight = grad_bias = x.new_empty(0)
    if need_x:
        _product("n", grad, weight_t, None, grad_x, None, extents, rows, fill=True)
    if need_weight:
        grad_weight, grad_bias = _weight_gradient("right", weight_t, x, grad, extents, rows)
    return grad_x, grad_weight, grad_bias


# --- what is moved, computed and compiled ---------------------------------------------------------


def bytes_and_flops(
    op: str,
    extents: Sequence[int],
    rows: Sequence[int],
    D: int,
    K: int,
    size: int,
    activation: str = "",
    keep_pre: bool = False,
) -> tuple[int, int]:
    """Bytes that a call has to move at least, each tensor once, and its operations, two a product.

    Args:
        op: "expand", "expand_backward", "contract" or "contract_backward" (with all gradients).
        extents: Of each row block.
        rows: Of each row block.
        D: Hidden size.
        K: Rows of the weight, all of which its gradient writes.
        size: Bytes of an element.
        activation: Of expand.
        keep_pre: Whether expand saves what it activates.
    """
    total = sum(rows)
    inner = sum(k * count for k, count in zip(extents, rows, strict=True))
    widest = max((k for k, count in zip(extents, rows, strict=True) if count), default=0)
    read = widest * D  # of the weight
    if op == "expand":
        moved = total * D + read + widest + inner * (2 if activation and keep_pre else 1)
    elif op == "contract":
        moved = inner + read + D + total * D
    elif op == "expand_backward":
        moved = inner * (2 if activation else 1) + 2 * total * D + read + K * D + K
    else:
        moved = total * D + 2 * inner + read + K * D + D
    return moved * size, 2 * inner * D * (2 if op.endswith("backward") else 1)


#: Sizes of BERT-base's FFN, as constants: thus strides are known to be round, as in a call.
_D, _N = 768, 3072


def specimens() -> Iterator[Specimen]:
    """Every shipped configuration of every kernel, every type, and every branch at least once."""
    for kind in ("bf16", "fp16"):
        yield from _specimens(kind, "ieee", CONFIGS + WIDE_CONFIGS, _ALL_GRADIENTS)
    yield from _specimens("fp32", "tf32", TF32_CONFIGS, TF32_GRADIENT_CONFIGS)
    yield from _specimens("fp32", "ieee", IEEE_CONFIGS, IEEE_GRADIENT_CONFIGS)
    for kind in ("bf16", "fp16", "fp32"):
        yield from _elementwise(kind)


_ALL_GRADIENTS = GRADIENT_CONFIGS + WIDE_GRADIENT_CONFIGS
_STRIDES = {"a_stride": _D, "b_stride": _D, "out_stride": _N, "pre_stride": _N, "part_stride": _N}
#: Calls of `product`: what is bound, and what differs from the plainest.
_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "expand gelu saved": ("n", {"ACTIVATION": "gelu", "bias": 1, "pre": 1}),
    "contract stairs": ("k", {"bias": 1, "tiles": 1}),
    "contract_backward stairs": ("n", {"FILL": True, "tiles": 1}),
    "expand gelu_tanh": ("n", {"ACTIVATION": "gelu_tanh", "bias": 1}),
    "expand relu stairs": ("n", {"ACTIVATION": "relu", "bias": 1, "pre": 1, "tiles": 1}),
    "contract": ("k", {"bias": 1}),
    "contract split": ("k", {"SPLIT": True}),
}


def _specimens(
    kind: str, precision: str, products: Sequence[Config], gradients: Sequence[Config]
) -> Iterator[Specimen]:
    for number, config in enumerate(products):
        # The first and the widest in every way, the others in those that need most registers.
        whole = number == 0 or config is WIDE_CONFIGS[0]
        for name, (bound, special) in list(_CALLS.items())[: None if whole else 3]:
            chosen = {"ACTIVATION": "", "FILL": False, "SPLIT": False, **special}
            absent = {n: None for n in ("bias", "pre", "tiles") if n not in special}
            types = dict.fromkeys(("a", "b", "bias", "out", "pre"), f"*{kind}")
            types["tiles"] = "*i32"
            if chosen["SPLIT"]:
                types["out"] = "*fp32"
            constants = {n: v for n, v in chosen.items() if n.isupper()} | absent | _STRIDES
            constants |= {"BOUND": bound, "PRECISION": precision, "D": _D}
            yield _specimen(product, f"{kind} {precision} {name}", types, constants, config)
    for config in gradients:
        sides = (("left", True), ("right", False), ("left", False), ("right", True))
        for side, stairs in sides[: None if config is gradients[0] else 2]:
            types = dict.fromkeys(("left", "right", "out", "sums_out"), f"*{kind}")
            types["table"] = "*i32"
            constants = {"BIAS": side, "PRECISION": precision, "D": _D, "left_stride": _N}
            constants |= {"right_stride": _D, "out_stride": _D, "part_stride": 0}
            constants |= {"sums_stride": 0} | ({} if stairs else {"table": None})
            name = f"{kind} {precision} weight_gradient {side}{' stairs' if stairs else ''}"
            deep = _stages(config, stairs)
            yield _specimen(weight_gradient, name, types, constants, deep)


def _elementwise(kind: str) -> Iterator[Specimen]:
    for config in ELEMENTWISE_CONFIGS:
        strides = {"grad_stride": _N, "pre_stride": _N, "out_stride": _N}
        types = dict.fromkeys(("grad", "pre", "out"), f"*{kind}") | {"tiles": "*i32"}
        for activation in ("gelu", "gelu_tanh", "relu")[: None if config.warps == 8 else 1]:
            constants = {"ACTIVATION": activation} | strides
            constants |= {"tiles": None} if activation == "gelu" else {}
            yield _specimen(slope, f"{kind} slope {activation}", types, constants, config)
        types = {"parts": "*fp32", "bias": f"*{kind}", "out": f"*{kind}"}
        constants = {"D": _D, "out_stride": _D, "part_stride": _D}
        yield _specimen(add_parts, f"{kind} add_parts", types, constants, config)


def _specimen(
    kernel: Any, name: str, types: dict[str, str], constants: dict[str, Any], config: Config
) -> Specimen:
    """With the kernel's parameters in order: tensors by `types`, constants, else 32-bit ints."""
    constants = constants | dict(config.blocks)
    signature = {
        n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names
    }
    return Specimen(kernel, name, signature, constants, config)
