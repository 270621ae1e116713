"""One step over many sub-networks, its gradients, schedule, evaluation and checkpoints."""

from __future__ import annotations

import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet
from dynabert_fast.training import Distillation, Schedule, TrainingOptions
from dynabert_fast.training import trainer as module
from dynabert_fast.training.batches import PackingCollator
from dynabert_fast.training.trainer import checkpoints

ONE_EPOCH = {"epochs": 1.0, "max_grad_norm": 0.0}  # 0: do not clip
STILL = 1e-30  # a learning rate that leaves the weights where they are


class Gradients(TrainerCallback):
    """Copies gradients and learning rate of every optimiser step, as the optimiser sees them."""

    def __init__(self):
        self.steps, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append({name: gradient.clone() for name, gradient in found.items()})
        self.rates.append(optimizer.param_groups[0]["lr"])


def record_batches(trainer):
    """The batches that go into each training step."""
    batches, step = [], trainer.training_step

    def training_step(model, inputs, *args):
        packed = inputs["attention_mask"]
        mask = packed.unpack(packed.pack(torch.ones_like(inputs["input_ids"])))
        batches.append({name: t.clone() for name, t in {**inputs, "attention_mask": mask}.items()})
        return step(model, inputs, *args)

    trainer.training_step = training_step
    return batches


def record_calls(model):
    """(sub-network, training mode, whether it records a graph) of each forward pass."""
    calls, forward = [], model.forward

    def record(*args, subnet=None, **kwargs):
        calls.append((subnet, model.training, torch.is_grad_enabled()))
        return forward(*args, subnet=subnet, **kwargs)

    model.forward = record
    return calls


def plain_loop(student, teacher, subnets, batch, recipe):
    """Gradients of the summed losses of all sub-networks: one graph, padded, from the formulas."""
    student.zero_grad()
    student.train()
    labels = batch.pop("labels")
    real = batch["attention_mask"] == 1
    total = 0.0
    compare = F.mse_loss
    if student.config.num_labels > 1:
        compare = lambda own, aim: F.cross_entropy(own, aim.softmax(-1))  # noqa: E731
    said = {}  # by (width, kept layers)
    for subnet in sorted(subnets, key=lambda s: -len(s.layers)):
        out = student(**batch, subnet=subnet, output_hidden_states=True)
        if recipe is None:
            total = total + F.cross_entropy(out.logits, labels)
            continue
        width = (subnet.width if recipe.teacher_width == "same" else None) or 1.0
        with torch.no_grad():
            of = Subnet.from_multipliers(student.config, width)
            aim = teacher(**batch, subnet=of, output_hidden_states=True)
        total = total + recipe.logits * compare(out.logits, aim.logits)
        said[subnet.width, len(subnet.layers)] = out.logits.detach()
        for layers in range(len(subnet.layers) + 1, student.config.num_hidden_layers):
            if subnet.width and (subnet.width, layers) in said:
                total = total + recipe.assistant * compare(out.logits, said[subnet.width, layers])
                break
        if student.config.num_labels == 1:
            total = total + recipe.labels * F.mse_loss(out.logits[:, 0], labels)
        else:
            total = total + recipe.labels * F.cross_entropy(out.logits, labels)
        for k, state in enumerate(out.hidden_states):
            if k == len(subnet.layers):
                at = student.config.num_hidden_layers
            elif recipe.hidden_target == "input":
                at = subnet.layers[k]
            else:
                at = subnet.layers[k - 1] + 1 if k else 0
            total = total + recipe.hidden * F.mse_loss(state[real], aim.hidden_states[at][real])
    total.backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}, total


def assert_same_gradients(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


# Stage, recipe (None: the stage's own), kind of task, other options.
STEPS = {
    "finetune": ("finetune", None, "many", {}),
    "final": ("final", None, "binary", {}),
    "width, same width": ("width", None, "binary", {}),
    "depth, same width": ("depth", None, "many", {}),
    "depth, full width": ("depth", Distillation(0.7, 0.3, "full"), "pair", {}),
    "depth, outputs": ("depth", Distillation(0.7, 0.3, hidden_target="output"), "pair", {}),
    "depth, logits only": ("depth", Distillation(1.0, 0.0), "binary", {}),
    "depth, and labels": ("depth", Distillation(0.7, 0.3, labels=0.6), "many", {}),
    "depth, and numbers": ("depth", Distillation(1.0, 0.0, labels=0.6), "regression", {}),
    "depth, assistant": ("depth", Distillation(0.7, 0.3, assistant=0.6), "many", {}),
    "depth, assistant of numbers": (
        "depth",
        Distillation(0.7, 0.3, "full", assistant=0.6),
        "regression",
        {},
    ),
    "depth, regression": ("depth", None, "regression", {}),
    "depth, RoBERTa": ("depth", None, "binary", {"family": "roberta", "pad_token_id": 0}),
}


@pytest.mark.parametrize(("stage", "recipe", "kind", "fields"), STEPS.values(), ids=STEPS.keys())
def test_a_step_sums_the_gradients_of_a_plain_loop(make_trainer, stage, recipe, kind, fields):
    options = TrainingOptions(batch_size=6, learning_rate=STILL, **ONE_EPOCH)
    trainer = make_trainer(stage, options, recipe, kind, train=6, dtype=torch.float64, **fields)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    batches, gradients = record_batches(trainer), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    (batch,), (got,) = batches, gradients.steps
    trainer.model.load_state_dict(start)
    want, loss = plain_loop(trainer.model, trainer.teacher, trainer.subnets, batch, trainer.recipe)
    assert_same_gradients(got, want, rtol=1e-9, atol=1e-12)
    logged = next(entry for entry in trainer.state.log_history if "train_loss" in entry)
    assert logged["train_loss"] == pytest.approx(loss.item(), rel=1e-6)


# Sub-networks that one pass may hold, the schedule, which teacher.
PARTS = {
    f"{kind}, {width}, {most or 'all'} a pass": (most, Schedule(kind, 3), width)
    for kind, counts in {
        "grid": (None, 1, 3, 4, 5, 12, 100),
        "sandwich": (None, 2),
        "random": (None, 3),
    }.items()
    for width in ("same", "full")
    for most in counts
}


@pytest.mark.parametrize(("most", "schedule", "width"), PARTS.values(), ids=PARTS.keys())
def test_gradients_do_not_depend_on_how_a_step_is_cut(make_trainer, most, schedule, width):
    options = TrainingOptions(
        batch_size=6, learning_rate=STILL, schedule=schedule, subnets_per_pass=most, **ONE_EPOCH
    )
    recipe = Distillation(0.7, 0.3, width, assistant=0.6)
    trainer = make_trainer("depth", options, recipe, "many", train=6, dtype=torch.float64)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    subnets = schedule.choose(trainer.subnets, trainer.args.seed, 0)
    batches, gradients = record_batches(trainer), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    (batch,), (got,) = batches, gradients.steps
    trainer.model.load_state_dict(start)
    want, loss = plain_loop(trainer.model, trainer.teacher, subnets, batch, recipe)
    assert want.keys() == start.keys()
    assert_same_gradients(got, want, rtol=1e-9, atol=1e-12)
    logged = next(entry for entry in trainer.state.log_history if "train_loss" in entry)
    assert logged["train_loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_examples_of_another_tokenizer(make_trainer):
    """Said before training starts: on a GPU nothing else would say so."""
    with pytest.raises(InputError, match=r"token ids are in 0 to 9, got \d+; is this the check"):
        make_trainer(vocab_size=10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_16_bits_are_trained_in_32(make_trainer, dtype):
    """A step of AdamW is below their last bit."""
    trainer = make_trainer(dtype=dtype, options=TrainingOptions(max_steps=2))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p.cpu(), before[n])]
    assert len(moved) > 0.9 * len(before)


def test_a_step_is_one_pass_over_all_subnets(make_trainer):
    trainer = make_trainer(options=TrainingOptions(batch_size=6, **ONE_EPOCH), train=12)
    calls = record_calls(trainer.model)
    trainer.train()
    trained = [[str(s) for s in tree.subnets] for tree, training, graph in calls if graph]
    order = [f"w{w:.2f}-d{d:.2f}" for d in (1, 0.75, 0.5) for w in (1, 0.75, 0.5, 0.25)]
    assert trained == 2 * [order]  # two batches
    assert all(training == graph for _, training, graph in calls)  # evaluation: neither


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1] * 12), (2, [2, 1] * 4), (4, [3] * 4), (7, [6] * 2)]
)
def test_passes_hold_no_more_than_they_may(make_trainer, most, sizes):
    options = TrainingOptions(batch_size=6, subnets_per_pass=most, **ONE_EPOCH)
    trainer = make_trainer(options=options, train=6)
    calls = record_calls(trainer.model)
    trainer.train()
    passes = [tree.subnets for tree, _, graph in calls if graph]
    assert [len(subnets) for subnets in passes] == sizes
    assert sorted(map(str, chain(*passes))) == sorted(map(str, trainer.subnets))
    # The depths of a width have the most in common: they come together where they fit.
    widths = [subnet.width for subnet in chain(*passes)]
    assert widths == sorted(widths, reverse=True)


def test_the_deeper_of_a_width_come_first():
    """In passes that hold less than a width: those that come later learn from them."""
    config = SimpleNamespace(layer_heads=[4] * 4, layer_neurons=[40] * 4)
    depths = (0.25, 0.75, 1.0, 0.5)  # the first's layers are the beginning of all others'
    subnets = tuple(Subnet.from_multipliers(config, w, d) for d in depths for w in (0.5, 1.0))
    passes = [str(tree.subnets[0]) for tree in module._make_passes(subnets, 1)]
    wanted = [f"w{w:.2f}-d{d:.2f}" for w in (1.0, 0.5) for d in (1.0, 0.75, 0.5, 0.25)]
    assert passes == wanted


@pytest.mark.parametrize("most", [None, 1, 4])
def test_every_layer_is_called_once_in_a_pass(make_trainer, most):
    options = TrainingOptions(batch_size=6, subnets_per_pass=most, **ONE_EPOCH)
    trainer = make_trainer(options=options, train=12)
    found = []
    for part in (trainer.model, trainer.teacher):
        for i, layer in enumerate(part.dynabert.encoder.layer):
            layer.register_forward_pre_hook(
                lambda layer, _, i=i, part=part: (
                    found.append(("student" if part is trainer.model else "teacher", i))
                    if trainer.model.training
                    else None
                )
            )
    calls = record_calls(trainer.model), record_calls(trainer.teacher)
    trainer.train()
    for name, own in zip(("student", "teacher"), calls, strict=True):
        trees = [tree for tree, training, graph in own if graph or name == "teacher"]
        wanted = [level.layer for tree in trees for level in tree.levels]
        assert [i for who, i in found if who == name] == wanted
    assert len(calls[1]) == 2 * {None: 1, 1: 4, 4: 4}[most]


def test_each_step_draws_anew(make_trainer):
    schedule = Schedule("random", 2)
    trainer = make_trainer(
        options=TrainingOptions(batch_size=2, schedule=schedule, seed=7, **ONE_EPOCH), train=12
    )
    calls = record_calls(trainer.model)
    trainer.train()
    found = [tree.subnets for tree, _, graph in calls if graph]
    assert found == [schedule.choose(trainer.subnets, 7, step) for step in range(6)]
    assert len(set(found)) == 6


def test_accumulated_batches_train_the_same_subnets(make_trainer):
    options = TrainingOptions(
        batch_size=2, gradient_accumulation=3, schedule=Schedule("random"), **ONE_EPOCH
    )
    trainer = make_trainer(options=options, train=12)
    calls = record_calls(trainer.model)
    trainer.train()
    found = [tree.subnets for tree, _, graph in calls if graph]
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]


def test_other_collators_batches_are_packed(make_trainer):
    trainer = make_trainer(options=TrainingOptions(learning_rate=STILL), dtype=torch.float64)
    trainer.current_gradient_accumulation_steps = 1  # which `train` sets
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    packed = PackingCollator(trainer.data_collator)([trainer.train_dataset[i] for i in range(6)])
    losses, found = [], []
    for inputs in (batch, packed):
        trainer.model.zero_grad()
        losses.append(trainer.training_step(trainer.model, dict(inputs)))
        found.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    assert torch.equal(*losses)
    assert not losses[0].requires_grad
    assert_same_gradients(*found, rtol=0, atol=0)


TEACHER_PASSES = {
    "width, same": ("width", "same", [1.0, 0.75, 0.5, 0.25]),
    "width, full": ("width", "full", [1.0]),
    "depth, same": ("depth", "same", [1.0, 0.75, 0.5, 0.25]),
    "depth, full": ("depth", "full", [1.0]),
}


@pytest.mark.parametrize(("stage", "width", "wanted"), TEACHER_PASSES.values(), ids=TEACHER_PASSES)
def test_one_teacher_pass_per_batch_with_each_width_once(make_trainer, stage, width, wanted):
    options = TrainingOptions(batch_size=4, **ONE_EPOCH)
    trainer = make_trainer(stage, options, Distillation(1.0, 0.5, width), train=12)
    calls = record_calls(trainer.teacher)
    trainer.train()
    found = [[(s.width, s.depth) for s in tree.subnets] for tree, *_ in calls]
    assert found == 3 * [[(w, 1.0) for w in wanted]]
    assert not any(training or graph for _, training, graph in calls)


@pytest.mark.parametrize("most", [1, 3, 5])
def test_a_full_teacher_is_asked_once_a_step(make_trainer, most):
    options = TrainingOptions(batch_size=4, subnets_per_pass=most, **ONE_EPOCH)
    trainer = make_trainer("depth", options, Distillation(1.0, 0.5, "full"), train=12)
    calls = record_calls(trainer.teacher)
    trainer.train()
    assert len(calls) == 3


def test_the_teacher_does_not_change(make_trainer, same_weights):
    options = TrainingOptions(batch_size=4, epochs=1, learning_rate=1e-2)
    trainer = make_trainer("width", options, dropout=True)
    before = {name: t.clone() for name, t in trainer.teacher.state_dict().items()}
    student = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    trainer.train()
    same_weights(trainer.teacher.state_dict(), before)
    assert not trainer.teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher.parameters())
    assert all(not torch.equal(t, student[n]) for n, t in trainer.model.state_dict().items())


def test_dropout_is_on_in_the_student_alone(make_trainer):
    options = TrainingOptions(batch_size=6, learning_rate=STILL, **ONE_EPOCH)
    found = []
    for dropout in (False, True, True):
        trainer = make_trainer("width", options, train=6, dropout=dropout)
        assert not trainer.teacher.training
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        found.append(gradients.steps[0]["classifier.weight"])
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[1], found[2])  # the same seed


# --- accumulation, clipping, schedule, defaults ---------------------------------------------------


def run_and_record(make_trainer, options, **kwargs):
    trainer = make_trainer("width", options, dtype=torch.float64, **kwargs)
    batches, gradients = record_batches(trainer), Gradients()
    trainer.add_callback(gradients)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.model.load_state_dict(start)
    return trainer, batches, gradients


def test_accumulated_batches_are_averaged(make_trainer):
    options = TrainingOptions(
        batch_size=4, gradient_accumulation=2, learning_rate=STILL, **ONE_EPOCH
    )
    # Three batches: the second step of the epoch has one batch only, and is not halved.
    trainer, batches, gradients = run_and_record(make_trainer, options, train=12, length=5)
    assert len(batches) == 3
    one, two, three = (
        plain_loop(trainer.model, trainer.teacher, trainer.subnets, batch, trainer.recipe)[0]
        for batch in batches
    )
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    for got, want in zip(gradients.steps, (mean, three), strict=True):
        assert_same_gradients(got, want, rtol=1e-8, atol=1e-12)


def test_two_batches_of_4_are_one_of_8(make_trainer):
    # Of any lengths: each batch counts by its texts and tokens.
    settings = dict(learning_rate=STILL, **ONE_EPOCH)
    found = [
        run_and_record(make_trainer, TrainingOptions(**split, **settings), train=8)
        for split in ({"batch_size": 4, "gradient_accumulation": 2}, {"batch_size": 8})
    ]
    (two,), (one,) = (gradients.steps for *_, gradients in found)
    assert_same_gradients(two, one, rtol=1e-8, atol=1e-12)


def test_gradients_are_clipped_once_a_step_on_their_sum(make_trainer):
    split = {"batch_size": 4, "gradient_accumulation": 2, "learning_rate": STILL, "epochs": 1.0}
    *_, free = run_and_record(make_trainer, TrainingOptions(max_grad_norm=0.0, **split), train=16)
    trainer = make_trainer("width", TrainingOptions(**split), train=16, dtype=torch.float64)
    gradients, norms, clip = Gradients(), [], trainer.accelerator.clip_grad_norm_

    def record(parameters, most, **kwargs):
        norms.append((float(clip(parameters, most, **kwargs)), most))
        return torch.tensor(norms[-1][0])

    trainer.accelerator.clip_grad_norm_ = record
    trainer.add_callback(gradients)
    trainer.train()
    assert len(norms) == len(gradients.steps) == 2
    for (norm, most), clipped, whole in zip(norms, gradients.steps, free.steps, strict=True):
        assert most == 1.0 < norm
        assert norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in whole.values())))
        scaled = {name: gradient / norm for name, gradient in whole.items()}
        assert_same_gradients(clipped, scaled, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "warmup", "rising"),
    [("bert", None, 0), ("roberta", None, 6), ("bert", 0.1, 10), ("roberta", 0.0, 0)],
    ids=["BERT", "RoBERTa", "BERT, 10 %", "RoBERTa, none"],
)
def test_rate_rises_then_falls_linearly(make_trainer, family, warmup, rising):
    trainer = make_trainer(
        "finetune", TrainingOptions(warmup=warmup), family=family, pad_token_id=0
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    rates = []
    for _ in range(101):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    up = [2e-5 * k / rising for k in range(rising)]
    down = [2e-5 * (100 - k) / (100 - rising) for k in range(rising, 101)]
    assert rates == pytest.approx(up + down)


def test_the_rate_falls_in_training(make_trainer):
    trainer, gradients = (
        make_trainer("finetune", TrainingOptions(batch_size=4, epochs=2)),
        Gradients(),
    )
    trainer.add_callback(gradients)
    trainer.train()
    assert gradients.rates == pytest.approx([2e-5 * (6 - k) / 6 for k in range(6)])


def test_defaults_are_those_of_the_paper(make_trainer):
    trainer = make_trainer("finetune")
    args = trainer.args
    assert (args.per_device_train_batch_size, args.num_train_epochs) == (32, 3.0)
    assert (args.gradient_accumulation_steps, args.max_grad_norm) == (1, 1.0)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        values = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
        assert values == (2e-5, (0.9, 0.999), 1e-8, 0.0)
        assert group["fused"]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(trainer.model.parameters()))


def test_one_process_drives_one_device(make_trainer, tmp_path, caplog):
    # torch's DataParallel would split a packed batch that no longer knows where its sequences end.
    trainer = make_trainer("finetune", TrainingOptions(batch_size=4))
    args = trainer.args
    args._n_gpu = 2
    with caplog.at_level("WARNING"):
        other = type(trainer)(
            model=trainer.model,
            args=args,
            subnets=trainer.subnets,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
            data_collator=trainer.data_collator,
            metric="accuracy",
        )
    assert other.args.n_gpu == 1
    assert other.args.train_batch_size == 4
    assert "torchrun" in caplog.text


# --- data order -----------------------------------------------------------------------------------


def epochs_of(trainer):
    """The texts of each batch of the first epoch, and of the second."""
    batches = record_batches(trainer)
    trainer.train()
    texts = [
        [
            tuple(ids[mask == 1].tolist())
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        ]
        for b in batches
    ]
    half = len(texts) // 2
    return texts[:half], texts[half:]


def test_every_epoch_has_an_order_of_its_own(make_trainer):
    options = TrainingOptions(batch_size=4, epochs=2, seed=3)
    first, second = epochs_of(make_trainer("finetune", options, train=16))
    again, _ = epochs_of(make_trainer("finetune", options, train=16))
    other, _ = epochs_of(
        make_trainer("finetune", TrainingOptions(batch_size=4, epochs=2), train=16)
    )
    assert first == again
    assert first != other
    assert first != second
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second))


def test_texts_of_like_length_come_together(make_trainer):
    trainer = make_trainer("finetune", TrainingOptions(batch_size=4, epochs=2, seed=3), train=48)
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in epochs_of(trainer)[0]]
    lengths = trainer.train_dataset.lengths
    assert len(set(lengths)) >= 6
    assert sum(spread) <= max(lengths) - min(lengths), "batches cut from a sorted list"


# --- evaluation and the best checkpoint -----------------------------------------------------------


def test_evaluate_scores_every_subnet(make_trainer):
    trainer = make_trainer("depth", TrainingOptions(eval_batch_size=4))
    trainer.model.train()
    metrics = trainer.evaluate()
    assert trainer.model.training
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(6)])
    labels = batch.pop("labels")
    trainer.model.eval()
    want = {}
    for subnet in trainer.subnets:
        right = trainer.model(**batch, subnet=subnet).logits.argmax(-1) == labels
        want[f"eval_{subnet}_accuracy"] = right.float().mean().item()
    assert len(want) == 12
    assert metrics == pytest.approx({**want, "eval_grid_sum": sum(want.values())})
    assert trainer.state.log_history[-1]["eval_grid_sum"] == metrics["eval_grid_sum"]


def test_evaluate_takes_other_subnets_and_data(make_trainer, make_data):
    trainer = make_trainer("depth")
    chosen = Subnet.from_extents(trainer.model.config, (1,), (2,), (5,))
    trainer.eval_subnets = (chosen,)
    other = make_data("binary", train=1, dev=50, seed=9).dev
    metrics = trainer.evaluate(other, metric_key_prefix="test")
    assert metrics.keys() == {"test_l1-h2-n5_accuracy", "test_grid_sum"}
    assert metrics["test_grid_sum"] * 50 == pytest.approx(round(metrics["test_grid_sum"] * 50))


def test_the_sum_takes_the_primary_metric(make_trainer):
    trainer = make_trainer("depth", kind="regression")
    metrics = trainer.evaluate()
    primary = [value for name, value in metrics.items() if name.endswith("_spearman")]
    assert len(primary) == 12
    assert len(metrics) == 25
    assert metrics["eval_grid_sum"] == pytest.approx(sum(primary))


class Folders(TrainerCallback):
    """The checkpoints that are there after each save, and the weights at that time."""

    def __init__(self, run):
        self.run, self.steps, self.weights = run, [], []

    def on_save(self, args, state, control, model=None, **kwargs):
        self.steps.append([step for step, _ in checkpoints(self.run)])
        self.weights.append({name: t.clone() for name, t in model.state_dict().items()})


def fake_scores(monkeypatch, totals):
    """Give these totals, one after another; each sub-network has its share."""
    left = list(totals)

    def score_grid(model, batches, subnets, metric, *, progress):
        total = left.pop(0)
        return {str(s): {"accuracy": total / len(subnets), "f1": 9.0} for s in subnets}

    monkeypatch.setattr(module, "score_grid", score_grid)


# Totals after each epoch of two steps; the best epoch; the checkpoints after each save.
BEST = {
    "first": ([3, 1, 2], 0, [[2], [2, 4], [2, 4, 6]]),
    "middle": ([1, 3, 2], 1, [[2], [2, 4], [4, 6]]),
    "last": ([1, 2, 3], 2, [[2], [2, 4], [4, 6]]),
    "a tie goes to the first": ([1, 2, 2], 1, [[2], [2, 4], [4, 6]]),
    "below zero": ([-3, -1, -2], 1, [[2], [2, 4], [4, 6]]),
}


@pytest.mark.parametrize(("totals", "best", "kept"), BEST.values(), ids=BEST.keys())
def test_the_best_checkpoint_is_loaded_at_the_end(
    make_trainer, monkeypatch, tmp_path, same_weights, totals, best, kept
):
    options = TrainingOptions(batch_size=6, epochs=3, learning_rate=1e-2)
    trainer = make_trainer("finetune", options, dropout=True)
    folders = Folders(tmp_path / "run")
    trainer.add_callback(folders)
    fake_scores(monkeypatch, totals)
    trainer.train()
    assert folders.steps == kept
    same_weights(trainer.model.state_dict(), folders.weights[best])
    assert trainer.state.best_metric == pytest.approx(totals[best])


def test_checkpoints_between_epochs(make_trainer, monkeypatch, tmp_path):
    options = TrainingOptions(batch_size=2, epochs=2, save_every=2)
    trainer = make_trainer("finetune", options, train=12)  # 6 steps an epoch
    folders = Folders(tmp_path / "run")
    trainer.add_callback(folders)
    fake_scores(monkeypatch, [2, 1])
    trainer.train()
    # Steps 6 and 12 are saved once, after the evaluation: 6 is the best, and stays.
    assert folders.steps == [[2], [2, 4], [4, 6], [6, 8], [6, 8, 10], [6, 10, 12]]


def test_a_checkpoint_is_complete(make_trainer, tmp_path):
    make_trainer("width", TrainingOptions(batch_size=6, epochs=1)).train()
    ((_, folder),) = checkpoints(tmp_path / "run")
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "tokenizer.json",
        "trainer_state.json",
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == [folder.name]


# --- mixed precision ------------------------------------------------------------------------------


def test_bf16_autocast_trains_float32_weights(make_trainer):
    options = TrainingOptions(batch_size=6, epochs=1, learning_rate=1e-3, precision="bf16")
    trainer = make_trainer("width", options, dropout=True)
    gradients, dtypes = Gradients(), set()
    trainer.add_callback(gradients)
    trainer.teacher.register_forward_hook(lambda *call: dtypes.add(call[-1].logits.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert len(gradients.steps) == 2
    for step in gradients.steps:
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in step.values())


def test_bf16_gradients_are_near_those_of_fp32(make_trainer):
    found = []
    for precision in ("fp32", "bf16"):
        options = TrainingOptions(batch_size=6, precision=precision, **ONE_EPOCH)
        trainer, gradients = make_trainer("depth", options, train=6), Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        found.append(torch.cat([g.flatten() for g in gradients.steps[0].values()]))
    assert not torch.equal(*found)
    assert F.cosine_similarity(*found, dim=0) > 0.95
