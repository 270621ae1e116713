"""The distillation loss against its formula, and which hidden state learns from which."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet, grid
from dynabert_fast.training import (
    Distillation,
    TreeDistillation,
    distillation_loss,
    matched_layers,
)
from dynabert_fast.tree import SubnetTree


def config_of(layers: int) -> SimpleNamespace:
    return SimpleNamespace(layer_heads=[4] * layers, layer_neurons=[40] * layers)


# Number of layers, the student's depth: the teacher's hidden states (0 is the embeddings'), as
# inputs of the student's next layers and as outputs of its last ones.
MATCHED = {
    "12 layers, all": (12, 1.0, [*range(13)], [*range(13)]),
    "12 layers, 0.75": (
        12,
        0.75,
        [0, 1, 2, 4, 5, 6, 8, 9, 10, 12],
        [0, 1, 2, 3, 5, 6, 7, 9, 10, 12],
    ),
    "12 layers, 0.5": (12, 0.5, [0, 2, 4, 6, 8, 10, 12], [0, 1, 3, 5, 7, 9, 12]),
    "6 layers, 0.75": (6, 0.75, [0, 1, 2, 4, 6], [0, 1, 2, 3, 6]),
    "6 layers, 0.5": (6, 0.5, [0, 2, 4, 6], [0, 1, 3, 6]),
    "1 layer": (1, 1.0, [0, 1], [0, 1]),
}


@pytest.mark.parametrize(
    ("layers", "depth", "inputs", "outputs"), MATCHED.values(), ids=MATCHED.keys()
)
def test_matched_layers(layers, depth, inputs, outputs):
    config = config_of(layers)
    student = Subnet.from_multipliers(config, 0.5, depth)
    assert matched_layers(student, Subnet.full(config)) == inputs
    assert matched_layers(student, Subnet.full(config), "output") == outputs


def test_matched_layers_of_explicit_layers():
    config = config_of(6)
    student = Subnet.from_extents(config, (1, 5), (2, 4), (7, 40))
    assert matched_layers(student, Subnet.full(config)) == [1, 5, 6]
    assert matched_layers(student, Subnet.full(config), "output") == [0, 2, 6]


def hidden_pairs(count, tokens=(5, 7, 3)):
    """Hidden states of student and teacher `[sum(tokens), D]`, no two of one distribution."""
    generator = torch.Generator().manual_seed(1)
    shape = (sum(tokens), 8)

    def states():
        return [
            torch.randn(shape, dtype=torch.float64, generator=generator) * (i + 1)
            for i in range(count)
        ]

    return [s.requires_grad_() for s in states()], [t.requires_grad_() for t in states()]


def logit_pair(classes):
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(3, classes, dtype=torch.float64, generator=generator) for _ in range(2))
    return tuple(x.requires_grad_() for x in pair)


@pytest.mark.parametrize("classes", [1, 2, 6], ids=["regression", "binary", "many classes"])
@pytest.mark.parametrize(
    ("logits", "hidden"),
    [(1.0, 0.1), (1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0)],
    ids=["width stage", "depth stage", "others", "logits only", "hidden only"],
)
def test_loss_is_the_formula(classes, logits, hidden):
    student, teacher = logit_pair(classes)
    states, wanted = hidden_pairs(4)
    got = distillation_loss(Distillation(logits, hidden), student, teacher, states, wanted)
    if classes == 1:
        first = sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / 3
    else:  # soft cross-entropy at temperature 1, mean over the batch
        first = -(teacher.exp() / teacher.exp().sum(-1, keepdim=True)) * (
            student - student.exp().sum(-1, keepdim=True).log()
        )
        first = first.sum() / 3
    # The mean over real tokens and features of each hidden state, summed over them.
    second = sum(((s - t) ** 2).sum() / s.numel() for s, t in zip(states, wanted, strict=True))
    assert got.shape == ()
    torch.testing.assert_close(got, (logits * first + hidden * second).reshape(()))


def test_gradients_reach_the_student_only():
    student, teacher = logit_pair(3)
    states, wanted = hidden_pairs(2)
    loss = distillation_loss(Distillation(1.0, 0.5), student, teacher, states, wanted)
    loss.backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)) / 3)
    for s, t in zip(states, wanted, strict=True):
        torch.testing.assert_close(s.grad, 0.5 * 2 * (s - t) / s.numel())
    assert all(t.grad is None for t in (teacher, *wanted))


def test_half_precision_logits_of_the_teacher():
    student, teacher = (x.detach().float() for x in logit_pair(3))
    got = distillation_loss(Distillation(hidden=0.0), student, teacher.bfloat16(), (), ())
    want = -(teacher.bfloat16().float().softmax(-1) * F.log_softmax(student, -1)).sum(-1).mean()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)


def test_a_missing_hidden_state_is_an_error():
    states, wanted = hidden_pairs(3)
    with pytest.raises(ValueError, match="zip"):
        distillation_loss(Distillation(), *logit_pair(2), states, wanted[:2])


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("logits", "hidden", "labels", "assistant"),
    [
        *((0, 0, 0, 0), (0, 0, 1, 1)),
        *((-1, 1, 0, 0), (1, -0.1, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)),
        *((NAN, 1, 0, 0), (1, NAN, 0, 0), (1, 1, NAN, 0), (1, 1, 0, NAN)),
        *((INFINITE, 1, 0, 0), (1, INFINITE, 0, 0), (1, 1, INFINITE, 0), (1, 1, 0, INFINITE)),
    ],
)
def test_bad_weights_are_refused(logits, hidden, labels, assistant):
    message = f"got logits {logits}, hidden {hidden}, labels {labels}, assistant {assistant}"
    with pytest.raises(InputError, match=message):
        Distillation(logits, hidden, labels=labels, assistant=assistant)


def test_unknown_teacher_width_is_refused():
    with pytest.raises(InputError, match="must be same or full, got 'half'"):
        Distillation(teacher_width="half")


def test_unknown_hidden_target_is_refused():
    with pytest.raises(InputError, match="must be input or output, got 'last'"):
        Distillation(hidden_target="last")


def test_defaults_are_those_of_the_paper():
    assert Distillation() == Distillation(1.0, 1.0, "same", "input", 0.0, 0.0, 0.0)


@pytest.mark.parametrize("layers", [6, 12])
def test_teacher_subnet_has_full_depth_and_the_chosen_width(layers):
    config = config_of(layers)
    for student in grid(config):
        same = Distillation(teacher_width="same").teacher_subnet(config, student)
        full = Distillation(teacher_width="full").teacher_subnet(config, student)
        assert (same.width, same.depth) == (student.width, 1.0)
        assert same.heads == (student.heads[0],) * layers
        assert full == Subnet.full(config)


def test_explicit_extents_learn_from_the_full_width():
    config = config_of(6)
    student = Subnet.from_extents(config, (0, 3), (1, 4), (40, 2))
    for choice in ("same", "full"):
        assert Distillation(teacher_width=choice).teacher_subnet(config, student) == Subnet.full(
            config
        )


def test_an_assistant_is_the_next_deeper_of_its_width():
    config, recipe = config_of(12), Distillation(assistant=1.0)
    subnets = grid(config, (1.0, 0.5), (1.0, 0.75, 0.5, 0.25))
    others = [*subnets, Subnet.from_extents(config, range(10), [2] * 10, [20] * 10)]
    found = {str(s): str(recipe.assistant_of(s, others)) for s in others}
    assert found == {
        **{f"w{w}-d1.00": "None" for w in ("1.00", "0.50")},
        **{f"w{w}-d0.75": "None" for w in ("1.00", "0.50")},  # full depth is the teacher's
        **{f"w{w}-d0.50": f"w{w}-d0.75" for w in ("1.00", "0.50")},
        **{f"w{w}-d0.25": f"w{w}-d0.50" for w in ("1.00", "0.50")},
        str(others[-1]): "None",
    }
    without = [s for s in subnets if s.depth != 0.5]
    assert recipe.assistant_of(subnets[-1], without).depth == 0.75
    assert Distillation().assistant_of(subnets[-1], subnets) is None


# --- a tree of students ---------------------------------------------------------------------------

# For 4 layers of 4 heads and 40 neurons.
STUDENTS = {
    "grid": [f"w{w:.2f}-d{d:.2f}" for d in (1, 0.75, 0.5) for w in (1, 0.75, 0.5, 0.25)],
    "duplicates": ["w0.50-d0.50", "w1.00-d1.00", "w0.50-d0.50", "w0.50-d1.00"],
    "explicit": ["l0+2+3-h3+1+4-n7+40+1", "w0.50-d0.75", "l3-h2-n13", "l0-h2-n20"],
    # The second is the first, but for its teacher at the same width.
    "one way, two teachers": ["w0.25-d0.50", "l0+2-h1+1-n10+10", "w0.25-d1.00"],
    "one": ["w0.25-d0.75"],
}
TOKENS, WIDTH = 6, 5


@pytest.fixture(params=STUDENTS.values(), ids=STUDENTS.keys())
def students(request):
    return [Subnet.parse(config_of(4), name) for name in request.param]


def states_of(tree, generator):
    """A random hidden state for each edge; those of one node that go several ways are the same."""
    nodes = {}
    for edge in tree.edges:
        shape = (len(edge.users) * TOKENS, WIDTH)
        state = torch.randn(shape, dtype=torch.float64, generator=generator)
        nodes.setdefault(edge.source, state.requires_grad_())
    return [nodes[edge.source] for edge in tree.edges]


def own_states(tree, states):
    """Of each sub-network: its hidden states from the first layer's input to the last."""
    found = [[] for _ in tree.subnets]
    for state, edge in zip(states, tree.edges, strict=True):
        for node, users in zip(state.split(TOKENS), edge.users, strict=True):
            for user in users:
                found[user].append(node)
    return found


@pytest.mark.parametrize("classes", [1, 3], ids=["regression", "classes"])
@pytest.mark.parametrize("width", ["same", "full"])
@pytest.mark.parametrize("target", ["input", "output"])
@pytest.mark.parametrize(("logits", "hidden"), [(0.7, 0.3), (1.0, 0.0), (0.0, 2.0)])
def test_a_trees_loss_is_the_sum_of_its_students(students, width, target, logits, hidden, classes):
    config, generator = config_of(4), torch.Generator().manual_seed(3)
    recipe, tree = Distillation(logits, hidden, width, target), SubnetTree(students)
    lesson = TreeDistillation(recipe, config, tree)
    assert len(set(lesson.teachers.subnets)) == len(lesson.teachers.subnets)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    given, wanted = (
        randn(len(students), 3, classes),
        randn(len(lesson.teachers.subnets), 3, classes),
    )
    states = states_of(tree, generator) if hidden else []
    targets = states_of(lesson.teachers, generator) if hidden else []
    leaves = [given, *{id(s): s for s in states}.values()]

    parts = lesson(given, wanted, states, targets)
    assert [part.shape for part in parts] == [(), ()]
    got = torch.autograd.grad(sum(parts), leaves, allow_unused=True)
    assert all(t.grad is None for t in (wanted, *targets))

    total = torch.zeros((), dtype=torch.float64)
    of_student = own_states(tree, states) if hidden else [()] * len(students)
    of_teacher = own_states(lesson.teachers, targets) if hidden else []
    for i, student in enumerate(students):
        teacher = recipe.teacher_subnet(config, student)
        at = lesson.teachers.subnets.index(teacher)
        matched = matched_layers(student, teacher, target) if hidden else ()
        aims = [of_teacher[at][k] for k in matched]
        total = total + distillation_loss(
            recipe, given[i], wanted[at].detach(), of_student[i], [aim.detach() for aim in aims]
        )
    torch.testing.assert_close(sum(parts), total)
    want = torch.autograd.grad(total, leaves, allow_unused=True)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("exponent", [0.0, -1.0])
@pytest.mark.parametrize("classes", [1, 3], ids=["regression", "classes"])
def test_what_assistants_add(classes, exponent):
    """Their logits are aims and no more: of those in the tree, and of those that ran before."""
    config, generator = config_of(4), torch.Generator().manual_seed(3)
    recipe = Distillation(0.5, 0.0, width_exponent=exponent, assistant=2.0)
    subnets = [Subnet.parse(config, f"w{w}-d{d}") for d in (1, 0.75, 0.5) for w in (1, 0.5)]
    tree = SubnetTree([*subnets[:3], *subnets[4:]])
    lesson = TreeDistillation(recipe, config, tree, subnets[3:4])
    plain = TreeDistillation(dataclasses.replace(recipe, assistant=0.0), config, tree)
    given = torch.randn(5, 3, classes, dtype=torch.float64, generator=generator).requires_grad_()
    wanted = torch.randn(2, 3, classes, dtype=torch.float64, generator=generator)
    before = torch.randn(3, classes, dtype=torch.float64, generator=generator)
    got = lesson(given, wanted, (), (), [before])[0]
    total = plain(given, wanted, (), ())[0]
    # Halves learn from three quarters: of width 1 in the tree, of width 0.5 before it.
    for own, aim, width in ((given[3], given[2].detach(), 1.0), (given[4], before, 0.5)):
        compare = F.mse_loss(own, aim) if classes == 1 else F.cross_entropy(own, aim.softmax(-1))
        total = total + 2.0 * width**exponent * compare
    torch.testing.assert_close(got, total)
    torch.testing.assert_close(*(torch.autograd.grad(x, given)[0] for x in (got, total)))


def test_the_two_parts_are_of_the_logits_and_of_the_hidden_states():
    config, generator = config_of(4), torch.Generator().manual_seed(3)
    tree = SubnetTree(grid(config))
    lesson = TreeDistillation(Distillation(2.0, 3.0, "full"), config, tree)
    states, targets = states_of(tree, generator), states_of(lesson.teachers, generator)
    given, wanted = (
        torch.randn(n, 3, 2, dtype=torch.float64, generator=generator) for n in (12, 1)
    )
    of_logits, of_states = lesson(given, wanted, states, targets)
    none = TreeDistillation(Distillation(2.0, 0.0, "full"), config, tree)
    assert torch.equal(none(given, wanted, (), ())[0], of_logits)
    # Means: over the examples, and over the tokens.
    twice = lesson(given.repeat(1, 2, 1), wanted.repeat(1, 2, 1), states, targets)
    torch.testing.assert_close(twice, (of_logits, of_states))
    worth = sum(len(s.layers) + 1 for s in tree.subnets)  # pairs, each of which counts the same
    far = [torch.zeros_like(t) for t in targets]
    ones = [torch.ones_like(s) for s in states]
    assert lesson(given, wanted, ones, far)[1].item() == pytest.approx(3.0 * worth)
