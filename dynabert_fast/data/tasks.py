"""What a text task is: its columns, labels and metric, and the files it comes in if published."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dynabert_fast.errors import InputError

# What a task may be judged by; of each, more is better. `dynabert_fast.evaluation.metrics` computes
# them. "accuracy_f1" is accuracy, with F1 reported beside it.
CLASSIFICATION_METRICS = ("accuracy", "accuracy_f1", "f1", "matthews")
REGRESSION_METRICS = ("spearman", "pearson", "neg_mse")


@dataclass(frozen=True)
class TaskFiles:
    """The files in which a published task is distributed.

    Attributes:
        folder: the folder's usual name, for example ``SST-2``.
        splits: pairs of file names (train, dev); the first pair that is there is read.
        header: the columns of a file without a header line; None if the first line names them.
        layout: ``tsv`` (no quoting: a quotation mark is text) or ``trec`` (``COARSE:fine text``).
        skip_torn_rows: leave out rows with a wrong number of fields; otherwise they are an error.
    """

    folder: str
    splits: tuple[tuple[str, str], ...] = (("train.tsv", "dev.tsv"),)
    header: tuple[str, ...] | None = None
    layout: Literal["tsv", "trec"] = "tsv"
    skip_torn_rows: bool = False


@dataclass(frozen=True)
class Task:
    """A classification or regression task on single texts or on pairs.

    Attributes:
        name: how the task is called in commands and reports.
        text_columns: one column name, or two for pairs.
        label_column: the column that holds the label.
        metric: one of ``CLASSIFICATION_METRICS``, or of ``REGRESSION_METRICS`` if ``regression``.
        regression: labels are numbers to predict, not classes.
        labels: the classes in the order of their ids; None takes them from the training data.
        files: where a published task is stored; None for other data.

    Raises:
        InputError: not 1 or 2 text columns, a column named twice, or a metric of the other kind.
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    metric: str
    regression: bool = False
    labels: tuple[str, ...] | None = None
    files: TaskFiles | None = None

    def __post_init__(self) -> None:
        columns = (*self.text_columns, self.label_column)
        if len(self.text_columns) not in (1, 2):
            count = len(self.text_columns)
            raise InputError(f"{self.name}: a task has 1 or 2 text columns, got {count}")
        if len(set(columns)) < len(columns):
            names = ", ".join(map(repr, columns))
            raise InputError(f"{self.name}: text and label columns must differ, got {names}")
        allowed = REGRESSION_METRICS if self.regression else CLASSIFICATION_METRICS
        if self.metric not in allowed:
            kind = "regression" if self.regression else "classification"
            choices = ", ".join(allowed)
            raise InputError(f"unknown {kind} metric {self.metric!r}: choose one of {choices}")


_SENTENCE = ("sentence",)
_SENTENCES = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")

# Ids in the order that the hub's GLUE data set and the models trained on it use.
_BINARY = ("0", "1")
_ENTAILED = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")

_COLA = TaskFiles("CoLA", header=("source", "label", "mark", "sentence"))
_MRPC = TaskFiles(
    "MRPC",
    splits=(
        ("train.tsv", "dev.tsv"),
        ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"),  # the original release
    ),
)
# A few questions of the published QQP contain line breaks, which tear their rows apart.
_QQP = TaskFiles("QQP", skip_torn_rows=True)
_MNLI = TaskFiles("MNLI", splits=(("train.tsv", "dev_matched.tsv"),))
_MNLI_MM = TaskFiles("MNLI", splits=(("train.tsv", "dev_mismatched.tsv"),))
_TREC = TaskFiles(
    "trec",
    splits=(("train_5500.label", "TREC_10.label"),),
    header=("label", "text"),
    layout="trec",
)

_TASKS = (
    Task("cola", _SENTENCE, "label", "matthews", labels=_BINARY, files=_COLA),
    Task("sst2", _SENTENCE, "label", "accuracy", labels=_BINARY, files=TaskFiles("SST-2")),
    Task(
        "mrpc",
        ("#1 String", "#2 String"),
        "Quality",
        "accuracy_f1",
        labels=_BINARY,
        files=_MRPC,
    ),
    Task("stsb", _SENTENCES, "score", "spearman", regression=True, files=TaskFiles("STS-B")),
    Task("qqp", _QUESTIONS, "is_duplicate", "accuracy_f1", labels=_BINARY, files=_QQP),
    Task("mnli", _SENTENCES, "gold_label", "accuracy", labels=_NLI, files=_MNLI),
    Task("mnli-mm", _SENTENCES, "gold_label", "accuracy", labels=_NLI, files=_MNLI_MM),
    Task(
        "qnli",
        ("question", "sentence"),
        "label",
        "accuracy",
        labels=_ENTAILED,
        files=TaskFiles("QNLI"),
    ),
    Task("rte", _SENTENCES, "label", "accuracy", labels=_ENTAILED, files=TaskFiles("RTE")),
    Task("wnli", _SENTENCES, "label", "accuracy", labels=_BINARY, files=TaskFiles("WNLI")),
    Task("trec", ("text",), "label", "accuracy", files=_TREC),
)

# The GLUE tasks that can be trained, and TREC. mnli is judged on the matched dev set, mnli-mm on
# the mismatched one.
GLUE_TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def plain_name(name: str) -> str:
    """Letters and digits in lower case: ``STS-B``, ``sts_b`` and ``stsb`` are one name."""
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
