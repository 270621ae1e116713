"""Folders that appear whole or not at all, and that can be checked later."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dynabert_fast.errors import InputError, SaveError


def checkpoints_folder(output: Path) -> Path:
    """Where the checkpoints of a training live that ends as `output`; beside what a link names."""
    output = Path(os.path.realpath(output))  # "." has no name
    return output.with_name(f"{output.name}.checkpoints")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside `target`, then rename it: a killed process leaves no half of one.

    Where `target` is a symbolic link, that is what it points to.

    Yields:
        An empty folder to write into. An older `target` is replaced only once the new one is whole.

    Raises:
        SaveError: Writing failed (a full disk, say); what was at `target` before is untouched.
    """
    target = Path(os.path.realpath(target))  # "." has no name
    aside = target.with_name(f".{target.name}.saving")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        try:
            aside.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except SaveError:
        raise
    except Exception as error:  # what the tokenizers library raises is nothing more special
        if not is_write_failure(error):
            raise
        raise save_error(target, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# How libraries that raise errors of their own say that the system refused a write: safetensors and
# tokenizers quote it, torch.save only finds that less was written than should be.
_QUOTED = "(os error"
_TORCH = ("unexpected pos", "failed writing", "iostream error")


def is_write_failure(error: Exception) -> bool:
    """Whether an exception says that the system refused a write, in the words of any library."""
    if isinstance(error, OSError):
        return True
    if type(error) is Exception or isinstance(error, SafetensorError):
        return _QUOTED in str(error)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH)


def save_error(target: Path, error: Exception) -> SaveError:
    """What to raise for a write of `target` that the system refused."""
    return SaveError(
        f"could not save {target} ({_reason(error)}); what was saved before is intact: "
        "free some space or choose another folder, then go on from there"
    )


def _reason(error: Exception) -> str:
    """One line for people."""
    if isinstance(error, RuntimeError):
        return "the system refused a write of torch.save"
    return (str(error) or type(error).__name__).splitlines()[0]


def _flush(folder: Path) -> None:
    """Have the files on disk before the rename says that they are."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


#: Lists a folder's files with their sizes and CRC-32s.
MANIFEST = "manifest.json"

_BLOCK = 1 << 20  # bytes read at once


def write_manifest(folder: Path) -> None:
    """Write what `find_damage` compares with: the last file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {
        str(path.relative_to(folder)): [path.stat().st_size, _crc(path)]
        for path in files
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What has happened to a folder since `write_manifest`, in a few words; `None`: nothing."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, crc) in sums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if _crc(path) != crc:
                return f"{name} has changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"it cannot be read: {_reason(error)}"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} has changed"
    return None if sums else f"{MANIFEST} has changed"


def _crc(path: Path) -> int:
    """CRC-32 of a file: against decay and torn writes, not against people."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def new_folder(path: str | Path) -> Path:
    """A folder that a command may fill.

    Raises:
        InputError: It exists and is not empty, or is a file or a link to nothing.
    """
    path = old_or_new_folder(path)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is not empty; name another folder, or delete it first")
    return path


def new_whole_folder(path: str | Path) -> Path:
    """A folder that `whole_folder` may make.

    Raises:
        InputError: As `new_folder`; or a disk is mounted there, which cannot be renamed.
    """
    path = new_folder(path)
    if os.path.ismount(os.path.realpath(path)):
        raise InputError(f"{path} is where a disk is mounted; name a new folder in it")
    return path


def old_or_new_folder(path: str | Path) -> Path:
    """A folder that a command may make or add to.

    Raises:
        InputError: It, or a part of its path, is a file or a link to nothing.
    """
    path = Path(path)
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise InputError(
                f"{part} is a link to {os.readlink(part)}, which is not there; make that folder, "
                "or name another"
            )
        if part.exists() and not part.is_dir():
            raise InputError(f"{part} is a file; name a folder")
    return path
