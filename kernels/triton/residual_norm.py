"""`LayerNorm(dropout(x) + residual)` and its backward, whole rows in registers.

Forward, of z = dropout(x) + residual, rounded to the storage type before it is normalised:

    mean = sum(z) / D;  rstd = (sum((z - mean)^2) / D + eps)^-1/2
    y = (z - mean) * rstd * weight + bias

Backward, with n = (z - mean) * rstd and g = grad * weight:

    grad_z = rstd * (g - sum(g) / D - n * sum(g * n) / D);  grad_x = dropout(grad_z)
    grad_weight = sum over rows of grad * n;  grad_bias = sum over rows of grad

Each value is read once and written once; dropout's mask is computed again in the backward. The sums
over rows are taken by a number of programs that follows from T alone, and their partial sums in a
fixed order: with one configuration, the bits are the same on every card.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynabert_fast.kernels.common import Config, Specimen, bucket, choose, keep_mask, type_name

# TILE: values in a program's tile, rows times D rounded up to a power of two. A thread of the first
# ones holds 8 or 16: one or two 16-byte accesses of bf16. Of those, a call takes what holds a row.
CONFIGS = (
    Config.of(warps=4, TILE=1024),
    Config.of(warps=8, TILE=2048),
    Config.of(warps=8, TILE=4096),
    Config.of(warps=16, TILE=8192),
    Config.of(warps=1, TILE=1024),
    Config.of(warps=4, TILE=2048),
)
# A tile is all that a program has in flight, unless AHEAD asks for tiles that are copied to shared
# memory while it computes: 33 KB in the last one, in float32.
BACKWARD_CONFIGS = (
    Config.of(warps=4, TILE=2048, AHEAD=1),
    Config.of(warps=8, TILE=4096, AHEAD=1),
    Config.of(warps=16, TILE=8192, AHEAD=1),
    Config.of(warps=8, TILE=2048, AHEAD=1),
    Config.of(warps=4, TILE=1024, AHEAD=3),
    Config.of(warps=8, TILE=2048, AHEAD=3),
)
# Partial sums of weight's gradient are [programs, 2, D] float32, written and read again: with 16
# rows or more to each, at most a sixth of the memory traffic in bf16, and it stays in the L2 cache.
# 132 processors hold 512 programs of 128 threads at once.
_ROWS_EACH, _PROGRAMS = 16, 512
_REDUCE = Config.of(warps=4, BLOCK_P=32, BLOCK_C=64)


@triton.jit
def normalise(z, inside, columns, weight, bias, eps, D: tl.constexpr):
    """LayerNorm of rows z `[ROWS, BLOCK_D]`, float32, 0 where not inside; also mean and 1/std."""
    mean = tl.sum(z, 1) * (1.0 / D)
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / D) + eps)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    return centred * rstd[:, None] * w[None, :] + b[None, :], mean, rstd


@triton.jit
def dropout(x, seed, rows, columns, threshold, scale):
    """`x * keep * scale`, scale being 1 / (1 - p)."""
    keep = keep_mask(tl.load(seed), rows[:, None], columns[None, :], threshold)
    return tl.where(keep, x * scale, 0.0)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def _forward(
    x,
    residual,
    weight,
    bias,
    y,
    z,
    mean,
    rstd,
    seed,  # None: no dropout
    tokens,
    x_stride,
    residual_stride,
    eps,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // BLOCK_D
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < tokens)[:, None] & (columns < D)[None, :]
    value = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    added = tl.load(
        residual + rows[:, None] * residual_stride + columns[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    if seed is not None:
        value = dropout(value, seed, rows, columns, threshold, scale)
    rounded = (value + added).to(z.dtype.element_ty)
    out, row_mean, row_rstd = normalise(
        rounded.to(tl.float32), inside, columns, weight, bias, eps, D
    )
    at = rows[:, None] * D + columns[None, :]
    tl.store(z + at, rounded, mask=inside)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + rows, row_mean, mask=rows < tokens)
    tl.store(rstd + rows, row_rstd, mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def _backward(
    grad,
    z,
    mean,
    rstd,
    weight,
    grad_z,
    grad_x,  # None: not wanted
    partial,
    seed,  # None: no dropout
    tokens,
    grad_stride,
    z_stride,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Dropout is that of z's term (of grad_x) where grad_x is wanted, else that of the result."""
    ROWS: tl.constexpr = TILE // BLOCK_D
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in tl.range(program, tl.cdiv(tokens, ROWS), programs, num_stages=AHEAD):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        real = rows < tokens
        inside = real[:, None] & (columns < D)[None, :]
        g = tl.load(
            grad + rows[:, None] * grad_stride + columns[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        value = tl.load(z + rows[:, None] * z_stride + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        row_mean = tl.load(mean + rows, mask=real, other=0.0)
        row_rstd = tl.load(rstd + rows, mask=real, other=0.0)
        if seed is not None and grad_x is None:
            g = dropout(g, seed, rows, columns, threshold, scale)
        # Beyond D, g is 0 and n is not: n counts only in products with g, or is not stored.
        n = (value - row_mean[:, None]) * row_rstd[:, None]
        weight_sum += g * n
        bias_sum += g
        g *= w[None, :]
        # Joined, both sums go through one exchange between the warps.
        level, along = tl.split(tl.sum(tl.join(g, g * n), 1) * (1.0 / D))
        out = row_rstd[:, None] * (g - level[:, None] - n * along[:, None])
        at = rows[:, None] * D + columns[None, :]
        tl.store(grad_z + at, out.to(grad_z.dtype.element_ty), mask=inside)
        if grad_x is not None:
            dropped = dropout(out, seed, rows, columns, threshold, scale)
            tl.store(grad_x + at, dropped.to(grad_x.dtype.element_ty), mask=inside)
    at = partial + program.to(tl.int64) * 2 * D + columns
    tl.store(at, tl.sum(weight_sum, 0), mask=columns < D)
    tl.store(at + D, tl.sum(bias_sum, 0), mask=columns < D)


@triton.jit(do_not_specialize=["programs"])
def _reduce(
    partial,
    grad_weight,
    grad_bias,
    programs,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Column sums of partial `[programs, 2, D]`."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    bias_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, programs, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        inside = (rows < programs)[:, None] & (columns < D)[None, :]
        at = partial + rows[:, None].to(tl.int64) * 2 * D + columns[None, :]
        weight_sum += tl.load(at, mask=inside, other=0.0)
        bias_sum += tl.load(at + D, mask=inside, other=0.0)
    w, b = tl.sum(weight_sum, 0), tl.sum(bias_sum, 0)
    tl.store(grad_weight + columns, w.to(grad_weight.dtype.element_ty), mask=columns < D)
    tl.store(grad_bias + columns, b.to(grad_bias.dtype.element_ty), mask=columns < D)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`LayerNorm(z)` of `z = dropout(x) + residual`; also z and the rows' mean and 1/std.

    Args:
        x: `[T, D]`, fp32, bf16 or fp16, as are the other three.
        residual: `[T, D]`.
        weight: `[D]`.
        bias: `[D]`.
        eps: Added to the variance.
        p: Dropout of x.
        seed: int64 scalar on the device; `None` for no dropout.

    Returns:
        y and z `[T, D]`, mean and 1/std `[T, 1]` float32.
    """
    tokens, hidden = x.shape
    x, residual, weight, bias = dense(x, residual, weight, bias)
    y, z, mean, rstd = outputs(x, tokens, hidden)
    block = triton.next_power_of_2(hidden)

    def launch(config: Config) -> None:
        _forward[(triton.cdiv(tokens, config["TILE"] // block),)](
            x, residual, weight, bias, y, z, mean, rstd, seed, tokens, x.stride(0),
            residual.stride(0), eps, *dropout_arguments(p), hidden, block, **config.arguments,
        )  # fmt: skip

    if tokens:
        key = (type_name(x.dtype), hidden, bucket(tokens), seed is not None)
        launch(choose("residual_norm", key, fitting(CONFIGS, block), launch))
    return y, z, mean, rstd


def residual_norm_backward(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual (both `[T, D]`), weight and bias (both `[D]`).

    That of x is empty without dropout: it is the residual's.
    """
    grad_x = z.new_empty(0 if seed is None else z.shape)
    grads = norm_backward("residual_norm_backward", grad, z, mean, rstd, weight, p, seed, grad_x)
    return grad_x, *grads


def norm_backward(
    name: str,
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
    grad_x: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm's gradients: of z `[T, D]`, weight and bias `[D]`.

    Dropout is of x, whose gradient is written to grad_x, or where that is `None` of the result.
    """
    tokens, hidden = z.shape
    grad, z, weight = dense(grad, z, weight)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grad_z = z.new_empty(tokens, hidden)
    grad_weight, grad_bias = weight.new_empty(hidden), weight.new_empty(hidden)
    programs = max(1, min(triton.cdiv(tokens, _ROWS_EACH), _PROGRAMS))
    partial = torch.empty(programs, 2, hidden, dtype=torch.float32, device=z.device)
    block = triton.next_power_of_2(hidden)

    def launch(config: Config) -> None:
        _backward[(programs,)](
            grad, z, mean, rstd, weight, grad_z, None if seed is None else grad_x, partial, seed,
            tokens, grad.stride(0), z.stride(0), *dropout_arguments(p), hidden, block,
            **config.arguments,
        )  # fmt: skip

    key = (type_name(z.dtype), hidden, bucket(tokens), seed is not None)
    launch(choose(name, key, fitting(BACKWARD_CONFIGS, block), launch))
    _reduce[(triton.cdiv(hidden, _REDUCE["BLOCK_C"]),)](
        partial, grad_weight, grad_bias, programs, hidden, **_REDUCE.arguments
    )
    return grad_z, grad_weight, grad_bias


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With adjacent values in the last dimension; copied only if they are not."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def outputs(like: Tensor, tokens: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for y and z `[T, D]`, mean and 1/std `[T, 1]`."""
    y, z = (like.new_empty(tokens, hidden) for _ in range(2))
    mean, rstd = (like.new_empty(tokens, 1, dtype=torch.float32) for _ in range(2))
    return y, z, mean, rstd


def dropout_arguments(p: float) -> tuple[int, float]:
    """The threshold that the hash is held against, and the scale of what is kept."""
    return round(p * 2**32), 1 / (1 - p)


def fitting(configs: Sequence[Config], block: int) -> tuple[Config, ...]:
    """Those that hold a row; for more than 8192 columns one that does so at any price."""
    return _fitting(tuple(configs), block)


@functools.cache
def _fitting(configs: tuple[Config, ...], block: int) -> tuple[Config, ...]:
    found = tuple(c for c in configs if c["TILE"] >= block)
    others = {name: size for name, size in configs[0].blocks if name != "TILE"}
    return found or (Config.of(warps=16, TILE=block, **others),)


def bytes_and_flops(
    kernel: str, tokens: int, hidden: int, item: int, dropped: bool = False
) -> tuple[int, int]:
    """Bytes that a call moves at least, and its floating-point operations.

    Args:
        kernel: "residual_norm" or "residual_norm_backward".
        tokens: T.
        hidden: D.
        item: Bytes of a value.
        dropped: With dropout.

    Returns:
        Bytes (weights, statistics and gradients of weights included), and twice the multiply-adds.
    """
    values = tokens * hidden
    if kernel == "residual_norm":  # x, residual -> y, z; z's square, its scale, the weight
        return item * (4 * values + 2 * hidden) + 8 * tokens, 2 * 3 * values
    moved = item * ((4 if dropped else 3) * values + 3 * hidden) + 8 * tokens
    # n, two column sums' terms, two row sums' terms, and two for their subtraction
    return moved, 2 * 7 * values


_TYPES = ("bf16", "fp16", "fp32")


def specimens() -> Iterator[Specimen]:
    """Every configuration with a row that fills its tile; the usual size with and without dropout.

    Strides are constants here, for then they are known to be round as they are at run time.
    """
    for kind in _TYPES:
        for config in CONFIGS:
            yield forward_specimen(kind, config, config["TILE"], True)
        yield forward_specimen(kind, CONFIGS[0], 768, False)
        yield forward_specimen(kind, CONFIGS[0], 13, True)
        for config in BACKWARD_CONFIGS:
            yield backward_specimen(kind, config, config["TILE"], "x")
        yield backward_specimen(kind, BACKWARD_CONFIGS[0], 768, "")
        yield backward_specimen(kind, BACKWARD_CONFIGS[0], 768, "result")
        yield backward_specimen(kind, BACKWARD_CONFIGS[0], 13, "x")
        tensors = {"partial": "*fp32", "grad_weight": f"*{kind}", "grad_bias": f"*{kind}"}
        yield specimen(
            _reduce, f"{kind} norm reduce", tensors | {"programs": "i32"}, {"D": 768}, _REDUCE
        )


def forward_specimen(kind: str, config: Config, hidden: int, dropped: bool) -> Specimen:
    """The forward kernel with rows of one size."""
    values = dict.fromkeys(("x", "residual", "weight", "bias", "y", "z"), f"*{kind}")
    signature = values | {"mean": "*fp32", "rstd": "*fp32", "seed": "*i64", "tokens": "i32"}
    signature |= {"eps": "fp32", "threshold": "i64", "scale": "fp32"}
    constants = {"x_stride": hidden, "residual_stride": hidden} | _sizes(hidden)
    if not dropped:
        constants["seed"] = None
    name = f"{kind} residual_norm D={hidden}{' dropout' if dropped else ''}"
    return specimen(_forward, name, signature, constants, config)


def backward_specimen(kind: str, config: Config, hidden: int, dropped: str) -> Specimen:
    """The backward kernel, with dropout of nothing, of "x" or of the "result"."""
    tensors = ("grad", "z", "weight", "grad_z", "grad_x")
    signature = dict.fromkeys(tensors, f"*{kind}")
    signature |= dict.fromkeys(("mean", "rstd", "partial"), "*fp32")
    signature |= {"seed": "*i64", "tokens": "i32", "threshold": "i64", "scale": "fp32"}
    constants = {"grad_stride": hidden, "z_stride": hidden} | _sizes(hidden)
    if dropped != "x":
        constants["grad_x"] = None
    if not dropped:
        constants["seed"] = None
    name = f"{kind} norm backward D={hidden}{' dropout of ' + dropped if dropped else ''}"
    return specimen(_backward, name, signature, constants, config)


def _sizes(hidden: int) -> dict[str, object]:
    return {"D": hidden, "BLOCK_D": triton.next_power_of_2(hidden)}


def specimen(
    kernel: object,
    name: str,
    types: dict[str, str],
    constants: dict[str, object],
    config: Config,
) -> Specimen:
    """With the parameters in the kernel's order, and what is constant marked so."""
    constants = constants | dict(config.blocks)
    names = kernel.arg_names  # type: ignore[attr-defined]
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    return Specimen(kernel, name, signature, constants, config)
