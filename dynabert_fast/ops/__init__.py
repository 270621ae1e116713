"""The ops of an elastic encoder: one typed function each, whose docstring is the contract.

Letters: T packed tokens, D hidden size, H heads, d head size, N neurons, B sequences, K rows of a
weight, k an extent. Ops take tensors and ints, never a `Subnet`.

**Extents (the staircase).** An extent says how many columns, heads or neurons are active. It is one
int for the whole call, or one int per *row block* together with `rows` (`sequences` for attention):
block r is the next `rows[r]` rows. Values beyond a row's extent are unspecified in outputs and
never read in inputs, so an op that follows takes the same extents. Parameters are whole: an op
reads the prefix `[:k]` of them in place, and their gradients are zero beyond the largest extent.

**Dropout.** `p` is the probability of dropping; `seed` an int64 scalar tensor on the data's device,
`None` for no dropout. The mask is a function of (seed, row, column), `reference.keep_mask`, the
same in every backend, so that backward recomputes it.

**Types.** float32, float64, bfloat16 or float16 tensors, all of one call in one type; accumulation
in at least float32. Under `torch.autocast` matrix products and attention run in autocast's type.
Gradients are first-order. Every op is also `torch.ops.dynabert_fast.<name>`, for compile, export.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynabert_fast.errors import InputError
from dynabert_fast.ops import (  # noqa: F401 (backends register themselves)
    autograd,
    cpp,
    cuda,
    reference,
    triton,
)
from dynabert_fast.ops.registry import backends, forced_backend, use_backend

__all__ = [
    "attention",
    "backends",
    "contract",
    "embed",
    "expand",
    "forced_backend",
    "hidden_mse",
    "residual_norm",
    "soft_cross_entropy",
    "use_backend",
]

#: Activations that `expand` can fuse; "" is none. "gelu" is the erf form.
ACTIVATIONS = ("", "gelu", "gelu_tanh", "relu")


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    extent: int | Sequence[int],
    rows: Sequence[int] | None = None,
    activation: str = "",
) -> Tensor:
    """Linear map onto a prefix of the output columns: `act(x @ weight[:k].T + bias[:k])`.

    Args:
        x: `[T, D]`.
        weight: `[K, D]`, one contiguous row per output column.
        bias: `[K]`.
        extent: k, in `[1, K]`; one int or one per row block.
        rows: Rows of each block, summing to T; needed where extent is a sequence.
        activation: One of `ACTIVATIONS`.

    Returns:
        `[T, max(k)]`; beyond a block's extent unspecified.

    Raises:
        InputError: Shapes, types, extents, rows or the activation do not fit.
    """
    _check(
        x.dim() == weight.dim() == 2
        and x.shape[1] == weight.shape[1]
        and bias.shape == weight.shape[:1],
        "expand needs x [T, D], weight [K, D] and bias [K], got {}, {}, {}",
        x,
        weight,
        bias,
    )
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    extents, rows = _blocks(extent, rows, x.shape[0], weight.shape[0])
    x, weight, bias = _autocast(x, weight, bias)
    _check_types("expand", x, weight, bias)
    keep_pre = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    return autograd.expand(x, weight, bias, extents, rows, activation, keep_pre)


def contract(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor,
    extent: int | Sequence[int],
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Linear map from a prefix of the input columns: `x[:, :k] @ weight_t[:k] + bias`.

    Args:
        x: `[T, >= max(k)]`; columns beyond a row's extent are not read.
        weight_t: `[K, D]`, one contiguous row per input column.
        bias: `[D]`.
        extent: k, in `[1, K]`; one int or one per row block.
        rows: Rows of each block, summing to T; needed where extent is a sequence.

    Returns:
        `[T, D]`.

    Raises:
        InputError: Shapes, types, extents or rows do not fit.
    """
    shapes = "contract needs x [T, >= extent], weight_t [K, D] and bias [D], got {}, {}, {}"
    fits = x.dim() == weight_t.dim() == 2 and bias.shape == weight_t.shape[1:]
    _check(fits, shapes, x, weight_t, bias)
    extents, rows = _blocks(extent, rows, x.shape[0], weight_t.shape[0])
    _check(x.shape[1] >= max(extents), shapes, x, weight_t, bias)
    x, weight_t, bias = _autocast(x, weight_t, bias)
    _check_types("contract", x, weight_t, bias)
    return autograd.contract(x, weight_t, bias, extents, rows)


def attention(
    qkv: Tensor,
    offsets: Tensor,
    max_length: int,
    head_size: int,
    heads: int | Sequence[int],
    sequences: Sequence[int] | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Self-attention of packed sequences: `dropout(softmax(Q K^T / sqrt(d))) V`, per head.

    Args:
        qkv: `[T, >= max(heads) * 3 * d]`, head-major: q, k and v of head 0, then of head 1, ...
        offsets: `[B + 1]` int32 or int64: sequence b is the rows `offsets[b]` to `offsets[b + 1]`;
            from 0, ascending. Rows behind the last sequence belong to none; their results are
            unspecified, and where there are gradients there may be no such rows.
        max_length: Length of the longest sequence, at most 65536.
        head_size: d; the scale is `d ** -0.5` whatever the extent.
        heads: Active heads; one int or one per block of sequences.
        sequences: Sequences in each block, summing to B; needed where heads is a sequence.
        p: Dropout of the probabilities.
        seed: Of the dropout. Mask row: the query's token counted from its block's first token;
            mask column: `head * 65536 + key`, the key counted within its sequence.

    Returns:
        `[T, max(heads) * d]`; beyond a row's heads unspecified.

    Raises:
        InputError: Shapes, heads, sequences or p do not fit.
    """
    _check(
        qkv.dim() == 2 and offsets.dim() == 1 and len(offsets) > 0 and head_size > 0,
        "attention needs qkv [T, >= heads * 3 * d], offsets [B + 1] and d above 0, got {}, {}, {}",
        qkv,
        offsets,
        head_size,
    )
    _check_ids("attention", offsets, like=qkv)
    available = qkv.shape[1] // (3 * head_size)
    extents, sequences = _blocks(heads, sequences, offsets.shape[0] - 1, available)
    _check(max_length <= 1 << 16, "max_length must be at most 65536, got {}", max_length)
    known = type(offsets) is Tensor and offsets.device.type == "cpu"  # no fake one, being traced
    trained = torch.is_grad_enabled() and qkv.requires_grad
    if trained and known and not torch.compiler.is_compiling():
        _check(
            int(offsets[-1]) == qkv.shape[0],
            "attention has gradients only where offsets end at the last row of qkv {}, got {}",
            qkv,
            int(offsets[-1]),
        )
    seed = _seed(p, seed)
    (qkv,) = _autocast(qkv)
    return autograd.attention(qkv, offsets, max_length, extents, sequences, head_size, p, seed)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`LayerNorm(dropout(x) + residual)` over the last dimension; x is cast to residual's type.

    Args:
        x: `[T, D]`.
        residual: `[T, D]`.
        weight: `[D]`.
        bias: `[D]`.
        eps: Added to the variance.
        p: Dropout of x.
        seed: Of the dropout; mask row and column are those of x.

    Returns:
        `[T, D]`.

    Raises:
        InputError: Shapes, types or p do not fit.
    """
    _check(
        x.shape == residual.shape and weight.shape == bias.shape == x.shape[-1:],
        "residual_norm needs x and residual [T, D], weight and bias [D], got {}, {}, {}, {}",
        x,
        residual,
        weight,
        bias,
    )
    x = x.to(residual.dtype)
    _check_types("residual_norm", x, residual, weight, bias)
    return autograd.residual_norm(x, residual, weight, bias, eps, p, _seed(p, seed))


def embed(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`dropout(LayerNorm(word[ids] + token_type[types] + position[positions]))`.

    Args:
        input_ids: `[T]` int32 or int64, as are the other ids.
        token_type_ids: `[T]`.
        position_ids: `[T]`.
        word: `[V, D]`.
        token_type: `[types, D]`.
        position: `[positions, D]`.
        weight: LayerNorm's, `[D]`.
        bias: LayerNorm's, `[D]`.
        eps: Added to the variance.
        p: Dropout of the result.
        seed: Of the dropout; mask row and column are those of the result.

    Returns:
        `[T, D]`.

    Raises:
        InputError: Shapes, types or p do not fit. Ids out of their table are the caller's to
            exclude.
    """
    _check(
        input_ids.shape == token_type_ids.shape == position_ids.shape and input_ids.dim() == 1,
        "embed needs three id tensors [T], got {}, {}, {}",
        input_ids,
        token_type_ids,
        position_ids,
    )
    _check(
        word.dim() == token_type.dim() == position.dim() == 2
        and word.shape[1:]
        == token_type.shape[1:]
        == position.shape[1:]
        == weight.shape
        == bias.shape,
        "embed needs tables [V, D], [types, D] and [positions, D], weight and bias [D], "
        "got {}, {}, {}, {}, {}",
        word,
        token_type,
        position,
        weight,
        bias,
    )
    _check_types("embed", word, token_type, position, weight, bias)
    _check_ids("embed", input_ids, token_type_ids, position_ids, like=word)
    ids = (input_ids, token_type_ids, position_ids)
    return autograd.embed(*ids, word, token_type, position, weight, bias, eps, p, _seed(p, seed))


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of `-(softmax(teacher) * log_softmax(student)).sum(-1)` (paper, section 3.2).

    Args:
        student: Logits `[B, C]`.
        teacher: Logits `[B, C]`; no gradient flows to them.

    Returns:
        A float32 (float64 for float64) scalar.

    Raises:
        InputError: The shapes differ, or are not `[B, C]`.
    """
    _check_pair("soft_cross_entropy", student, teacher)
    _check(student.dim() == 2, "soft_cross_entropy needs logits [B, C], got {}", student)
    return autograd.soft_cross_entropy(student, teacher)


def hidden_mse(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """`mean((student - teacher)^2)`, or the sum of that over many pairs in one call.

    Args:
        student: A tensor of any shape, e.g. hidden states `[T, D]`, or one for each pair, all of
            one type. The shapes of different pairs may differ.
        teacher: As many, of the students' shapes; no gradient flows to them.
        weights: Factor of each pair's mean; 1 if not given.

    Returns:
        A float32 (float64 for float64) scalar; NaN where a pair has no values.

    Raises:
        InputError: There is no pair, shapes or the students' types differ, or there is not one
            teacher and one weight for each student.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    factors = [1.0] * len(students) if weights is None else [float(w) for w in weights]
    _check(
        0 < len(students) == len(teachers) == len(factors),
        "hidden_mse needs a student or more, and as many teachers and weights; got {}, {} and {}",
        len(students),
        len(teachers),
        len(factors),
    )
    for s, t in zip(students, teachers, strict=True):
        _check_pair("hidden_mse", s, t)
    _check_types("hidden_mse", *students)
    return autograd.hidden_mse(students, teachers, factors)


def _blocks(
    extent: int | Sequence[int], rows: Sequence[int] | None, total: int, most: int
) -> tuple[list[int], list[int]]:
    """Extents and rows as lists, checked against the number of rows and the largest extent."""
    if isinstance(extent, int):
        extents, counts = [extent], [total]
    elif rows is None:
        raise InputError("one extent per row block needs the rows of each block, got none")
    else:
        extents, counts = list(extent), list(rows)
        _check(
            0 < len(extents) == len(counts) and min(counts) >= 0 and sum(counts) == total,
            "row blocks must have one extent each and sum to {} rows, got extents {} and rows {}",
            total,
            extents,
            counts,
        )
    _check(
        min(extents) >= 1 and max(extents) <= most,
        "an extent must be in 1 to {}, got {}",
        most,
        extents,
    )
    return extents, counts


def _check(condition: bool, message: str, *values: object) -> None:
    """Raise `InputError` with the values filled in (tensors as their shapes) unless it holds."""
    if not condition:
        shown = (list(v.shape) if isinstance(v, Tensor) else v for v in values)
        raise InputError(message.format(*shown))


def _check_types(name: str, *tensors: Tensor) -> None:
    """One type and one device for all: a kernel reads them as such."""
    _check_device(name, *tensors)
    first = tensors[0].dtype
    if any(t.dtype != first for t in tensors):
        shown = ", ".join(str(t.dtype).removeprefix("torch.") for t in tensors)
        raise InputError(
            f"{name} needs tensors of one type, got {shown}; cast them, or use autocast"
        )


def _check_device(name: str, *tensors: Tensor) -> None:
    """A kernel that is given another device's address ends the process."""
    first = tensors[0].device
    if any(t.device != first for t in tensors):
        shown = ", ".join(str(t.device) for t in tensors)
        raise InputError(f"{name} needs tensors on one device, got {shown}; move them with .to()")


def _check_ids(name: str, *ids: Tensor, like: Tensor) -> None:
    """Indices are int32 or int64, on the device of what they index."""
    for tensor in ids:
        _check(
            tensor.dtype in (torch.int32, torch.int64),
            name + " needs ids and offsets in int32 or int64, got {}",
            tensor.dtype,
        )
        _check_device(name, like, tensor)


def _check_pair(name: str, student: Tensor, teacher: Tensor) -> None:
    _check(
        student.shape == teacher.shape,
        name + " needs student and teacher of one shape, got {} and {}",
        student,
        teacher,
    )
    _check_device(name, student, teacher)


def _seed(p: float, seed: Tensor | None) -> Tensor | None:
    """The seed where dropout is on, `None` where it is off."""
    _check(0 <= p < 1, "dropout must be in [0, 1), got {}", p)
    _check(p == 0 or seed is not None, "dropout {} needs a seed, got None", p)
    return seed if p > 0 else None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's type where autocast is on for their device."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)
