"""Elastic transformers: one set of weights, many models, switched at no cost.

Importing the package imports neither torch nor transformers: its names load on first use. `Subnet`,
`grid` and `dynabert_fast.engine` need numpy only, the others the extra `train`. Importing
`dynabert_fast.models` registers the models with the Hugging Face auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynabert_fast.errors import InputError
    from dynabert_fast.models import (
        DynaBertConfig,
        DynaBertForSequenceClassification,
        DynaBertModel,
    )
    from dynabert_fast.ops import use_backend
    from dynabert_fast.rewiring import Rewiring, measure_importance, rewire
    from dynabert_fast.subnet import Subnet, grid

__version__ = "0.1.0"

_HOMES = {
    "DynaBertConfig": "models",
    "DynaBertForSequenceClassification": "models",
    "DynaBertModel": "models",
    "InputError": "errors",
    "Rewiring": "rewiring",
    "Subnet": "subnet",
    "grid": "subnet",
    "measure_importance": "rewiring",
    "rewire": "rewiring",
    "use_backend": "ops",
}

__all__ = [
    "DynaBertConfig",
    "DynaBertForSequenceClassification",
    "DynaBertModel",
    "InputError",
    "Rewiring",
    "Subnet",
    "grid",
    "measure_importance",
    "rewire",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        from dynabert_fast.errors import MissingPackageError

        if missing := MissingPackageError.explain(error, name):
            raise missing from None
        raise
