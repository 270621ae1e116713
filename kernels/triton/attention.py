"""Self-attention of packed sequences: `dropout(softmax(Q K^T / sqrt(d))) V` per head, and backward.

Q, K and V are read where the product before left them: row t of `qkv` holds q, k, v of head 0, then
of head 1, so what a head reads of a row is one piece of 3 * d numbers. Sequence b is the rows
`offsets[b]` to `offsets[b + 1]`; the lengths are on the device, the host knows only the longest.

A program takes one (sequence, head) and a tile of its queries or keys, and ends at once where the
sequence is shorter or, in the staircase, has fewer heads. Where one tile holds the longest sequence
the kernels are SHORT:

- forward: all keys are in the tile; one softmax, nothing is rescaled;
- backward: all queries are in the tile; whatever keys it meets get their whole dk and dv there and
  dq stays in registers: one kernel and 5 products.

Otherwise forward is the online softmax, and backward two kernels and 7 products: dq (which also
leaves delta = rowsum(dO * O)), then dk and dv. Nothing is added atomically, so results repeat.

For 16-bit types softmax is in base 2, log2(e) being part of the scale: `exp2` is one instruction,
fed by one multiply-add. For float32 that scale would be a rounding that backward cannot undo:
probabilities would be off by 2 to 3 times what the natural base costs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynabert_fast.kernels import common
from dynabert_fast.kernels.common import Config, Specimen

# A switch of sub-network or of the batch must not compile again.
_UNSPECIALISED = (
    "grad_stride qkv_stride out_stride grad_qkv_stride lse_stride "
    "tiles heads active threshold scale kept_scale"
).split()

_INTERPRETED = tl.constexpr(common.INTERPRETED)
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def _place(offsets, table, tiles, heads, active, STAIRCASE: tl.constexpr):
    """This program's tile, head, sequence; and what is known of the sequence.

    Returns:
        (tile, head, first token, length, first token counted in its block, active heads)
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % heads
    sequence = pid // tiles // heads
    start = tl.load(offsets + sequence).to(tl.int64)
    length = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
    row = start
    if STAIRCASE:
        row = start - tl.load(offsets + tl.load(table + 2 * sequence))
        active = tl.load(table + 2 * sequence + 1)
    return tile, head, start, length, row.to(tl.int32), active


@triton.jit
def _mask(rows, left, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a tile, what exists; columns are asked about only where d is not a power of two."""
    mask = (rows < left)[:, None]
    if HEAD_SIZE != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]
    return mask


@triton.jit
def _load(base, rows, stride, left, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[rows, BLOCK_D]` from base on, of which `left` rows exist; 0 elsewhere."""
    pointers = base + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(pointers, mask=_mask(rows, left, HEAD_SIZE, BLOCK_D), other=0.0)


@triton.jit
def _exp(x, WIDE: tl.constexpr):
    """`exp(x)`, or `2^x` of 16-bit types, for whose scores the scale includes log2(e)."""
    return tl.exp(x) if WIDE else tl.exp2(x)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """`a @ b + acc`, in float32; acc may be None."""
    if _INTERPRETED:  # where bfloat16 is kept as bits, and `tl.dot` would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _store(base, rows, stride, left, x, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = base + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    mask = _mask(rows, left, HEAD_SIZE, BLOCK_D)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


# --- forward --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _forward(
    qkv,
    out,
    lse,
    offsets,
    table,
    seed,
    qkv_stride,
    out_stride,
    lse_stride,
    tiles,
    heads,
    active,
    scale,
    threshold,
    kept_scale,
    UNIT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    STAIRCASE: tl.constexpr,
    SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries of one (sequence, head); scale is that of the scores."""
    qkv_stride *= UNIT
    out_stride *= UNIT
    tile, head, start, length, row, active = _place(offsets, table, tiles, heads, active, STAIRCASE)
    query = tile * BLOCK_M
    if (query >= length) | (head >= active):
        return
    rows = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    q_base = qkv + start * qkv_stride + head * (3 * HEAD_SIZE)
    k_base = q_base + HEAD_SIZE
    v_base = q_base + 2 * HEAD_SIZE
    start += query
    q_base += query.to(tl.int64) * qkv_stride
    left = length - query
    q = _load(q_base, rows, qkv_stride, left, HEAD_SIZE, BLOCK_D)
    WIDE: tl.constexpr = qkv.dtype.element_ty == tl.float32
    if not WIDE:
        scale *= _LOG2E
    if DROPOUT:
        seed = tl.load(seed)
        mask_row = (row + query + rows)[:, None]

    if SHORT:
        k = _load(k_base, keys, qkv_stride, length, HEAD_SIZE, BLOCK_D)
        v = _load(v_base, keys, qkv_stride, length, HEAD_SIZE, BLOCK_D)
        scores = _dot(q, tl.trans(k), None, PRECISION)
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
        most = tl.max(scores, 1) * scale
        p = _exp(scores * scale - most[:, None], WIDE)
        total = tl.sum(p, 1)
        if DROPOUT:
            column = head * 65536 + keys
            p = tl.where(common.keep_mask(seed, mask_row, column[None, :], threshold), p, 0.0)
        acc = _dot(p.to(v.dtype), v, None, PRECISION)
    else:
        most = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for key in range(0, length, BLOCK_N):
            skip = tl.cast(key, tl.int64) * qkv_stride
            k = _load(k_base + skip, keys, qkv_stride, length - key, HEAD_SIZE, BLOCK_D)
            scores = _dot(q, tl.trans(k), None, PRECISION)
            scores = tl.where((keys < length - key)[None, :], scores, float("-inf"))
            # Every tile has a key, so the maximum is finite from the first on.
            new = tl.maximum(most, tl.max(scores, 1) * scale)
            shrink = _exp(most - new, WIDE)
            p = _exp(scores * scale - new[:, None], WIDE)
            total = total * shrink + tl.sum(p, 1)
            if DROPOUT:
                column = head * 65536 + key + keys
                p = tl.where(common.keep_mask(seed, mask_row, column[None, :], threshold), p, 0.0)
            v = _load(v_base + skip, keys, qkv_stride, length - key, HEAD_SIZE, BLOCK_D)
            acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
            most = new

    factor = 1.0 / total
    if DROPOUT:
        factor *= kept_scale
    out_base = out + start * out_stride + head * HEAD_SIZE
    _store(out_base, rows, out_stride, left, acc * factor[:, None], HEAD_SIZE, BLOCK_D)
    lse_base = lse + start * lse_stride + head
    norm = most + tl.log(total) if WIDE else (most + tl.log2(total)) * _LN2
    tl.store(lse_base + rows * lse_stride, norm, mask=rows < left)


# --- backward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_queries(
    grad,
    qkv,
    out,
    lse,
    delta,
    grad_qkv,
    offsets,
    table,
    seed,
    grad_stride,
    qkv_stride,
    out_stride,
    grad_qkv_stride,
    lse_stride,
    tiles,
    heads,
    active,
    scale,
    threshold,
    kept_scale,
    UNIT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    STAIRCASE: tl.constexpr,
    SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The dq and delta of one tile of queries of one (sequence, head).

    `dS = P * (dP - delta)` with `dP = dO V^T`; `dq = scale * dS K`. delta lies as lse does. SHORT:
    all queries are here, so dk and dv too; delta is not needed again and not stored.
    """
    grad_stride *= UNIT
    qkv_stride *= UNIT
    out_stride *= UNIT
    grad_qkv_stride *= UNIT
    tile, head, start, length, row, active = _place(offsets, table, tiles, heads, active, STAIRCASE)
    query = tile * BLOCK_M
    if query >= length:
        return
    rows = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    k_base = qkv + start * qkv_stride + head * (3 * HEAD_SIZE) + HEAD_SIZE
    v_base = k_base + HEAD_SIZE
    start += query
    left = length - query
    dq_base = grad_qkv + start * grad_qkv_stride + head * (3 * HEAD_SIZE)
    if head >= active:
        zero = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        _store(dq_base, rows, grad_qkv_stride, left, zero, HEAD_SIZE, BLOCK_D)
        if SHORT:
            _store(dq_base + HEAD_SIZE, rows, grad_qkv_stride, left, zero, HEAD_SIZE, BLOCK_D)
            _store(dq_base + 2 * HEAD_SIZE, rows, grad_qkv_stride, left, zero, HEAD_SIZE, BLOCK_D)
        return

    q_base = qkv + start * qkv_stride + head * (3 * HEAD_SIZE)
    q = _load(q_base, rows, qkv_stride, left, HEAD_SIZE, BLOCK_D)
    do_base = grad + start * grad_stride + head * HEAD_SIZE
    do = _load(do_base, rows, grad_stride, left, HEAD_SIZE, BLOCK_D)
    o_base = out + start * out_stride + head * HEAD_SIZE
    o = _load(o_base, rows, out_stride, left, HEAD_SIZE, BLOCK_D)
    d = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    row_base = start * lse_stride + head
    if not SHORT:
        tl.store(delta + row_base + rows * lse_stride, d, mask=rows < left)
    # Infinite where there is no query: its probabilities are 0.
    norm = tl.load(lse + row_base + rows * lse_stride, mask=rows < left, other=float("inf"))
    base_scale = scale
    WIDE: tl.constexpr = qkv.dtype.element_ty == tl.float32
    if not WIDE:
        base_scale *= _LOG2E
        norm *= _LOG2E
    if DROPOUT:
        seed = tl.load(seed)
        mask_row = (row + query + rows)[:, None]

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stop = length
    if SHORT and BLOCK_N >= BLOCK_M:
        stop = BLOCK_N
    for key in range(0, stop, BLOCK_N):
        skip = tl.cast(key, tl.int64) * qkv_stride
        k = _load(k_base + skip, keys, qkv_stride, length - key, HEAD_SIZE, BLOCK_D)
        v = _load(v_base + skip, keys, qkv_stride, length - key, HEAD_SIZE, BLOCK_D)
        scores = _dot(q, tl.trans(k), None, PRECISION)
        p = _exp(scores * base_scale - norm[:, None], WIDE)
        p = tl.where((keys < length - key)[None, :], p, 0.0)
        dp = _dot(do, tl.trans(v), None, PRECISION)
        dropped = p
        if DROPOUT:
            column = head * 65536 + key + keys
            keep = common.keep_mask(seed, mask_row, column[None, :], threshold)
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        ds = (p * (dp - d[:, None])).to(k.dtype)
        if SHORT:
            to_dk = dq_base + HEAD_SIZE + tl.cast(key, tl.int64) * grad_qkv_stride
            dv = _dot(tl.trans(dropped.to(do.dtype)), do, None, PRECISION)
            if DROPOUT:
                dv *= kept_scale
            to_dv = to_dk + HEAD_SIZE
            _store(to_dv, keys, grad_qkv_stride, length - key, dv, HEAD_SIZE, BLOCK_D)
            dk = _dot(tl.trans(ds), q, None, PRECISION) * scale
            _store(to_dk, keys, grad_qkv_stride, length - key, dk, HEAD_SIZE, BLOCK_D)
        dq = _dot(ds, k, dq, PRECISION)
    _store(dq_base, rows, grad_qkv_stride, left, dq * scale, HEAD_SIZE, BLOCK_D)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_keys(
    grad,
    qkv,
    lse,
    delta,
    grad_qkv,
    offsets,
    table,
    seed,
    grad_stride,
    qkv_stride,
    grad_qkv_stride,
    lse_stride,
    tiles,
    heads,
    active,
    scale,
    threshold,
    kept_scale,
    UNIT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    STAIRCASE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The dk and dv of one tile of keys of one (sequence, head).

    `dv = (dropped P)^T dO`, `dk = scale * dS^T Q`. Scores are computed transposed, `[keys,
    queries]`: so P and dS are left operands as they lie in registers.
    """
    grad_stride *= UNIT
    qkv_stride *= UNIT
    grad_qkv_stride *= UNIT
    tile, head, start, length, row, active = _place(offsets, table, tiles, heads, active, STAIRCASE)
    key = tile * BLOCK_N
    if key >= length:
        return
    rows = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    left = length - key
    column = head * (3 * HEAD_SIZE)
    dq_base = grad_qkv + start * grad_qkv_stride + column
    dk_base = dq_base + key.to(tl.int64) * grad_qkv_stride + HEAD_SIZE
    dv_base = dk_base + HEAD_SIZE
    if head >= active:
        zero = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        _store(dk_base, keys, grad_qkv_stride, left, zero, HEAD_SIZE, BLOCK_D)
        _store(dv_base, keys, grad_qkv_stride, left, zero, HEAD_SIZE, BLOCK_D)
        return

    q_base = qkv + start * qkv_stride + column
    k_base = q_base + key.to(tl.int64) * qkv_stride + HEAD_SIZE
    k = _load(k_base, keys, qkv_stride, left, HEAD_SIZE, BLOCK_D)
    v = _load(k_base + HEAD_SIZE, keys, qkv_stride, left, HEAD_SIZE, BLOCK_D)
    if DROPOUT:
        seed = tl.load(seed)
        mask_column = (head * 65536 + key + keys)[:, None]

    base_scale = scale
    WIDE: tl.constexpr = qkv.dtype.element_ty == tl.float32
    if not WIDE:
        base_scale *= _LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for query in range(0, length, BLOCK_M):
        token = start + query
        here = length - query
        q_skip = tl.cast(query, tl.int64) * qkv_stride
        q = _load(q_base + q_skip, rows, qkv_stride, here, HEAD_SIZE, BLOCK_D)
        do_base = grad + token * grad_stride + head * HEAD_SIZE
        do = _load(do_base, rows, grad_stride, here, HEAD_SIZE, BLOCK_D)
        at = token * lse_stride + head + rows * lse_stride
        norm = tl.load(lse + at, mask=rows < here, other=float("inf"))
        if not WIDE:
            norm *= _LOG2E
        d = tl.load(delta + at, mask=rows < here, other=0.0)
        scores = _dot(k, tl.trans(q), None, PRECISION)
        p = _exp(scores * base_scale - norm[None, :], WIDE)
        dp = _dot(v, tl.trans(do), None, PRECISION)
        dropped = p
        if DROPOUT:
            mask_row = (row + query + rows)[None, :]
            keep = common.keep_mask(seed, mask_row, mask_column, threshold)
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        dv = _dot(dropped.to(do.dtype), do, dv, PRECISION)
        ds = (p * (dp - d[None, :])).to(q.dtype)
        dk = _dot(ds, q, dk, PRECISION)
    if DROPOUT:
        dv *= kept_scale
    _store(dk_base, keys, grad_qkv_stride, left, dk * scale, HEAD_SIZE, BLOCK_D)
    _store(dv_base, keys, grad_qkv_stride, left, dv, HEAD_SIZE, BLOCK_D)


# --- configurations -------------------------------------------------------------------------------


def _configs(*sizes: tuple[int, int, int, int]) -> tuple[Config, ...]:
    """From (queries, keys, warps, stages)."""
    return tuple(Config.of(w, s, BLOCK_M=m, BLOCK_N=n) for m, n, w, s in sizes)


#: By kernel, type (`_kind`) and head size (64 serves the smaller ones too). The first is used where
#: none is measured, the last where strides are not round.
CONFIGS: dict[str, dict[tuple[str, int], tuple[Config, ...]]] = {
    "attention_short": {
        ("half", 64): _configs(
            (64, 128, 4, 1),
            (128, 128, 8, 1),
            (32, 128, 4, 1),
            (64, 64, 4, 1),
            (32, 64, 4, 1),
            (16, 64, 2, 1),
            (32, 32, 2, 1),
            (16, 16, 1, 1),
        ),
        ("half", 128): _configs(
            (64, 128, 8, 1),
            (32, 128, 4, 1),
            (64, 64, 4, 1),
            (32, 64, 4, 1),
            (32, 32, 2, 1),
            (16, 16, 1, 1),
        ),
        ("half", 256): _configs((64, 64, 8, 1), (32, 32, 4, 1), (16, 16, 2, 1)),
        ("tf32", 64): _configs((32, 128, 4, 1), (64, 64, 4, 1), (32, 32, 2, 1), (16, 16, 1, 1)),
        ("tf32", 128): _configs((64, 64, 8, 1), (32, 32, 4, 1), (16, 16, 2, 1)),
        ("tf32", 256): _configs((16, 16, 4, 1)),
        ("ieee", 64): _configs((64, 64, 8, 1), (32, 32, 4, 1), (16, 16, 2, 1)),
        ("ieee", 128): _configs((32, 32, 8, 1), (16, 16, 4, 1)),
        ("ieee", 256): _configs((16, 16, 4, 1)),
    },
    "attention": {
        ("half", 64): _configs(
            (128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2), (64, 32, 4, 3), (32, 32, 4, 2)
        ),
        ("half", 128): _configs((64, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2)),
        ("half", 256): _configs((64, 32, 8, 2), (16, 16, 4, 2)),
        ("tf32", 64): _configs((64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        ("tf32", 128): _configs((64, 32, 8, 2), (32, 32, 4, 2), (16, 16, 4, 2)),
        ("tf32", 256): _configs((32, 16, 8, 2)),
        ("ieee", 64): _configs((64, 32, 8, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
        ("ieee", 128): _configs((32, 16, 4, 2), (16, 16, 4, 2)),
        ("ieee", 256): _configs((32, 16, 8, 2)),
    },
    "attention_backward_short": {
        ("half", 64): _configs(
            (128, 64, 8, 2),
            (128, 32, 8, 1),
            (64, 64, 4, 1),
            (64, 64, 8, 1),
            (32, 32, 2, 1),
            (16, 16, 1, 1),
        ),
        ("half", 128): _configs((64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1), (16, 16, 2, 1)),
        ("half", 256): _configs((32, 32, 8, 1), (16, 16, 4, 1)),
        ("tf32", 64): _configs((64, 32, 8, 1), (32, 32, 4, 1), (16, 16, 1, 1)),
        ("tf32", 128): _configs((32, 32, 8, 1), (16, 16, 4, 1)),
        ("tf32", 256): _configs(),
        ("ieee", 64): _configs((64, 16, 8, 1), (32, 32, 4, 1), (16, 16, 2, 1)),
        ("ieee", 128): _configs((32, 16, 8, 2), (16, 16, 8, 1)),
        ("ieee", 256): _configs(),
    },
    "attention_backward_queries": {
        ("half", 64): _configs((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        ("half", 128): _configs((64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        ("half", 256): _configs((32, 32, 4, 2), (16, 16, 4, 2)),
        ("tf32", 64): _configs((64, 32, 8, 2), (32, 32, 4, 2)),
        ("tf32", 128): _configs((32, 32, 8, 1)),
        ("tf32", 256): _configs((16, 16, 4, 2)),
        ("ieee", 64): _configs((32, 32, 8, 2), (32, 16, 4, 2)),
        ("ieee", 128): _configs((32, 16, 8, 2), (16, 16, 8, 2)),
        ("ieee", 256): _configs((16, 16, 8, 2)),
    },
    "attention_backward_keys": {
        ("half", 64): _configs((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        ("half", 128): _configs((32, 64, 8, 2), (32, 32, 4, 2), (16, 16, 4, 1)),
        ("half", 256): _configs((32, 32, 8, 2), (16, 16, 4, 1)),
        ("tf32", 64): _configs((32, 64, 8, 2), (32, 32, 4, 2)),
        ("tf32", 128): _configs((16, 32, 8, 1)),
        ("tf32", 256): _configs((16, 16, 8, 1)),
        ("ieee", 64): _configs((32, 32, 8, 2), (16, 32, 4, 2)),
        ("ieee", 128): _configs((32, 32, 8, 1), (16, 16, 4, 1)),
        ("ieee", 256): _configs((16, 16, 8, 1)),
    },
}
#: The kernel, and the side of its tile that the grid counts.
_KERNELS = {
    "attention_short": (_forward, "BLOCK_M"),
    "attention": (_forward, "BLOCK_M"),
    "attention_backward_short": (_backward_queries, "BLOCK_M"),
    "attention_backward_queries": (_backward_queries, "BLOCK_M"),
    "attention_backward_keys": (_backward_keys, "BLOCK_N"),
}
#: The side of the tile that holds a whole sequence in a SHORT kernel.
_WHOLE = {"attention_short": "BLOCK_N", "attention_backward_short": "BLOCK_M"}
#: Programs that keep a large card busy; where there would be fewer, tiles are smaller.
_FILL = 128
#: Strides are passed in units of so many numbers where they can be: so a load may take 16 bytes.
_UNIT = 8


def _kind(dtype: torch.dtype) -> str:
    """What configurations depend on; of float32, the way in which it is multiplied."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _block_d(head_size: int) -> int:
    """At least what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(head_size))


def _candidates(
    name: str, kind: str, head_size: int, max_length: int, unit: int
) -> tuple[Config, ...]:
    """Configurations; of a SHORT kernel the smallest that hold a sequence, none if none does.

    Strides that are not round take a register for each number's address: such calls, which no
    common model makes, get the smallest tiles, and no SHORT kernel.
    """
    configs = CONFIGS[name][kind, max(64, _block_d(head_size))]
    side = _WHOLE.get(name)
    if side is None:
        return configs if unit > 1 else configs[-1:]
    if unit == 1:
        return ()
    least = min((c[side] for c in configs if c[side] >= max_length), default=0)
    return tuple(c for c in configs if c[side] == least)


def _constants(
    name: str, head_size: int, kind: str, dropout: bool, staircase: bool, unit: int
) -> dict[str, Any]:
    constants = {
        "UNIT": unit,
        "HEAD_SIZE": head_size,
        "BLOCK_D": _block_d(head_size),
        "DROPOUT": dropout,
        "STAIRCASE": staircase,
        "SHORT": name in _WHOLE,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
    }
    return {n: value for n, value in constants.items() if n in _KERNELS[name][0].arg_names}


# --- launches -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _sequence_table(
    heads: tuple[int, ...], sequences: tuple[int, ...], device: torch.device, stream: int
) -> Tensor:
    """`[B, 2]` int32: the first sequence of each sequence's block, and its heads."""
    rows, start = [], 0
    for h, count in zip(heads, sequences, strict=True):
        rows += [(start, h)] * count
        start += count
    return common.table(rows, 2, device)


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        offsets: Tensor,
        max_length: int,
        heads: Sequence[int],
        sequences: Sequence[int],
        head_size: int,
        p: float,
        seed: Tensor | None,
    ) -> None:
        dtype, staircase, dropout = tensors[0].dtype, len(heads) > 1, seed is not None
        round_strides = all(x.stride(0) % _UNIT == 0 for x in tensors)
        self.unit = _UNIT if round_strides else 1
        self.count, self.max_length, self.head_size = offsets.shape[0] - 1, max_length, head_size
        self.kind, self.flags = _kind(dtype), (dropout, staircase)
        self.key = (common.type_name(dtype), self.kind, head_size, common.bucket(max_length))
        table = None
        if staircase:
            stream = common.stream_of(offsets.device)
            table = _sequence_table(tuple(heads), tuple(sequences), offsets.device, stream)
        self.places = (offsets.contiguous(), table, seed)
        p = p if dropout else 0.0
        self.numbers = (max(heads), head_size**-0.5, round(p * 2**32), 1 / (1 - p))

    def candidates(self, name: str) -> tuple[Config, ...]:
        return _candidates(name, self.kind, self.head_size, self.max_length, self.unit)

    def run(
        self,
        name: str,
        heads: int,
        tensors: Sequence[Tensor | None],
        strided: Sequence[Tensor],
        lse: Tensor,
    ) -> None:
        """Launch a kernel; `strided` are those whose row strides it takes before that of lse."""
        kernel, side = _KERNELS[name]
        strides = [x.stride(0) // self.unit for x in strided]
        constants = _constants(name, self.head_size, self.kind, *self.flags, self.unit)
        rows = heads * self.count

        def tiles(config: Config) -> int:
            return triton.cdiv(self.max_length, config[side])

        def launch(config: Config) -> None:
            kernel[(tiles(config) * rows,)](
                *tensors,
                *self.places,
                *strides,
                lse.stride(0),
                tiles(config),
                heads,
                *self.numbers,
                **constants,
                **config.arguments,
            )

        configs = sorted(self.candidates(name), key=lambda c: -min(tiles(c) * rows, _FILL))
        launch(common.choose(name, (*self.key, common.bucket(rows), *self.flags), configs, launch))


def attention(
    qkv: Tensor,
    offsets: Tensor,
    max_length: int,
    heads: Sequence[int],
    sequences: Sequence[int],
    head_size: int,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention `[T, H * d]` and the log-sum-exp of each row `[T, H]`, float32; H is max(heads)."""
    total, most = qkv.shape[0], max(heads)
    out = qkv.new_empty(total, most * head_size)
    lse = qkv.new_empty(total, most, dtype=torch.float32)
    if total == 0:
        return out, lse
    qkv = _adjacent(qkv)
    call = _Call((qkv, out), offsets, max_length, heads, sequences, head_size, p, seed)
    name = "attention_short" if call.candidates("attention_short") else "attention"
    call.run(name, most, (qkv, out, lse), (qkv, out), lse)
    return out, lse


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    max_length: int,
    heads: Sequence[int],
    sequences: Sequence[int],
    head_size: int,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """Gradient of qkv, in its shape; zero beyond a row's heads."""
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.shape[0] == 0:
        return grad_qkv
    stored = qkv.shape[1] // (3 * head_size)
    grad_qkv[:, stored * 3 * head_size :] = 0
    grad, qkv, out, lse = _adjacent(grad), _adjacent(qkv), _adjacent(out), lse.contiguous()
    strided = (grad, qkv, out, grad_qkv)
    call = _Call(strided, offsets, max_length, heads, sequences, head_size, p, seed)
    if call.candidates("attention_backward_short"):
        tensors = (grad, qkv, out, lse, None, grad_qkv)
        call.run("attention_backward_short", stored, tensors, strided, lse)
        return grad_qkv
    delta = torch.empty_like(lse)
    tensors = (grad, qkv, out, lse, delta, grad_qkv)
    call.run("attention_backward_queries", stored, tensors, strided, lse)
    tensors = (grad, qkv, lse, delta, grad_qkv)
    call.run("attention_backward_keys", stored, tensors, (grad, qkv, grad_qkv), lse)
    return grad_qkv


# --- what is known without running ----------------------------------------------------------------


def bytes_and_flops(
    lengths: Sequence[int],
    heads: Sequence[int],
    sequences: Sequence[int],
    head_size: int,
    itemsize: int,
    backward: bool = False,
) -> tuple[int, int]:
    """Bytes that must be moved once, and FLOPs (a multiply-add is two), of sequences of `lengths`.

    Forward reads q, k, v and writes the output and lse: 2 products. Backward also reads the output
    and its gradient, and writes three gradients: 5 products. The zeros beyond a row's heads are not
    counted.
    """
    rows = pairs = start = 0
    for h, count in zip(heads, sequences, strict=True):
        own = lengths[start : start + count]
        rows += h * sum(own)
        pairs += h * sum(length * length for length in own)
        start += count
    moved = 8 if backward else 4
    products = 5 if backward else 2
    return rows * (moved * head_size * itemsize + 4), products * 2 * pairs * head_size


def specimens() -> Iterator[Specimen]:
    """Every configuration with dropout in the staircase, its largest form; the first without too.

    A head size of 80 stands for those that are no power of two; with strides that are not round it
    meets the last configuration of the kernels that take such.
    """
    for name, by_kind in CONFIGS.items():
        for (kind, block_d), configs in by_kind.items():
            dtype = "bf16" if kind == "half" else "fp32"
            for config in configs:
                yield _specimen(name, dtype, kind, block_d, config, True, True, _UNIT)
            if block_d == 64:
                yield _specimen(name, dtype, kind, 64, configs[0], False, False, _UNIT)
            if block_d == 128 and configs:
                yield _specimen(name, dtype, kind, 80, configs[0], True, False, _UNIT)
            if block_d == 128 and name not in _WHOLE:
                yield _specimen(name, dtype, kind, 80, configs[-1], True, False, 1)
        yield _specimen(name, "fp16", "half", 64, by_kind["half", 64][0], True, True, _UNIT)


def _specimen(
    name: str,
    dtype: str,
    kind: str,
    head_size: int,
    config: Config,
    dropout: bool,
    staircase: bool,
    unit: int,
) -> Specimen:
    kernel = _KERNELS[name][0]
    constants = _constants(name, head_size, kind, dropout, staircase, unit) | dict(config.blocks)
    absent = {"table": not staircase, "seed": not dropout, "delta": name in _WHOLE}
    constants |= {n: None for n, missing in absent.items() if missing and n in kernel.arg_names}
    types = dict.fromkeys(("grad", "qkv", "out", "grad_qkv"), f"*{dtype}")
    types |= {"lse": "*fp32", "delta": "*fp32", "table": "*i32", "seed": "*i64"}
    types |= {"offsets": "*i32" if unit > 1 else "*i64", "scale": "fp32", "kept_scale": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    flags = " dropout" * dropout + " staircase" * staircase + " any stride" * (unit == 1)
    label = f"{dtype if kind == 'half' else kind} {name} d={head_size}{flags}"
    return Specimen(kernel, label, signature, constants, config)
