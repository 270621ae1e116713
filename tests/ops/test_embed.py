from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.ops.reference import keep_mask

V, TYPES, POSITIONS, D, EPS = 17, 2, 7, 13, 1e-5


def ids_of(tokens):
    """Ids that repeat, with the first and last of each table among them."""
    word = torch.tensor([0, 16, 3, 3, 3, 8, 0])[:tokens]
    token_type = torch.tensor([0, 1, 1, 0, 0, 1, 0])[:tokens]
    return word, token_type, torch.arange(POSITIONS)[:tokens]


@pytest.fixture
def tables(randn):
    return randn(V, D), randn(TYPES, D), randn(POSITIONS, D), randn(D), randn(D)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [7, 1, 0])
def test_agrees_with_torch(judge, tables, seed, tokens, p):
    ids = ids_of(tokens)
    keep = torch.ones(tokens, D, dtype=torch.bool)
    if p:
        keep = keep_mask(seed, torch.arange(tokens)[:, None], torch.arange(D), p)

    def plain(word, token_type, position, weight, bias):
        parts = zip(ids, (word, token_type, position), strict=True)
        z = sum(F.embedding(index, table) for index, table in parts)
        return F.layer_norm(z, [D], weight, bias, EPS) * keep / (1 - p)

    grad_word, *_ = judge(lambda *t: ops.embed(*ids, *t, EPS, p, seed), plain, tables)
    unused = torch.ones(V, dtype=torch.bool).index_fill(0, ids[0], False)
    assert not grad_word[unused].any()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(tables, seed, p):
    inputs = [t.requires_grad_() for t in tables]

    def ours(*inputs):
        return ops.embed(*ids_of(7), *inputs, EPS, p, seed)

    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)


def test_every_tokens_gradient_is_added_up(tables):
    word, *rest = tables
    word.requires_grad_()
    ids = torch.full((6,), 4), torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.long)
    ops.embed(*ids, word, *rest, EPS).square().sum().backward()
    once = word.grad.clone()
    word.grad = None
    ops.embed(*(i[:1] for i in ids), word, *rest, EPS).square().sum().backward()
    torch.testing.assert_close(once, 6 * word.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_type_ids": torch.zeros(4, dtype=torch.long)}, "got [7], [4], [7]"),
        ({"position_ids": torch.zeros(8, dtype=torch.long)}, "got [7], [7], [8]"),
        ({"p": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"p": 0.1}, "dropout 0.1 needs a seed"),
        ({"word": torch.zeros(20, 4096)}, "tables [V, D]"),
        ({"bias": torch.zeros(3)}, "tables [V, D]"),
        ({"position": torch.zeros(20)}, "tables [V, D]"),
        ({"position_ids": torch.full((7,), 1.7)}, "int32 or int64, got torch.float32"),
        ({"input_ids": torch.ones(7, dtype=torch.bool)}, "int32 or int64, got torch.bool"),
        ({"input_ids": torch.zeros(7, device="meta", dtype=torch.long)}, "got cpu, meta; move"),
    ],
)
def test_bad_input(tables, arguments, message):
    names = ("input_ids", "token_type_ids", "position_ids")
    tensors = ("word", "token_type", "position", "weight", "bias")
    good = dict(zip(names + tensors, (*ids_of(7), *tables), strict=True)) | {"eps": EPS}
    with pytest.raises(InputError) as error:
        ops.embed(**good | arguments)
    assert message in str(error.value)


def test_ids_must_be_packed(tables):
    padded = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(InputError, match="three id tensors"):
        ops.embed(padded, padded, padded, *tables, EPS)
