"""Whatever is wrong with the input: one clear line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shlex
import shutil
import socket

import pytest

from dynabert_fast.errors import InputError
from dynabert_fast.training import run_stage, stages
from dynabert_fast.training.pipeline import FitOptions, fit, load_model, rewire_checkpoint

SMALL = "--max-steps 1 --widths 1,0.5 --depths 1"
# Data that are not there: an error about something else was found before they were read.
UNREAD = "--train-file missing.csv --text-column t --label-column l --max-length 16"
OWN = "--text-column text --label-column label --max-length 16"


@pytest.fixture(scope="session")
def places(checkpoints, make_checkpoint, data, sources, latency, tmp_path_factory):
    """What the commands below name in braces: good folders and broken ones."""
    root = tmp_path_factory.mktemp("broken")

    def like(source, name, **config):
        folder = shutil.copytree(checkpoints[source], root / name)
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | config))
        return folder

    def holding(name, **files):
        (root / name).mkdir()
        for file, text in files.items():
            (root / name / file.replace("_", ".")).write_text(text)
        return root / name

    weights = "model.safetensors"
    garbage, cut, bare, mute, torn = (
        like("classifier", name) for name in ("garbage", "cut", "bare", "mute", "torn")
    )
    (garbage / weights).write_bytes(bytes(range(256)) * 400)
    (cut / weights).write_bytes((cut / weights).read_bytes()[:-1000])
    (bare / weights).unlink()
    (torn / "tokenizer.json").write_text("{")
    for file in mute.glob("tokenizer*"):
        file.unlink()
    blank = like("classifier", "blank")  # of which transformers makes a tokenizer without words
    (blank / "tokenizer.json").unlink()
    fields, words, unread = (like("classifier", name) for name in ("fields", "words", "unread"))
    (fields / "tokenizer.json").write_text('{"version": "1.0"}')
    found = json.loads((words / "tokenizer.json").read_text())
    ids = found["model"]["vocab"]
    (like("classifier", "added") / "tokenizer.json").write_text(
        json.dumps({**found, "model": {**found["model"], "vocab": {**ids, "moviegoer": len(ids)}}})
    )
    last, before = sorted(ids, key=ids.get)[-1], sorted(ids, key=ids.get)[-2]
    ids[last], ids[before] = ids[before], ids[last]
    (words / "tokenizer.json").write_text(json.dumps(found))
    found["model"] = {"type": "WordLevel", "vocab": ids, "unk_token": "[NONE]"}
    (unread / "tokenizer.json").write_text(json.dumps(found))
    text_files = {
        "half.jsonl": '{"text": "a film", "label": "\\ud800"}\n',
        "ugly.csv": "text,label\na film,ugly\na plot,bad\n",
        "empty.csv": "",
        "header.csv": "text,label\n",
        "one.csv": "text,label\na film,bad\na plot,bad\n",
        "words.csv": "text,score\na film,high\na plot,1\n",
        "torn.csv": "text,label\na film,bad,really\n",
        "unsuffixed": "text,label\na film,bad\n",
    }
    for name, text in text_files.items():
        (root / name).write_text(text)
    labels = ("good", "bad")
    return {
        **checkpoints,
        "gpt2": holding("gpt2", config_json='{"model_type": "gpt2", "n_layer": 1}'),
        "distilbert": holding("distilbert", config_json='{"model_type": "distilbert"}'),
        "typeless": holding("typeless", config_json="{}"),
        "list": holding("list", config_json="[1]"),
        "half": holding("half", config_json='{"model_type": "be'),
        "decoder": like("pretrained", "decoder", is_decoder=True),
        "relative": like("pretrained", "relative", position_embedding_type="relative_key"),
        "resized": like("pretrained", "resized", hidden_size=32),
        "deeper": like("pretrained", "deeper", num_hidden_layers=6),
        "garbage": garbage,
        "cut": cut,
        "bare": bare,
        "mute": mute,
        "blank": blank,
        "torn": torn,
        "fields": fields,
        "words": words,
        "unread": unread,
        "added": root / "added",
        "typed": like("classifier", "typed", classifier_dropout="x"),
        "headless": like("pretrained", "headless", id2label={"0": "good", "1": "bad"}),
        "deep": make_checkpoint(root / "deep", labels, num_hidden_layers=6),
        "wide": make_checkpoint(root / "wide", labels, hidden_size=32),
        "three": make_checkpoint(root / "three", ("good", "bad", "ugly")),
        "swapped": make_checkpoint(root / "swapped", ("bad", "good")),
        "folder": holding("folder", notes_txt="mine"),
        "empty": holding("empty"),
        "file": root / "header.csv",
        "root": root,
        "data": data,
        "classes": " ".join(sources["classes"]),
        "regression": " ".join(sources["regression"]),
        "latency": " ".join(latency),
    }


@pytest.fixture
def fails(refused, places, tmp_path):
    """`fails(command)`: its error, with `{out}` a new folder that must not be made."""

    def run(command):
        out = tmp_path / "new" / "out"
        error = refused(*shlex.split(command.format(**places, out=out)))
        assert list(tmp_path.iterdir()) == []
        return error

    return run


def cases(*table):
    return pytest.mark.parametrize(
        ("command", "message"), [case[1:] for case in table], ids=[case[0] for case in table]
    )


# --- data -----------------------------------------------------------------------------------------


@cases(
    ("unknown column", "{classes} --text-column txt", "has no column 'txt'; its columns are text"),
    ("unknown label column", "{classes} --label-column y", "its columns are text, label"),
    ("unknown pair column", "{classes} --pair-column z", "has no column 'z'"),
    ("empty file", f"--train-file {{root}}/empty.csv {OWN}", "empty.csv is empty"),
    ("no rows", f"--train-file {{root}}/header.csv {OWN}", "header.csv has no rows"),
    ("no such file", f"--train-file {{root}}/no.csv {OWN}", "no.csv: No such file"),
    ("a folder", f"--train-file {{empty}} {OWN}", "unknown suffix"),
    ("unknown suffix", f"--train-file {{root}}/unsuffixed {OWN}", ".csv, .tsv, .jsonl"),
    ("torn row", f"--train-file {{root}}/torn.csv {OWN}", "line 2: 3 fields"),
    ("half a pair", f"--train-file {{root}}/half.jsonl {OWN}", r"label '\ud800' must be text"),
    ("one class", f"--train-file {{root}}/one.csv {OWN}", "every label is 'bad'"),
    (
        "label of the development file not in the training file",
        f"--train-file {{data}}/train.csv --dev-file {{root}}/ugly.csv {OWN}",
        "ugly.csv, line 2: label 'ugly' is not in the label set (bad, good)",
    ),
    (
        "not a number",
        "--train-file {root}/words.csv --text-column text --label-column score --regression "
        "--max-length 16",
        "label 'high' is not a finite number",
    ),
    ("task without a folder", "--task sst2 --max-length 16", "--task needs --data-dir"),
    ("task without its folder", "--task sst2 --data-dir {root}/x --max-length 16", "not a folder"),
    ("task without its files", "--task sst2 --data-dir {empty} --max-length 16", "train.tsv"),
    ("unknown task", "--task nope --data-dir {root} --max-length 16", "choose one of cola, sst2"),
    ("two sources", "{classes} --task sst2", "got --task and --train-file"),
    ("no source", "--max-length 16", "got none of them"),
    ("no column named", "--train-file {data}/train.csv --max-length 16", "needs --text-column"),
    ("unknown metric", "{classes} --metric bleu", "choose one of accuracy, accuracy_f1, f1"),
    ("metric of the other kind", "{classes} --metric spearman", "unknown classification metric"),
    ("no room for text", "{classes} --max-length 2", "max_length must be above 2"),
)
@pytest.mark.parametrize("program", ["finetune {pretrained}", "fit {latency} --model {pretrained}"])
def test_data(fails, program, command, message):
    assert message in fails(f"{program} {command} --output {{out}}")


@cases(
    (
        "other label",
        f"{{classifier}} --dev-file {{root}}/ugly.csv {OWN}",
        "label 'ugly' is not one",
    ),
    ("classes for regression", "{regressor} {classes}", "predicts a number"),
    ("regression for classes", "{classifier} {regression}", "tells 2 classes apart"),
    ("unnamed classes", "{pretrained} {classes}", "name its classes in config.json"),
    ("no head", "{headless} {classes}", "has no classifier.bias"),
    ("no column named", "{classifier} --dev-file x.csv --max-length 16", "--dev-file needs --text"),
)
@pytest.mark.parametrize("program", ["evaluate {latency}", "rewire --output {{out}}"])
def test_data_and_checkpoint(fails, program, command, message):
    assert message in fails(f"{program} {command}".replace("{{out}}", "{out}"))


@pytest.mark.usefixtures("places")
def test_data_set_that_does_not_load(fails):
    pytest.importorskip("datasets", reason="the datasets library is an extra")
    error = fails(f"finetune {{pretrained}} --dataset {{empty}} {OWN} --output {{out}}")
    assert "cannot load data set" in error


# --- checkpoints ----------------------------------------------------------------------------------

CHECKPOINTS = cases(
    ("not a checkpoint", "{data}", "is not a checkpoint: it has no config.json"),
    ("empty folder", "{empty}", "is not a checkpoint: it has no config.json"),
    ("a file", "{file}", "is a file; name the folder of a checkpoint"),
    ("no such folder", "{root}/nope", "nope does not exist"),
    ("no such relative folder", "./nope", "./nope does not exist"),
    ("no such deep folder", "a/b/c", "a/b/c does not exist"),
    ("no such folder or hub id", "nope/nope", "nope/nope is not a folder, and from the hub it"),
    ("gpt2", "{gpt2}", "model type 'gpt2'; allowed are bert, roberta"),
    ("distilbert", "{distilbert}", "model type 'distilbert'; allowed are bert, roberta"),
    ("nothing configured", "{typeless}", "holds no config.json, or an empty one"),
    ("configuration not an object", "{list}", "does not load as a checkpoint"),
    ("configuration cut short", "{half}", "not a valid JSON"),
    ("decoder", "{decoder}", "is a decoder"),
    ("relative positions", "{relative}", "relative_key position embeddings"),
)
WEIGHTS = cases(
    ("other size", "{resized}", "of the size that its config.json says; copy or save it again"),
    (
        "missing layers",
        "{deeper}",
        "has no dynabert.encoder.layer.4.attention.norm.bias of the size",
    ),
    ("garbage", "{garbage}", "model.safetensors cannot be read"),
    ("cut short", "{cut}", "model.safetensors cannot be read"),
    ("no weights", "{bare}", "holds no weights"),
    ("no tokenizer", "{mute}", "has no tokenizer; copy that of its pretrained model into it"),
    ("no words", "{blank}", "has no tokenizer"),
    ("damaged tokenizer", "{torn}", "has no tokenizer that loads"),
    ("tokenizer without its parts", "{fields}", "has no tokenizer that loads"),
)


@CHECKPOINTS
@pytest.mark.parametrize(
    "program",
    [
        f"fit {UNREAD} --output {{out}} --model",
        f"finetune {UNREAD} --output {{out}}",
        f"rewire {UNREAD} --output {{out}}",
        f"train-width {UNREAD} --teacher {{classifier}} --output {{out}}",
        f"train-final {UNREAD} --output {{out}} ",
        f"evaluate {UNREAD}",
        "export --subnet w0.50-d0.50 --output {out}",
        "info",
    ],
    ids=lambda program: program.split()[0],
)
def test_checkpoint(fails, program, command, message):
    assert message in fails(f"{program} {command}")


@CHECKPOINTS
def test_teacher(fails, command, message):
    program = f"train-depth {{classifier}} {UNREAD} --output {{out}} --teacher"
    assert message in fails(f"{program} {command}")


@WEIGHTS
@pytest.mark.parametrize(
    "program",
    ["fit {classes} {latency} --output {out} --model", "finetune {classes} --output {out}"],
    ids=["fit", "finetune"],
)
def test_weights(fails, program, command, message):
    assert message in fails(f"{program} {command}")


@WEIGHTS
def test_weights_of_an_export(fails, command, message):
    assert message in fails(f"export --subnet w0.50-d0.50 --output {{out}} {command}")


def test_a_path_is_not_looked_up(fails, monkeypatch):
    """With the hub allowed: what can only be a path must not open a connection."""

    def refuse(*args, **kwargs):
        raise AssertionError("opened a connection")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for path in ("./nope", "../nope", "/nope/nope", "~/nope", "a/b/c", "nope/"):
        assert f"{path} does not exist" in fails(f"evaluate {path} {UNREAD}")


# --- sub-networks ---------------------------------------------------------------------------------


@cases(
    ("no head", "--widths 1,0.1", "width must keep 1 to 4 heads, got 0.1 (0 heads)"),
    ("no layer", "--depths 1,0.1", "depth must keep 1 to 4 layers, got 0.1 (0 layers)"),
    ("zero", "--widths 0", "--widths: must be above 0 and at most 1 each, got 0"),
    ("above one", "--depths 1.5", "--depths: must be above 0 and at most 1 each, got 1.5"),
    ("not a number", "--widths nan", "got nan"),
    ("no number", "--widths wide", "numbers separated by commas, like 1,0.75,0.5, got 'wide'"),
)
@pytest.mark.parametrize(
    "program",
    [
        f"fit --model {{pretrained}} {UNREAD} {{latency}} --output {{out}}",
        f"train-depth {{classifier}} --teacher {{classifier}} {UNREAD} --output {{out}}",
        f"train-final {{classifier}} {UNREAD} --output {{out}}",
        f"evaluate {{classifier}} {UNREAD} {{latency}}",
        "info {classifier}",
    ],
    ids=lambda program: program.split()[0],
)
def test_multipliers(fails, program, command, message):
    assert message in fails(f"{program} {command}")


@cases(
    ("malformed", "w0.5", "is written like w0.50-d0.75 or l0+2-h12+6-n3072+768"),
    ("no head", "w0.10-d1.00", "width must keep 1 to 4 heads"),
    ("above one", "w1.50-d1.00", "width must be in (0, 1], got 1.5"),
    ("layer beyond the last", "l0+9-h1+1-n1+1", "layers must be in 0 to 3, got 9"),
    ("too many heads", "l0-h9-n1", "heads of layer 0 must be in 1 to 4, got 9"),
    ("too many neurons", "l2-h1-n41", "neurons of layer 2 must be in 1 to 40, got 41"),
    ("no heads", "l0-h0-n1", "heads of layer 0 must be in 1 to 4, got 0"),
    ("descending layers", "l1+0-h1+1-n1+1", "layers must be strictly ascending"),
    ("not one entry a layer", "l0+1-h1-n1", "2 layers, 1 heads, 1 neurons"),
)
@pytest.mark.parametrize(
    "program",
    [
        "export {classifier} --output {out} --subnet",
        f"evaluate {{classifier}} {UNREAD} {{latency}} --subnets w1.00-d1.00,",
    ],
    ids=["export", "evaluate"],
)
def test_subnet(fails, program, command, message):
    assert message in fails(program + ("" if program.endswith(",") else " ") + command)


# --- values, lengths, teachers, folders -----------------------------------------------------------


@cases(
    ("training examples", "--max-train 0", "argument --max-train: must be at least 1, got 0"),
    ("batch size", "--batch-size 0", "argument --batch-size: must be at least 1, got 0"),
    ("half a batch", "--batch-size 1.5", "argument --batch-size: must be a whole number"),
    ("negative rate", "--learning-rate -0.1", "--learning-rate: must be above 0, got -0.1"),
    ("rate not a number", "--learning-rate nan", "--learning-rate: must be above 0, got nan"),
    ("endless rate", "--learning-rate inf", "--learning-rate: must be above 0, got inf"),
    ("no epochs", "--epochs 0", "--epochs: must be above 0"),
    ("no steps", "--max-steps 0", "--max-steps: must be at least 1"),
    ("warm-up", "--warmup 1", "--warmup: must be at least 0 and below 1, got 1"),
    ("decay", "--weight-decay -1", "--weight-decay: must be at least 0"),
    ("clipping", "--max-grad-norm -1", "--max-grad-norm: must be at least 0"),
    ("accumulation", "--gradient-accumulation 0", "--gradient-accumulation: must be at least 1"),
    ("evaluation batch", "--eval-batch-size 0", "--eval-batch-size: must be at least 1"),
    ("precision", "--precision int4", "--precision: invalid choice: 'int4'"),
    ("saving", "--save-every -1", "--save-every: must be at least 0"),
    ("seed", "--seed -1", "--seed: must be at least 0"),
    ("length", "--max-length 0", "--max-length: must be at least 1"),
    ("length beyond the model's", "--max-length 25", "max_length must be at most 24"),
)
@pytest.mark.parametrize(
    "program",
    [
        f"fit --model {{pretrained}} {UNREAD} {{latency}} --output {{out}}",
        f"finetune {{pretrained}} {UNREAD} --output {{out}}",
        f"train-width {{classifier}} --teacher {{classifier}} {UNREAD} --output {{out}}",
    ],
    ids=lambda program: program.split()[0],
)
def test_values(fails, program, command, message):
    assert message in fails(f"{program} {command}")


@cases(
    ("batch", "--latency-batch 0", "--latency-batch: must be at least 1"),
    ("rounds", "--latency-rounds 0", "--latency-rounds: must be at least 1"),
    ("no length", "--latency-length 0", "--latency-length: must be at least 1"),
    ("length beyond the model's", "--latency-length 25", "latency_length must be at most 24"),
)
@pytest.mark.parametrize(
    "program",
    [
        f"fit --model {{pretrained}} {UNREAD} --output {{out}}",
        f"evaluate {{classifier}} {UNREAD}",
    ],
    ids=lambda program: program.split()[0],
)
def test_latency(fails, program, command, message):
    assert message in fails(f"{program} {command}")


@cases(
    ("epochs", "--final-epochs 9", "--final-epochs needs --final"),
    ("batches", "--final-batch-size 9", "--final-batch-size needs --final"),
    ("rate", "--final-learning-rate 1", "--final-learning-rate needs --final"),
    ("seed", "--augment-seed 0", "--augment-seed needs --augment"),
    ("words", "--augment-model none", "--augment-model needs --augment"),
    ("drawn", "--drawn-subnets 2", "--drawn-subnets needs --schedule"),
    ("target", "--lambda-hidden 0 --hidden-target output", "--hidden-target has nothing to choose"),
    ("assistant", "--lambda-assistant 1 --depths 1,0.5", "no sub-network has an assistant"),
)
def test_options_that_nothing_reads(fails, command, message):
    assert message in fails(f"fit --model {{pretrained}} {UNREAD} --output {{out}} {command}")


@cases(
    ("layers", "{deep}", "teacher's num_hidden_layers is 6, the student's is 4"),
    ("hidden size", "{wide}", "teacher's hidden_size is 32, the student's is 24"),
    ("more labels", "{three}", "teacher's labels are ['good', 'bad', 'ugly'], the student's are"),
    ("other order", "{swapped}", "teacher's labels are ['bad', 'good'], the student's are"),
    ("regression", "{regressor}", "teacher's labels are ['LABEL_0'], the student's are"),
    ("no loss", "{classifier} --lambda-logits 0 --lambda-hidden 0", "not both 0"),
    ("negative loss", "{classifier} --lambda-hidden -1", "--lambda-hidden: must be at least 0"),
    ("a width of its own", "{classifier} --teacher-width full", "unrecognized arguments"),
    ("labels too", "{classifier} --lambda-labels 1", "unrecognized arguments: --lambda-labels"),
    ("assistant", "{classifier} --lambda-assistant 1", "unrecognized arguments: --lambda-assist"),
)
def test_student_and_teacher(fails, command, message):
    program = f"train-width {{classifier}} {UNREAD} --output {{out}} --teacher"
    assert message in fails(f"{program} {command}")


def test_a_teacher_with_other_words(fails):
    command = "train-width {classifier} --teacher {words} {classes} --output {out} " + SMALL
    assert "has another vocabulary than the student" in fails(command)


def test_a_teacher_without_a_word_that_was_added(cli, places, tmp_path):
    command = "train-width {added} --teacher {classifier} {classes} --output {out} " + SMALL
    assert cli(*shlex.split(command.format(**places, out=tmp_path / "out"))).code == 0


def test_a_value_of_another_type(fails):
    error = fails("export {typed} --subnet w0.50-d0.50 --output {out}")
    assert "does not load as a checkpoint (" in error


def test_a_tokenizer_that_cannot_read_the_texts(fails):
    message = "the tokenizer cannot read the texts (WordLevel error: Missing [UNK] token"
    assert message in fails("evaluate {unread} {classes} {latency}")


def test_a_tokenizer_without_padding(cli, places, tmp_path):
    """It is not needed: what pads a batch is not computed."""
    folder = shutil.copytree(places["classifier"], tmp_path / "x")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))
    command = shlex.split(f"{places['classes']} {places['latency']} --widths 1 --depths 1")
    found = []
    for source in (places["classifier"], folder):
        assert cli("evaluate", source, *command, "--output", tmp_path / "grid").code == 0
        (cell,) = json.loads((tmp_path / "grid" / "grid.json").read_text())["cells"]
        found.append(cell["metrics"])
    assert found[0] == found[1]


@pytest.mark.parametrize("option", ["--teacher-width", "--hidden-target"])
def test_choices_of_distillation(fails, option):
    program = f"train-depth {{classifier}} {UNREAD} --output {{out}} --teacher {{classifier}}"
    assert f"argument {option}: invalid choice: 'narrow'" in fails(f"{program} {option} narrow")


@cases(
    ("not empty", "{folder}", "is not empty; name another folder, or delete it first"),
    ("a file", "{file}", "is a file; name a folder"),
    ("below a file", "{file}/new", "header.csv is a file; name a folder"),
)
@pytest.mark.parametrize(
    "program",
    [
        f"fit --model {{pretrained}} {UNREAD} {{latency}} --output",
        f"finetune {{pretrained}} {UNREAD} --output",
        f"rewire {{classifier}} {UNREAD} --output",
        f"train-width {{classifier}} --teacher {{classifier}} {UNREAD} --output",
        "export {classifier} --subnet w0.50-d0.50 --output",
        f"fit --resume --model {{pretrained}} {{classes}} {{latency}} {SMALL} --output",
        f"finetune --resume {{pretrained}} {UNREAD} --output",
    ],
    ids=["fit", "finetune", "rewire", "train-width", "export", "fit resumed", "finetune resumed"],
)
def test_output(fails, places, program, command, message):
    assert message in fails(f"{program} {command}")
    assert (places["folder"] / "notes.txt").read_text() == "mine"
    assert len(list(places["folder"].iterdir())) == 1


@pytest.mark.parametrize("command", [f"evaluate {{classifier}} {UNREAD} {{latency}}", "quickstart"])
def test_output_that_may_exist(fails, command):
    assert "is a file; name a folder" in fails(f"{command} --output {{file}}")


@cases(
    ("never rewired", "{classifier} --show", "was not rewired: it has no rewiring.safetensors"),
    ("not a folder", "{root}/nope --show", "is not a folder"),
    ("nothing to do", "{classifier}", "rewire needs --output"),
    (
        "accumulation",
        "{classifier} --accumulation never",
        "--accumulation: invalid choice: 'never'",
    ),
    ("batch size", "{classifier} --batch-size 0", "--batch-size: must be at least 1"),
)
def test_rewire(fails, command, message):
    assert message in fails(f"rewire {command}")


def test_a_damaged_rewiring(fails, places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewired") / "x"
    shutil.copytree(places["classifier"], folder)
    (folder / "rewiring.safetensors").write_bytes(b"no")
    assert "rewiring.safetensors cannot be read" in fails(f"rewire {folder} --show")


# --- the functions behind the commands ------------------------------------------------------------


def test_the_library_checks_before_it_works(places, tmp_path):
    """Each is refused before the data, here None, are touched."""
    out, classifier = tmp_path / "out", places["classifier"]
    with pytest.raises(InputError, match=r"max_length must be at most 24, .* got 25"):
        fit(places["pretrained"], None, out, FitOptions(max_length=25))
    with pytest.raises(InputError, match="folder is not empty"):
        rewire_checkpoint(classifier, None, places["folder"])
    for values, message in (
        ({"rewiring": "foo"}, "rewiring must be 'per_batch', 'running' or None, got 'foo'"),
        ({"latency_rounds": 0}, "latency_rounds must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            fit(places["pretrained"], None, out, FitOptions(**{"max_length": 16, **values}))
    student, teacher = load_model(classifier), load_model(places["swapped"])
    with pytest.raises(InputError, match="the teacher's labels are"):
        run_stage(stages()["width"], student, None, out, teacher=teacher)
    assert list(tmp_path.iterdir()) == []
