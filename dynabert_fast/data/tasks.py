"""What a text task is: its columns, its labels, its metric, and for published ones the files it comes in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dynabert_fast.errors import InputError

# Each name is also the first key that `dynabert_fast.evaluation.metrics.compute_metrics` returns for
# it, except that "accuracy_f1" stands for accuracy with F1 beside it. For every one, higher is better.
CLASSIFICATION_METRICS = ("accuracy", "accuracy_f1", "f1", "matthews")
REGRESSION_METRICS = ("spearman", "pearson", "neg_mse")


@dataclass(frozen=True)
class TaskFiles:
    """The files in which a published task is distributed.

    Attributes:
        folder: the folder's usual name, for example ``SST-2``.
        splits: pairs of file names (train, dev); the first pair that is there is read.
        header: the columns of a file that has no header line; None if the first line names them.
        layout: ``tsv`` (no quoting: a quotation mark is text) or ``trec`` (``COARSE:fine question``).
        skip_broken_rows: leave out rows with a wrong number of fields instead of refusing the file.
    """

    folder: str
    splits: tuple[tuple[str, str], ...] = (("train.tsv", "dev.tsv"),)
    header: tuple[str, ...] | None = None
    layout: Literal["tsv", "trec"] = "tsv"
    skip_broken_rows: bool = False


@dataclass(frozen=True)
class Task:
    """A text classification or regression task on single texts or on pairs.

    Attributes:
        name: how the task is called in commands and reports.
        text_columns: one column name, or two for sentence pairs.
        label_column: the column that holds the label.
        metric: one of ``CLASSIFICATION_METRICS``, or of ``REGRESSION_METRICS`` if ``regression``.
        regression: labels are numbers to predict, not classes.
        labels: the classes in the order of their ids; None takes them from the training data.
        files: where a published task is stored; None for other data.

    Raises:
        InputError: not one or two text columns, the label among them, or a metric of the other kind.
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    metric: str
    regression: bool = False
    labels: tuple[str, ...] | None = None
    files: TaskFiles | None = None

    def __post_init__(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise InputError(f"{self.name}: a task has 1 or 2 text columns, got {len(self.text_columns)}")
        if len({*self.text_columns, self.label_column}) <= len(self.text_columns):
            names = ", ".join(map(repr, (*self.text_columns, self.label_column)))
            raise InputError(f"{self.name}: text and label columns must differ, got {names}")
        allowed = REGRESSION_METRICS if self.regression else CLASSIFICATION_METRICS
        if self.metric not in allowed:
            kind = "regression" if self.regression else "classification"
            raise InputError(
                f"unknown {kind} metric {self.metric!r}: choose one of {', '.join(allowed)}"
            )


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_MSR_FILES = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")

_SENTENCE = ("sentence",)
_SENTENCES = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_MRPC_STRINGS = ("#1 String", "#2 String")


def _mnli(name: str, dev_file: str) -> Task:
    files = TaskFiles("MNLI", splits=(("train.tsv", dev_file),))
    return Task(name, _SENTENCES, "gold_label", "accuracy", labels=_NLI, files=files)


def _published_tasks() -> tuple[Task, ...]:
    mrpc = TaskFiles("MRPC", splits=(("train.tsv", "dev.tsv"), _MSR_FILES))
    # A few questions of the published QQP file contain line breaks, which tear their rows apart.
    qqp = TaskFiles("QQP", skip_broken_rows=True)
    trec = TaskFiles(
        "trec", splits=(("train_5500.label", "TREC_10.label"),), header=("label", "text"), layout="trec"
    )
    cola = TaskFiles("CoLA", header=_COLA_COLUMNS)
    pairs, accuracy = _SENTENCES, "accuracy"
    return (
        Task("cola", _SENTENCE, "label", "matthews", labels=_BINARY, files=cola),
        Task("sst2", _SENTENCE, "label", accuracy, labels=_BINARY, files=TaskFiles("SST-2")),
        Task("mrpc", _MRPC_STRINGS, "Quality", "accuracy_f1", labels=_BINARY, files=mrpc),
        Task("stsb", pairs, "score", "spearman", regression=True, files=TaskFiles("STS-B")),
        Task("qqp", _QUESTIONS, "is_duplicate", "accuracy_f1", labels=_BINARY, files=qqp),
        _mnli("mnli", "dev_matched.tsv"),
        _mnli("mnli-mm", "dev_mismatched.tsv"),
        Task(
            "qnli",
            ("question", "sentence"),
            "label",
            accuracy,
            labels=_ENTAILMENT,
            files=TaskFiles("QNLI"),
        ),
        Task("rte", pairs, "label", accuracy, labels=_ENTAILMENT, files=TaskFiles("RTE")),
        Task("wnli", pairs, "label", accuracy, labels=_BINARY, files=TaskFiles("WNLI")),
        Task("trec", ("text",), "label", accuracy, files=trec),
    )


GLUE_TASKS: dict[str, Task] = {task.name: task for task in _published_tasks()}
"""The GLUE tasks that can be trained (``mnli`` is judged on matched, ``mnli-mm`` on mismatched), and TREC."""


def plain_name(name: str) -> str:
    """``STS-B``, ``sts_b`` and ``stsb`` are one name: lower case, letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def get_task(name: str) -> Task:
    """Returns the published task of this name; case, ``-`` and ``_`` do not matter.

    Raises:
        InputError: there is none; the message lists the names.
    """
    for task in GLUE_TASKS.values():
        if plain_name(task.name) == plain_name(name):
            return task
    raise InputError(f"unknown task {name!r}: choose one of {', '.join(GLUE_TASKS)}")
