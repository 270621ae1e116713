"""`fit`, and each stage as a command of its own, on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from dynabert_fast.cli.main import build_parser, main
from dynabert_fast.errors import TrainingError
from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.training import ElasticTrainer, pipeline

GRID = "--widths 1,0.5 --depths 1,0.5".split()
STEPS = "--max-steps 2 --learning-rate 1e-2 --batch-size 8".split()
DEPTH_STEPS = "--max-steps 2 --learning-rate 2e-2 --batch-size 2".split()  # the recipe's of STEPS
CELLS = ["w1.00-d1.00", "w0.50-d1.00", "w1.00-d0.50", "w0.50-d0.50"]
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def fit(checkpoints, sources, latency):
    """`fit(output, *options, kind="classes")`: the command's words."""

    def words(output, *options, kind="classes"):
        model = str(checkpoints["pretrained"])
        return [
            *("fit", "--model", model, "--output", str(output), *sources[kind]),
            *(*latency, *GRID, *STEPS, *options),
        ]

    return words


@pytest.fixture(scope="module")
def fitted(fit, tmp_path_factory):
    """The folder of one run of `fit --final`."""
    output = tmp_path_factory.mktemp("fit") / "out"
    assert main(fit(output, "--final")) == 0
    return output


@pytest.fixture(scope="module")
def chained(checkpoints, sources, tmp_path_factory):
    """Folders of the same run as `fitted`, one command a stage."""
    root = tmp_path_factory.mktemp("stages")
    folders = {name: root / name for name in ("teacher", "rewired", "width", "depth", "final")}
    teacher, rewired, width, depth, final = map(str, folders.values())
    data, training = sources["classes"], [*sources["classes"], *STEPS]
    for words in (
        ["finetune", str(checkpoints["pretrained"]), "--output", teacher, *training],
        ["rewire", teacher, "--output", rewired, *data],
        ["train-width", rewired, "--teacher", teacher, "--output", width, *training, *GRID],
        ["train-depth", width, "--teacher", width, "--output", depth, *data, *DEPTH_STEPS, *GRID],
        ["train-final", depth, "--output", final, *training, *GRID],
    ):
        assert main(words) == 0
    return folders


# --- fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "metric", "labels", "notes"),
    [
        ("classes", "", "accuracy", {0: "bad", 1: "good"}, []),
        (
            *("pairs", "--metric f1", "f1", {0: "no", 1: "yes"}),
            ["dev: 2 of 23 training rows set aside, seed 0"],
        ),
        (
            *("regression", "--max-train 10 --data-seed 3", "spearman", {0: "LABEL_0"}),
            ["dev: 2 of 24 training rows set aside, seed 3", "train: 10 of 22 rows, seed 3"],
        ),
    ],
    ids=["classes", "pairs", "regression"],
)
def test_fit(cli, fit, tmp_path, kind, options, metric, labels, notes):
    output = tmp_path / "deep" / "out"
    result = cli(*fit(output, *options.split(), kind=kind))
    assert result.code == 0, result.err
    assert result.out.splitlines()[: len(notes) + 1] == [*notes, "== fine-tuning"]
    assert names(output) == {
        *("fit.json", "teacher", "rewired", "width", "dynabert"),
        *("grid.json", "grid.md", "report.html"),
    }
    for folder in ("teacher", "rewired", "width", "dynabert"):
        more = set() if folder == "teacher" else {"rewiring.safetensors"}
        assert names(output / folder) == MODEL_FILES | more
    model = DynaBertForSequenceClassification.from_pretrained(output / "dynabert")
    assert model.config.id2label == labels
    assert model.config.num_labels == len(labels)
    grid = json.loads((output / "grid.json").read_text())
    assert [cell["subnet"] for cell in grid["cells"]] == CELLS
    assert grid["metric"] == metric
    assert (output / "grid.md").read_text() in result.out
    assert result.out.endswith(f"report: {output / 'report.html'}\n")
    titles = [line for line in result.out.splitlines() if line.startswith("== ")]
    assert titles == [
        *("== fine-tuning", "== rewiring", "== training widths"),
        *("== training widths and depths", "== evaluating"),
    ]


def test_fit_trains(fitted):
    one, other = weights(fitted / "teacher"), weights(fitted / "final")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_fit_with_a_last_stage_evaluates_that(cli, fit, fitted, monkeypatch):
    assert names(fitted / "final") == MODEL_FILES | {"rewiring.safetensors"}
    evaluated, own = [], pipeline.evaluate_checkpoint

    def evaluate_checkpoint(checkpoint, *args, **kwargs):
        evaluated.append(checkpoint)
        return own(checkpoint, *args, **kwargs)

    monkeypatch.setattr(pipeline, "evaluate_checkpoint", evaluate_checkpoint)
    assert cli(*fit(fitted, "--final", "--resume")).code == 0
    assert evaluated == [fitted / "final"]


def test_fit_without_rewiring(cli, fit, tmp_path):
    """With `--resume` and nothing to resume, too: that starts."""
    output = tmp_path / "out"
    assert cli(*fit(output, "--rewiring", "none", "--resume")).code == 0
    assert "rewired" not in names(output)
    assert names(output / "dynabert") == MODEL_FILES


# --- resume ---------------------------------------------------------------------------------------


def test_resume_repeats_only_what_is_missing(cli, fit, fitted, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(fitted, output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "dynabert")
    (output / "grid.json").unlink()
    result = cli(*fit(output, "--final", "--resume"))
    assert result.code == 0, result.err
    done = [line for line in result.out.splitlines() if line.endswith("done before")]
    assert done == [
        f"== {title}: done before" for title in ("fine-tuning", "rewiring", "training widths")
    ]
    assert equal(output / "final", fitted / "final")
    assert (output / "grid.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--width-epochs 2", "training.width.epochs 3.0, not 2.0"),
        ("--max-steps 3", "training.depth.max_steps 2, not 3"),
        ("--widths 1,0.25", "stages.depth.widths [1.0, 0.5], not [1.0, 0.25]"),
        ("--lambda-hidden 7", "stages.depth.recipe.hidden 1.0, not 7.0"),
        ("--max-length 15", "max_length 16, not 15"),
        ("--rewiring none", "rewiring per_batch, not None"),
        ("--max-train 20", "train_examples 24, not 20"),
    ],
)
def test_resume_with_other_settings_is_refused(refused, fit, fitted, change, message):
    before = (fitted / "fit.json").read_text()
    error = refused(*fit(fitted, "--final", "--resume", *change.split()))
    assert f"{fitted} was started with {message}; resume with" in error
    assert (fitted / "fit.json").read_text() == before


def test_resume_with_a_damaged_record(refused, fit, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "fit.json").write_text("{")
    assert "fit.json cannot be read" in refused(*fit(output, "--resume"))


@pytest.fixture
def interrupted_at(monkeypatch):
    """`interrupted_at(step)`: Ctrl-C in that step of training; 0: never."""
    own = ElasticTrainer.training_step

    def at(step):
        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == step:
                raise KeyboardInterrupt
            return own(self, *args, **kwargs)

        monkeypatch.setattr(ElasticTrainer, "training_step", training_step)

    return at


def test_an_interrupted_stage_goes_on(cli, refused, chained, sources, tmp_path, interrupted_at):
    output = tmp_path / "width"
    words = [
        *("train-width", chained["rewired"], "--teacher", chained["teacher"], "--output", output),
        *(*sources["classes"], *STEPS, *GRID, "--save-every", "1"),
    ]
    interrupted_at(2)
    result = cli(*words)
    assert result.code == 130
    last = result.err.splitlines()[-1]
    assert last == "dynabert-fast: interrupted; the same command with --resume goes on"
    assert not output.exists()
    assert names(tmp_path / "width.checkpoints") == {"checkpoint-1", "settings.json"}
    interrupted_at(0)
    assert "width.checkpoints holds an interrupted run; add --resume" in refused(*words)
    assert cli(*words, "--resume").code == 0
    assert equal(output, chained["width"])
    assert names(tmp_path) == {"width"}


def test_a_run_that_diverges_leaves_its_batch(cli, checkpoints, sources, tmp_path):
    words = ("finetune", checkpoints["pretrained"], "--output", tmp_path / "out")
    result = cli(*words, *sources["classes"], *STEPS, "--learning-rate", "1e30")
    assert result.code == 1
    line = result.err.splitlines()[-1]
    assert line.startswith("dynabert-fast: error: the loss is nan in step 2 ")
    assert "lower learning rate" in line
    assert names(tmp_path) == {"out.checkpoints"}
    assert names(tmp_path / "out.checkpoints") == {"bad-batch-step-2.safetensors"}


def test_a_run_that_fails_closes_its_bar(checkpoints, sources, tmp_path):
    """While the exception, and with it every frame, is still there: it is not left to chance."""
    words = ["finetune", str(checkpoints["pretrained"]), "--output", str(tmp_path / "out")]
    args = build_parser().parse_args([*words, *sources["classes"], *STEPS, "--learning-rate=1e30"])
    with pytest.raises(TrainingError, match="the loss is nan in step 2 "):
        args.run(args)
    assert list(tqdm._instances) == []


@pytest.mark.parametrize(
    "room", [50_000, 150_000], ids=["no room for the model", "no room for the optimiser"]
)
def test_a_full_disk_leaves_the_last_checkpoint(
    cli, chained, checkpoints, sources, tmp_path, interrupted_at, file_size_limit, room
):
    output = tmp_path / "out"
    words = ("finetune", checkpoints["pretrained"], "--output", output, "--save-every", "1")
    training = (*sources["classes"], *STEPS)
    interrupted_at(2)
    assert cli(*words, *training).code == 130
    (kept,) = (tmp_path / "out.checkpoints").glob("checkpoint-*")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    interrupted_at(0)
    with file_size_limit(room):
        result = cli(*words, *training, "--resume")
    assert result.code == 1
    error = result.err.splitlines()[-1]
    assert error.startswith(f"dynabert-fast: error: could not save {kept.parent}/checkpoint-2 (")
    assert "what was saved before is intact" in error
    assert not output.exists()
    assert names(kept.parent) == {kept.name, "settings.json"}
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert cli(*words, *training, "--resume").code == 0
    assert equal(output, chained["teacher"])


def test_interrupting_what_cannot_be_resumed(cli, checkpoints, monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynabert_fast.training.pipeline.load_model", stop)
    words = ("export", checkpoints["classifier"], "--subnet", "w0.50-d0.50")
    result = cli(*words, "--output", tmp_path / "out")
    assert (result.code, result.err) == (130, "dynabert-fast: interrupted\n")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("command", ["finetune", "train-width"])
def test_resuming_a_finished_stage_changes_nothing(cli, chained, checkpoints, sources, command):
    output = chained["teacher" if command == "finetune" else "width"]
    before = output.stat().st_mtime_ns
    source = {
        "finetune": [checkpoints["pretrained"]],
        "train-width": [chained["rewired"], "--teacher", chained["teacher"]],
    }[command]
    result = cli(command, *source, "--output", output, *sources["classes"], *STEPS, "--resume")
    assert (result.code, result.out) == (0, f"done before: {output}\n")
    assert output.stat().st_mtime_ns == before


def test_resume_into_an_empty_folder_trains(cli, checkpoints, sources, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    words = ("finetune", checkpoints["pretrained"], "--output", output, *sources["classes"])
    assert cli(*words, *STEPS, "--resume").code == 0
    assert names(output) == MODEL_FILES


# --- one command a stage --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["teacher", "rewired", "width", "depth", "final"])
def test_stages_as_commands_are_the_pipeline(chained, fitted, stage):
    same = fitted / ("dynabert" if stage == "depth" else stage)
    assert names(chained[stage]) == names(same)
    assert equal(chained[stage], same)


def test_the_seed_matters(cli, chained, checkpoints, sources, tmp_path):
    output = tmp_path / "out"
    words = ("finetune", checkpoints["pretrained"], "--output", output, "--seed", "43")
    assert cli(*words, *sources["classes"], *STEPS).code == 0
    assert not equal(output, chained["teacher"])


def test_options_of_distillation_matter(cli, chained, sources, tmp_path):
    for command, student, teacher, stage, change in (
        ("train-width", "rewired", "teacher", "width", "--lambda-hidden 0"),
        ("train-depth", "width", "width", "depth", "--teacher-width full"),
        ("train-depth", "width", "width", "depth", "--hidden-target input"),
        ("train-depth", "width", "width", "depth", "--lambda-labels 0"),
        ("train-depth", "width", "width", "depth", "--recipe paper"),
    ):
        words = (command, chained[student], "--teacher", chained[teacher])
        steps = DEPTH_STEPS if command == "train-depth" else STEPS
        training = (*sources["classes"], *steps, *GRID)
        output = tmp_path / change
        result = cli(*words, "--output", output, *training, *change.split())
        assert result.code == 0, result.err
        assert not equal(output, chained[stage])


def test_a_teacher_of_another_size_without_matched_states(
    cli, make_checkpoint, checkpoints, sources, tmp_path
):
    big = make_checkpoint(tmp_path / "big", ("good", "bad"), hidden_size=32, num_hidden_layers=6)
    words = ("train-width", checkpoints["classifier"], "--teacher", big, "--lambda-hidden", "0")
    result = cli(*words, "--output", tmp_path / "out", *sources["classes"], *STEPS, *GRID)
    assert result.code == 0, result.err


# --- rewire ---------------------------------------------------------------------------------------


def test_rewire_keeps_the_function(chained):
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        one, other = (
            DynaBertForSequenceClassification.from_pretrained(chained[name]).eval()(ids).logits
            for name in ("teacher", "rewired")
        )
    torch.testing.assert_close(one, other)
    assert not equal(chained["teacher"], chained["rewired"])


def test_rewire_shows_what_it_sorted_by(cli, chained, sources, tmp_path):
    result = cli("rewire", chained["rewired"], "--show")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("importance summed over 1 batches (per_batch)")
    assert lines[1].split()[-3:] == ["w0.75", "w0.50", "w0.25"]
    rewiring = DynaBertForSequenceClassification.from_pretrained(chained["rewired"]).rewiring
    assert len(lines) == 2 + len(rewiring.head_order)
    for layer, (line, order) in enumerate(zip(lines[2:], rewiring.head_order, strict=True)):
        assert line.split()[:5] == [str(layer), *map(str, order.tolist())]
    words = ("rewire", chained["teacher"], "--output", tmp_path / "out", "--batch-size", "4")
    made = cli(*words, "--accumulation", "running", *sources["dev only"])
    assert made.code == 0
    assert made.out.startswith("importance summed over 5 batches (running)")
    assert made.out.endswith(f"saved: {tmp_path / 'out'}\n")
    again = cli("rewire", tmp_path / "out", "--show").out
    assert made.out.startswith(again)
