"""Every stage from folder to folder, on every kind of task; what is refused and printed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynabert_fast.data import EncodedDataset, Examples
from dynabert_fast.errors import InputError, SaveError, TrainingError
from dynabert_fast.files import write_manifest
from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.subnet import DEPTHS, WIDTHS, Subnet
from dynabert_fast.training import (
    Distillation,
    ElasticTrainer,
    Recipe,
    Schedule,
    Stage,
    TrainingOptions,
    check_teacher,
    run_stage,
    stages,
)

OPTIONS = TrainingOptions(batch_size=6, epochs=1, learning_rate=1e-3)
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def go(name, model, data, output, teacher=None, options=OPTIONS, **kwargs):
    run_stage(stages()[name], model, data, output, options, teacher, progress=False, **kwargs)


def names(folder):
    return {path.name for path in folder.iterdir()}


# --- what a stage is ------------------------------------------------------------------------------

TABLE = {
    "finetune": Stage("finetune", (1.0,), (1.0,), None),
    # The fine-tuned teacher is good at its full width only.
    "width": Stage("width", WIDTHS, (1.0,), Distillation(1.0, 0.1, "full")),
    "depth": Stage("depth", WIDTHS, DEPTHS, Distillation(1.0, 1.0, "same")),
    "final": Stage("final", WIDTHS, DEPTHS, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_stages_are_those_of_the_paper(name):
    assert list(stages()) == list(TABLE)
    assert stages()[name] == TABLE[name]


def test_a_recipe_changes_the_loss_of_depths_alone():
    changed = Distillation(hidden_target="output", labels=0.5, assistant=0.25)
    recipe = Recipe(hidden_target="output", labels=0.5, assistant=0.25)
    assert stages(recipe=recipe) == {**TABLE, "depth": Stage("depth", WIDTHS, DEPTHS, changed)}


SUBNETS = {
    "finetune": "1.00-1.00",
    "width": "1.00-1.00 0.75-1.00 0.50-1.00 0.25-1.00",
    "depth": (
        "1.00-1.00 0.75-1.00 0.50-1.00 0.25-1.00 "
        "1.00-0.75 0.75-0.75 0.50-0.75 0.25-0.75 "
        "1.00-0.50 0.75-0.50 0.50-0.50 0.25-0.50"
    ),
}
SUBNETS["final"] = SUBNETS["depth"]


@pytest.mark.parametrize("name", SUBNETS)
def test_subnets_of_a_stage(make_student, name):
    found = stages()[name].subnets(make_student())
    assert [str(s) for s in found] == [f"w{s.replace('-', '-d')}" for s in SUBNETS[name].split()]


@pytest.mark.parametrize(
    ("depths", "schedule"),
    [
        ((1.0, 0.5), Schedule()),
        ((0.5, 0.5), Schedule()),
        ((1.0, 0.75, 0.7, 1.0), Schedule()),  # as many layers
        ((1.0, 0.75, 0.5), Schedule("random")),
        ((1.0, 0.75, 0.5), Schedule("sandwich", 0)),
    ],
)
def test_assistants_that_nobody_has(make_student, depths, schedule):
    config = make_student().config
    stage = stages(depths=depths, recipe=Recipe(assistant=1.0))["depth"]
    with pytest.raises(InputError, match="no sub-network has an assistant"):
        stage.check(config, schedule)
    stages(depths=depths)["depth"].check(config, schedule)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("sandwich", 1)])
def test_assistants_of_the_papers_grid(make_student, schedule):
    stages(recipe=Recipe(assistant=1.0))["depth"].check(make_student().config, schedule)


def test_other_grids():
    found = stages((0.5, 1.0), (1.0,))
    assert found["width"].recipe == TABLE["width"].recipe
    assert found["depth"] == Stage("depth", (0.5, 1.0), (1.0,), TABLE["depth"].recipe)
    assert found["final"] == Stage("final", (0.5, 1.0), (1.0,), None)
    assert found["finetune"] == TABLE["finetune"]


BAD_OPTIONS = {
    "learning rate": ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
    "no number": ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got"),
    "batch": ({"batch_size": 0}, "batch_size must be above 0, got 0"),
    "epochs": ({"epochs": -1.0}, "epochs must be above 0, got -1.0"),
    "accumulation": ({"gradient_accumulation": 0}, "gradient_accumulation must be above 0"),
    "evaluation batch": ({"eval_batch_size": 0}, "eval_batch_size must be above 0"),
    "warm-up": ({"warmup": 1.0}, r"a share of the steps in \[0, 1\), got 1.0"),
    "precision": ({"precision": "int8"}, "precision must be fp32, bf16 or fp16, got 'int8'"),
    "part of a batch": ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
    "no steps": ({"max_steps": 0}, "max_steps must be above 0, or -1 for epochs, got 0"),
    "seed": ({"seed": -1}, "seed must be in 0 to 4294967295, got -1"),
    "saving": ({"save_every": -1}, "save_every must be at least 0, got -1"),
    "decay": ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    "clipping": ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0, got -1.0"),
    "schedule": ({"schedule": "sandwich"}, "schedule must be a Schedule, got 'sandwich'"),
    "half a step": ({"max_steps": 1.5}, "max_steps must be a whole number, got 1.5"),
    "a word": ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
    "part of a token": ({"tokens_per_step": 100.5}, "tokens_per_step must be a whole number"),
    "no tokens": ({"tokens_per_step": 0}, "tokens_per_step must be above 0, got 0"),
    "no sub-networks": ({"subnets_per_pass": 0}, "subnets_per_pass must be above 0, got 0"),
    "no end": ({"learning_rate": float("inf")}, "learning_rate must be a finite number, got inf"),
}


def test_whole_numbers_of_numpy_are_pythons():
    options = TrainingOptions(batch_size=np.int64(8), subnets_per_pass=np.int32(4))
    assert options == TrainingOptions(batch_size=8, subnets_per_pass=4)
    assert json.dumps(options.batch_size) == "8"


@pytest.mark.parametrize(("values", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        TrainingOptions(**values)


# --- from folder to folder ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "many", "pair", "regression"])
def test_every_stage_runs(make_data, make_student, make_task, tmp_path, kind):
    """Fine-tuned, widths, depths, final: each from the folder that the one before made."""
    data, load = make_data(kind), DynaBertForSequenceClassification.from_pretrained
    outputs = make_task(kind).num_labels
    fresh = make_student(kind)
    before = {name: t.clone() for name, t in fresh.state_dict().items()}
    teacher = None
    for name, stage in stages((1.0, 0.5), (1.0, 0.5)).items():
        model = fresh if teacher is None else load(tmp_path / teacher)
        taught_by = load(tmp_path / teacher) if teacher else None
        run_stage(stage, model, data, tmp_path / name, OPTIONS, taught_by, progress=False)
        assert names(tmp_path / name) >= FILES
        made = load(tmp_path / name)
        after = made.state_dict()
        assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
        before, teacher = after, name
        batch = data.collator([data.dev[i] for i in range(3)])
        for subnet in stages()["depth"].subnets(made):
            logits = made(**batch, subnet=subnet).logits
            assert logits.shape == (3, outputs)
            assert logits.isfinite().all()
    assert names(tmp_path) == set(stages())  # no checkpoints, nothing hidden


def test_the_folder_holds_what_the_model_ends_with(make_data, make_student, tmp_path, same_weights):
    model = make_student()
    go("width", model, make_data(), tmp_path / "out", make_student(seed=1))
    made = DynaBertForSequenceClassification.from_pretrained(tmp_path / "out")
    same_weights(made.state_dict(), model.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_is_usable_afterwards(make_data, make_student, tmp_path, precision):
    model, data = make_student(), make_data()
    options = TrainingOptions(batch_size=6, epochs=1, precision=precision)
    go("finetune", model, data, tmp_path / "out", options=options)
    model.eval()
    batch = data.collator([data.dev[0]])
    small = Subnet.from_multipliers(model.config, 0.25, 0.5)
    assert torch.equal(model.at(small)(**batch).logits, model(**batch, subnet=small).logits)
    made = DynaBertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(made(**batch).logits, model(**batch).logits)


# --- refused and resumed --------------------------------------------------------------------------


def test_a_stage_that_distils_needs_a_teacher(make_data, make_student, tmp_path):
    with pytest.raises(InputError, match="stage width distils: give the teacher's checkpoint"):
        go("width", make_student(), make_data(), tmp_path / "out")
    assert names(tmp_path) == set()


# What the teacher has that the student has not.
MISFITS = {
    "hidden size": ({"hidden_size": 32}, "teacher's hidden_size is 32, the student's is 24"),
    "layers": ({"num_hidden_layers": 6}, "teacher's num_hidden_layers is 6, the student's is 4"),
    "labels": ({"id2label": {0: "a", 1: "b"}}, r"teacher's labels are \['a', 'b'\]"),
}


@pytest.mark.parametrize(("fields", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_a_teacher_that_does_not_fit_is_refused(make_data, make_student, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        go("depth", make_student(), make_data(), tmp_path / "out", make_student(seed=1, **fields))
    assert names(tmp_path) == set()


READ = ("model", "teacher")
READERS = {
    "positions": ({"max_position_embeddings": 4}, "reads at most 4 tokens, an example has"),
    "types": ({"type_vocab_size": 1}, "knows 1 types of token, the examples have 2"),
}


@pytest.mark.parametrize(("fields", "message"), READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("who", READ)
def test_who_cannot_read_the_examples_is_refused(
    make_data, make_student, tmp_path, who, fields, message
):
    """Before the first step, not in the batch that has the long one."""
    models = {name: make_student("pair", **(fields if name == who else {})) for name in READ}
    with pytest.raises(InputError, match=f"the {who} {message}"):
        go("width", models["model"], make_data("pair"), tmp_path / "out", models["teacher"])
    assert names(tmp_path) == set()


@pytest.mark.parametrize("part", ["train", "dev"])
def test_no_examples_are_refused(make_data, make_student, make_task, tokenizer, tmp_path, part):
    none = EncodedDataset(Examples([], None, []), tokenizer)
    with pytest.raises(InputError, match=r"there are no (training|development) examples"):
        go("final", make_student(), replace(make_data(), **{part: none}), tmp_path / "out")
    assert names(tmp_path) == set()


def test_fp16_is_refused_where_it_would_be_fp32(make_data, make_student, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = replace(OPTIONS, precision="fp16")
    with pytest.raises(InputError, match=r"fp16 trains on GPUs only, .* choose bf16 or fp32"):
        go("final", make_student(), make_data(), tmp_path / "out", options=options)
    assert names(tmp_path) == set()


def test_a_larger_teacher_of_logits_alone(make_data, make_student, tmp_path):
    stage = replace(stages()["depth"], recipe=Distillation(1.0, 0.0))
    teacher = make_student(seed=1, hidden_size=32, num_hidden_layers=6)
    run_stage(
        stage, make_student(), make_data(), tmp_path / "out", OPTIONS, teacher, progress=False
    )
    assert names(tmp_path) == {"out"}


def test_an_output_that_is_there_is_refused(make_data, make_student, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, message in (("out", "out is not empty"), ("file", "file is a file")):
        for resume in (False, True):
            with pytest.raises(InputError, match=message):
                go("finetune", make_student(), make_data(), tmp_path / name, resume=resume)
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


@pytest.fixture
def interrupted(make_data, make_student, tmp_path, monkeypatch):
    """The output of a stage that stopped in its fourth step of six, with a checkpoint at step 3."""
    step = ElasticTrainer.training_step

    def stops(self, *args):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ElasticTrainer, "training_step", stops)
        options = TrainingOptions(batch_size=4, epochs=2)
        with pytest.raises(KeyboardInterrupt):
            go("finetune", make_student(), make_data(), tmp_path / "out", options=options)
    return tmp_path / "out"


def steps_of(monkeypatch):
    """The numbers of the steps that any trainer takes from here on."""
    taken, step = [], ElasticTrainer.training_step

    def counts(self, *args):
        taken.append(self.state.global_step + 1)
        return step(self, *args)

    monkeypatch.setattr(ElasticTrainer, "training_step", counts)
    return taken


def test_an_interrupted_run_needs_resume(interrupted, make_data, make_student, monkeypatch):
    assert not interrupted.exists()
    assert names(interrupted.parent) == {"out.checkpoints"}
    options, taken = TrainingOptions(batch_size=4, epochs=2), steps_of(monkeypatch)
    arguments = ("finetune", make_student(), make_data(), interrupted)
    with pytest.raises(
        InputError, match=r"out\.checkpoints holds an interrupted run; add --resume"
    ):
        go(*arguments, options=options)
    assert taken == []
    go(*arguments, options=options, resume=True)
    assert taken == [4, 5, 6]
    assert names(interrupted.parent) == {"out"}


@pytest.mark.parametrize(("name", "value"), [("backbone", "roberta"), ("vocab_size", 40)])
def test_a_teacher_that_reads_other_tokens_is_refused(make_student, name, value):
    student, teacher = make_student().config, make_student().config
    check_teacher(Distillation(), student, teacher)
    setattr(teacher, name, value)
    with pytest.raises(InputError, match=f"the teacher's {name} is {value}, the student's is "):
        check_teacher(Distillation(hidden=0.0), student, teacher)


# What is other than in the run that is resumed.
OTHERS = {
    "batches": ({"batch_size": 2}, "training.batch_size 4, not 2"),
    "rate": ({"learning_rate": 1e-3}, "training.learning_rate 2e-05, not 0.001"),
    "epochs": ({"epochs": 3}, "training.epochs 2, not 3"),
}


@pytest.mark.parametrize(("changed", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_other_settings_are_refused(
    interrupted, make_data, make_student, monkeypatch, changed, message
):
    options, taken = (
        TrainingOptions(**{"batch_size": 4, "epochs": 2} | changed),
        steps_of(monkeypatch),
    )
    with pytest.raises(InputError, match=rf"out\.checkpoints was started with {message}; resume"):
        go("finetune", make_student(), make_data(), interrupted, options=options, resume=True)
    assert taken == []


def test_another_stage_and_other_data_are_refused(interrupted, make_data, make_student):
    options = TrainingOptions(batch_size=4, epochs=2)
    again = {"options": options, "resume": True}
    with pytest.raises(InputError, match=r"was started with stage\.depths \[1\.0\], not"):
        go("final", make_student(), make_data(), interrupted, **again)
    with pytest.raises(InputError, match="was started with train_examples 12, not 11"):
        go("finetune", make_student(), make_data(train=11), interrupted, **again)
    other = make_data()
    other.train.labels[0] = 1 - other.train.labels[0]
    with pytest.raises(InputError, match=r"was started with data \["):
        go("finetune", make_student(), other, interrupted, **again)


def test_another_teacher_is_refused(make_data, make_student, tmp_path, monkeypatch):
    def go_on(teacher, **more):
        go("width", make_student(), make_data(), tmp_path / "out", teacher=teacher, **more)

    step = ElasticTrainer.training_step

    def stops(self, *args):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    options = TrainingOptions(batch_size=4, epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(ElasticTrainer, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            go_on(make_student(seed=1), options=options)
    with pytest.raises(InputError, match="was started with teacher"):
        go_on(make_student(seed=2), options=options, resume=True)
    go_on(make_student(seed=1), options=options, resume=True)


def test_another_student_and_other_processes_are_refused(
    interrupted, make_data, make_student, monkeypatch
):
    again = {"options": TrainingOptions(batch_size=4, epochs=2), "resume": True}
    with pytest.raises(InputError, match="was started with student"):
        go("finetune", make_student(seed=5), make_data(), interrupted, **again)
    with pytest.raises(InputError, match="was started with student"):
        go("finetune", make_student(hidden_size=16), make_data(), interrupted, **again)
    with monkeypatch.context() as patch:
        module = sys.modules[Stage.__module__]
        patch.setattr(module, "PartialState", lambda **_: SimpleNamespace(num_processes=2))
        with pytest.raises(InputError, match="was started with processes 1, not 2"):
            go("finetune", make_student(), make_data(), interrupted, **again)
    record = interrupted.with_name("out.checkpoints") / "settings.json"
    settings = json.loads(record.read_text())
    del settings["student"], settings["processes"]  # an older version's
    record.write_text(json.dumps(settings))
    go("finetune", make_student(), make_data(), interrupted, **again)


def test_a_best_checkpoint_that_is_gone_is_damage(interrupted, make_data, make_student):
    run = interrupted.with_name("out.checkpoints")
    (last,) = run.glob("checkpoint-*")
    state = json.loads((last / "trainer_state.json").read_text())
    state["best_global_step"] = 2
    (last / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(last)
    options = TrainingOptions(batch_size=4, epochs=2)
    with pytest.raises(InputError, match="its best checkpoint checkpoint-2 is: missing"):
        go("finetune", make_student(), make_data(), interrupted, options=options, resume=True)


def test_weights_that_are_spoilt_in_the_last_step(make_data, make_student, tmp_path, monkeypatch):
    step = ElasticTrainer.training_step

    def spoils(self, *args):
        loss = step(self, *args)
        if self.state.global_step == 2:
            with torch.no_grad():
                self.model.classifier.bias.fill_(torch.inf)
        return loss

    monkeypatch.setattr(ElasticTrainer, "training_step", spoils)
    options = TrainingOptions(batch_size=4, epochs=1)
    with pytest.raises(TrainingError, match="weights are not finite after step 3"):
        go("finetune", make_student(), make_data(), tmp_path / "out", options=options)


def test_a_record_without_a_newer_option_had_its_default(interrupted, make_data, make_student):
    record = interrupted.with_name("out.checkpoints") / "settings.json"
    settings = json.loads(record.read_text())
    del settings["training"]["max_grad_norm"]
    record.write_text(json.dumps(settings))
    options = TrainingOptions(batch_size=4, epochs=2)
    arguments = ("finetune", make_student(), make_data(), interrupted)
    with pytest.raises(InputError, match=r"with training\.max_grad_norm 1\.0, not 2\.0"):
        go(*arguments, options=replace(options, max_grad_norm=2.0), resume=True)
    go(*arguments, options=options, resume=True)
    assert names(interrupted.parent) == {"out"}


def test_a_run_without_checkpoints_leaves_no_settings(
    make_data, make_student, tmp_path, monkeypatch
):
    def stops(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ElasticTrainer, "training_step", stops)
    with pytest.raises(KeyboardInterrupt):
        go("finetune", make_student(), make_data(), tmp_path / "out")
    assert names(tmp_path) == set()


def test_deleting_the_checkpoints_starts_over(interrupted, make_data, make_student, monkeypatch):
    shutil.rmtree(f"{interrupted}.checkpoints")
    options, taken = TrainingOptions(batch_size=4, epochs=2), steps_of(monkeypatch)
    go("finetune", make_student(), make_data(), interrupted, options=options, resume=True)
    assert taken == [1, 2, 3, 4, 5, 6]


def test_resuming_what_is_done_does_nothing(make_data, make_student, tmp_path, monkeypatch):
    go("finetune", make_student(), make_data(), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    # As where a process was killed while it deleted them.
    leftover = tmp_path / "out.checkpoints" / "checkpoint-2"
    leftover.mkdir(parents=True)
    taken = steps_of(monkeypatch)
    go("finetune", make_student(seed=5), make_data(), tmp_path / "out", resume=True)
    assert taken == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert names(tmp_path) == {"out"}


def test_a_full_disk_ends_a_run_that_can_go_on(make_data, make_student, tmp_path, monkeypatch):
    """The second checkpoint is refused: one clear error, the first one is whole, and is resumed."""
    options = TrainingOptions(batch_size=4, epochs=2, learning_rate=1e-3)
    go("finetune", make_student(), make_data(), tmp_path / "whole", options=options)
    save, saved = torch.save, []

    def refuse(value, path, *args, **kwargs):
        saved.append(path)
        if "checkpoint-6" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 0 vs 64")
        return save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", refuse)
        with pytest.raises(SaveError, match=r"checkpoint-6.*what was saved before is intact"):
            go("finetune", make_student(), make_data(), tmp_path / "out", options=options)
    assert names(tmp_path / "out.checkpoints") == {"checkpoint-3", "settings.json"}
    taken = steps_of(monkeypatch)
    go("finetune", make_student(), make_data(), tmp_path / "out", options=options, resume=True)
    assert taken == [4, 5, 6]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [False, True], ids=["lines", "bars"])
def test_one_line_a_report(make_data, make_student, tmp_path, capsys, progress):
    options = TrainingOptions(batch_size=1, epochs=1, learning_rate=1e-3)
    run_stage(
        stages()["finetune"], make_student(num_hidden_layers=1), make_data("binary", 60),
        tmp_path / "out", options, progress=progress,
    )  # fmt: skip
    out, err = capsys.readouterr()
    # `write` of a bar clears its line first.
    lines = [line for line in re.split(r"[\r\n]+", out) if line.strip()]
    assert [re.sub(r"0\.\d{4}|\b\d+\.\d\d(?= GB|,|\))", "#", line) for line in lines] == [
        "finetune: one network a step, batches of at most 11 tokens: about # GB "
        "(weights and optimiser #, activations #)",
        "finetune: step 50/60, loss #, rate 1.83e-04",
        "finetune: step 60/60, accuracy #",
    ]
    assert ("60/60" in err) == progress


def test_the_grid_in_one_line(make_data, make_student, tmp_path, capsys):
    go("depth", make_student(), make_data(), tmp_path / "out", make_student(seed=1))
    first, line = capsys.readouterr().out.splitlines()
    assert first.startswith("depth: 12 sub-networks a step, batches of at most ")
    assert "the teacher's hidden states" in first
    shape = r"depth: step 2/2, accuracy: w1\.00-d1\.00 # to w0\.25-d0\.50 #, mean of 12 #"
    assert re.fullmatch(shape.replace("#", r"[01]\.\d{4}"), line)
