"""After the run: every row's best time, and its ratio to the baseline of its group.

Cases of several rows, whose candidates raced, are printed and written by `report.py`.
"""

from __future__ import annotations

import os
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    groups = defaultdict(list)
    cases = {}
    for row in session.benchmarks if session else ():
        if "case" in row.extra_info:
            cases[row.extra_info["case"]] = row.extra_info
        elif row.stats.rounds:
            groups[row.group].append(row)
    if cases:
        _report_cases(terminalreporter, cases)
    measured = {g: rows for g, rows in groups.items() if any(_is_baseline(r) for r in rows)}
    if not measured:
        return
    terminalreporter.section("best time, and how many times as fast as the baseline")
    for group, rows in measured.items():
        baseline = next(row for row in rows if _is_baseline(row))
        terminalreporter.write_line(group)
        for row in rows:
            # The least disturbed round: other work on the machine only ever adds time.
            best, ratio = row.stats.min, baseline.stats.min / row.stats.min
            mark = "  baseline" if row is baseline else ""
            terminalreporter.write_line(
                f"  {row.extra_info['row']:<20s} {best * 1e3:9.3f} ms  x{ratio:5.2f}{mark}"
            )


def _report_cases(terminalreporter, cases):
    from . import race, report  # other benchmarks run without the engine's native part

    terminalreporter.section("medians, and how many times ours")
    reports = defaultdict(dict)
    for name, case in cases.items():
        reports[case["report"]][name] = case
        terminalreporter.write_line(name)
        for line in report.lines(case):
            terminalreporter.write_line(line)
    for name, found in reports.items():
        types = () if name == "gpu" else ("fp32", "bf16", "int8")
        peaks = {dtype: race.peak(dtype) / race.THREADS for dtype in types}
        terminalreporter.write_line(f"written: {report.write(name, found, peaks)}")


def _is_baseline(row) -> bool:
    return bool(row.extra_info.get("baseline"))
