"""Tests and benchmarks on a GPU within eight minutes: `make gpu`.

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

from dynabert_fast.ops.choices import CACHE_VARIABLE

from .race import COMPILE_VARIABLE, DEADLINE_VARIABLE
from .report import RUN_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480.0
#: Of the first stage, in which tests that hang would leave nothing for the benchmarks.
MOST_FOR_TESTS = 170.0
#: It takes nearly all memory, to see what happens: the last of all.
ALONE = "tests/engine/test_gpu.py::test_out_of_memory"
#: Tests that one process would take long for, in parts (`pytest -k`).
SPLIT = {
    "tests/ops/test_devices.py": (
        "float32",
        "bfloat16",
        "float16 and not bfloat16",
        "not float32 and not bfloat16 and not float16",
    ),
    "tests/engine/test_persistent.py": (
        "without_python",
        "sanitized",
        "every and base",
        "not without_python and not sanitized and not (every and base)",
    ),
}
NO_TESTS = 5  # pytest's code
#: File, what of it (`pytest -k`), and its seconds at most. What says most is first, peers that
#: compile for minutes are last.
BENCHMARKS = (
    ("bench_distillation_gpu.py", "step", 90),
    ("bench_gpu.py", "(forward or real) and not compiled", 60),
    ("bench_gpu.py", "latency", 60),
    ("bench_distillation_gpu.py", "not step", 40),
    ("bench_gpu.py", "rows or attention", 40),
    ("bench_gpu.py", "widths or mixed or switch", 40),
    ("bench_gpu.py", "product", 120),
    ("bench_gpu.py", "compiled", 400),
)
#: What is compiled apart, for it takes longest.
COMPILED = (
    ("bench_distillation_gpu.py", "step and 128"),
    ("bench_distillation_gpu.py", "share"),
    *(("bench_gpu.py", f"product and {name}") for name in ("qkv", "out", "up", "down")),
    *(("bench_gpu.py", f"attention and {length}") for length in (32, 64, 128, 512)),
    ("bench_gpu.py", "rows"),
    ("bench_gpu.py", "widths or switch"),
    ("bench_gpu.py", "mixed"),
    ("bench_gpu.py", "latency"),
    ("bench_gpu.py", "(forward or real) and not compiled"),
)
#: How a part ends that was interrupted and goes on: seconds, and what is sent after them. The first
#: has pytest say where it hangs.
ENDS = ((signal.SIGABRT, 5.0), (signal.SIGKILL, 1.0))


class Part:
    """A run of pytest with the output in a file."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = " ".join(arguments)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `finish`)
        self.stopped = False
        # What passed tests print too; and where a thread hangs, for its test may not return.
        options = ["-q", "-rP", "-o", "timeout_method=thread"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *arguments],
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

    def interrupt(self) -> None:
        """Have it say what it found so far, and end."""
        if self.process.poll() is None:
            self.stopped = True
            os.kill(self.process.pid, signal.SIGINT)

    def _end(self) -> None:
        if not self.stopped:  # once: a second would end what it is saying
            self.interrupt()
        for number, seconds in ENDS:
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.kill(self.process.pid, number)

    def finish(self, until: float) -> bool:
        """Wait, but no longer; show what it said. Whether it passed."""
        try:
            self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._end()
        self._kill()
        code = self.process.wait()
        found = {0: "passed", NO_TESTS: "nothing to run"}.get(code, f"failed with {code}")
        if self.stopped:
            found = "stopped, for it took too long"
        self.output.seek(0)
        text = self.output.read().decode(errors="replace").rstrip()
        self.output.close()
        if found != "nothing to run":
            print(f"==== {self.name}: {found}\n{text}\n", flush=True)
        return found in ("passed", "nothing to run")


def tests() -> list[list[str]]:
    """Arguments of pytest: files with tests of a GPU, some of them in parts."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "mark.gpu" in path.read_text(encoding="utf-8"):
            name = str(path.relative_to(ROOT))
            found += [[name, "-k", words] for words in SPLIT[name]] if name in SPLIT else [[name]]
    return found


def main(seconds: float = SECONDS) -> int:
    start = time.monotonic()
    end = start + seconds
    # Versions, the device, and which backends this installation has, or why not.
    subprocess.run([sys.executable, "-m", "dynabert_fast.cli.main", "info"], cwd=ROOT, check=False)
    # The first configuration of each kernel: choosing takes time, and is what benchmarks are for.
    untuned = {"DYNABERT_FAST_TUNE": "0"}
    once = {RUN_VARIABLE: str(time.time()), DEADLINE_VARIABLE: str(time.time() + seconds)}

    only = ["-m", "gpu", "--timeout=120", "--deselect", ALONE]
    until = min(end, start + MOST_FOR_TESTS)
    with tempfile.TemporaryDirectory() as folder:  # what is chosen on a busy device is not kept
        busy = {COMPILE_VARIABLE: "1", CACHE_VARIABLE: folder}
        parts = [Part([*only, *chosen], untuned) for chosen in tests()]
        parts += [Part([f"benchmarks/{f}", "-k", words], busy) for f, words in COMPILED]
        while time.monotonic() < until and any(part.process.poll() is None for part in parts):
            time.sleep(0.2)
        for part in parts:  # all at once: each may take a while
            part.interrupt()
        passed = [part.finish(until + 20) for part in parts]
    print(f"tests took {time.monotonic() - start:.0f} s\n", flush=True)

    for file, words, most in BENCHMARKS:
        part = Part([f"benchmarks/{file}", "--benchmark-only", "-k", words], once)
        passed.append(part.finish(min(end, time.monotonic() + most)))
    passed.append(Part(["-m", "gpu", ALONE], untuned).finish(end))
    print(f"all took {time.monotonic() - start:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])))
