from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from dynabert_fast.evaluation import Grid
from dynabert_fast.models import DynaBertForSequenceClassification

GRID = "--widths 1,0.5 --depths 1,0.5".split()


@pytest.fixture
def evaluate(cli, latency):
    """`evaluate(checkpoint, *options)`: the table, having succeeded."""

    def run(checkpoint, *options):
        result = cli("evaluate", checkpoint, *latency, *options)
        assert result.code == 0, result.err
        return result.out

    return run


def rows(table):
    """The cells of the list of sub-networks, by name."""
    found = (
        line.strip("| ").split(" | ") for line in table.splitlines() if line[:3] in ("| w", "| l")
    )
    return {name: cells for name, *cells in found}


def accuracy(folder, tokenizer, file):
    """Accuracy of the whole model in percent, by the names of its labels."""
    model = DynaBertForSequenceClassification.from_pretrained(folder).eval()
    examples = [line.rsplit(",", 1) for line in file.read_text().splitlines()[1:]]
    batch = tokenizer([text for text, _ in examples], padding=True, return_tensors="pt")
    with torch.no_grad():
        chosen = model(**batch).logits.argmax(-1).tolist()
    right = [
        model.config.id2label[i] == label for i, (_, label) in zip(chosen, examples, strict=True)
    ]
    return 100 * sum(right) / len(right)


def test_prints_the_table_and_writes_nothing(evaluate, checkpoints, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = evaluate(checkpoints["classifier"], *sources["classes"])
    assert table.startswith("### classifier, train\n")
    widths, depths = ("1.00", "0.75", "0.50", "0.25"), ("1.00", "0.75", "0.50")
    assert list(rows(table)) == [f"w{width}-d{depth}" for depth in depths for width in widths]
    assert "| **0.25** |" in table
    assert "batch 1, length 16" in table
    assert list(tmp_path.iterdir()) == []


def test_the_grid_of_a_tiny_checkpoint_is_what_fits(
    evaluate, cli, make_checkpoint, sources, latency, tmp_path
):
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1}
    tiny = make_checkpoint(tmp_path / "tiny", ("good", "bad"), **sizes)
    table = evaluate(tiny, *sources["dev only"])
    assert list(rows(table)) == [f"w{w:.2f}-d{d:.2f}" for d in (1, 0.75) for w in (1, 0.75, 0.5)]
    result = cli("evaluate", tiny, *sources["dev only"], *latency, "--widths", "1,0.25")
    assert result.code == 2
    assert "width must keep 1 to 2 heads, got 0.25 (0 heads)" in result.err


@pytest.mark.parametrize("engine", ["fp32", "int8"])
def test_evaluates_the_engine(evaluate, checkpoints, sources, engine):
    model = rows(evaluate(checkpoints["classifier"], *sources["classes"], *GRID))
    table = evaluate(checkpoints["classifier"], *sources["classes"], *GRID, "--engine", engine)
    assert re.search(rf"length 16, {engine} \(\w+ engine\), on", table)
    packed = rows(table)
    assert list(packed) == list(model)
    # Parameters and FLOPs are the model's; the accuracy is too, in float32.
    assert [cells[1:3] for cells in packed.values()] == [cells[1:3] for cells in model.values()]
    if engine == "fp32":
        assert [cells[0] for cells in packed.values()] == [cells[0] for cells in model.values()]


def test_writes_the_grid_and_the_report(evaluate, checkpoints, sources, tmp_path):
    output = tmp_path / "deep" / "out"
    options = (*sources["classes"], *GRID, "--latency-batch", "2", "--output", output)
    table = evaluate(checkpoints["classifier"], *options)
    assert {path.name for path in output.iterdir()} == {"grid.json", "grid.md", "report.html"}
    grid = Grid.load(output / "grid.json")
    assert grid.to_markdown() == (output / "grid.md").read_text()
    assert grid.to_markdown() in table
    assert (grid.latency_batch_size, grid.latency_length, grid.latency_rounds) == (2, 16, 1)
    assert "<html" in (output / "report.html").read_text()
    assert table.endswith(f"report: {output / 'report.html'}\n")


def test_replaces_an_earlier_evaluation(evaluate, checkpoints, sources, tmp_path):
    (tmp_path / "grid.json").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    evaluate(checkpoints["classifier"], *sources["classes"], *GRID, "--output", tmp_path)
    assert len(Grid.load(tmp_path / "grid.json").cells) == 4
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_labels_are_matched_by_name(evaluate, checkpoints, make_tokenizer, sources, data, tmp_path):
    """The checkpoint numbers good, bad; the data bad, good. Other names turn every answer round."""
    folder = checkpoints["classifier"]
    want = accuracy(folder, make_tokenizer(), data / "dev.csv")
    assert 0 < want < 100
    assert want != 50
    table = evaluate(folder, *sources["classes"], *GRID)
    assert rows(table)["w1.00-d1.00"][0] == f"{want:.1f}"
    swapped = shutil.copytree(folder, tmp_path / "swapped")
    config = json.loads((swapped / "config.json").read_text())
    config |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (swapped / "config.json").write_text(json.dumps(config))
    table = evaluate(swapped, *sources["classes"], *GRID)
    assert rows(table)["w1.00-d1.00"][0] == f"{100 - want:.1f}"


def test_a_development_file_is_enough(evaluate, checkpoints, sources):
    folder = checkpoints["classifier"]
    alone = rows(evaluate(folder, *sources["dev only"], *GRID))
    both = rows(evaluate(folder, *sources["classes"], *GRID))
    assert {k: v[0] for k, v in alone.items()} == {k: v[0] for k, v in both.items()}


def test_a_development_file_of_one_class(evaluate, checkpoints, make_tokenizer, data, tmp_path):
    """What a checkpoint makes of it is a fair question, though nothing can be trained on it."""
    header, *lines = (data / "dev.csv").read_text().splitlines()
    file = tmp_path / "bad.csv"
    file.write_text("\n".join([header, *(line for line in lines if line.endswith(",bad"))]))
    options = ("--dev-file", file, *"--text-column text --label-column label".split())
    folder = checkpoints["classifier"]
    found = rows(evaluate(folder, *options, "--max-length", "16", *GRID))
    assert found["w1.00-d1.00"][0] == f"{accuracy(folder, make_tokenizer(), file):.1f}"


def test_explicit_subnets(evaluate, checkpoints, sources):
    names = ["l0+2-h4+1-n40+3", "w0.50-d0.50", "l3-h2-n13"]
    options = (*sources["dev only"], "--subnets", ", ".join(names))
    assert list(rows(evaluate(checkpoints["classifier"], *options))) == names


@pytest.mark.parametrize("kind", ["regression", "pairs"])
def test_other_kinds_of_task(evaluate, checkpoints, make_checkpoint, sources, tmp_path, kind):
    metrics = {"regression": ["spearman, %", "pearson, %"], "pairs": ["accuracy, %"]}[kind]
    folder = checkpoints["regressor"]
    if kind == "pairs":
        folder = make_checkpoint(tmp_path / "pairs", ("no", "yes"))
    table = evaluate(folder, *sources[kind], *GRID)
    assert f"| sub-network | {' | '.join(metrics)} |" in table


def test_a_published_task(evaluate, make_checkpoint, tmp_path):
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name in ("train", "dev"):
        lines = ["sentence\tlabel", "a great film\t1", "a dull film\t0", "it was fine\t1"]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    checkpoint = make_checkpoint(tmp_path / "model", ("0", "1"))
    options = ("--task", "SST2", "--data-dir", tmp_path / "glue", "--max-length", "16")
    table = evaluate(checkpoint, *options, *GRID)
    assert table.startswith("### model, sst2\n")
    assert "Metrics on 3 examples" in table


def test_a_data_set_read_by_the_datasets_library(evaluate, checkpoints, data, tmp_path):
    pytest.importorskip("datasets", reason="the datasets library is an extra")
    for name, file in (("train", "train.csv"), ("validation", "dev.csv")):
        shutil.copy(data / file, tmp_path / f"{name}.csv")
    options = ("--dataset", tmp_path, "--text-column", "text", "--label-column", "label")
    table = evaluate(checkpoints["classifier"], *options, "--max-length", "16", *GRID)
    assert "Metrics on 18 examples" in table


def test_batch_size_changes_nothing(evaluate, checkpoints, sources):
    one, other = (
        rows(evaluate(checkpoints["classifier"], *sources["classes"], *GRID, *options))
        for options in ((), ("--eval-batch-size", "5"))
    )
    assert {k: v[0] for k, v in one.items()} == {k: v[0] for k, v in other.items()}


def test_full_disk(cli, checkpoints, sources, latency, tmp_path, file_size_limit):
    """The table was printed, the error is one line, and the earlier evaluation is as it was."""
    words = ("evaluate", checkpoints["classifier"], *sources["dev only"], *latency)
    assert cli(*words, *GRID, "--output", tmp_path).code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with file_size_limit(1000):
        result = cli(*words, "--output", tmp_path)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("dynabert-fast: error: ")
    assert "File too large" in result.err
    assert "| w0.25-d0.50 |" in result.out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
