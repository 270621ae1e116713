"""Importance of heads and neurons: inner products of weights and their gradients, row by row.

Of a matrix W `[K, D]` with gradient G and an accumulator of E entries, which stand for K / E rows
each (a neuron is one row, a head of the output projection is d rows):

    into[e] += |sum over its rows k and columns j of W[k, j] * G[k, j]  (+ b[e] * gb[e])|

W and G are read once and nothing but the accumulator is written, where plain torch writes and reads
their product twice. One program owns an entry: no atomics, one order.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from dynabert_fast.kernels.common import Config, Specimen
from dynabert_fast.kernels.residual_norm import dense, specimen

# TILE: products that a program computes at a time, rows times columns. A neuron's row is short and
# its programs are many; heads are few, so that each asks for much at once.
CONFIGS = (
    Config.of(warps=4, TILE=1024),
    Config.of(warps=16, TILE=8192),
)
_COLUMNS = 1024


@triton.jit(do_not_specialize=["group"])
def _add(
    into,
    parameter,
    gradient,
    bias,  # None, and so its gradient: there is no such term
    bias_gradient,
    group,  # rows of an entry
    parameter_stride,
    gradient_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // BLOCK_D
    entry = tl.program_id(0)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, group, ROWS):
        place = first + tl.arange(0, ROWS)
        rows = (entry.to(tl.int64) * group + place)[:, None]
        for column in range(0, D, BLOCK_D):
            columns = (column + tl.arange(0, BLOCK_D))[None, :]
            inside = (place < group)[:, None] & (columns < D)
            w = tl.load(parameter + rows * parameter_stride + columns, mask=inside, other=0.0)
            g = tl.load(gradient + rows * gradient_stride + columns, mask=inside, other=0.0)
            total += w.to(tl.float32) * g.to(tl.float32)
    product = tl.sum(tl.sum(total, 1), 0)
    if bias is not None:
        b = tl.load(bias + entry).to(tl.float32)
        product += b * tl.load(bias_gradient + entry).to(tl.float32)
    before = tl.load(into + entry)
    tl.store(into + entry, before + tl.abs(product).to(before.dtype))


def add_importance(
    into: Tensor,
    parameter: Tensor,
    gradient: Tensor,
    bias: Tensor | None = None,
    bias_gradient: Tensor | None = None,
) -> None:
    """Add the magnitude of each entry's inner product to the accumulator, in place.

    Args:
        into: `[E]` float32 or float64, contiguous.
        parameter: `[K, D]`, K a multiple of E, fp32, bf16 or fp16.
        gradient: `[K, D]`.
        bias: `[E]`; its product with its gradient is part of the sum.
        bias_gradient: `[E]`.
    """
    entries, (rows, columns) = len(into), parameter.shape
    group = rows // entries
    parameter, gradient = dense(parameter, gradient)
    if bias is not None and bias_gradient is not None:
        bias, bias_gradient = dense(bias, bias_gradient)
    config = CONFIGS[group > 1]
    _add[(entries,)](
        into, parameter, gradient, bias, bias_gradient, group, parameter.stride(0),
        gradient.stride(0), columns, min(triton.next_power_of_2(columns), _COLUMNS),
        **config.arguments,
    )  # fmt: skip


def bytes_and_flops(rows: int, columns: int, entries: int, item: int) -> tuple[int, int]:
    """Bytes that a call moves at least (a float32 accumulator), and twice its multiply-adds."""
    return item * 2 * rows * columns + 2 * 4 * entries, 2 * rows * columns


def specimens() -> Iterator[Specimen]:
    """Neurons with a bias, heads without, and more columns than a program takes at a time."""
    for kind in ("bf16", "fp16", "fp32"):
        tensors = ("parameter", "gradient", "bias", "bias_gradient")
        types = dict.fromkeys(tensors, f"*{kind}") | {"into": "*fp32", "group": "i32"}
        for hidden in (768, 2048, 13):
            sizes: dict[str, object] = {"parameter_stride": hidden, "gradient_stride": hidden}
            sizes |= {"D": hidden, "BLOCK_D": min(triton.next_power_of_2(hidden), _COLUMNS)}
            name = f"{kind} importance D={hidden}"
            yield specimen(_add, f"{name} of neurons", types, sizes, CONFIGS[0])
            no_bias = sizes | {"bias": None, "bias_gradient": None}
            yield specimen(_add, f"{name} of heads", types, no_bias, CONFIGS[1])
