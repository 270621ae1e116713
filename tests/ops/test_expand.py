from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.errors import InputError

D, K = 13, 11

ACTIVATIONS = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def test_every_activation_is_tested():
    assert set(ops.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_torch(judge, randn, blocks, activation):
    inputs = randn(blocks.total, D), randn(K, D), randn(K)
    active, k = blocks.active(blocks.largest), blocks.largest
    beyond = torch.arange(K) >= k  # rows of the weight that no block may read

    def ours(x, weight, bias):
        return ops.expand(x, weight, bias, blocks.extent, blocks.rows, activation)

    def plain(x, weight, bias):
        return ACTIVATIONS[activation](F.linear(x, weight, bias))[:, :k]

    poison = {1: beyond[:, None].expand(K, D), 2: beyond}
    _, grad_weight, grad_bias = judge(ours, plain, inputs, active, poison)
    assert not grad_weight[k:].any()
    assert not grad_bias[k:].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(randn, activation):
    inputs = [t.requires_grad_() for t in (randn(5, D), randn(K, D), randn(K))]
    active = torch.arange(7) < torch.tensor([7, 7, 7, 2, 2])[:, None]

    def ours(x, weight, bias):
        return ops.expand(x, weight, bias, [7, 2], [3, 2], activation).masked_fill(~active, 0)

    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
def test_gradient_of_one_input_alone(randn, which):
    inputs = randn(5, D), randn(K, D), randn(K)

    def grads(needed):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        ops.expand(*leaves, 7, activation="gelu").square().sum().backward()
        return [t.grad for t in leaves]

    alone = grads({which})
    assert torch.equal(alone[which], grads({0, 1, 2})[which])
    assert [g is not None for g in alone] == [i == which for i in range(3)]


def test_extents_say_what_is_read_not_what_is_there(randn):
    x, weight, bias = randn(5, D), randn(K, D), randn(K)
    out = ops.expand(x, weight, bias, [4, 2], [3, 2])
    assert out.shape == (5, 4)
    assert torch.equal(out[:3], ops.expand(x[:3], weight, bias, 4))
    assert torch.equal(out[3:, :2], ops.expand(x[3:], weight, bias, 2))


def test_autocast_runs_in_its_type_and_leaves_float64_alone(randn):
    x, weight, bias = (t.float().requires_grad_() for t in (randn(5, D), randn(K, D), randn(K)))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.expand(x, weight, bias, 7, activation="gelu")
        wide = ops.expand(x.double(), weight.double(), bias.double(), 7)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    out.sum().backward()
    assert {x.grad.dtype, weight.grad.dtype, bias.grad.dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extent": 0}, "an extent must be in 1 to 11, got [0]"),
        ({"extent": 12}, "an extent must be in 1 to 11, got [12]"),
        ({"extent": [3, 12], "rows": [2, 3]}, "an extent must be in 1 to 11, got [3, 12]"),
        ({"extent": [3, 2]}, "needs the rows of each block"),
        ({"extent": [3, 2], "rows": [2, 2]}, "sum to 5 rows, got extents [3, 2] and rows [2, 2]"),
        ({"extent": [3, 2], "rows": [5]}, "one extent each"),
        ({"extent": [3, 2], "rows": [6, -1]}, "sum to 5 rows"),
        ({"extent": [], "rows": []}, "one extent each"),
        ({"extent": 3, "activation": "tanh"}, "activation must be one of"),
        ({"extent": 3, "bias": torch.zeros(10)}, "got [5, 13], [11, 13], [10]"),
        ({"extent": 3, "x": torch.zeros(5, 12)}, "got [5, 12], [11, 13], [11]"),
        ({"extent": 3, "x": torch.zeros(2, 5, D)}, "got [2, 5, 13], [11, 13], [11]"),
        ({"extent": 3, "weight": torch.zeros(K, D, device="meta")}, "got cpu, meta, cpu; move"),
    ],
)
def test_bad_input(arguments, message):
    good = {"x": torch.zeros(5, D), "weight": torch.zeros(K, D), "bias": torch.zeros(K)}
    with pytest.raises(InputError) as error:
        ops.expand(**good | arguments)
    assert message in str(error.value)
