"""`GpuEngine`: a model on a GPU whose calls are replays of CUDA graphs, called like the model.

Launching a layer's kernels one by one takes the host longer than a GPU needs for a short sentence.
A graph is captured for (token bucket, sequence bucket, length bucket, sub-network) when it is first
needed; all graphs share one pool of memory, one copy of the weights, and the buffers of their
bucket. A batch of several sub-networks is one pass over the staircase, kernel by kernel.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from dynabert_fast.engine.cpu import EngineOutput
from dynabert_fast.engine.persistent import PersistentLayers
from dynabert_fast.errors import InputError
from dynabert_fast.models.packed import PackedSequences
from dynabert_fast.ops.choices import exclusive
from dynabert_fast.subnet import Subnet

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Beyond so many tokens kernels take longer than their launches, and a graph brings nothing.
MOST_TOKENS = 16384
#: Graphs kept; the one that was not used for the longest time goes first.
MOST_GRAPHS = 128
_LEAST = 16  # tokens of the smallest bucket
_WARM_UPS = 2  # calls before a capture: kernels are compiled and tuned in them


def token_bucket(tokens: int) -> int:
    """How many tokens a graph for so many computes: at most an eighth more, from 128 on.

    Multiples of 16 up to 128, then eighths of the power of two below.
    """
    step = max(_LEAST, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def _power_of_2(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class Bucket:
    """The sizes that a graph is captured for: an upper bound of each."""

    tokens: int
    sequences: int
    length: int

    @classmethod
    def of(cls, tokens: int, sequences: int, length: int) -> Bucket:
        """The smallest that holds a batch."""
        return cls(token_bucket(tokens), _power_of_2(sequences, 1), _power_of_2(length, _LEAST))


class _Buffers:
    """What the graphs of one bucket read: one array, so that a batch comes by one copy.

    `[ids | token types | positions | offsets | first rows]`, int64.
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        t, b = bucket.tokens, bucket.sequences
        sizes = t, t, t, b + 1, b
        self.bucket = bucket
        self.array = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.parts = self.array.split(sizes)
        self.ids, self.types, self.positions, self.offsets, self.first = self.parts
        #: (B, S) of the batch whose all but ids is in there, `None` after one with padding.
        self.layout: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Results:
    """Where a graph leaves what it computes."""

    hidden: Tensor  # [tokens, D]
    pooled: Tensor  # [sequences, D]
    logits: Tensor | None  # [sequences, C]


class GpuEngine:
    """A model on a GPU in one type; every sub-network runs from the same weights.

    But for last bits a sequence's result does not depend on its batch-mates. Calls may come from
    several threads and on several streams; they run one after the other. Outputs are the caller's
    own.

    Args:
        model: Its weights are copied in the type; it is not needed afterwards.
        dtype: `bf16`, `fp16` or `fp32`.
        most_graphs: Graphs kept at a time.
        persistent: Compute the layers of short batches in one kernel (docs/gpu.md) where it can.
            Off until it has been measured. It has a packed copy of the weights.
        weights: Type of that copy: `bf16`, or `int8` with a scale for each output column. Batches
            that the one kernel cannot compute use the weights in `dtype`.

    Raises:
        InputError: A type is unknown, or what `persistent` asks for is not there.
    """

    def __init__(
        self,
        model: Any,
        dtype: str = "bf16",
        most_graphs: int = MOST_GRAPHS,
        persistent: bool = False,
        weights: str = "bf16",
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)} on a GPU, got {dtype!r}")
        if weights != "bf16" and not persistent:
            raise InputError(f"weights={weights!r} needs persistent=True")
        self.dtype = dtype
        self.config = model.config
        self._model = copy.deepcopy(model).to(DTYPES[dtype]).eval().requires_grad_(False)
        self._encoder = getattr(self._model, "dynabert", self._model)
        self._persistent = PersistentLayers(self._encoder, weights) if persistent else None
        self._device = self._model.device
        self._most_graphs = most_graphs
        self._buffers: dict[Bucket, _Buffers] = {}
        self._graphs: OrderedDict[tuple[Bucket, Subnet], _Graph] = OrderedDict()
        self._on_gpu = self._device.type == "cuda"
        # Graphs are made on a stream of the engine's own: torch's default for it is on the GPU that
        # first captured one, and a capture there holds nothing of another GPU.
        self._stream = torch.cuda.Stream(self._device) if self._on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._turn = threading.Lock()
        self._last: Any = None  # event: the call before is done with the buffers

    def __repr__(self) -> str:
        return (
            f"GpuEngine({self.dtype}, {self._device}, {self.nbytes / 1e6:.1f} MB, "
            f"{len(self._graphs)} graphs)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        packed = 0 if self._persistent is None else self._persistent.nbytes
        return packed + sum(p.numel() * p.element_size() for p in self._model.parameters())

    @property
    def graphs(self) -> list[tuple[Bucket, Subnet]]:
        """What has been captured, the longest unused first."""
        return list(self._graphs)

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
    ) -> Any:
        """Run the encoder; arguments as in `CpuEngine.__call__`.

        Tensors on the GPU without padding are never copied to the host; all else is packed there,
        so that one small copy is all that the GPU waits for.

        Returns:
            For torch input the model's output class, with tensors on the GPU; for numpy input or
            lists `EngineOutput` with float32 arrays.

        Raises:
            InputError: Shapes, ids, lengths or a sub-network do not fit.
        """
        tensors = isinstance(input_ids, Tensor)
        ids = _integers("input_ids", input_ids)
        if lengths is not None:
            if attention_mask is not None:
                raise InputError("give lengths or attention_mask, not both")
            attention_mask = _mask_of(lengths, ids)
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)
        types = None if token_type_ids is None else _integers("token_type_ids", token_type_ids)
        positions = None if position_ids is None else _integers("position_ids", position_ids)
        if ids.device.type == "cpu" or mask is not None:
            ids, mask = ids.cpu(), None if mask is None else mask.cpu()
            types, positions = (t if t is None else t.cpu() for t in (types, positions))
        self._encoder._check_ids(ids, types, positions)
        chosen = self._model._choose(subnet)
        alike = isinstance(chosen, list) and chosen and all(s == chosen[0] for s in chosen)
        if alike and len(chosen) == ids.shape[0]:
            chosen = chosen[0]
        # What lives longer than the call must not be an inference tensor, whoever calls.
        here = torch.cuda.device(self._device) if self._on_gpu else contextlib.nullcontext()
        with self._turn, here, torch.inference_mode(False), torch.no_grad():
            if isinstance(chosen, list) or output_hidden_states or not ids.numel():
                output = self._plain(ids, mask, types, positions, chosen, output_hidden_states)
            else:
                output = self._replay(ids, mask, types, positions, chosen)
        return output if tensors else _to_numpy(output)

    # ---- kernel by kernel ----

    def _plain(
        self,
        ids: Tensor,
        mask: Tensor | None,
        types: Tensor | None,
        positions: Tensor | None,
        subnet: Subnet | list[Subnet],
        keep_hidden: bool,
    ) -> Any:
        there = (t if t is None else t.to(self._device) for t in (ids, mask, types, positions))
        return self._model(*there, subnet=subnet, output_hidden_states=keep_hidden)

    # ---- graphs ----

    def _replay(
        self,
        ids: Tensor,
        mask: Tensor | None,
        types: Tensor | None,
        positions: Tensor | None,
        subnet: Subnet,
    ) -> Any:
        batch, length = ids.shape
        counts = [length] * batch
        if mask is not None:
            packed = PackedSequences.from_mask((batch, length), mask, ids.device)
            counts = packed.offsets.diff().tolist()
        else:
            packed = PackedSequences.from_mask((batch, length), None, ids.device)
        bucket = Bucket.of(sum(counts), batch, max(counts))
        if bucket.tokens > MOST_TOKENS:
            return self._plain(ids, mask, types, positions, subnet, False)
        if self._on_gpu and self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)
        buffers = self._buffers.get(bucket)
        if buffers is None:
            buffers = self._buffers[bucket] = _Buffers(bucket, self._device)
        self._fill(buffers, packed, ids, types, positions)
        try:
            graph = self._graph(buffers, subnet)
        except torch.OutOfMemoryError:
            # The memory that older graphs hold may be all that is missing.
            self._clear()
            return self._plain(ids, mask, types, positions, subnet, False)
        results = graph()
        output = self._take(results, packed, (batch, length), sum(counts))
        if self._on_gpu:
            self._last = torch.cuda.current_stream(self._device).record_event()
        return output

    def _fill(
        self,
        buffers: _Buffers,
        packed: PackedSequences,
        ids: Tensor,
        types: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        """Everything behind the batch is zero: tokens of no sequence, sequences of no token."""
        batch, length = ids.shape
        default = packed.indices is None and types is None and positions is None
        layout = (batch, length) if default and not self.config.is_roberta else None
        if layout is not None and buffers.layout == layout:
            # Pinned memory is the caller's, who may fill it anew once the call has returned.
            buffers.ids[: batch * length].copy_(ids.flatten(), non_blocking=not ids.is_pinned())
            return
        buffers.layout = layout
        if positions is None:
            positions = self._encoder.embeddings.position_ids(ids)
        rows = packed.pack(ids)
        count = rows.numel()
        on_host = ids.device.type == "cpu"
        if on_host:
            array = torch.zeros(buffers.array.shape, dtype=torch.int64, pin_memory=self._on_gpu)
            parts = array.split([p.numel() for p in buffers.parts])
        else:
            array, parts = buffers.array.zero_(), buffers.parts
        parts[0][:count] = rows
        if types is not None:
            parts[1][:count] = packed.pack(types)
        parts[2][:count] = packed.pack(positions)
        parts[3][: batch + 1] = packed.offsets
        parts[3][batch + 1 :] = count
        parts[4][:batch] = packed.offsets[:-1]
        if on_host:
            buffers.array.copy_(array, non_blocking=True)

    def _graph(self, buffers: _Buffers, subnet: Subnet) -> _Graph:
        key = buffers.bucket, subnet
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        while len(self._graphs) >= self._most_graphs:
            self._graphs.popitem(last=False)
        graph = _Graph(lambda: self._compute(buffers, subnet), self._pool, self._stream)
        self._graphs[key] = graph
        return graph

    def _compute(self, buffers: _Buffers, subnet: Subnet) -> _Results:
        """What is captured: from ids to logits without a look at the host."""
        encoder, bucket = self._encoder, buffers.bucket
        # Rows behind the batch belong to no sequence; attention leaves them alone.
        packed = PackedSequences((1, bucket.tokens), buffers.offsets, bucket.length, None)
        x = encoder.embeddings(
            buffers.ids[None], buffers.types[None], buffers.positions[None], packed
        )
        if self._persistent is not None and self.why_not_persistent(bucket, subnet) is None:
            x = self._persistent(x, buffers.offsets, bucket.length, subnet)
        else:
            extents = zip(subnet.layers, subnet.heads, subnet.neurons, strict=True)
            for layer, heads, neurons in extents:
                x = encoder.encoder.layer[layer](x, packed, heads, neurons)
        pooled = encoder.pooler(x[buffers.first])
        logits = None if encoder is self._model else self._model.classifier(pooled)
        return _Results(x, pooled, logits)

    def why_not_persistent(self, bucket: Bucket, subnet: Subnet) -> str | None:
        """Why the layers of a batch are not computed in one kernel, `None` where they are."""
        if self._persistent is None:
            return "the engine was made without persistent=True"
        try:
            self._persistent.plan(bucket.tokens, bucket.sequences, bucket.length, subnet)
        except InputError as error:
            return str(error)
        return None

    def _take(
        self, results: _Results, packed: PackedSequences, shape: tuple[int, int], tokens: int
    ) -> Any:
        """Copies: the next replay writes where these results lie."""
        batch, length = shape
        if results.logits is not None:
            return SequenceClassifierOutput(logits=results.logits[:batch].clone())
        rows = results.hidden[:tokens]
        if packed.indices is None:
            hidden = rows.view(batch, length, -1).clone()
        else:
            flat = rows.new_zeros(batch * length, rows.shape[1])
            at = packed.indices.to(rows.device, non_blocking=True)
            hidden = flat.index_copy_(0, at, rows).view(batch, length, -1)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=results.pooled[:batch].clone()
        )

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        with self._turn:
            self._clear()

    def _clear(self) -> None:
        self._graphs.clear()
        self._buffers.clear()
        if self._on_gpu:
            with exclusive:
                torch.cuda.synchronize(self._device)
                self._pool = torch.cuda.graph_pool_handle()
                torch.cuda.empty_cache()


class _Graph:
    """A computation on fixed memory: captured on a GPU, simply called elsewhere."""

    def __init__(
        self, compute: Callable[[], _Results], pool: Any, stream: torch.cuda.Stream | None
    ) -> None:
        self._compute = compute
        self._graph: torch.cuda.CUDAGraph | None = None
        if stream is None:
            return
        callers = torch.cuda.current_stream(stream.device)
        with exclusive:  # torch captures one graph at a time in a process
            stream.wait_stream(callers)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    compute()
            callers.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # What other threads ask of the device meanwhile is no part of the graph.
            with torch.cuda.graph(
                self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                self._results = compute()

    def __call__(self) -> _Results:
        if self._graph is None:
            return self._compute()
        self._graph.replay()
        return self._results


def _integers(name: str, values: Any) -> Tensor:
    try:
        found = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError):
        raise InputError(
            f"{name} must be a rectangular array of integers, got {type(values).__name__}"
        ) from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"{name} must be integers, got {list(found.shape)} {found.dtype}")
    return found.long()


def _mask_of(lengths: Any, ids: Tensor) -> Tensor:
    count = _integers("lengths", lengths).cpu()
    if ids.dim() != 2:
        raise InputError(f"input_ids must be [batch, length], got {list(ids.shape)}")
    if count.shape != ids.shape[:1]:
        raise InputError(f"lengths must be [{ids.shape[0]}], got {list(count.shape)}")
    if count.numel() and not 1 <= int(count.min()) <= int(count.max()) <= ids.shape[1]:
        raise InputError(
            f"lengths must be in 1 to {ids.shape[1]}, got {int(count.min())} to {int(count.max())}"
        )
    return torch.arange(ids.shape[1]) < count[:, None]


def _to_numpy(output: Any) -> EngineOutput:
    def array(values: Tensor | None) -> np.ndarray | None:
        return None if values is None else values.float().cpu().numpy()

    hidden = output.get("hidden_states")
    return EngineOutput(
        logits=array(output.get("logits")),
        pooler_output=array(output.get("pooler_output")),
        last_hidden_state=array(output.get("last_hidden_state")),
        hidden_states=None if hidden is None else tuple(h.float().cpu().numpy() for h in hidden),
    )
