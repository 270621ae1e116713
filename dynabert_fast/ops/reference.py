"""Every kernel in plain torch, for any device and floating-point type: the judge of all others.

In float64 this is what correctness means; in other types it computes as plain torch would. Shapes
and meanings are those of `dynabert_fast.ops`; here a call is already validated. Row blocks are
given as two lists, `extents` and `rows`: block r is the next `rows[r]` rows, of which `extents[r]`
columns (or heads) are active. Backward functions never read a gradient beyond its extent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dynabert_fast.ops.registry import Backend, register

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive columns over the 32-bit range


def _blocks(extents: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """(row slice, extent) of each row block."""
    start = 0
    for extent, count in zip(extents, rows, strict=True):
        yield slice(start, start + count), extent
        start += count


# --- dropout ------------------------------------------------------------------------------------


def _wrap32(value: int) -> int:
    """The int32 with the low 32 bits of `value`."""
    return (value + 2**31) % 2**32 - 2**31


def _mix32_(h: Tensor) -> Tensor:
    """C. Wellons' 32-bit finaliser lowbias32, in place on int32; masks make the shifts logical."""
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= 0x7FEB352D
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= _wrap32(0x846CA68B)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


def keep_mask(seed: Tensor, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Dropout's keep mask as a function of (seed, row, column), the same in every backend.

    With `high = high32(seed)` and `low = mix(low32(seed) ^ mix(high))`,
    `bits = mix(mix(row ^ low) ^ (column * golden + high))`, kept iff `bits >= p * 2^32`, all in
    unsigned 32-bit arithmetic. (Without the mixing of `low`, neighbouring seeds would give the same
    mask with its rows in another order.) `rows` and `columns` are integers below 2^31 and broadcast
    against each other.
    """
    high, low = (seed >> 32).int(), seed.int()  # int() keeps the low 32 bits
    low = _mix32_(low ^ _mix32_(high.clone()))
    rows = _mix32_(rows.int() ^ low)
    bits = _mix32_(rows ^ (columns.int() * _wrap32(_GOLDEN) + high))
    # Unsigned comparison: flipping the sign bit maps it to the signed one.
    return (bits ^ _wrap32(2**31)) >= round(p * 2**32) - 2**31


def _dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """`x * keep / (1 - p)` for x `[T, D]`; its own backward, applied to the gradient."""
    if seed is None:
        return x
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    columns = torch.arange(x.shape[1], device=x.device)
    return (x * (1 / (1 - p))).masked_fill_(~keep_mask(seed, rows, columns, p), 0)


# --- matrix products ----------------------------------------------------------------------------


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return grad * (pre > 0)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, pre, approximate=approximate)


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """`activation(x @ weight[:k].T + bias[:k])` per block; also the pre-activation if asked for."""
    if len(extents) == 1:
        k = extents[0]
        pre = F.linear(x, weight[:k], bias[:k])  # [T, k]
    else:
        pre = x.new_zeros(x.shape[0], max(extents))
        for block, k in _blocks(extents, rows):
            pre[block, :k] = F.linear(x[block], weight[:k], bias[:k])
    if not activation:
        return pre, x.new_empty(0)
    return _activate(pre, activation), pre if keep_pre else x.new_empty(0)


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
    """Gradients of x `[T, D]`, weight `[K, D]` and bias `[K]` (empty where not needed)."""
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    pre_grads = []
    for block, k in _blocks(extents, rows):
        g = grad[block, :k]
        if activation:
            g = _activate_backward(g, pre[block, :k], activation)
        if need_x:
            torch.mm(g, weight[:k], out=grad_x[block])
        pre_grads.append(g)
    if not need_weight:
        return grad_x, x.new_empty(0), x.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0])
    for g in pre_grads:
        grad_bias[: g.shape[1]] += g.sum(0)
    inputs = [x[block] for block, _ in _blocks(extents, rows)]
    return grad_x, _weight_gradient(weight, pre_grads, inputs), grad_bias


def _weight_gradient(weight: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum over blocks of `left.T @ right` in the first rows of a tensor like `weight`, zero after.

    Rows are written once where one block reaches them, so that one extent costs no zero-filling.
    """
    grad = torch.empty_like(weight)
    done = 0
    for a, b in zip(left, right, strict=True):
        if done:
            grad[: min(done, a.shape[1])].addmm_(a[:, :done].T, b)
        if a.shape[1] > done:
            torch.mm(a[:, done:].T, b, out=grad[done : a.shape[1]])
            done = a.shape[1]
    grad[done:].zero_()
    return grad


def contract(
    x: Tensor, weight_t: Tensor, bias: Tensor, extents: Sequence[int], rows: Sequence[int]
) -> Tensor:
    """`x[:, :k] @ weight_t[:k] + bias` per block."""
    outputs = [torch.addmm(bias, x[block, :k], weight_t[:k]) for block, k in _blocks(extents, rows)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def contract_backward(
    grad: Tensor,
    x: Tensor,
    weight_t: Tensor,
    extents: Sequence[int],
    rows: Sequence[int],
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x `[T, K]`, weight_t `[N, D]` and bias `[D]` (empty where not needed)."""
    grad_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    inputs, grads = [], []
    for block, k in _blocks(extents, rows):
        if need_x:
            grad_x[block, :k] = grad[block] @ weight_t[:k].T
        inputs.append(x[block, :k])
        grads.append(grad[block])
    if not need_weight:
        return grad_x, x.new_empty(0), x.new_empty(0)
    return grad_x, _weight_gradient(weight_t, inputs, grads), grad.sum(0)


# --- attention ----------------------------------------------------------------------------------


def _sequence_blocks(
    heads: Sequence[int], sequences: Sequence[int], offsets: Tensor
) -> Iterator[tuple[Tensor, int, int]]:
    """(sequence offsets, first token row, heads) of each block of sequences with one extent."""
    if len(heads) == 1:
        yield offsets, 0, heads[0]
        return
    bounds = offsets.tolist()
    for block, h in _blocks(heads, sequences):
        yield offsets[block.start : block.stop + 1], bounds[block.start], h


def _padded_index(offsets: Tensor, max_length: int, total: int) -> tuple[Tensor, Tensor]:
    """Token row of each padded position `[B, S]`, and which positions are real.

    Padding repeats the sequence's own first token: others' rows may be unspecified there.
    """
    position = torch.arange(max_length, device=offsets.device)
    starts, lengths = offsets[:-1, None].long(), offsets.diff()[:, None]
    real = position < lengths
    return torch.where(real, starts + position, starts.clamp(max=total - 1)), real


def _split_heads(qkv: Tensor, token: Tensor, heads: int, head_size: int) -> tuple[Tensor, ...]:
    """Q, K, V `[B, H, S, d]` of padded sequences from head-major rows `[T, H * 3 * d]`."""
    padded = qkv[:, : heads * 3 * head_size][token].unflatten(-1, (heads, 3, head_size))
    return padded.permute(3, 0, 2, 1, 4).unbind(0)


def _scores(q: Tensor, k: Tensor, real: Tensor) -> Tensor:
    """Scaled scores `[B, H, S, S]` in at least float32, -inf at padded keys."""
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    return (scores * q.shape[-1] ** -0.5).masked_fill(~real[:, None, None, :], float("-inf"))


def _attention_keep(scores: Tensor, token: Tensor, p: float, seed: Tensor) -> Tensor:
    """Keep mask: the row is the query's token in its block, the column is head * 65536 + key."""
    heads = torch.arange(scores.shape[1], device=token.device)[:, None, None] << 16
    keys = torch.arange(scores.shape[3], device=token.device)
    return keep_mask(seed, token[:, None, :, None], heads + keys, p)


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
    """Softmax attention per sequence and head; also the row-wise log-sum-exp `[T, H]`."""
    total, most = qkv.shape[0], max(heads)
    out = qkv.new_zeros(total, most * head_size)
    lse = qkv.new_zeros(total, most, dtype=torch.promote_types(qkv.dtype, torch.float32))
    if total == 0:
        return out, lse
    for bounds, first, h in _sequence_blocks(heads, sequences, offsets):
        token, real = _padded_index(bounds, max_length, qkv.shape[0])
        q, k, v = _split_heads(qkv, token, h, head_size)
        scores = _scores(q, k, real)
        row_lse = scores.logsumexp(-1)  # [B, H, S]
        probabilities = (scores - row_lse[..., None]).exp()
        if seed is not None:
            keep = _attention_keep(scores, token - first, p, seed)
            probabilities = probabilities * keep * (1 / (1 - p))
        context = (probabilities.to(qkv.dtype) @ v).transpose(1, 2)  # [B, S, H, d]
        rows = token[real]
        out[rows, : h * head_size] = context[real].flatten(1)
        lse[rows, :h] = row_lse.transpose(1, 2)[real]
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
    """Gradient of qkv `[T, H * 3 * d]`, probabilities recomputed from the log-sum-exp."""
    grad_qkv = torch.zeros_like(qkv)
    if qkv.shape[0] == 0:
        return grad_qkv
    for bounds, first, h in _sequence_blocks(heads, sequences, offsets):
        token, real = _padded_index(bounds, max_length, qkv.shape[0])
        q, k, v = _split_heads(qkv, token, h, head_size)
        real_rows = real[:, None, :, None]
        # Padded query rows repeat a real token: their gradient is cut here, once for all uses.
        grad_out = _context(grad, token, h, head_size).masked_fill(~real_rows, 0)
        delta = (grad_out * _context(out, token, h, head_size)).sum(
            -1, keepdim=True, dtype=lse.dtype
        )
        probabilities = (_scores(q, k, real) - lse[:, :h][token].transpose(1, 2)[..., None]).exp()
        grad_p = (grad_out @ v.transpose(-1, -2)).to(lse.dtype)
        kept = probabilities
        if seed is not None:
            keep = _attention_keep(grad_p, token - first, p, seed).to(lse.dtype) * (1 / (1 - p))
            grad_p, kept = grad_p * keep, probabilities * keep
        grad_s = (probabilities * (grad_p - delta) * head_size**-0.5).to(qkv.dtype)
        grads = torch.stack(  # [3, B, H, S, d]
            [
                grad_s @ k,
                grad_s.transpose(-1, -2) @ q,
                kept.to(qkv.dtype).transpose(-1, -2) @ grad_out,
            ]
        )
        grad_rows = grads.permute(1, 3, 2, 0, 4)[real]  # [T', H, 3, d]
        grad_qkv[token[real], : h * 3 * head_size] = grad_rows.flatten(1)
    return grad_qkv


def _context(x: Tensor, token: Tensor, heads: int, head_size: int) -> Tensor:
    """Padded `[B, H, S, d]` of packed rows `[T, >= H * d]`."""
    return x[:, : heads * head_size][token].unflatten(-1, (heads, head_size)).transpose(1, 2)


# --- LayerNorm and embedding --------------------------------------------------------------------


def _layer_norm(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of z `[T, D]` in z's type, with mean and 1/std `[T, 1]` in at least float32.

    In float32 throughout: torch on a CPU would round bfloat16's mean and 1/std to bfloat16.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    y, mean, rstd = torch.native_layer_norm(
        z.to(wide), [z.shape[-1]], weight.to(wide), bias.to(wide), eps
    )
    return y.to(z.dtype), mean, rstd


def _layer_norm_backward(
    grad: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of z `[T, D]`, weight `[D]` and bias `[D]`."""
    wide = torch.promote_types(z.dtype, torch.float32)
    gamma = weight.to(wide)
    grads = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), z.to(wide), [z.shape[-1]], mean, rstd, gamma, gamma, [True, True, True]
    )
    return tuple(g.to(z.dtype) for g in grads)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`LayerNorm(z)` of `z = dropout(x) + residual`; also z and the rows' mean and 1/std."""
    z = _dropout(x, p, seed) + residual
    y, mean, rstd = _layer_norm(z, weight, bias, eps)
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
    grad_z, grad_weight, grad_bias = _layer_norm_backward(grad, z, mean, rstd, weight)
    grad_x = grad_z.new_empty(0) if seed is None else _dropout(grad_z, p, seed)
    return grad_x, grad_z, grad_weight, grad_bias


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
    """`dropout(LayerNorm(z))` of the three embeddings' sum z; also z, mean and 1/std."""
    z = word[input_ids] + token_type[token_type_ids] + position[position_ids]
    y, mean, rstd = _layer_norm(z, weight, bias, eps)
    return _dropout(y, p, seed), z, mean, rstd


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
    """Gradients of the word, token-type and position tables, of weight and of bias."""
    grad_z, grad_weight, grad_bias = _layer_norm_backward(
        _dropout(grad, p, seed), z, mean, rstd, weight
    )
    tables = (
        torch.ops.aten.embedding_dense_backward(grad_z, ids, count, -1, False)
        for ids, count in (
            (input_ids, vocabulary),
            (token_type_ids, token_types),
            (position_ids, positions),
        )
    )
    return *tables, grad_weight, grad_bias


# --- distillation losses ------------------------------------------------------------------------


def _loss_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of `-(softmax(teacher) * log_softmax(student)).sum(-1)`, a float32."""
    dtype = _loss_type(student)
    log_student = student.log_softmax(-1, dtype=dtype)
    return -(teacher.softmax(-1, dtype=dtype) * log_student).sum(-1).mean()


def soft_cross_entropy_backward(grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Gradient of the student's logits: `(softmax(student) - softmax(teacher)) / B`."""
    dtype = _loss_type(student)
    difference = student.softmax(-1, dtype=dtype) - teacher.softmax(-1, dtype=dtype)
    return (grad * difference / student.shape[0]).to(student.dtype).contiguous()


def hidden_mse(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Sum over pairs of `weight * mean((student - teacher)^2)`, in float32 or more."""
    dtype = _loss_type(students[0])
    total = students[0].new_zeros((), dtype=dtype)
    for student, teacher, weight in zip(students, teachers, weights, strict=True):
        total = total + weight * F.mse_loss(student.to(dtype), teacher.to(dtype))
    return total


def hidden_mse_backward(
    grad: Tensor, students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float]
) -> list[Tensor]:
    """Gradients of the students: `weight * 2 (student - teacher) / numel`."""
    dtype = _loss_type(students[0])
    gradients = []
    for student, teacher, weight in zip(students, teachers, weights, strict=True):
        scale = grad * (2 * weight / max(student.numel(), 1))
        difference = student.to(dtype) - teacher.to(dtype)
        gradients.append((difference * scale).to(student.dtype).contiguous())
    return gradients


KERNELS = {
    function.__name__: function
    for function in (
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
}

register("reference", Backend(kernels=KERNELS))
