"""Candidates take turns in rounds; what each case measured goes to the report."""

from __future__ import annotations

import functools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import pytest
import torch

from dynabert_fast.engine import measure_peak

THREADS = 2
# Seconds before each turn: ONNX Runtime's threads spin for 40 ms after a call, torch's for 10.
PAUSE = 0.06
#: Set by `run_gpu.py`: compile kernels and measure nothing; `time.time()` at which all must end.
COMPILE_VARIABLE = "DYNABERT_FAST_BENCH_COMPILE"
DEADLINE_VARIABLE = "DYNABERT_FAST_BENCH_DEADLINE"
COMPILE_ONLY = COMPILE_VARIABLE in os.environ


def remaining() -> float:
    """Seconds that are left."""
    return float(os.environ.get(DEADLINE_VARIABLE, "inf")) - time.time()


def compile_only(runs: Mapping[str, Callable[[], object]]) -> NoReturn:
    """Each of them once; no more of this test."""
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    pytest.skip("compiled, not measured")


@functools.cache
def peak(dtype: str) -> float:
    """Operations per second of the matrix kernel on data in the first cache, on all threads."""
    return THREADS * measure_peak(dtype, seconds=0.3)


def race(
    benchmark: Any,
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    warm: bool = True,
    pause: float = PAUSE,
) -> dict[str, list[float]]:
    """Seconds of every timed call of every run.

    A turn is a pause in which the threads of others fall asleep, an untimed call that wakes one's
    own (unless a call is too long for that to matter), and `calls` timed ones.
    """
    if COMPILE_ONLY:
        compile_only(runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)

    def one_round() -> None:
        for name in order.sample(list(runs), len(runs)):
            run = runs[name]
            time.sleep(pause)
            if warm:
                run()
            for _ in range(calls):
                start = time.perf_counter()
                output = run()
                seconds[name].append(time.perf_counter() - start)
                del output  # not timed

    # Compiled again, a peer would be another one than was checked.
    with torch._dynamo.config.patch(error_on_recompile=True):
        benchmark.pedantic(one_round, rounds=rounds)
    return seconds


def row(name: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "ms": 1e3 * statistics.median(seconds),
        "best_ms": 1e3 * min(seconds),
        "calls": len(seconds),
        **more,
    }


def bar(
    what: str, measured: float, least: float | None = None, most: float | None = None, **more: Any
) -> dict[str, Any]:
    """A figure with a goal."""
    return {"what": what, "measured": measured, "least": least, "most": most, **more}


def record(
    benchmark: Any,
    case: str,
    rows: list[dict[str, Any]],
    bars: list[dict[str, Any]],
    absent: Iterable[str] = (),
    report: str = "cpu_engine",
) -> None:
    reasons = list(dict.fromkeys(absent))
    benchmark.extra_info |= {
        "case": case,
        "rows": rows,
        "bars": bars,
        "absent": reasons,
        "report": report,
    }
