"""The ops in Triton on a GPU: `kernels/triton/<op>.py`, imported at the first call."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from dynabert_fast.ops.registry import Backend, register

_FILES = {
    "expand": "product",
    "expand_backward": "product",
    "contract": "product",
    "contract_backward": "product",
    "attention": "attention",
    "attention_backward": "attention",
    "residual_norm": "residual_norm",
    "residual_norm_backward": "residual_norm",
    "embed": "embed",
    "embed_backward": "embed",
    "soft_cross_entropy": "losses",
    "soft_cross_entropy_backward": "losses",
    "hidden_mse": "losses",
    "hidden_mse_backward": "losses",
    "add_importance": "importance",  # of `rewiring`, which has its own way without it
}
#: Tensor cores multiply bf16 from compute capability 8.0 on.
_LEAST_CAPABILITY = (8, 0)


def _kernel(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        importlib.import_module("dynabert_fast.kernels.tuning")  # chooses configurations from here
        module = importlib.import_module(f"dynabert_fast.kernels.{_FILES[name]}")
        x = args[0][0] if isinstance(args[0], list) else args[0]
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return getattr(module, name)(*args)
        with torch.cuda.device(x.device):  # triton launches on the current one
            return getattr(module, name)(*args)

    call.__name__ = name
    return call


def _why_not(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed"
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST_CAPABILITY:
        return f"needs compute capability 8.0 or more, this GPU has {found[0]}.{found[1]}"
    return None


register(
    "triton",
    Backend(
        kernels={name: _kernel(name) for name in _FILES},
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        supports=_why_not,
    ),
)
