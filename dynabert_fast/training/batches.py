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


def batch_shares(examples: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What makes the mean over processes of local means the mean over the global batch.

    Process p of P has n_p examples (or tokens) and the mean m_p over them. The global mean is
    `sum_p n_p m_p / sum_p n_p`, and processes average their gradients, so that p must multiply
    its mean by `P n_p / sum_p n_p`: exactly 1 where all counts are equal, or P is 1.

    All processes must call it together: counts are summed in one collective. Nothing waits for the
    device.

    Args:
        examples: Of this process's batch; its loss of logits is a mean over them.
        tokens: Likewise, real ones; the loss of hidden states is a mean over them.
        device: Where the shares are needed.

    Returns:
        The shares of the examples and of the tokens, float64 scalars.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    if processes == 1:
        one = torch.ones((), dtype=torch.float64, device=device)
        return one, one
    # Filled by kernels: a copy from the host could wait.
    counts = [torch.full((), n, dtype=torch.float64, device=device) for n in (examples, tokens)]
    local = torch.stack(counts)
    total = local.clone()
    distributed.all_reduce(total)
    examples_share, tokens_share = (local * processes / total).unbind()
    return examples_share, tokens_share
