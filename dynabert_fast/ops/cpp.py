"""The ops in C++ on a CPU: `csrc/cpu/ops.cpp`, which takes addresses and strides, not tensors.

Every row's sums run over their terms in one order, so results and gradients have the same bits for
any number of threads. Threads follow `torch.get_num_threads()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from dynabert_fast.engine.native import ISA_VARIABLE, native_module
from dynabert_fast.errors import InputError
from dynabert_fast.ops.registry import Backend, register

_PANEL_COLUMNS = 64
_ACTIVATIONS = {"": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


@functools.cache
def _ops(threads: int, isa: str) -> Any:
    return native_module().Ops(threads, isa, _openmp_parallel())


@functools.cache
def _openmp_parallel() -> int:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch has loaded, 0 without one.

    The ops then run on torch's own threads. A second team would compete with them: after a parallel
    region they wait awake for milliseconds, and a forward pass of MiniLM took twice as long.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return 0
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    ours = [path for path in paths if "omp" in Path(path).name and "torch" in path]
    for path in sorted(ours) or sorted(p for p in paths if Path(p).name.startswith("libgomp")):
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(path).GOMP_parallel  # loaded already: the same library
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def _native() -> Any:
    return _ops(torch.get_num_threads(), os.environ.get(ISA_VARIABLE, ""))


def _adjacent(x: Tensor) -> Tensor:
    """A matrix whose rows are adjacent values; most are, and are not copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _address(x: Tensor) -> tuple[int, int]:
    """Of the first value, and elements between rows."""
    return (x.data_ptr(), x.stride(0)) if x.numel() else (0, 0)


def _statistics(rows: int) -> Tensor:
    return torch.empty(rows, 1, dtype=torch.float32, device="cpu")


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


# --- packed weights -----------------------------------------------------------------------------

#: Rows from which packing in each call costs too little to keep what it made.
_ROWS_WORTH_KEEPING = 512
#: Of all kept panels together; what does not fit is packed in each call.
_KEPT_BYTES = 2**30


_optimiser_steps = [0]


def _count_step(*_: Any) -> None:
    _optimiser_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


class _Panels(NamedTuple):
    """Where panels are, and bytes between two; their memory, to be held while they are used."""

    address: tuple[int, int] = (0, 0)
    memory: Tensor | None = None


class _Kept:
    """Panels of one weight, and which values they were packed from."""

    def __init__(self, values: tuple[int, int, int]) -> None:
        self.values = values
        self.panels: _Panels | None = None  # from the second call with these values on


_kept: dict[int, tuple[weakref.ref[Tensor], dict[Any, _Kept]]] = {}  # by id of the parameter
_kept_lock = threading.RLock()  # a parameter may die, and be forgotten, while it is held


def _views_of(owner: Tensor) -> dict[Any, _Kept]:
    number = id(owner)
    if number not in _kept:
        _kept[number] = weakref.ref(owner, lambda _: _kept.pop(number, None)), {}
    return _kept[number][1]


def _kept_bytes() -> int:
    views = [v.panels for _, owned in list(_kept.values()) for v in list(owned.values())]
    return sum(v.memory.numel() for v in views if v is not None and v.memory is not None)


def _panels(weight: Tensor, contracts: bool, rows: int) -> _Panels:
    """A parameter's panels where they are kept.

    They are packed at the second call in which the parameter has the same values, so that a
    training loop with one call a step does not pack what it will not use again. What tells that
    values changed: the address, the version counter, the steps of all optimisers (fused ones leave
    the counter alone), and a sample of a word from each row (so does a write through `.data`).
    """
    owner = weight if weight._base is None else weight._base
    if rows >= _ROWS_WORTH_KEEPING or not isinstance(owner, Parameter) or owner.is_inference():
        return _Panels()
    native, bf16, (count, columns) = _native(), _is_bf16(weight), weight.shape
    stride, element = weight.stride(0), weight.element_size()
    sample = native.fingerprint(weight.data_ptr(), stride * element, count, columns * element)
    values = weight.data_ptr(), owner._version + _optimiser_steps[0], sample
    key = weight.storage_offset(), count, columns, stride, contracts, bf16
    with _kept_lock:
        views = _views_of(owner)
        found = views.get(key)
        if found is None or found.values != values:
            views[key] = _Kept(values)
            return _Panels()
        if found.panels is None:
            size = native.packed_bytes(bf16, count, columns, contracts)
            if _kept_bytes() + size > _KEPT_BYTES:
                return _Panels()
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            native.pack(bf16, _address(weight), count, columns, contracts, memory.data_ptr())
            across = columns if contracts else count
            each = size // -(-across // _PANEL_COLUMNS)
            found.panels = _Panels((memory.data_ptr(), each), memory)
        return found.panels


# --- the ops ------------------------------------------------------------------------------------


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.expand`."""
    x, weight, bias = _adjacent(x), _adjacent(weight), bias.contiguous()
    out = x.new_empty(x.shape[0], max(extents))
    pre = torch.empty_like(out) if activation and keep_pre else x.new_empty(0)
    if out.numel():
        panels = _panels(weight, False, x.shape[0])
        _native().expand(
            _is_bf16(x),
            _address(x),
            _address(weight),
            bias.data_ptr(),
            x.shape[1],
            extents,
            rows,
            _ACTIVATIONS[activation],
            _address(out),
            _address(pre),
            panels.address,
        )
    if not activation:
        return out, x.new_empty(0)
    return out, pre


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
    """As `reference.expand_backward`."""
    grad, x, weight = _adjacent(grad), _adjacent(x), _adjacent(weight)
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if need_weight else x.new_empty(0)
    sums = torch.empty(weight.shape[0] if need_weight else 0, dtype=torch.float32, device="cpu")
    panels = _panels(weight, True, x.shape[0]) if grad_x.numel() else _Panels()
    _native().expand_backward(
        _is_bf16(x),
        _ACTIVATIONS[activation],
        _address(grad),
        _address(_adjacent(pre)) if activation else (0, 0),
        _address(x),
        _address(weight),
        x.shape[1],
        extents,
        rows,
        weight.shape[0],
        _address(grad_x),
        _address(grad_weight),
        sums.data_ptr() if need_weight else 0,
        panels.address,
    )
    return grad_x, grad_weight, sums.to(x.dtype)


def _gradient_of(x: Tensor, extents: Sequence[int], rows: Sequence[int]) -> Tensor:
    """To be written up to each block's extent; zero beyond, where x has no part in the result."""
    grad, first = torch.empty_like(x), 0
    for extent, count in zip(extents, rows, strict=True):
        if extent < x.shape[1]:
            grad[first : first + count, extent:] = 0
        first += count
    return grad


def contract(
    x: Tensor, weight_t: Tensor, bias: Tensor, extents: Sequence[int], rows: Sequence[int]
) -> Tensor:
    """As `reference.contract`."""
    x, weight_t, bias = _adjacent(x), _adjacent(weight_t), bias.contiguous()
    out = x.new_empty(x.shape[0], weight_t.shape[1])
    if out.numel():
        panels = _panels(weight_t, True, x.shape[0])
        _native().contract(
            _is_bf16(x),
            _address(x),
            _address(weight_t),
            bias.data_ptr(),
            weight_t.shape[1],
            extents,
            rows,
            _address(out),
            panels.address,
        )
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
    """As `reference.contract_backward`."""
    grad, x, weight_t = _adjacent(grad), _adjacent(x), _adjacent(weight_t)
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    if need_x:
        grad_x = _gradient_of(x, extents, rows)
        if grad_x.numel():
            panels = _panels(weight_t, False, x.shape[0])
            _native().expand(
                _is_bf16(x),
                _address(grad),
                _address(weight_t),
                0,
                grad.shape[1],
                extents,
                rows,
                0,
                _address(grad_x),
                (0, 0),
                panels.address,
            )
    if need_weight:
        native, bf16, columns = _native(), _is_bf16(grad), grad.shape[1]
        # For each of the weight's rows the sum of x times grad over the tokens that reach it.
        grad_weight = torch.empty_like(weight_t)
        native.weight_gradient(
            bf16,
            _address(x),
            _address(grad),
            columns,
            extents,
            rows,
            weight_t.shape[0],
            _address(grad_weight),
            0,
        )
        sums = torch.empty(columns, dtype=torch.float32, device="cpu")
        native.column_sums(bf16, _address(grad), [columns], [len(grad)], columns, sums.data_ptr())
        grad_bias = sums.to(grad.dtype)
    return grad_x, grad_weight, grad_bias


def _dropout(p: float, seed: Tensor | None) -> tuple[int, int, float]:
    """Seed, threshold and scale as the native code takes them; scale 1 is no dropout."""
    if seed is None:
        return 0, 0, 1.0
    return int(seed) % 2**64, round(p * 2**32), 1 / (1 - p)


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
    """As `reference.attention`, without a matrix of scores in memory."""
    qkv = _adjacent(qkv)
    total, most = qkv.shape[0], max(heads)
    out = qkv.new_empty(total, most * head_size)
    lse = torch.empty(total, most, dtype=torch.float32, device="cpu")
    if total:
        _native().attention(
            _is_bf16(qkv),
            head_size,
            _address(qkv),
            _address(out),
            _address(lse),
            (0, 0),
            (0, 0),
            _starts(offsets, total),
            heads,
            sequences,
            *_dropout(p, seed),
        )
    return out, lse


def _starts(offsets: Tensor, total: int) -> list[int]:
    """Where each sequence begins, and the last one ends: native code reads up to there."""
    starts = offsets.tolist()
    if starts[0] != 0 or starts[-1] > total or any(a > b for a, b in itertools.pairwise(starts)):
        raise InputError(f"offsets must ascend from 0 to at most {total}, got {starts}")
    return starts


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
    """As `reference.attention_backward`."""
    grad, qkv, out = _adjacent(grad), _adjacent(qkv), _adjacent(out)
    starts = offsets.tolist()
    blocks = itertools.pairwise(itertools.accumulate(sequences, initial=0))
    rows = [starts[last] - starts[first] for first, last in blocks]
    grad_qkv = _gradient_of(qkv, [3 * head_size * h for h in heads], rows)
    if qkv.shape[0]:
        _native().attention(
            _is_bf16(qkv),
            head_size,
            _address(qkv),
            _address(out),
            _address(lse),
            _address(grad),
            _address(grad_qkv),
            starts,
            heads,
            sequences,
            *_dropout(p, seed),
        )
    return grad_qkv


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.residual_norm`."""
    x, residual = _adjacent(x), _adjacent(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    rows, hidden = x.shape
    y, z = torch.empty_like(residual), torch.empty_like(residual)
    mean, rstd = _statistics(rows), _statistics(rows)
    if x.numel():
        _native().norm(
            _is_bf16(x),
            hidden,
            eps,
            *_dropout(p, seed),
            weight.data_ptr(),
            bias.data_ptr(),
            _address(x),
            _address(residual),
            _address(z),
            _address(y),
            mean.data_ptr(),
            rstd.data_ptr(),
            rows,
        )
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
    """As `reference.residual_norm_backward`."""
    grad_z = torch.empty_like(z)
    grad_x = z.new_empty(0) if seed is None else torch.empty_like(z)
    gradients = _norm_backward(False, grad, z, mean, rstd, weight, p, seed, grad_z, grad_x)
    return grad_x, grad_z, *gradients


def _norm_backward(
    embeds: bool,
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    p: float,
    seed: Tensor | None,
    grad_z: Tensor,
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes grad_z, and grad_x unless it is empty; returns the gradients of weight and bias."""
    grad, z, weight = _adjacent(grad), _adjacent(z), weight.contiguous()
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
    if z.numel():
        _native().norm_backward(
            _is_bf16(z),
            embeds,
            z.shape[1],
            *_dropout(p, seed),
            weight.data_ptr(),
            _address(grad),
            _address(z),
            mean.data_ptr(),
            rstd.data_ptr(),
            _address(grad_z),
            _address(grad_x),
            grad_weight.data_ptr(),
            grad_bias.data_ptr(),
            z.shape[0],
        )
    return grad_weight, grad_bias


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
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.embed`."""
    ids = [_ids(i) for i in (input_ids, token_type_ids, position_ids)]
    tables = [_adjacent(t) for t in (word, token_type, position)]
    weight, bias = weight.contiguous(), bias.contiguous()
    rows, hidden = len(input_ids), word.shape[1]
    y, z = word.new_empty(rows, hidden), word.new_empty(rows, hidden)
    mean, rstd = _statistics(rows), _statistics(rows)
    if y.numel():
        _native().embed(
            _is_bf16(word),
            hidden,
            eps,
            *_dropout(p, seed),
            weight.data_ptr(),
            bias.data_ptr(),
            [_address(t) for t in tables],
            [i.data_ptr() for i in ids],
            _address(z),
            _address(y),
            mean.data_ptr(),
            rstd.data_ptr(),
            rows,
        )
    return y, z, mean, rstd


def _ids(ids: Tensor) -> Tensor:
    return ids.to(torch.int64).contiguous()


def embed_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    vocabulary: int,
    token_types: int,
    positions: int,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.embed_backward`; a word's tokens are added in their order."""
    grad_z = torch.empty_like(z)
    gradients = _norm_backward(True, grad, z, mean, rstd, weight, p, seed, grad_z, z.new_empty(0))
    tables = []
    for ids, count in (
        (_ids(input_ids), vocabulary),
        (_ids(token_type_ids), token_types),
        (_ids(position_ids), positions),
    ):
        table = z.new_zeros(count, z.shape[1])
        if z.numel():
            _native().scatter(
                _is_bf16(z),
                _address(grad_z),
                ids.data_ptr(),
                len(ids),
                table.data_ptr(),
                z.shape[1],
            )
        tables.append(table)
    return tables[0], tables[1], tables[2], *gradients


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices of one type, rows one behind the other."""
    if teacher.dtype != student.dtype:
        student, teacher = student.float(), teacher.float()
    columns = student.shape[-1] if student.dim() else 1
    return student.reshape(-1, columns).contiguous(), teacher.reshape(-1, columns).contiguous()


def _loss(cross_entropy: bool, student: Tensor, teacher: Tensor) -> float:
    if not student.numel():
        return math.nan  # the mean of nothing, as in torch
    student, teacher = _pair(student, teacher)
    rows, columns = student.shape
    call = _is_bf16(student), cross_entropy, columns, _address(student), _address(teacher), rows
    return _native().loss(*call)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _loss_backward(cross_entropy: bool, grad: float, student: Tensor, teacher: Tensor) -> Tensor:
    shape, dtype = student.shape, student.dtype
    if not student.numel():
        return student.new_empty(shape)
    student, teacher = _pair(student, teacher)
    rows, columns = student.shape
    out = torch.empty_like(student)
    _native().loss_backward(
        _is_bf16(student),
        cross_entropy,
        columns,
        _address(student),
        _address(teacher),
        _address(out),
        grad,
        rows,
    )
    return out.view(shape).to(dtype)


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """As `reference.soft_cross_entropy`."""
    return _scalar(_loss(True, student, teacher))


def soft_cross_entropy_backward(grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """As `reference.soft_cross_entropy_backward`."""
    return _loss_backward(True, float(grad), student, teacher)


def hidden_mse(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """As `reference.hidden_mse`."""
    pairs = zip(students, teachers, weights, strict=True)
    return _scalar(sum(w * _loss(False, s, t) for s, t, w in pairs))


def hidden_mse_backward(
    grad: Tensor, students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float]
) -> list[Tensor]:
    """As `reference.hidden_mse_backward`."""
    scale, pairs = float(grad), zip(students, teachers, weights, strict=True)
    return [_loss_backward(False, scale * w, s, t) for s, t, w in pairs]


def _why_not(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        best = native_module().isas()[0]
    except InputError as error:
        return f"is not built: {error}"
    if best == "portable":
        return "has no code for this processor's vectors, and torch is faster than portable code"
    return None


register(
    "cpp",
    Backend(
        kernels={
            f.__name__: f
            for f in (
                expand,
                expand_backward,
                contract,
                contract_backward,
                attention,
                attention_backward,
                residual_norm,
                residual_norm_backward,
                embed,
                embed_backward,
                soft_cross_entropy,
                soft_cross_entropy_backward,
                hidden_mse,
                hidden_mse_backward,
            )
        },
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        supports=_why_not,
    ),
)
