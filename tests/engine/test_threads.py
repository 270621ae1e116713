"""Many Python threads on one engine, each with its own sub-networks; and what a fork leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

BASE = "bert, odd sizes, base"
CALLERS, ROUNDS = 8, 12


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 61, (CALLERS, 3, 40))


def run_at_once(count, job):
    """`job(i)` in `count` threads, started together; raises what one of them raises."""
    barrier, errors = threading.Barrier(count), []

    def work(i):
        try:
            barrier.wait(timeout=60)
            job(i)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_callers_at_once(make_case, make_engine, ids, same, dtype, threads):
    """Sub-networks that no call has used before among them."""
    case = make_case(BASE)
    subnets = list(case.subnets().values())
    single = make_engine(case, dtype)
    mixed = [subnets[1], subnets[13], subnets[8]]

    def jobs(i):
        yield {"subnet": subnets[i]}
        yield {"subnet": subnets[-1 - i], "lengths": [40, 1 + i, 17]}
        yield {"subnet": mixed}

    wants = [[single(ids[i], **job) for job in jobs(i)] for i in range(CALLERS)]
    engine = make_engine(case, dtype, threads)

    def call(i):
        for _ in range(ROUNDS):
            for job, want in zip(jobs(i), wants[i], strict=True):
                assert same(engine(ids[i], **job), want)

    run_at_once(CALLERS, call)


def test_errors_at_once(make_case, make_engine, ids, same):
    """Calls that are refused beside calls that are not."""
    engine = make_engine(make_case(BASE), "int8", threads=2)
    want = engine(ids[0])

    def call(i):
        for _ in range(ROUNDS):
            if i % 2:
                with pytest.raises(ValueError, match="token ids must be"):
                    engine(ids[0] + 1000)
            else:
                assert same(engine(ids[0]), want)

    run_at_once(4, call)


def test_engines_come_and_go(make_case, make_engine, ids, same):
    """Their threads end with them, also those that were never used."""
    case = make_case(BASE)
    want = make_engine(case, "int8")(ids[0])

    def count():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))

    before = count()
    for _ in range(20):
        make_engine(case, "int8", threads=8)
        engine = make_engine(case, "int8", threads=4)
        assert same(engine(ids[0]), want)
        assert count() == before + 3
        del engine
        # A join ends when the kernel clears the thread's number, a moment before it stops counting.
        deadline = time.monotonic() + 5
        while count() > before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert count() == before


def test_a_long_call_lets_other_python_threads_run(make_case, make_engine):
    engine = make_engine(make_case(BASE), "fp32", isa="portable")
    ids = np.full((64, 77), 5)
    done, progress = threading.Event(), []

    def call():
        engine(ids)  # what is slow the first time
        progress.append(count)
        start = time.perf_counter()
        engine(ids)
        progress.extend((count, time.perf_counter() - start))
        done.set()

    count = 0
    thread = threading.Thread(target=call)
    thread.start()
    while not done.is_set():
        count += 1
    thread.join()
    before, after, seconds = progress
    assert seconds > 0.05
    # A thread that waits for the lock asks for it every 5 ms: this is a thousand times as often.
    assert after - before > 200_000 * seconds


FORK = """
import os, sys
import numpy as np
from dynabert_fast.engine import load
engine = load(sys.argv[1], threads=int(sys.argv[2]))
ids = np.arange(40).reshape(2, 20)
want = engine(ids).last_hidden_state
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(engine(ids).last_hidden_state, want) else 1)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(engine(ids).last_hidden_state, want)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process(make_case, make_engine, tmp_path, environment, threads):
    """As servers do that load a model and then start their workers."""
    make_engine(make_case(BASE), "int8").save(tmp_path / "model")
    command = [sys.executable, "-c", FORK, str(tmp_path / "model"), str(threads)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert process.wait(timeout=30) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # its child is of its group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
