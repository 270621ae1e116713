"""`fit`: all stages in one folder, with other options, resumed, and killed on the way."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import dynabert_fast.training.pipeline as module
from dynabert_fast.data import load_files
from dynabert_fast.data.augmentation import Augmentation
from dynabert_fast.errors import InputError
from dynabert_fast.evaluation import Grid
from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.rewiring import Rewiring
from dynabert_fast.training import ElasticTrainer, TrainingOptions, stages
from dynabert_fast.training.pipeline import FitOptions, fit, head_changes

CELLS = [f"w{w:.2f}-d{d:.2f}" for d in (1, 0.5) for w in (1, 0.5)]
MODELS = ["teacher", "rewired", "width", "dynabert", "final"]


def options(training: dict[str, Any] | None = None, **changes: Any) -> FitOptions:
    """A short run over four sub-networks."""
    values = {"batch_size": 4, "epochs": 1.0, "learning_rate": 1e-3, **(training or {})}
    chosen = stages(widths=(1.0, 0.5), depths=(1.0, 0.5))
    short = {"max_length": 16, "latency_length": 8, "latency_rounds": 1}
    return FitOptions(chosen, {n: TrainingOptions(**values) for n in chosen}, **short, **changes)


# --- in a process of its own ----------------------------------------------------------------------

# Functions that a process can be killed in: just before the given call.
MOMENTS = {
    "step": (ElasticTrainer, "training_step"),
    "importance": (module, "measure_importance"),
    "grid": (module, "evaluate_grid"),
    "report": (module, "write_report"),
    "weights": (DynaBertForSequenceClassification, "save_pretrained"),
}


def fit_and_die(folder: str, output: str, kill: tuple[str, int] | None) -> None:
    """`fit`, in a process that is killed by a call; writes the number of steps that it took."""
    here, calls = Path(folder), dict.fromkeys(MOMENTS, 0)
    torch.set_num_threads(1)
    for name, (owner, attribute) in MOMENTS.items():

        def wrapper(*args, _name=name, _function=getattr(owner, attribute), **kwargs):  # noqa: B008
            calls[_name] += 1
            if (_name, calls[_name]) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return _function(*args, **kwargs)

        setattr(owner, attribute, wrapper)
    data = load_files(
        here / "train.csv", here / "dev.csv", text_column="text", label_column="label"
    )
    training = {"epochs": 2.0, "save_every": 2}
    fit(here / "encoder", data, output, options(training), resume=True, progress=False)
    Path(f"{output}.steps").write_text(str(calls["step"]))


if __name__ == "__job__":
    gc.freeze()  # see conftest.py
    fit_and_die(**globals()["ARGUMENTS"])


# --- what there is to test ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, make_hf, tokenizer):
    """A pretrained encoder without a head, as others save it."""
    folder = tmp_path_factory.mktemp("pipeline") / "encoder"
    make_hf("bert", "Model", num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(encoder, make_task, tmp_path_factory):
    """The folder and the grid of one whole run, with all stages."""
    output = tmp_path_factory.mktemp("fitted") / "deep" / "out"
    task = make_task("many", train=16, dev=8)
    return output, fit(encoder, task, output, options(final=True), progress=False)


def names(folder):
    return {path.name for path in folder.iterdir()}


def load(folder):
    return DynaBertForSequenceClassification.from_pretrained(folder)


def test_every_folder_and_file_appears(fitted):
    output, _ = fitted
    assert names(output) == {*MODELS, "fit.json", "grid.json", "grid.md", "report.html"}
    for name in MODELS:
        wanted = {"config.json", "model.safetensors", "tokenizer.json"}
        assert names(output / name) >= wanted


def test_the_grid_is_that_of_the_last_stage(fitted, make_data):
    output, grid = fitted
    assert [cell.subnet for cell in grid.cells] == CELLS
    assert (grid.model, grid.task, grid.metric, grid.examples) == ("encoder", "many", "accuracy", 8)
    assert (grid.latency_batch_size, grid.latency_length, grid.latency_rounds) == (1, 8, 1)
    data, model = make_data("many", train=16, dev=8), load(output / "final").eval()
    batch = data.collator([data.dev[i] for i in range(8)])
    labels = batch.pop("labels")
    for cell, subnet in zip(
        grid.cells, stages((1, 0.5), (1, 0.5))["depth"].subnets(model), strict=True
    ):
        right = (model(**batch, subnet=subnet).logits.argmax(-1) == labels).float().mean()
        assert cell.metrics["accuracy"] == pytest.approx(float(right))
    assert Grid.from_json((output / "grid.json").read_text()) == grid
    assert (output / "grid.md").read_text() == grid.to_markdown()
    assert all(cell in (output / "report.html").read_text() for cell in ("w0.50", "d0.50"))


def test_labels_are_in_every_config(fitted, make_task):
    output, _ = fitted
    for name in MODELS:
        config = load(output / name).config
        assert config.id2label == {0: "north", 1: "east", 2: "south", 3: "west"}
        assert config.label2id == {"north": 0, "east": 1, "south": 2, "west": 3}
        assert config.num_labels == 4
        assert config.problem_type == "single_label_classification"


def test_head_changes(make_task):
    assert head_changes(make_task("pair")) == {
        "id2label": {0: "same", 1: "other"},
        "label2id": {"same": 0, "other": 1},
        "problem_type": "single_label_classification",
    }
    assert head_changes(make_task("regression")) == {"num_labels": 1, "problem_type": "regression"}
    one = dataclasses.replace(make_task("pair"), label_names=("same",))
    with pytest.raises(InputError, match="every label is 'same'; classification needs two or more"):
        head_changes(one)


def test_each_stage_starts_from_the_one_before(fitted, make_data):
    """Rewiring changes order, not function; every training stage changes weights."""
    output, _ = fitted
    data = make_data("many", train=16, dev=8)
    batch = data.collator([data.dev[i] for i in range(8)])
    teacher, rewired = (load(output / name).eval() for name in ("teacher", "rewired"))
    torch.testing.assert_close(rewired(**batch).logits, teacher(**batch).logits)
    orders = [tuple(order.tolist()) for order in rewired.rewiring.neuron_order]
    assert orders == [tuple(o.tolist()) for o in Rewiring.load(str(output / "final")).neuron_order]
    assert Rewiring.load(str(output / "teacher")) is None
    weights = [load(output / name).classifier.weight.detach() for name in MODELS]
    moved = [float((b - a).abs().max()) for a, b in pairwise(weights)]
    assert moved[0] == 0
    assert all(0 < m < 0.02 for m in moved[1:])  # 4 steps of at most 1e-3 each


def test_the_second_call_trains_nothing(fitted, encoder, make_task, monkeypatch, capsys):
    output, grid = fitted
    files = [path for name in MODELS for path in (output / name).iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}
    for name in ("run_stage", "measure_importance"):
        monkeypatch.setattr(module, name, None)
    task = make_task("many", train=16, dev=8)
    again = fit(encoder, task, output, options(final=True), resume=True)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert [c.metrics for c in again.cells] == [c.metrics for c in grid.cells]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("==")]
    assert said == [
        "== fine-tuning: done before",
        "== rewiring: done before",
        "== training widths: done before",
        "== training widths and depths: done before",
        "== final fine-tuning: done before",
        "== evaluating",
    ]


# What is other than in the run that is resumed.
CHANGES = {
    "rewiring": ({"rewiring": "running"}, {}, "rewiring per_batch, not running"),
    "stages": ({"final": False}, {}, "final True, not False"),
    "length": ({"max_length": 12}, {}, "max_length 16, not 12"),
    "rate": ({}, {"learning_rate": 0.5}, r"training\.\w+\.learning_rate 0.001, not 0.5"),
    "seed": ({}, {"seed": 7}, r"training\.\w+\.seed 42, not 7"),
}


@pytest.mark.parametrize(("changed", "training", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_other_settings_are_refused(fitted, encoder, make_task, changed, training, message):
    output, _ = fitted
    chosen = dataclasses.replace(options(training, final=True), **changed)
    task = make_task("many", train=16, dev=8)
    with pytest.raises(InputError, match=f"out was started with {message}; resume with"):
        fit(encoder, task, output, chosen, resume=True, progress=False)


def test_stages_that_have_not_begun_may_have_other_settings(
    fitted, encoder, make_task, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    shutil.copytree(fitted[0], output)
    for name in ("dynabert", "final"):
        shutil.rmtree(output / name)
    task, ran = make_task("many", train=16, dev=8), []

    def run(stage, model, data, folder, training, *_):
        ran.append((stage.name, training.learning_rate))
        shutil.copytree(fitted[0] / folder.name, folder)

    monkeypatch.setattr(module, "run_stage", run)
    monkeypatch.setattr(module, "evaluate_checkpoint", lambda *args: None)
    chosen = options(final=True)
    other = {
        name: dataclasses.replace(values, learning_rate=0.25, save_every=7)
        if name in ("depth", "final")
        else dataclasses.replace(values, save_every=7)
        for name, values in chosen.training.items()
    }
    chosen = dataclasses.replace(chosen, training=other)
    fit(encoder, task, output, chosen, resume=True, progress=False)
    assert ran == [("depth", 0.25), ("final", 0.25)]
    for name in ("depth", "final"):
        record = json.loads((output / "fit.json").read_text())
        assert record["training"][name]["learning_rate"] == 0.25
    other["width"] = dataclasses.replace(other["width"], learning_rate=0.25)
    with pytest.raises(InputError, match=r"training\.width\.learning_rate 0.001, not 0.25"):
        fit(encoder, task, output, dataclasses.replace(chosen, training=other), resume=True)


def test_steps_of_too_few_tokens_are_refused_before_anything_is_trained(
    encoder, make_task, tmp_path
):
    task, chosen = make_task("many", train=16, dev=8), options()
    for name, tokens, more in (("depth", 10, {}), ("width", 15, {"masked_lm": encoder})):
        training = {n: dataclasses.replace(v) for n, v in chosen.training.items()}
        training[name] = dataclasses.replace(training[name], tokens_per_step=tokens)
        if more:  # a text of 16 tokens may come
            more["augmentation"] = Augmentation(copies=2)
        with pytest.raises(InputError, match=rf"stage {name}: tokens_per_step must be at least"):
            fit(
                encoder,
                task,
                tmp_path / "out",
                dataclasses.replace(chosen, training=training, **more),
            )
    assert names(tmp_path) == set()


def test_what_a_killed_process_left_is_deleted(fitted, encoder, make_task, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(fitted[0], output)
    (output / "width.checkpoints" / "checkpoint-2").mkdir(parents=True)
    task = make_task("many", train=16, dev=8)
    fit(encoder, task, output, options(final=True), resume=True, progress=False)
    assert not (output / "width.checkpoints").exists()


def test_a_record_without_a_newer_option_had_its_default(
    fitted, encoder, make_task, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    shutil.copytree(fitted[0], output)
    record = json.loads((output / "fit.json").read_text())
    del record["stages"]["depth"]["recipe"]["hidden_target"]
    (output / "fit.json").write_text(json.dumps(record))
    task, chosen = make_task("many", train=16, dev=8), options(final=True)
    fit(encoder, task, output, chosen, resume=True, progress=False)
    depth = chosen.stages["depth"]
    other = dataclasses.replace(depth.recipe, hidden_target="output")
    changed = {**chosen.stages, "depth": dataclasses.replace(depth, recipe=other)}
    with pytest.raises(InputError, match=r"depth\.recipe\.hidden_target input, not output"):
        fit(encoder, task, output, dataclasses.replace(chosen, stages=changed), resume=True)


def test_other_data_and_models_are_refused(
    fitted, encoder, make_task, tokenizer, tmp_path, make_hf
):
    output, _ = fitted
    for task, message in (
        (make_task("many", train=15, dev=8), "train_examples 16, not 15"),
        (make_task("many", train=16, dev=7), "dev_examples 8, not 7"),
        (make_task("binary", train=16, dev=8), "task many, not binary"),
    ):
        with pytest.raises(InputError, match=message):
            fit(encoder, task, output, options(final=True), resume=True, progress=False)
    make_hf("bert", "Model", num_hidden_layers=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="was started with model"):  # noqa: PT012
        task = make_task("many", train=16, dev=8)
        fit(tmp_path, task, output, options(final=True), resume=True, progress=False)


def test_latency_may_be_measured_anew(fitted, encoder, make_task):
    output, _ = fitted
    other = dataclasses.replace(options(final=True), latency_length=5, latency_batch_size=2)
    task = make_task("many", train=16, dev=8)
    grid = fit(encoder, task, output, other, resume=True, progress=False)
    assert (grid.latency_length, grid.latency_batch_size) == (5, 2)


def test_without_resume_the_folder_must_be_empty(fitted, encoder, make_task, tmp_path):
    output, _ = fitted
    task = make_task("many", train=16, dev=8)
    with pytest.raises(InputError, match="out is not empty"):
        fit(encoder, task, output, options(final=True), progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="is not empty"):
            fit(encoder, task, tmp_path, options(), resume, progress=False)
    assert names(tmp_path) == {"notes.txt"}


@pytest.mark.parametrize("kind", ["pair", "regression"])
def test_without_rewiring(encoder, make_task, tmp_path, kind):
    task = make_task(kind, train=8, dev=4)
    grid = fit(encoder, task, tmp_path / "out", options(rewiring=None), progress=False)
    wanted = {"teacher", "width", "dynabert", "fit.json", "grid.json", "grid.md", "report.html"}
    assert names(tmp_path / "out") == wanted
    assert Rewiring.load(str(tmp_path / "out" / "dynabert")) is None
    assert grid.metric == ("spearman" if kind == "regression" else "accuracy")
    config = load(tmp_path / "out" / "dynabert").config
    assert config.num_labels == task.num_labels
    if kind == "regression":
        assert config.problem_type == "regression"


@pytest.mark.parametrize("final", [True, False])
def test_stages_have_options_of_their_own(encoder, make_task, tmp_path, monkeypatch, final):
    """Which stage trains what, with which student, teacher and hyper-parameters.

    Those of a stage that does not run may be left out.
    """
    called = []

    def record(stage, model, data, output, options, teacher, resume, progress):
        called.append((stage.name, options.seed, teacher is not None, Path(output).name, resume))
        model.save_pretrained(output)
        data.tokenizer.save_pretrained(output)

    monkeypatch.setattr(module, "run_stage", record)
    chosen = options(final=final)
    run = [name for name in stages() if final or name != "final"]
    training = {name: TrainingOptions(seed=i) for i, name in enumerate(run)}
    chosen = dataclasses.replace(chosen, training=training)
    fit(encoder, make_task("binary"), tmp_path / "out", chosen, progress=False)
    wanted = [
        ("finetune", 0, False, "teacher", True),
        ("width", 1, True, "width", True),
        ("depth", 2, True, "dynabert", True),
        ("final", 3, False, "final", True),
    ]
    assert called == wanted[: len(run)]


def test_assistants_that_nobody_has_are_refused_before_anything_is_trained(
    encoder, make_task, tmp_path
):
    chosen = options()
    depth = chosen.stages["depth"]  # at depths 1 and 0.5
    recipe = dataclasses.replace(depth.recipe, assistant=1.0)
    changed = {**chosen.stages, "depth": dataclasses.replace(depth, recipe=recipe)}
    with pytest.raises(InputError, match=r"no sub-network has an assistant.* got depths 1.0, 0.5"):
        fit(
            encoder,
            make_task("binary"),
            tmp_path / "out",
            dataclasses.replace(chosen, stages=changed),
        )
    assert names(tmp_path) == set()


def test_the_first_stage_repeats_with_its_seed(encoder, make_task, tmp_path):
    """Also the new head's weights come from the seed, whatever was drawn before."""
    task, found = make_task("binary", train=4, dev=2), []
    for name, seed, noise in (("a", 1, 3), ("b", 1, 4), ("c", 2, 3)):
        torch.manual_seed(noise)
        data = module.stage_data(task, module.load_tokenizer(encoder), 16)
        values = TrainingOptions(batch_size=4, epochs=1, seed=seed)
        module.finetune(encoder, task, data, tmp_path / name, values, progress=False)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


# --- killed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(encoder, make_task):
    """The encoder's folder, with data beside it."""
    task = make_task("binary", train=12, dev=6)
    for name, part in (("train", task.train), ("dev", task.dev)):
        lines = [f"{text},{label}" for text, label in zip(part.texts, part.labels, strict=True)]
        (encoder.parent / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    return encoder.parent


@pytest.mark.slow
def test_killed_in_every_part_and_resumed(folder, start_job, tmp_path):
    """One run after another is killed, each further on; the last ends as one left in peace does."""

    def run(output, kill):
        arguments = {"folder": str(folder), "output": str(output), "kill": kill}
        return start_job(__file__, arguments).wait()

    whole, output = tmp_path / "whole", tmp_path / "out"
    assert run(whole, None) == 0
    assert (tmp_path / "whole.steps").read_text() == "18"  # three stages, two epochs, three steps
    for kill, there in (
        (("step", 2), set()),
        (("step", 4), set()),  # resumed after step 0, killed in step 4
        (("importance", 1), {"teacher"}),
        (("weights", 1), {"teacher"}),  # of the rewired model
        (("step", 6), {"teacher", "rewired"}),
        (("weights", 1), {"teacher", "rewired"}),  # of a checkpoint
        (("step", 4), {"teacher", "rewired", "width"}),
        (("grid", 1), {"teacher", "rewired", "width", "dynabert"}),
        (("report", 1), {"teacher", "rewired", "width", "dynabert"}),
    ):
        assert run(output, kill) == -signal.SIGKILL, kill
        assert names(output) & set(MODELS) == there, kill
    assert run(output, None) == 0
    assert (tmp_path / "out.steps").read_text() == "0"
    assert names(output) == names(whole)
    for name in ("teacher", "rewired", "width", "dynabert"):
        weights = [(path / name / "model.safetensors").read_bytes() for path in (whole, output)]
        assert weights[0] == weights[1], name
    grids = [Grid.from_json((p / "grid.json").read_text()) for p in (whole, output)]
    assert [c.metrics for c in grids[0].cells] == [c.metrics for c in grids[1].cells]
