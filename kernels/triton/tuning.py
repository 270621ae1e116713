"""Which configuration of a kernel is fastest on this card: measured once, kept in a file.

At the first call with a new key (kernel, types, sizes rounded up to a power of two) every shipped
configuration is timed, and the best is written to `<cache>/triton/<card>.json`; later processes
read it. Where nothing may be measured (`dynabert_fast.ops.choices`), what the file lacks takes the
first configuration, which is safe on every card.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from dynabert_fast.kernels.common import INTERPRETED, Config, set_chooser
from dynabert_fast.ops.choices import add, exclusive, may_measure, read, table_file

logger = logging.getLogger(__name__)

#: Answers by device, kernel and key: the names that the file has take longer to make than a launch.
_answers: dict[tuple[int, str, tuple[Any, ...]], Config] = {}


def cache_file(device: torch.device) -> Path:
    """Where the choices for a card and this version of triton are kept."""
    return table_file("triton", device, f"triton-{triton.__version__}")


def _measure(
    configs: Sequence[Config], launch: Callable[[Config], None]
) -> tuple[Config, dict[str, float], bool]:
    """The fastest, the milliseconds of each that the card can run, and whether all compiled."""
    times: dict[Config, float] = {}
    failed: Exception | None = None
    for config in configs:
        try:
            times[config] = triton.testing.do_bench(
                lambda config=config: launch(config), warmup=5, rep=20, return_mode="median"
            )
        except OutOfResources:
            pass
        except (CompilationError, PTXASError) as error:  # of one; others may do
            logger.warning("%s does not compile: %s", config, error)
            failed = error
    if failed is not None and not times:
        raise failed
    best = min(times, key=lambda c: times[c]) if times else configs[0]
    return best, {str(c): t for c, t in times.items()}, failed is None


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
    choices, name = read(path), f"{kernel} {key}"
    named = {str(config): config for config in configs}
    found = named.get(choices.get(name, ""))
    if found is not None:
        _answers[index, kernel, key] = found
        return found
    if not may_measure():
        return configs[0]
    with exclusive:
        best, times, whole = _measure(configs, launch)
        if whole:  # a compiler may fail for want of memory, and not the next time
            best = named[add(path, name, str(best), named)]
    _answers[index, kernel, key] = best
    logger.info("%s: %s of %s", name, best, times)
    return best


if not INTERPRETED:
    set_chooser(choose)
