"""What the kernels share: device functions, tile tables, configurations and how one is chosen."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike
from torch import Tensor

#: Kernels run in Python on CPU tensors: for tests without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


# --- device functions -----------------------------------------------------------------------------


@triton.jit
def mix32(h):
    """C. Wellons' 32-bit finaliser lowbias32, on uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keep_mask(seed, rows, columns, threshold):
    """`reference.keep_mask`: rows and columns broadcast; kept iff the hash reaches the threshold.

    seed is an int64 scalar, threshold `round(p * 2^32)` as one.
    """
    high = (seed >> 32).to(tl.uint32)
    low = mix32(seed.to(tl.uint32) ^ mix32(high))
    mixed = mix32(rows.to(tl.uint32) ^ low)
    bits = mix32(mixed ^ (columns.to(tl.uint32) * 0x9E3779B9 + high))
    return bits.to(tl.int64) >= threshold


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """X is float32."""
    if ACTIVATION == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        return x * tl.sigmoid(u)
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at x, float32."""
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        s = tl.sigmoid(u)
        # sigmoid(-u) is 1 - s with all its digits.
        return s + x * s * tl.sigmoid(-u) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


# --- row blocks -----------------------------------------------------------------------------------


# Tables are kept: making one costs the host more than a launch. They are kept for a stream each, as
# nothing orders the copy to the device before what other streams do. A first call inside the
# capture of a graph would copy, and the graph would need the table for as long as it lives: engines
# capture calls of one extent, which have no table.
def stream_of(device: torch.device) -> int:
    """The current stream, where calls on a device go."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def table(rows: ArrayLike, columns: int, device: torch.device) -> Tensor:
    """`[rows, columns]` int32 on the device, without waiting for it: every batch has its own."""
    found = torch.from_numpy(np.asarray(rows, np.int32).reshape(-1, columns))
    if device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)


def row_tiles(
    extents: Sequence[int], rows: Sequence[int], block: int, device: torch.device
) -> Tensor:
    """`[tiles, 3]` int32: first row, row after the last, extent; no tile reaches into two blocks.

    Widest first: a long sum that starts last would be waited for.
    """
    return _row_tiles(tuple(extents), tuple(rows), block, device, stream_of(device))


@functools.lru_cache(maxsize=256)
def _row_tiles(
    extents: tuple[int, ...], rows: tuple[int, ...], block: int, device: torch.device, stream: int
) -> Tensor:
    # A batch of 16 Ki tokens for each of 12 nodes has 24,576 tiles of 8 rows: not one by one.
    starts = np.cumsum([0, *rows])
    parts = []
    for i in sorted(range(len(rows)), key=lambda i: -extents[i]):
        first = np.arange(starts[i], starts[i + 1], block)
        last = np.minimum(first + block, starts[i + 1])
        parts.append(np.stack([first, last, np.full_like(first, extents[i])], 1))
    return table(np.concatenate(parts), 3, device)


def row_blocks(extents: Sequence[int], rows: Sequence[int], device: torch.device) -> Tensor:
    """`[blocks, 3]` int32, as `row_tiles` with one tile a block; empty blocks are left out."""
    return _row_blocks(tuple(extents), tuple(rows), device, stream_of(device))


@functools.lru_cache(maxsize=256)
def _row_blocks(
    extents: tuple[int, ...], rows: tuple[int, ...], device: torch.device, stream: int
) -> Tensor:
    blocks, start = [], 0
    for extent, count in zip(extents, rows, strict=True):
        if count:
            blocks.append((start, start + count, extent))
        start += count
    return table(blocks, 3, device)


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes of a kernel's blocks, and how it is compiled."""

    blocks: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    @classmethod
    def of(cls, warps: int = 4, stages: int = 2, **blocks: int) -> Config:
        """With the blocks by name."""
        return cls(tuple(blocks.items()), warps, stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def __str__(self) -> str:
        sizes = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in self.blocks)
        return f"{sizes} w{self.warps} s{self.stages}"

    @property
    def arguments(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return dict(self.blocks) | {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Specimen:
    """One way in which a kernel is compiled ahead of time, to see its registers and spills.

    Attributes:
        kernel: The `triton.jit` function.
        name: For reports: "product bf16 expand gelu".
        signature: Parameter to type: "*bf16", "i32", "fp32"; constants have "constexpr".
        constants: Values of the constant parameters.
        config: Its blocks are among the kernel's constants too.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Config


def type_name(dtype: torch.dtype) -> str:
    """Triton's name of a type."""
    return _TYPES[dtype]


#: What answers `choose`: the first configuration, or one that was measured.
Chooser = Callable[[str, tuple[Any, ...], Sequence[Config], Callable[[Config], None]], Config]


def _first(
    kernel: str,
    key: tuple[Any, ...],
    configs: Sequence[Config],
    launch: Callable[[Config], None],
) -> Config:
    return configs[0]


_chooser: list[Chooser] = [_first]


def choose(
    kernel: str,
    key: tuple[Any, ...],
    configs: Sequence[Config],
    launch: Callable[[Config], None],
) -> Config:
    """The configuration for a call; the first is safe on every card.

    Args:
        kernel: Name.
        key: What the best choice depends on: type, sizes (rounded up to a power of two), flags.
        configs: The shipped ones.
        launch: Runs the kernel once with a configuration, to be timed.
    """
    return _chooser[0](kernel, key, configs, launch)


def set_chooser(chooser: Chooser) -> None:
    """Replace what answers `choose`."""
    _chooser[0] = chooser


def bucket(count: int) -> int:
    """The next power of two, at least 16."""
    return max(16, triton.next_power_of_2(count))
