from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from dynabert_fast.data import encoding
from dynabert_fast.data.encoding import (
    Collator,
    EncodedDataset,
    LengthGroupedSampler,
    TokenBudgetSampler,
)
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


# The sampler of token budgets. Lengths and budgets: the usual, the tightest, the unequal.


def budgets() -> dict[str, tuple[list[int], int, int]]:
    usual = lengths(1000)
    unequal = [1] * 500 + [100] * 3 + [7] * 40
    return {
        "one batch a step": (usual, 2048, 1),
        "eight": (usual, 2048, 8),
        "one step": (usual, 10**6, 3),
        "least": ([10] * 40, 9 + 20, 2),
        "least, remainder": ([10] * 41, 9 + 21, 2),
        "few of unequal length": (unequal, 800, 8),
        "budget of the longest": (unequal, 102, 1),
        "as many examples as batches": ([3, 1, 2, 9], 36, 4),
        "one token each": ([1] * 30, 8, 7),
    }


def steps_of(sampler: TokenBudgetSampler) -> list[list[list[int]]]:
    batches = list(sampler)
    return [batches[i : i + sampler.parts] for i in range(0, len(batches), sampler.parts)]


@pytest.mark.parametrize("name", budgets())
def test_steps_are_whole_and_within_the_budget(name: str) -> None:
    of, tokens, parts = budgets()[name]
    sampler = TokenBudgetSampler(of, tokens, parts, seed=3)
    assert len(sampler) == sampler.steps * parts
    for epoch in range(50):
        sampler.set_epoch(epoch)
        steps = steps_of(sampler)
        assert len(steps) == sampler.steps
        assert sorted(i for step in steps for batch in step for i in batch) == list(range(len(of)))
        for step in steps:
            loads = [sum(of[i] for i in batch) for batch in step]
            assert len(loads) == parts
            assert sum(loads) <= tokens
            assert all(step)
            # Dealt out: nobody has more than another by more than one example.
            assert max(loads) - min(loads) <= max(of[i] for batch in step for i in batch)


def test_steps_are_nearly_full() -> None:
    of = lengths(5000)
    sampler = TokenBudgetSampler(of, 4096)
    loads = [sum(of[i] for i in batch) for batch in sampler]
    assert min(loads) > 4096 - 3 * 127
    assert sum(loads) / len(loads) > 0.95 * 4096


def test_examples_of_a_step_do_not_depend_on_its_batches() -> None:
    def steps(parts: int) -> list[list[int]]:
        sampler = TokenBudgetSampler(lengths(300), 1500, parts, seed=2)
        sampler.set_epoch(4)
        return [sorted(i for batch in step for i in batch) for step in steps_of(sampler)]

    assert steps(1) == steps(2) == steps(6)


def test_lengths_of_a_batch_are_random() -> None:
    """In each batch some of the shortest and of the longest: it says nothing about one length."""
    of = lengths(3000)
    for batch in TokenBudgetSampler(of, 8192, 2):
        own = [of[i] for i in batch]
        assert min(own) < 32
        assert max(own) > 96


def test_batches_depend_on_seed_and_epoch_only() -> None:
    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = TokenBudgetSampler(lengths(100), 600, 2, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    found = {(seed, epoch): batches(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len({str(value) for value in found.values()}) == 9
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for (seed, epoch), value in found.items():
        assert batches(seed, epoch) == value
    assert torch.equal(torch.rand(1), expected)  # the global generator was left alone


def test_first_batches_are_fixed_for_ever() -> None:
    """A run that is resumed with a later version must go on with the same batches."""
    sampler = TokenBudgetSampler([3, 1, 2, 9, 8, 7, 5, 4], 30, 2, seed=0)
    assert list(sampler) == [[3, 2], [4, 6], [5, 1], [7, 0]]


@pytest.mark.parametrize("parts", [2, 6], ids=["plain", "accumulation"])
def test_two_processes_share_every_step(parts: int) -> None:
    """As accelerate deals batches to processes, with its way of skipping those done before."""
    sampler = TokenBudgetSampler(lengths(300), 3000, parts)
    whole = steps_of(sampler)
    own = [BatchSamplerShard(sampler, 2, rank, even_batches=False) for rank in (0, 1)]
    assert len(own[0]) == len(own[1]) == len(sampler) // 2
    for i, step in enumerate(whole):
        done = i * parts // 2
        rest = [list(SkipBatchSampler(shard, done)) for shard in own]
        assert [len(batches) for batches in rest] == [len(own[0]) - done] * 2
        mine = [batch for batches in rest for batch in batches[: parts // 2]]
        assert sorted(mine) == sorted(step)


def test_budget_in_a_loader(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = EncodedDataset(examples(pairs=True), tokenizer)
    sampler = TokenBudgetSampler(dataset.lengths, 40)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=Collator(0)))
    assert len(batches) == len(sampler) > 1
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(dataset.lengths)
    assert all(int(batch["attention_mask"].sum()) <= 40 for batch in batches)


@pytest.mark.parametrize(
    ("of", "tokens", "parts", "least"),
    [
        ([10] * 40, 28, 2, 29),
        ([10] * 41, 29, 2, 30),
        ([1] * 99 + [50], 99, 2, 100),
        ([20] * 8, 159, 8, 179),
    ],
    ids=["mean", "remainder", "longest", "one step"],
)
def test_budgets_too_small(of: list[int], tokens: int, parts: int, least: int) -> None:
    message = (
        f"must be at least {least} here, got {tokens}: a step's {parts} .* of {max(of)} tokens"
    )
    with pytest.raises(InputError, match=message):
        TokenBudgetSampler(of, tokens, parts)
    TokenBudgetSampler(of, least, parts)


@pytest.mark.parametrize(
    ("of", "parts", "seed", "message"),
    [
        ([1, 2], 3, 0, "a step has 3 batches .* the training data 2 examples"),
        ([], 1, 0, "a step has 1 batches .* the training data 0 examples"),
        ([1, 2], 0, 0, "parts must be at least 1, got 0"),
        ([1, 2], 1, -1, "seed must be at least 0, got -1"),
    ],
)
def test_bad_budget_arguments(of: list[int], parts: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenBudgetSampler(of, 100, parts, seed)
