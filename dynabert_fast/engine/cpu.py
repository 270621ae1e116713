"""`CpuEngine`: a packed model on the CPU, called like the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynabert_fast.engine.native import ISA_VARIABLE, native_module
from dynabert_fast.engine.packing import DTYPES, PackedConfig, prefetch, read_file, write_file
from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet


@dataclass
class EngineOutput:
    """What a call on numpy arrays returns; what was not asked for is `None`.

    Attributes:
        logits: `[B, C]` float32, of a model with a classification head.
        pooler_output: `[B, D]` float32, of a model without.
        last_hidden_state: `[B, S, D]` float32, zero at padding, of a model without a head.
        hidden_states: The embeddings' and every kept layer's output, `[B, S, D]` each.
        seconds: Time of each stage, where `profile=True`.
    """

    logits: np.ndarray | None = None
    pooler_output: np.ndarray | None = None
    last_hidden_state: np.ndarray | None = None
    hidden_states: tuple[np.ndarray, ...] | None = None
    seconds: dict[str, float] | None = None


def isas() -> list[str]:
    """The instruction sets that this build has and this processor supports, best first."""
    _cpu = native_module()
    return _cpu.isas()


def measure_peak(dtype: str, isa: str | None = None, seconds: float = 0.1) -> float:
    """Operations per second of the matrix kernel on one thread, all data in the first-level cache.

    Raises:
        InputError: The type is unknown, or the processor has no such instruction set.
    """
    _cpu = native_module()
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        return _cpu.peak(dtype, _chosen(isa), seconds)
    except ValueError as error:
        raise InputError(str(error)) from None


def _chosen(isa: str | None) -> str:
    """The instruction set that was asked for, "" for the best."""
    isa = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
    if not isinstance(isa, str):
        raise InputError(f"isa must be the name of an instruction set, got {isa!r}")
    return isa


def load(path: str | Path, threads: int | None = None, *, verify: bool = False) -> CpuEngine:
    """Open a file that `CpuEngine.save` wrote; its pages are read when they are first used.

    Args:
        path: The file.
        threads: As for `CpuEngine`.
        verify: Read the whole file first and compare its checksum.

    Raises:
        InputError: There is no such file, or it is foreign, truncated or corrupt.
    """
    return CpuEngine(*read_file(Path(path), verify=verify), threads=threads)


class CpuEngine:
    """A packed model; every sub-network runs from the same bytes, and a call is one native call.

    A sequence's result has the same bits whatever the batch, the padding, the order and the number
    of threads. Calls from several Python threads are safe: with `threads=1` they run side by side,
    with more they take turns on the engine's threads.

    Args:
        config: The model's shape.
        packed: Its packed bytes, `[n]` uint8 aligned to 64; kept, not copied.
        threads: Threads of a call; default all that the process may use.
        isa: Instruction set, one of `isas()`; default `DYNABERT_FAST_ISA`, else the best.
        subnet: What a call without one runs; default the whole model. `save` does not keep it.

    Raises:
        InputError: The bytes do not fit the shape, or the processor has no such instruction set.
    """

    def __init__(
        self,
        config: PackedConfig,
        packed: np.ndarray,
        threads: int | None = None,
        isa: str | None = None,
        subnet: Subnet | None = None,
    ) -> None:
        _cpu = native_module()
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        if not isinstance(threads, int | np.integer) or not 1 <= threads <= 1024:
            raise InputError(f"threads must be a whole number in 1 to 1024, got {threads!r}")
        if packed.dtype != np.uint8 or packed.ndim != 1 or not packed.flags.c_contiguous:
            raise InputError(
                f"packed must be [n] uint8 without gaps, got {list(packed.shape)} {packed.dtype}"
            )
        self.config = config
        self._packed = packed
        try:
            self._native = _cpu.Engine(config.native(), packed, int(threads), _chosen(isa))
        except ValueError as error:
            raise InputError(str(error)) from None
        self._subnets: dict[Subnet, int] = {}
        self._default = subnet or Subnet.full(config)

    def __repr__(self) -> str:
        return (
            f"CpuEngine({self.config.dtype}, {self.isa}, {self.threads} threads, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._native.isa

    @property
    def threads(self) -> int:
        """Threads of one call."""
        return self._native.threads

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self._packed.nbytes

    def save(self, path: str | Path) -> None:
        """Write one file that `load` maps into memory.

        Raises:
            SaveError: The system refused; an older file of that name is untouched.
        """
        write_file(Path(path), self.config, self._packed)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        subnet: Subnet | Sequence[Subnet] | None = None,
        output_hidden_states: bool = False,
        *,
        lengths: Any = None,
        profile: bool = False,
    ) -> Any:
        """Run the encoder.

        Args:
            input_ids: `[B, S]` integers: numpy, torch, or nested lists.
            attention_mask: `[B, S]`, non-zero at real tokens; default all real.
            token_type_ids: `[B, S]`; default 0.
            position_ids: `[B, S]`; default the family's rule.
            subnet: One sub-network, or one for each sequence; default the engine's.
            output_hidden_states: Also return all hidden states; all sequences must keep as many
                layers.
            lengths: `[B]` real tokens at the start of each row, instead of a mask.
            profile: Also measure the time of each stage (numpy input only).

        Returns:
            `EngineOutput` of numpy arrays; for torch input the model's output class with tensors.

        Raises:
            InputError: Shapes, ids, lengths or a sub-network do not fit.
        """
        from_torch = _is_tensor(input_ids)
        ids = _integers("input_ids", input_ids)
        if ids.ndim != 2:
            raise InputError(f"input_ids must be [batch, length], got {list(ids.shape)}")
        if not 1 <= ids.shape[1] <= self.config.max_tokens:
            raise InputError(
                f"a sequence may have 1 to {self.config.max_tokens} tokens, got {ids.shape[1]}; "
                "truncate it"
            )
        mask = _mask(ids, attention_mask, lengths)
        subnets, layers = self._choose(subnet, ids.shape[0])
        if profile and from_torch:
            raise InputError("profile needs input_ids as a numpy array or lists, got a tensor")
        if output_hidden_states:
            if len(layers) > 1:
                raise InputError(
                    "output_hidden_states needs sub-networks of one depth, got "
                    f"{' and '.join(map(str, sorted(layers)))} layers; make one call for each"
                )
            states = 1 + max(layers, default=0)
        else:
            states = 0 if self.config.num_labels else 1
        optional = (
            None if values is None else _integers(name, values)
            for name, values in (("token_type_ids", token_type_ids), ("position_ids", position_ids))
        )
        pooled = not self.config.num_labels
        try:
            logits, pooler, hidden, seconds = self._native.run(
                ids, mask, *optional, subnets, states, pooled, profile
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        output = EngineOutput(
            logits=None if pooled else logits,
            pooler_output=pooler if pooled else None,
            last_hidden_state=hidden[-1] if pooled else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            seconds=seconds if profile else None,
        )
        return _to_torch(output, pooled) if from_torch else output

    def _number(self, subnet: Subnet) -> int:
        """The native code's number of a sub-network: registered once, then looked up."""
        if not isinstance(subnet, Subnet):
            raise InputError(f"subnet must be a Subnet, got {type(subnet).__name__}")
        number = self._subnets.get(subnet)
        if number is None:
            subnet.check(self.config)
            number = self._native.add_subnet(subnet.layers, subnet.heads, subnet.neurons)
            self._subnets[subnet] = number
            prefetch(self.config, self._packed, subnet)
        return number

    def _choose(
        self, subnet: Subnet | Sequence[Subnet] | None, batch: int
    ) -> tuple[np.ndarray, set[int]]:
        """The number of each sequence's sub-network, and how many layers they keep."""
        if subnet is None:
            subnet = self._default
        if isinstance(subnet, Subnet):
            return np.full(batch, self._number(subnet), np.int32), {len(subnet.layers)}
        given: list[Any] = list(subnet) if isinstance(subnet, list | tuple) else [subnet]
        numbers = np.fromiter((self._number(s) for s in given), np.int32, len(given))
        if len(given) != batch:
            raise InputError(
                "there must be one sub-network, or one for each of "
                f"{batch} sequences, got {len(given)}"
            )
        return numbers, {len(s.layers) for s in given}


def _is_tensor(values: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def _array(name: str, values: Any) -> np.ndarray:
    if _is_tensor(values):
        if values.device.type != "cpu":
            raise InputError(f"{name} must be on the CPU, got a tensor on {values.device}")
        try:
            return values.detach().numpy()
        except (TypeError, RuntimeError):  # bf16, sparse, quantised
            raise InputError(
                f"{name} must be a dense tensor of a type that numpy has, got {values.dtype} "
                f"{values.layout}"
            ) from None
    try:
        return np.asarray(values)
    except ValueError:
        raise InputError(
            f"{name} must be a rectangular array of numbers; are its rows of different lengths?"
        ) from None


def _integers(name: str, values: Any) -> np.ndarray:
    array = _array(name, values)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must be integers, got {list(array.shape)} {array.dtype}")
    return array.astype(np.int64, order="C", copy=False)


def _mask(ids: np.ndarray, mask: Any, lengths: Any) -> np.ndarray | None:
    """`[B, S]` uint8, or `None` where every token is real."""
    if lengths is not None:
        if mask is not None:
            raise InputError("give lengths or attention_mask, not both")
        count = _integers("lengths", lengths)
        if count.shape != ids.shape[:1]:
            raise InputError(f"lengths must be [{ids.shape[0]}], got {list(count.shape)}")
        if count.size and not 1 <= count.min() <= count.max() <= ids.shape[1]:
            raise InputError(
                f"lengths must be in 1 to {ids.shape[1]}, got {count.min()} to {count.max()}"
            )
        return (np.arange(ids.shape[1]) < count[:, None]).view(np.uint8)
    if mask is None:
        return None
    array = _array("attention_mask", mask != 0 if _is_tensor(mask) else mask)
    if array.dtype.kind not in "biuf" or array.shape != ids.shape:
        raise InputError(
            f"attention_mask must be {list(ids.shape)} numbers, "
            f"got {list(array.shape)} {array.dtype}"
        )
    return np.ascontiguousarray(array != 0).view(np.uint8)


def _to_torch(output: EngineOutput, pooled: bool) -> Any:
    """As the model's own output."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

    hidden: Any = output.hidden_states
    if hidden is not None:
        hidden = tuple(torch.from_numpy(h) for h in hidden)
    if not pooled:
        assert output.logits is not None
        return SequenceClassifierOutput(
            logits=torch.from_numpy(output.logits), hidden_states=hidden
        )
    assert output.last_hidden_state is not None
    assert output.pooler_output is not None
    return BaseModelOutputWithPooling(
        last_hidden_state=torch.from_numpy(output.last_hidden_state),
        pooler_output=torch.from_numpy(output.pooler_output),
        hidden_states=hidden,
    )
