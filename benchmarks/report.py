"""What races found, as text, JSON and Markdown."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dynabert_fast.engine import isas

from .race import record

RESULTS = Path(__file__).parent / "results"
CHANGED = "+changes"
#: Names a run of several processes, whose cases belong together whatever has changed since.
RUN_VARIABLE = "DYNABERT_FAST_BENCH_RUN"


@dataclass(frozen=True)
class Report:
    """A pair of files in `results/`.

    Attributes:
        title: Heading.
        source: Benchmark that writes it.
        packages: Whose versions it states.
        file: Name without suffix.
        isa: Of what was measured; default the CPU engine's.
        page: Document that also gets the table of bars.
    """

    title: str
    source: str
    packages: tuple[str, ...]
    file: str
    isa: str = ""
    page: Path | None = None


REPORTS = {
    "cpu_engine": Report(
        "The CPU engine against its peers",
        "bench_cpu_engine.py",
        ("numpy", "torch", "transformers", "zentorch", "onnx", "onnxruntime", "openvino", "nncf"),
        "cpu_engine",
    ),
    "cpu_ops": Report(
        "The ops in C++ against plain torch", "bench_ops.py", ("torch", "transformers"), "cpu_ops"
    ),
    "cpu_distillation": Report(
        "A distillation step against the published loop",
        "bench_distillation.py",
        ("torch", "transformers", "accelerate"),
        "cpu_distillation",
    ),
}


def gpu_report(device: str) -> None:
    """Name the GPU's report after the card."""
    card, capability = device, ""
    if device == "cuda":
        card = torch.cuda.get_device_name()
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
    REPORTS["gpu"] = Report(
        f"BERT-base on {card}",
        "bench_gpu.py",
        ("torch", "transformers", "triton"),
        re.sub(r"\W+", "-", card).strip("-").lower(),
        capability,
        RESULTS.parents[1] / "docs" / "gpu.md",
    )


def record_gpu(benchmark: Any, case: str, *found: Any) -> None:
    """`race.record`, and written at once: what ends the run early costs only what comes later."""
    record(benchmark, case, *found, report="gpu")
    write("gpu", {case: dict(benchmark.extra_info)}, {})


def write(name: str, cases: dict[str, Any], peaks: dict[str, float]) -> Path:
    """Write `<name>.json` and `<name>.md`.

    Cases measured earlier stay in the files if machine, versions and commit are the same, and
    nothing has changed since that commit; or if they are of the same run.

    Args:
        name: Of `REPORTS`.
        cases: What each case recorded.
        peaks: Operations per second of one thread, for each type.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{REPORTS[name].file}.json"
    head = {
        "machine": _machine(REPORTS[name].isa or isas()[0]),
        "versions": versions(REPORTS[name].packages),
        "commit": _commit(),
    }
    run = os.environ.get(RUN_VARIABLE)
    if path.exists():
        old = json.loads(path.read_text())
        same_run = run is not None and old.get("run") == run
        if same_run or (
            {key: old.get(key) for key in head} == head and CHANGED not in head["commit"]
        ):
            cases = old["cases"] | cases
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    rates = {dtype: round(p / 1e9) for dtype, p in peaks.items()}
    found = head | {"date": date, "run": run, "gops_per_thread": rates, "cases": cases}
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(_markdown(REPORTS[name], found)) + "\n")
    if page := REPORTS[name].page:
        _replace_table(page, "\n".join([*_head(REPORTS[name], found), "", *_bars(found)]))
    return path.with_suffix(".md")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def lines(case: dict[str, Any]) -> Iterator[str]:
    """One case for the terminal."""
    for row in case["rows"]:
        yield (
            f"  {_label(row):<32s} {row['ms']:10.3f} ms"
            + (f"  x{row['ratio']:5.2f}" if "ratio" in row else "")
            + (f"  {row['share']:.0%} of peak" if "share" in row else "")
        )
    for bar in case["bars"]:
        yield f"  {bar['what']}: {_measured(bar)}"
    for reason in case["absent"]:
        yield f"  absent: {reason}"


def _machine(isa: str) -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    name = fields.get("model name", platform.processor())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "isa": isa,
        "python": platform.python_version(),
    }


def _replace_table(page: Path, table: str) -> None:
    """Put the table between the page's two marks."""
    before, begin, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- /table -->")
    page.write_text(f"{before}{begin}{table}\n{end}{after}")


def _head(report: Report, found: dict[str, Any]) -> Iterator[str]:
    machine = found["machine"]
    peaks = ", ".join(f"{d} {p:g}" for d, p in found["gops_per_thread"].items())
    yield f"- {machine['processor']}, {machine['cores']} cores, instruction set {machine['isa']}"
    if peaks:
        yield f"- peak of the matrix kernel, GOP/s a thread: {peaks}"
    yield f"- Python {machine['python']}, " + ", ".join(
        f"{name} {version}" for name, version in found["versions"].items()
    )
    yield f"- {found['date']}, commit {found['commit']}"


def _bars(found: dict[str, Any]) -> Iterator[str]:
    yield "| case | what | measured | goal | limit | |"
    yield "|---|---|---|---|---|---|"
    for name, case in found["cases"].items():
        for bar in case["bars"]:
            limit = f"{bar['limit']:.2f}" if "limit" in bar else ""
            yield (
                f"| {name} | {bar['what']} | {_number(bar['measured'])} | {_asked(bar)} | {limit} "
                f"| {_verdict(bar)} |"
            )


def _markdown(report: Report, found: dict[str, Any]) -> Iterator[str]:
    yield f"# {report.title}"
    yield ""
    yield f"Written by `benchmarks/{report.source}`, which says what is measured and how."
    yield ""
    yield from _head(report, found)
    yield ""
    yield from _bars(found)
    for name, case in found["cases"].items():
        ratios = any("ratio" in row for row in case["rows"])
        shares = any("share" in row for row in case["rows"])
        cosines = any("cosine" in row for row in case["rows"])
        yield ""
        yield f"## {name}"
        yield ""
        if case["rows"]:
            yield (
                "| | median ms | best ms |"
                + " times ours |" * ratios
                + " of peak |" * shares
                + " cosine |" * cosines
            )
            yield "|---|---|---|" + "---|" * (ratios + shares + cosines)
        for row in case["rows"]:
            best = f"{row['best_ms']:.3f}" if "best_ms" in row else ""
            cells = [_label(row), f"{row['ms']:.3f}", best]
            if ratios:
                cells.append(f"{row['ratio']:.2f}" if "ratio" in row else "")
            if shares:
                cells.append(f"{row['share']:.0%}" if "share" in row else "")
            if cosines:
                cells.append(f"{row['cosine']:.5f}" if "cosine" in row else "")
            yield "| " + " | ".join(cells) + " |"
        for reason in case["absent"]:
            yield ""
            yield f"Absent: {reason}"


def _label(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['dtype']}"


def _asked(bar: dict[str, Any]) -> str:
    if bar["least"] is not None:
        return f"at least {bar['least']:g}"
    return "" if bar["most"] is None else f"at most {bar['most']:g}"


def _verdict(bar: dict[str, Any]) -> str:
    if bar["least"] is None and bar["most"] is None:
        return ""
    met = bar["least"] is None or bar["measured"] >= bar["least"]
    met &= bar["most"] is None or bar["measured"] <= bar["most"]
    return "met" if met else "missed"


def _measured(bar: dict[str, Any]) -> str:
    limit = f"limit {bar['limit']:.2f}" if "limit" in bar else ""
    notes = ", ".join(note for note in (_asked(bar), limit, _verdict(bar)) if note)
    return _number(bar["measured"]) + (f" ({notes})" if notes else "")


def _number(value: float) -> str:
    return f"{value:.5f}" if 0.99 < value < 1.1 else f"{value:.2f}"


@functools.cache  # reports that are written change the tree
def _commit() -> str:
    def git(*arguments: str) -> str:
        where = Path(__file__).parent
        try:
            return subprocess.run(
                ["git", *arguments], cwd=where, capture_output=True, text=True, check=False
            ).stdout.strip()
        except FileNotFoundError:  # what was measured is worth more than the commit's name
            return ""

    written = (f":(exclude,top){path}" for path in ("benchmarks/results", "docs/gpu.md"))
    changed = git("status", "--porcelain", "-uno", "--", ":/", *written)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + CHANGED * bool(changed)
