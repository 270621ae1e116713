"""Each op at ordinary sizes on each device, as it is called: by whatever backend serves it there.

The judge is the reference in float64 on the CPU; what is allowed is twice the error of the
reference in the op's own type on the op's own device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynabert_fast import ops

D, HEADS, HEAD, N = 96, 4, 24, 200
T, LENGTHS = 77, (33, 1, 40, 3)
ROWS, SEQUENCES = [34, 40, 3], [2, 1, 1]
SEED = 0x1234_5678_9ABC
P = 0.2


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(params=["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.gpu)])
def dtype(request) -> torch.dtype:
    return getattr(torch, request.param)


def offsets(device: str) -> Tensor:
    return torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32).to(device)


def ids(count: int, device: str) -> Tensor:
    return ((torch.arange(T) * 7) % count).to(device)


# Name to the shapes of the differentiable inputs, and a function of (device, *inputs).
CASES: dict[str, tuple[list[tuple[int, ...]], Callable[..., Tensor]]] = {
    "expand": ([(T, D), (N, D), (N,)], lambda d, x, w, b: ops.expand(x, w, b, 131, None, "gelu")),
    "expand tanh": (
        [(T, D), (N, D), (N,)],
        lambda d, x, w, b: ops.expand(x, w, b, N, None, "gelu_tanh"),
    ),
    "contract": ([(T, N), (N, D), (D,)], lambda d, x, w, b: ops.contract(x, w, b, 131)),
    "contract staircase": (
        [(T, N), (N, D), (D,)],
        lambda d, x, w, b: ops.contract(x, w, b, [N, 64, 7], ROWS),
    ),
    "expand, contract staircase": (
        [(T, D), (N, D), (N,), (D,)],
        lambda d, x, w, b, c: ops.contract(
            ops.expand(x, w, b, [N, 64, 7], ROWS, "relu"), w, c, [N, 64, 7], ROWS
        ),
    ),
    "attention": (
        [(T, HEADS * 3 * HEAD)],
        lambda d, qkv: ops.attention(qkv, offsets(d), max(LENGTHS), HEAD, 3),
    ),
    "attention, dropout": (
        [(T, HEADS * 3 * HEAD)],
        lambda d, qkv: ops.attention(
            qkv, offsets(d), 128, HEAD, HEADS, p=P, seed=torch.tensor(SEED, device=d)
        ),
    ),
    "attention staircase": (  # heads beyond a row's are unspecified: compared are those of all
        [(T, HEADS * 3 * HEAD)],
        lambda d, qkv: ops.attention(qkv, offsets(d), 200, HEAD, [4, 2, 1], SEQUENCES)[:, :HEAD],
    ),
    "residual_norm": (
        [(T, D), (T, D), (D,), (D,)],
        lambda d, x, r, w, b: ops.residual_norm(x, r, w, b, 1e-12),
    ),
    "residual_norm, dropout": (
        [(T, D), (T, D), (D,), (D,)],
        lambda d, x, r, w, b: ops.residual_norm(x, r, w, b, 1e-12, P, torch.tensor(SEED, device=d)),
    ),
    "embed": (
        [(61, D), (2, D), (50, D), (D,), (D,)],
        lambda d, word, kind, position, w, b: ops.embed(
            ids(61, d), ids(2, d), ids(50, d), word, kind, position, w, b, 1e-12
        ),
    ),
    "soft_cross_entropy": (
        [(13, 5)],
        lambda d, s: ops.soft_cross_entropy(s, torch.linspace(-2, 2, 65).view(13, 5).to(s)),
    ),
    "hidden_mse": ([(T, D)], lambda d, s: ops.hidden_mse(s, s.detach().flip(0))),
    "hidden_mse of many pairs": (
        [(T, D), (13, 5), (T, D)],
        lambda d, *s: ops.hidden_mse(
            [s[0][:, :-1], *s[1:]],
            [s[0].detach().flip(0)[:, :-1], s[1].detach().float() + 1, s[2].detach().flip(1)],
            [1.0, 0.25, 3.0],
        ),
    ),
}


def run(function: Callable[..., Tensor], device: str, values: list[Tensor]) -> list[Tensor]:
    """Output and gradients, as float64 on the CPU."""
    leaves = [v.detach().clone().requires_grad_() for v in values]
    out = function(device, *leaves)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad(out, leaves, grad.to(out))
    return [t.detach().double().cpu() for t in (out, *grads)]


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name, device, dtype):
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("no backend but torch's own")
    shapes, function = CASES[name]
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    narrow = [v.to(dtype) for v in exact]
    truth = run(function, "cpu", [v.double() for v in narrow])
    there = [v.to(device) for v in narrow]
    got = run(function, device, there)
    with ops.use_backend("reference"):
        plain = run(function, device, there)
    for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        what = f"gradient of input {i - 1}" if i else "output"
        assert g.isfinite().all(), what
        error, allowed = ((x - t).abs().max() for x in (g, p))
        slack = 4 * torch.finfo(dtype).eps * t.abs().max()
        assert error <= 2 * allowed + slack, f"{what}: error {error:.2e}, torch's {allowed:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_triton_serves_on_a_gpu(name):
    """Nothing falls back unseen."""
    shapes, function = CASES[name]
    values = [torch.randn(s, device="cuda") for s in shapes]
    with ops.use_backend("triton"):
        run(function, "cuda", values)


@pytest.mark.gpu
def test_a_switch_of_sub_network_compiles_nothing():
    """Of extents that are multiples of 16 there is one compiled form, of others another."""
    from dynabert_fast.kernels import product

    x, w, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((T, D), (N, D), (N,)))
    for extent in (N, 192):
        ops.expand(x, w, b, extent)
    kernels = [k for k in vars(product).values() if hasattr(k, "device_caches")]
    count = [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]
    for extent in (8, 16, 24, 64, 176):
        ops.expand(x, w, b, extent)
    assert [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels] == count


@pytest.mark.gpu
def test_results_repeat():
    for _, (shapes, function) in CASES.items():
        values = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        first, second = run(function, "cuda", values), run(function, "cuda", values)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_op_has_a_case():
    words: set[Any] = {word for name in CASES for word in name.replace(",", "").split()}
    assert set(ops.__all__) - {"backends", "forced_backend", "use_backend"} <= words
