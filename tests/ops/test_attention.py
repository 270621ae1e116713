from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.ops.reference import keep_mask

HEADS, D = 3, 5  # heads stored, head size

# lengths of the sequences, heads, sequences in each block of equal heads
CASES = {
    "one extent": ((7, 1, 4), 2, None),
    "all heads": ((7, 1, 4), HEADS, None),
    "one head": ((5, 3), 1, None),
    "one token": ((1,), 2, None),
    "one sequence": ((11,), HEADS, None),
    "staircase": ((7, 1, 4, 2, 6), (3, 2, 1), (2, 1, 2)),
    "staircase below H": ((7, 1, 4), (2, 1), (1, 2)),
    "empty blocks": ((3, 5), (3, 2, 1, 1), (0, 1, 0, 1)),
    "ascending": ((2, 5, 3), (1, 3), (2, 1)),
    "empty sequences": ((0, 3, 0, 2, 0), 2, None),
    "empty sequences in a staircase": ((3, 0, 2, 0), (3, 1), (2, 2)),
    "no token": ((), 2, None),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    lengths, heads, sequences = request.param
    per_sequence = [heads] * len(lengths) if sequences is None else []
    for h, count in zip(heads, sequences, strict=True) if sequences else ():
        per_sequence += [h] * count
    return lengths, heads, sequences, per_sequence


def offsets_of(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def dense(qkv, lengths, per_sequence, heads, keep=None, p=0.0):
    """One sequence and one head at a time, with a scale, a softmax and no packing."""
    out, start = qkv.new_zeros(qkv.shape[0], heads * D), 0
    pieces = []
    for length, active in zip(lengths, per_sequence, strict=True):
        rows = qkv[start : start + length]
        columns = []
        for head in range(active):
            q, k, v = rows[:, 3 * D * head :][:, : 3 * D].unflatten(1, (3, D)).unbind(1)
            if keep is None:
                columns.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0])
            else:
                probabilities = (q @ k.T / math.sqrt(D)).softmax(-1)
                kept = keep(start, length, head).to(qkv.dtype) / (1 - p)
                columns.append((probabilities * kept) @ v)
        pieces.append(F.pad(torch.cat(columns, 1), (0, heads * D - active * D)))
        start += length
    return torch.cat(pieces) if pieces else out


def active_rows(lengths, per_sequence, columns, per_head):
    """`[T, columns]`: whether a column belongs to an active head of the row's sequence."""
    extents = torch.tensor(per_sequence, dtype=torch.long)
    extents = extents.repeat_interleave(torch.tensor(lengths, dtype=torch.long)) * per_head
    return torch.arange(columns) < extents[:, None]


def test_agrees_with_torch(judge, randn, case):
    lengths, heads, sequences, per_sequence = case
    most = max(per_sequence, default=heads) if sequences is None else max(heads)
    qkv = randn(sum(lengths), HEADS * 3 * D)
    unread = ~active_rows(lengths, per_sequence, HEADS * 3 * D, 3 * D)

    def ours(qkv):
        offsets = offsets_of(lengths)
        return ops.attention(qkv, offsets, max(lengths, default=0), D, heads, sequences)

    def plain(qkv):
        return dense(qkv, lengths, per_sequence, most) + 0 * qkv[:, : most * D]

    active = active_rows(lengths, per_sequence, most * D, D)
    (grad,) = judge(ours, plain, [qkv], active, {0: unread})
    assert not grad[unread].any()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(randn, seed, p):
    lengths, heads, sequences = (3, 1, 2), (3, 1), (1, 2)
    qkv = randn(6, HEADS * 3 * D).requires_grad_()
    active = active_rows(lengths, (3, 1, 1), HEADS * D, D)

    def ours(qkv):
        out = ops.attention(qkv, offsets_of(lengths), 3, D, heads, sequences, p, seed)
        return out.masked_fill(~active, 0)

    assert torch.autograd.gradcheck(ours, [qkv], fast_mode=True)


@pytest.mark.parametrize(
    ("heads", "sequences", "first_rows"),
    [(3, None, (0, 0, 0)), ((3, 2), (1, 2), (0, 7, 7)), ((3, 2), (2, 1), (0, 0, 8))],
    ids=["one block", "two blocks", "other blocks"],
)
def test_dropout_follows_the_documented_mask(judge, randn, seed, heads, sequences, first_rows):
    """Mask row: the query's token counted from its block; column: head * 65536 + key."""
    lengths, p = (7, 1, 4), 0.4
    starts = offsets_of(lengths).tolist()[:-1]
    heads_of = torch.tensor(heads).repeat_interleave(torch.tensor(sequences or [3]))
    per_sequence = heads_of.tolist()

    def keep(start, length, head):
        first = first_rows[starts.index(start)]
        rows = torch.arange(start - first, start - first + length)[:, None]
        return keep_mask(seed, rows, head * 65536 + torch.arange(length), p)

    def ours(qkv):
        return ops.attention(qkv, offsets_of(lengths), 7, D, heads, sequences, p, seed)

    def plain(qkv):
        return dense(qkv, lengths, per_sequence, 3, keep, p)

    qkv = randn(12, HEADS * 3 * D)
    judge(ours, plain, [qkv], active_rows(lengths, per_sequence, HEADS * D, D))


def test_a_block_drops_out_as_if_it_were_alone(randn, seed):
    qkv = randn(12, HEADS * 3 * D)
    both = ops.attention(qkv, offsets_of((7, 1, 4)), 7, D, (3, 2), (1, 2), 0.4, seed)
    alone = ops.attention(qkv[7:], offsets_of((1, 4)), 4, D, 2, None, 0.4, seed)
    torch.testing.assert_close(both[7:, : 2 * D], alone)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sequences_do_not_see_each_other(randn, seed, p):
    lengths = (4, 3, 6)
    qkv = randn(13, HEADS * 3 * D)
    other = qkv.clone()
    other[4:7] = float("inf")
    other[7:] = float("nan")
    first, with_bad_mates = (
        ops.attention(x, offsets_of(lengths), 6, D, HEADS, p=p, seed=seed)[:4] for x in (qkv, other)
    )
    assert torch.equal(first, with_bad_mates)
    if p == 0:
        alone = ops.attention(qkv[4:7], offsets_of((3,)), 3, D, HEADS)
        torch.testing.assert_close(ops.attention(qkv, offsets_of(lengths), 6, D, HEADS)[4:7], alone)


def test_max_length_above_the_longest_and_int64_offsets_change_nothing(randn):
    qkv = randn(8, HEADS * 3 * D)
    want = ops.attention(qkv, offsets_of((5, 3)), 5, D, 2)
    got = ops.attention(qkv, offsets_of((5, 3), torch.int64), 9, D, 2)
    torch.testing.assert_close(got, want)


def test_large_scores_neither_overflow_nor_lose_the_maximum(randn):
    qkv = randn(6, 3 * D).float() * 100
    out = ops.attention(qkv, offsets_of((6,)), 6, D, 1)
    q, k, v = qkv.double().unflatten(1, (3, D)).unbind(1)
    want = (q @ k.T / math.sqrt(D)).softmax(-1) @ v
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-3)


def test_autocast_runs_in_its_type_and_leaves_float64_alone(randn):
    qkv = randn(5, HEADS * 3 * D).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(qkv, offsets_of((5,)), 5, D, 2)
        wide = ops.attention(qkv.double(), offsets_of((5,)), 5, D, 2)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    out.sum().backward()
    assert qkv.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "an extent must be in 1 to 3, got [0]"),
        ({"heads": 4}, "an extent must be in 1 to 3, got [4]"),
        ({"heads": (2, 1)}, "needs the rows of each block"),
        ({"heads": (2, 1), "sequences": (1, 2)}, "sum to 2 rows"),
        ({"heads": 2, "max_length": 65537}, "max_length must be at most 65536, got 65537"),
        ({"heads": 2, "p": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"heads": 2, "p": -0.1}, "dropout must be in [0, 1), got -0.1"),
        ({"heads": 2, "p": 0.1}, "dropout 0.1 needs a seed"),
        ({"heads": 2, "qkv": torch.zeros(5, 2, 9)}, "got [5, 2, 9], [3]"),
        ({"heads": 2, "offsets": torch.tensor(0)}, "[], "),
        (
            {"heads": 2, "qkv": torch.zeros(6, HEADS * 3 * D, requires_grad=True)},
            f"offsets end at the last row of qkv [6, {HEADS * 3 * D}], got 5",
        ),
        ({"heads": 2, "offsets": torch.tensor([0.0, 3, 5])}, "int32 or int64, got torch.float32"),
        ({"heads": 2, "offsets": torch.zeros(3, device="meta", dtype=torch.int32)}, "cpu, meta"),
    ],
)
def test_bad_input(arguments, message):
    good = {
        "qkv": torch.zeros(5, HEADS * 3 * D),
        "offsets": offsets_of((3, 2)),
        "max_length": 3,
        "head_size": D,
    }
    with pytest.raises(InputError) as error:
        ops.attention(**good | arguments)
    assert message in str(error.value)
