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
_KEYS = Config.of(warps=4, BLOCK=256)
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
    words,
    token_types,
    positions,
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
    value = _gather(input_ids, word, words, word_stride, rows, columns, real, inside)
    value += _gather(
        token_type_ids, token_type, token_types, token_type_stride, rows, columns, real, inside
    )
    value += _gather(
        position_ids, position, positions, position_stride, rows, columns, real, inside
    )
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
def _gather(ids, table, count, stride, rows, columns, real, inside):
    """Rows of a table, float32; NaN where there is no such row, as nothing here can raise."""
    row = tl.load(ids + rows, mask=real, other=0).to(tl.int64)
    there = ((row >= 0) & (row < count))[:, None]
    at = table + row[:, None] * stride + columns[None, :]
    value = tl.load(at, mask=inside & there, other=0.0).to(tl.float32)
    return tl.where(there, value, float("nan"))


@triton.jit(do_not_specialize=["tokens", "vocabulary", "token_types", "positions"])
def _make_keys(
    input_ids,
    token_type_ids,
    position_ids,
    keys,
    tokens,
    vocabulary,
    token_types,
    positions,
    BLOCK: tl.constexpr,
):
    """Rows of the one table that holds all three; of an id that has none, the row behind it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < tokens
    end = vocabulary + token_types + positions
    row = tl.load(input_ids + at, mask=real, other=0).to(tl.int64)
    key = tl.where((row >= 0) & (row < vocabulary), row, end)
    tl.store(keys + at, key.to(tl.int32), mask=real)
    row = tl.load(token_type_ids + at, mask=real, other=0).to(tl.int64)
    key = tl.where((row >= 0) & (row < token_types), row + vocabulary, end)
    tl.store(keys + tokens + at, key.to(tl.int32), mask=real)
    row = tl.load(position_ids + at, mask=real, other=0).to(tl.int64)
    key = tl.where((row >= 0) & (row < positions), row + vocabulary + token_types, end)
    tl.store(keys + 2 * tokens + at, key.to(tl.int32), mask=real)


@triton.jit(do_not_specialize=["tokens", "vocabulary", "token_types", "positions"])
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
    positions,
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
                        word, token_type, position, key, vocabulary, token_types, positions,
                        total, columns, D,
                    )  # fmt: skip
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
    word,
    token_type,
    position,
    key,
    vocabulary,
    token_types,
    positions,
    total,
    columns,
    D: tl.constexpr,
):
    """Store a run's sum as the row of the table that its key is of, if it is of any."""
    total = total.to(word.dtype.element_ty)
    if key < vocabulary:
        tl.store(word + key.to(tl.int64) * D + columns, total, mask=columns < D)
    else:
        row = key - vocabulary
        if row < token_types:
            tl.store(token_type + row.to(tl.int64) * D + columns, total, mask=columns < D)
        else:
            row -= token_types
            if row < positions:
                tl.store(position + row.to(tl.int64) * D + columns, total, mask=columns < D)


@triton.jit(do_not_specialize=["tokens", "vocabulary", "token_types", "positions"])
def _join_runs(
    keys,
    pieces,
    word,
    token_type,
    position,
    tokens,
    vocabulary,
    token_types,
    positions,
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
        _store(
            word, token_type, position, key, vocabulary, token_types, positions, total, columns, D
        )


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
        input_ids: `[T]` integers, as are the other ids. A token with one that has no row in its
            table has a result that is NaN; so are then the gradients of its other rows and of
            LayerNorm, and no other row of a table is written to.
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
            word.shape[0], token_type.shape[0], position.shape[0], word.stride(0),
            token_type.stride(0), position.stride(0), eps, *dropout_arguments(p),
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
        keys = torch.empty(3 * tokens, dtype=torch.int32, device=z.device)
        ids = [i.contiguous() for i in (input_ids, token_type_ids, position_ids)]
        _make_keys[(triton.cdiv(tokens, _KEYS["BLOCK"]),)](
            *ids, keys, tokens, vocabulary, token_types, positions, **_KEYS.arguments
        )
        _table_gradients(grad_z, keys, tables)
    return *tables, grad_weight, grad_bias


def _table_gradients(grad_z: Tensor, keys: Tensor, tables: list[Tensor]) -> None:
    """Add up grad_z `[T, D]` into zeroed tables, by the keys of all `[3 T]`."""
    tokens, hidden = grad_z.shape
    keys, order = keys.sort(stable=True)
    chunks = triton.cdiv(3 * tokens, _CHUNK)
    pieces = torch.empty(chunks, 2, hidden, dtype=torch.float32, device=grad_z.device)
    columns = min(triton.next_power_of_2(hidden), _COLUMNS)
    grid = (chunks, triton.cdiv(hidden, columns))
    rows = (tokens, *(table.shape[0] for table in tables))
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


_COUNTS = ("vocabulary", "token_types", "positions")


def specimens() -> Iterator[Specimen]:
    """The forward as `residual_norm`'s; the three kernels of the tables' gradients."""
    ids = ("input_ids", "token_type_ids", "position_ids")
    types = dict.fromkeys(ids, "*i64") | dict.fromkeys(("tokens", *_COUNTS), "i32")
    yield specimen(_make_keys, "embed make keys", types | {"keys": "*i32"}, {}, _KEYS)
    for kind in ("bf16", "fp16", "fp32"):
        for config in CONFIGS:
            yield _forward_specimen(kind, config, config["TILE"], True)
        yield _forward_specimen(kind, CONFIGS[0], 768, False)
        yield _forward_specimen(kind, CONFIGS[0], 13, True)
        for hidden in (768, 13):
            sizes = {"D": hidden, "BLOCK_C": min(triton.next_power_of_2(hidden), _COLUMNS)}
            tensors = ("grad_z", "word", "token_type", "position")
            types = dict.fromkeys(tensors, f"*{kind}")
            types |= dict.fromkeys(("tokens", *_COUNTS), "i32")
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
    types |= dict.fromkeys(("words", "token_types", "positions"), "i32")
    types |= {"eps": "fp32", "threshold": "i64", "scale": "fp32"}
    constants: dict[str, object] = {f"{t}_stride": hidden for t in tables}
    constants |= {"D": hidden, "BLOCK_D": triton.next_power_of_2(hidden)}
    if not dropped:
        constants["seed"] = None
    name = f"{kind} embed D={hidden}{' dropout' if dropped else ''}"
    return specimen(_forward, name, types, constants, config)
