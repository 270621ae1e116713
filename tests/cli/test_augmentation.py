"""`--augment`: only the stages that distil train on augmented texts, also after a stop."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dynabert_fast.cli.main import main
from dynabert_fast.training import pipeline

GRID = "--widths 1,0.5 --depths 1,0.5".split()
STEPS = "--max-steps 2 --learning-rate 1e-2 --batch-size 8".split()
DEPTH_STEPS = "--max-steps 2 --learning-rate 2e-2 --batch-size 2".split()  # the recipe's of STEPS


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def masked_lm(make_hf, make_tokenizer, tmp_path_factory):
    """A folder with random weights."""
    folder = tmp_path_factory.mktemp("models") / "masked"
    tokenizer = make_tokenizer()
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    make_hf("bert", "ForMaskedLM", **size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(checkpoints, sources, latency, masked_lm):
    """`words(output, *options, augment=True)`: the words of `fit`."""

    def make(output, *options, augment=True):
        return [
            *("fit", "--model", str(checkpoints["pretrained"]), "--output", str(output)),
            *(*sources["classes"], *latency, *GRID, *STEPS, *options),
            *(["--augment", "3", "--augment-model", str(masked_lm)] if augment else []),
        ]

    return make


@pytest.fixture(scope="module")
def fitted(words, tmp_path_factory):
    """Folders of two runs: with augmentation and without."""
    root = tmp_path_factory.mktemp("fit")
    for name in ("more", "plain"):
        assert main(words(root / name, augment=name == "more")) == 0
    return root / "more", root / "plain"


def test_only_stages_that_distil_see_more_texts(fitted, sources):
    more, plain = fitted
    assert not (plain / "augmented.json").exists()
    found = json.loads((more / "augmented.json").read_text())
    assert 24 < len(found["texts"]) == len(found["labels"]) <= 24 * 4
    assert equal(more / "teacher", plain / "teacher")
    for stage in ("width", "dynabert"):
        assert not equal(more / stage, plain / stage)


def test_commands_of_one_stage_train_as_fit_does(fitted, sources, masked_lm, tmp_path):
    more, _ = fitted
    given = [*sources["classes"], *GRID, "--augment", "3", "--augment-model", str(masked_lm)]
    for command, student, teacher, folder, steps in (
        ("train-width", "rewired", "teacher", "width", STEPS),
        ("train-depth", "width", "width", "dynabert", DEPTH_STEPS),
    ):
        output = tmp_path / folder
        names = [str(more / student), "--teacher", str(more / teacher), "--output", str(output)]
        assert main([command, *names, *given, *steps]) == 0
        assert equal(output, more / folder)


def test_a_resumed_fit_reads_the_texts_that_were_made(fitted, words, tmp_path, monkeypatch):
    more, _ = fitted
    run, output = pipeline.run_stage, tmp_path / "out"

    def stopped(stage, *args, **kwargs):
        if stage.name == "depth":
            raise KeyboardInterrupt
        return run(stage, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_stage", stopped)
        assert main(words(output)) != 0
    assert (output / "augmented.json").read_text() == (more / "augmented.json").read_text()
    monkeypatch.setattr(pipeline, "load_masked_lm", None)  # calling it would fail
    assert main(words(output, "--resume")) == 0
    assert equal(output / "dynabert", more / "dynabert")


def test_other_texts_are_other_settings(fitted, words, refused):
    more, plain = fitted
    options = ("--resume", "--augment-seed", "1")
    assert "started with augmentation.seed 0, not 1" in refused(*words(more, *options))
    assert "was started with augmentation.candidates None" in refused(*words(plain, "--resume"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--augment", "3"], "--augment needs --augment-model"),
        (["--augment-model", "x"], "--augment-model needs --augment"),
        (["--augment", "3", "--augment-model", "no/such/folder"], "does not load as a masked"),
    ],
)
def test_refused_before_anything_is_written(words, refused, tmp_path, options, said):
    assert said in refused(*words(tmp_path / "out", *options, augment=False))
    assert not (tmp_path / "out").exists()


def test_an_encoder_without_a_head_is_refused(words, refused, checkpoints, tmp_path):
    options = ["--augment", "3", "--augment-model", str(checkpoints["pretrained"])]
    assert "without the head" in refused(*words(tmp_path / "out", *options, augment=False))
    assert not (tmp_path / "out").exists()
