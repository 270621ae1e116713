from __future__ import annotations

import pytest
import torch

from dynabert_fast import ops
from dynabert_fast.errors import InputError

K, D = 11, 13


@pytest.mark.parametrize("spare", [0, 3], ids=["x as wide as needed", "x wider"])
def test_agrees_with_torch(judge, randn, blocks, spare):
    k = blocks.largest
    inputs = randn(blocks.total, k + spare), randn(K, D), randn(D)
    active = blocks.active(k + spare)
    beyond = (torch.arange(K) >= k)[:, None].expand(K, D)  # rows that no block may read

    def ours(x, weight_t, bias):
        return ops.contract(x, weight_t, bias, blocks.extent, blocks.rows)

    def plain(x, weight_t, bias):
        return x.masked_fill(~active, 0)[:, :k] @ weight_t[:k] + bias

    poison = {0: ~active, 1: beyond}
    grad_x, grad_weight, _ = judge(ours, plain, inputs, poison=poison)
    assert not grad_x[~active].any()
    assert not grad_weight[k:].any()


def test_gradcheck(randn):
    inputs = [t.requires_grad_() for t in (randn(5, 7), randn(K, D), randn(D))]
    assert torch.autograd.gradcheck(lambda *t: ops.contract(*t, [7, 2], [3, 2]), inputs)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight_t", "bias"])
def test_gradient_of_one_input_alone(randn, which):
    inputs = randn(5, 7), randn(K, D), randn(D)

    def grads(needed):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        ops.contract(*leaves, 7).square().sum().backward()
        return [t.grad for t in leaves]

    alone = grads({which})
    assert torch.equal(alone[which], grads({0, 1, 2})[which])
    assert [g is not None for g in alone] == [i == which for i in range(3)]


def test_follows_expand_on_the_same_blocks(randn):
    x, up, down = randn(5, D), randn(K, D), randn(K, D)
    inner = ops.expand(x, up, torch.zeros(K, dtype=x.dtype), [7, 2], [3, 2])
    out = ops.contract(inner, down, torch.zeros(D, dtype=x.dtype), [7, 2], [3, 2])
    torch.testing.assert_close(out[:3], x[:3] @ up[:7].T @ down[:7])
    torch.testing.assert_close(out[3:], x[3:] @ up[:2].T @ down[:2])


def test_autocast_runs_in_its_type_and_leaves_float64_alone(randn):
    x, weight_t, bias = (t.float().requires_grad_() for t in (randn(5, 7), randn(K, D), randn(D)))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.contract(x, weight_t, bias, 7)
        wide = ops.contract(x.double(), weight_t.double(), bias.double(), 7)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    out.sum().backward()
    assert {x.grad.dtype, weight_t.grad.dtype, bias.grad.dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extent": 0}, "an extent must be in 1 to 11, got [0]"),
        ({"extent": 12}, "an extent must be in 1 to 11, got [12]"),
        ({"extent": 8}, "x [T, >= extent]"),
        ({"extent": [3, 2]}, "needs the rows of each block"),
        ({"extent": [3, 2], "rows": [2, 2]}, "sum to 5 rows, got extents [3, 2] and rows [2, 2]"),
        ({"extent": 3, "bias": torch.zeros(11)}, "got [5, 7], [11, 13], [11]"),
        ({"extent": 3, "x": torch.zeros(2, 5, 7)}, "got [2, 5, 7], [11, 13], [13]"),
        ({"extent": 3, "bias": torch.zeros(D, device="meta")}, "got cpu, cpu, meta; move"),
    ],
)
def test_bad_input(arguments, message):
    good = {"x": torch.zeros(5, 7), "weight_t": torch.zeros(K, D), "bias": torch.zeros(D)}
    with pytest.raises(InputError) as error:
        ops.contract(**good | arguments)
    assert message in str(error.value)
