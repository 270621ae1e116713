"""What a training batch brings along: where its tokens are, and its share of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from dynabert_fast.data import Collator
from dynabert_fast.models.packed import PackedSequences


class PackingCollator:
    """A collator whose batches carry a `PackedSequences` as `attention_mask`.

    Lengths are known where batches are made. Read from a mask on a GPU, they would make every
    training step wait for the device.

    Args:
        collator: Pads a batch and makes its mask.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """As the collator, but for `attention_mask`."""
        batch = self.collator(items)
        batch_size, length = batch["input_ids"].shape
        mask = batch["attention_mask"]
        packed = PackedSequences.from_mask((batch_size, length), mask, mask.device)
        return {**batch, "attention_mask": packed}


def batch_shares(
    counts: Sequence[tuple[int, int]], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """What makes means over batches, added up, the mean over a whole step.

    A step has batches b of n_b examples (or tokens), accumulated in P processes, and their means
    m_b. The step's mean is `sum_b n_b m_b / sum_b n_b`. Gradients of accumulated batches are added
    and those of processes averaged, so that each mean is multiplied by `P n_b / sum_b n_b`: by
    exactly 1 where each process has one batch of the same counts.

    All processes must call it together: counts are summed in one collective. Nothing waits for the
    device.

    Args:
        counts: Examples and real tokens of each of this process's batches of the step. The loss of
            logits is a mean over examples, that of hidden states one over tokens.
        device: Where the shares are needed.

    Returns:
        For each batch the shares of its examples and of its tokens, float64 scalars.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1

    def full(value: float) -> Tensor:  # by a kernel: a copy from the host could wait
        return torch.full((), value, dtype=torch.float64, device=device)

    sums = [sum(column) for column in zip(*counts, strict=True)]
    if processes == 1:
        return [(full(n / sums[0]), full(t / sums[1])) for n, t in counts]
    total = torch.stack([full(value) for value in sums])
    distributed.all_reduce(total)
    examples, tokens = total.unbind()
    return [(n * processes / examples, t * processes / tokens) for n, t in counts]
