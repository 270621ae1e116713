"""What a sub-network learns from its teacher: logits and matched hidden states (section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertConfig
from dynabert_fast.subnet import Subnet
from dynabert_fast.tree import SubnetTree

TeacherWidth = Literal["same", "full"]
HiddenTarget = Literal["input", "output"]


@dataclass(frozen=True)
class Distillation:
    """Weights of the distillation loss, and what of which teacher a sub-network learns from.

    The loss is `logits * SCE + hidden * sum of MSE + labels * CE + assistant * SCE'`: SCE is the
    soft cross-entropy of the logits at temperature 1 (the mean squared error of the logit in
    regression), the sum runs over matched hidden states, CE is what a model without a teacher
    learns from, SCE' takes an assistant's logits for the teacher's.

    Attributes:
        logits: Weight of the logits' loss (the paper's lambda_1).
        hidden: Weight of the hidden states' loss (lambda_2); 0 leaves them out.
        teacher_width: `same`: the teacher runs at the student's width (the paper); `full`: always
            at full width (the released code), one teacher pass per batch.
        hidden_target: What a hidden state learns from: `input`, the teacher's input of the layer
            that it goes to (the paper); `output`, the teacher's output of the layer that it comes
            from. The last one learns from the last. With `input`, the output of a layer that
            several depths share has a target for each depth: layer 0 of 6, at depths 1 and 0.5,
            learns to be the input of layer 1 and that of layer 2. With `output` it has one,
            unless the layer is the last of one of them.
        width_exponent: What a sub-network learns from its teacher and assistant counts
            `width ** width_exponent` times: 0 for all alike (the paper), negative for more weight
            on narrow ones. Explicit extents count once.
        labels: Weight of the loss on labels (Hinton et al. 2015), alike for all; the paper has 0.
        assistant: Weight of the loss on a teacher assistant's logits (Mirzadeh et al. 2020,
            arXiv 1902.03393); the paper has 0. A sub-network's assistant is the next deeper one of
            its width below depth 1 in the same step, as it is then. Others have none: of the
            paper's grid, those at depths 1 and 0.75; where a step draws sub-networks, those whose
            assistant was not drawn; sub-networks of explicit extents.
    """

    logits: float = 1.0
    hidden: float = 1.0
    teacher_width: TeacherWidth = "same"
    hidden_target: HiddenTarget = "input"
    width_exponent: float = 0.0
    labels: float = 0.0
    assistant: float = 0.0

    def __post_init__(self) -> None:
        """Refuse weights that train nothing."""
        names = ("logits", "hidden", "labels", "assistant")
        weights = {name: getattr(self, name) for name in names}
        finite = all(0 <= w < math.inf for w in weights.values())  # also refuses NaN
        if not (finite and (self.logits or self.hidden)):
            got = ", ".join(f"{name} {weight}" for name, weight in weights.items())
            raise InputError(
                "distillation weights must be finite, at least 0 and logits and hidden not both "
                f"0, got {got}"
            )
        if not math.isfinite(self.width_exponent):
            raise InputError(f"width_exponent must be finite, got {self.width_exponent}")
        if self.teacher_width not in ("same", "full"):
            raise InputError(f"teacher_width must be same or full, got {self.teacher_width!r}")
        if self.hidden_target not in ("input", "output"):
            raise InputError(f"hidden_target must be input or output, got {self.hidden_target!r}")

    def weight(self, student: Subnet) -> float:
        """How many times the student's loss counts."""
        return 1.0 if student.width is None else student.width**self.width_exponent

    def teacher_subnet(self, config: DynaBertConfig, student: Subnet) -> Subnet:
        """The teacher's sub-network for a student: full depth, full or the student's width.

        A student of explicit extents has no width multiplier; its teacher runs at full width.
        """
        width = student.width if self.teacher_width == "same" else None
        return Subnet.from_multipliers(config, width=1.0 if width is None else width)

    def assistant_of(self, student: Subnet, others: Sequence[Subnet]) -> Subnet | None:
        """The student's assistant among others, see `assistant`."""
        if not self.assistant or student.width is None:
            return None
        below = [s for s in others if s.width == student.width and s.depth and s.depth < 1]
        deeper = [s for s in below if len(s.layers) > len(student.layers)]
        return min(deeper, key=lambda s: (len(s.layers), s.layers), default=None)


def matched_layers(student: Subnet, teacher: Subnet, target: HiddenTarget = "input") -> list[int]:
    """Which hidden states of a full-depth teacher the student's are compared with.

    Hidden state 0 is the embeddings' output, i + 1 that of layer i. For kept layers 0, 2, 4 of 6
    that is 0, 2, 4, 6 (`input`: of the layer that comes next) or 0, 1, 3, 6 (`output`: of the same
    layer); see `Distillation.hidden_target`.

    Returns:
        One index for each of the student's `len(layers) + 1` hidden states.
    """
    if target == "input":
        return [*student.layers, len(teacher.layers)]
    return [0, *(layer + 1 for layer in student.layers[:-1]), len(teacher.layers)]


def distillation_loss(
    recipe: Distillation,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
) -> Tensor:
    """What one sub-network learns from its teacher.

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


class _Pair(NamedTuple):
    """Neighbouring nodes of one hidden state of the student's, and what they learn from."""

    state: int
    first: int
    target: int
    target_first: int
    nodes: int
    users: float  # weight of the sub-networks that learn so, in each of the nodes

    def goes_on_with(self, state: int, node: int, target: int, at: int, users: float) -> bool:
        """Whether a node of the students' lies right behind these, and likewise its target."""
        return (
            (state, target, users) == (self.state, self.target, self.users)
            and node == self.first + self.nodes
            and at == self.target_first + self.nodes
        )


class TreeDistillation:
    """The distillation losses of all sub-networks of a tree, each part that they share once.

    Args:
        recipe: The weights, and the choice of teachers.
        config: The teacher's configuration.
        tree: The students.
        before: Sub-networks that the step has run already, as assistants.

    Attributes:
        teachers: The tree that the teacher runs: each of the students' teachers once.
    """

    def __init__(
        self,
        recipe: Distillation,
        config: DynaBertConfig,
        tree: SubnetTree,
        before: Sequence[Subnet] = (),
    ) -> None:
        self.recipe = recipe
        own = [recipe.teacher_subnet(config, student) for student in tree.subnets]
        self.teachers = SubnetTree(list(dict.fromkeys(own)))
        #: Which of the teachers each student has.
        self.teacher_of = [self.teachers.subnets.index(teacher) for teacher in own]
        self._weights = [recipe.weight(student) for student in tree.subnets]
        known = [*tree.subnets, *before]
        assistants = [recipe.assistant_of(student, known) for student in tree.subnets]
        #: Each student that has an assistant, and where among the students and those before it is.
        self._assisted = [(i, known.index(a)) for i, a in enumerate(assistants) if a is not None]
        self._pairs = self._match(tree) if recipe.hidden else []

    def _match(self, tree: SubnetTree) -> list[_Pair]:
        """Each hidden state with the teacher's that it learns from, see `hidden_target`."""
        place = {
            (edge.layer, teacher): (target, node)
            for target, edge in enumerate(self.teachers.edges)
            for node, users in enumerate(edge.users)
            for teacher in users
        }
        pairs: list[_Pair] = []
        for state, edge in enumerate(tree.edges):
            # The teacher has every layer: the output of one is the input of the next.
            layer = edge.layer
            if self.recipe.hidden_target == "output" and layer is not None:
                output = edge.source[0]
                layer = tree.levels[output - 1].layer + 1 if output else 0
            for node, users in enumerate(edge.users):
                targets: dict[tuple[int, int], float] = {}
                for user in users:
                    found = place[layer, self.teacher_of[user]]
                    targets[found] = targets.get(found, 0.0) + self._weights[user]
                for (target, at), count in targets.items():
                    last = pairs[-1] if pairs else None
                    if last is not None and last.goes_on_with(state, node, target, at, count):
                        pairs[-1] = last._replace(nodes=last.nodes + 1)
                    else:
                        pairs.append(_Pair(state, node, target, at, 1, count))
        return pairs

    def __call__(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        states: Sequence[Tensor],
        targets: Sequence[Tensor],
        before: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """The weighted losses of the logits, and those of the hidden states.

        Args:
            logits: `[n, B, C]`; C = 1 is regression.
            teacher_logits: `[m, B, C]`, of `teachers`.
            states: Hidden states of the students' edges, packed.
            targets: Those of the teachers' edges.
            before: `[B, C]`, logits of each of those before.

        Returns:
            Two float32 scalars (float64 for float64): sums over all students. The first is a mean
            over the batch's examples, the second one over its tokens.
        """
        wanted = teacher_logits
        if self.teacher_of != list(range(len(teacher_logits))):
            wanted = torch.stack([teacher_logits[i] for i in self.teacher_of])
        of_logits = self.recipe.logits * self._of_logits(self._weights, logits, wanted)
        if self._assisted:
            known = [*logits.detach(), *before]
            own = torch.stack([logits[i] for i, _ in self._assisted])
            aims = torch.stack([known[at] for _, at in self._assisted])
            counts = [self._weights[i] for i, _ in self._assisted]
            of_logits = of_logits + self.recipe.assistant * self._of_logits(counts, own, aims)
        if not self._pairs:
            return of_logits, torch.zeros_like(of_logits)
        students, teachers, weights = [], [], []
        tokens = len(targets[0]) // len(self.teachers.edges[0].users)
        for pair in self._pairs:
            students.append(_nodes(states[pair.state], pair.first, pair.nodes, tokens))
            teachers.append(_nodes(targets[pair.target], pair.target_first, pair.nodes, tokens))
            weights.append(float(self.recipe.hidden * pair.users * pair.nodes))
        return of_logits, ops.hidden_mse(students, teachers, weights)

    def _of_logits(self, weights: Sequence[float], logits: Tensor, wanted: Tensor) -> Tensor:
        """The weighted sum of students' losses on their logits, `[n, B, C]` both."""
        wanted = wanted.detach()
        compare = ops.hidden_mse if logits.shape[-1] == 1 else ops.soft_cross_entropy
        if self.recipe.width_exponent == 0:
            # Every student has as many examples, so the mean over all is the mean of their means.
            return len(logits) * compare(logits.flatten(0, 1), wanted.flatten(0, 1))
        each = zip(weights, logits, wanted, strict=True)
        return torch.stack([w * compare(own, target) for w, own, target in each]).sum()


def _nodes(rows: Tensor, first: int, count: int, tokens: int) -> Tensor:
    """The rows of some neighbouring nodes."""
    if len(rows) == count * tokens:
        return rows
    return rows[first * tokens : (first + count) * tokens]
