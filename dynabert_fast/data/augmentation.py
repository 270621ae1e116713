"""More training sentences by replacing words, as for TinyBERT (arXiv 1909.10351, algorithm 1).

Every alphabetic word that is no function word gets candidates. One that is a single piece of the
tokenizer is masked, and the masked language model proposes words for its place; one of several
pieces has the words whose vectors are nearest to its own. Copies of the sentence then have each
word replaced with some probability by one of its candidates.

Vectors are rows of the model's input embeddings (of several pieces: their mean) compared by cosine,
where TinyBERT used GloVe; candidates are whole alphabetic words of the model's vocabulary, other
than the word itself. Of a pair of texts, each copy changes one: the first, the second, and so on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynabert_fast.data.loading import Examples
from dynabert_fast.errors import InputError, lacks_memory

# Hyphens and apostrophes belong to a word, which is then not alphabetic: "don't" stays.
_WORD = re.compile(r"\w+(?:['’-]\w+)*")

# Tokens that the model sees at once. All their logits, where a model computes them, are 250 MB.
_TOKENS = 2048

# Texts whose candidates are found together; rows of like length are gathered among them.
_TEXTS = 64

# Ways in which a vocabulary may have a word: small, with a capital, in capitals.
_CASES = 3

#: English function words, which stay as they are: replaced, they change what a sentence says.
STOP_WORDS = frozenset(
    """
    a about above after again against all am an and any are as at be because been before being below
    between both but by can cannot could did do does doing down during each few for from further had
    has have having he her here hers herself him himself his how i if in into is it its itself just
    me might more most must my myself neither no nor not now of off on once only or other our ours
    ourselves out over own same shall she should so some such than that the their theirs them
    themselves then there these they this those through to too under until up upon us very was we
    were what when where which while who whom whose why will with would you your yours yourself
    yourselves
    """.split()
)


@dataclass(frozen=True)
class Augmentation:
    """How training examples are multiplied; the defaults are TinyBERT's.

    Attributes:
        copies: Tries per example; each gives one more, unless it is there already.
        probability: Of replacing a word.
        candidates: Words to choose among.
        seed: Of what is replaced by what; an example's copies do not depend on other examples.
    """

    copies: int = 20
    probability: float = 0.4
    candidates: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no copies."""
        for name in ("copies", "candidates"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.probability <= 1:
            raise InputError(f"probability must be above 0 and at most 1, got {self.probability}")


class Choice(NamedTuple):
    """A word of a text, `text[start:end]`, and what may stand in its place, best first."""

    start: int
    end: int
    words: tuple[str, ...]


def load_masked_lm(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model and its tokenizer, from a folder or the hub.

    Raises:
        InputError: It does not load, its head's weights are missing, or its tokenizer cannot serve.
    """
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(source, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever a library finds: tokenizers raises nothing more special
        if lacks_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source} does not load as a masked language model ({reason})") from error
    if lacking := sorted(report["missing_keys"]):
        raise InputError(
            f"{source} has no {lacking[0]}: it is an encoder without the head of a masked language "
            "model; name one with it, bert-base-uncased for instance"
        )
    return model, tokenizer


def augment(
    examples: Examples,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: Augmentation | None = None,
    progress: bool = True,
) -> Examples:
    """Multiply examples; labels are kept.

    Args:
        examples: What to multiply.
        model: A masked language model; used where it is, in evaluation mode.
        tokenizer: Its own.
        options: How.
        progress: Show a progress bar.

    Returns:
        Each example followed by its copies, without duplicates among them.

    Raises:
        InputError: The tokenizer has no mask, or does not tell where its pieces are in the text.
    """
    options = options or Augmentation()
    proposer = Proposer(model, tokenizer, options.candidates)
    columns = [examples.texts] + ([] if examples.pairs is None else [examples.pairs])
    rows: list[tuple[str, ...]] = []
    labels = []
    steps = range(0, len(examples), _TEXTS)
    for start in tqdm(steps, "augment", delay=1, leave=False, disable=None if progress else True):
        part = [column[start : start + _TEXTS] for column in columns]
        choices = [proposer.propose(texts) for texts in part]
        for offset, texts in enumerate(zip(*part, strict=True)):
            index = start + offset
            rng = random.Random(f"{options.seed} {index}")
            copies = _copies(texts, [column[offset] for column in choices], options, rng)
            rows += copies
            labels += [examples.labels[index]] * len(copies)
    texts_, *pairs = ([row[i] for row in rows] for i in range(len(columns)))
    return Examples(texts_, pairs[0] if pairs else None, labels)


def _copies(
    texts: tuple[str, ...],
    choices: Sequence[Sequence[Choice]],
    options: Augmentation,
    rng: random.Random,
) -> list[tuple[str, ...]]:
    """The example, then its copies; a dict keeps their order and drops duplicates."""
    found = {texts: None}
    for attempt in range(options.copies):
        changed = attempt % len(texts)
        copy = replace_words(texts[changed], choices[changed], options.probability, rng)
        found[(*texts[:changed], copy, *texts[changed + 1 :])] = None
    return list(found)


def replace_words(
    text: str, choices: Sequence[Choice], probability: float, rng: random.Random
) -> str:
    """The text with each word of `choices` replaced with this probability by one of its own."""
    parts, end = [], 0
    for choice in choices:
        if choice.words and rng.random() < probability:
            parts += [text[end : choice.start], rng.choice(choice.words)]
            end = choice.end
    return "".join([*parts, text[end:]])


def words_to_replace(text: str) -> list[tuple[int, int]]:
    """Start and end of every alphabetic word that is no function word."""
    found = (match.span() for match in _WORD.finditer(text))
    words = ((start, end, text[start:end]) for start, end in found)
    return [(s, e) for s, e, word in words if word.isalpha() and word.lower() not in STOP_WORDS]


class Proposer:
    """Finds candidates for the words of texts.

    Args:
        model: A masked language model.
        tokenizer: Its own.
        count: Candidates of each word.

    Raises:
        InputError: See `augment`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 15
    ) -> None:
        if tokenizer.mask_token_id is None or not tokenizer.is_fast:
            raise InputError(
                "augmentation needs a fast tokenizer with a mask token, got "
                f"{type(tokenizer).__name__}"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.count = count
        self._padding = tokenizer.pad_token_id or 0
        self.words = _whole_words(tokenizer, model.get_input_embeddings().num_embeddings)
        self._ids = torch.tensor(sorted(self.words), device=model.device)
        with torch.no_grad():
            self._vectors = model.get_input_embeddings().weight.float()
            self._unit = torch.nn.functional.normalize(self._vectors[self._ids], dim=-1)
        self._near: dict[tuple[int, ...], tuple[str, ...]] = {}

    @torch.no_grad()
    def propose(self, texts: Sequence[str]) -> list[list[Choice]]:
        """For each text its words to replace, in order, with their candidates."""
        encoded = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=min(self.tokenizer.model_max_length, self._positions()),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        choices: list[list[Choice]] = [[] for _ in texts]
        masked: list[tuple[int, int, int]] = []  # row, position of the mask, place in `choices`
        for row, text in enumerate(texts):
            offsets, special = encoded["offset_mapping"][row], encoded["special_tokens_mask"][row]
            for start, end in words_to_replace(text):
                pieces = _pieces(offsets, special, start, end)
                if not pieces:
                    continue  # beyond the model's positions
                if len(pieces) == 1:
                    masked.append((row, pieces[0], len(choices[row])))
                    words: tuple[str, ...] = ()
                else:
                    ids = tuple(encoded["input_ids"][row][i] for i in pieces)
                    words = self._nearest(ids, text[start:end])
                choices[row].append(Choice(start, end, words))
        for (row, _, place), scores in zip(masked, self._scores(encoded, masked), strict=True):
            old = choices[row][place]
            words = self._best(scores, texts[row][old.start : old.end])
            choices[row][place] = old._replace(words=words)
        return choices

    def _positions(self) -> int:
        """Longest sequence of the model; RoBERTa's positions begin behind that of its padding."""
        config = self.model.config
        longest = int(getattr(config, "max_position_embeddings", 0) or 512)
        return longest - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)

    def _scores(
        self, encoded: dict[str, list[list[int]]], masked: Sequence[tuple[int, int, int]]
    ) -> list[Tensor]:
        """Logits of the whole words at each mask, `[W]`; every mask has a sequence of its own."""
        names = [name for name in self.tokenizer.model_input_names if name in encoded]
        scores: list[Tensor] = [torch.empty(0)] * len(masked)
        for batch in _by_length([len(encoded["input_ids"][row]) for row, *_ in masked]):
            rows = [masked[i][0] for i in batch]
            places = torch.tensor([masked[i][1] for i in batch], device=self.model.device)
            inputs = {
                name: pad_sequence(
                    [torch.tensor(encoded[name][row]) for row in rows],
                    batch_first=True,
                    padding_value=self._padding if name == "input_ids" else 0,
                ).to(self.model.device)
                for name in names
            }  # [B, S]
            inputs["input_ids"].scatter_(1, places[:, None], self.tokenizer.mask_token_id)
            logits = self._logits_at(places, inputs)  # [B, V]
            for i, row_scores in zip(batch, logits[:, self._ids].float(), strict=True):
                scores[i] = row_scores
        return scores

    def _logits_at(self, places: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Logits `[B, V]` at one place of each sequence.

        The head's product with the vocabulary is as much work as a small encoder: where it is a
        layer of its own, the hidden states of other places are dropped before it.
        """
        which = torch.arange(len(places), device=places.device)

        def drop(_: nn.Module, hidden: tuple[Tensor]) -> tuple[Tensor] | None:
            whole = hidden[0].shape[:-1] == inputs["input_ids"].shape
            return (hidden[0][which, places][:, None],) if whole else None

        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(drop) if isinstance(head, nn.Module) else None
        try:
            logits = self.model(**inputs).logits
        finally:
            if hook is not None:
                hook.remove()
        return logits[:, 0] if logits.shape[1] == 1 else logits[which, places]

    def _best(self, scores: Tensor, word: str) -> tuple[str, ...]:
        """The words of highest score, best first, without `word`."""
        top = scores.topk(min(self.count + _CASES, len(scores))).indices
        found = (self.words[i] for i in self._ids[top].tolist())
        return tuple(w for w in found if w.lower() != word.lower())[: self.count]

    def _nearest(self, pieces: tuple[int, ...], word: str) -> tuple[str, ...]:
        if pieces not in self._near:
            vector = self._vectors[list(pieces)].mean(0)
            cosines = self._unit @ torch.nn.functional.normalize(vector, dim=-1)
            self._near[pieces] = self._best(cosines, word)
        return self._near[pieces]


def _whole_words(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Tokens that are alphabetic words by themselves, by id.

    A word behind a space must encode to that token alone: parts of words do not, in any tokenizer.
    """
    ids = [i for i in sorted(tokenizer.get_vocab().values()) if i < size]
    texts = [text.strip() for text in tokenizer.batch_decode([[i] for i in ids])]
    candidates = [(i, text) for i, text in zip(ids, texts, strict=True) if text.isalpha()]
    if not candidates:
        return {}
    again = tokenizer([f" {text}" for _, text in candidates], add_special_tokens=False)["input_ids"]
    return {i: text for (i, text), back in zip(candidates, again, strict=True) if back == [i]}


def _pieces(
    offsets: Sequence[tuple[int, int]], special: Sequence[int], start: int, end: int
) -> list[int]:
    """Positions of the tokens of `text[start:end]`; none if they are not exactly that."""
    found = [
        i
        for i, (first, last) in enumerate(offsets)
        if not special[i] and first < end and last > start
    ]
    exact = found and offsets[found[0]][0] == start and offsets[found[-1]][1] == end
    return found if exact else []


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, of at most `_TOKENS` padded tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > _TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
