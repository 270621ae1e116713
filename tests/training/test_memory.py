"""What a step is said to take, against what autograd keeps; freed memory that is used again."""

from __future__ import annotations

import ctypes
import platform
import resource

import pytest
import torch

from dynabert_fast.subnet import grid
from dynabert_fast.training import Distillation, Schedule, TrainingOptions, TreeDistillation
from dynabert_fast.training import trainer as trainer_module
from dynabert_fast.training.memory import reused_memory, step_memory
from dynabert_fast.tree import SubnetTree

SIZES = {
    "hidden_size": 96,
    "num_attention_heads": 12,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
}


def kept_bytes(model, teacher, ids, tree, lesson, hidden, half):
    """Of the distinct buffers that a forward pass keeps, without parameters or casts of them."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {
        p.flatten(0, -2).shape for p in model.parameters() if p.dim() > 2
    }
    found = {}
    alive = []

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and x.shape not in shapes:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    arguments = {"output_hidden_states": hidden, "unpack": False}
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        with torch.no_grad():
            taught = teacher(ids, subnet=lesson.teachers, **arguments)
        targets = taught.hidden_states or ()
        theirs = {h.untyped_storage().data_ptr(): h.untyped_storage().nbytes() for h in targets}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = model(ids, subnet=tree, **arguments)
            lesson(output.logits, taught.logits, output.hidden_states or (), targets)
    return sum(n for at, n in found.items() if at not in theirs), sum(theirs.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("hidden", [0.0, 1.0])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("subnets", [slice(None), slice(0, 4), slice(3, 4)])
def test_activations_are_what_autograd_keeps(make_student, subnets, half, hidden, checkpointing):
    student, teacher = (make_student("many", seed=i, **SIZES) for i in (0, 1))
    student.train()
    if checkpointing:
        student.gradient_checkpointing_enable()
    tree = SubnetTree(grid(student.config)[subnets])
    lesson = TreeDistillation(Distillation(hidden=hidden), teacher.config, tree)
    ids = torch.randint(5, 40, (16, 20))
    kept, theirs = kept_bytes(student, teacher.eval(), ids, tree, lesson, hidden > 0, half)
    memory = step_memory(
        student.config,
        student.num_parameters(),
        teacher.num_parameters(),
        (tree,),
        (lesson.teachers,),
        ids.numel(),
        half,
        hidden > 0,
        checkpointing,
    )
    if checkpointing:  # and one layer as it is computed again
        assert kept < memory.activations < 0.5 * memory.activations + 8 * kept
    else:
        assert memory.activations == pytest.approx(kept, rel=0.1)
    assert memory.teacher == pytest.approx(theirs, rel=0.15)


def test_fewer_in_a_pass_and_checkpointing_take_less(make_trainer):
    def memory(**options):
        found, tokens = make_trainer(options=TrainingOptions(batch_size=4, **options)).step_memory()
        assert 4 * 4 <= tokens <= 4 * 11  # two to nine words, and two marks
        return found

    whole = memory()
    assert memory(subnets_per_pass=4).activations < 0.6 * whole.activations
    assert memory(checkpointing=True).activations < 0.6 * whole.activations
    assert memory(precision="bf16").activations < 0.8 * whole.activations
    assert whole.total > whole.weights + whole.activations
    assert memory(precision="bf16").weights == whole.weights


def test_the_largest_batch_of_a_budget_of_tokens(make_trainer):
    def largest(train=24, **options):
        trainer = make_trainer(options=TrainingOptions(tokens_per_step=40, **options), train=train)
        sampler, found = trainer._sampler, []
        for epoch in range(20):
            sampler.set_epoch(epoch)
            found += [sum(sampler.lengths[i] for i in batch) for batch in sampler]
        return max(found), trainer.step_memory()[1], int(sampler.lengths.max())

    most, said, _ = largest()
    assert 30 < most <= said == 40
    most, said, longest = largest(gradient_accumulation=3)
    assert most <= said <= 40 // 3 + longest
    most, said, _ = largest(train=2)
    assert most == said < 40


def test_the_memory_is_that_of_the_largest_draw(make_trainer, monkeypatch):
    def total(draws, **schedule):
        monkeypatch.setattr(trainer_module, "_DRAWS", draws)
        options = TrainingOptions(batch_size=4, schedule=Schedule(**schedule), seed=3)
        return make_trainer(options=options).step_memory()[0].total

    sandwich = {"kind": "sandwich", "count": 1}
    each = [total(draws, **sandwich) for draws in range(1, 10)]
    assert each == sorted(each)
    assert each[0] < each[-1] <= total(100, **sandwich) < total(100, kind="grid")


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_is_used_again():
    size = 64 << 20
    pages = size // 4096

    def touch() -> int:
        before = faults()
        torch.empty(size, dtype=torch.uint8).fill_(1)
        return faults() - before

    with reused_memory():
        for _ in range(8):  # what is cut off for alignment settles
            touch()
        inside = min(touch() for _ in range(4))
    assert inside < pages / 1000
    assert touch() > pages / 2  # the system has it back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_buffers_of_a_forward_pass_are_kept_afterwards():
    """A latency that is measured after a training is that of a process which did not train."""

    def touch() -> int:
        before = faults()
        _ = [torch.empty(3 << 19, dtype=torch.uint8).fill_(1) for _ in range(3)]
        return faults() - before

    with reused_memory():
        touch()
    assert min(touch() for _ in range(4)) < 3 * (3 << 19) / 4096 / 10


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("not ours to change"))
    with reused_memory():
        pass
