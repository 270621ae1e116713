"""The CPU engine against its peers: BERT-base, two threads, every bar a ratio of one run.

    pytest benchmarks/bench_cpu_engine.py --benchmark-only [-k "int8 and 1x128"]

A round runs every candidate of a case once, in an order of its own; medians over the rounds are
compared. Outputs are compared with float64 before anything is timed: a peer that computes something
else, or that is not installed, has no row, and the report says why. pytest-benchmark's own table
shows whole rounds. Reports go to `results/cpu_engine.json` and `results/cpu_engine.md`; a case that
runs alone replaces its part of them.

A case's floor is the time of its linear layers at the measured peak of the matrix kernel on all
threads; its limit is the ratio that an engine at the floor would reach. No bar above its limit can
be met on that machine.
"""

from __future__ import annotations

import csv
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynabert_fast.engine import DTYPES, load, measure_peak
from dynabert_fast.models import DynaBertConfig, DynaBertModel
from dynabert_fast.subnet import Subnet, grid

from .peers import (
    Absent,
    Batch,
    Candidate,
    check,
    cosine,
    dynabert,
    engine,
    onnx_runtime,
    openvino_cpu,
    ours,
    random_batch,
    reference,
    torch_compile,
    transformers_eager,
)
from .race import THREADS, bar, peak, race, record, row

OURS = "dynabert_fast"
SST2_BATCH = 32
SST2_BATCHES = 4
# Tokens of SST-2's development sentences: every twentieth of the 872, sorted. Drawn from where the
# data themselves are not on hand.
SST2_LENGTHS = [
    *(7, 9, 10, 11, 12, 13, 14, 14, 15, 16, 17, 18, 18, 19, 20, 20, 21, 22, 22, 23, 24, 24),
    *(25, 25, 26, 27, 27, 28, 29, 30, 30, 31, 32, 33, 34, 35, 36, 38, 39, 40, 41, 44, 47, 54),
]

Shape = tuple[int, int]
Makers = Mapping[str, Iterable[Callable[[Shape | None], Candidate]]]


def _torch_makers(dtype: str) -> list[Callable[[Shape | None], Candidate]]:
    return [
        lambda _: transformers_eager(dtype),
        lambda _: torch_compile(dtype),
        lambda _: torch_compile(dtype, "zentorch"),
    ]


PEERS: Makers = {
    "int8": [
        lambda _: onnx_runtime("int8", optimised=False),
        lambda _: onnx_runtime("int8", optimised=True),
        lambda shape: openvino_cpu("int8", shape),
    ],
    "bf16": [*_torch_makers("bf16"), lambda shape: openvino_cpu("bf16", shape)],
    "fp32": [
        *_torch_makers("fp32"),
        lambda _: onnx_runtime("fp32", optimised=False),
        lambda _: onnx_runtime("fp32", optimised=True),
        lambda shape: openvino_cpu("fp32", shape),
    ],
}
BEST = "the best peer"
BF16_BARS = {"torch.compile, zentorch": 1.2, "torch.compile": 1.4, "OpenVINO": 1.9}


# ---- measuring ----


def line_up(
    makers: Iterable[Callable[[], Candidate]], batches: list[Batch]
) -> tuple[list[tuple[Candidate, float]], list[str]]:
    """The candidates that compute the right thing, with their cosine; why others are absent."""
    wanted = [reference(batch) for batch in batches]
    present, absent = [], []
    for make in makers:
        candidate = None
        try:
            candidate = make()
            pairs = zip(batches, wanted, strict=True)
            present.append((candidate, min(check(candidate, *pair) for pair in pairs)))
        except (Absent, RuntimeError) as error:  # compilers raise kinds of RuntimeError
            if candidate is not None and candidate.name == OURS:
                raise
            name = f"{candidate.name} ({candidate.dtype}): " if candidate else ""
            absent.append(name + str(error).strip().splitlines()[0])
    return present, absent


def linear_operations(tokens: int, subnet: Subnet | None = None) -> int:
    """Of the linear layers inside the encoder, a multiply-add counting 2."""
    config = dynabert().config
    subnet = subnet or Subnet.full(config)
    weights = sum(
        (4 * heads * config.head_size + 2 * neurons) * config.hidden_size
        for heads, neurons in zip(subnet.heads, subnet.neurons, strict=True)
    )
    return 2 * tokens * weights


def floor(dtype: str, tokens: int) -> float:
    """Seconds of a full model's linear layers at the peak."""
    return linear_operations(tokens) / peak(dtype)


def compete(
    benchmark: Any,
    case: str,
    makers: Iterable[Callable[[], Candidate]],
    batches: list[Batch],
    bars: Mapping[str, float | None],
    rounds: int,
    calls: int = 1,
    warm: bool = True,
) -> None:
    """Race ours, the last of the candidates, against the others over all batches in turn."""
    present, absent = line_up(makers, batches)
    runs = {
        c.name + f" ({c.dtype})": lambda c=c: [c.run(b) for b in batches][-1] for c, _ in present
    }
    seconds = race(benchmark, runs, rounds, calls, warm)
    rows = [
        row(c.name, seconds[label], dtype=c.dtype, cosine=similar)
        for label, (c, similar) in zip(runs, present, strict=True)
    ]
    mine, theirs = rows[-1], rows[:-1]
    lowest = 1e3 * floor(mine["dtype"], sum(int(b.mask.sum()) for b in batches))
    for r in theirs:
        r["ratio"] = r["ms"] / mine["ms"]
    asked = []
    for peer, least in bars.items():
        found = [r["ms"] for r in theirs if peer in (BEST, r["name"])]
        if found:
            ratio, limit = min(found) / mine["ms"], min(found) / lowest
            what = f"times as fast as {peer}" + " present" * bool(peer == BEST and absent)
            asked.append(bar(what, ratio, least, limit=limit))
    rows.append({"name": "floor", "dtype": mine["dtype"], "ms": lowest})
    record(benchmark, case, rows, asked, absent)


@pytest.fixture(autouse=True)
def _forget_compiled():
    """torch.compile keeps at most 8 versions of one function, whichever model it is of."""
    yield
    torch.compiler.reset()


# ---- against peers ----


@pytest.mark.parametrize(
    ("dtype", "batch", "length", "bars", "rounds", "calls"),
    [
        pytest.param("int8", 1, 16, {BEST: 1.6}, 15, 3, id="int8-1x16"),
        pytest.param("int8", 1, 32, {BEST: 1.6}, 15, 3, id="int8-1x32"),
        pytest.param("int8", 1, 128, {BEST: 1.8}, 15, 2, id="int8-1x128"),
        pytest.param("int8", 8, 128, {BEST: 1.7}, 7, 1, id="int8-8x128"),
        pytest.param("bf16", 1, 128, BF16_BARS, 11, 2, id="bf16-1x128"),
        pytest.param("bf16", 8, 128, BF16_BARS, 5, 1, id="bf16-8x128"),
        pytest.param("fp32", 1, 32, {BEST: None}, 9, 2, id="fp32-1x32"),
        pytest.param("fp32", 1, 128, {BEST: 1.15}, 9, 1, id="fp32-1x128"),
        pytest.param("fp32", 8, 128, {BEST: None}, 3, 1, id="fp32-8x128"),
    ],
)
def test_peers(benchmark, dtype, batch, length, bars, rounds, calls):
    makers = [functools.partial(make, (batch, length)) for make in PEERS[dtype]]
    makers.append(functools.partial(ours, dtype))
    batches = [random_batch(batch, length)]
    case = f"{dtype} {batch}x{length}"
    compete(benchmark, case, makers, batches, bars, rounds, calls, warm=batch == 1)


def sst2_lengths() -> tuple[list[int], str]:
    """Lengths of sentences in the order of the file, and where they come from."""
    root = os.environ.get("DYNABERT_FAST_DATA")
    if root is None:
        drawn = np.random.default_rng(0).choice(SST2_LENGTHS, SST2_BATCH * SST2_BATCHES)
        return drawn.tolist(), "lengths like SST-2's"
    from tokenizers import BertWordPieceTokenizer

    with (Path(root) / "SST-2" / "dev.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        sentences = [r["sentence"] for r in rows]
    vocabulary = Path(root) / "vocab" / "bert-base-uncased" / "vocab.txt"
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    return [len(e.ids) for e in tokenizer.encode_batch(sentences)], "SST-2 dev"


def test_real_lengths(benchmark):
    """Ours computes real tokens only; a peer's batch is padded to its longest sentence."""
    found, source = sst2_lengths()
    whole = len(found) // SST2_BATCH
    chosen = range(0, whole, max(1, whole // SST2_BATCHES))[:SST2_BATCHES]
    groups = [found[i * SST2_BATCH : (i + 1) * SST2_BATCH] for i in chosen]
    batches = [random_batch(SST2_BATCH, max(group), group) for group in groups]
    # The int8 peers, with shapes left open; bf16 in zentorch takes 1.7 times as long (Zen 4).
    makers = [functools.partial(make, None) for make in PEERS["int8"]]
    makers.append(functools.partial(ours, "int8"))
    case = f"int8, {SST2_BATCHES} batches of {SST2_BATCH}, {source}"
    compete(benchmark, case, makers, batches, {BEST: 2.5}, rounds=3, warm=False)


# ---- the engine alone ----


def small(config: Any) -> Subnet:
    return Subnet.from_multipliers(config, 0.25, 0.5)


def test_subnet(benchmark):
    """An eighth of the work at 1 x 128: what is left of it as time."""
    packed, batch = engine("int8"), random_batch(1, 128)
    least = small(packed.config)
    with torch.inference_mode():
        want = dynabert()(batch.tensors[0], subnet=least).last_hidden_state
    got = packed(batch.ids, subnet=least).last_hidden_state
    assert cosine(got, want.numpy()) > 0.999
    runs = {
        "full": lambda: packed(batch.ids),
        str(least): lambda: packed(batch.ids, subnet=least),
    }
    seconds = race(benchmark, runs, rounds=15, calls=5, pause=0)
    rows = [row(name, times, dtype="int8") for name, times in seconds.items()]
    ratio = rows[0]["ms"] / rows[1]["ms"]
    record(
        benchmark,
        "int8 1x128, a small sub-network",
        rows,
        [bar(f"{least} times as fast as full", ratio, 6.5)],
    )


def test_mixed(benchmark):
    """Two sequences of each of the twelve sub-networks in one call, against calls of one each.

    The ideal is the time of the same operations at the rates of homogeneous calls of as many
    sequences: the mean over the sub-networks of such a call's time.
    """
    packed = engine("int8")
    subnets = grid(packed.config)
    mixed = [subnet for subnet in subnets for _ in range(2)]
    batch = random_batch(len(mixed), 128)
    got = packed(batch.ids, subnet=mixed).last_hidden_state
    for i, subnet in enumerate(mixed):
        alone = packed(batch.ids[i : i + 1], subnet=subnet).last_hidden_state
        assert np.array_equal(got[i], alone[0])
    runs = {str(s): lambda s=s: packed(batch.ids, subnet=s) for s in subnets}
    runs["mixed"] = lambda: packed(batch.ids, subnet=mixed)
    seconds = race(benchmark, runs, rounds=4, warm=False, pause=0)
    rows = [row(name, times, dtype="int8") for name, times in seconds.items()]
    ideal = statistics.fmean(r["ms"] for r in rows[:-1])
    record(
        benchmark,
        f"int8 {len(mixed)}x128, all sub-networks",
        rows,
        [bar("speed of the mixed call over the ideal", ideal / rows[-1]["ms"], 0.9)],
    )


@pytest.mark.parametrize(
    ("dtype", "batch", "length"),
    [
        pytest.param(dtype, batch, 128, id=f"{dtype}-{batch}x128")
        for dtype in reversed(DTYPES)
        for batch in (1, 8)
    ],
)
def test_share_of_peak(benchmark, dtype, batch, length):
    """Linear layers inside the running encoder, with what is fused into them."""
    packed, ids = engine(dtype), random_batch(batch, length).ids
    stages: dict[str, list[float]] = {}
    peaks = []

    def one_round() -> None:
        peaks.append(THREADS * measure_peak(dtype, seconds=0.05))
        for stage, seconds in packed(ids, profile=True).seconds.items():
            stages.setdefault(stage, []).append(seconds)

    packed(ids)
    benchmark.pedantic(one_round, rounds=7)
    spent = sum(statistics.median(stages[stage]) for stage in ("qkv", "out", "up", "down"))
    share = linear_operations(batch * length) / spent / statistics.median(peaks)
    record(
        benchmark,
        f"{dtype} {batch}x{length}, profile",
        [row(stage, times, dtype=dtype) for stage, times in stages.items()],
        [bar("share of the peak of the linear layers", share, 0.85)],
    )


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_switch(benchmark):
    """The same calls of two sub-networks of a tiny model: grouped, and switching at every call."""
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    packed = DynaBertModel(config).eval().pack("int8", threads=1)
    subnets = [Subnet.from_multipliers(config, width) for width in (1.0, 0.5)]
    ids = np.arange(4)[None]
    for subnet in subnets:
        packed(ids, subnet=subnet)
    grouped = [subnet for subnet in subnets for _ in range(250)]

    def calls(order: list[Subnet]) -> Callable[[], None]:
        def run() -> None:
            for subnet in order:
                packed(ids, subnet=subnet)

        return run

    def look_up() -> None:
        for subnet in alternating:
            packed._number(subnet)

    alternating = subnets * 250
    runs = {
        "500 calls, grouped": calls(grouped),
        "500 calls, alternating": calls(alternating),
        "500 look-ups": look_up,
    }
    seconds = race(benchmark, runs, rounds=40, pause=0)
    rows = [row(name, times, dtype="int8") for name, times in seconds.items()]
    one, other, looked = (1e3 * r["ms"] / len(grouped) for r in rows)  # microseconds a call

    large = engine("int8")
    batch = random_batch(1, 128)
    large(batch.ids)
    before = resident_bytes()
    for subnet in grid(large.config):
        large(batch.ids, subnet=subnet)
    grown = resident_bytes() - before
    record(
        benchmark,
        "switching",
        rows,
        [
            bar("microseconds more a call than without switching", other - one, most=1),
            bar("microseconds to look a sub-network up", looked, most=1),
            # A page or two may come from Python itself; copying any sub-network would take 10 MB.
            bar("MB that the process grows by at its first use of 12", grown / 1e6, most=0.1),
        ],
    )


def test_load(benchmark, tmp_path):
    """From opening a file to the first result, less the time of one more call."""
    ids = random_batch(1, 128).ids
    for dtype in DTYPES:
        engine(dtype).save(tmp_path / dtype)
    beyond: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}

    def one_round() -> None:
        for dtype in DTYPES:
            start = time.perf_counter()
            opened = load(tmp_path / dtype, threads=THREADS)
            opened(ids)
            first = time.perf_counter()
            opened(ids)
            second = time.perf_counter()
            beyond[dtype].append((first - start) - (second - first))

    benchmark.pedantic(one_round, rounds=9, warmup_rounds=1)
    rows = [row(dtype, times[1:], dtype=dtype) for dtype, times in beyond.items()]
    record(
        benchmark,
        "loading",
        rows,
        [bar("ms to the first result beyond one inference, int8", rows[-1]["ms"], most=50)],
    )


def test_pack(benchmark):
    """Packing, the packed bytes against one byte a weight, and int8 against fp32."""
    model = dynabert()
    start = time.perf_counter()
    benchmark.pedantic(lambda: model.pack("int8", threads=THREADS), rounds=1)
    rows = [row("model.pack", [time.perf_counter() - start], dtype="int8")]
    raw = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 1 and not name.endswith("bias")
    )
    batch = random_batch(4, 128, (128, 77, 31, 5))
    states = [
        batch.real(engine(dtype)(batch.ids, lengths=batch.lengths).last_hidden_state)
        for dtype in ("int8", "fp32")
    ]
    record(
        benchmark,
        "packing",
        rows,
        [
            bar("bytes over one byte a weight", engine("int8").nbytes / raw, most=1.02),
            bar("cosine of last hidden states, int8 and fp32", cosine(*states), 0.999),
        ],
    )
