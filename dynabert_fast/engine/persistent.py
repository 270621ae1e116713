"""The layers of a sub-network in one kernel that stays (`csrc/cuda/kernel.cuh`), for short batches.

A part of `GpuEngine`: from the embeddings' output to the last layer's, in bfloat16. What it cannot
compute it says, and the engine's graph of kernels does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynabert_fast.engine.native import cuda_module
from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet

logger = logging.getLogger(__name__)

#: Beyond, products are bound by arithmetic, and kernels take longer than their launches.
MOST_TOKENS = 256


def addresses(layer: Any) -> list[int]:
    """Where a layer's parameters begin, in the order of `Layer` in csrc/cuda/schedule.h."""
    attention, ffn = layer.attention, layer.ffn
    parts = (
        (attention.qkv, "weight"),
        (attention.out, "weight_t"),
        (attention.norm, "weight"),
        (ffn.up, "weight"),
        (ffn.down, "weight_t"),
        (ffn.norm, "weight"),
    )
    named = [p for module, weight in parts for p in (getattr(module, weight), module.bias)]
    for parameter in named:
        assert parameter.is_contiguous()
        assert parameter.dtype == torch.bfloat16
    return [parameter.data_ptr() for parameter in named]


class PersistentLayers:
    """The layers of an encoder on a GPU.

    Args:
        encoder: The module with `embeddings`, `encoder.layer` and `config`, in bfloat16. Its
            parameters must not move.
        device: (multiprocessors, bytes of shared memory of a block) of another GPU than the
            current one, to plan for it.

    Raises:
        InputError: The module `_cuda` is not available, or the type is another.
    """

    def __init__(self, encoder: Any, device: tuple[int, int] | None = None) -> None:
        self._module = cuda_module()
        self._config = encoder.config
        if encoder.dtype != torch.bfloat16:
            raise InputError(f"the persistent kernel computes in bf16, got {encoder.dtype}")
        self._layers = list(encoder.encoder.layer)
        self._device = device
        self._plans: dict[tuple[int, int, int, Subnet], Any] = {}
        self._measured: set[tuple[int, int, int, Subnet]] = set()
        # Calls of one engine run one after the other: those of about one size share memory.
        self._workspaces: dict[int, Tensor] = {}

    @functools.cached_property
    def _addresses(self) -> Mapping[int, list[int]]:
        return {i: addresses(layer) for i, layer in enumerate(self._layers)}

    def plan(self, tokens: int, sequences: int, longest: int, subnet: Subnet) -> Any:
        """The kernel and its sizes for batches up to these: the one that was measured to be best.

        Raises:
            InputError: It cannot compute them; the message says why.
        """
        key = tokens, sequences, longest, subnet
        if key not in self._plans:
            if tokens > MOST_TOKENS:
                raise InputError(f"tokens must be at most {MOST_TOKENS}, got {tokens}")
            try:
                self._plans[key] = self._make_plan(*key)
            except (ValueError, self._module.CudaError) as error:
                raise InputError(f"the persistent kernel cannot run {subnet}: {error}") from error
        return self._plans[key]

    def _make_plan(
        self, tokens: int, sequences: int, longest: int, subnet: Subnet, tile_rows: int = 0
    ) -> Any:
        return self._module.PersistentEncoder(
            tokens=tokens,
            sequences=sequences,
            longest=min(longest, tokens),
            hidden=self._config.hidden_size,
            head_size=self._config.head_size,
            activation=self._layers[0].ffn.activation,
            eps=self._config.layer_norm_eps,
            weights=[self._addresses[i] for i in subnet.layers],
            extents=list(zip(subnet.heads, subnet.neurons, strict=True)),
            device=self._device,
            tile_rows=tile_rows,
        )

    def __call__(self, x: Tensor, offsets: Tensor, longest: int, subnet: Subnet) -> Tensor:
        """The last layer's output, where x `[T, D]`, the embeddings', was.

        Args:
            x: Contiguous.
            offsets: `[B + 1]` int64 on the device; rows behind the last are of no sequence.
            longest: The most tokens of a sequence.
            subnet: What is computed.
        """
        assert x.is_contiguous()
        assert offsets.dtype == torch.int64
        key = x.shape[0], offsets.shape[0] - 1, longest, subnet
        plan = self.plan(*key)
        untuned = os.environ.get("DYNABERT_FAST_TUNE") == "0"
        if (
            not untuned
            and key not in self._measured
            and not torch.cuda.is_current_stream_capturing()
        ):
            plan = self._plans[key] = self._measure(key, x, offsets)
            self._measured.add(key)
        self._run(plan, x, offsets)
        return x

    def _measure(self, key: tuple[int, int, int, Subnet], x: Tensor, offsets: Tensor) -> Any:
        """The fastest of the kernels, which differ in the rows of a tile."""
        from triton.testing import do_bench

        times: dict[int, float] = {}
        plans: dict[int, Any] = {}
        scratch = x.clone()
        for rows in self._module.tile_rows:
            with contextlib.suppress(ValueError):  # does not fit this card
                plans[rows] = plan = self._make_plan(*key, tile_rows=rows)
                run = functools.partial(self._run, plan, scratch, offsets)
                times[rows] = do_bench(run, warmup=2, rep=10, return_mode="median")
        best = min(times, key=lambda rows: times[rows])
        logger.info("persistent kernel for %s: tiles of %d rows, of %s ms", key, best, times)
        return plans[best]

    def _run(self, plan: Any, x: Tensor, offsets: Tensor) -> None:
        workspace = self._workspace(plan.workspace_bytes, x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        plan.run(x.data_ptr(), offsets.data_ptr(), workspace.data_ptr(), stream)

    def _workspace(self, size: int, device: torch.device) -> Tensor:
        """Zeros at first: the barrier's counter must be, and is again after each launch."""
        rounded = 1 << (size - 1).bit_length()
        if rounded not in self._workspaces:
            # Not from a graph's pool: engines call it before they capture.
            assert not torch.cuda.is_current_stream_capturing()
            self._workspaces[rounded] = torch.zeros(rounded, dtype=torch.uint8, device=device)
        return self._workspaces[rounded]
