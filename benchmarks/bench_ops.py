"""The ops and what is made of them on a CPU, against plain torch on the same prefix of the weights.

    pytest benchmarks/bench_ops.py --benchmark-only [-k "product and bf16"]

Shapes are BERT-base's. In a round every candidate runs once, in an order of its own; medians are
compared, after outputs and gradients. A bar's limit is what the ratio would be if our products ran
at the peak of the matrix kernel and all else took no time. Reports go to `results/cpu_ops.json` and
`results/cpu_ops.md`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dynabert_fast import ops

from .peers import bert, dynabert
from .race import THREADS, bar, peak, race, record, row

D, H, HEAD, N = 768, 12, 64, 3072
S = 128  # tokens of a sequence
EPS = 1e-12
WIDTHS = (1.0, 0.75, 0.5, 0.25)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Sums of up to 3072 terms of size 1, or 2048 tokens' of a gradient; bf16 rounds each of them.
ERROR = {"fp32": 1e-5, "bf16": 5e-2}

Run = Callable[[], Any]
Parameters = Mapping[str, Tensor]
_record = functools.partial(record, report="cpu_ops")


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return request.param


def noise(dtype: str, *shape: int, std: float = 1.0) -> Tensor:
    return (torch.randn(shape) * std).to(DTYPES[dtype])


def agree(dtype: str, ours: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    for got, want in zip(ours, plain, strict=True):
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert error < ERROR[dtype], error


def rows_of(
    seconds: Mapping[str, list[float]], dtype: str, operations: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """By run: "ours, x" and "torch, x" are a pair; of ours the share of the peak, where known."""
    rows = {name: row(name, times, dtype=dtype) for name, times in seconds.items()}
    for name, found in rows.items():
        who, _, what = name.partition(", ")
        if who == "torch":
            found["ratio"] = found["ms"] / rows[f"ours, {what}"]["ms"]
        elif operations and what in operations:
            found["share"] = operations[what] / peak(dtype) / (1e-3 * found["ms"])
    return rows


def gradients(out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


# ---- single ops ----


def expand(k: int, activation: str = "") -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = F.linear(x, w[:k], b[:k])
        return F.gelu(out) if activation else out

    return lambda x, w, b: ops.expand(x, w, b, k, activation=activation), plain


def contract(k: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return lambda x, w, b: ops.contract(x, w, b, k), lambda x, w, b: torch.addmm(b, x, w[:k])


PRODUCTS = {
    "qkv": (3 * D, lambda k: expand(k)),
    "out": (D, lambda k: contract(k)),
    "up, gelu": (N, lambda k: expand(k, "gelu")),
    "down": (N, lambda k: contract(k)),
}


@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("name", PRODUCTS)
def test_product(benchmark, dtype, name, tokens):
    """Forward, gradient of the input, gradients of weight and bias: each prefix, share of peak."""
    size, make = PRODUCTS[name]
    weight = noise(dtype, size, D, std=0.02)
    contracts = make is PRODUCTS["out"][1] or make is PRODUCTS["down"][1]
    bias = noise(dtype, D if contracts else size)
    runs: dict[str, Run] = {}
    for width in WIDTHS:
        k = int(width * size)
        x = noise(dtype, tokens, k if contracts else D)
        grad = noise(dtype, tokens, D if contracts else k)
        results = []
        for who, function in zip(("ours", "torch"), make(k), strict=True):
            leaf, *parameters = (t.clone().requires_grad_() for t in (x, weight, bias))
            of_input = gradients(function(leaf, weight, bias), [leaf], grad)
            of_weight = gradients(function(x, *parameters), parameters, grad)
            runs[f"{who}, w{width:.2f} forward"] = lambda f=function, x=x: f(x, weight, bias)
            runs[f"{who}, w{width:.2f} input gradient"] = of_input
            runs[f"{who}, w{width:.2f} weight gradient"] = of_weight
            results.append([function(x, weight, bias), *of_input(), *of_weight()])
        agree(dtype, *results)
    seconds = race(benchmark, runs, rounds=7, pause=0, warm=False)
    operations = {
        f"w{width:.2f} {part}": 2.0 * tokens * D * int(width * size)
        for width in WIDTHS
        for part in ("forward", "input gradient", "weight gradient")
    }
    rows = rows_of(seconds, dtype, operations)
    shares = {
        part: min(r["share"] for n, r in rows.items() if n.endswith(part) and "share" in r)
        for part in ("forward", "input gradient", "weight gradient")
    }
    _record(
        benchmark,
        f"{name}, {dtype}, {tokens} tokens",
        list(rows.values()),
        [bar(f"least share of peak, {part}", share, 0.8) for part, share in shares.items()],
    )


def attention(heads: int, offsets: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def plain(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(-1, S, heads, 3, HEAD).permute(3, 0, 2, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, heads * HEAD)

    return lambda qkv: ops.attention(qkv, offsets, S, HEAD, heads), plain


def others(dtype: str, tokens: int) -> dict[str, tuple[Any, Any, list[Tensor]]]:
    """Name to our function, torch's, and their arguments."""
    offsets = torch.arange(0, tokens + 1, S, dtype=torch.int32)
    found = {
        f"attention w{width:.2f}": (
            *attention(int(width * H), offsets),
            [noise(dtype, tokens, int(width * H) * 3 * HEAD)],
        )
        for width in WIDTHS
    }
    found["residual_norm"] = (
        lambda x, r, w, b: ops.residual_norm(x, r, w, b, EPS),
        lambda x, r, w, b: F.layer_norm(x + r, [D], w, b, EPS),
        [noise(dtype, *s) for s in ((tokens, D), (tokens, D), (D,), (D,))],
    )
    ids = [torch.randint(rows, (tokens,)) for rows in (30522, 2, S)]
    found["embed"] = (
        lambda t, k, p, w, b: ops.embed(*ids, t, k, p, w, b, EPS),
        lambda t, k, p, w, b: F.layer_norm(
            F.embedding(ids[0], t) + F.embedding(ids[1], k) + F.embedding(ids[2], p), [D], w, b, EPS
        ),
        [noise(dtype, *s) for s in ((30522, D), (2, D), (S, D), (D,), (D,))],
    )
    logits, hidden = noise(dtype, 32, 3), noise(dtype, tokens, D)
    found["soft_cross_entropy"] = (
        lambda s: ops.soft_cross_entropy(s, logits),
        lambda s: F.cross_entropy(s.float(), logits.float().softmax(-1)),
        [noise(dtype, 32, 3)],
    )
    found["hidden_mse"] = (
        lambda s: ops.hidden_mse(s, hidden),
        lambda s: F.mse_loss(s.float(), hidden.float()),
        [noise(dtype, tokens, D)],
    )
    return found


def test_other_ops(benchmark, dtype):
    """Forward and backward of what is not a product."""
    tokens = 2048
    runs: dict[str, Run] = {}
    for name, (ours, plain, inputs) in others(dtype, tokens).items():
        results = []
        for who, function in (("ours", ours), ("torch", plain)):
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = function(*leaves)
            backward = gradients(out, leaves, torch.ones_like(out))
            runs[f"{who}, {name} forward"] = lambda f=function, i=inputs: f(*i)
            runs[f"{who}, {name} backward"] = backward
            # Weights of which thousands of rows are summed up come last.
            results.append([out.detach(), backward()[0]])
        agree(dtype, *results)
    seconds = race(benchmark, runs, rounds=9, pause=0)
    rows = rows_of(seconds, dtype)
    _record(benchmark, f"other ops, {dtype}, {tokens} tokens", list(rows.values()), [])


# ---- a layer ----


def parameters(dtype: str) -> dict[str, Tensor]:
    made = {
        "qkv": noise(dtype, 3 * D, D, std=0.02),
        "qkv_bias": noise(dtype, 3 * D, std=0.02),
        "out": noise(dtype, D, D, std=0.02),
        "out_bias": noise(dtype, D, std=0.02),
        "norm": torch.ones(D, dtype=DTYPES[dtype]),
        "norm_bias": noise(dtype, D, std=0.02),
        "up": noise(dtype, N, D, std=0.02),
        "up_bias": noise(dtype, N, std=0.02),
        "down": noise(dtype, N, D, std=0.02),
        "down_bias": noise(dtype, D, std=0.02),
    }
    return {name: t.requires_grad_() for name, t in made.items()}


def our_layer(p: Parameters, x: Tensor, widths: Sequence[float]) -> Tensor:
    """One encoder layer, with as many row blocks of equal size as there are widths."""
    heads, neurons = [int(w * H) for w in widths], [int(w * N) for w in widths]
    sequences = [x.shape[0] // S // len(widths)] * len(widths)
    rows = [s * S for s in sequences]
    offsets = torch.arange(0, x.shape[0] + 1, S, dtype=torch.int32)
    qkv = ops.expand(x, p["qkv"], p["qkv_bias"], [3 * HEAD * h for h in heads], rows)
    context = ops.attention(qkv, offsets, S, HEAD, heads, sequences)
    y = ops.contract(context, p["out"], p["out_bias"], [HEAD * h for h in heads], rows)
    x = ops.residual_norm(y, x, p["norm"], p["norm_bias"], EPS)
    middle = ops.expand(x, p["up"], p["up_bias"], neurons, rows, activation="gelu")
    y = ops.contract(middle, p["down"], p["down_bias"], neurons, rows)
    return ops.residual_norm(y, x, p["norm"], p["norm_bias"], EPS)


def torch_layer(p: Parameters, x: Tensor, width: float) -> Tensor:
    heads, n = int(width * H), int(width * N)
    inner = heads * HEAD
    qkv = F.linear(x, p["qkv"][: 3 * inner], p["qkv_bias"][: 3 * inner])
    q, k, v = qkv.view(-1, S, heads, 3, HEAD).permute(3, 0, 2, 1, 4)
    context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, inner)
    y = torch.addmm(p["out_bias"], context, p["out"][:inner])
    x = F.layer_norm(y + x, [D], p["norm"], p["norm_bias"], EPS)
    middle = F.gelu(F.linear(x, p["up"][:n], p["up_bias"][:n]))
    y = torch.addmm(p["down_bias"], middle, p["down"][:n])
    return F.layer_norm(y + x, [D], p["norm"], p["norm_bias"], EPS)


def layer_operations(tokens: int, width: float) -> float:
    """Of the products, forward and backward."""
    return 3 * 2.0 * tokens * D * (4 * int(width * H) * HEAD + 2 * int(width * N))


def test_layer(benchmark, dtype):
    """Forward and backward of one layer at every width, and of four widths in one call."""
    tokens = 2048
    p = parameters(dtype)
    x = noise(dtype, tokens, D).requires_grad_()
    grad = noise(dtype, tokens, D)
    leaves = [x, *p.values()]

    def ours(widths: Sequence[float]) -> list[Tensor]:
        return list(torch.autograd.grad(our_layer(p, x, widths), leaves, grad))

    def plain(width: float) -> list[Tensor]:
        return list(torch.autograd.grad(torch_layer(p, x, width), leaves, grad))

    def plain_each() -> list[Tensor]:
        """One call for each width; gradients add up where they lie, as in a training step."""
        for leaf in leaves:
            leaf.grad = None
        blocks = zip(x.split(tokens // 4), grad.split(tokens // 4), WIDTHS, strict=True)
        for block, g, width in blocks:
            torch_layer(p, block, width).backward(g)
        return [leaf.grad for leaf in leaves]

    runs: dict[str, Run] = {}
    for width in WIDTHS:
        runs[f"ours, w{width:.2f}"] = lambda w=width: ours([w])
        runs[f"torch, w{width:.2f}"] = lambda w=width: plain(w)
    runs["ours, staircase"] = lambda: ours(WIDTHS)
    runs["torch, staircase"] = plain_each
    with torch.no_grad():
        for width in WIDTHS:
            agree(dtype, [our_layer(p, x, [width])], [torch_layer(p, x, width)])
    agree(dtype, ours([0.5]), plain(0.5))
    agree(dtype, ours(WIDTHS), plain_each())
    operations = {f"w{width:.2f}": layer_operations(tokens, width) for width in WIDTHS}
    operations["staircase"] = sum(operations.values()) / 4
    seconds = race(benchmark, runs, rounds=7, pause=0, warm=False)
    rows = rows_of(seconds, dtype, operations)
    least = {"fp32": (1.8, 2.0), "bf16": (1.4, 1.6)}[dtype]
    bars = []
    for what, work in operations.items():
        theirs = rows[f"torch, {what}"]
        limit = 1e-3 * theirs["ms"] * peak(dtype) / work
        asked = least[what == "staircase"]
        bars.append(bar(f"{what}, times as fast as torch", theirs["ratio"], asked, limit=limit))
    narrow = rows["ours, w0.25"]["ms"] / rows["ours, w1.00"]["ms"]
    bars.append(bar("w0.25, share of the full width's time", narrow, most=0.31))
    _record(benchmark, f"layer, {dtype}, {tokens} tokens", list(rows.values()), bars)


# ---- a model ----


@pytest.mark.parametrize(
    ("dtype", "batch", "least"),
    [("fp32", 1, 2.0), ("fp32", 8, 2.0), ("bf16", 1, 1.4)],
    ids=["fp32-1x128", "fp32-8x128", "bf16-1x128"],
)
def test_model(benchmark, dtype, batch, least):
    """Eager forward against `transformers`."""
    torch.set_num_threads(THREADS)
    ids = torch.randint(1000, 30000, (batch, S), generator=torch.Generator().manual_seed(0))
    models = {
        f"{who}, forward": copy.deepcopy(model).to(DTYPES[dtype])
        for who, model in (("ours", dynabert()), ("torch", bert()))
    }
    with torch.inference_mode():
        agree(dtype, *([m(ids).last_hidden_state] for m in models.values()))
        runs = {name: lambda m=m: m(ids) for name, m in models.items()}
        seconds = race(benchmark, runs, rounds=9, warm=batch == 1)
    config = dynabert().config
    each = (4 * D * D + 2 * D * N) * config.num_hidden_layers
    operations = 2.0 * batch * S * each
    rows = rows_of(seconds, dtype, {"forward": operations})
    theirs = rows["torch, forward"]
    limit = 1e-3 * theirs["ms"] * peak(dtype) / operations
    bars = [bar("times as fast as transformers", theirs["ratio"], least, limit=limit)]
    _record(benchmark, f"model, {dtype} {batch}x{S}", list(rows.values()), bars)
