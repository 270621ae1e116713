"""What a sub-network learns from its teacher: logits and matched hidden states (section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertConfig
from dynabert_fast.subnet import Subnet

TeacherWidth = Literal["same", "full"]


@dataclass(frozen=True)
class Distillation:
    """Weights of the distillation loss, and which teacher a sub-network has.

    The loss is `logits * SCE + hidden * sum of MSE`: SCE is the soft cross-entropy of the logits at
    temperature 1 (the mean squared error of the logit in regression), the sum runs over matched
    hidden states.

    Attributes:
        logits: Weight of the logits' loss (the paper's lambda_1).
        hidden: Weight of the hidden states' loss (lambda_2); 0 leaves them out.
        teacher_width: `same`: the teacher runs at the student's width (the paper); `full`: always
            at full width (the released code), one teacher pass per batch.
    """

    logits: float = 1.0
    hidden: float = 1.0
    teacher_width: TeacherWidth = "same"

    def __post_init__(self) -> None:
        """Refuse weights that train nothing."""
        weights = (self.logits, self.hidden)
        if not (all(0 <= w < math.inf for w in weights) and any(weights)):  # also refuses NaN
            raise InputError(
                "distillation weights must be finite, at least 0 and not both 0, "
                f"got logits {self.logits} and hidden {self.hidden}"
            )
        if self.teacher_width not in ("same", "full"):
            raise InputError(f"teacher_width must be same or full, got {self.teacher_width!r}")

    def teacher_subnet(self, config: DynaBertConfig, student: Subnet) -> Subnet:
        """The teacher's sub-network for a student: full depth, full or the student's width.

        A student of explicit extents has no width multiplier; its teacher runs at full width.
        """
        width = student.width if self.teacher_width == "same" else None
        return Subnet.from_multipliers(config, width=1.0 if width is None else width)


def matched_layers(student: Subnet, teacher: Subnet) -> list[int]:
    """Which hidden states of a full-depth teacher the student's are compared with.

    Hidden state 0 is the embeddings' output, i + 1 that of layer i. The input of each kept layer is
    matched with the teacher's input of the same layer, the last hidden state with the last: for
    kept layers 0, 2, 4 of 6 that is 0, 2, 4, 6.

    Returns:
        One index for each of the student's `len(layers) + 1` hidden states.
    """
    return [*student.layers, len(teacher.layers)]


def distillation_loss(
    recipe: Distillation,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
) -> Tensor:
    """The distillation loss of one sub-network.

    Args:
        recipe: The weights.
        student_logits: `[B, C]`; C = 1 is regression.
        teacher_logits: `[B, C]`.
        student_hidden: Hidden states to match, packed `[T, D]` each (padding does not count).
        teacher_hidden: As many, already picked by `matched_layers`.

    Returns:
        A float32 scalar.
    """
    compare = ops.hidden_mse if student_logits.shape[-1] == 1 else ops.soft_cross_entropy
    loss = recipe.logits * compare(student_logits, teacher_logits)
    if recipe.hidden:
        pairs = zip(student_hidden, teacher_hidden, strict=True)
        loss = loss + recipe.hidden * torch.stack([ops.hidden_mse(s, t) for s, t in pairs]).sum()
    return loss
