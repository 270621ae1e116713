"""Augmentation: candidates against a direct computation, and what copies are made of them."""

from __future__ import annotations

import random
from itertools import groupby

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from dynabert_fast.data import Examples
from dynabert_fast.data import augmentation as module
from dynabert_fast.data.augmentation import (
    Augmentation,
    Proposer,
    augment,
    load_masked_lm,
    replace_words,
    words_to_replace,
)
from dynabert_fast.errors import InputError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the film was plot cast good great bad dull fine act poor view tale not run".split()
PIECES = ["##ing", "##s", "##or", "un", "3", ",", ".", "'", "t", "don"]
TEXTS = [
    "The film was acting good, not 3 bad.",
    "views",
    "",
    "Don't run the tales, actor; unviewing great great plots!",
    "a zzz cast",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS + PIECES))
    return BertTokenizerFast.from_pretrained(folder, model_max_length=24)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer) + 3,  # padded, as published models' are
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.5,
        **sizes,
    )
    return BertForMaskedLM(config).eval()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The film was good.", ["film", "good"]),
        ("don't re-run it, 3rd x2 time", ["time"]),
        ("Été 100% über_x naïve", ["Été", "naïve"]),
        ("not very", []),
        ("", []),
    ],
)
def test_words_to_replace(text, words):
    assert [text[start:end] for start, end in words_to_replace(text)] == words


def _slow(model, tokenizer, text, start, end, count):
    """One word at a time: mask and predict, or compare its vector with that of every word."""
    vocabulary = {word: i for word, i in tokenizer.get_vocab().items() if word.isalpha()}
    word = text[start:end].lower()
    pieces = tokenizer.tokenize(word)
    vectors = model.bert.embeddings.word_embeddings.weight.detach()
    if len(pieces) == 1:
        masked = f"{text[:start]} [MASK] {text[end:]}"
        ids = tokenizer(masked, return_tensors="pt")
        (place,) = (ids["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0].tolist()
        with torch.no_grad():
            score = model(**ids).logits[0, place]
        scores = {w: score[i].item() for w, i in vocabulary.items()}
    else:
        own = vectors[tokenizer.convert_tokens_to_ids(pieces)].mean(0)
        scores = {
            w: torch.cosine_similarity(own, vectors[i], dim=0).item() for w, i in vocabulary.items()
        }
    ranked = sorted(scores, key=lambda w: -scores[w])
    return tuple(w for w in ranked if w != word)[:count]


@pytest.mark.parametrize("tokens", [16, 2048], ids=["small batches", "one batch"])
@pytest.mark.parametrize("head", ["its own layer", "within"])
def test_candidates_are_those_of_a_direct_computation(model, tokenizer, tokens, head, monkeypatch):
    monkeypatch.setattr(module, "_TOKENS", tokens)
    places = []
    hook = model.cls.predictions.decoder.register_forward_hook(
        lambda _, given, logits: places.append(logits.shape[1])
    )
    if head == "within":  # as DeBERTa's, which multiplies by the embeddings
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    found = Proposer(model, tokenizer, 5).propose(TEXTS)
    hook.remove()
    assert (set(places) == {1}) == (head != "within")
    single = several = 0
    for text, choices in zip(TEXTS, found, strict=True):
        assert [(c.start, c.end) for c in choices] == words_to_replace(text)
        for choice in choices:
            assert choice.words == _slow(model, tokenizer, text, choice.start, choice.end, 5)
            pieces = len(tokenizer.tokenize(text[choice.start : choice.end]))
            single, several = single + (pieces == 1), several + (pieces > 1)
    assert single >= 6
    assert several >= 5


def test_more_candidates_than_words(model, tokenizer):
    ((choice,),) = Proposer(model, tokenizer, 1000).propose(["film"])
    alphabetic = {word for word in tokenizer.get_vocab() if word.isalpha()}
    assert set(choice.words) == alphabetic - {"film"}


def test_words_beyond_the_models_positions_stay(model, tokenizer):
    text = " ".join(["film"] * 40)
    (choices,) = Proposer(model, tokenizer).propose([text])
    assert len(choices) == 24 - 2, "all positions but those of [CLS] and [SEP]"


def test_copies(model, tokenizer):
    examples = Examples(TEXTS, None, [0, 1, 2, 3, 4])
    options = Augmentation(copies=6, candidates=4, seed=3)
    found = augment(examples, model, tokenizer, options, progress=False)
    assert found.pairs is None
    groups = [list(group) for _, group in groupby(range(len(found)), found.labels.__getitem__)]
    assert [found.labels[group[0]] for group in groups] == [0, 1, 2, 3, 4]
    choices = Proposer(model, tokenizer, 4).propose(TEXTS)
    for group, text, words in zip(groups, TEXTS, choices, strict=True):
        texts = [found.texts[i] for i in group]
        assert texts[0] == text
        assert len(set(texts)) == len(texts) <= 7
        rng = random.Random(f"3 {TEXTS.index(text)}")
        tries = [replace_words(text, words, 0.4, rng) for _ in range(6)]
        assert texts == list(dict.fromkeys([text, *tries]))
    assert len(groups[2]) == 1, "nothing to replace in an empty text"
    assert len(groups[3]) > 4


def test_what_is_replaced_and_how_often():
    choices = [module.Choice(0, 3, ("x", "yy")), module.Choice(4, 5, ()), module.Choice(6, 7, "z")]
    rng = random.Random(0)
    found = [replace_words("abc d e.", choices, 0.4, rng) for _ in range(4000)]
    assert {text.split()[0] for text in found} == {"abc", "x", "yy"}
    assert all(text.split()[1] == "d" for text in found)
    assert sum(text.startswith("x ") for text in found) / 4000 == pytest.approx(0.2, abs=0.03)
    assert sum(text.endswith(" z.") for text in found) / 4000 == pytest.approx(0.4, abs=0.03)


def test_of_a_pair_each_copy_changes_one_text(model, tokenizer):
    examples = Examples(["good film"], ["bad plots"], [0.5])
    options = Augmentation(copies=8, probability=1.0)
    found = augment(examples, model, tokenizer, options, progress=False)
    pairs = list(zip(found.texts, found.pairs, strict=True))
    assert pairs[0] == ("good film", "bad plots")
    assert len(set(pairs)) == len(pairs) > 5
    for text, pair in pairs[1:]:
        assert (text == "good film") != (pair == "bad plots")
    assert found.labels == [0.5] * len(pairs)


def test_copies_depend_on_the_seed_and_not_on_other_examples(model, tokenizer):
    def texts(count, seed):
        examples = Examples(TEXTS[:count], None, [0] * count)
        return augment(examples, model, tokenizer, Augmentation(9, seed=seed), False).texts

    assert texts(5, 1) == texts(5, 1)
    assert texts(5, 1)[: len(texts(4, 1))] == texts(4, 1)
    assert texts(5, 1) != texts(5, 2)


def test_the_models_mode_and_gradients_do_not_matter(model, tokenizer):
    examples = Examples(TEXTS, None, [0] * 5)
    before = augment(examples, model, tokenizer, progress=False)
    assert augment(examples, model.train(), tokenizer, progress=False) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_byte_level_pieces():
    """RoBERTa's tokenizer: whole words begin with a space, and positions behind the padding's."""
    words = ["film", "good", "plot", "bad"]
    letters = sorted(set("".join(words)) | {"s"})
    vocabulary = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ"])}
    merges = []
    for token in letters:
        vocabulary[token] = len(vocabulary)
    for word in [f"Ġ{word}" for word in words] + ["ilm"]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", **names, model_max_length=999
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=len(vocabulary), intermediate_size=16, max_position_embeddings=12, **sizes
    )
    proposer = Proposer(RobertaForMaskedLM(config), tokenizer)
    whole = {"film", "good", "plot", "bad"}
    assert whole <= set(proposer.words.values())
    assert "ilm" not in proposer.words.values()
    text = "good films" + " good" * 9
    (choices,) = proposer.propose([text])
    assert [text[c.start : c.end] for c in choices] == ["good", "films"] + ["good"] * 5
    assert all(c.words and text[c.start : c.end] not in c.words for c in choices)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"probability": 0.0}, "probability must be above 0 and at most 1, got 0.0"),
        ({"probability": float("nan")}, "probability must be above 0 and at most 1, got nan"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(InputError, match=said):
        Augmentation(**options)


def test_loading(model, tokenizer, tmp_path):
    for name, part in (("whole", model), ("encoder", model.bert)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    loaded, words = load_masked_lm(tmp_path / "whole")
    examples = Examples(TEXTS, None, [0] * 5)
    expected = augment(examples, model, tokenizer, progress=False)
    assert augment(examples, loaded, words, progress=False) == expected
    with pytest.raises(InputError, match="an encoder without the head of a masked language model"):
        load_masked_lm(tmp_path / "encoder")
    with pytest.raises(InputError, match="does not load as a masked language model"):
        load_masked_lm(tmp_path / "nothing")


def test_a_tokenizer_without_a_mask_is_refused(model, tokenizer):
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    )
    with pytest.raises(InputError, match="needs a fast tokenizer with a mask token"):
        Proposer(model, plain)
