"""Token ids made once; batches padded to their longest row, of like lengths or of like totals."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dynabert_fast.data.loading import Examples
from dynabert_fast.errors import InputError

# Texts handed to the tokenizer at a time: enough for its threads, little memory.
_CHUNK = 1024

# Batches among which rows are sorted by length: wide enough to leave next to no padding (2 % on the
# standard library texts at batch 32), narrow enough that a row's company in its batch stays random.
_MEGABATCH = 50


class EncodedDataset(Dataset[dict[str, Any]]):
    """Tokenised examples, not padded; the tokenizer runs once, at construction.

    An item is a dict of ``input_ids`` and ``attention_mask`` (lists of int, of the row's length),
    ``token_type_ids`` (the same, if the tokenizer gives them) and ``labels`` (int, or float for
    regression).

    Args:
        examples: what to encode.
        tokenizer: of the model that will read the ids.
        max_length: longer examples are cut to this many tokens, a pair's longer text first.

    Attributes:
        labels: as in ``examples``.
        lengths: tokens of each example, special ones included.

    Raises:
        InputError: ``max_length`` leaves no room for text, or the tokenizer cannot read them.
    """

    def __init__(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int = 128
    ) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=examples.pairs is not None)
        if max_length <= special:
            raise InputError(
                f"max_length must be above {special}, the special tokens alone, got {max_length}"
            )
        self.labels = examples.labels
        self.lengths: list[int] = []
        # Rows end to end in one array: lists of lists would take some ten times the memory.
        ids = [np.zeros(0, np.int32)]
        types: list[np.ndarray] = []
        chunks = range(0, len(examples), _CHUNK)
        for start in tqdm(chunks, "tokenise", delay=1, leave=False, disable=None):
            rows = slice(start, start + _CHUNK)
            try:
                encoded = tokenizer(
                    examples.texts[rows],
                    None if examples.pairs is None else examples.pairs[rows],
                    truncation=True,
                    max_length=max_length,
                    padding=False,
                    return_attention_mask=False,
                )
            except Exception as error:
                if type(error) is not Exception:  # what the tokenizers library raises
                    raise
                raise InputError(
                    f"the tokenizer cannot read the texts ({error}); copy its files again, from "
                    "the pretrained model"
                ) from error
            self.lengths += map(len, encoded["input_ids"])
            ids += [np.array(row, np.int32) for row in encoded["input_ids"]]
            types += [np.array(row, np.int8) for row in encoded.get("token_type_ids", ())]
        self._starts = np.cumsum([0, *self.lengths])
        self._ids = np.concatenate(ids)
        self._types = np.concatenate(types) if types else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        index %= len(self)
        row = slice(self._starts[index], self._starts[index + 1])
        item: dict[str, Any] = {"input_ids": self._ids[row].tolist()}
        if self._types is not None:
            item["token_type_ids"] = self._types[row].tolist()
        return item | {"attention_mask": [1] * self.lengths[index], "labels": self.labels[index]}

    @property
    def largest_id(self) -> int:
        """The largest token id, -1 without tokens."""
        return int(self._ids.max(initial=-1))

    @property
    def largest_type(self) -> int:
        """The largest token type, 0 without types."""
        return 0 if self._types is None else int(self._types.max(initial=0))

    def digest(self) -> str:
        """A short hash of all examples."""
        parts = [self._starts, self._ids, *(() if self._types is None else [self._types])]
        digest = hashlib.sha256(repr(list(self.labels)).encode())
        for part in parts:
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]


class Collator:
    """Pads a list of items to the longest of them.

    Args:
        pad_token_id: the id that fills ``input_ids``.
        pad_to_multiple_of: rounds the padded length up to a multiple of this.

    Raises:
        InputError: ``pad_to_multiple_of`` below 1.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise InputError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        self.fill = {"input_ids": pad_token_id, "token_type_ids": 0, "attention_mask": 0}
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns the items as one batch.

        ``input_ids``, ``attention_mask`` (0 on padding) and, if the items have them,
        ``token_type_ids`` are int64 ``[B, S]``; ``labels`` are ``[B]``, int64 classes or float32
        values.
        """
        longest = max(len(item["input_ids"]) for item in items)
        length = -(-longest // self.multiple) * self.multiple
        batch = {
            name: torch.tensor([item[name] + [fill] * (length - len(item[name])) for item in items])
            for name, fill in self.fill.items()
            if name in items[0]
        }
        labels = [item["labels"] for item in items]
        dtype = torch.float32 if isinstance(labels[0], float) else torch.long
        return batch | {"labels": torch.tensor(labels, dtype=dtype)}


class LengthGroupedSampler(Sampler[int]):
    """Every index once per epoch, such that batches have rows of like length.

    A random order is cut into megabatches of 50 batches, each is sorted by length and cut into
    batches, and all batches are shuffled; a short batch stays last. The order is a function of
    (seed, epoch) alone: another pass over the epoch, in another process too, gives it again.

    Args:
        lengths: tokens of each example.
        batch_size: that of the loader which uses this sampler.
        seed: any number from 0.

    Raises:
        InputError: ``batch_size`` below 1 or ``seed`` below 0.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        mega = _MEGABATCH * self.batch_size
        for start in range(0, len(order), mega):
            group = order[start : start + mega]
            by_length = np.argsort(-self.lengths[group], kind="stable")
            order[start : start + mega] = group[by_length]
        whole = len(order) - len(order) % self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        yield from rng.permutation(batches).reshape(-1).tolist()  # permutes rows: whole batches
        yield from order[whole:].tolist()


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of random examples that hold, a step at a time, like numbers of tokens.

    A step is an optimiser step over everything: ``parts`` batches, one for each process and each
    accumulated batch, have at most ``tokens`` real tokens together. Every index comes once an
    epoch and every step is whole, so an epoch has the same number of batches in every process.

    A random order is cut into steps at equal sums of tokens. Cuts fall between examples, so a step
    has less than the longest example, L tokens, above the mean; with
    ``ceil(total / (tokens - L + 1))`` steps, none of them is above ``tokens`` in any order. Which
    examples make a step depends on (seed, epoch) alone, not on ``parts``: another number of
    processes trains on the same steps. Inside a step the examples are dealt to batches of near
    equal totals, so that no process waits for another for long.

    Examples of like length would save nothing: padding is not computed.

    Args:
        lengths: tokens of each example.
        tokens: most tokens of a step.
        parts: batches of a step: processes times accumulated batches.
        seed: any number from 0.

    Attributes:
        steps: in an epoch.

    Raises:
        InputError: there are fewer examples than a step has batches; ``tokens`` leaves less than
            one example for each of them; ``seed`` below 0 or ``parts`` below 1.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, parts: int = 1, seed: int = 0) -> None:
        if parts < 1:
            raise InputError(f"parts must be at least 1, got {parts}")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        count = len(lengths)
        if count < parts:
            raise InputError(
                f"a step has {parts} batches (processes times accumulated batches), the training "
                f"data {count} examples; use fewer batches a step or more data"
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tokens = tokens
        self.parts = parts
        self.seed = seed
        self.epoch = 0
        longest, total = int(self.lengths.max()), int(self.lengths.sum())
        # At least `parts` examples a step: even the longest, and in the mean.
        least = max(parts * longest, longest - 1 - -total // (count // parts))
        if tokens < least:
            raise InputError(
                f"tokens_per_step must be at least {least} here, got {tokens}: a step's {parts} "
                f"batches have an example each, the longest of {longest} tokens, the mean of "
                f"{total / count:.1f}"
            )
        self.steps = -(-total // (tokens - longest + 1))

    @property
    def largest(self) -> int:
        """Tokens that no batch of any epoch is above: dealt longest first, to the least filled."""
        share = self.tokens if self.parts == 1 else self.tokens // self.parts + self.lengths.max()
        return int(min(share, self.tokens, self.lengths.sum()))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        for step in np.split(order, self._cuts(order)):
            yield from self._deal(step.tolist())

    def _cuts(self, order: np.ndarray) -> np.ndarray:
        """Where each step but the first begins: step i with the first token after i means."""
        starts = np.cumsum(self.lengths[order]) - self.lengths[order]
        numbers = np.arange(1, self.steps)
        cuts = np.searchsorted(starts * self.steps, numbers * int(self.lengths.sum()))
        # Steps of few examples: each gets `parts` of them at least, which `tokens` has room for.
        room = numbers * self.parts
        cuts = np.maximum(np.maximum.accumulate(cuts - room), 0) + room
        return np.minimum(cuts, len(order) - (self.steps - numbers) * self.parts)

    def _deal(self, step: list[int]) -> list[list[int]]:
        """A step's examples in batches: the longest first, each to the batch that has least."""
        if self.parts == 1:
            return [step]
        batches: list[list[int]] = [[] for _ in range(self.parts)]
        loads = [(0, part) for part in range(self.parts)]
        for index in sorted(step, key=lambda i: -self.lengths[i]):
            load, part = heapq.heappop(loads)
            batches[part].append(index)
            heapq.heappush(loads, (load + int(self.lengths[index]), part))
        return batches
