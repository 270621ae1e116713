"""A step of stage 2 on a CPU, against the published algorithm as a plain loop.

    pytest benchmarks/bench_distillation.py --benchmark-only [-k SST-2]

MiniLM's size (6 layers, D 384, 12 heads, N 1536, 30522 words), twelve sub-networks, dropout 0.1, a
step of forward, backward, clipping and AdamW. The loop (`baselines/dynabert_loop.py`) is eager fp32
with a teacher pass for each width; ours is `ElasticTrainer.training_step`, in bf16 as
`TrainingOptions(precision="bf16")` trains, and in fp32. Gradients are compared first.

With real lengths (`lengths.json`) each side has the batches of 32 that it would train on: the loop
shuffled ones padded to their longest, ours those of `LengthGroupedSampler`. Both draw from the same
texts; a few batches that stand for all are timed, and a time is that of 32 examples, averaged over
them. Contestants take turns; medians are compared.

A bar's limit is what the ratio would be if our matrix products, student's and teacher's, ran at the
peak of the bf16 kernel and all else took no time. Shares of that peak count the products of each
layer that sub-networks share once, two operations a multiplication, the backward as two forwards.

Memory is the growth of a process over what it holds after the imports: models, optimiser and a step
of 32 examples of 128 tokens. Reports go to `results/cpu_distillation.json` and `.md`.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dynabert_fast.training.memory import reused_memory

from . import distillation as d
from .race import THREADS, bar, peak, race, record, row

ROUNDS = 3
TEACHERS = {"same": "teacher at same width", "full": "teacher at full width"}
CASES = {"TREC": 8.0, "SST-2": 8.0, "length 128": 4.0}
_record = functools.partial(record, report="cpu_distillation")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    torch.set_num_threads(THREADS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with reused_memory():  # as in `ElasticTrainer.train`; the loop has it too
        yield


def batches_of(case: str) -> tuple[list[d.Batch], list[d.Batch]]:
    """The loop's, and ours."""
    if case == "length 128":
        return [d.fixed()], [d.fixed()]
    return d.random_batches(case, 2), d.grouped_batches(case, 4)


@pytest.mark.parametrize("case", CASES)
def test_step(benchmark, case):
    for precision in d.DTYPES:
        d.check("minilm", precision)
    models = d.models("minilm")
    padded, grouped = batches_of(case)
    contestants: dict[tuple[str, str, str], tuple[Any, list[d.Batch]]] = {}
    for teacher in TEACHERS:
        contestants["loop", "fp32", teacher] = d.loop(models, "fp32", teacher), padded
        contestants["ours", "bf16", teacher] = d.Ours(models, "bf16", teacher), grouped
    contestants["ours", "fp32", "same"] = d.Ours(models, "fp32", "same"), grouped

    def run(stepper: Any, batches: list[d.Batch]) -> None:
        for batch in batches:
            stepper.step(batch)

    runs = {key: functools.partial(run, *found) for key, found in contestants.items()}
    seconds = race(benchmark, runs, rounds=ROUNDS, warm=False)
    rows = {}
    for (who, precision, teacher), times in seconds.items():
        count = len(contestants[who, precision, teacher][1])
        each = [time / count for time in times]
        rows[who, precision, teacher] = row(f"{who}, {TEACHERS[teacher]}", each, dtype=precision)
    bars = []
    work = [d.step_operations(models[0].config, d.lengths_of(batch)) for batch in grouped]
    least = 1e3 * sum(map(sum, work)) / len(work) / peak("bf16")
    for precision, teacher in (("bf16", "same"), ("bf16", "full"), ("fp32", "same")):
        theirs = rows["loop", "fp32", teacher]
        ratio = theirs["ms"] / rows["ours", precision, teacher]["ms"]
        what = f"times as fast as the loop, {precision}, {TEACHERS[teacher]}"
        if precision == "bf16":
            theirs["ratio"] = ratio
        if (precision, teacher) == ("bf16", "same"):
            bars.append(bar(what, ratio, CASES[case], limit=theirs["ms"] / least))
        else:
            bars.append(bar(what, ratio))
    _record(benchmark, f"step, {case}", list(rows.values()), bars)


def test_share(benchmark):
    """Share of the peak, of the student's forward and backward alone and with its teacher's."""
    d.check("minilm", "bf16")
    models = d.models("minilm")
    batch = d.fixed()
    labels = batch | {"labels": torch.arange(d.BATCH) % 2}
    student, teacher = d.step_operations(models[0].config, d.lengths_of(batch))
    whole = d.Ours(models, "bf16", "same")
    alone = d.Ours((models[0], None), "bf16")
    runs = {
        "student, forward and backward": (student, lambda: alone.gradients(labels)),
        "student and teacher": (student + teacher, lambda: whole.gradients(batch)),
    }
    seconds = race(benchmark, {name: f for name, (_, f) in runs.items()}, rounds=ROUNDS, warm=False)
    rows, bars = [], []
    for name, (work, _) in runs.items():
        found = row(name, seconds[name], dtype="bf16")
        found["share"] = work / peak("bf16") / (1e-3 * found["ms"])
        rows.append(found)
        least = {"least": 0.5} if work == student else {}
        bars.append(bar(f"{name}, share of peak", found["share"], **least))
    _record(benchmark, "share, length 128", rows, bars)


def test_memory(benchmark):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    asked = {
        ("loop", "fp32"): 1.0,
        ("ours", "fp32"): 2.0,
        ("ours", "bf16"): 2.0,
        ("ours", "fp32", "4"): 1.0,
        ("ours", "bf16", "4"): 1.0,
    }
    found: dict[tuple[str, ...], int] = {}

    def measure() -> None:
        for key in asked:
            found[key] = memory(*key)

    benchmark.pedantic(measure, rounds=1)
    base = found["loop", "fp32"]
    bars = []
    for key, most in asked.items():
        who, precision, *per_pass = key
        name = f"{who}, {precision}" + (f", {per_pass[0]} sub-networks a pass" if per_pass else "")
        bars.append(bar(f"{name}, MB", found[key] / 1e6))
        if who == "ours":
            bars.append(bar(f"{name}, of the loop's", found[key] / base, most=most))
    _record(benchmark, "peak memory, length 128", [], bars)


def memory(who: str, precision: str, per_pass: str = "") -> int:
    """`distillation.peak_memory` in a process of its own, the teacher at the same width."""
    arguments = [who, precision, "same", *([per_pass] if per_pass else [])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.distillation", *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])
