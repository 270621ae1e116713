"""One row per op and width: the op on a prefix of its weights against plain torch on a slice.

The shapes are those of a MiniLM (6 layers, D 384, 12 heads, N 1536) with 8 sequences of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dynabert_fast import ops

B, S, D, H, HEAD, N = 8, 32, 384, 12, 32, 1536
T = B * S
EPS = 1e-12
WIDTHS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Case:
    """Two functions of the same tensors, one of which is plain torch."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: Sequence[tuple[int, ...]]


def expand(k: int) -> Case:
    return Case(
        lambda x, w, b: ops.expand(x, w, b, k, activation="gelu"),
        lambda x, w, b: F.gelu(F.linear(x, w[:k], b[:k])),
        [(T, D), (N, D), (N,)],
    )


def contract(k: int) -> Case:
    return Case(
        lambda x, w, b: ops.contract(x, w, b, k),
        lambda x, w, b: torch.addmm(b, x, w[:k]),
        [(T, k), (N, D), (D,)],
    )


def attention(heads: int) -> Case:
    offsets = torch.arange(0, T + 1, S, dtype=torch.int32)

    def plain(qkv):
        q, k, v = qkv.view(B, S, heads, 3, HEAD).permute(3, 0, 2, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(T, heads * HEAD)

    return Case(
        lambda qkv: ops.attention(qkv, offsets, S, HEAD, heads), plain, [(T, heads * 3 * HEAD)]
    )


def expand_staircase() -> Case:
    """A quarter of the rows at each width; plain torch runs one product per width."""
    extents, rows = [int(w * N) for w in WIDTHS], [T // len(WIDTHS)] * len(WIDTHS)

    def plain(x, w, b):
        out = x.new_zeros(T, N)
        for i, (block, k) in enumerate(zip(x.split(rows), extents, strict=True)):
            out[i * rows[0] : (i + 1) * rows[0], :k] = F.linear(block, w[:k], b[:k])
        return out

    return Case(lambda x, w, b: ops.expand(x, w, b, extents, rows), plain, [(T, D), (N, D), (N,)])


def contract_staircase() -> Case:
    extents, rows = [int(w * N) for w in WIDTHS], [T // len(WIDTHS)] * len(WIDTHS)

    def plain(x, w, b):
        blocks = zip(x.split(rows), extents, strict=True)
        return torch.cat([torch.addmm(b, block[:, :k], w[:k]) for block, k in blocks])

    return Case(lambda x, w, b: ops.contract(x, w, b, extents, rows), plain, [(T, N), (N, D), (D,)])


def residual_norm() -> Case:
    return Case(
        lambda x, r, w, b: ops.residual_norm(x, r, w, b, EPS),
        lambda x, r, w, b: F.layer_norm(x + r, [D], w, b, EPS),
        [(T, D), (T, D), (D,), (D,)],
    )


def embed() -> Case:
    ids = [torch.arange(T) % rows for rows in (1000, 2, S)]
    return Case(
        lambda word, kind, position, w, b: ops.embed(*ids, word, kind, position, w, b, EPS),
        lambda word, kind, position, w, b: F.layer_norm(
            sum(F.embedding(i, t) for i, t in zip(ids, (word, kind, position), strict=True)),
            [D],
            w,
            b,
            EPS,
        ),
        [(1000, D), (2, D), (S, D), (D,), (D,)],
    )


def soft_cross_entropy() -> Case:
    teacher = torch.linspace(-3, 3, B * 3).view(B, 3)
    return Case(
        lambda s: ops.soft_cross_entropy(s, teacher),
        lambda s: F.cross_entropy(s, teacher.softmax(-1)),
        [(B, 3)],
    )


def hidden_mse() -> Case:
    teacher = torch.linspace(-3, 3, T * D).view(T, D)
    return Case(lambda s: ops.hidden_mse(s, teacher), lambda s: F.mse_loss(s, teacher), [(T, D)])


CASES = {
    **{f"expand gelu w{w:.2f}": lambda w=w: expand(int(w * N)) for w in WIDTHS},
    "expand staircase": expand_staircase,
    **{f"contract w{w:.2f}": lambda w=w: contract(int(w * N)) for w in WIDTHS},
    "contract staircase": contract_staircase,
    **{f"attention w{w:.2f}": lambda w=w: attention(int(w * H)) for w in WIDTHS},
    "residual_norm": residual_norm,
    "embed": embed,
    "soft_cross_entropy": soft_cross_entropy,
    "hidden_mse": hidden_mse,
}


def forward(function, inputs):
    with torch.no_grad():
        return [function(*inputs)]


def forward_backward(function, inputs):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.benchmark(max_time=0.25, min_rounds=10, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize("which", ["plain", "ours"])
@pytest.mark.parametrize("direction", [forward, forward_backward], ids=["forward", "both"])
@pytest.mark.parametrize("name", CASES)
def test_op(benchmark, name, direction, which):
    case = CASES[name]()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in case.shapes]
    results = [direction(function, inputs) for function in (case.ours, case.plain)]
    for got, want in zip(*results, strict=True):
        # Sums of up to T * D terms of size 1 in float32.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    label = "plain torch, sliced" if which == "plain" else ",".join(ops.backends())
    benchmark.group = f"{name}, {'forward' if direction is forward else 'forward and backward'}"
    benchmark.extra_info |= {"row": label, "baseline": which == "plain"}
    benchmark(direction, case.plain if which == "plain" else case.ours, inputs)
