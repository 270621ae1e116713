"""A checkpoint's fast tokenizer without transformers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dynabert_fast.errors import InputError

if TYPE_CHECKING:
    import tokenizers


_LONGEST = 1 << 24


class Tokenizer:
    """Texts to the arrays that an engine takes, by a checkpoint's `tokenizer.json`.

        batch = Tokenizer("checkpoint")(["a text", "another"])
        engine(**batch)

    Calls from several Python threads are safe.

    Args:
        path: The file, or the folder it is in.

    Raises:
        InputError: There is none, it cannot be read, or the package `tokenizers` is missing.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                "the tokenizer needs the package tokenizers: pip install dynabert-fast[edge]"
            ) from error
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{path} holds no tokenizer.json; save the checkpoint's tokenizer")
        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more special
            raise InputError(f"{file} is not a tokenizer that can be read: {error}") from error
        self._tokenizer.no_padding()
        self._lock = threading.Lock()  # of the truncation, which is a state of the library's

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        max_length: int = 512,
    ) -> dict[str, np.ndarray]:
        """Encode texts (with a second text each, if given).

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, `[B, S]` int64, as long as the
            longest.

        Raises:
            InputError: No text, another number of second texts, something else than a text, or a
                `max_length` that leaves no room for one.
        """
        first = [texts] if isinstance(texts, str) else list(texts)
        second = [pairs] if isinstance(pairs, str) else None if pairs is None else list(pairs)
        if not first or (second is not None and len(second) != len(first)):
            raise InputError(
                f"there must be one text or more, and as many second texts; got {len(first)}"
                + ("" if second is None else f" and {len(second)}")
            )
        least = self._tokenizer.num_special_tokens_to_add(second is not None) + 1
        if not isinstance(max_length, int) or not least <= max_length <= _LONGEST:
            raise InputError(f"max_length must be in {least} to {_LONGEST}, got {max_length!r}")
        inputs = first if second is None else list(zip(first, second, strict=True))
        try:
            with self._lock:
                self._tokenizer.enable_truncation(max_length)
                encoded = self._tokenizer.encode_batch(inputs)
        except TypeError:
            bad = next((t for t in (*first, *(second or ())) if not _is_text(t)), None)
            raise InputError(f"texts must be valid strings, got {bad!r:.80}") from None
        shape = (len(encoded), max(len(e.ids) for e in encoded))
        batch = {
            name: np.zeros(shape, np.int64)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        for row, e in enumerate(encoded):
            batch["input_ids"][row, : len(e.ids)] = e.ids
            batch["attention_mask"][row, : len(e.ids)] = 1
            batch["token_type_ids"][row, : len(e.ids)] = e.type_ids
        return batch


def _is_text(value: object) -> bool:
    """Whether it is a string, and none with half a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value
