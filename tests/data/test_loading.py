from __future__ import annotations

import builtins
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynabert_fast.data.loading import Examples, TaskData, load_files, load_glue, load_hub
from dynabert_fast.errors import InputError

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of this name and returns its path."""

    def _write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


def tsv(columns: str, *rows: dict[str, str]) -> str:
    """A TSV file with these columns; what a row does not give is filled in."""
    names = columns.split(",")
    lines = [names, *([row.get(name, "-") for name in names] for row in rows)]
    return "".join("\t".join(line) + "\n" for line in lines)


# GLUE: the columns of the distributed files

INDEXED = "index,sentence1,sentence2,label"
QNLI = "index,question,sentence,label"
MRPC = "Quality,#1 ID,#2 ID,#1 String,#2 String"
QQP = "id,qid1,qid2,question1,question2,is_duplicate"
STSB = "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2,score"
MNLI = (
    "index,promptID,pairID,genre,sentence1_binary_parse,sentence2_binary_parse,sentence1_parse,"
    "sentence2_parse,sentence1,sentence2,{},gold_label"
)
MNLI_TRAIN, MNLI_DEV = MNLI.format("label1"), MNLI.format("label1,label2,label3,label4,label5")


def pair(
    label_column: str, label: str, first: str = "sentence1", second: str = "sentence2"
) -> dict[str, str]:
    return {first: "One text.", second: 'A "second', label_column: label}


def mrpc(label: str) -> str:
    return "\ufeff" + tsv(MRPC, pair("Quality", label, "#1 String", "#2 String"))


def qqp(label: str) -> str:
    return tsv(QQP, pair("is_duplicate", label, "question1", "question2"))


def qnli(label: str) -> str:
    return tsv(QNLI, pair("label", label, "question", "sentence"))


# task, folder, train file and content, dev file and content, expected labels
GLUE = [
    ("mrpc", "MRPC", "train.tsv", mrpc("1"), "dev.tsv", mrpc("0"), 1, 0),
    (
        "mrpc",
        "MRPC",
        "msr_paraphrase_train.txt",
        mrpc("1"),
        "msr_paraphrase_test.txt",
        mrpc("0"),
        1,
        0,
    ),
    ("qqp", "QQP", "train.tsv", qqp("1"), "dev.tsv", qqp("0"), 1, 0),
    ("qnli", "QNLI", "train.tsv", qnli("entailment"), "dev.tsv", qnli("not_entailment"), 0, 1),
    (
        "rte",
        "RTE",
        "train.tsv",
        tsv(INDEXED, pair("label", "entailment")),
        "dev.tsv",
        tsv(INDEXED, pair("label", "not_entailment")),
        0,
        1,
    ),
    (
        "wnli",
        "WNLI",
        "train.tsv",
        tsv(INDEXED, pair("label", "1")),
        "dev.tsv",
        tsv(INDEXED, pair("label", "0")),
        1,
        0,
    ),
    (
        "stsb",
        "STS-B",
        "train.tsv",
        tsv(STSB, pair("score", "3.800")),
        "dev.tsv",
        tsv(STSB, pair("score", "0")),
        3.8,
        0.0,
    ),
    (
        "mnli",
        "MNLI",
        "train.tsv",
        tsv(MNLI_TRAIN, pair("gold_label", "neutral")),
        "dev_matched.tsv",
        tsv(MNLI_DEV, pair("gold_label", "contradiction")),
        1,
        2,
    ),
    (
        "mnli-mm",
        "MNLI",
        "train.tsv",
        tsv(MNLI_TRAIN, pair("gold_label", "entailment")),
        "dev_mismatched.tsv",
        tsv(MNLI_DEV, pair("gold_label", "neutral")),
        0,
        1,
    ),
]


@pytest.mark.parametrize(
    ("task", "folder", "train_file", "train", "dev_file", "dev", "train_label", "dev_label"),
    GLUE,
    ids=[f"{row[0]}-{row[2]}" for row in GLUE],
)
def test_glue_pairs(
    write: Write,
    tmp_path: Path,
    task: str,
    folder: str,
    train_file: str,
    train: str,
    dev_file: str,
    dev: str,
    train_label: float,
    dev_label: float,
) -> None:
    write(f"{folder}/{train_file}", train)
    write(f"{folder}/{dev_file}", dev)
    data = load_glue(task, tmp_path)
    assert data.train == Examples(["One text."], ['A "second'], [train_label])
    assert data.dev == Examples(["One text."], ['A "second'], [dev_label])
    assert [type(label) for label in data.dev.labels] == [float if task == "stsb" else int]


def test_glue_cola_has_no_header(write: Write, tmp_path: Path) -> None:
    write("CoLA/train.tsv", 'gj04\t1\t\tHe said "no.\ngj04\t0\t*\tHim said.\n')
    write("CoLA/dev.tsv", "gj04\t0\t*\tSaid him.")
    data = load_glue("cola", tmp_path)
    assert data.train == Examples(['He said "no.', "Him said."], None, [1, 0])
    assert data.dev == Examples(["Said him."], None, [0])


def test_glue_trec_is_latin_1_and_coarse(write: Write, tmp_path: Path) -> None:
    write(
        "train_5500.label",
        "NUM:dist How far ?\nLOC:city Where is Orl\u00e9ans ?\n".encode("latin-1"),
    )
    write("TREC_10.label", "NUM:date When ?\n")
    data = load_glue("trec", tmp_path)
    assert data.train == Examples(["How far ?", "Where is Orl\u00e9ans ?"], None, [1, 0])
    assert data.dev == Examples(["When ?"], None, [1])
    assert data.label_names == ("LOC", "NUM")


SST2 = "sentence\tlabel\nfine\t1\npoor\t0\n"


@pytest.mark.parametrize("folder", [".", "SST-2", "sst2", "SST_2", "glue_data/SST-2"])
def test_glue_folder_is_the_tasks_own_or_its_parent(
    write: Write, tmp_path: Path, folder: str
) -> None:
    write(f"{folder}/train.tsv", SST2)
    write(f"{folder}/dev.tsv", SST2)
    parent = tmp_path / "glue_data" if "glue_data" in folder else tmp_path
    for data_dir in (parent, str(tmp_path / folder)):
        data = load_glue("SST-2", data_dir)
        assert data.train == data.dev == Examples(["fine", "poor"], None, [1, 0])
        assert (data.task.name, data.label_names, data.num_labels) == ("sst2", ("0", "1"), 2)
        assert data.notes == ()


def test_glue_qqp_leaves_out_torn_rows_and_says_so(write: Write, tmp_path: Path) -> None:
    torn = "7\t1\t2\tA question that\nends here ?\tAnother ?\t0\n"
    write("QQP/train.tsv", qqp("1") + torn)
    write("QQP/dev.tsv", qqp("0"))
    data = load_glue("qqp", tmp_path)
    assert len(data.train) == 1
    assert data.notes == (f"{tmp_path / 'QQP/train.tsv'}: 2 rows with torn fields were left out",)


def test_glue_bad_input(write: Write, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"rte: .*missing is not a folder; give the one with RTE in it"
    ):
        load_glue("rte", tmp_path / "missing")
    with pytest.raises(
        InputError, match=r"rte: no train.tsv and dev.tsv in .*, nor in a folder RTE"
    ):
        load_glue("rte", tmp_path)
    write("train.tsv", tsv(INDEXED, pair("label", "entailment")))
    with pytest.raises(InputError, match=r"rte: no train.tsv and dev.tsv"):
        load_glue("rte", tmp_path)
    write("dev.tsv", tsv(INDEXED, pair("label", "unknown")))
    with pytest.raises(
        InputError, match=r"dev.tsv, line 2: label 'unknown' is not in the label set"
    ):
        load_glue("rte", tmp_path)
    with pytest.raises(InputError, match=r"no column 'sentence'; its columns are index, sentence1"):
        load_glue("sst2", tmp_path)
    write("train_5500.label", "NUM:date When ?\nLOC:city Where ?\n")
    write("TREC_10.label", "NUM:date When ?\nwithout a label\n")
    with pytest.raises(InputError, match=r"line 2: 1 fields where there should be 2 \(label, "):
        load_glue("trec", tmp_path)


# One's own files


def own(train: Path, dev: Path | None = None, **options: Any) -> TaskData:
    options = {"text_column": "text", "label_column": "label"} | options
    return load_files(train, dev, **options)


FORMATS: dict[str, str | bytes] = {
    "train.csv": 'text,label\n"a, ""quoted""\ntext",yes\nb,no\n',
    "bom-crlf.csv": b'\xef\xbb\xbftext,label\r\n"a, ""quoted""\ntext",yes\r\n\r\nb,no\r\n',
    "other-order.CSV": 'id,label,text\n1,yes,"a, ""quoted""\ntext"\n2,no,b\n',
    "train.jsonl": '{"text": "a, \\"quoted\\"\\ntext", "label": "yes"}\n\n'
    '{"label": "no", "text": "b"}',
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(write: Write, name: str) -> None:
    path = write(name, FORMATS[name])
    data = own(path, path)
    assert data.train == data.dev == Examples(['a, "quoted"\ntext', "b"], None, [1, 0])
    assert data.label_names == ("no", "yes")
    assert data.task.name == path.stem
    assert data.task.metric == "accuracy"


def test_tsv_has_no_quoting(write: Write) -> None:
    path = write("train.tsv", '\ufefftext\tlabel\r\n"open\tyes\r\n\r\n""\tno\r\n')
    assert own(path, path).train.texts == ['"open', '""']


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl"])
def test_only_a_line_feed_ends_a_line(write: Write, name: str) -> None:
    text = "a\u2028b\u0085c\u000bd\u000ce\u001cf\u2029g"
    rows = [(text, "x"), ("next", "y")]
    if name.endswith("jsonl"):
        lines = [
            json.dumps({"text": t.replace("\x0b", " "), "label": y}, ensure_ascii=False)
            for t, y in rows
        ]
    else:
        lines = ["text,label", *(f"{t},{y}" for t, y in rows)]
        lines = [line.replace(",", "\t") for line in lines] if name.endswith("tsv") else lines
    path = write(name, "\n".join(lines))
    expected = text.replace("\x0b", " ") if name.endswith("jsonl") else text
    assert own(path, path).train.texts == [expected, "next"]


def test_pairs_and_regression(write: Write) -> None:
    path = write("train.csv", "left,right,score\na,b,1.5\nc,d,-2\n")
    options = {"text_column": "left", "pair_column": "right", "label_column": "score"}
    data = own(path, path, **options, regression=True)
    assert data.train == Examples(["a", "c"], ["b", "d"], [1.5, -2.0])
    assert (data.label_names, data.num_labels, data.task.metric) == ((), 1, "spearman")
    assert own(path, path, **options, regression=True, metric="neg_mse").task.metric == "neg_mse"
    # Without the flag, numbers are classes.
    assert own(path, path, **options).label_names == ("-2", "1.5")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "1b"], ("10", "1b", "9")),
        (["2.0", "10.5", "2"], ("2", "2.0", "10.5")),
        (["nan", "inf", "1"], ("1", "inf", "nan")),
        (["b", "B", "a"], ("B", "a", "b")),
    ],
)
def test_label_order(write: Write, labels: list[str], names: tuple[str, ...]) -> None:
    path = write("train.csv", "text,label\n" + "".join(f"t,{label}\n" for label in labels))
    data = own(path, path)
    assert data.label_names == names
    assert [names[i] for i in data.train.labels] == labels  # type: ignore[index]


def test_json_labels_meet_csv_labels(write: Write) -> None:
    train = write("train.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    dev = write("dev.csv", "text,label\nc,1\n")
    assert own(train, dev).dev == Examples(["c"], None, [1])


def test_numbers_of_json_are_one_label_however_they_are_written(write: Write) -> None:
    rows = ('{"text": "a", "label": 1}', '{"text": "b", "label": 1.0}', '{"text": "c", "label": 2}')
    train = write("train.jsonl", "\n".join(rows))
    assert own(train, train).label_names == ("1", "2")


def test_a_text_of_any_length(write: Write) -> None:
    text = "word " * 50_000
    path = write("train.csv", f"text,label\n{text},a\nb,c\n")
    assert own(path, path).train.texts[0] == text


# name, content, what the message says
BAD_FILES = [
    ("empty.csv", "", r"empty.csv is empty"),
    ("empty.tsv", "", r"empty.tsv is empty"),
    ("empty.jsonl", "\n", r"empty.jsonl has no rows"),
    ("header.csv", "text,label\n", r"header.csv has no rows"),
    ("column.csv", "txt,label\na,x\n", r"no column 'text'; its columns are txt, label"),
    (
        "twice.csv",
        "text,text,label\na,b,x\n",
        r"2 columns 'text'; its columns are text, text, label",
    ),
    (
        "few.csv",
        "text,label\na,x\n\nb\n",
        r"few.csv, line 4: 1 fields where there should be 2 \(text",
    ),
    ("few.tsv", "text\tlabel\n\na\tx\ty\n", r"few.tsv, line 3: 3 fields where there should be 2"),
    ("break.csv", '"te\nxt",label\na,x\n', r"its columns are 'te\\nxt', label"),
    ("wide.csv", ",".join(map(str, range(999))), r"its columns are 0, 1, .*, 11 and 987 more"),
    ("multi.csv", 'text,label\n"a\nb",x\n"c\nd"\n', r"multi.csv, line 4: 1 fields"),
    (
        "open.csv",
        'text,label\na,x\n"b,y\nc,x\n',
        r"open.csv, line 3: not a CSV row \(unexpected end",
    ),
    ("quote.csv", 'text,label\n"a"b,x\n', r"quote.csv, line 2: not a CSV row"),
    (
        "mac.csv",
        "text,label\ra,x\rb,y\r",
        r"mac.csv, line 1: .*row \(a carriage return that ends no",
    ),
    ("stray.csv", "text,label\na\rb,x\n", r"stray.csv, line 2: .*: quote its field, or save with"),
    ("latin.csv", b"text,label\na,x\ncaf\xe9,y\n", r"latin.csv, line 3: not UTF-8 \(byte 0xe9\)"),
    ("utf16.csv", "text,label\na,x\n".encode("utf-16"), r"utf16.csv, line 1: not UTF-8"),
    (
        "suffix.txt",
        "text,label\na,x\n",
        r"unknown suffix '.txt': give a file in .csv, .tsv, .jsonl",
    ),
    ("suffix", "text,label\na,x\n", r"unknown suffix ''"),
    ("label.csv", "text,label\na,x\nb,\n", r"label.csv, line 3: the label is empty"),
    (
        "cut.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b',
        r"cut.jsonl, line 2: not JSON \(Untermi",
    ),
    ("deep.jsonl", "[" * 100_000, r"deep.jsonl, line 1: not JSON"),
    ("list.jsonl", '["a", 1]\n', r"line 1: a line must be one JSON object, got '\[\"a\", 1\]'"),
    ("key.jsonl", '{"text": "a", "y": 1}\n', r"line 1: no column 'label'; the columns are text, y"),
    ("null.jsonl", '{"text": null, "label": 1}\n', r"line 1: column 'text' must be text, got None"),
    ("long.jsonl", json.dumps({"text": ["x" * 999], "label": 1}), r"got \['x{75}\.\.\.$"),
    ("half.jsonl", '{"text": "\\ud800", "label": 1}\n', r"line 1: column 'text' must be text, got"),
    ("not.jsonl", '{"text": "a", "label": NaN}\n', "label nan must be a string or a finite number"),
    (
        "label.jsonl",
        '{"text": "a", "label": [1]}\n',
        r"label \[1\] must be a string or a finite number",
    ),
    (
        "unlabelled.jsonl",
        '{"text": "a", "label": null}\n',
        r"label None must be a string or a finite number",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), BAD_FILES, ids=[row[0] for row in BAD_FILES]
)
def test_bad_file(write: Write, name: str, content: str | bytes, message: str) -> None:
    path = write(name, content)
    with pytest.raises(InputError, match=message) as info:
        own(path, path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("label", ["", "high", "nan", "inf", "1,5"])
def test_bad_regression_label(write: Write, label: str) -> None:
    path = write("train.tsv", f"text\tlabel\na\t1\nb\t{label}\n")
    with pytest.raises(InputError, match=rf"line 3: label '{label}' is not a finite number"):
        own(path, path, regression=True)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none.csv: No such file"):
        own(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*folder.csv: Is a directory"):
        own(tmp_path / "folder.csv")


def test_dev_label_that_was_not_trained(write: Write) -> None:
    train = write("train.csv", "text,label\n" + "".join(f"t,{i}\n" for i in range(14)))
    dev = write("dev.csv", "text,label\na,3\nb,14\n")
    message = r"dev.csv, line 3: label '14' is not in the label set \(0, 1, .*, 11 and 2 more\)"
    with pytest.raises(InputError, match=message):
        own(train, dev)


# Setting aside and sub-sampling


@pytest.fixture
def hundred(write: Write) -> Path:
    """100 rows: 70 of a, 29 of b, 1 of c."""
    labels = "a" * 70 + "b" * 29 + "c"
    rows = "".join(f"{label}{i},{label}\n" for i, label in enumerate(labels))
    return write("train.csv", "text,label\n" + rows)


def counts(examples: Examples) -> Counter[str]:
    return Counter(text[0] for text in examples.texts)


def test_set_aside(hundred: Path) -> None:
    data = own(hundred, dev_fraction=0.2, seed=3)
    assert counts(data.dev) == {"a": 14, "b": 6}
    assert counts(data.train) == {"a": 56, "b": 23, "c": 1}
    assert not set(data.train.texts) & set(data.dev.texts)
    assert data.notes == ("dev: 20 of 100 training rows set aside, seed 3",)
    assert own(hundred, dev_fraction=0.2, seed=3) == data
    assert own(hundred, dev_fraction=0.2, seed=4).dev.texts != data.dev.texts


@pytest.mark.parametrize("seed", range(5))
def test_max_train(hundred: Path, seed: int) -> None:
    data = own(hundred, hundred, max_train=20, seed=seed)
    assert len(data.train) == 20
    assert counts(data.train)["a"] in (13, 14)
    assert counts(data.train)["c"] == 1
    assert len(data.dev) == 100
    assert data.label_names == ("a", "b", "c")
    assert data.notes == (f"train: 20 of 100 rows, seed {seed}",)
    assert own(hundred, hundred, max_train=20, seed=seed) == data
    larger = own(hundred, hundred, max_train=50, seed=seed).train.texts
    assert set(data.train.texts) < set(larger)
    assert larger == sorted(larger, key=lambda text: int(text[1:]))  # in the file's order


def test_max_train_beyond_the_rows_changes_nothing(hundred: Path) -> None:
    assert own(hundred, hundred, max_train=100) == own(hundred, hundred)


def test_max_train_after_set_aside(hundred: Path) -> None:
    whole, part = own(hundred), own(hundred, max_train=10)
    assert part.dev == whole.dev
    assert set(part.train.texts) < set(whole.train.texts)
    assert part.notes == (*whole.notes, "train: 10 of 90 rows, seed 0")


def test_set_aside_regression(write: Write) -> None:
    path = write("train.csv", "text,label\n" + "".join(f"t{i},{i / 7}\n" for i in range(40)))
    data = own(path, regression=True, dev_fraction=0.25)
    assert (len(data.train), len(data.dev)) == (30, 10)
    assert sorted([*data.train.labels, *data.dev.labels]) == [i / 7 for i in range(40)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train": 0}, "max_train must be at least 1, got 0"),
        ({"dev_fraction": 0.0}, r"dev_fraction must be between 0 and 1, got 0.0"),
        ({"dev_fraction": 1.0}, r"dev_fraction must be between 0 and 1, got 1.0"),
        ({"metric": "spearman"}, "unknown classification metric 'spearman'"),
        ({"regression": True, "metric": "f1"}, "unknown regression metric 'f1'"),
        (
            {"pair_column": "text"},
            "text and label columns must differ, got 'text', 'text', 'label'",
        ),
    ],
)
def test_bad_options(hundred: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        own(hundred, **options)


def test_too_few_rows_to_set_aside(write: Write) -> None:
    one = write("one.csv", "text,label\na,1\n")
    with pytest.raises(InputError, match="1 row is not enough for train and dev"):
        own(one, regression=True)
    two = write("two.csv", "text,label\na,1\nb,2\n")
    for fraction in (0.1, 0.9):
        data = own(two, dev_fraction=fraction)
        assert len(data.train) == len(data.dev) == 1


# Hub data sets: a local folder through the same library


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> str:
    """A data set folder with the splits train and validation."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write("My-Set/train.csv", "text,other,label\na,b,2\nc,d,10\ne,f,2\n")
    write("My-Set/validation.csv", "text,other,label\ng,h,10\n")
    return str(tmp_path / "My-Set")


def from_hub(name: str, **options: Any) -> TaskData:
    return load_hub(name, **({"text_column": "text", "label_column": "label"} | options))


def test_hub(hub: str) -> None:
    data = from_hub(hub, pair_column="other")
    assert data.train == Examples(["a", "c", "e"], ["b", "d", "f"], [0, 1, 0])
    assert data.dev == Examples(["g"], ["h"], [1])
    assert (data.label_names, data.task.name) == (("2", "10"), "myset")
    assert from_hub(hub, regression=True).dev.labels == [10.0]
    assert len(from_hub(hub, dev_split=None).dev) == 1
    assert len(from_hub(hub, max_train=2).train) == 2


def test_hub_keeps_declared_classes(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    label = datasets.ClassLabel(names=["zebra", "ant", "unused"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})

    def split(labels: list[int]) -> Any:
        return datasets.Dataset.from_dict({"text": ["t"] * len(labels), "label": labels}, features)

    splits = {
        "train": split([1, 0]),
        "validation": split([1]),
        "test": split([-1]),
        "no": split([]),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    data = from_hub("some/animals")
    assert data.label_names == ("zebra", "ant", "unused")
    assert (data.train.labels, data.dev.labels) == ([1, 0], [1])
    with pytest.raises(InputError, match=r"split test, row 0: label None must be"):
        from_hub("some/animals", dev_split="test")
    with pytest.raises(InputError, match=r"split no has no rows: choose another split"):
        from_hub("some/animals", dev_split="no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "tr"}, r"no split 'tr'; its splits are train, validation"),
        ({"dev_split": "test"}, r"no split 'test'; its splits are train, validation"),
        (
            {"text_column": "txt"},
            r"split train has no column 'txt'; its columns are text, other, l",
        ),
        (
            {"text_column": "label", "label_column": "text"},
            r"row 0: column 'label' must be text, got 2",
        ),
    ],
)
def test_hub_bad_input(hub: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_hub(hub, **options)


def test_hub_data_set_that_is_not_there(hub: str) -> None:
    with pytest.raises(InputError, match=r"cannot load data set 'no/such-set': \w") as info:
        from_hub("no/such-set")
    assert "\n" not in str(info.value)


def test_hub_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_datasets(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(InputError, match=r"pip install dynabert-fast\[hub\]"):
        from_hub("nyu-mll/glue", config="sst2")


# The real files

DATA = os.environ.get("DYNABERT_FAST_DATA")


@pytest.mark.skipif(DATA is None, reason="DYNABERT_FAST_DATA does not name a folder of GLUE data")
@pytest.mark.parametrize(
    ("task", "train", "dev", "train_share_of_first_label"),
    [
        ("sst2", 67349, 872, 0.442),
        ("cola", 8551, 1043, 0.296),
        ("rte", 2490, 277, 0.502),
        ("stsb", 5749, 1500, None),
        ("trec", 5452, 500, 0.016),
    ],
)
def test_real_data(
    task: str, train: int, dev: int, train_share_of_first_label: float | None
) -> None:
    data = load_glue(task, DATA or "")
    assert (len(data.train), len(data.dev)) == (train, dev)
    assert data.notes == ()
    assert all(data.train.texts)
    if train_share_of_first_label is None:
        assert (min(data.train.labels), max(data.train.labels)) == (0.0, 5.0)
    else:
        share = data.train.labels.count(0) / train
        assert share == pytest.approx(train_share_of_first_label, abs=5e-4)
    part = load_glue(task, DATA or "", max_train=100)
    assert len(part.train) == 100
    assert part.label_names == data.label_names
