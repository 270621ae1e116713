"""Which configuration of a kernel is fastest on this card: measured once, kept in a file.

At the first call with a new key (kernel, types, sizes rounded up to a power of two) every shipped
configuration is timed, and the best is written to `<cache>/triton/<card>.json`; later processes
read it. `DYNABERT_FAST_TUNE=0` never measures: then what the file lacks takes the first
configuration, which is safe on every card. `DYNABERT_FAST_CACHE` names another folder than
`~/.cache/dynabert_fast`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from dynabert_fast.kernels.common import INTERPRETED, Config, set_chooser

TUNE_VARIABLE = "DYNABERT_FAST_TUNE"
CACHE_VARIABLE = "DYNABERT_FAST_CACHE"

logger = logging.getLogger(__name__)

_lock = threading.Lock()
#: Answers by device, kernel and key: the names that the file has take longer to make than a launch.
_answers: dict[tuple[int, str, tuple[Any, ...]], Config] = {}


def cache_file(device: torch.device) -> Path:
    """Where the choices for a card and this version of triton are kept."""
    folder = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dynabert_fast"
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return Path(folder) / "triton" / f"{card}-triton-{triton.__version__}.json"


@functools.cache
def _choices(path: Path) -> dict[str, str]:
    """What the file holds; a file that cannot be read is as good as none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}


def _save(path: Path, choices: dict[str, str]) -> None:
    """Whole or not at all: several processes may tune at once."""
    with contextlib.suppress(OSError):  # a folder that is not to be written costs time, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(choices, file, indent=1)
        os.replace(file.name, path)


def _measure(
    configs: Sequence[Config], launch: Callable[[Config], None]
) -> tuple[Config, dict[str, float]]:
    """The fastest, and the milliseconds of each that the card can run."""
    times: dict[Config, float] = {}
    for config in configs:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            times[config] = triton.testing.do_bench(
                lambda config=config: launch(config), warmup=5, rep=20, return_mode="median"
            )
    best = min(times, key=lambda c: times[c]) if times else configs[0]
    return best, {str(c): t for c, t in times.items()}


def choose(
    kernel: str,
    key: tuple[Any, ...],
    configs: Sequence[Config],
    launch: Callable[[Config], None],
) -> Config:
    """As `common.choose`, from what was measured."""
    if len(configs) == 1:
        return configs[0]
    index = torch.cuda.current_device()
    known = _answers.get((index, kernel, key))
    if known is not None and known in configs:
        return known
    path = cache_file(torch.device("cuda", index))
    choices, name = _choices(path), f"{kernel} {key}"
    named = {str(config): config for config in configs}
    found = named.get(choices.get(name, ""))
    if found is not None:
        _answers[index, kernel, key] = found
        return found
    if os.environ.get(TUNE_VARIABLE) == "0" or torch.cuda.is_current_stream_capturing():
        return configs[0]
    with _lock:
        best, times = _measure(configs, launch)
        choices[name] = str(best)
        _save(path, choices)
    _answers[index, kernel, key] = best
    logger.info("%s: %s of %s", name, best, times)
    return best


if not INTERPRETED:
    set_chooser(choose)
