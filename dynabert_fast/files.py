"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dynabert_fast.errors import InputError, SaveError


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside `target`, then rename it: a killed process leaves no half of one.

    Yields:
        An empty folder to write into. An older `target` is replaced only once the new one is whole.

    Raises:
        SaveError: Writing failed (a full disk, say); what was at `target` before is untouched.
    """
    aside = target.with_name(f".{target.name}.saving")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_write_failure(error):
            raise
        reason = str(error).splitlines()[0]
        raise SaveError(
            f"could not save {target} ({reason}); what was saved before is intact: "
            "free some space or choose another folder, then go on from there"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_write_failure(error: Exception) -> bool:
    """Whether an exception says that the system refused a write, in the words of any library."""
    if isinstance(error, OSError):
        return True
    # safetensors and torch.save report a refused write as error types of their own.
    text = str(error).lower()
    return any(words in text for words in ("(os error", "unexpected pos", "failed writing"))


def _flush(folder: Path) -> None:
    """Have the files on disk before the rename says that they are."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def new_folder(path: str | Path) -> Path:
    """A folder that a command may fill.

    Raises:
        InputError: It exists and is not empty, or is a file.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(f"{path} is a file; name a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is not empty; name another folder, or delete it first")
    return path
