"""The layers of a sub-network in one kernel that stays (`csrc/cuda/kernel.cuh`), for short batches.

A part of `GpuEngine`: from the embeddings' output to the last layer's, in bfloat16. What it cannot
compute it says, and the engine's graph of kernels does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynabert_fast.engine.native import cuda_module
from dynabert_fast.errors import InputError
from dynabert_fast.ops.choices import exclusive, may_measure
from dynabert_fast.ops.cuda import why_not_built
from dynabert_fast.subnet import Subnet

logger = logging.getLogger(__name__)

#: Beyond, products are bound by arithmetic, and kernels take longer than their launches.
MOST_TOKENS = 256


#: Types of the weights of products.
WEIGHTS = ("bf16", "int8")
_CHUNK, _COLUMNS = 32, 8  # of a block, csrc/cuda/tile.h


def pack_weight(weight: Tensor, int8: bool = False, shape: tuple[int, int] | None = None) -> Tensor:
    """A weight as the kernel reads it (csrc/cuda/tile.h): any prefix of both is a part of it.

    Args:
        weight: `[columns of the output, indices of the sum]`, bfloat16.
        int8: Round to a scale for each column: its largest magnitude over 127, whatever prefix of
            the sum is used.
        shape: Packed as if the weight were so large, with zeros beyond it.

    Returns:
        Bytes: scales, if there are, then blocks; zeros beyond the weight.
    """
    columns, depth = shape or weight.shape
    columns, depth = columns + -columns % _COLUMNS, depth + -depth % _CHUNK
    padded = F.pad(weight, (0, depth - weight.shape[1], 0, columns - weight.shape[0]))
    across, chunks = columns // _COLUMNS, depth // _CHUNK
    if not int8:
        # Index 8t + 2q + h of a chunk is half h of word t in core matrix q.
        blocks = padded.view(across, _COLUMNS, chunks, 4, 4, 2).permute(0, 2, 4, 1, 3, 5)
        return blocks.contiguous().view(torch.uint8).flatten()
    scales = padded.float().abs().amax(1) / 127
    steps = (padded.float() / scales.where(scales > 0, 1.0)[:, None]).round().to(torch.int8)
    blocks = steps.view(across, _COLUMNS, chunks, _CHUNK).transpose(1, 2).contiguous()
    return torch.cat([scales.view(torch.uint8), blocks.view(torch.uint8).flatten()])


def pack_layer(layer: Any, config: Any, int8: bool = False) -> list[Tensor]:
    """What the kernel reads of a layer, in the order of `Layer` in csrc/cuda/schedule.h.

    Layers of an exported sub-network may have fewer heads or neurons than others; the kernel takes
    all weights to be packed as those of the widest layer are.
    """
    attention, ffn = layer.attention, layer.ffn
    hidden, neurons = config.hidden_size, config.intermediate_size
    wide = config.num_attention_heads * config.head_size
    qkv = attention.qkv.weight.flatten(0, 2)
    found = (
        *(pack_weight(qkv, int8, (3 * wide, hidden)), attention.qkv.bias),
        *(pack_weight(attention.out.weight_t.T, int8, (hidden, wide)), attention.out.bias),
        *(attention.norm.weight, attention.norm.bias),
        *(pack_weight(ffn.up.weight, int8, (neurons, hidden)), ffn.up.bias),
        *(pack_weight(ffn.down.weight_t.T, int8, (hidden, neurons)), ffn.down.bias),
        *(ffn.norm.weight, ffn.norm.bias),
    )
    for tensor in found:
        assert tensor.is_contiguous()
        assert tensor.dtype in (torch.bfloat16, torch.uint8)
    return [tensor.detach() for tensor in found]


class PersistentLayers:
    """The layers of an encoder on a GPU.

    Args:
        encoder: The module with `embeddings`, `encoder.layer` and `config`, in bfloat16. Its
            parameters must not move. The weights of products are packed: a copy.
        weights: `bf16`, or `int8` with a scale for each output column; sums and activations are
            the same.
        device: (multiprocessors, bytes of shared memory of a block, whether it has wgmma) of
            another GPU than the current one, to plan for it.

    Raises:
        InputError: The module `_cuda` is not available, or not built for this GPU, or a type is
            another.
    """

    def __init__(
        self, encoder: Any, weights: str = "bf16", device: tuple[int, int, bool] | None = None
    ) -> None:
        if weights not in WEIGHTS:
            raise InputError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        self._module = cuda_module()
        on = encoder.device
        if device is None and on.type == "cuda" and (reason := why_not_built(on)) is not None:
            raise InputError(f"the persistent kernel {reason}")
        self._config = encoder.config
        if encoder.dtype != torch.bfloat16:
            raise InputError(f"the persistent kernel computes in bf16, got {encoder.dtype}")
        self._int8 = weights == "int8"
        with torch.no_grad():
            self._layers = [
                pack_layer(layer, self._config, self._int8) for layer in encoder.encoder.layer
            ]
        self._activation = encoder.encoder.layer[0].ffn.activation
        self._device = device
        self._plans: dict[tuple[int, int, int, Subnet], Any] = {}
        self._measured: set[tuple[int, int, int, Subnet]] = set()
        # Calls of one engine run one after the other: those of about one size share memory.
        self._workspaces: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(t.nbytes for layer in self._layers for t in layer if t.dtype == torch.uint8)

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
            heads=self._config.num_attention_heads,
            neurons=self._config.intermediate_size,
            int8=self._int8,
            activation=self._activation,
            eps=self._config.layer_norm_eps,
            weights=[[t.data_ptr() for t in self._layers[i]] for i in subnet.layers],
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
        if key not in self._measured and may_measure():
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
        with exclusive:
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
