from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from dynabert_fast.data import encoding
from dynabert_fast.data.encoding import Collator, EncodedDataset, LengthGroupedSampler
from dynabert_fast.data.loading import Examples
from dynabert_fast.errors import InputError

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat ##s ##ting . ,".split()
TEXTS = ["the cat sat on the mats .", "a cat", "", "the dog sat , sitting on a mat , the mat"]
PAIRS = ["a mat", "the cat sat on the mat on the mat .", "cat", "on the mat the cat sat"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    return BertTokenizerFast.from_pretrained(tmp_path)


def examples(pairs: bool = False, regression: bool = False) -> Examples:
    labels: list[int] | list[float] = [0.5, 1.0, 2.0, 3.5] if regression else [0, 2, 1, 1]
    return Examples(TEXTS, PAIRS if pairs else None, labels)


def items(dataset: EncodedDataset) -> list[dict[str, Any]]:
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("max_length", [4, 7, 128])
@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pair"])
def test_items_are_what_the_tokenizer_gives(
    tokenizer: PreTrainedTokenizerBase, pairs: bool, max_length: int
) -> None:
    dataset = EncodedDataset(examples(pairs), tokenizer, max_length)
    assert len(dataset) == len(TEXTS)
    for i, text in enumerate(TEXTS):
        second = PAIRS[i] if pairs else None
        direct = tokenizer(text, second, truncation=True, max_length=max_length)
        assert dataset[i] == {**direct, "labels": [0, 2, 1, 1][i]}
        assert dataset.lengths[i] == len(direct["input_ids"]) <= max_length


def test_known_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    item = EncodedDataset(Examples(["the mats"], ["dog"], [1]), tokenizer)[0]
    assert item == {
        "input_ids": [2, 5, 10, 11, 3, 1, 3],
        "token_type_ids": [0, 0, 0, 0, 0, 1, 1],
        "attention_mask": [1] * 7,
        "labels": 1,
    }


def test_more_examples_than_a_chunk(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EncodedDataset(examples(pairs=True), tokenizer)
    monkeypatch.setattr(encoding, "_CHUNK", 3)
    chunked = EncodedDataset(examples(pairs=True), tokenizer)
    assert items(chunked) == items(whole)
    assert len(chunked) == 4


def test_settings_left_in_the_tokenizer_do_not_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = items(EncodedDataset(examples(), tokenizer))
    tokenizer(["a", "the cat"], padding="max_length", max_length=16, truncation=True)
    tokenizer.backend_tokenizer.enable_padding(length=32)
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert items(EncodedDataset(examples(), tokenizer)) == expected


def test_no_token_types_from_a_tokenizer_without_them(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    names = ["input_ids", "attention_mask"]
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path, model_input_names=names)
    dataset = EncodedDataset(examples(pairs=True), tokenizer)
    assert set(dataset[0]) == {"input_ids", "attention_mask", "labels"}
    assert set(Collator(0)([dataset[0], dataset[1]])) == set(dataset[0])


def test_index_from_the_end_and_out_of_range(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = EncodedDataset(examples(), tokenizer)
    assert dataset[-1] == dataset[3]
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 4 examples"):
            dataset[index]


@pytest.mark.parametrize(("pairs", "special"), [(False, 2), (True, 3)], ids=["single", "pair"])
def test_max_length_without_room_for_text(
    tokenizer: PreTrainedTokenizerBase, pairs: bool, special: int
) -> None:
    with pytest.raises(
        InputError, match=f"must be above {special}, the special tokens alone, got 2"
    ):
        EncodedDataset(examples(pairs), tokenizer, max_length=2)


def test_collator(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = EncodedDataset(Examples(["a cat", "the", "a"], None, [2, 0, 1]), tokenizer)
    batch = Collator(pad_token_id=14)([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[2, 9, 6, 3], [2, 5, 3, 14]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0] * 4] * 2
    assert batch["labels"].tolist() == [2, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert dataset[1]["input_ids"] == [2, 5, 3]  # the items are left as they were


@pytest.mark.parametrize(("multiple", "length"), [(None, 4), (1, 4), (3, 6), (4, 4), (8, 8)])
def test_pad_to_multiple_of(
    tokenizer: PreTrainedTokenizerBase, multiple: int | None, length: int
) -> None:
    dataset = EncodedDataset(Examples(["a cat", "the"], None, [2, 0]), tokenizer)
    batch = Collator(0, multiple)([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (2, length)
    assert batch["attention_mask"].sum(1).tolist() == [4, 3]


def test_pad_to_multiple_of_nothing() -> None:
    with pytest.raises(InputError, match="pad_to_multiple_of must be at least 1, got 0"):
        Collator(0, 0)


def test_regression_labels_are_float32(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = EncodedDataset(examples(regression=True), tokenizer)
    labels = Collator(0)([dataset[0], dataset[3]])["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [0.5, 3.5]


# The sampler


def lengths(count: int) -> list[int]:
    return torch.randint(1, 128, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 400, 401, 997], ids=lambda count: f"n{count}")
@pytest.mark.parametrize("batch_size", [1, 8], ids=lambda size: f"b{size}")
def test_every_index_once(count: int, batch_size: int) -> None:
    sampler = LengthGroupedSampler(lengths(count), batch_size, seed=5)
    assert sorted(sampler) == list(range(count))
    assert len(sampler) == count


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths(100), 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(map(tuple, orders.values()))) == 9
    torch.manual_seed(0)
    torch.rand(5)
    for (seed, epoch), expected in orders.items():
        assert order(seed, epoch) == expected
    sampler = LengthGroupedSampler(lengths(100), 4, 1)
    assert list(sampler) == list(sampler) == orders[1, 0]


def test_sampler_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(LengthGroupedSampler(lengths(50), 4))
    assert torch.equal(torch.rand(1), expected)


def test_first_order_is_fixed_for_ever() -> None:
    """A run that is resumed with a later version must go on with the same batches."""
    sampler = LengthGroupedSampler([3, 1, 2, 9, 8, 7, 5], 2, seed=0)
    assert list(sampler) == [5, 6, 0, 2, 3, 4, 1]


def padding(order: list[int], of: list[int], batch_size: int) -> float:
    """The part of the tokens that is padding."""
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    padded = sum(len(batch) * max(of[i] for i in batch) for batch in batches)
    return 1 - sum(of) / padded


def test_batches_have_rows_of_like_length() -> None:
    of = lengths(3210)
    order = list(LengthGroupedSampler(of, 16))
    assert padding(list(range(3210)), of, 16) > 0.4
    assert padding(order, of, 16) < 0.03


def test_batches_come_in_random_order() -> None:
    of = lengths(1003)
    order = list(LengthGroupedSampler(of, 10))
    longest = [max(of[i] for i in order[start : start + 10]) for start in range(0, 1000, 10)]
    falls = sum(a > b for a, b in pairwise(longest))
    assert 30 < falls < 70  # of 99 steps; sorted batches would rise or fall throughout


def test_sampler_in_a_loader(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = EncodedDataset(examples(pairs=True), tokenizer)
    sampler = LengthGroupedSampler(dataset.lengths, 3)
    batches = list(DataLoader(dataset, 3, sampler=sampler, collate_fn=Collator(0)))
    assert [batch["input_ids"].shape[0] for batch in batches] == [3, 1]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(dataset.lengths)


@pytest.mark.parametrize(
    ("batch_size", "seed", "message"),
    [(0, 0, "batch_size must be at least 1, got 0"), (1, -1, "seed must be at least 0, got -1")],
)
def test_bad_sampler_arguments(batch_size: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LengthGroupedSampler([1, 2], batch_size, seed)
