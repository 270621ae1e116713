from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynabert_fast.data.encoding import Collator
from dynabert_fast.errors import InputError
from dynabert_fast.evaluation import (
    Cell,
    Grid,
    Latency,
    compute_metrics,
    count_flops,
    count_parameters,
    evaluate_grid,
    make_batches,
    predict,
    score_grid,
    total_score,
)
from dynabert_fast.evaluation import grid as grid_module
from dynabert_fast.evaluation.grid import count_noun, format_quantity, format_score
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.subnet import Subnet, grid

LENGTHS = (3, 11, 7, 1, 11, 5, 2, 9, 4, 13, 6)


class Rows(list):
    """Encoded examples without a tokenizer."""

    @property
    def lengths(self) -> list[int]:
        return [len(item["input_ids"]) for item in self]


class CountingCollator(Collator):
    calls = 0

    def __call__(self, items: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        return super().__call__(items)


def make_rows(backbone: str = "bert", regression: bool = False) -> Rows:
    rng = np.random.default_rng(3)
    rows = Rows()
    for i, n in enumerate(LENGTHS):
        item = {"input_ids": rng.integers(2, 60, n).tolist(), "attention_mask": [1] * n}
        if backbone == "bert":
            item["token_type_ids"] = [0] * (n // 2) + [1] * (n - n // 2)
        rows.append({**item, "labels": i / 4 if regression else i % 2})
    return rows


def make_model(backbone: str = "bert", num_labels: int = 2) -> DynaBertForSequenceClassification:
    torch.manual_seed(5)
    config = DynaBertConfig(
        backbone=backbone,
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0 if backbone == "bert" else 1,
        num_labels=num_labels,
        initializer_range=0.5,  # logits far apart, so that widths and rows cannot be mixed up
    )
    return DynaBertForSequenceClassification(config)


def make_cell(
    width: float | None = 1.0,
    depth: float | None = 1.0,
    score: float = 0.5,
    ms: float = 2.0,
    flops: int = 10**9,
    **metrics: float,
) -> Cell:
    name = f"w{width:.2f}-d{depth:.2f}" if width else "l0-h3-n7"
    scores = {"accuracy": score, **metrics}
    return Cell(name, width, depth, scores, 12_300_000, flops, Latency(ms, ms * 0.9, ms * 1.2))


def make_grid(*cells: Cell, **changes: Any) -> Grid:
    environment = {
        "device": "Some CPU",
        "cpu": "Some CPU",
        "threads": "2",
        "dtype": "float32",
        "python": "3.11.0",
        "torch": "2.13.0",
        "transformers": "5.12.0",
        "dynabert_fast": "0.1.0",
    }
    defaults = {
        "model": "tiny",
        "task": "toy",
        "metric": "accuracy",
        "examples": 1200,
        "tokens": 34000,
        "latency_batch_size": 1,
        "latency_length": 64,
        "latency_rounds": 20,
        "environment": environment,
    }
    return Grid(cells=cells, **{**defaults, **changes})


# --- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
@pytest.mark.parametrize("backbone", ["bert", "roberta"])
def test_predictions_are_those_of_single_examples_in_order(backbone: str, batch_size: int) -> None:
    model, rows = make_model(backbone).eval(), make_rows(backbone)
    batches = make_batches(rows, Collator(model.config.pad_token_id), batch_size)
    for subnet in (Subnet.full(model.config), Subnet.from_multipliers(model.config, 0.25, 0.5)):
        logits = predict(model, batches, subnet)
        assert logits.dtype == np.float32
        with torch.no_grad():
            for i, row in enumerate(rows):
                inputs = {k: torch.tensor([v]) for k, v in row.items() if k != "labels"}
                alone = model(**inputs, subnet=subnet).logits[0].numpy()
                np.testing.assert_allclose(logits[i], alone, rtol=1e-4, atol=1e-5)


def test_batches_are_sorted_and_keep_the_labels_in_order() -> None:
    rows = make_rows(regression=True)
    batches = make_batches(rows, Collator(0), batch_size=4)
    assert [b["input_ids"].shape for b in batches.inputs] == [(4, 13), (4, 7), (3, 3)]
    assert all("labels" not in b for b in batches.inputs)
    assert batches.labels.tolist() == [row["labels"] for row in rows]
    assert batches.tokens == sum(LENGTHS)
    assert sorted(batches.order.tolist()) == list(range(len(rows)))


def test_the_data_are_collated_once_for_all_subnets() -> None:
    model, collator = make_model(), CountingCollator(0)
    batches = make_batches(make_rows(), collator, batch_size=4)
    score_grid(model, batches, grid(model.config), "accuracy", progress=False)
    assert collator.calls == 3


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mode_is_kept_and_training_goes_on(training: bool) -> None:
    model = make_model().train(training)
    model.classifier.eval()
    batches = make_batches(make_rows(), Collator(0))
    subnet = Subnet.full(model.config)
    first = predict(model, batches, subnet)
    np.testing.assert_array_equal(first, predict(model, batches, subnet))  # no dropout
    assert model.training is training
    assert model.dynabert.training is training
    assert not model.classifier.training
    # What ran without gradients must not be in the way of a training step.
    model(input_ids=torch.tensor([[5, 6, 7]]), subnet=subnet).logits.sum().backward()
    assert all(p.grad is not None for p in model.classifier.parameters())


def test_bfloat16_logits_become_float32() -> None:
    model = make_model().to(torch.bfloat16)
    logits = predict(model, make_batches(make_rows(), Collator(0)), Subnet.full(model.config))
    assert logits.dtype == np.float32


@pytest.mark.gpu
def test_predictions_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, batches = make_model(), make_batches(make_rows(), Collator(0), 4)
    subnet = Subnet.from_multipliers(model.config, 0.5, 0.5)
    expected = predict(model, batches, subnet)
    np.testing.assert_allclose(predict(model.cuda(), batches, subnet), expected, atol=1e-3)


def test_scores_are_the_metrics_of_each_subnets_predictions() -> None:
    model = make_model()
    subnets = grid(model.config)
    batches = make_batches(make_rows(), Collator(0), 4)
    scores = score_grid(model, batches, subnets, "accuracy_f1", progress=False)
    assert list(scores) == [str(s) for s in subnets]
    for subnet in subnets:
        logits = predict(model, batches, subnet)
        assert scores[str(subnet)] == compute_metrics("accuracy_f1", logits, batches.labels)
    assert total_score(scores) == pytest.approx(sum(s["accuracy"] for s in scores.values()))


def record_calls(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """What each forward pass ran, and on how many sequences."""
    calls, forward = [], model.forward

    def record(*, subnet: Any, **inputs: torch.Tensor) -> Any:
        calls.append((subnet, len(inputs["input_ids"])))
        return forward(**inputs, subnet=subnet)

    monkeypatch.setattr(model, "forward", record)
    return calls


@pytest.mark.parametrize("regression", [False, True], ids=["classes", "regression"])
@pytest.mark.parametrize("backbone", ["bert", "roberta"])
def test_scores_of_all_together_are_those_of_each(backbone: str, regression: bool) -> None:
    model = make_model(backbone, num_labels=1 if regression else 2).double()
    metric = "spearman" if regression else "accuracy_f1"
    explicit = Subnet.from_extents(model.config, (0, 2), (1, 3), (5, 32))
    # Out of order, and one twice.
    subnets = [explicit, *grid(model.config)[::-1], explicit]
    batches = make_batches(make_rows(backbone, regression), Collator(1), 3)
    scores = score_grid(model, batches, subnets, metric, progress=False)
    alone = {s: score_grid(model, batches, [s], metric, progress=False) for s in subnets}
    assert list(scores) == list(dict.fromkeys(map(str, subnets)))
    for subnet in subnets:
        logits = predict(model, batches, subnet)
        want = compute_metrics(metric, logits, batches.labels)
        assert scores[str(subnet)] == pytest.approx(want)
        assert alone[subnet][str(subnet)] == pytest.approx(want)
    assert len({tuple(values.values()) for values in scores.values()}) > 3


def test_each_batch_is_computed_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    calls = record_calls(model, monkeypatch)
    batches = make_batches(make_rows(), Collator(0), 4)
    score_grid(model, batches, grid(model.config), "accuracy", progress=False)
    assert [count for _, count in calls] == [4, 4, 3]
    assert all(tree.subnets == tuple(grid(model.config)) for tree, _ in calls)


def test_a_large_batch_is_split_so_that_memory_is_that_of_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, subnets = make_model(), grid(make_model().config)
    batches = make_batches(make_rows(), Collator(0), 11)  # 11 sequences of up to 13 tokens
    want = score_grid(model, batches, subnets, "matthews", progress=False)
    for most, sizes in {
        8 * 13 * 5: [5, 5, 1],  # 8 nodes in the layer that has most
        8 * 13 * 5 - 1: [4, 4, 3],
        1: [1] * 11,  # the batch itself is 143 rows: one sequence of 8 nodes takes 104
    }.items():
        monkeypatch.setattr(grid_module, "_ROWS", most)
        with monkeypatch.context() as patch:
            calls = record_calls(model, patch)
            assert score_grid(model, batches, subnets, "matthews", progress=False) == want
            assert [count for _, count in calls] == sizes
            calls.clear()
            # A sub-network by itself is never split.
            score_grid(model, batches, subnets[:1], "matthews", progress=False)
            assert [count for _, count in calls] == [11]


def test_an_engine_runs_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine(torch.nn.Module):
        """Takes a `Subnet`, as `PackedModel` does."""

        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *, subnet: Subnet, **inputs: torch.Tensor) -> Any:
            assert isinstance(subnet, Subnet)
            return self.model(**inputs, subnet=subnet)

    model = make_model()
    batches = make_batches(make_rows(), Collator(0), 4)
    subnets = grid(model.config)
    want = score_grid(model, batches, subnets, "accuracy", progress=False)
    assert score_grid(Engine(model), batches, subnets, "accuracy", progress=False) == want


@pytest.mark.parametrize("together", [True, False])
def test_the_bar_is_full_in_the_end(
    together: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = make_model(), make_batches(make_rows(), Collator(0), 4)
    if not together:
        monkeypatch.setattr(grid_module, "_predict_all", lambda *_: None)
    score_grid(model, batches, grid(model.config), "accuracy")
    assert "36/36" in capsys.readouterr().err


def test_an_unknown_metric_fails_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    calls = record_calls(model, monkeypatch)
    with pytest.raises(InputError, match="nonsense"):
        score_grid(model, make_batches(make_rows(), Collator(0)), grid(model.config), "nonsense")
    assert not calls


def test_progress_bar_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = make_model(), make_batches(make_rows(), Collator(0))
    subnets = grid(model.config)
    score_grid(model, batches, subnets, "accuracy", progress=False)
    assert capsys.readouterr().err == ""
    score_grid(model, batches, subnets, "accuracy")
    assert "12/12" in capsys.readouterr().err


# --- the grid ------------------------------------------------------------------------------------


def evaluate(model: DynaBertForSequenceClassification, subnets: Any, **changes: Any) -> Grid:
    options = {
        "metric": "accuracy",
        "latency_length": 8,
        "warmup": 0,
        "rounds": 2,
        "progress": False,
        "model_name": "tiny",
        "task": "toy",
        **changes,
    }
    return evaluate_grid(model, make_rows(), Collator(0), subnets, **options)


def test_evaluate_grid_fills_every_column() -> None:
    model = make_model().train()
    explicit = Subnet.from_extents(model.config, layers=(0, 2), heads=(1, 3), neurons=(5, 32))
    subnets = (*grid(model.config), explicit)
    found = evaluate(model, subnets, metric="matthews", latency_batch_size=2)
    assert model.training
    assert found.metric == "matthews"
    assert (found.examples, found.tokens) == (len(LENGTHS), sum(LENGTHS))
    assert (found.latency_batch_size, found.latency_length, found.latency_rounds) == (2, 8, 2)
    assert (found.model, found.task) == ("tiny", "toy")
    assert found.environment["dtype"] == "float32"
    scores = score_grid(
        model, make_batches(make_rows(), Collator(0)), subnets, "matthews", progress=False
    )
    for subnet, cell in zip(subnets, found.cells, strict=True):
        assert cell.subnet == str(subnet)
        assert (cell.width, cell.depth) == (subnet.width, subnet.depth)
        assert cell.parameters == count_parameters(model.config, subnet)
        assert cell.flops == count_flops(model.config, subnet, 8)
        assert cell.metrics == scores[str(subnet)]
        assert cell.latency.median_ms > 0
    assert found.total == pytest.approx(total_score(scores))


def test_each_cell_has_its_own_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(_: object, subnets: Sequence[Subnet], *__: object, **___: object) -> Any:
        return {subnet: Latency(i + 1.0, 0.5, 9.5) for i, subnet in enumerate(subnets)}

    monkeypatch.setattr(grid_module, "measure_latency", measured)
    model = make_model()
    cells = evaluate(model, grid(model.config)).cells
    assert [cell.latency.median_ms for cell in cells] == list(range(1, 13))


def test_speed_up_is_over_the_whole_model() -> None:
    cells = (make_cell(1.0, 0.5, ms=5.0), make_cell(0.5, 1.0, ms=4.0), make_cell(ms=12.0))
    found = make_grid(*cells)
    assert found.full is cells[2]
    assert [found.speed_up(cell) for cell in cells] == [2.4, 3.0, 1.0]
    assert make_grid(*cells[:2]).speed_up(cells[0]) is None


def test_subnets_of_equal_extents_keep_their_own_cells() -> None:
    model = make_model()
    equal = [Subnet.from_multipliers(model.config, 1.0, depth) for depth in (1.0, 0.9)]
    assert equal[0] == equal[1]
    cells = evaluate(model, equal).cells
    assert [cell.subnet for cell in cells] == ["w1.00-d1.00", "w1.00-d0.90"]


BAD = [
    pytest.param({"metric": "bleu"}, "unknown metric 'bleu'", id="metric"),
    pytest.param({"batch_size": 0}, "batch_size must be at least 1, got 0", id="batch_size"),
    pytest.param({"latency_length": 33}, "length must be at most 32", id="latency_length"),
    pytest.param({"subnets": ()}, "at least 1, got 0", id="no-subnet"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    model = make_model()
    given = {"subnets": grid(model.config), **changes}
    with pytest.raises(InputError, match=message):
        evaluate(model, **given)


def test_nothing_to_evaluate() -> None:
    model = make_model()
    with pytest.raises(InputError, match="at least one example"):
        make_batches(Rows(), Collator(0))
    batches = make_batches(make_rows(), Collator(0))
    with pytest.raises(InputError, match="at least one sub-network"):
        score_grid(model, batches, (), "accuracy")
    with pytest.raises(InputError, match="at least one sub-network"):
        make_grid()


# --- Pareto front --------------------------------------------------------------------------------

FRONTS = [  # (score, ms) of each cell -> indices on the front, cheapest first
    pytest.param([(0.9, 4), (0.8, 2), (0.7, 1)], [2, 1, 0], id="all"),
    pytest.param([(0.9, 4), (0.8, 5), (0.9, 6)], [0], id="one-dominates"),
    pytest.param([(0.9, 4), (0.9, 2)], [1], id="equal-score"),
    pytest.param([(0.9, 4), (0.8, 4)], [0], id="equal-cost"),
    pytest.param([(0.9, 4), (0.9, 4), (0.8, 5)], [0, 1], id="twins"),
    pytest.param([(0.5, 1)], [0], id="single"),
]


@pytest.mark.parametrize("cost", ["latency", "flops"])
@pytest.mark.parametrize(("points", "expected"), FRONTS)
def test_pareto(points: list[tuple[float, float]], expected: list[int], cost: str) -> None:
    cells = []
    for i, (score, price) in enumerate(points):
        # The other cost is the same for all and must not matter.
        other = {"ms": price, "flops": 7} if cost == "latency" else {"ms": 7, "flops": int(price)}
        cells.append(replace(make_cell(score=score, **other), subnet=str(i)))
    assert [int(cell.subnet) for cell in make_grid(*cells).pareto(cost)] == expected


# --- files ---------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path: Path) -> None:
    before = make_grid(
        make_cell(f1=1 / 3), make_cell(None, None, f1=0.25), model="naïve <model>", task="a\nb"
    )
    assert Grid.from_json(before.to_json()) == before
    before.save(tmp_path / "new" / "grid.json")
    assert Grid.load(tmp_path / "new" / "grid.json") == before
    assert os.listdir(tmp_path / "new") == ["grid.json"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("not json", id="no-json"),
        pytest.param("[]", id="list"),
        pytest.param("{}", id="no-cells"),
        pytest.param('{"cells": [{}]}', id="empty-cell"),
        pytest.param('{"cells": [], "colour": 1}', id="unknown-key"),
        pytest.param('{"cells": 3}', id="cells-number"),
    ],
)
def test_what_is_not_a_grid_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected the JSON of an evaluation grid"):
        Grid.from_json(text)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "grid.json"
    old = make_grid(make_cell(score=0.25))
    old.save(path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        make_grid(make_cell(score=0.75)).save(path)
    monkeypatch.undo()
    assert Grid.load(path) == old
    assert os.listdir(tmp_path) == ["grid.json"]


def test_a_metric_that_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    with pytest.raises(ValueError, match="JSON compliant"):
        make_grid(make_cell(score=float("nan"))).save(path)
    assert not path.exists()


def test_json_is_plain() -> None:
    data = json.loads(make_grid(make_cell()).to_json())
    assert data["cells"][0]["latency"]["median_ms"] == 2.0
    assert data["metric"] == "accuracy"


# --- Markdown ------------------------------------------------------------------------------------


def test_markdown() -> None:
    table = make_grid(
        make_cell(1.0, 1.0, 0.912, ms=12.0, flops=22_300_000_000),
        make_cell(0.5, 1.0, 0.9, ms=4.8, flops=11_100_000_000),
        make_cell(1.0, 0.5, 0.88, ms=5.0, flops=11_200_000_000),
    ).to_markdown()
    assert table == (
        "### tiny, toy\n\n"
        "| accuracy, %: width \\ depth | 1 | 0.5 |\n"
        "| :-- | --: | --: |\n"
        "| **1** | 91.2 | 88.0 |\n"
        "| **0.5** | 90.0 | – |\n\n"
        "| sub-network | accuracy, % | parameters, M | GFLOPs | latency, ms | speed-up "
        "| Pareto in |\n"
        "| :-- | --: | --: | --: | --: | --: | --: |\n"
        "| w1.00-d1.00 | 91.2 | 12.3 | 22.3 | 12.0 | 1.0× | latency, FLOPs |\n"
        "| w0.50-d1.00 | 90.0 | 12.3 | 11.1 | 4.80 | 2.5× | latency, FLOPs |\n"
        "| w1.00-d0.50 | 88.0 | 12.3 | 11.2 | 5.00 | 2.4× |  |\n\n"
        "Metrics on 1,200 examples (34,000 tokens). Latency: median of 20 passes, batch 1, "
        "length 64, float32, on Some CPU, 2 CPU threads. GFLOPs: one sequence of that length. "
        "Pareto: no other sub-network costs as little and scores as well, and is better in one.\n\n"
        "dynabert_fast 0.1.0, torch 2.13.0, transformers 5.12.0, Python 3.11.0.\n"
    )


def test_markdown_of_explicit_extents_is_a_list_only() -> None:
    table = make_grid(make_cell(None, None), metric="accuracy").to_markdown()
    assert "width" not in table
    assert "| l0-h3-n7 | 50.0 | 12.3 | 1.00 | 2.00 | – | latency, FLOPs |" in table


def test_markdown_shows_every_metric_in_its_unit() -> None:
    cell = replace(make_cell(), metrics={"neg_mse": -0.1234, "spearman": 0.875})
    table = make_grid(cell, metric="neg_mse").to_markdown()
    assert "| sub-network | negative MSE | spearman, % |" in table
    assert "| w1.00-d1.00 | -0.123 | 87.5 |" in table


def test_markdown_escapes_names() -> None:
    table = make_grid(make_cell(), model="a|b\n# c", task="<i>_x_").to_markdown()
    assert table.startswith("### a\\|b # c, \\<i>\\_x\\_\n")


def test_a_nameless_grid_has_a_heading() -> None:
    assert make_grid(make_cell(), model="", task="").heading == "Evaluation"


NUMBERS = [
    pytest.param(format_score("accuracy", 0.98765), "98.8", id="fraction"),
    pytest.param(format_score("neg_mse", -1.5), "-1.500", id="error"),
    pytest.param(format_quantity(181.72), "181.7", id="hundreds"),
    pytest.param(format_quantity(5.588), "5.59", id="ones"),
    pytest.param(format_quantity(0.01234), "0.0123", id="small"),
    pytest.param(count_noun(1, "token"), "1 token", id="singular"),
    pytest.param(count_noun(2000, "pass", "passes"), "2,000 passes", id="plural"),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_numbers(text: str, expected: str) -> None:
    assert text == expected
