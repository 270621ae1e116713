from __future__ import annotations

import argparse
import dataclasses
import math
import os

import pytest

from dynabert_fast.cli import arguments as shared
from dynabert_fast.cli.main import build_parser
from dynabert_fast.data import Examples, Task, TaskData
from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertConfig
from dynabert_fast.subnet import DEPTHS, WIDTHS
from dynabert_fast.training import RECIPES, Recipe, Schedule

FIT = "fit --model m --output o --train-file f --text-column t --label-column l".split()


def parse(*words):
    return build_parser().parse_args([*FIT, *words])


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (shared.COUNT, "1", 1),
        (shared.NATURAL, "0", 0),
        (shared.POSITIVE, "2e-5", 2e-5),
        (shared.NOT_NEGATIVE, "0", 0.0),
        (shared.number(float, least=0, below=1), "0.99", 0.99),
        (shared.multipliers, "1,0.75,.5", (1.0, 0.75, 0.5)),
        (shared.multipliers, "0.25", (0.25,)),
    ],
)
def test_number(kind, text, value):
    assert kind(text) == value
    assert type(kind(text)) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (shared.COUNT, "0", "must be at least 1, got 0"),
        (shared.COUNT, "1.5", "must be a whole number, got '1.5'"),
        (shared.NATURAL, "-1", "must be at least 0, got -1"),
        (shared.POSITIVE, "0", "must be above 0, got 0"),
        (shared.POSITIVE, "nan", "must be above 0, got nan"),
        (shared.POSITIVE, "inf", "must be above 0, got inf"),
        (shared.POSITIVE, "fast", "must be a number, got 'fast'"),
        (shared.NOT_NEGATIVE, "-0.1", "must be at least 0, got -0.1"),
        (shared.number(float, least=0, below=1), "1", "must be at least 0 and below 1, got 1"),
        (shared.multipliers, "1,0", "must be above 0 and at most 1 each, got 0"),
        (shared.multipliers, "1.5", "must be above 0 and at most 1 each, got 1.5"),
        (shared.multipliers, "nan", "must be above 0 and at most 1 each, got nan"),
        (shared.multipliers, "1,", "must be numbers separated by commas"),
        (shared.multipliers, "", "must be numbers separated by commas"),
    ],
)
def test_number_is_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    assert str(error.value).startswith(message)


# --- hyper-parameters -----------------------------------------------------------------------------


def test_defaults_are_the_papers_but_for_the_recipe():
    args = parse()
    options = shared.training_options(args, "width")
    assert (options.learning_rate, options.batch_size, options.epochs) == (2e-5, 32, 3.0)
    assert (options.weight_decay, options.max_grad_norm, options.warmup) == (0.0, 1.0, None)
    assert (options.max_steps, options.seed, options.precision) == (-1, 42, "fp32")
    assert (options.schedule.kind, options.subnets_per_pass) == ("grid", None)
    found = shared.stages_of(args)
    assert (found["width"].widths, found["width"].depths) == (WIDTHS, (1.0,))
    assert (found["depth"].widths, found["depth"].depths) == (WIDTHS, DEPTHS)
    assert (found["width"].recipe.logits, found["width"].recipe.hidden) == (1.0, 0.1)
    assert (found["depth"].recipe.logits, found["depth"].recipe.hidden) == (1.0, 1.0)
    # The fine-tuned teacher is good at full width only; that of the depths at every width.
    assert found["width"].recipe.teacher_width == "full"
    assert found["depth"].recipe.teacher_width == "same"
    assert (found["depth"].recipe.hidden_target, found["depth"].recipe.labels) == ("output", 1.0)
    assert found["finetune"].recipe is found["final"].recipe is None


def test_every_option_reaches_the_trainer():
    args = parse(
        *"--epochs 4 --max-steps 7 --batch-size 3 --learning-rate 0.1 --warmup 0.2".split(),
        *"--weight-decay 0.3 --max-grad-norm 0.4 --gradient-accumulation 5".split(),
        *"--eval-batch-size 6 --precision bf16 --save-every 8 --seed 9".split(),
        *"--schedule sandwich --drawn-subnets 0 --subnets-per-pass 10 --checkpointing".split(),
    )
    options = shared.training_options(args, "width")
    assert vars(options) == {
        "epochs": 4.0,
        "max_steps": 7,
        "batch_size": 3,
        "tokens_per_step": None,
        "learning_rate": 0.1,
        "warmup": 0.2,
        "weight_decay": 0.3,
        "max_grad_norm": 0.4,
        "gradient_accumulation": 5,
        "eval_batch_size": 6,
        "precision": "bf16",
        "save_every": 8,
        "schedule": Schedule("sandwich", 0),
        "subnets_per_pass": 10,
        "checkpointing": True,
        "seed": 9,
    }


def test_a_step_is_of_examples_or_of_tokens(capsys):
    options = shared.training_options(parse("--tokens-per-step", "4096"), "width")
    assert (options.tokens_per_step, options.batch_size) == (4096, 32)
    with pytest.raises(SystemExit) as error:  # the default too, given by hand
        parse("--tokens-per-step", "4096", "--batch-size", "32")
    assert error.value.code == 2
    assert "--batch-size: not allowed with argument --tokens-per-step" in capsys.readouterr().err


@pytest.mark.parametrize("stage", shared.STAGES)
def test_a_stage_has_its_own_epochs_batches_and_rate(stage):
    args = parse(
        *("--epochs", "2", f"--{stage}-epochs", "5", f"--{stage}-learning-rate", "0.5"),
        *("--batch-size", "7", f"--{stage}-batch-size", "3", "--recipe", "paper"),
    )
    for name in shared.STAGES:
        options = shared.training_options(args, name)
        want = (5.0, 0.5, 3) if name == stage else (2.0, 2e-5, 7)
        assert (options.epochs, options.learning_rate, options.batch_size) == want


def test_a_recipe_changes_the_stage_of_depths_alone():
    paper, small = parse("--recipe", "paper"), parse()
    for stage in shared.STAGES:
        changed = shared.training_options(small, stage)
        same = shared.training_options(paper, stage)
        if stage == "depth":
            assert (changed.batch_size, changed.learning_rate, changed.warmup) == (8, 4e-5, 0.1)
            same = dataclasses.replace(same, batch_size=8, learning_rate=4e-5, warmup=0.1)
        assert changed == same
    found = shared.stages_of(small)
    recipe = found["depth"].recipe
    assert (recipe.hidden_target, recipe.labels) == ("output", 1.0)
    assert found["width"] == shared.stages_of(paper)["width"]
    assert RECIPES["paper"] == Recipe()


def _depth(*words):
    options = shared.training_options(parse(*words), "depth")
    return options.batch_size, options.gradient_accumulation, options.learning_rate


def test_a_recipe_is_relative_to_the_options_of_all_stages_and_yields_to_the_rest():
    args = parse(
        *"--batch-size 16 --warmup 0 --hidden-target input".split(),
        *"--learning-rate 0.25 --lambda-labels 0".split(),
    )
    options = shared.training_options(args, "depth")
    assert (options.batch_size, options.warmup, options.learning_rate) == (4, 0.0, 0.5)
    recipe = shared.stages_of(args)["depth"].recipe
    assert (recipe.hidden_target, recipe.labels) == ("input", 0.0)
    own = "--depth-learning-rate 0.125 --batch-size 64 --depth-batch-size 4"
    assert _depth(*own.split(), "--gradient-accumulation", "8") == (4, 8, 0.125)
    options = shared.training_options(parse("--tokens-per-step", "514"), "depth")
    assert (options.tokens_per_step, options.learning_rate) == (128, 4e-5)


@pytest.mark.parametrize(
    ("batch", "accumulated", "want"),
    [
        (32, 1, (8, 1, 4e-5)),
        (32, 2, (16, 1, 4e-5)),
        (16, 3, (12, 1, 4e-5)),
        (2, 16, (2, 4, 4e-5)),
        (8, 6, (6, 2, 4e-5)),
        (4, 1, (1, 1, 4e-5)),
        (3, 1, (1, 1, 2e-5)),  # cannot be divided by four
        (1, 1, (1, 1, 2e-5)),
    ],
)
def test_a_recipe_divides_accumulated_batches_before_it_divides_batches(batch, accumulated, want):
    got = _depth("--batch-size", str(batch), "--gradient-accumulation", str(accumulated))
    assert got == want


def test_the_rate_of_a_step_of_tokens_that_cannot_be_divided():
    options = shared.training_options(parse("--tokens-per-step", "3"), "depth")
    assert (options.tokens_per_step, options.learning_rate) == (1, 2e-5)


def parse_depth(*words):
    given = "train-depth student --teacher teacher --output out --task rte --data-dir data".split()
    return build_parser().parse_args([*given, *words])


def test_the_command_of_one_stage_trains_as_fit_does_and_takes_what_is_given_as_it_is():
    for given in ([], ["--recipe", "paper"], ["--epochs", "2"]):
        one, fit = parse_depth(*given), parse(*given)
        assert shared.training_options(one, "depth") == shared.training_options(fit, "depth")
        assert shared.stages_of(one)["depth"] == shared.stages_of(fit)["depth"]
    args = parse_depth(*"--learning-rate 0.5 --batch-size 32 --gradient-accumulation 2".split())
    options = shared.training_options(args, "depth")
    assert (options.learning_rate, options.batch_size) == (0.5, 32)
    assert (options.gradient_accumulation, options.warmup) == (2, 0.1)
    options = shared.training_options(parse_depth("--tokens-per-step", "64"), "depth")
    assert (options.tokens_per_step, options.learning_rate) == (64, 4e-5)


@pytest.mark.parametrize("of", [parse, parse_depth])
def test_labels_of_augmented_texts_are_not_known(of):
    augment = ("--augment", "2", "--augment-model", "m")
    assert shared.stages_of(of(*augment))["depth"].recipe.labels == 0
    given = of(*augment, "--lambda-labels", "0.5")
    assert shared.stages_of(given)["depth"].recipe.labels == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tokens-per-step 64 --depth-batch-size 4", "--depth-batch-size 4 goes with steps of"),
        ("--drawn-subnets 3", "--drawn-subnets needs --schedule sandwich or random"),
    ],
)
def test_options_that_contradict_each_other(words, message):
    with pytest.raises(InputError, match=message):
        shared.training_options(parse(*words.split()), "depth")


def test_a_target_of_no_loss():
    with pytest.raises(InputError, match="--hidden-target has nothing to choose"):
        shared.stages_of(parse(*"--lambda-hidden 0 --hidden-target output".split()))


def test_the_parser_knows_every_recipe():  # it does not import torch to ask
    for recipe in RECIPES:
        assert parse("--recipe", recipe).recipe == recipe
    with pytest.raises(SystemExit):
        parse("--recipe", "none")


def test_distillation_options_reach_both_stages():
    args = parse(
        *"--lambda-logits 2 --lambda-hidden 3 --teacher-width full".split(),
        *"--hidden-target input --lambda-labels 0.5 --lambda-assistant 0.25".split(),
        *"--widths 1,0.5 --depths 1,0.75,0.5".split(),
    )
    found = shared.stages_of(args)
    for name in ("width", "depth"):
        recipe = found[name].recipe
        assert (recipe.logits, recipe.hidden) == (2.0, 3.0)
        assert recipe.labels == (0.5 if name == "depth" else 0.0)
        assert recipe.assistant == (0.25 if name == "depth" else 0.0)
        assert recipe.teacher_width == "full"
        assert found[name].widths == (1.0, 0.5)
    assert found["depth"].depths == (1.0, 0.75, 0.5)
    assert found["depth"].recipe.hidden_target == "input"


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task sst2", "got --task and --train-file"),
        ("--dataset d", "got --train-file and --dataset"),
        ("--data-dir d", "--data-dir does not go with --train-file"),
        ("--dataset-config c", "--dataset-config does not go with --train-file"),
        ("--dev-split test", "--dev-split does not go with --train-file"),
    ],
)
def test_options_of_another_source_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        shared.load_data(parse(*words.split()))


@pytest.mark.parametrize(
    "option",
    ["--text-column t", "--pair-column p", "--label-column l", "--regression", "--metric f1"],
)
def test_a_published_task_brings_its_own_columns(option):
    words = ["evaluate", "m", "--task", "sst2", "--data-dir", "d", *option.split()]
    with pytest.raises(InputError, match=f"{option.split()[0]} does not go with --task"):
        shared.load_data(build_parser().parse_args(words), only_dev=True)


def test_a_lone_development_file_is_a_source_only_without_training(data):
    file = data / "dev.csv"
    words = f"evaluate m --dev-file {file} --text-column text --label-column label"
    args = build_parser().parse_args(words.split())
    lines = file.read_text().splitlines()
    assert len(shared.load_data(args, only_dev=True).dev) == len(lines) - 1
    with pytest.raises(InputError, match="got none of them"):
        shared.load_data(args)


@pytest.mark.parametrize(
    ("split", "used"), [(None, "validation"), ("test", "test"), ("none", None)]
)
def test_development_split_of_a_hub_data_set(monkeypatch, split, used):
    asked = {}

    def load_hub(name, config, **options):
        asked.update(options, name=name, config=config)
        return TaskData(Task("x", ("t",), "l", "accuracy"), *[Examples([], None, [])] * 2, ())

    monkeypatch.setattr("dynabert_fast.data.load_hub", load_hub)
    words = "evaluate m --dataset owner/d --dataset-config c --text-column t --label-column l"
    args = build_parser().parse_args(words.split() + (["--dev-split", split] if split else []))
    shared.load_data(args)
    assert (asked["name"], asked["config"], asked["dev_split"]) == ("owner/d", "c", used)
    assert (asked["text_column"], asked["label_column"], asked["pair_column"]) == ("t", "l", None)


# --- labels ---------------------------------------------------------------------------------------


def task_data(names, labels=(0, 1, 1), regression=False):
    examples = Examples(["x"] * len(labels), None, list(labels))
    metric = "spearman" if regression else "accuracy"
    return TaskData(Task("x", ("t",), "l", metric, regression), examples, examples, names)


def config(*names):
    return DynaBertConfig(id2label=dict(enumerate(names)))


def test_labels_are_renumbered_by_name():
    aligned = shared.align_labels(task_data(("bad", "good")), config("so-so", "good", "bad"))
    assert aligned.train.labels == aligned.dev.labels == [2, 1, 1]
    assert aligned.label_names == ("so-so", "good", "bad")


@pytest.mark.parametrize(
    ("data", "names", "message"),
    [
        (
            task_data(("bad", "ugly")),
            ("good", "bad"),
            "label 'ugly' is not one of .*'good', 'bad'$",
        ),
        (task_data(("0", "1")), ("LABEL_0", "LABEL_1"), "name its classes in config.json"),
        (task_data((), (0.5, 1.0), True), ("good", "bad"), "2 classes.* needs one output"),
        (task_data(("bad", "good")), ("LABEL_0",), "predicts a number"),
    ],
    ids=["other label", "unnamed", "regression on classes", "classes on regression"],
)
def test_labels_that_do_not_fit_are_refused(data, names, message):
    with pytest.raises(InputError, match=message):
        shared.align_labels(data, config(*names))


def test_regression_labels_stay():
    data = task_data((), (0.5, math.pi), True)
    assert shared.align_labels(data, config("LABEL_0")) is data


# --- libraries ------------------------------------------------------------------------------------


def test_libraries_are_quiet_but_downloads_show(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    monkeypatch.setenv("TQDM_MININTERVAL", "")
    os.environ.pop("TQDM_MININTERVAL")
    shared.quiet_libraries()
    assert logging.get_verbosity() == logging.ERROR
    assert not logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()
    assert os.environ["TQDM_MININTERVAL"] == "10"  # standard error is not a terminal here


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "out"), [(None, "saved\n"), ("0", "saved\n"), ("1", "")])
def test_one_process_speaks(monkeypatch, capsys, rank, out):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    shared.say("saved")
    assert capsys.readouterr().out == out
