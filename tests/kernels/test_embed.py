"""`embed` in Triton's interpreter: runs of equal ids begin and end at every place of a chunk."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.kernels import common, embed
from dynabert_fast.kernels.common import Config
from dynabert_fast.ops import reference, registry


def _shared():
    """`tests/ops/conftest.py`: the judge of all ops."""
    path = Path(__file__).parents[1] / "ops" / "conftest.py"
    spec = importlib.util.spec_from_file_location("judge_of_ops", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_OPS = _shared()
judge, randn, seed = _OPS.judge, _OPS.randn, _OPS.seed
nan_in_new_memory = _OPS.nan_in_new_memory

V, TYPES, POSITIONS, D, EPS = 17, 2, 7, 13, 1e-5
P = 0.3
SHIPPED = {name: getattr(embed, name) for name in ("_CHUNK", "_COLUMNS", "_RUNS", "_JOIN")}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The backend serves the CPU, on which kernels are interpreted."""
    backend = replace(ops.backends()["triton"], devices=("cpu",), supports=lambda *_: None)
    monkeypatch.setitem(registry._backends, "triton", backend)
    monkeypatch.setattr(registry, "_resolved", {})
    with ops.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Four rows of up to 16 columns; four places in a chunk, of which two are joined at a time."""
    configs = {"embed": Config.of(TILE=64), "embed_backward": Config.of(TILE=64, AHEAD=1)}
    monkeypatch.setattr(common, "_chooser", [lambda kernel, *_: configs[kernel]])
    monkeypatch.setattr(embed, "_CHUNK", 4)
    monkeypatch.setattr(embed, "_COLUMNS", 8)
    monkeypatch.setattr(embed, "_RUNS", Config.of(warps=1, CHUNK=4))
    monkeypatch.setattr(embed, "_JOIN", Config.of(CHUNK=4, BLOCK=2))


@pytest.fixture
def tables(randn):
    return randn(V, D), randn(TYPES, D), randn(POSITIONS, D), randn(D), randn(D)


def ids_of(tokens):
    """Ids that repeat, with the first and last of each table among them."""
    word = torch.tensor([0, 16, 3, 3, 3, 8, 0]).repeat(tokens // 7 + 1)[:tokens]
    token_type = torch.tensor([0, 1, 1, 0, 0, 1, 0]).repeat(tokens // 7 + 1)[:tokens]
    return word, token_type, torch.arange(tokens) % POSITIONS


def agree(judge, tables, seed, tokens, p):
    ids = ids_of(tokens)
    keep = torch.ones(tokens, D, dtype=torch.bool)
    if p:
        rows = torch.arange(tokens)[:, None]
        keep = reference.keep_mask(seed, rows, torch.arange(D), p)

    def plain(word, token_type, position, weight, bias):
        parts = zip(ids, (word, token_type, position), strict=True)
        z = sum(F.embedding(index, table) for index, table in parts)
        return F.layer_norm(z, [D], weight, bias, EPS) * keep / (1 - p)

    grad_word, *_ = judge(lambda *t: ops.embed(*ids, *t, EPS, p, seed), plain, tables)
    unused = torch.ones(V, dtype=torch.bool).index_fill(0, ids[0], False)
    assert not grad_word[unused].any()


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("tokens", [7, 1, 0, 37])
def test_agrees_with_torch(judge, tables, seed, tokens, p):
    agree(judge, tables, seed, tokens, p)


def table_gradients(grad_z, ids):
    """As `embed_backward` takes them, of three tables."""
    sizes = torch.tensor((V, TYPES, POSITIONS))
    first = torch.tensor((0, V, V + TYPES))
    tables = [grad_z.new_zeros(n, grad_z.shape[1]) for n in sizes]
    keys = torch.cat([i + f for i, f in zip(ids, first, strict=True)]).int()
    embed._table_gradients(grad_z, keys, tables)
    return tables


# A run of n rows begins after m others: from within a chunk of 4, and through more chunks than are
# joined at a time.
@pytest.mark.parametrize("before", [0, 1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 21])
def test_runs(randn, before, length):
    after = 3
    grad_z = randn(before + length + after, D).float()
    word = torch.tensor([2] * before + [5] * length + [6] * after)
    ids = word, (word > 5).long(), torch.arange(len(word)) % POSITIONS
    order = torch.randperm(len(word), generator=torch.Generator().manual_seed(length))
    got = table_gradients(grad_z[order], [i[order] for i in ids])
    for gradient, index in zip(got, ids, strict=True):
        want = torch.zeros_like(gradient, dtype=torch.float64).index_add(0, index, grad_z.double())
        torch.testing.assert_close(gradient.double(), want, rtol=1e-6, atol=1e-6)
        unused = torch.ones(len(gradient), dtype=torch.bool).index_fill(0, index, False)
        assert not gradient[unused].any()


@pytest.mark.parametrize("dtype", [torch.float32], indirect=True, ids=str)
def test_ids_without_a_row(tables, dtype):
    """Their tokens' results are NaN; they read and write nothing, and other tokens are as ever."""
    ids, bad = [i.clone() for i in ids_of(20)], {0: (2, V), 1: (9, TYPES), 2: (16, POSITIONS)}
    ids[1][:] = 1  # so that the other type's row must stay as it is
    ids[1][:2] = 0
    keep = torch.ones(20, dtype=torch.bool)
    for table, (token, row) in bad.items():
        ids[table][token], ids[table][token + 1] = row, -1
        keep[token : token + 2] = False
    leaves = [t.to(dtype).requires_grad_() for t in tables]
    y = ops.embed(*ids, *leaves, EPS, 0.0, None)
    assert y[~keep].isnan().all()
    y[keep].square().sum().backward()
    found = [leaf.grad for leaf in leaves[:3]]
    others = [t.to(dtype).requires_grad_() for t in tables]
    z = ops.embed(*(i[keep] for i in ids), *others, EPS, 0.0, None)
    assert torch.equal(z, y[keep])
    z.square().sum().backward()
    for got, leaf, index in zip(found, others, ids, strict=False):
        # The rows that such tokens have in other tables are NaN, and no others.
        named = index[~keep]
        spoilt = torch.zeros(len(got), dtype=torch.bool)
        spoilt[named[(named >= 0) & (named < len(got))]] = True
        assert not spoilt.all()
        assert torch.equal(got.isnan().any(1), spoilt)
        torch.testing.assert_close(got[~spoilt], leaf.grad[~spoilt])


@pytest.mark.parametrize("index", [0, 1])
def test_one_id_for_all(randn, index):
    """Each table's run goes from its first place to its last: word and type meet within a chunk."""
    grad_z = randn(37, D).float()
    ids = [torch.full((37,), i) for i in (index * (V - 1), index * (TYPES - 1), index * 6)]
    for gradient, i in zip(table_gradients(grad_z, ids), ids, strict=True):
        torch.testing.assert_close(gradient[i[0]], grad_z.sum(0))
        assert gradient.count_nonzero() == D


def test_sums_are_rounded_once():
    """Added up in bfloat16, 300 ones would stop at 256."""
    grad_z = torch.ones(300, 1, dtype=torch.bfloat16)
    ids = [torch.zeros(300, dtype=torch.long)] * 3
    assert all((g[0] == 300).all() for g in table_gradients(grad_z, ids))


def test_a_spoilt_row_stays_in_its_tables_rows(randn):
    grad_z = randn(37, D).float()
    grad_z[5] = float("nan")
    ids = ids_of(37)
    for gradient, index in zip(table_gradients(grad_z, ids), ids, strict=True):
        spoilt = gradient.isnan().all(1)
        assert spoilt.nonzero().tolist() == [[index[5]]]
        assert not gradient[~spoilt].isnan().any()


@pytest.mark.parametrize("form", range(6))
@pytest.mark.parametrize("dtype", [torch.float32], indirect=True, ids=str)
def test_shipped_configurations(judge, tables, seed, monkeypatch, form):
    """Of both directions; chunks, which do not vary, as they are shipped."""
    monkeypatch.setattr(common, "_chooser", [lambda kernel, key, configs, launch: configs[form]])
    for name, value in SHIPPED.items():
        monkeypatch.setattr(embed, name, value)
    agree(judge, tables, seed, 37, P)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_strided_views(tables, seed, dtype, index):
    ids = [i.to(index) for i in ids_of(7)]
    plain = [t.to(dtype) for t in tables]
    views = []
    for t in plain:
        wide = torch.full([n + 3 for n in t.shape], float("nan"), dtype=dtype)
        views.append(wide[tuple(slice(1, n + 1) for n in t.shape)].copy_(t))
    want = embed.embed(*ids, *plain, EPS, P, seed)
    got = embed.embed(*(torch.stack([i, i], 1)[:, 0] for i in ids), *views, EPS, P, seed)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    transposed = [t.t().contiguous().t() for t in plain]
    got = embed.embed(*ids, *transposed, EPS, P, seed)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_every_tokens_gradient_is_added_up(tables):
    word, *rest = (t.float() for t in tables)
    word.requires_grad_()
    ids = torch.full((6,), 4), torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.long)
    ops.embed(*ids, word, *rest, EPS).square().sum().backward()
    once = word.grad.clone()
    word.grad = None
    ops.embed(*(i[:1] for i in ids), word, *rest, EPS).square().sum().backward()
    torch.testing.assert_close(once, 6 * word.grad)
