"""Tables of what was measured to be fastest on a card, as files: one for each card and library.

They lie in `~/.cache/dynabert_fast`, or in the folder that `DYNABERT_FAST_CACHE` names.
`DYNABERT_FAST_TUNE=0` forbids to measure what is in none of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import threading
from collections.abc import Container, Iterator
from pathlib import Path

import torch

TUNE_VARIABLE = "DYNABERT_FAST_TUNE"
CACHE_VARIABLE = "DYNABERT_FAST_CACHE"

#: Held by the one thread that measures or captures a graph. A measurement waits for the whole
#: device, which ends another thread's capture; and what is measured may have choices of its own.
exclusive = threading.RLock()


def table_file(kind: str, device: torch.device, library: str) -> Path:
    """Where the choices of a kind for a card and a version of a library are kept."""
    folder = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dynabert_fast"
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return Path(folder) / kind / f"{card}-{library}.json"


def may_measure() -> bool:
    """Not where it is forbidden, nor while a graph is captured, which would hold the trials."""
    return os.environ.get(TUNE_VARIABLE) != "0" and not torch.cuda.is_current_stream_capturing()


@functools.cache
def read(path: Path) -> dict[str, str]:
    """What the file held when it was first read, and what this process added."""
    return _load(path)


def _load(path: Path) -> dict[str, str]:
    """What the file holds; one that cannot be read is as good as none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}


def add(path: Path, name: str, choice: str, allowed: Container[str]) -> str:
    """Keep a choice, unless another process has kept one meanwhile, which then holds for all.

    Processes that train together should sum in one order, also after they are started again.
    """
    choices = read(path)
    with _others_wait(path):
        there = _load(path)
        if there.get(name) not in allowed:
            there[name] = choice
            _save(path, there)
    choices.update(there)
    return choices[name]


@contextlib.contextmanager
def _others_wait(path: Path) -> Iterator[None]:
    """Other processes that add to the file meanwhile, where the system can have them wait."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows; a folder not to be written
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _save(path: Path, choices: dict[str, str]) -> None:
    """Whole or not at all: several processes may measure at once."""
    with contextlib.suppress(OSError):  # a folder that is not to be written costs time, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(choices, file, indent=1)
        os.replace(file.name, path)
