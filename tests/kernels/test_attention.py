"""Attention in Triton's interpreter, in each of its forms, with the smallest tiles."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from dynabert_fast import ops
from dynabert_fast.kernels import attention as kernels
from dynabert_fast.kernels import common
from dynabert_fast.kernels.common import Config
from dynabert_fast.ops import reference


def _shared():
    """`tests/ops/conftest.py`: the judge of all ops."""
    path = Path(__file__).parents[1] / "ops" / "conftest.py"
    spec = importlib.util.spec_from_file_location("judge_of_ops", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_OPS = _shared()
Judge, randn, seed = _OPS.Judge, _OPS.randn, _OPS.seed
nan_in_new_memory = _OPS.nan_in_new_memory

HEADS = 3  # stored
D = 8  # half of the least block: every access to a head is masked

#: Tiles (queries, keys) of each kernel. A sequence of 37 has 3 tiles of 16, the last one ragged.
FORMS = {
    "one tile": {"attention_short": (64, 64), "attention_backward_short": (64, 64)},
    "short": {"attention_short": (16, 64), "attention_backward_short": (64, 16)},
    "long": {
        "attention": (16, 16),
        "attention_backward_queries": (16, 16),
        "attention_backward_keys": (16, 16),
    },
    "long, oblong": {
        "attention": (32, 16),
        "attention_backward_queries": (16, 32),
        "attention_backward_keys": (32, 16),
    },
}

# lengths of the sequences, heads, sequences in each block of equal heads
CASES = {
    "one extent": ((37, 1, 16), 2, None),
    "all heads": ((5, 18), HEADS, None),
    "one head": ((33, 3), 1, None),
    "one token": ((1,), 2, None),
    "staircase": ((17, 1, 20, 2, 16), (3, 2, 1), (2, 1, 2)),
    "ascending, below all": ((2, 19, 3), (1, 2), (2, 1)),
    "empty blocks": ((18, 5), (3, 2, 1, 1), (0, 1, 0, 1)),
    "empty sequences": ((0, 23, 0, 2, 0), 2, None),
    "empty sequences in a staircase": ((3, 0, 20, 0), (3, 1), (2, 2)),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request, monkeypatch):
    """Tables that hold the tiles of one form alone."""
    use_tiles(monkeypatch, request.param)
    return request.param


def use_tiles(monkeypatch, tiles):
    for name in kernels.CONFIGS:
        sizes = tiles.get(name)
        configs = (Config.of(BLOCK_M=sizes[0], BLOCK_N=sizes[1]),) if sizes else ()
        table = dict.fromkeys(kernels.CONFIGS[name], configs)
        monkeypatch.setitem(kernels.CONFIGS, name, table)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, *call):
        ctx.call = call
        out, lse = kernels.attention(qkv, *call)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, lse = ctx.saved_tensors
        grad_qkv = kernels.attention_backward(grad, qkv, out, lse, *ctx.call)
        return grad_qkv, *([None] * len(ctx.call))


def offsets_of(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def both(lengths, heads, sequences, d=D, p=0.0, seed=None, dtype=torch.int32, longest=None):
    """The kernels and the reference, as functions of qkv."""
    offsets = offsets_of(lengths, dtype)
    longest = longest or max(lengths)
    blocks = ([heads], [len(lengths)]) if sequences is None else (list(heads), list(sequences))

    def ours(qkv):
        return Attention.apply(qkv, offsets, longest, *blocks, d, p, seed)

    def plain(qkv):
        with ops.use_backend("reference"):
            return ops.attention(qkv, offsets, longest, d, heads, sequences, p, seed)

    return ours, plain


def active_rows(lengths, heads, sequences, per_head, columns):
    """`[T, columns]`: whether a column belongs to an active head of the row's sequence."""
    if sequences is None:
        heads, sequences = (heads,), (len(lengths),)
    per_sequence = torch.tensor(heads).repeat_interleave(torch.tensor(sequences))
    extents = per_sequence.repeat_interleave(torch.tensor(lengths)) * per_head
    return torch.arange(columns) < extents[:, None]


def check(judge, randn, lengths, heads, sequences, d=D, stored=HEADS, **call):
    """Judged with NaN wherever nothing may be read; gradients beyond the heads are zero."""
    most = heads if sequences is None else max(heads)
    active = active_rows(lengths, heads, sequences, d, most * d)
    unread = ~active_rows(lengths, heads, sequences, 3 * d, stored * 3 * d)
    ours, plain = both(lengths, heads, sequences, d, **call)
    qkv = randn(sum(lengths), stored * 3 * d)
    (grad,) = judge(ours, plain, [qkv], active, {0: unread})
    assert not grad[unread].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_reference(randn, form, case):
    check(Judge(torch.float32), randn, *case)


@pytest.mark.parametrize(
    ("dtype", "case"), [(torch.bfloat16, "staircase"), (torch.float16, "one extent")], ids=str
)
def test_16_bit_types(randn, form, case, dtype):
    check(Judge(dtype), randn, *CASES[case])


@pytest.mark.parametrize(
    ("dtype", "case"), [(torch.float32, "staircase"), (torch.bfloat16, "all heads")], ids=str
)
def test_drops_out_what_the_reference_does(randn, seed, form, case, dtype):
    check(Judge(dtype), randn, *CASES[case], p=0.4, seed=seed)


@pytest.mark.parametrize("d", [16, 40])
def test_head_sizes(randn, form, d):
    check(Judge(torch.float32), randn, (19, 2), 1, None, d=d, stored=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 5])
def test_odd_head_sizes(randn, seed, d, dtype):
    check(Judge(dtype), randn, (35, 2), (1, 2), (1, 1), d=d, p=0.4, seed=seed)


@pytest.mark.parametrize("longest", [3, 16, 17, 70, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shipped_configurations(randn, dtype, longest):
    check(Judge(dtype), randn, (longest, 2), (2, 1), (1, 1), stored=2)


def test_log_sum_exp_is_the_references(randn, form):
    lengths, heads, sequences = CASES["staircase"]
    qkv = randn(sum(lengths), HEADS * 3 * D).float()
    call = (offsets_of(lengths), max(lengths), list(heads), list(sequences), D, 0.0, None)
    got, want = kernels.attention(qkv, *call)[1], reference.attention(qkv, *call)[1]
    active = active_rows(lengths, heads, sequences, 1, max(heads))
    torch.testing.assert_close(got[active], want[active])


def test_int64_offsets_and_max_length_above_the_longest_change_nothing(randn, form):
    ours, _ = both((20, 3), 2, None)
    others, _ = both((20, 3), 2, None, dtype=torch.int64, longest=37)
    qkv = randn(23, HEADS * 3 * D).float()
    assert torch.equal(ours(qkv), others(qkv))


@pytest.mark.parametrize("columns", [3 * D, 7 * D, 96], ids=["one head", "rest", "heads"])
def test_views(randn, form, columns):
    """Rows further apart than they are long, and columns that make no whole head."""
    agrees_in_views(randn, 96, columns)


@pytest.mark.parametrize("columns", [3 * D, 3 * D + 1, 96], ids=["one head", "rest", "heads"])
def test_views_whose_strides_are_not_round(randn, columns):
    agrees_in_views(randn, 97, columns)


def agrees_in_views(randn, stride, columns):
    wide = randn(20, stride).float()[:, :columns]
    grad, far = randn(20, D).float(), randn(20, stride).float()
    call = (offsets_of((17, 3)), 17, [1], [2], D, 0.0, None)
    head = wide[:, : 3 * D].contiguous()
    dense = kernels.attention(head, *call)
    want = kernels.attention_backward(grad, head, *dense, *call)
    for qkv in (wide, wide.T.contiguous().T):
        out, lse = kernels.attention(qkv, *call)
        torch.testing.assert_close((out, lse), dense)
        for spread in (grad, far[:, :D].copy_(grad)):
            got = kernels.attention_backward(spread, qkv, out, lse, *call)
            assert got.shape == qkv.shape
            torch.testing.assert_close(got[:, : 3 * D], want)
            assert not got[:, 3 * D :].any()


@pytest.mark.parametrize(("heads", "sequences"), [([2], [0]), ([2], [3]), ([2, 1], [1, 1])])
def test_no_token(form, heads, sequences):
    call = (torch.zeros(sum(sequences) + 1, dtype=torch.int32), 0, heads, sequences, D, 0.0, None)
    qkv = torch.empty(0, HEADS * 3 * D)
    out, lse = kernels.attention(qkv, *call)
    assert (out.shape, lse.shape) == ((0, 2 * D), (0, 2))
    assert kernels.attention_backward(out, qkv, out, lse, *call).shape == qkv.shape


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sequences_do_not_see_each_other(randn, seed, form, p):
    ours, _ = both((18, 3, 6), 1, None, p=p, seed=seed if p else None)
    qkv = randn(27, 3 * D).float()
    other = qkv.clone()
    other[18:21] = float("inf")
    other[21:] = float("nan")
    results = []
    for x in (qkv, other):
        leaf = x.clone().requires_grad_()
        out = ours(leaf)
        out.backward(torch.ones_like(out))
        results.append((out[:18], leaf.grad[:18]))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_neither_overflow_nor_lose_the_maximum(randn, form, dtype):
    ours, plain = both((37,), 1, None)
    qkv = randn(37, 3 * D) * 100
    Judge(dtype)(ours, plain, [qkv])


def test_scores_far_below_zero(form):
    """Where the log-sum-exp is far below zero, a key that does not exist would win with score 0."""
    ours, plain = both((19,), 1, None)
    q = torch.ones(19, D)
    k = -100 * q + torch.arange(19)[:, None] / 8
    qkv = torch.cat([q, k, k / 100], 1)
    Judge(torch.float32)(ours, plain, [qkv.double()])


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("head_size", [1, 8, 64, 80, 128, 256])
def test_every_call_has_a_configuration(kind, head_size):
    for max_length in (1, 16, 17, 64, 65, 128, 129, 65536):
        for name, unit in itertools.product(kernels.CONFIGS, (1, 8)):
            configs = kernels._candidates(name, kind, head_size, max_length, unit)
            side = kernels._WHOLE.get(name)
            assert configs or side
            assert all(c[side] >= max_length for c in configs if side)


def test_a_small_batch_gets_small_tiles(randn, monkeypatch):
    tiles = (Config.of(BLOCK_M=64, BLOCK_N=64), Config.of(BLOCK_M=16, BLOCK_N=64))
    table = {("ieee", 64): tiles}
    monkeypatch.setitem(kernels.CONFIGS, "attention_short", table)
    seen = []

    def first(kernel, key, configs, launch):
        seen.append(configs[0]["BLOCK_M"])
        return configs[0]

    monkeypatch.setattr(common, "_chooser", [first])
    for count in (1, 64):
        ours, _ = both((1,) * count, 2, None, longest=64)
        ours(randn(count, 6 * D).float())
    assert seen == [16, 64]


def test_bytes_and_flops():
    lengths, blocks = (10, 4, 3), ((3, 1), (1, 2))
    rows, pairs = 3 * 10 + 7, 3 * 100 + 16 + 9
    assert kernels.bytes_and_flops(lengths, *blocks, 64, 2) == (
        rows * (4 * 64 * 2 + 4),
        4 * pairs * 64,
    )
    assert kernels.bytes_and_flops(lengths, *blocks, 64, 2, backward=True) == (
        rows * (8 * 64 * 2 + 4),
        10 * pairs * 64,
    )


def test_specimens_name_every_parameter():
    for specimen in kernels.specimens():
        assert list(specimen.signature) == specimen.kernel.arg_names
        constant = {n for n, kind in specimen.signature.items() if kind == "constexpr"}
        assert constant == set(specimen.constants)
