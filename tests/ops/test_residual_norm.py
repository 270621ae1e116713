from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.ops.reference import keep_mask

D, EPS = 13, 1e-5


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [7, 1, 0])
def test_agrees_with_torch(judge, randn, seed, tokens, p):
    inputs = randn(tokens, D), randn(tokens, D), randn(D), randn(D)
    keep = torch.ones(tokens, D, dtype=torch.bool)
    if p:
        keep = keep_mask(seed, torch.arange(tokens)[:, None], torch.arange(D), p)

    def ours(x, residual, weight, bias):
        return ops.residual_norm(x, residual, weight, bias, EPS, p, seed)

    def plain(x, residual, weight, bias):
        return F.layer_norm(x * keep / (1 - p) + residual, [D], weight, bias, EPS)

    judge(ours, plain, inputs)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(randn, seed, p):
    inputs = [t.requires_grad_() for t in (randn(5, D), randn(5, D), randn(D), randn(D))]

    def ours(*inputs):
        return ops.residual_norm(*inputs, EPS, p, seed)

    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)


def test_rows_far_from_zero(judge, randn):
    """A variance computed as E[z^2] - E[z]^2 would cancel."""
    inputs = randn(5, D), randn(5, D) + 1000, randn(D), randn(D)

    def plain(x, residual, weight, bias):
        return F.layer_norm(x + residual, [D], weight, bias, EPS)

    judge(lambda *t: ops.residual_norm(*t, EPS), plain, inputs)


def test_eps_is_inside_the_root(randn):
    x = torch.zeros(1, D)
    residual = torch.linspace(-1e-3, 1e-3, D)[None]
    out = ops.residual_norm(x, residual, torch.ones(D), torch.zeros(D), 1e-2)
    want = (residual - residual.mean()) / (residual.var(correction=0) + 1e-2).sqrt()
    torch.testing.assert_close(out, want)


def test_x_is_cast_to_the_residuals_type(randn):
    x = randn(5, D).bfloat16().requires_grad_()
    residual, weight, bias = (t.float() for t in (randn(5, D), randn(D), randn(D)))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.residual_norm(x, residual, weight, bias, EPS)
    torch.testing.assert_close(out, F.layer_norm(x.float() + residual, [D], weight, bias, EPS))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_a_wide_x_is_cast_down_to_the_residuals_type(randn):
    residual, weight, bias = (t.bfloat16() for t in (randn(5, D), randn(D), randn(D)))
    assert ops.residual_norm(randn(5, D), residual, weight, bias, EPS).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, D)}, "got [4, 13], [5, 13], [13], [13]"),
        ({"weight": torch.zeros(12)}, "got [5, 13], [5, 13], [12], [13]"),
        ({"bias": torch.zeros(12)}, "got [5, 13], [5, 13], [13], [12]"),
        ({"p": 1.5}, "dropout must be in [0, 1), got 1.5"),
        ({"p": 0.1}, "dropout 0.1 needs a seed"),
    ],
)
def test_bad_input(arguments, message):
    good = {
        "x": torch.zeros(5, D),
        "residual": torch.zeros(5, D),
        "weight": torch.zeros(D),
        "bias": torch.zeros(D),
        "eps": EPS,
    }
    with pytest.raises(InputError) as error:
        ops.residual_norm(**good | arguments)
    assert message in str(error.value)
