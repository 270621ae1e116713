"""The tokenizer without transformers gives what transformers gives."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dynabert_fast.engine import Tokenizer
from dynabert_fast.errors import InputError

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
WORDS = "a film plot cast was very good bad dull".split()
TEXTS = ["a film", "a very very dull plot was a plot", "", "good", "what ?"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """One of transformers, and the folder that it is saved in, with padding and truncation on."""
    words = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    library = Library(models.WordLevel(words, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    library.enable_padding(length=50)
    library.enable_truncation(3)
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library, model_input_names=names, **SPECIAL
    )
    tokenizer.save_pretrained(folder)
    return tokenizer, folder


@pytest.mark.parametrize("max_length", [4, 5, 512])
@pytest.mark.parametrize("pairs", [None, TEXTS[::-1]], ids=["single", "pairs"])
def test_agrees_with_transformers(theirs, pairs, max_length):
    tokenizer, folder = theirs
    for path in (folder, str(folder), folder / "tokenizer.json"):
        got = Tokenizer(path)(TEXTS, pairs, max_length=max_length)
        want = tokenizer(
            TEXTS, pairs, max_length=max_length, truncation=True, padding=True, return_tensors="np"
        )
        assert got.keys() == want.keys()
        for name, array in got.items():
            assert array.dtype == np.int64
            assert np.array_equal(array, want[name]), name


def test_one_text(theirs):
    ours = Tokenizer(theirs[1])
    one, many = ours("a good film"), ours(["a good film"])
    pair, pairs = ours("a", "film"), ours(("a",), iter(["film"]))
    for a, b in ((one, many), (pair, pairs)):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert one["input_ids"].shape == (1, 5)
    assert pair["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]


def test_callers_at_once(theirs):
    """Each is cut to its own length."""
    ours = Tokenizer(theirs[1])
    wrong = []

    def work(length):
        for _ in range(200):
            if ours(["a " * 50] * 4, max_length=length)["input_ids"].shape != (4, length):
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


CALLS = {
    "no text": (([],), "one text or more, and as many second texts; got 0"),
    "too few pairs": ((["a", "b"], ["c"]), "one text or more, .*; got 2 and 1"),
    "no pair": ((["a"], []), "one text or more, .*; got 1 and 0"),
    "a number": ((["a", 3],), "texts must be valid strings, got 3"),
    "bytes": (([b"a"],), "texts must be valid strings, got b'a'"),
    "None": ((["a"], [None]), "texts must be valid strings, got None"),
    "surrogate": ((["a", "\ud800"],), r"texts must be valid strings, got '\\ud800'"),
    "no room": ((["a"], None, 2), "max_length must be in 3 to 16777216, got 2"),
    "no room for a pair": ((["a"], ["a"], 3), "max_length must be in 4 to 16777216, got 3"),
    "negative": ((["a"], None, -1), "max_length must be in 3 to 16777216, got -1"),
    "huge": ((["a"], None, 10**30), "max_length must be in 3 to 16777216, got 1000"),
    "length in words": ((["a"], None, "9"), "max_length must be in 3 to 16777216, got '9'"),
}


@pytest.mark.parametrize(("arguments", "message"), CALLS.values(), ids=CALLS.keys())
def test_bad_call(theirs, arguments, message):
    with pytest.raises(InputError, match=message):
        Tokenizer(theirs[1])(*arguments)


def test_no_tokenizer(tmp_path):
    for path in (tmp_path, tmp_path / "nope"):
        with pytest.raises(InputError, match=r"holds no tokenizer.json; save"):
            Tokenizer(path)
    for text in ("", "{", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer that can be read"):
            Tokenizer(tmp_path)
