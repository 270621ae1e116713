"""A step of stage 2 on a GPU, BERT-base and bf16, against the published algorithm as a plain loop.

    pytest benchmarks/bench_distillation_gpu.py --benchmark-only        (`make gpu` runs it)

As `bench_distillation.py`, but for the loop, which has bf16 autocast and
`scaled_dot_product_attention`, and for the batch, which both contestants share: 16384 tokens,
in sequences of 128 or of SST-2's lengths, which the loop pads to the longest.
Memory is what the allocator held at the peak of a step, models and optimiser included.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dynabert_fast.ops.choices import TUNE_VARIABLE

from . import distillation as d
from .bench_gpu import choose_by, run_all
from .race import COMPILE_ONLY, bar, race, row
from .report import gpu_report
from .report import record_gpu as _record

TOKENS = 2048 if COMPILE_ONLY else 16384  # kernels are the same, and several processes compile
PEAK = 790e12  # bf16 operations a second that an H200's matrix products reach
SIZE = "bert-base"
DEVICE = "cuda"
ROUNDS = 5

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _device_report():
    gpu_report(DEVICE)
    if COMPILE_ONLY:
        choose_by(run_all)


def check() -> None:
    """Gradients first; of 64 tokens, for which no configurations need be measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TUNE_VARIABLE, "0")
        d.check(SIZE, "bf16", "bf16", DEVICE)


@functools.cache
def models() -> Any:
    return tuple(model.to(DEVICE) for model in d.models(SIZE))


def batch_of(case: str) -> d.Batch:
    """On the host; see `placed`."""
    if case == "length 128":
        return d.fixed(TOKENS // d.LENGTH)
    lengths = d.draw(case, TOKENS)
    totals = torch.tensor(lengths).cumsum(0)
    texts = d.Texts(lengths[: int((totals <= TOKENS).sum())])
    return d.collate(texts, range(len(texts)))


def ours(teacher: str = "same", subnets_per_pass: int | None = None) -> Any:
    return d.Ours(models(), "bf16", teacher, subnets_per_pass)


def placed(stepper: Any, batch: d.Batch) -> d.Batch:
    """Ours moves a batch itself, as a part of its step; the loop is given it on the device."""
    return batch if isinstance(stepper, d.Ours) else d.on(DEVICE, batch)


def plain(teacher: str = "same") -> Any:
    return d.loop(models(), "bf16", teacher, sdpa=True)


def finished(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call and all that it has the device do."""

    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait


@pytest.mark.parametrize(("case", "least"), [("length 128", 3.0), ("SST-2", 5.0)])
def test_step(benchmark, case, least):
    if not COMPILE_ONLY:
        check()
    batch = batch_of(case)
    makers = {"ours": ours} if COMPILE_ONLY else {"loop": plain, "ours": ours}
    steppers = {
        f"{who}, teacher at {teacher} width": make(teacher)
        for who, make in makers.items()
        for teacher in ("same", "full")
    }
    runs = {
        name: finished(functools.partial(stepper.step, placed(stepper, batch)))
        for name, stepper in steppers.items()
    }
    seconds = race(benchmark, runs, rounds=ROUNDS, pause=0)
    rows = {name: row(name, times, dtype="bf16") for name, times in seconds.items()}
    work = sum(d.step_operations(models()[0].config, d.lengths_of(batch)))
    bars = []
    for teacher in ("same", "full"):
        theirs, mine = (rows[f"{who}, teacher at {teacher} width"] for who in ("loop", "ours"))
        theirs["ratio"] = theirs["ms"] / mine["ms"]
        asked = {"least": least} if teacher == "same" else {}
        limit = {"limit": 1e-3 * theirs["ms"] * PEAK / work} if asked else {}
        what = f"times as fast as the loop, teacher at {teacher} width"
        bars.append(bar(what, theirs["ratio"], **asked, **limit))
    _record(benchmark, f"distillation step, {case}", list(rows.values()), bars)


def test_share(benchmark):
    """Share of 790 TFLOP/s, of the student's forward and backward alone and with its teacher's."""
    if COMPILE_ONLY:
        choose_by(lambda kernel, key, configs, launch: configs[0])
    check()
    if COMPILE_ONLY:
        pytest.skip("other kernels are those that `test_step` compiles")
    batch = batch_of("length 128")
    labels = batch | {"labels": torch.arange(len(batch["input_ids"])) % 2}
    student, teacher = d.step_operations(models()[0].config, d.lengths_of(batch))
    alone = d.Ours((models()[0], None), "bf16")
    whole = ours()
    runs = {
        "student, forward and backward": (student, lambda: alone.gradients(labels)),
        "student and teacher": (student + teacher, lambda: whole.gradients(batch)),
    }
    timed = {name: finished(run) for name, (_, run) in runs.items()}
    seconds = race(benchmark, timed, rounds=ROUNDS, pause=0)
    rows, bars = [], []
    for name, (work, _) in runs.items():
        found = row(name, seconds[name], dtype="bf16")
        found["share"] = work / PEAK / (1e-3 * found["ms"])
        rows.append(found)
        least = {"least": 0.4} if work == student else {}
        bars.append(bar(f"{name}, share of 790 TFLOP/s", found["share"], **least))
    _record(benchmark, "distillation, share of peak, length 128", rows, bars)


def test_memory(benchmark):
    if COMPILE_ONLY:
        pytest.skip("kernels that `test_step` has compiled")
    batch = batch_of("length 128")
    makers: dict[str, tuple[Callable[[], Any], float | None]] = {
        "loop": (plain, None),
        "ours": (ours, 2.0),
        "ours, 4 sub-networks a pass": (lambda: ours(subnets_per_pass=4), 1.0),
    }
    found: dict[str, int] = {}

    def measure() -> None:
        models()
        for name, (make, _) in makers.items():
            found[name] = memory(make, batch)

    benchmark.pedantic(measure, rounds=1)
    bars = []
    for name, (_, most) in makers.items():
        bars.append(bar(f"{name}, MB", found[name] / 1e6))
        if most is not None:
            bars.append(bar(f"{name}, of the loop's", found[name] / found["loop"], most=most))
    _record(benchmark, "distillation, peak memory, length 128", [], bars)


def memory(make: Callable[[], Any], batch: d.Batch) -> int:
    """Bytes at the peak of a step over what was held before the contestant was made."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    stepper = make()
    batch = placed(stepper, batch)
    stepper.step({name: tensor[:1, :8] for name, tensor in batch.items()})  # optimiser's state
    torch.cuda.reset_peak_memory_stats()
    stepper.step(batch)
    return torch.cuda.max_memory_allocated() - before
