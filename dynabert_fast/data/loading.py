"""Labelled texts from GLUE folders, one's own files and hub data sets, all in one shape."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynabert_fast.data.tasks import Task, TaskFiles, get_task, plain_name
from dynabert_fast.errors import InputError

SUFFIXES = (".csv", ".tsv", ".jsonl")

# Of a CSV file; the csv module's own limit is 131,072 characters.
_LONGEST_FIELD = (1 << 31) - 1

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")

# Half of a UTF-16 pair, which JSON can spell but no tokenizer can read.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Examples:
    """Texts with their labels.

    Attributes:
        texts: one text per example.
        pairs: the second text of each example, or None for tasks on single texts.
        labels: class ids (int), or target values (float) for regression.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]

    def __post_init__(self) -> None:
        """Refuse columns of different lengths."""
        columns = (self.texts, self.labels, *([] if self.pairs is None else [self.pairs]))
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(str(len(column)) for column in columns)
            raise InputError(f"texts, labels and pairs must be as many, got {lengths}")

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    """A task's training and development examples.

    Attributes:
        task: columns and metric.
        train: what is trained on.
        dev: what is judged on.
        label_names: the class of each id; empty for regression.
        notes: what a reader of results must know of the data, for example that it is a subset.
    """

    task: Task
    train: Examples
    dev: Examples
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Outputs that a model for this task has: one per class, 1 for regression."""
        return 1 if self.task.regression else len(self.label_names)


@dataclass(frozen=True)
class _Table:
    """The columns that a task needs of one file or split; labels are still text."""

    source: str  # what to call the table in a message
    unit: str  # "line" or "row": what `numbers` count
    texts: list[list[str]]  # one list per text column
    labels: list[str]
    numbers: list[int]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: int) -> str:
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def select(self, indices: Sequence[int]) -> _Table:
        return _Table(
            self.source,
            self.unit,
            [[column[i] for i in indices] for column in self.texts],
            [self.labels[i] for i in indices],
            [self.numbers[i] for i in indices],
            self.skipped,
        )


def load_glue(
    name: str, data_dir: str | Path, max_train: int | None = None, seed: int = 0
) -> TaskData:
    """Reads a published task (``GLUE_TASKS``) from its distributed files.

    Args:
        name: for example ``sst2``.
        data_dir: the task's own folder, or one that holds it by its usual name, say ``SST-2``.
        max_train: keep at most this many training examples, of each class in proportion.
        seed: chooses which ones.

    Raises:
        InputError: an unknown task, a missing file or folder, or a file that is not in order.
    """
    task = get_task(name)
    assert task.files is not None
    train_file, dev_file = _find_files(task.name, task.files, Path(data_dir))
    return _task_data(task, _read(train_file, task), _read(dev_file, task), max_train, seed)


def load_files(
    train_file: str | Path,
    dev_file: str | Path | None = None,
    *,
    text_column: str,
    label_column: str,
    pair_column: str | None = None,
    regression: bool = False,
    metric: str | None = None,
    dev_fraction: float = 0.1,
    max_train: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Reads labelled texts from CSV, TSV or JSONL files in UTF-8 (the suffix says which).

    CSV fields may be quoted. TSV has no quoting: a quotation mark is text. A JSONL line is one
    object.

    Args:
        train_file: the training examples.
        dev_file: the development examples; None sets a part of the training examples aside.
        text_column: the column of the text.
        label_column: the column of the class, or of the number to predict.
        pair_column: the column of the second text, for tasks on pairs.
        regression: labels are numbers to predict. Never guessed.
        metric: see `Task`; default accuracy, and Spearman's correlation for regression.
        dev_fraction: the part that is set aside, from each class alike.
        max_train: keep at most this many training examples, of each class in proportion.
        seed: chooses what is set aside and what is kept.

    Raises:
        InputError: a file, a column, a row or a label is not usable; the message says where.
    """
    train_path = Path(train_file)
    task = _own_task(train_path.stem, text_column, pair_column, label_column, regression, metric)
    train = _read(train_path, task)
    dev = None if dev_file is None else _read(Path(dev_file), task)
    return _task_data(task, train, dev, max_train, seed, dev_fraction)


def load_hub(
    name: str,
    config: str | None = None,
    *,
    text_column: str,
    label_column: str,
    pair_column: str | None = None,
    train_split: str = "train",
    dev_split: str | None = "validation",
    regression: bool = False,
    metric: str | None = None,
    dev_fraction: float = 0.1,
    max_train: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Reads a hub data set, or a local folder, through the ``datasets`` library.

    Args:
        name: what ``datasets.load_dataset`` takes, for example ``nyu-mll/glue``.
        config: the data set's configuration, for example ``sst2``.
        text_column: the column of the text.
        label_column: the column of the class, or of the number to predict.
        pair_column: the column of the second text, for tasks on pairs.
        train_split: the split to train on.
        dev_split: the split to judge on; None sets a part of the training split aside.
        regression: labels are numbers to predict. Never guessed.
        metric: see `Task`; default accuracy, and Spearman's correlation for regression.
        dev_fraction: the part that is set aside, from each class alike.
        max_train: keep at most this many training examples, of each class in proportion.
        seed: chooses what is set aside and what is kept.

    Raises:
        InputError: ``datasets`` is not installed, or the data set, a split, a column or a row is
            not usable.
    """
    short_name = plain_name(name.rstrip("/").rsplit("/", 1)[-1])
    task = _own_task(short_name, text_column, pair_column, label_column, regression, metric)
    splits = _download(name, config)
    task = _with_hub_labels(task, splits.get(train_split))
    train = _hub_table(splits, name, train_split, task)
    dev = None if dev_split is None else _hub_table(splits, name, dev_split, task)
    return _task_data(task, train, dev, max_train, seed, dev_fraction)


def _own_task(
    name: str, text: str, pair: str | None, label: str, regression: bool, metric: str | None
) -> Task:
    text_columns = (text,) if pair is None else (text, pair)
    metric = metric or ("spearman" if regression else "accuracy")
    return Task(name, text_columns, label, metric, regression)


# What a file holds may be long and have line breaks in it; an error message is one line.


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _show_names(names: Iterable[str], limit: int = 12) -> str:
    shown = [name if name.isprintable() and len(name) <= 80 else _show(name) for name in names]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


# Reading tables


def _find_files(name: str, files: TaskFiles, data_dir: Path) -> tuple[Path, Path]:
    """The train and dev file, in the folder itself or in a child that has the task's name."""
    if not data_dir.is_dir():
        raise InputError(
            f"{name}: {data_dir} is not a folder; give the one with {files.folder} in it"
        )
    names = {plain_name(files.folder), plain_name(name)}
    children = sorted(path for path in data_dir.iterdir() if plain_name(path.name) in names)
    for folder in (data_dir, *children):
        for train, dev in files.splits:
            if (folder / train).is_file() and (folder / dev).is_file():
                return folder / train, folder / dev
    wanted = " or ".join(f"{train} and {dev}" for train, dev in files.splits)
    raise InputError(f"{name}: no {wanted} in {data_dir}, nor in a folder {files.folder} in it")


def _read(path: Path, task: Task) -> _Table:
    """Reads the task's columns of a file: by the task's layout, or by suffix for one's own file."""
    wanted = (*task.text_columns, task.label_column)
    skipped: list[int] = []
    if task.files is not None:
        rows = _trec_rows(path) if task.files.layout == "trec" else _tsv_rows(path)
        broken = skipped if task.files.skip_torn_rows else None
        records = _pick(path, rows, wanted, task.files.header, broken)
    else:
        records = _own_records(path, wanted)
    numbers: list[int] = []
    columns: list[list[str]] = [[] for _ in wanted]
    for number, values in records:
        numbers.append(number)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    if not numbers:
        raise InputError(f"{path} has no rows: give a file with at least one labelled example")
    return _Table(str(path), "line", columns[:-1], columns[-1], numbers, len(skipped))


def _own_records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    readers: dict[str, Callable[[], Iterator[tuple[int, list[str]]]]] = {
        ".csv": lambda: _pick(path, _csv_rows(path), wanted),
        ".tsv": lambda: _pick(path, _tsv_rows(path), wanted),
        ".jsonl": lambda: _json_records(path, wanted),
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InputError(f"{path}: unknown suffix {suffix!r}: give a file in {', '.join(SUFFIXES)}")
    return readers[suffix]()


def _lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a file, with their ends. Only a line feed ends one: U+2028 and such are text."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield raw.decode(encoding)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: not UTF-8 (byte {raw[error.start]:#04x}); save it as UTF-8"
        ) from error


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_lines(path), start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line:
            yield number, line.split("\t")


def _trec_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """``NUM:dist How far is it ?`` gives NUM and the question: the coarse class and the text."""
    for number, line in enumerate(_lines(path, "latin-1"), start=1):
        if line.strip():
            label, _, question = line.strip().partition(" ")
            coarse, colon, _ = label.partition(":")
            yield number, [coarse, question] if colon and question else [line.strip()]


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_LONGEST_FIELD)
    # strict: an unclosed quotation mark is an error, not a field that swallows all that follows.
    reader = csv.reader(_lines(path), strict=True)
    start = 1
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        reason = str(error)
        if reason.startswith("new-line character"):
            reason = "a carriage return that ends no line: quote its field, or save with line feeds"
        raise InputError(f"{path}, line {start}: not a CSV row ({reason})") from error


def _pick(
    path: Path,
    rows: Iterator[tuple[int, list[str]]],
    wanted: Sequence[str],
    header: Sequence[str] | None = None,
    broken: list[int] | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """The wanted fields of each row. A torn row's number goes to `broken`; without it, an error."""
    if header is None:
        _, header = next(rows, (0, []))
    positions = [_position(path, header, column) for column in wanted]
    for number, fields in rows:
        if len(fields) == len(header):
            yield number, [fields[position] for position in positions]
        elif broken is not None:
            broken.append(number)
        else:
            raise InputError(
                f"{path}, line {number}: {len(fields)} fields where there should be {len(header)} "
                f"({_show_names(header)})"
            )


def _position(path: Path, header: Sequence[str], column: str) -> int:
    if not header:
        raise InputError(f"{path} is empty: give a file with at least one labelled example")
    count = list(header).count(column)
    if count != 1:
        problem = "no column" if count == 0 else f"{count} columns"
        raise InputError(f"{path} has {problem} {column!r}; its columns are {_show_names(header)}")
    return list(header).index(column)


def _json_records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}); a line must be one object") from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: a line must be one JSON object, got {_show(line.strip())}")
        yield number, _fields(record, wanted, where)


def _fields(record: dict[str, Any], wanted: Sequence[str], where: str) -> list[str]:
    """The texts and the label (last in `wanted`) of a record whose values are typed."""
    missing = [column for column in wanted if column not in record]
    if missing:
        raise InputError(
            f"{where}: no column {missing[0]!r}; the columns are {_show_names(record)}"
        )
    *texts, label = (record[column] for column in wanted)
    for column, text in zip(wanted, texts, strict=False):
        if not isinstance(text, str) or _SURROGATE.search(text):
            raise InputError(f"{where}: column {column!r} must be text, got {_show(text)}")
    if not isinstance(label, str | int | float) or label in (math.inf, -math.inf) or label != label:
        raise InputError(f"{where}: label {_show(label)} must be a string or a finite number")
    if isinstance(label, str) and _SURROGATE.search(label):
        raise InputError(f"{where}: label {_show(label)} must be text")
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # 1 and 1.0 are one number
    return [*texts, str(label)]


# The datasets library


def _download(name: str, config: str | None) -> dict[str, Any]:
    """All splits of a data set, by name."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "hub data sets need the datasets library: pip install dynabert-fast[hub]"
        ) from error
    try:
        return dict(datasets.load_dataset(name, config))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load data set {name!r}: {reason[0]}") from error


def _with_hub_labels(task: Task, split: Any) -> Task:
    """The task with the classes in the data set's own order, where it declares one."""
    feature = {} if split is None or task.regression else split.features
    names = getattr(feature.get(task.label_column), "names", None)
    return task if names is None else replace(task, labels=tuple(names))


def _hub_table(splits: dict[str, Any], name: str, split: str, task: Task) -> _Table:
    source = f"data set {name}, split {split}"
    if split not in splits:
        raise InputError(
            f"data set {name} has no split {split!r}; its splits are {_show_names(splits)}"
        )
    data = splits[split]
    wanted = (*task.text_columns, task.label_column)
    missing = [column for column in wanted if column not in data.column_names]
    if missing:
        raise InputError(
            f"{source} has no column {missing[0]!r}; "
            f"its columns are {_show_names(data.column_names)}"
        )
    if len(data) == 0:
        raise InputError(f"{source} has no rows: choose another split")
    names = getattr(data.features[task.label_column], "names", None)
    rows = []
    for number, record in enumerate(data.select_columns(list(wanted))):
        if names is not None:
            record = record | {task.label_column: _class_name(record[task.label_column], names)}
        rows.append(_fields(record, wanted, f"{source}, row {number}"))
    *texts, labels = (list(column) for column in zip(*rows, strict=True))
    return _Table(source, "row", texts, labels, list(range(len(rows))))


def _class_name(label: Any, names: Sequence[str]) -> str | None:
    """The name of a class id; None for -1, by which hub data sets mark rows without a label."""
    return names[label] if label is not None and 0 <= label < len(names) else None


# From tables to examples


def _task_data(
    task: Task,
    train: _Table,
    dev: _Table | None,
    max_train: int | None,
    seed: int,
    dev_fraction: float = 0.1,
) -> TaskData:
    notes = []
    for table in (train,) if dev is None else (train, dev):
        if table.skipped:
            notes.append(f"{table.source}: {table.skipped} rows with torn fields were left out")
    names = _label_names(task, train)
    if dev is None:
        train, dev = _set_aside(train, task, dev_fraction, seed)
        notes.append(
            f"dev: {len(dev)} of {len(train) + len(dev)} training rows set aside, seed {seed}"
        )
    if max_train is not None and max_train < 1:
        raise InputError(f"max_train must be at least 1, got {max_train}")
    if max_train is not None and max_train < len(train):
        notes.append(f"train: {max_train} of {len(train)} rows, seed {seed}")
        train = train.select(_sample(train, task, max_train, seed))
    return TaskData(
        task, _examples(task, train, names), _examples(task, dev, names), names, tuple(notes)
    )


def _label_names(task: Task, train: _Table) -> tuple[str, ...]:
    """The class of each id: in the task's order, else sorted, numbers as numbers."""
    if task.regression:
        return ()
    if task.labels is not None:
        return task.labels
    found = set(train.labels)
    if "" in found:
        raise InputError(f"{train.at(train.labels.index(''))}: the label is empty")
    if all(_NUMBER.fullmatch(label) for label in found):
        return tuple(sorted(found, key=lambda label: (float(label), label)))
    return tuple(sorted(found))


def _examples(task: Task, table: _Table, names: tuple[str, ...]) -> Examples:
    labels = _values(table) if task.regression else _ids(table, names)
    return Examples(table.texts[0], table.texts[1] if len(table.texts) == 2 else None, labels)


def _ids(table: _Table, names: tuple[str, ...]) -> list[int]:
    ids = {name: index for index, name in enumerate(names)}
    for index, label in enumerate(table.labels):
        if label not in ids:
            raise InputError(
                f"{table.at(index)}: label {_show(label)} is not in the label set "
                f"({_show_names(names)})"
            )
    return [ids[label] for label in table.labels]


def _values(table: _Table) -> list[float]:
    values = []
    for index, label in enumerate(table.labels):
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{table.at(index)}: label {_show(label)} is not a finite number")
        values.append(value)
    return values


def _set_aside(table: _Table, task: Task, fraction: float, seed: int) -> tuple[_Table, _Table]:
    """Splits a table into train and dev."""
    if not 0 < fraction < 1:
        raise InputError(f"dev_fraction must be between 0 and 1, got {fraction}")
    if len(table) < 2:
        raise InputError(f"{table.source}: 1 row is not enough for train and dev; add rows")
    dev_size = min(max(round(len(table) * fraction), 1), len(table) - 1)
    train = _sample(table, task, len(table) - dev_size, seed)
    dev = sorted(set(range(len(table))) - set(train))
    return table.select(train), table.select(dev)


def _sample(table: _Table, task: Task, size: int, seed: int) -> list[int]:
    """Ascending indices of `size` rows: each class in proportion, and each there if they fit.

    The j-th row of a class of n, in random order, gets the key (j + 1/2) / n, the first one 0; the
    rows with the smallest keys are taken. So a smaller sample is part of a larger one.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(table)), len(table))
    members: dict[str, list[int]] = {}
    for index in order:
        members.setdefault("" if task.regression else table.labels[index], []).append(index)
    key = {
        index: (rank + 0.5) / len(group) if rank else 0.0
        for group in members.values()
        for rank, index in enumerate(group)
    }
    return sorted(sorted(order, key=key.__getitem__)[:size])
