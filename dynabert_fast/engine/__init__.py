"""The CPU engine: every sub-network of a model from one packed buffer, without torch.

    engine = model.pack(dtype="int8")         # from a torch model, or
    engine = load("model.dynabert")           # from a file that engine.save wrote
    engine(input_ids, attention_mask, subnet=Subnet.from_multipliers(engine.config, 0.5, 0.75))

Importing this needs numpy only; the tokenizer needs the package `tokenizers`.
"""

from __future__ import annotations

from dynabert_fast.engine.cpu import (
    ISA_VARIABLE,
    CpuEngine,
    EngineOutput,
    isas,
    load,
    measure_peak,
)
from dynabert_fast.engine.packing import DTYPES, PackedConfig, pack
from dynabert_fast.engine.tokenizer import Tokenizer

__all__ = [
    "DTYPES",
    "ISA_VARIABLE",
    "CpuEngine",
    "EngineOutput",
    "PackedConfig",
    "Tokenizer",
    "isas",
    "load",
    "measure_peak",
    "pack",
]
