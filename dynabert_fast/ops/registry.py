"""Which backend computes an op: declared candidates, a fixed priority, a reason for each refusal.

A backend is a module that defines one function per kernel (`expand`, `expand_backward`, ...; the
contracts are in `dynabert_fast.ops`) and registers itself:

    register("cpp", Backend(kernels={"expand": expand, ...}, devices=("cpu",),
                            dtypes=(torch.float32, torch.bfloat16), supports=why_not))

`resolve` walks `PRIORITY`, takes the first backend that declares no reason against the call, and
remembers the choice for that (kernel, device, dtype). Falling back says so once, at INFO.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dynabert_fast.errors import InputError

logger = logging.getLogger(__name__)

#: Fastest first. `reference` serves everything and stands last.
PRIORITY = ("cuda", "triton", "cpp", "reference")

ENVIRONMENT_VARIABLE = "DYNABERT_FAST_BACKEND"


def _supports_everything(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of some or all kernels.

    Attributes:
        kernels: Kernel name to function.
        devices: Device types it runs on; empty means every device.
        dtypes: Data types of `x` it takes; empty means every floating-point type.
        supports: `(kernel, device, dtype) -> None | reason`, asked after devices and dtypes; for
            what they cannot say (an instruction set, a compute capability).
    """

    kernels: Mapping[str, Callable[..., Any]]
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    supports: Callable[[str, torch.device, torch.dtype], str | None] = _supports_everything

    def reason_against(self, kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve the call, or `None` if it can."""
        if kernel not in self.kernels:
            return f"has no {kernel}"
        if self.devices and device.type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device.type}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        return self.supports(kernel, device, dtype)


_backends: dict[str, Backend] = {}
_resolved: dict[tuple[str, str, torch.device, torch.dtype], Callable[..., Any]] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


def register(name: str, backend: Backend) -> None:
    """Add a backend (or replace the one of that name). `name` must be one of `PRIORITY`."""
    if name not in PRIORITY:
        raise InputError(f"a backend must be one of {', '.join(PRIORITY)}, got {name!r}")
    _backends[name] = backend
    _resolved.clear()


def backends() -> dict[str, Backend]:
    """The registered backends, fastest first."""
    return {name: _backends[name] for name in PRIORITY if name in _backends}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for the calls of this thread (or async task) inside the `with` block.

    A forced backend never falls back: a call it cannot serve raises `InputError` with the reason.
    The backward pass has the backend of its forward pass; but what gradient checkpointing computes
    again, on a GPU in a thread of autograd's, has not: there, set `DYNABERT_FAST_BACKEND`.
    """
    _check_known(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or by the environment, if any."""
    return _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE) or None


def resolve(kernel: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that computes `kernel` for tensors of this device and dtype.

    Raises:
        InputError: A forced backend is unknown or cannot serve the call; the message says why.
    """
    forced = forced_backend()
    key = (forced or "", kernel, device, dtype)
    if (function := _resolved.get(key)) is None:
        function = _resolved[key] = _choose(forced, kernel, device, dtype)
    return function


def _choose(
    forced: str | None, kernel: str, device: torch.device, dtype: torch.dtype
) -> Callable[..., Any]:
    if forced is not None:
        _check_known(forced)
        if reason := _backends[forced].reason_against(kernel, device, dtype):
            raise InputError(f"the forced backend {forced!r} cannot compute {kernel}: it {reason}")
        return _backends[forced].kernels[kernel]
    refusals = []
    for name, backend in backends().items():
        if reason := backend.reason_against(kernel, device, dtype):
            refusals.append((backend, f"{name} {reason}"))
            continue
        # That another device's backend is not for this one goes without saying.
        said = [why for b, why in refusals if not b.devices or device.type in b.devices]
        if said:
            logger.info("%s on %s %s: %s, because %s", kernel, device, dtype, name, "; ".join(said))
        return backend.kernels[kernel]
    reasons = "; ".join(why for _, why in refusals)
    raise InputError(f"no backend computes {kernel} on {device} {dtype}: {reasons}")


def _check_known(name: str) -> None:
    if name not in _backends:
        raise InputError(
            f"backend must be one of {', '.join(backends())} (those installed here), got {name!r}"
        )
