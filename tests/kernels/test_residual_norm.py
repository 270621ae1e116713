"""`residual_norm` in Triton's interpreter: several tiles of rows, several programs of them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.kernels import common, residual_norm
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

D, EPS = 13, 1e-5
P = 0.3


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
def four_rows(monkeypatch):
    """A tile is four rows of up to 16 columns."""
    configs = {name: Config.of(TILE=64) for name in ("residual_norm", "embed")}
    configs |= {f"{name}_backward": Config.of(TILE=64, AHEAD=1) for name in configs}
    monkeypatch.setattr(common, "_chooser", [lambda kernel, *_: configs[kernel]])


def keep_mask(seed, tokens, columns, p):
    return reference.keep_mask(seed, torch.arange(tokens)[:, None], torch.arange(columns), p)


def agree(judge, randn, seed, tokens, columns, p):
    shape = (tokens, columns)
    keep = keep_mask(seed, *shape, p) if p else torch.ones(shape, dtype=torch.bool)

    def ours(x, residual, weight, bias):
        return ops.residual_norm(x, residual, weight, bias, EPS, p, seed)

    def plain(x, residual, weight, bias):
        return F.layer_norm(x * keep / (1 - p) + residual, [columns], weight, bias, EPS)

    judge(ours, plain, (randn(*shape), randn(*shape), randn(columns), randn(columns)))


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("tokens", [7, 1, 0, 71])
def test_agrees_with_torch(judge, randn, seed, tokens, p):
    agree(judge, randn, seed, tokens, D, p)


# Not 2: such a row's gradient is a difference of equal terms, and any error but the judge's own.
@pytest.mark.parametrize("columns", [3, 16, 127])
def test_any_size(judge, randn, seed, monkeypatch, columns):
    monkeypatch.setattr(common, "_chooser", [lambda kernel, key, configs, launch: configs[0]])
    agree(judge, randn, seed, 5, columns, P)


@pytest.mark.parametrize("form", range(6))
@pytest.mark.parametrize("dtype", [torch.float32], indirect=True, ids=str)
def test_shipped_configurations(judge, randn, seed, monkeypatch, form):
    monkeypatch.setattr(common, "_chooser", [lambda kernel, key, configs, launch: configs[form]])
    agree(judge, randn, seed, 37, D, P)


def test_a_row_of_one_column(randn):
    """It equals its mean: only the bias is left, and only the bias has a gradient."""
    inputs = [randn(7, 1).float().requires_grad_(), randn(7, 1).float(), randn(1).float()]
    bias = randn(1).float().requires_grad_()
    out = ops.residual_norm(*inputs, bias, EPS)
    assert torch.equal(out, bias.expand(7, 1))
    grad = randn(7, 1).float()
    x, b = torch.autograd.grad(out, (inputs[0], bias), grad)
    assert not x.any()
    torch.testing.assert_close(b, grad.sum(0))


def test_rows_wider_than_any_configuration(judge, randn, seed, monkeypatch):
    configs = {"CONFIGS": (Config.of(TILE=8),), "BACKWARD_CONFIGS": (Config.of(TILE=8, AHEAD=1),)}
    for name, value in configs.items():
        monkeypatch.setattr(residual_norm, name, value)
    monkeypatch.setattr(common, "_chooser", [lambda kernel, key, configs, launch: configs[0]])
    agree(judge, randn, seed, 3, D, P)


def test_rows_far_from_zero(judge, randn):
    """A variance computed as E[z^2] - E[z]^2 would cancel."""
    inputs = randn(5, D), randn(5, D) + 1000, randn(D), randn(D)

    def plain(x, residual, weight, bias):
        return F.layer_norm(x + residual, [D], weight, bias, EPS)

    judge(lambda *t: ops.residual_norm(*t, EPS), plain, inputs)


def test_eps_is_inside_the_root():
    residual = torch.linspace(-1e-3, 1e-3, D)[None]
    out = ops.residual_norm(torch.zeros(1, D), residual, torch.ones(D), torch.zeros(D), 1e-2)
    want = (residual - residual.mean()) / (residual.var(correction=0) + 1e-2).sqrt()
    torch.testing.assert_close(out, want)


def strided(t, dtype):
    """The values inside a wider matrix of NaN, and for a vector inside a longer one."""
    wide = torch.full([n + 3 for n in t.shape], float("nan"), dtype=dtype)
    view = wide[tuple(slice(1, n + 1) for n in t.shape)]
    return view.copy_(t)


@pytest.mark.parametrize("form", [strided, lambda t, dtype: t.to(dtype).t().contiguous().t()])
def test_strided_views(randn, seed, dtype, form):
    inputs = [randn(7, D), randn(7, D), randn(D), randn(D)]
    views = [form(t, dtype) for t in inputs]
    plain = [t.to(dtype) for t in inputs]
    want = residual_norm.residual_norm(*plain, EPS, P, seed)
    got = residual_norm.residual_norm(*views, EPS, P, seed)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    grad, (_, z, mean, rstd), weight = randn(7, D), want, plain[2]
    want = residual_norm.residual_norm_backward(grad.to(dtype), z, mean, rstd, weight, P, seed)
    got = residual_norm.residual_norm_backward(
        form(grad, dtype), form(z, dtype), mean, rstd, views[2], P, seed
    )
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("value", [0, -1, 0x1234_5678_9ABC_DEF0])
def test_masks_are_the_references(value, p):
    seed, ones, zeros = torch.tensor(value), torch.ones(37, D), torch.zeros(37, D)
    keep = keep_mask(seed, 37, D, p)
    _, z, mean, rstd = residual_norm.residual_norm(ones, zeros, ones[0], zeros[0], EPS, p, seed)
    torch.testing.assert_close(z, keep / (1 - p))
    grad = torch.randn(37, D, generator=torch.Generator().manual_seed(0))
    grad_x, grad_z, *_ = residual_norm.residual_norm_backward(
        grad, torch.randn(37, D), mean, rstd, ones[0], p, seed
    )
    torch.testing.assert_close(grad_x, grad_z * keep / (1 - p))


def test_the_gradient_of_x_is_the_residuals_without_dropout(randn, dtype):
    z, mean, rstd, weight = randn(7, D), randn(7, 1), randn(7, 1), randn(D)
    grad_x, grad_z, *_ = residual_norm.residual_norm_backward(
        z.to(dtype), z.to(dtype), mean.float(), rstd.float(), weight.to(dtype), 0.0, None
    )
    assert grad_x.shape == (0,)
    assert grad_z.shape == (7, D)


def test_z_is_what_is_normalised(randn, dtype):
    """The statistics are those of z as it is stored, from which the backward starts."""
    x, residual, weight, bias = (t.to(dtype) for t in (*randn(2, 37, D), *randn(2, D)))
    _, z, mean, rstd = residual_norm.residual_norm(x, residual, weight, bias, EPS, 0.0, None)
    wide = z.double()
    torch.testing.assert_close(mean.double(), wide.mean(1, keepdim=True), rtol=1e-6, atol=1e-6)
    variance = wide.var(1, correction=0, keepdim=True)
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=1e-6, atol=0)


def test_a_row_is_independent_of_the_others(randn, dtype):
    x, residual, weight, bias = (t.to(dtype) for t in (*randn(2, 37, D), *randn(2, D)))
    whole = ops.residual_norm(x, residual, weight, bias, EPS)
    spoilt = x.clone()
    spoilt[[3, 5]] = float("nan")
    got = ops.residual_norm(spoilt, residual, weight, bias, EPS)
    assert torch.equal(got[4], whole[4])
    assert torch.equal(ops.residual_norm(x[4:5], residual[4:5], weight, bias, EPS), whole[4:5])


def size(*tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("with_seed", [False, True])
def test_counts_of_bytes_are_those_of_the_tensors(randn, seed, dtype, with_seed):
    seed = seed if with_seed else None
    inputs = [t.to(dtype) for t in (*randn(2, 7, D), *randn(2, D))]
    outputs = residual_norm.residual_norm(*inputs, EPS, P, seed)
    count = residual_norm.bytes_and_flops
    item = dtype.itemsize
    assert count("residual_norm", 7, D, item)[0] == size(*inputs, *outputs)
    call = (inputs[0], *outputs[1:], inputs[2])
    grads = residual_norm.residual_norm_backward(*call, P, seed)
    assert count("residual_norm_backward", 7, D, item, with_seed)[0] == size(*call, *grads)
