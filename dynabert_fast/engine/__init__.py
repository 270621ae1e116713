"""Engines: every sub-network of a model from one copy of its weights.

On a CPU, from one packed buffer and without torch:

    engine = model.pack(dtype="int8")         # from a torch model, or
    engine = load("model.dynabert")           # from a file that engine.save wrote
    engine(input_ids, attention_mask, subnet=Subnet.from_multipliers(engine.config, 0.5, 0.75))

That engine needs numpy only, the tokenizer the package `tokenizers`. On a GPU, `model.pack()` gives
a `GpuEngine`, which needs torch. The names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dynabert_fast.engine.native import DTYPES, ISA_VARIABLE

if TYPE_CHECKING:
    from dynabert_fast.engine.cpu import CpuEngine, EngineOutput, isas, load, measure_peak
    from dynabert_fast.engine.gpu import GpuEngine
    from dynabert_fast.engine.packing import PackedConfig, pack
    from dynabert_fast.engine.tokenizer import Tokenizer

_HOMES = {
    "CpuEngine": "cpu",
    "EngineOutput": "cpu",
    "GpuEngine": "gpu",
    "PackedConfig": "packing",
    "Tokenizer": "tokenizer",
    "isas": "cpu",
    "load": "cpu",
    "measure_peak": "cpu",
    "pack": "packing",
}

__all__ = [
    "DTYPES",
    "ISA_VARIABLE",
    "CpuEngine",
    "EngineOutput",
    "GpuEngine",
    "PackedConfig",
    "Tokenizer",
    "isas",
    "load",
    "measure_peak",
    "pack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
