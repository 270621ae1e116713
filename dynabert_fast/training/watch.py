"""What stops a training whose losses are NaN or infinite, and keeps the batch that did it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from dynabert_fast.errors import TrainingError
from dynabert_fast.files import is_write_failure
from dynabert_fast.models import PackedSequences

# A GPU's losses are looked at when so many more batches are queued: by then they are there, so that
# the host does not wait, and all processes look at the same ones.
_LATER = 2

# GradScaler halves its scale with each step that it skips; fp16 begins with 65536.
_LEAST_SCALE = 1.0

_ADVICE = (
    "look at its texts and labels, or train anew with a lower learning rate, or in bf16 where it "
    "was fp16; earlier checkpoints are intact"
)


@dataclass
class _Watched:
    """A batch whose losses are on their way."""

    step: int
    epoch: float
    inputs: Mapping[str, Any]
    values: Tensor  # on the host: the losses, and in how many processes they are not finite
    there: torch.cuda.Event | None  # recorded behind the copy; None: the values are there


class LossWatch:
    """Looks at every loss without making the host wait for the device.

    On a CPU a bad loss stops training before the optimiser's step; on a GPU two batches later, and
    before anything is evaluated or saved. In several processes all stop at the same batch.

    Args:
        accelerator: The Trainer's.
        folder: Where to save a bad batch.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self._queue: deque[_Watched] = deque()

    def clear(self) -> None:
        """Forget what an earlier training left behind."""
        self._queue.clear()

    def add(self, step: int, epoch: float, inputs: Mapping[str, Any], losses: Tensor) -> None:
        """Watch a batch: its inputs, and one loss or one for each pass.

        Raises:
            TrainingError: This batch, or an earlier one, had a loss that is not finite.
        """
        losses = losses.detach().reshape(-1)
        bad = losses.isfinite().logical_not().any().to(losses.dtype).reshape(1)
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        values, there = _send(torch.cat([losses, bad]))
        self._queue.append(_Watched(step, epoch, inputs, values, there))
        self._look(0 if there is None else _LATER)

    def finish(self) -> None:
        """Look at all that was added, waiting for it.

        Raises:
            TrainingError: A loss was not finite.
        """
        self._look(0)

    def _look(self, leave: int) -> None:
        while len(self._queue) > leave:
            batch = self._queue.popleft()
            if batch.there is not None:
                batch.there.synchronize()
            if batch.values[-1] > 0 and not self._skips():
                self._stop(batch)

    def _skips(self) -> bool:
        """Whether fp16's GradScaler leaves such a step out, and tries the next with less scale."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= _LEAST_SCALE

    def _stop(self, batch: _Watched) -> None:
        losses = batch.values[:-1].tolist()
        where = f"in step {batch.step} (epoch {batch.epoch:.2f})"
        if all(map(torch.isfinite, batch.values[:-1])):
            raise TrainingError(f"another process has a loss that is not finite {where}")
        several = self.accelerator.num_processes > 1
        suffix = f"-process-{self.accelerator.process_index}" if several else ""
        path = self.folder / f"bad-batch-step-{batch.step}{suffix}.safetensors"
        tensors = {name: _plain(value) for name, value in batch.inputs.items()}
        about = {"step": batch.step, "epoch": batch.epoch, "losses": losses}
        kept = f"the batch is in {path}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, {name: json.dumps(value) for name, value in about.items()})
        except Exception as error:  # safetensors has a class of its own for a full disk
            if not is_write_failure(error):
                raise
            kept = f"the batch could not be saved ({error})"
        shown = ", ".join(f"{loss:g}" for loss in losses)
        raise TrainingError(f"the loss is {shown} {where}; {kept}: {_ADVICE}")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; waits for the device, once."""
    found = [tensor.detach().isfinite().all() for tensor in tensors]
    return bool(torch.stack(found).all()) if found else True


def bad_weights(step: int) -> TrainingError:
    """What to raise for weights that are not finite, though every loss was."""
    return TrainingError(
        f"weights are not finite after step {step}, and are not saved; train anew with a lower "
        "learning rate; earlier checkpoints are intact"
    )


def _plain(value: Tensor | PackedSequences) -> Tensor:
    """An input of the model as a tensor of its own on the host: the mask, where it was packed."""
    if isinstance(value, PackedSequences):
        value = value.unpack(value.pack(value.offsets.new_ones(value.shape)))
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _send(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Values on their way to the host, and an event that says when they are there."""
    if not values.is_cuda:
        return values.cpu(), None
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    return host, there
