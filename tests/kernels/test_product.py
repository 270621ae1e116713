"""`expand` and `contract` in Triton, interpreted, as tests/ops judge them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast.kernels import common, product
from dynabert_fast.kernels.common import Config

_PATH = Path(__file__).parents[1] / "ops" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("ops_conftest", _PATH)
shared = importlib.util.module_from_spec(_SPEC)
__import__("sys").modules[_SPEC.name] = shared  # dataclasses look their module up
_SPEC.loader.exec_module(shared)
nan_in_new_memory, blocks, judge = shared.nan_in_new_memory, shared.blocks, shared.judge
randn = shared.randn

D, K = 13, shared.MOST
ACTIVATIONS = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
#: More than one tile in every dimension of D and K, and a remainder of most.
SMALL = {
    "product": Config.of(BLOCK_M=4, BLOCK_N=8, BLOCK_K=8),
    "weight_gradient": Config.of(BLOCK_I=4, BLOCK_C=8, BLOCK_R=4),
    "slope": Config.of(BLOCK_M=4, BLOCK_N=8),
    "add_parts": Config.of(BLOCK_M=4, BLOCK_N=8),
}
#: Many steps, few programs: sums are cut into parts.
LONG = SMALL | {
    "product": Config.of(BLOCK_M=8, BLOCK_N=16, BLOCK_K=8),
    "weight_gradient": Config.of(BLOCK_I=32, BLOCK_C=16, BLOCK_R=4),
    "add_parts": Config.of(BLOCK_M=32, BLOCK_N=8),
}
STAIRS = shared.RowBlocks((K, 8, 3), (3, 5, 6), 14)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


#: float16 differs from bfloat16 in what is stored only: few tests suffice.
every_type = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def choose(monkeypatch, configs):
    monkeypatch.setattr(common, "_chooser", [lambda kernel, *_: configs[kernel]])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    choose(monkeypatch, SMALL)


class Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *call):
        out, pre = product.expand(x, weight, bias, *call, True)
        ctx.save_for_backward(x, weight, pre)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = product.expand_backward(grad, *ctx.saved_tensors, *ctx.call, True, True)
        return *grads, None, None, None


class Contract(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_t, bias, *call):
        ctx.save_for_backward(x, weight_t)
        ctx.call = call
        return product.contract(x, weight_t, bias, *call)

    @staticmethod
    def backward(ctx, grad):
        grads = product.contract_backward(grad, *ctx.saved_tensors, *ctx.call, True, True)
        return *grads, None, None


def lists(blocks):
    """Extents and rows as kernels are given them."""
    if blocks.rows is None:
        return [blocks.extent], [blocks.total]
    return list(blocks.extent), list(blocks.rows)


def judge_expand(judge, randn, blocks, activation, hidden=D, height=K):
    inputs = randn(blocks.total, hidden), randn(height, hidden), randn(height)
    k = blocks.largest
    beyond = torch.arange(height) >= k  # rows of the weight that no block may read

    def ours(x, weight, bias):
        return Expand.apply(x, weight, bias, *lists(blocks), activation)

    def plain(x, weight, bias):
        return ACTIVATIONS[activation](F.linear(x, weight, bias))[:, :k]

    poison = {1: beyond[:, None].expand(height, hidden), 2: beyond}
    _, grad_weight, grad_bias = judge(ours, plain, inputs, blocks.active(k), poison)
    assert not grad_weight[k:].any()
    assert not grad_bias[k:].any()


def judge_contract(judge, randn, blocks, spare=0, hidden=D, height=K):
    k = blocks.largest
    inputs = randn(blocks.total, k + spare), randn(height, hidden), randn(hidden)
    active = blocks.active(k + spare)
    beyond = (torch.arange(height) >= k)[:, None].expand(height, hidden)

    def ours(x, weight_t, bias):
        return Contract.apply(x, weight_t, bias, *lists(blocks))

    def plain(x, weight_t, bias):
        return x.masked_fill(~active, 0)[:, :k] @ weight_t[:k] + bias

    grad_x, grad_weight, _ = judge(ours, plain, inputs, poison={0: ~active, 1: beyond})
    assert not grad_x[~active].any()
    assert not grad_weight[k:].any()


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_expand(judge, randn, blocks, activation):
    judge_expand(judge, randn, blocks, activation)


@every_type
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_other_activations(judge, randn, activation):
    judge_expand(judge, randn, STAIRS, activation)


@pytest.mark.parametrize("spare", [0, 3], ids=["x as wide as needed", "x wider"])
def test_contract(judge, randn, blocks, spare):
    judge_contract(judge, randn, blocks, spare)


@pytest.mark.parametrize("extent", range(1, K + 1))
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_every_extent(judge, randn, extent):
    judge_expand(judge, randn, shared.RowBlocks(extent, None, 5), "relu")
    judge_contract(judge, randn, shared.RowBlocks(extent, None, 5), 1)


@every_type
def test_multiples_of_eight(judge, randn):
    """No remainders: what every real model runs."""
    stairs = shared.RowBlocks((8, 24, 16), (5, 3, 4), 12)
    judge_expand(judge, randn, stairs, "gelu", hidden=16, height=24)
    judge_contract(judge, randn, stairs, 8, hidden=16, height=24)


@pytest.mark.parametrize("which", [min, max], ids=["smallest", "largest"])
def test_shipped_tiles(judge, randn, monkeypatch, which):
    """Tiles larger than the tensors; the largest are stored in halves."""

    def chooser(kernel, key, configs, launch):
        launch(configs[0])  # as what measures does: a second launch gives the same
        return which(configs, key=lambda c: c.blocks[0][1] * c.blocks[1][1])

    monkeypatch.setattr(common, "_chooser", [chooser])
    judge_expand(judge, randn, STAIRS, "gelu")
    judge_contract(judge, randn, STAIRS)


class TestSplitSums:
    """Sums long enough to be cut into parts, which `add_parts` adds."""

    HEIGHT = 83

    @pytest.fixture(autouse=True)
    def parts(self, monkeypatch):
        made = []

        def parts(programs, steps):
            made.append(original(programs, steps))
            return made[-1]

        original = product._parts
        monkeypatch.setattr(product, "_parts", parts)
        choose(monkeypatch, LONG)
        yield
        assert max(made) > 1

    CASES = {
        "one extent": shared.RowBlocks(77, None, 5),
        "staircase": shared.RowBlocks((80, 9, 41), (2, 1, 2), 5),
        "rows": shared.RowBlocks(35, None, 41),
        "rows in a staircase": shared.RowBlocks((2, 11), (17, 18), 35),
    }

    @pytest.mark.parametrize("blocks", CASES.values(), ids=CASES)
    def test_contract(self, judge, randn, blocks):
        judge_contract(judge, randn, blocks, 1, height=self.HEIGHT)

    @pytest.mark.parametrize("blocks", CASES.values(), ids=CASES)
    def test_expand(self, judge, randn, blocks):
        judge_expand(judge, randn, blocks, "", height=self.HEIGHT)


def test_parts_depend_on_sizes_alone_and_leave_none_empty():
    for programs in (1, 7, 60, 66, 67, 132, 1000):
        for steps in (1, 3, 4, 7, 8, 31, 64, 1000):
            parts = product._parts(programs, steps)
            assert parts == product._parts(programs, steps)
            assert 1 <= parts <= max(1, steps // 4)
            assert parts == 1 or programs * parts <= 132


def views(t):
    """The same values in other memory."""
    wider = torch.full((t.shape[0] * 2, t.shape[1] + 5), float("nan"), dtype=t.dtype)
    wider[::2, 2:-3] = t
    return {"rows apart": wider[::2, 2:-3], "transposed": t.T.contiguous().T}


@pytest.mark.parametrize("view", ["rows apart", "transposed"])
def test_strides_do_not_matter(randn, view):
    extents, rows = lists(STAIRS)
    x, inner = randn(14, D).float(), randn(14, K).float()
    weight, grad, grad_out = randn(K, D).float(), randn(14, K).float(), randn(14, D).float()
    of_d, of_k = torch.randn(2 * D)[::2], torch.randn(2 * K)[::2]
    active = STAIRS.active(K)

    def results(x, inner, weight, grad, grad_out, of_d, of_k):
        out, pre = product.expand(x, weight, of_k, extents, rows, "gelu", True)
        call = extents, rows, "gelu", True, True
        return (
            out.masked_fill(~active, 0),
            pre.masked_fill(~active, 0),
            *product.expand_backward(grad, x, weight, pre, *call),
            product.contract(inner, weight, of_d, extents, rows),
            *product.contract_backward(grad_out, inner, weight, extents, rows, True, True),
        )

    plain = x, inner, weight, grad, grad_out
    expected = results(*plain, of_d.contiguous(), of_k.contiguous())
    got = results(*(views(t)[view] for t in plain), of_d, of_k)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("need_weight", [False, True])
def test_only_what_is_needed(randn, need_x, need_weight):
    extents, rows = lists(STAIRS)
    x, inner, weight = randn(14, D).float(), randn(14, K).float(), randn(K, D).float()
    grad, pre, grad_out = randn(14, K).float(), randn(14, K).float(), randn(14, D).float()
    for backward, arguments in (
        (product.expand_backward, (grad, x, weight, pre, extents, rows, "gelu")),
        (product.contract_backward, (grad_out, inner, weight, extents, rows)),
    ):
        everything = backward(*arguments, True, True)
        got = backward(*arguments, need_x, need_weight)
        for g, e, needed in zip(got, everything, (need_x, need_weight, need_weight), strict=True):
            assert torch.equal(g, e if needed else torch.empty(0))


def test_pre_is_saved_only_where_asked_for(randn):
    x, weight, bias = randn(5, D).float(), randn(K, D).float(), randn(K).float()
    out, pre = product.expand(x, weight, bias, [7], [5], "gelu", True)
    assert torch.equal(product.expand(x, weight, bias, [7], [5], "", False)[0], pre)
    alone, none = product.expand(x, weight, bias, [7], [5], "gelu", False)
    assert torch.equal(alone, out)
    assert none.shape == product.expand(x, weight, bias, [7], [5], "", True)[1].shape == (0,)


def test_results_repeat(randn, monkeypatch):
    choose(monkeypatch, LONG)
    x, weight, grad = randn(41, D).float(), randn(83, D).float(), randn(41, 83).float()
    arguments = grad, x, weight, x, [80, 33], [20, 21], "", True, True
    for one, other in zip(*(product.expand_backward(*arguments) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("op", "options", "elements", "products"),
    [
        # Rows of 4 and 2 columns, 3 and 5 of them: 22 elements within extents, D 10, K 6.
        ("expand", {}, 80 + 40 + 4 + 22, 220),
        ("expand", {"activation": "gelu", "keep_pre": True}, 80 + 40 + 4 + 44, 220),
        ("contract", {}, 22 + 40 + 10 + 80, 220),
        ("expand_backward", {"activation": "gelu"}, 44 + 160 + 40 + 60 + 6, 440),
        ("contract_backward", {}, 80 + 44 + 40 + 60 + 10, 440),
    ],
)
def test_bytes_and_flops(op, options, elements, products):
    counted = product.bytes_and_flops(op, [4, 2], [3, 5], D=10, K=6, size=2, **options)
    assert counted == (2 * elements, 2 * products)


def test_configurations_that_may_be_chosen_unmeasured_fit_every_card():
    for configs, size in (
        (product.CONFIGS, 2),
        (product.TF32_CONFIGS, 4),
        (product.IEEE_CONFIGS, 4),
        (product.GRADIENT_CONFIGS, 2),
        (product.TF32_GRADIENT_CONFIGS, 4),
        (product.IEEE_GRADIENT_CONFIGS, 4),
    ):
        for config in configs:
            rows, columns, depth = (n for _, n in config.blocks)
            assert config.stages * (rows + columns) * depth * size <= 99 * 1024


def test_few_rows_get_small_tiles(randn):
    def first(rows, columns):
        x = torch.empty(1, dtype=torch.bfloat16)
        none = ()
        return product._select(product.CONFIGS, none, none, none, x, rows, columns)[0]

    assert first(4096, 3072)["BLOCK_M"] == 128
    assert first(16, 768)["BLOCK_M"] == 16
