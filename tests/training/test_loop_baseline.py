"""The plain loop that benchmarks compare with computes what the trainer computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dynabert_fast.models.conversion import to_huggingface
from dynabert_fast.subnet import grid
from dynabert_fast.training import Distillation, TrainingOptions

FILE = Path(__file__).parents[2] / "benchmarks" / "baselines" / "dynabert_loop.py"
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64


@pytest.fixture(scope="module")
def loop():
    spec = importlib.util.spec_from_file_location("dynabert_loop", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sdpa", [False, True], ids=["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_every_subnet_has_the_same_logits(loop, make_model, make_batch, sdpa, padding):
    model, batch = make_model(dtype=torch.float64), make_batch(padding=padding)
    plain = loop.LoopBert.of(model, sdpa).eval()
    real = batch["attention_mask"] == 1
    with torch.no_grad():
        for subnet in grid(model.config):
            want = model(**batch, subnet=subnet, output_hidden_states=True)
            logits, hidden = plain(batch, subnet)
            torch.testing.assert_close(logits, want.logits, **CLOSE)
            for got, state in zip(hidden, want.hidden_states, strict=True):
                torch.testing.assert_close(got[real], state[real], **CLOSE)


def a_batch(trainer):
    count = len(trainer.train_dataset)
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


STEPS = {
    "paper": (Distillation(1.0, 1.0, "same"), {}, "many"),
    "released": (Distillation(1.0, 1.0, "full"), {}, "many"),
    "one teacher pass": (Distillation(0.7, 0.3, "full"), {"once": True}, "many"),
    "regression": (Distillation(1.0, 1.0, "same"), {}, "regression"),
}


@pytest.mark.parametrize(("recipe", "more", "kind"), STEPS.values(), ids=STEPS)
def test_a_step_has_the_trainers_gradients(loop, make_trainer, recipe, more, kind):
    options = TrainingOptions(batch_size=6)
    # Of one length: the loop's squared errors count padding.
    trainer = make_trainer("depth", options, recipe, kind, train=6, length=5, dtype=torch.float64)
    config, batch = trainer.model.config, a_batch(trainer)
    assert batch["attention_mask"].all()
    plain = loop.DistillationLoop(
        loop.LoopBert.of(trainer.model),
        loop.LoopBert.of(trainer.teacher),
        grid(config),
        recipe.logits,
        recipe.hidden,
        recipe.teacher_width,
        **more,
    )
    loss = plain.gradients(batch)
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    want_loss = trainer.training_step(trainer.model, dict(batch))
    torch.testing.assert_close(loss.double(), want_loss.double(), rtol=1e-6, atol=0.0)
    want = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    want = to_huggingface(want, config)
    got = {n: p.grad for n, p in plain.student.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_moves_the_student_alone(loop, make_trainer):
    trainer = make_trainer("depth", TrainingOptions(batch_size=6), train=6, dropout=True)
    student, teacher = loop.LoopBert.of(trainer.model), loop.LoopBert.of(trainer.teacher)
    before = [p.clone() for p in (*student.parameters(), *teacher.parameters())]
    loop.DistillationLoop(student, teacher, grid(student.config)).step(a_batch(trainer))
    after = [*student.parameters(), *teacher.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    count = len(list(student.parameters()))
    assert all(moved[:count])
    assert not any(moved[count:])
