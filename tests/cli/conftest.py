"""The command line run in this process, on a tiny checkpoint and a few labelled texts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

WORDS = "the a it was is film plot cast very not good great fine bad poor dull".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ("good", "great", "fine"), ("bad", "poor", "dull")
POSITIONS = 24  # longest sequence of the tiny checkpoints
ERROR = "dynabert-fast: error: "


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def _restore_libraries():
    """A command silences the libraries for its process; other tests want them as they were."""
    from transformers.utils import logging

    variables = ("TOKENIZERS_PARALLELISM", "TQDM_MININTERVAL")
    before = {name: os.environ.get(name) for name in variables}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def cli(capsys) -> Callable[..., Result]:
    """`cli("fit", "--model", folder, ...)`: run a command here."""
    from dynabert_fast.cli.main import main

    def run(*argv: Any) -> Result:
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as exit_:  # argparse: --help, --version, what it cannot parse
            code = exit_.code
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(cli) -> Callable[..., str]:
    """`refused(...)`: run a command that must fail for bad input, and return its one line."""

    def run(*argv: Any) -> str:
        result = cli(*argv)
        assert result.code == 2, result
        lines = result.err.splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith(ERROR)
        return lines[0].removeprefix(ERROR)

    return run


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer()`: a WordPiece tokenizer that spells what it does not know."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"

    def make() -> Any:
        pieces = [*SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
        wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        wordpiece.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        return PreTrainedTokenizerFast(
            tokenizer_object=wordpiece,
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
            **dict(zip(names, SPECIAL, strict=True)),
        )

    return make


@pytest.fixture(scope="session")
def make_checkpoint(make_hf, make_model, make_tokenizer) -> Callable[..., Path]:
    """`make_checkpoint(folder, labels, **config)`: random weights and a tokenizer.

    Without labels a plain Hugging Face encoder, with labels a classifier of ours; `regression=True`
    gives the latter one output.
    """

    def make(
        folder: Path, labels: tuple[str, ...] = (), regression: bool = False, **config: Any
    ) -> Path:
        tokenizer = make_tokenizer()
        config = {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, **config}
        if regression:
            model = make_model(num_labels=1, problem_type="regression", **config)
        elif labels:
            model = make_model(num_labels=len(labels), **config)
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {name: i for i, name in enumerate(labels)}
        else:
            model = make_hf("bert", "Model", **config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoints(make_checkpoint, tmp_path_factory) -> Any:
    """Folders by name: `pretrained`, `classifier` (labels good, bad), `regressor`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "pretrained": make_checkpoint(root / "pretrained"),
        # Not in the order in which the data are numbered (sorted: bad, good).
        "classifier": make_checkpoint(root / "classifier", ("good", "bad")),
        "regressor": make_checkpoint(root / "regressor", regression=True),
    }


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder: `{train,dev}.csv` (text, label), `pairs.tsv` (a, b, same), `scores.jsonl`."""
    folder = tmp_path_factory.mktemp("data")
    subjects = itertools.cycle(("the film", "the plot", "a very long cast", "it"))
    rows = [
        (f"{next(subjects)} was {'not ' * (i % 3 == 0)}{word} {'.' * (i % 5)}", name)
        for i in range(4)
        for name, words in (("good", GOOD), ("bad", BAD))
        for word in words
    ]
    for name, part in (("train", rows), ("dev", rows[::2] + rows[1::4])):
        lines = ["text,label", *(f"{text},{label}" for text, label in part)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    pairs = [
        f"{a}\t{b}\t{'yes' if x == y else 'no'}" for (a, x), (b, y) in itertools.pairwise(rows)
    ]
    (folder / "pairs.tsv").write_text("\n".join(["a\tb\tsame", *pairs]) + "\n")
    scores = [json.dumps({"text": text, "score": len(text) / 10}) for text, _ in rows]
    (folder / "scores.jsonl").write_text("\n".join(scores) + "\n")
    return folder


@pytest.fixture(scope="session")
def sources(data) -> dict[str, list[str]]:
    """Arguments that name the data, by kind of task; the longest text fits."""
    text, label = ["--text-column", "text"], ["--label-column", "label"]
    dev, length = ["--dev-file", f"{data}/dev.csv"], ["--max-length", "16"]
    return {
        "classes": ["--train-file", f"{data}/train.csv", *dev, *text, *label, *length],
        "dev only": [*dev, *text, *label, *length],
        "pairs": [
            *("--train-file", f"{data}/pairs.tsv", "--text-column", "a", "--pair-column", "b"),
            *("--label-column", "same", "--max-length", str(POSITIONS)),
        ],
        "regression": [
            *("--train-file", f"{data}/scores.jsonl", *text, "--label-column", "score"),
            *("--regression", *length),
        ],
    }


@pytest.fixture(scope="session")
def latency() -> list[str]:
    """Arguments for a short measurement that fits the tiny checkpoints."""
    return ["--latency-length", "16", "--latency-rounds", "1"]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of a real process: offline, one thread, buffered, this checkout on its path."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": ""}
    return os.environ | threads | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


@pytest.fixture
def file_size_limit() -> Callable[[int], Any]:
    """`with file_size_limit(bytes):` files cannot grow beyond it, as on a full disk."""

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limit
