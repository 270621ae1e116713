"""Tests and benchmarks on a GPU within nine minutes: `make gpu`.

    python -m benchmarks.run_gpu [SECONDS]

Each part runs in a process of its own: one that crashes, hangs or leaves the device unusable costs
its own results. Benchmarks write theirs after each case, so that what ends them early costs the
rest. First the tests run, all at once, beside processes that only compile the benchmarks' kernels,
as one process would take minutes for; then the benchmarks, one by one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .race import COMPILE_VARIABLE, DEADLINE_VARIABLE
from .report import RUN_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530.0
#: Of the first stage, in which tests that hang would leave nothing for the benchmarks.
MOST_FOR_TESTS = 200.0
#: One of these takes nearly all memory, to see what happens.
ALONE = "tests/engine"
NO_TESTS = 5  # pytest's code
#: File, what of it (`pytest -k`), and its seconds at most. Peers that compile for minutes are last.
BENCHMARKS = (
    ("bench_gpu.py", "rows or attention", 60),
    ("bench_gpu.py", "latency", 40),
    ("bench_gpu.py", "product", 120),
    ("bench_gpu.py", "widths or mixed or switch", 60),
    ("bench_distillation_gpu.py", "", 100),
    ("bench_gpu.py", "forward or real", 400),
)
#: What is compiled apart, for it takes longest.
COMPILED = (
    *(f"product and {name}" for name in ("qkv", "out", "up", "down")),
    *(f"attention and {length}" for length in (32, 64, 128, 512)),
    "rows",
    "widths or switch",
    "mixed",
    "latency",
    "forward or real",
)


class Part:
    """A run of pytest with the output in a file."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = " ".join(arguments)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `finish`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        atexit.register(self._kill)

    def _kill(self) -> None:
        """Also what it started: compilers wait for work that will not come."""
        atexit.unregister(self._kill)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self, until: float) -> bool:
        """Wait, but no longer; show what it said. Whether it passed."""
        try:
            code = self.process.wait(max(0.0, until - time.monotonic()))
            found = {0: "passed", NO_TESTS: "nothing to run"}.get(code, f"failed with {code}")
        except subprocess.TimeoutExpired:
            found = "stopped, for it took too long"
        self._kill()
        self.process.wait()
        self.output.seek(0)
        text = self.output.read().decode(errors="replace").rstrip()
        self.output.close()
        if found != "nothing to run":
            print(f"==== {self.name}: {found}\n{text}\n", flush=True)
        return found in ("passed", "nothing to run")


def tests() -> list[str]:
    """Folders of tests, and the files beside them."""
    found = [p for p in (ROOT / "tests").iterdir() if p.is_dir() or p.name.startswith("test_")]
    names = sorted(str(p.relative_to(ROOT)) for p in found if p.name != "__pycache__")
    return [name for name in names if name != ALONE]


def main(seconds: float = SECONDS) -> int:
    start = time.monotonic()
    end = start + seconds
    # The first configuration of each kernel: choosing takes time, and is what benchmarks are for.
    untuned = {"DYNABERT_FAST_TUNE": "0"}
    once = {RUN_VARIABLE: str(time.time()), DEADLINE_VARIABLE: str(time.time() + seconds)}

    until = min(end, start + MOST_FOR_TESTS)
    parts = [Part(["-m", "gpu", "--continue-on-collection-errors", t], untuned) for t in tests()]
    bench = "benchmarks/bench_gpu.py"
    compiling = [Part([bench, "-k", part], {COMPILE_VARIABLE: "1"}) for part in COMPILED]
    passed = [part.finish(until) for part in parts]
    passed += [part.finish(until) for part in compiling]
    passed.append(Part(["-m", "gpu", ALONE], untuned).finish(min(end, time.monotonic() + 90)))
    print(f"tests took {time.monotonic() - start:.0f} s\n", flush=True)

    for file, words, most in BENCHMARKS:
        chosen = ["-k", words] if words else []
        part = Part([f"benchmarks/{file}", "--benchmark-only", *chosen], once)
        passed.append(part.finish(min(end, time.monotonic() + most)))
    print(f"all took {time.monotonic() - start:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])))
