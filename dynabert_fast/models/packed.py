"""Batches without padding, of one sub-network or of one for each sequence.

Tokens stand one behind the other, `[T, D]`. Where sequences run different sub-networks, those of
one stand together (a lane), the deepest first: a layer then computes the lanes that keep it, mostly
a prefix of the rows, in one call of each op with one extent for each lane.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet

#: One for all rows, or one for each lane.
Extent = int | list[int]


@dataclass(frozen=True)
class PackedSequences:
    """Where the real tokens of a padded batch `[B, S]` are.

    Attributes:
        shape: (B, S).
        offsets: `[B + 1]` int32: sequence b is the packed rows `offsets[b]` to `offsets[b + 1]`.
        max_length: Length of the longest sequence.
        indices: `[T]` flat positions of the packed rows, or `None` where nothing is padded.
        order: `[B]` where each of the batch's sequences is packed, `None` where in its own place.
        rows: Packed rows of each lane, `None` where there is one sub-network.
        sequences: Sequences of each lane, likewise.
    """

    shape: tuple[int, int]
    offsets: Tensor
    max_length: int
    indices: Tensor | None
    order: Tensor | None = None
    rows: list[int] | None = None
    sequences: list[int] | None = None

    @classmethod
    def from_mask(cls, shape: tuple[int, int], mask: Tensor | None, device: torch.device) -> Self:
        """Read a mask `[B, S]` (non-zero = real token, anywhere in the row); `None` is all real.

        Raises:
            InputError: The mask has another shape, or a sequence has no token.
        """
        batch, length = shape
        whole = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        if mask is None:
            return cls(shape, whole, length, None)
        mask, lengths, counts = _read_mask(shape, mask)
        if sum(counts) == batch * length:
            return cls(shape, whole, length, None)
        offsets = torch.zeros_like(whole)
        torch.cumsum(lengths, 0, out=offsets[1:])
        return cls(shape, offsets, max(counts), _places(mask.flatten(), sum(counts)))

    @property
    def tokens(self) -> int:
        """T, the number of real tokens."""
        return self.shape[0] * self.shape[1] if self.indices is None else len(self.indices)

    def pack(self, padded: Tensor) -> Tensor:
        """`[B, S, ...] -> [T, ...]`."""
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat[self.indices]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """The same on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        offsets = self.offsets.to(device, non_blocking=non_blocking)
        return replace(self, offsets=offsets, indices=move(self.indices), order=move(self.order))

    def pin_memory(self) -> Self:
        """The same in memory that a GPU copies from without waiting."""
        indices, order = (t if t is None else t.pin_memory() for t in (self.indices, self.order))
        return replace(self, offsets=self.offsets.pin_memory(), indices=indices, order=order)

    def times(self, count: int, total: int) -> Self:
        """The batch, of `total` tokens, `count` times over: one lane for each."""
        starts = self.offsets[:-1]
        shifts = torch.arange(count, dtype=starts.dtype, device=starts.device) * total
        end = self.offsets[-1:] + (count - 1) * total
        offsets = torch.cat([(starts + shifts[:, None]).flatten(), end])
        rows, sequences = [total] * count, [len(starts)] * count
        return replace(self, offsets=offsets, rows=rows, sequences=sequences)

    def first(self, packed: Tensor) -> Tensor:
        """Each sequence's first token, `[..., T, D] -> [..., B, D]`, in the batch's order."""
        starts = self.offsets[:-1]
        return packed.index_select(-2, starts if self.order is None else starts[self.order])

    def unpack(self, packed: Tensor) -> Tensor:
        """`[T, ...] -> [B, S, ...]`, zero at padding."""
        if self.indices is None:
            return packed.unflatten(0, self.shape)
        flat = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return flat.index_copy(0, self.indices, packed).unflatten(0, self.shape)


def _places(mask: Tensor, count: int) -> Tensor:
    """Where `[N]` is true, `count` times: nobody waits for a number that is known."""
    return torch.nonzero_static(mask, size=count).flatten()


def _read_mask(shape: tuple[int, int], mask: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The mask as bools, and its lengths there and here."""
    if tuple(mask.shape) != shape:
        raise InputError(f"attention_mask must be {list(shape)}, got {list(mask.shape)}")
    mask = mask != 0
    lengths = mask.sum(1, dtype=torch.int32)
    counts = lengths.tolist()  # all that a forward pass of one sub-network waits for
    if shape[0] and min(counts) == 0:
        raise InputError(f"attention_mask leaves no token in row {counts.index(0)}; drop the row")
    return mask, lengths, counts


@dataclass(frozen=True)
class Lane:
    """Consecutive packed sequences of one sub-network."""

    subnet: Subnet
    lengths: list[int]
    first_row: int

    @property
    def rows(self) -> slice:
        """Its packed rows."""
        return slice(self.first_row, self.first_row + sum(self.lengths))


@dataclass(frozen=True)
class Part:
    """What one layer computes of a mixed batch.

    Attributes:
        packed: Of the lanes that keep the layer.
        heads: Of each of them.
        neurons: Likewise.
        runs: Their rows, neighbours merged; `None` for all.
    """

    packed: PackedSequences
    heads: list[int]
    neurons: list[int]
    runs: list[slice] | None

    def select(self, x: Tensor) -> Tensor:
        """Its rows of `[T, D]`; a view where they lie together."""
        if self.runs is None:
            return x
        parts = [x[run] for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def restore(self, x: Tensor, y: Tensor) -> Tensor:
        """`x` with its rows replaced by `y`."""
        if self.runs is None:
            return y
        parts, done, taken = [], 0, 0
        for run in self.runs:
            count = run.stop - run.start
            parts += [x[done : run.start], y[taken : taken + count]]
            done, taken = run.stop, taken + count
        return torch.cat([*parts, x[done:]])


@dataclass(frozen=True)
class MixedBatch:
    """A batch in which every sequence runs a sub-network of its own."""

    packed: PackedSequences
    lanes: list[Lane]
    _parts: dict[tuple[int, ...], Part] = field(default_factory=dict)

    @classmethod
    def from_mask(
        cls,
        shape: tuple[int, int],
        mask: Tensor | None,
        device: torch.device,
        subnets: Sequence[Subnet],
    ) -> Self:
        """As `PackedSequences.from_mask`, with a sub-network for each sequence.

        Raises:
            InputError: As there, or there is not one sub-network for each sequence.
        """
        batch, length = shape
        if len(subnets) != batch:
            raise InputError(
                f"there must be one sub-network, or one for each of {batch} sequences, "
                f"got {len(subnets)}"
            )
        counts = [length] * batch
        if mask is not None:
            mask, _, counts = _read_mask(shape, mask)
        # Sorting is stable: the order inside a lane is the batch's.
        order = sorted(range(batch), key=lambda i: _rank(subnets[i]))
        lanes: list[Lane] = []
        for i in order:
            if lanes and lanes[-1].subnet == subnets[i]:
                lanes[-1].lengths.append(counts[i])
            else:
                done = lanes[-1].rows.stop if lanes else 0
                lanes.append(Lane(subnets[i], [counts[i]], done))
        on = _send(order, torch.int64, device)
        positions = torch.arange(batch * length, device=device).view(batch, length)[on]
        indices = positions.flatten()
        if mask is not None:
            indices = indices[_places(mask[on].flatten(), sum(counts))]
        lengths = [count for lane in lanes for count in lane.lengths]
        offsets = _offsets(lengths, device)
        longest = max(lengths, default=0)
        return cls(PackedSequences(shape, offsets, longest, indices, order=on.argsort()), lanes)

    def part(self, layer: int) -> Part | None:
        """What that layer computes; `None` where nobody keeps it."""
        active = [lane for lane in self.lanes if layer in lane.subnet.layers]
        if not active:
            return None
        at = [lane.subnet.layers.index(layer) for lane in active]
        heads = [lane.subnet.heads[i] for lane, i in zip(active, at, strict=True)]
        neurons = [lane.subnet.neurons[i] for lane, i in zip(active, at, strict=True)]
        key = (*(lane.first_row for lane in active), *heads, *neurons)
        if key not in self._parts:
            self._parts[key] = self._make_part(active, heads, neurons)
        return self._parts[key]

    def _make_part(self, active: list[Lane], heads: list[int], neurons: list[int]) -> Part:
        runs: list[slice] = []
        blocks: list[tuple[int, int, int, int]] = []  # heads, neurons, rows, sequences
        for lane, h, n in zip(active, heads, neurons, strict=True):
            rows = lane.rows
            if runs and runs[-1].stop == rows.start:
                runs[-1] = slice(runs[-1].start, rows.stop)
            else:
                runs.append(rows)
            count = rows.stop - rows.start
            if blocks and blocks[-1][:2] == (h, n):  # lanes that differ in depth alone
                count += blocks[-1][2]
                blocks[-1] = h, n, count, blocks[-1][3] + len(lane.lengths)
            else:
                blocks.append((h, n, count, len(lane.lengths)))
        lengths = [count for lane in active for count in lane.lengths]
        packed = PackedSequences(
            self.packed.shape,
            _offsets(lengths, self.packed.offsets.device),
            max(lengths),
            None,
            rows=[b[2] for b in blocks],
            sequences=[b[3] for b in blocks],
        )
        everything = len(active) == len(self.lanes)
        return Part(
            packed, [b[0] for b in blocks], [b[1] for b in blocks], None if everything else runs
        )


def _rank(subnet: Subnet) -> tuple[object, ...]:
    """Deepest first, then the widest."""
    return (
        -len(subnet.layers),
        subnet.layers,
        tuple(-h for h in subnet.heads),
        tuple(-n for n in subnet.neurons),
    )


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return _send([0, *itertools.accumulate(lengths)], torch.int32, device)


def _send(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """To a device, without waiting for it; in the capture of a graph that is an error of torch's.

    The graph would copy from this memory again, when others have it.
    """
    found = torch.tensor(values, dtype=dtype)
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        found = found.pin_memory()
    return found.to(device, non_blocking=found.is_pinned())
