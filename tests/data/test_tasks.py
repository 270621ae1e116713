from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dynabert_fast.data.tasks import GLUE_TASKS, Task, get_task
from dynabert_fast.errors import InputError


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("sst2", "sst2"),
        ("SST-2", "sst2"),
        ("sts_b", "stsb"),
        ("MNLI-mm", "mnli-mm"),
        ("TREC", "trec"),
    ],
)
def test_get_task_ignores_case_and_dashes(given: str, name: str) -> None:
    assert get_task(given) is GLUE_TASKS[name]


def test_unknown_task_lists_the_names() -> None:
    with pytest.raises(
        InputError, match=r"unknown task 'squad': choose one of cola, sst2, mrpc, .*trec"
    ):
        get_task("squad")


@pytest.mark.parametrize(
    ("name", "metric"),
    [("cola", "matthews"), ("stsb", "spearman"), ("mrpc", "accuracy_f1"), ("qqp", "accuracy_f1")],
)
def test_metrics_that_are_not_plain_accuracy(name: str, metric: str) -> None:
    assert get_task(name).metric == metric
    others = {task.metric for task in GLUE_TASKS.values()} - {"matthews", "spearman", "accuracy_f1"}
    assert others == {"accuracy"}


def test_only_stsb_is_a_regression() -> None:
    assert [name for name, task in GLUE_TASKS.items() if task.regression] == ["stsb"]


def test_a_task_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_task("rte").metric = "f1"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), "label", "accuracy"), "1 or 2 text columns, got 0"),
        ((("a", "b", "c"), "label", "accuracy"), "1 or 2 text columns, got 3"),
        ((("a", "a"), "label", "accuracy"), "must differ, got 'a', 'a', 'label'"),
        ((("a",), "a", "accuracy"), "must differ, got 'a', 'a'"),
        ((("a",), "b", "bleu"), "unknown classification metric 'bleu': choose one of accuracy, "),
        ((("a",), "b", "spearman"), "unknown classification metric 'spearman'"),
        (
            (("a",), "b", "accuracy", True),
            "unknown regression metric 'accuracy': choose .* neg_mse",
        ),
    ],
)
def test_a_task_that_makes_no_sense(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Task("mine", *arguments)
