"""Memory of training: what a step takes, and how the CPU's is used again."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from dynabert_fast.models import DynaBertConfig
from dynabert_fast.tree import SubnetTree

# Parameters of glibc's mallopt, and its defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Inside, memory that was freed stays with the process, to be given out again.

    By default glibc returns every large block to the system and asks for a new one, whose pages
    are then filled with zeros one by one as they are first touched: a fifth of a training step on a
    CPU. With another allocator (jemalloc, or another system's) nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step holds at its peak, as far as arithmetic can tell.

    Attributes:
        weights: The student's parameters, their gradients and AdamW's two moments, in fp32, and the
            teacher's parameters.
        teacher: The teacher's hidden states.
        activations: What the largest forward pass keeps for its backward pass.
        backward: Gradients of activations at the largest layer.
    """

    weights: int
    teacher: int
    activations: int
    backward: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.teacher + self.activations + self.backward


def step_memory(
    config: DynaBertConfig,
    parameters: int,
    teacher_parameters: int,
    passes: tuple[SubnetTree, ...],
    teachers: tuple[SubnetTree, ...],
    tokens: int,
    half: bool,
    hidden: bool,
    checkpointing: bool,
) -> StepMemory:
    """What a step of these passes takes.

    A call of a layer makes buffers as wide as the widest of its nodes, in autocast's type where
    there is one; residuals and what LayerNorm keeps are fp32.

    Args:
        config: The student's.
        parameters: How many the student has.
        teacher_parameters: How many the teacher has, 0 without one.
        passes: The step's trees.
        teachers: Likewise, of the teacher; none without one.
        tokens: Real tokens of the largest batch.
        half: Whether matrix products run in 16 bits.
        hidden: Whether hidden states are compared.
        checkpointing: Whether a layer keeps its input alone and is computed again.
    """
    size, d = 2 if half else 4, config.hidden_size
    stream = 4 * d  # a row of the residual stream

    def layer(heads: int, neurons: int) -> int:
        """Of one node and token: two inputs of products, two of LayerNorms, and what is between."""
        products = size * (2 * d + 4 * heads * config.head_size + 2 * neurons)
        return products + 2 * stream + 4 * (heads + 4)

    def largest(tree: SubnetTree) -> list[tuple[int, int]]:
        """Rows of each level, for one token, and bytes of one of them."""
        return [(len(at.heads), layer(max(at.heads), max(at.neurons))) for at in tree.levels]

    activations = backward = 0
    for tree in passes:
        levels = largest(tree)
        inputs = sum(rows for rows, _ in levels) * stream
        inside = [rows * bytes_of for rows, bytes_of in levels]
        kept = max(inside) + inputs if checkpointing else sum(inside)
        # What products read in 16 bits is a copy; the states that are compared stay in fp32.
        if hidden and half and not checkpointing:
            kept += inputs + len(tree.ends) * stream
        activations = max(activations, tokens * kept)
        backward = max(backward, tokens * max(inside) // 2)
    states = max(
        (sum(len(at.heads) for at in t.levels) + len(t.subnets) for t in teachers), default=0
    )
    return StepMemory(
        weights=4 * (4 * parameters + teacher_parameters),
        teacher=tokens * stream * states if hidden else 0,
        activations=activations,
        backward=backward,
    )
