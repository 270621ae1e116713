"""`pipeline("text-classification")` at any sub-network, with a tokenizer made here."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

from dynabert_fast.subnet import Subnet

WORDS = "the a cat dog sat ran on under mat tree good bad very not un ##happy ##s ! .".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["The cat sat on the mat.", "unhappy dogs!", "a very good tree under a very bad tree"]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        model_max_length=24,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )


def classify(model, tokenizer, texts=TEXTS, **arguments):
    run = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    answers = run(texts, top_k=None, **arguments)
    return [{answer["label"]: answer["score"] for answer in each} for each in answers]


@pytest.mark.parametrize("batch_size", [1, 3], ids=["one by one", "padded"])
def test_pipeline_runs_the_views_subnet(make_model, tokenizer, subnet_of, batch_size):
    model = make_model(id2label={0: "no", 1: "yes", 2: "perhaps"})
    subnet = subnet_of(model.config)
    got = classify(model.at(subnet), tokenizer, batch_size=batch_size)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert (inputs["attention_mask"] == 0).any()
    with torch.no_grad():
        want = model(**inputs, subnet=subnet).logits.softmax(-1)
    for answer, row in zip(got, want.tolist(), strict=True):
        assert answer == pytest.approx(dict(zip(("no", "yes", "perhaps"), row, strict=True)), 1e-4)


def test_two_views_give_two_answers_and_leave_the_model_alone(make_model, tokenizer):
    model = make_model()
    whole = classify(model, tokenizer)
    quarter = classify(model.at(Subnet.from_multipliers(model.config, 0.25)), tokenizer)
    assert quarter != whole
    assert classify(model, tokenizer) == whole


def test_pipeline_opens_a_saved_folder(make_model, tokenizer, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = pipeline("text-classification", model=str(tmp_path), device="cpu")
    got = [{a["label"]: a["score"] for a in each} for each in run(TEXTS, top_k=None)]
    for answer, want in zip(got, classify(model, tokenizer), strict=True):
        assert answer == pytest.approx(want, 1e-5)


def test_sentence_pairs(make_model, tokenizer):
    model = make_model()
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    (got,) = classify(model, tokenizer, [pair])
    with torch.no_grad():
        inputs = tokenizer(TEXTS[0], TEXTS[1], return_tensors="pt")
        assert inputs["token_type_ids"].any()
        want = model(**inputs).logits.softmax(-1)[0]
    assert sorted(got.values()) == pytest.approx(sorted(want.tolist()), 1e-4)
