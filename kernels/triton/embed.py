"""`dropout(LayerNorm(word[ids] + token_type[types] + position[positions]))` and its backward.

Forward: three rows are gathered, added and normalised in registers. Backward: LayerNorm's is that
of `residual_norm`; the gradients of the three tables, which are sums of rows of grad_z, are taken
together:

1. The ids of the three tables, numbered as rows of one table that holds all three, are sorted (one
   stable sort of 3 T int32), so that the rows that share an id stand in a run.
2. `_sum_runs`: a program takes `CHUNK` places of that order and adds rows up. A run that lies
   within a chunk is stored; of one that does not, each chunk keeps its piece, in float32.
3. `_join_runs`: the chunk in which such a run begins adds up its pieces.

So there are no atomics and no copy to the host, sums are float32 and rounded once, and the bits are
the same on every card. `aten.embedding_dense_backward`, three times, would be deterministic too and
would not wait for the device. But up to 3072 tokens it adds up in the tables' type; beyond, it sums
pieces of ten rows and then, in one thread for each column, all pieces of a run, of which a token
type's has up to T / 10; and it sorts three times.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynabert_fast.kernels.common import Config, Specimen, bucket, choose, type_name
from dynabert_fast.kernels.residual_norm import (
    CONFIGS,
    dense,
    dropout,
    dropout_arguments,
    fitting,
    norm_backward,
    normalise,
    outputs,
    specimen,
)

# Places of a chunk: pieces are [3 T / 32, 2, D] float32, an eighth of the three times that grad_z
# is read, in bf16. Columns of a program: 8 to a thread of one warp, one 16-byte access in bf16.
_CHUNK, _COLUMNS = 32, 256
_RUNS = Config.of(warps=1, CHUNK=_CHUNK)
_JOIN = Config.of(warps=4, CHUNK=_CHUNK, BLOCK=32)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def _forward(
    input_ids,
    token_type_ids,
    position_ids,
    word,
    token_type,
    position,
    weight,
    bias,
    y,
    z,
    mean,
    rstd,
    seed,  # None: no dropout
    tokens,
    word_stride,
    token_type_stride,
    position_stride,
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
    real = rows < tokens
    inside = real[:, None] & (columns < D)[None, :]
    value = _gather(input_ids, word, word_stride, rows, columns, real, inside)
    value += _gather(token_type_ids, token_type, token_type_stride, rows, columns, real, inside)
    value += _gather(position_ids, position, position_stride, rows, columns, real, inside)
    rounded = value.to(z.dtype.element_ty)
    out, row_mean, row_rstd = normalise(
        rounded.to(tl.float32), inside, columns, weight, bias, eps, D
    )
    if seed is not None:
        out = dropout(out, seed, rows, columns, threshold, scale)
    at = rows[:, None] * D + columns[None, :]
    tl.store(z + at, rounded, mask=inside)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + rows, row_mean, mask=real)
    tl.store(rstd + rows, row_rstd, mask=real)


@triton.jit
def _gather(ids, table, stride, rows, columns, real, inside):
    """Rows of a table, float32."""
    row = tl.load(ids + rows, mask=real, other=0).to(tl.int64)
    return tl.load(table + row[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=["tokens", "vocabulary", "token_types"])
def _sum_runs(
    keys,
    order,
    grad_z,
    pieces,
    word,
    token_type,
    position,
    tokens,
    vocabulary,
    token_types,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of grad_z's rows over runs of equal keys, at the places of one chunk.

    pieces `[chunks, 2, D]`: of the run that came from the chunk before, if it did not begin here;
    of the run that goes on in the next one, if it did.
    """
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, count = chunk * CHUNK, 3 * tokens
    key = tl.load(keys + first)
    begun = tl.load(keys + first - 1, mask=first > 0, other=-1) != key
    total = tl.zeros([BLOCK_C], tl.float32)
    piece = pieces + chunk.to(tl.int64) * 2 * D + columns
    for four in range(CHUNK // 4):
        place = first + four * 4
        # Four rows are asked for before the first is needed.
        a = _row(order, grad_z, place, tokens, columns, D)
        b = _row(order, grad_z, place + 1, tokens, columns, D)
        c = _row(order, grad_z, place + 2, tokens, columns, D)
        d = _row(order, grad_z, place + 3, tokens, columns, D)
        for i in tl.static_range(4):
            total += a
            a, b, c = b, c, d
            after = tl.load(keys + place + i + 1, mask=place + i + 1 < count, other=-1)
            if after != key:
                if begun:
                    _store(
                        word, token_type, position, key, vocabulary, token_types, total, columns, D
                    )
                else:
                    tl.store(piece, total, mask=columns < D)
                total = tl.zeros([BLOCK_C], tl.float32)
                begun = after != key
            key = after
    if begun:
        tl.store(piece + D, total, mask=columns < D)
    else:
        tl.store(piece, total, mask=columns < D)


@triton.jit
def _row(order, grad_z, place, tokens, columns, D: tl.constexpr):
    """The row of grad_z at a place of the order, float32; beyond the last place, any."""
    token = tl.load(order + place, mask=place < 3 * tokens, other=0).to(tl.int32) % tokens
    at = grad_z + token.to(tl.int64) * D + columns
    return tl.load(at, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _store(
    word, token_type, position, key, vocabulary, token_types, total, columns, D: tl.constexpr
):
    """Store a run's sum as the row of the table that its key is of."""
    total = total.to(word.dtype.element_ty)
    if key < vocabulary:
        tl.store(word + key.to(tl.int64) * D + columns, total, mask=columns < D)
    else:
        row = key - vocabulary
        if row < token_types:
            tl.store(token_type + row.to(tl.int64) * D + columns, total, mask=columns < D)
        else:
            row -= token_types
            tl.store(position + row.to(tl.int64) * D + columns, total, mask=columns < D)


@triton.jit(do_not_specialize=["tokens", "vocabulary", "token_types"])
def _join_runs(
    keys,
    pieces,
    word,
    token_type,
    position,
    tokens,
    vocabulary,
    token_types,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum of the pieces of the run that begins in one chunk and goes on in the next, if any."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, end, count = chunk * CHUNK, (chunk + 1) * CHUNK, 3 * tokens
    before = tl.load(keys + first - 1, mask=first > 0, other=-1)
    key = tl.load(keys + end - 1, mask=end <= count, other=-1)
    after = tl.load(keys + end, mask=end < count, other=-2)
    if (key == after) & (before != key):
        begin = pieces + chunk.to(tl.int64) * 2 * D + D + columns
        total = tl.load(begin, mask=columns < D, other=0.0)
        later = tl.zeros([BLOCK, BLOCK_C], tl.float32)
        chunks = chunk + 1 + tl.arange(0, BLOCK)
        goes_on = True
        while goes_on:
            starts = chunks * CHUNK
            mine = tl.load(keys + starts, mask=starts < count, other=-1) == key
            at = pieces + chunks[:, None].to(tl.int64) * 2 * D + columns[None, :]
            later += tl.load(at, mask=mine[:, None] & (columns < D)[None, :], other=0.0)
            goes_on = tl.min(mine.to(tl.int32), 0) == 1
            chunks += BLOCK
        total += tl.sum(later, 0)
        _store(word, token_type, position, key, vocabulary, token_types, total, columns, D)


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
    """`dropout(LayerNorm(z))` of the three embeddings' sum z; also z, mean and 1/std.

    Args:
        input_ids: `[T]` integers, as are the other ids.
        token_type_ids: `[T]`.
        position_ids: `[T]`.
        word: `[V, D]`, fp32, bf16 or fp16, as are the other four.
        token_type: `[types, D]`.
        position: `[positions, D]`.
        weight: `[D]`.
        bias: `[D]`.
        eps: Added to the variance.
        p: Dropout of the result.
        seed: int64 scalar on the device; `None` for no dropout.

    Returns:
        The result and z `[T, D]`, mean and 1/std `[T, 1]` float32.
    """
    tokens, hidden = input_ids.shape[0], word.shape[1]
    ids = [i.contiguous() for i in (input_ids, token_type_ids, position_ids)]
    word, token_type, position, weight, bias = dense(word, token_type, position, weight, bias)
    y, z, mean, rstd = outputs(word, tokens, hidden)
    block = triton.next_power_of_2(hidden)

    def launch(config: Config) -> None:
        _forward[(triton.cdiv(tokens, config["TILE"] // block),)](
            *ids, word, token_type, position, weight, bias, y, z, mean, rstd, seed, tokens,
            word.stride(0), token_type.stride(0), position.stride(0), eps, *dropout_arguments(p),
            hidden, block, **config.arguments,
        )  # fmt: skip

    if tokens:
        key = (type_name(word.dtype), hidden, bucket(tokens), seed is not None)
        launch(choose("embed", key, fitting(CONFIGS, block), launch))
    return y, z, mean, rstd


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
    grad_z, grad_weight, grad_bias = norm_backward(
        "embed_backward", grad, z, mean, rstd, weight, p, seed, None
    )
    tokens, hidden = z.shape
    tables = [z.new_zeros(rows, hidden) for rows in (vocabulary, token_types, positions)]
    if tokens:
        # Rows of the one table that holds all three.
        places = torch.empty(3, tokens, dtype=torch.int32, device=z.device)
        places[0].copy_(input_ids)
        torch.add(token_type_ids, vocabulary, out=places[1])
        torch.add(position_ids, vocabulary + token_types, out=places[2])
        _table_gradients(grad_z, places.view(-1), tables)
    return *tables, grad_weight, grad_bias


def _table_gradients(grad_z: Tensor, keys: Tensor, tables: list[Tensor]) -> None:
    """Add up grad_z `[T, D]` into zeroed tables, by the keys of all `[3 T]`."""
    tokens, hidden = grad_z.shape
    keys, order = keys.sort(stable=True)
    chunks = triton.cdiv(3 * tokens, _CHUNK)
    pieces = torch.empty(chunks, 2, hidden, dtype=torch.float32, device=grad_z.device)
    columns = min(triton.next_power_of_2(hidden), _COLUMNS)
    grid = (chunks, triton.cdiv(hidden, columns))
    rows = (tokens, tables[0].shape[0], tables[1].shape[0])
    _sum_runs[grid](
        keys, order, grad_z, pieces, *tables, *rows, hidden, BLOCK_C=columns, **_RUNS.arguments
    )
    _join_runs[grid](keys, pieces, *tables, *rows, hidden, BLOCK_C=columns, **_JOIN.arguments)


def bytes_and_flops(
    kernel: str, tokens: int, hidden: int, item: int, rows: int, words: int
) -> tuple[int, int]:
    """Bytes that a call moves at least, and its floating-point operations.

    Args:
        kernel: "embed" or "embed_backward".
        tokens: T.
        hidden: D.
        item: Bytes of a value.
        rows: Of the three tables together; all are written in the backward.
        words: Distinct rows of the three tables that the tokens name: each is read at least once.

    Returns:
        Bytes (ids of 8, weights and statistics included), and twice the multiply-adds.
    """
    values = tokens * hidden
    ids = 3 * 8 * tokens
    if kernel == "embed":  # y and z are written; two additions, z's square, its scale, the weight
        return item * (2 * values + words * hidden + 2 * hidden) + ids + 8 * tokens, 2 * 5 * values
    # grad and z are read, grad_z is written and read; LayerNorm's 7, and three sums
    moved = item * (4 * values + rows * hidden + 3 * hidden) + ids + 8 * tokens
    return moved, 2 * (7 + 3) * values


def specimens() -> Iterator[Specimen]:
    """The forward as `residual_norm`'s; the two kernels of the tables' gradients."""
    for kind in ("bf16", "fp16", "fp32"):
        for config in CONFIGS:
            yield _forward_specimen(kind, config, config["TILE"], True)
        yield _forward_specimen(kind, CONFIGS[0], 768, False)
        yield _forward_specimen(kind, CONFIGS[0], 13, True)
        for hidden in (768, 13):
            sizes = {"D": hidden, "BLOCK_C": min(triton.next_power_of_2(hidden), _COLUMNS)}
            tensors = ("grad_z", "word", "token_type", "position")
            types = dict.fromkeys(tensors, f"*{kind}")
            types |= dict.fromkeys(("tokens", "vocabulary", "token_types"), "i32")
            types |= {"keys": "*i32", "order": "*i64", "pieces": "*fp32"}
            for kernel, name, config in (
                (_sum_runs, "sum runs", _RUNS),
                (_join_runs, "join runs", _JOIN),
            ):
                yield specimen(kernel, f"{kind} embed {name} D={hidden}", types, sizes, config)


def _forward_specimen(kind: str, config: Config, hidden: int, dropped: bool) -> Specimen:
    ids = ("input_ids", "token_type_ids", "position_ids")
    tables = ("word", "token_type", "position")
    types = dict.fromkeys(ids, "*i64")
    types |= dict.fromkeys((*tables, "weight", "bias", "y", "z"), f"*{kind}")
    types |= {"mean": "*fp32", "rstd": "*fp32", "seed": "*i64", "tokens": "i32"}
    types |= {"eps": "fp32", "threshold": "i64", "scale": "fp32"}
    constants: dict[str, object] = {f"{t}_stride": hidden for t in tables}
    constants |= {"D": hidden, "BLOCK_D": triton.next_power_of_2(hidden)}
    if not dropped:
        constants["seed"] = None
    name = f"{kind} embed D={hidden}{' dropout' if dropped else ''}"
    return specimen(_forward, name, types, constants, config)
