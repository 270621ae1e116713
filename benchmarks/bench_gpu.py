"""BERT-base on a GPU in bf16: the engine against its peers, the kernels against the libraries'.

    pytest benchmarks/bench_gpu.py --benchmark-only [-k forward]        (`make gpu` runs all)

Every figure is a median over rounds in which the candidates take turns, timed by CUDA events with
the caches flushed before each call; outputs are compared first. Reports go to
`results/<device>.json`, `results/<device>.md` and, as a table, to `docs/gpu.md`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.engine import GpuEngine
from dynabert_fast.engine.gpu import Bucket
from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet, grid

from .bench_ops import EPS, HEAD, WIDTHS, D, H, N, agree
from .peers import bert, dynabert
from .race import COMPILE_ONLY, bar, compile_only, remaining
from .report import gpu_report
from .report import record_gpu as _record

DTYPE = torch.bfloat16
ROUNDS = 5
LENGTHS = (16, 32, 64, 128)
# Tokens of SST-2-like sentences: half the longest on average.
REAL_LENGTHS = [9 + (i * 37) % 56 for i in range(32)]

pytestmark = pytest.mark.gpu
Run = Callable[[], Any]


class Gpu:
    """The device, and how calls are timed; another in its place tries cases on a CPU."""

    device = "cuda"

    def milliseconds(self, run: Run) -> float:
        from triton.testing import do_bench

        return do_bench(run, warmup=5, rep=40, return_mode="median")

    def graph(self, run: Run) -> Run:
        """The call as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def reserved(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()


GPU = Gpu()
#: Of torch.compile's two modes: seconds that must be left to begin with it.
PATIENCE = {"reduce-overhead": 60, "max-autotune": 120}


@pytest.fixture(autouse=True)
def _device_report():
    gpu_report(GPU.device)
    torch.manual_seed(0)
    if COMPILE_ONLY:
        choose_by(run_all)


def choose_by(chooser: Callable[..., Any]) -> None:
    """How configurations are chosen from here on."""
    importlib.import_module("dynabert_fast.kernels.tuning")  # would come later, and measure
    importlib.import_module("dynabert_fast.kernels.common").set_chooser(chooser)


def run_all(kernel: str, key: Any, configs: Sequence[Any], launch: Callable[[Any], None]) -> Any:
    """Compile every configuration; triton keeps them on disk, for the run that measures."""
    from triton.runtime.errors import OutOfResources

    for config in configs:
        with contextlib.suppress(OutOfResources):
            launch(config)
    return configs[0]


def race(
    benchmark: Any, runs: Mapping[str, Run], rounds: int = ROUNDS
) -> dict[str, dict[str, Any]]:
    """Rows by name, the median of each candidate's times."""
    if COMPILE_ONLY:
        compile_only(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}

    def one_round() -> None:
        for name, run in runs.items():
            times[name].append(GPU.milliseconds(run))

    # Compiled again, a peer would be another one than was checked.
    with torch._dynamo.config.patch(error_on_recompile=True):
        benchmark.pedantic(one_round, rounds=rounds)
    return {
        name: {
            "name": name,
            "dtype": "bf16",
            "ms": statistics.median(found),
            "best_ms": min(found),
            "calls": len(found),
        }
        for name, found in times.items()
    }


def noise(*shape: int, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=GPU.device) * std).to(DTYPE)


# ---- the model ----


@functools.cache
def models() -> tuple[Any, Any]:
    """`transformers`' model in bf16, and our engine of the same weights."""
    theirs = copy.deepcopy(bert()).to(DTYPE).to(GPU.device).eval()
    return theirs, GpuEngine(dynabert().to(GPU.device), "bf16")


@functools.cache
def exact() -> Any:
    """`transformers`' model in float32."""
    return copy.deepcopy(bert()).to(GPU.device).eval()


def compete(
    benchmark: Any,
    case: str,
    ids: Tensor,
    mask: Tensor | None,
    bars: Mapping[str, float | None],
) -> None:
    """Ours against `transformers` eager and as a CUDA graph."""
    theirs, engine = models()
    want = theirs(ids, mask).last_hidden_state
    real = slice(None) if mask is None else mask.bool()
    truth = exact()(ids, mask).last_hidden_state[real]
    ours = engine(ids, mask).last_hidden_state
    error, allowed = ((x[real].float() - truth).abs().max().item() for x in (ours, want))
    assert error <= 2 * allowed, (error, allowed)
    runs: dict[str, Run] = {"transformers": lambda: theirs(ids, mask)}
    absent: list[str] = []
    if not COMPILE_ONLY:
        # A mask is read on the host, which a graph cannot.
        name = "transformers, CUDA graph"
        add_peer(runs, absent, name, lambda: GPU.graph(lambda: theirs(ids, mask)))
    runs["dynabert_fast"] = lambda: engine(ids, mask)
    rows = race(benchmark, runs)
    mine = rows["dynabert_fast"]["ms"]
    asked = [
        bar(f"times as fast as {name}", rows[name]["ms"] / mine, least)
        for name, least in bars.items()
        if name in rows
    ]
    for name, found in rows.items():
        if name != "dynabert_fast":
            found["ratio"] = found["ms"] / mine
    if case == "forward 32x128":
        asked.append(bar("ms", mine, most=1.5))
    _record(benchmark, case, list(rows.values()), asked, absent)


def add_peer(runs: dict[str, Run], absent: list[str], name: str, make: Callable[[], Run]) -> None:
    """A contestant that may not work here, which costs it its own row and no other."""
    try:
        run = make()
        run()
        runs[name] = run
    except Exception as error:  # noqa: BLE001
        absent.append(f"{name}: {[*str(error).strip().splitlines(), repr(error)][0]}")


def compete_compiled(
    benchmark: Any, case: str, ids: Tensor, mask: Tensor | None, least: float | None
) -> None:
    """Ours against `transformers` compiled in two modes, each of which takes a minute or two."""
    if COMPILE_ONLY:
        pytest.skip("kernels that `compete` has compiled")
    theirs, engine = models()
    torch.compiler.reset()  # beyond eight compilations of one function torch leaves it as it is
    runs: dict[str, Run] = {}
    absent = []
    for mode, patience in PATIENCE.items():
        name = f"torch.compile, {mode}"
        if remaining() < patience:
            absent.append(f"{name}: no time was left to compile it")
        else:
            make = functools.partial(compiled, theirs, mode, ids, mask)
            add_peer(runs, absent, name, make)
    if not runs:
        pytest.skip("; ".join(absent))
    runs["dynabert_fast"] = lambda: engine(ids, mask)
    rows = race(benchmark, runs)
    mine = rows.pop("dynabert_fast")
    for found in rows.values():
        found["ratio"] = found["ms"] / mine["ms"]
    best = min(found["ratio"] for found in rows.values())
    asked = [bar("times as fast as the better of torch.compile's modes", best, least)]
    _record(benchmark, f"{case}, compiled", [*rows.values(), mine], asked, absent)


def compiled(model: Any, mode: str, ids: Tensor, mask: Tensor | None) -> Run:
    function = torch.compile(model, mode=mode, dynamic=False)

    def run() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(ids, mask)

    for _ in range(3):
        run()
    return run


#: Batch, length, and how many times as fast we must be: as `transformers`, eager and as a CUDA
#: graph, and as the better of torch.compile's modes. The first say most, should time run out.
SHAPES: tuple[tuple[int, int, dict[str, float], float], ...] = (
    (32, 128, {"transformers": 2.5}, 1.25),
    (8, 128, {"transformers": 4.0}, 1.3),
    *(
        (1, length, {"transformers": 8.0, "transformers, CUDA graph": 1.2}, 1.5)
        for length in reversed(LENGTHS)
    ),
)


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(1000, 30000, (batch, length), device=GPU.device)


@pytest.mark.parametrize(("batch", "length", "bars"), [shape[:3] for shape in SHAPES])
def test_forward(benchmark, batch, length, bars):
    with torch.inference_mode():
        case = f"forward {batch}x{length}"
        compete(benchmark, case, random_ids(batch, length), None, bars)


@pytest.mark.parametrize(("batch", "length", "least"), [(b, s, least) for b, s, _, least in SHAPES])
def test_compiled(benchmark, batch, length, least):
    with torch.inference_mode():
        case = f"forward {batch}x{length}"
        compete_compiled(benchmark, case, random_ids(batch, length), None, least)


#: Bytes a second that the device's memory may give: a lower bound of any time.
MEMORY = 4.8e12
LATENCY_BARS = {("w1.00-d1.00", 128): 0.2, ("w0.25-d0.50", 128): 0.06}


@functools.cache
def persistent(weights: str) -> GpuEngine:
    """As the engine of `models`, its layers in one kernel where that can be."""
    return GpuEngine(dynabert().to(GPU.device), "bf16", persistent=True, weights=weights)


WEIGHTS = {"bf16": 2, "int8": 1}  # bytes of one


@pytest.mark.parametrize("subnet", ["w1.00-d1.00", "w0.25-d0.50"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [1, 8])
def test_latency(benchmark, batch, length, subnet):
    """All layers in one kernel, against graphs of ours and of `transformers`; the weights' floor.

    `torch.compile` is in `test_forward`.
    """
    theirs, graphs = models()
    chosen = Subnet.parse(graphs.config, subnet)
    ids = torch.randint(1000, 30000, (batch, length), device=GPU.device)
    want = graphs(ids, subnet=chosen).last_hidden_state
    runs: dict[str, Run] = {"a graph of kernels": lambda: graphs(ids, subnet=chosen)}
    bucket, absent = Bucket.of(ids.numel(), batch, length), []
    for weights in WEIGHTS:
        try:
            engine = persistent(weights)
            why = engine.why_not_persistent(bucket, chosen)
        except InputError as error:
            why = str(error)
        if why:
            absent.append(f"one kernel, {weights}: {why}")
            continue
        found = engine(ids, subnet=chosen).last_hidden_state
        if weights == "bf16":
            agree("bf16", [found], [want])
        else:  # other weights: tests/engine/test_persistent.py compares with the model of these
            similar = F.cosine_similarity(found.float(), want.float(), dim=-1).min().item()
            assert similar > 0.9, similar
        runs[f"one kernel, {weights}"] = functools.partial(engine, ids, subnet=chosen)
    if chosen == Subnet.full(graphs.config) and not COMPILE_ONLY:
        with torch.inference_mode():
            name = "transformers, CUDA graph"
            add_peer(runs, absent, name, lambda: GPU.graph(lambda: theirs(ids, None)))
    rows = race(benchmark, runs)
    elements = D * (4 * HEAD * sum(chosen.heads) + 2 * sum(chosen.neurons))
    bars = []
    for weights, size in WEIGHTS.items():
        if row := rows.get(f"one kernel, {weights}"):
            row["dtype"] = weights
            row["share"] = 1e3 * size * elements / MEMORY / row["ms"]
            bars.append(bar(f"share of the floor of {weights} weights", row["share"]))
    if mine := rows.get("one kernel, bf16"):
        for name in ("a graph of kernels", "transformers, CUDA graph"):
            if name in rows:
                rows[name]["ratio"] = rows[name]["ms"] / mine["ms"]
        most = LATENCY_BARS.get((subnet, length)) if batch == 1 else None
        bars.append(bar("ms", mine["ms"], most=most))
    _record(benchmark, f"latency {subnet} {batch}x{length}", list(rows.values()), bars, absent)


def real_mask() -> Tensor:
    mask = torch.arange(max(REAL_LENGTHS)) < torch.tensor(REAL_LENGTHS)[:, None]
    return mask.long().to(GPU.device)


def test_real_lengths(benchmark):
    mask = real_mask()
    with torch.inference_mode():
        ids = random_ids(*mask.shape)
        compete(benchmark, "forward, real lengths, 32", ids, mask, {"transformers": None})


def test_compiled_real_lengths(benchmark):
    mask = real_mask()
    with torch.inference_mode():
        ids = random_ids(*mask.shape)
        compete_compiled(benchmark, "forward, real lengths, 32", ids, mask, 1.8)


def test_widths(benchmark):
    """Time of each width against full, where products are all that counts."""
    _, engine = models()
    ids = torch.randint(1000, 30000, (32, 128), device=GPU.device)
    runs = {
        f"w{width:.2f}": functools.partial(
            engine, ids, subnet=Subnet.from_multipliers(engine.config, width)
        )
        for width in WIDTHS
    }
    rows = race(benchmark, runs)
    full = rows["w1.00"]["ms"]
    bars = [
        bar(f"w{w:.2f}, share of the full time", rows[f"w{w:.2f}"]["ms"] / full, most=w + 0.15)
        for w in WIDTHS[1:]
    ]
    _record(benchmark, "widths, 32x128", list(rows.values()), bars)


@pytest.mark.parametrize("batch", [8, 16, 32])
def test_mixed(benchmark, batch):
    """Sequences of four widths in one call, against a call for each width."""
    _, engine = models()
    ids = torch.randint(1000, 30000, (batch, 64), device=GPU.device)
    widths = [Subnet.from_multipliers(engine.config, w) for w in WIDTHS]
    subnets = [widths[i % 4] for i in range(batch)]
    groups = [(ids[i::4].contiguous(), widths[i]) for i in range(4)]
    together = engine(ids, subnet=subnets).last_hidden_state
    apart = [engine(part, subnet=s).last_hidden_state for part, s in groups]
    agree("bf16", [together[i::4] for i in range(4)], apart)
    rows = race(
        benchmark,
        {
            "one call": lambda: engine(ids, subnet=subnets),
            "a call for each": lambda: [engine(part, subnet=s) for part, s in groups],
        },
    )
    ratio = rows["a call for each"]["ms"] / rows["one call"]["ms"]
    bars = [bar("times as fast as a call for each width", ratio, 1.5)]
    _record(benchmark, f"mixed batch of {batch}", list(rows.values()), bars)


def test_switch_and_memory(benchmark):
    """Host time and memory of serving all twelve sub-networks."""
    _, engine = models()
    ids = torch.randint(1000, 30000, (1, 32), device=GPU.device)
    engine(ids)
    if COMPILE_ONLY:
        pytest.skip("compiled, not measured")
    before = GPU.reserved()
    subnets = grid(engine.config)
    for subnet in subnets:
        engine(ids, subnet=subnet)
    grown = GPU.reserved() - before

    def host(order: Sequence[Subnet]) -> float:
        start = time.perf_counter()
        for subnet in order:
            engine(ids, subnet=subnet)
        return 1e6 * (time.perf_counter() - start) / len(order)

    times: dict[str, list[float]] = {"grouped": [], "alternating": []}

    def one_round() -> None:
        times["grouped"].append(host([s for s in subnets for _ in range(20)]))
        times["alternating"].append(host(subnets * 20))

    benchmark.pedantic(one_round, rounds=7)
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = [
        {"name": f"a call, {name}", "dtype": "bf16", "ms": value / 1e3, "calls": 7}
        for name, value in medians.items()
    ]
    bars = [
        bar("us more a call", medians["alternating"] - medians["grouped"], most=5),
        bar("memory of twelve over one model", 1 + grown / engine.nbytes, most=1.05),
    ]
    _record(benchmark, "switching", rows, bars)


# ---- the ops ----

PRODUCTS = {"qkv": 3 * D, "out": D, "up": N, "down": N}


def product(name: str, k: int, tokens: int) -> dict[str, tuple[Run, Run, Callable[[Any], Tensor]]]:
    """By direction: ours, the library's, and what of ours is compared."""
    weight = noise(PRODUCTS[name], D, std=0.02)
    used, dispatch = weight[:k], ops.autograd.dispatch
    if name in ("out", "down"):
        x, grad, bias = noise(tokens, k), noise(tokens, D), noise(D)
        back = functools.partial(dispatch, "contract_backward", grad, x, weight, [k], [tokens])
        return {
            "forward": (
                lambda: ops.contract(x, weight, bias, k),
                lambda: torch.addmm(bias, x, used),
                lambda out: out,
            ),
            "input gradient": (
                lambda: back(True, False),
                lambda: grad @ used.T,
                lambda out: out[0],
            ),
            "weight gradient": (
                lambda: back(False, True),
                lambda: x.T @ grad,
                lambda out: out[1][:k],
            ),
        }
    x, grad, bias = noise(tokens, D), noise(tokens, k), noise(PRODUCTS[name])
    empty = x.new_empty(0)
    back = functools.partial(dispatch, "expand_backward", grad, x, weight, empty, [k], [tokens], "")
    return {
        "forward": (
            lambda: ops.expand(x, weight, bias, k),
            lambda: F.linear(x, used, bias[:k]),
            lambda out: out,
        ),
        "input gradient": (lambda: back(True, False), lambda: grad @ used, lambda out: out[0]),
        "weight gradient": (
            lambda: back(False, True),
            lambda: grad.T @ x,
            lambda out: out[1][:k],
        ),
    }


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_product(benchmark, name, tokens):
    """Forward, input gradient and weight gradient at every width, against cuBLAS."""
    runs: dict[str, Run] = {}
    with torch.no_grad():
        for width in WIDTHS:
            calls = product(name, int(width * PRODUCTS[name]), tokens)
            for part, (ours, library, compared) in calls.items():
                agree("bf16", [compared(ours())], [library()])
                runs[f"ours, w{width:.2f} {part}"] = ours
                runs[f"cuBLAS, w{width:.2f} {part}"] = library
        rows = race(benchmark, runs, rounds=3)  # of 24 candidates
    ratios: dict[str, list[float]] = {}
    for label, found in rows.items():
        who, _, what = label.partition(", ")
        if who == "cuBLAS":
            found["ratio"] = found["ms"] / rows[f"ours, {what}"]["ms"]
            ratios.setdefault(what.split(" ", 1)[1], []).append(found["ratio"])
    bars = [bar(f"of cuBLAS' speed, {part}, least", min(r), 0.95) for part, r in ratios.items()]
    _record(benchmark, f"{name}, {tokens} tokens", list(rows.values()), bars)


@functools.cache
def bandwidth() -> float:
    """Bytes per second of a copy."""
    a = torch.empty(2**28, dtype=torch.uint8, device=GPU.device)
    b = torch.empty_like(a)
    return 2 * a.numel() / (1e-3 * GPU.milliseconds(lambda: b.copy_(a)))


def test_rows(benchmark):
    """What is bound by memory, against the time a copy of as many bytes takes."""
    tokens = 32768
    x, r, w, b = noise(tokens, D), noise(tokens, D), noise(D), noise(D)
    y, z, mean, rstd = ops.autograd.dispatch("residual_norm", x, r, w, b, EPS, 0.0, None)
    agree("bf16", [y], [F.layer_norm((x + r).float(), [D], w.float(), b.float(), EPS)])
    one = torch.ones((), device=GPU.device)
    dispatch = ops.autograd.dispatch
    matrix = 2 * tokens * D  # bytes
    runs = {
        "residual_norm forward": (4, lambda: ops.residual_norm(x, r, w, b, EPS)),
        "residual_norm backward": (
            3,
            lambda: dispatch("residual_norm_backward", x, z, mean, rstd, w, 0.0, None),
        ),
        "hidden_mse forward": (2, lambda: ops.hidden_mse(x, r)),
        "hidden_mse backward": (3, lambda: dispatch("hidden_mse_backward", one, [x], [r], [1.0])),
    }
    rows = race(benchmark, {name: run for name, (_, run) in runs.items()})
    bars = []
    for name, (matrices, _) in runs.items():
        share = matrices * matrix / bandwidth() / (1e-3 * rows[name]["ms"])
        rows[name]["share"] = share
        bars.append(bar(f"{name}, share of copy bandwidth", share, 0.85))
    _record(benchmark, f"rows, {tokens} tokens", list(rows.values()), bars)


def varlen(qkv: Tensor, offsets: Tensor, length: int) -> Run:
    """Torch's attention over packed sequences (FlashAttention), where this torch has it."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t.contiguous() for t in qkv.view(-1, H, 3, HEAD).unbind(2))
    return lambda: varlen_attn(q, k, v, offsets, offsets, length, length)


@pytest.mark.parametrize("length", [32, 64, 128, 512])
def test_attention(benchmark, length):
    """Forward and backward, against SDPA and the packed attention of torch."""
    tokens = 16384
    qkv = noise(tokens, 3 * D)
    offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=GPU.device)
    q, k, v = qkv.view(-1, length, H, 3, HEAD).permute(3, 0, 2, 1, 4).unbind(0)
    q, k, v = (t.contiguous() for t in (q, k, v))
    want = F.scaled_dot_product_attention(q, k, v)
    out, lse = ops.autograd.dispatch(
        "attention", qkv, offsets, length, [H], [len(offsets) - 1], HEAD, 0.0, None
    )
    agree("bf16", [out], [want.transpose(1, 2).reshape(tokens, D)])
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        theirs = F.scaled_dot_product_attention(*leaves)
    grad = torch.randn_like(out)
    theirs_grad = grad.view(-1, length, H, HEAD).transpose(1, 2)
    arguments = (offsets, length, [H], [len(offsets) - 1], HEAD, 0.0, None)
    runs: dict[str, Run] = {
        "ours, forward": lambda: ops.attention(qkv, offsets, length, HEAD, H),
        "SDPA, forward": lambda: F.scaled_dot_product_attention(q, k, v),
        "ours, backward": lambda: ops.autograd.dispatch(
            "attention_backward", grad, qkv, out, lse, *arguments
        ),
        "SDPA, backward": lambda: torch.autograd.grad(
            theirs, leaves, theirs_grad, retain_graph=True
        ),
    }
    absent: list[str] = []
    add_peer(runs, absent, "varlen, forward", lambda: varlen(qkv, offsets, length))
    rows = race(benchmark, runs)
    best = min(r["ms"] for n, r in rows.items() if n.endswith("forward") and n[0] != "o")
    back = rows["SDPA, backward"]["ms"] / rows["ours, backward"]["ms"]
    least = 1.3 if length <= 128 else None
    bars = [
        bar("forward, times as fast as the best", best / rows["ours, forward"]["ms"], least),
        bar("backward, times as fast as SDPA's", back),
    ]
    _record(benchmark, f"attention, length {length}", list(rows.values()), bars, absent)
