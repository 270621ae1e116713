"""Folders that appear whole or not at all: on errors, kills, and a system that refuses to write."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dynabert_fast.errors import InputError, SaveError
from dynabert_fast.files import (
    MANIFEST,
    checkpoints_folder,
    find_damage,
    is_write_failure,
    new_folder,
    new_whole_folder,
    whole_folder,
    write_manifest,
)


def fill(folder, text="new", names=("a.txt", "deep/b.txt")):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=[False, True], ids=["new", "over an older one"])
def target(request, tmp_path):
    """A folder to make, or to replace."""
    target = tmp_path / "parent" / "target"
    if request.param:
        fill(target, "old", ("a.txt", "c.txt"))
    return target


@pytest.fixture
def before(target):
    """What is at the target, and under its parent, at first."""
    return contents(target) if target.exists() else None


def untouched(target, before):
    """Whether nothing came of an attempt, hidden folders included."""
    now = contents(target) if target.exists() else None
    around = sorted(p.name for p in target.parent.iterdir()) if target.parent.exists() else []
    return now == before and around in ([], [target.name])


def test_a_whole_folder_appears(target):
    with whole_folder(target) as aside:
        fill(aside)
        assert not (target / "deep").exists()
    assert contents(target) == {"a.txt": "new", "deep/b.txt": "new"}
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_a_link_names(tmp_path):
    """On a larger disk, say: what was linked to is filled, and the link stays."""
    disk, link = tmp_path / "large" / "disk", tmp_path / "link"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    assert checkpoints_folder(link) == tmp_path / "large" / "disk.checkpoints"
    with whole_folder(new_folder(link)) as aside:
        fill(aside)
        assert aside.parent == tmp_path / "large"
    assert link.is_symlink()
    assert contents(disk) == {"a.txt": "new", "deep/b.txt": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "link"]


@pytest.mark.parametrize("name", ["link", "link/new"])
def test_a_link_to_nothing(tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"is a link to .*gone, which is not there; make that"):
        new_folder(tmp_path / name)


def test_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path))
    with pytest.raises(InputError, match="is where a disk is mounted; name a new folder in it"):
        new_whole_folder(tmp_path)
    new_whole_folder(tmp_path / "new")
    new_folder(tmp_path)  # what `fit` fills is not renamed


def test_a_folder_that_is_named_by_a_dot(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with whole_folder(Path()) as aside:
        assert aside.parent == tmp_path
        (aside / "new").write_text("x")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["new"]


def test_what_killed_processes_left_is_cleared(target):
    for name in (".target.saving", ".target.old"):
        fill(target.parent / name, "torn", ("torn.txt",))
    with whole_folder(target) as aside:
        assert list(aside.iterdir()) == []
        fill(aside)
    assert contents(target) == {"a.txt": "new", "deep/b.txt": "new"}
    assert not (target.parent / ".target.saving").exists()


@pytest.mark.parametrize("error", [ValueError, InputError, RuntimeError, KeyboardInterrupt])
def test_other_errors_pass_through(target, before, error):
    with pytest.raises(error, match="ours"), whole_folder(target) as aside:  # noqa: PT012
        fill(aside)
        raise error("ours")
    assert untouched(target, before)


REFUSALS = {
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "over quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "read-only": PermissionError(errno.EACCES, "Permission denied"),
    "safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    "torch's archive": RuntimeError("PytorchStreamWriter failed writing file data/0: file write"),
    "torch's stream": RuntimeError("basic_ios::clear: iostream error"),
    "tokenizers": Exception("No space left on device (os error 28)"),
    "no words": OSError(),
}


@pytest.mark.parametrize("error", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refused_write_is_one_clear_line(target, before, error):
    with pytest.raises(SaveError) as caught, whole_folder(target) as aside:  # noqa: PT012
        fill(aside)
        raise error
    message = str(caught.value)
    assert message.startswith(f"could not save {target} (")
    assert "intact" in message
    assert "free some space" in message
    assert "\n" not in message
    assert caught.value.__cause__ is error
    assert untouched(target, before)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("size mismatch for x"),
        SafetensorError("bad header"),
        Exception("unknown token"),
        InputError("x does not load (No such file or directory (os error 2))"),
    ],
)
def test_errors_that_are_no_refusal(error):
    assert not is_write_failure(error)


def test_a_save_error_is_not_wrapped_again(target, before):
    with pytest.raises(SaveError, match=r"^ours$"), whole_folder(target) as aside:  # noqa: PT012
        fill(aside)
        raise SaveError("ours")
    assert untouched(target, before)


# Each call of the system that may fail once the folder is filled.
@pytest.mark.parametrize("call", [1, 2], ids=["first rename", "second rename"])
def test_a_failed_rename_leaves_the_older_folder(tmp_path, monkeypatch, call):
    target, rename, calls = tmp_path / "target", Path.rename, []
    fill(target, "old", ("a.txt",))

    def fails(self, other):
        calls.append(other)
        if len(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(SaveError, match="Input/output error"), whole_folder(target) as aside:
        fill(aside)
    assert untouched(target, {"a.txt": "old"})


def test_a_failed_flush_leaves_the_older_folder(target, before, monkeypatch):
    def fails(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SaveError, match="No space left"), whole_folder(target) as aside:
        fill(aside)
    assert untouched(target, before)


def test_a_parent_that_is_a_file_is_a_save_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SaveError, match="could not save"),
        whole_folder(tmp_path / "file" / "target"),
    ):
        pass


# Where a process is killed: the function that kills it when called.
KILLS = {
    "first write": "Path.write_text",
    "before the flush": "os.fsync",
    "before the rename": "Path.rename",
}
KILLED = """
import os, signal, sys
from pathlib import Path
from dynabert_fast.files import whole_folder

with whole_folder(Path(sys.argv[1])) as aside:
    if sys.argv[2] != "Path.write_text":
        (aside / "a.txt").write_text("new")
    {0} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    (aside / "b.txt").write_text("new")
"""


@pytest.mark.parametrize("place", KILLS.values(), ids=KILLS.keys())
def test_a_killed_process_leaves_no_half(target, before, place):
    code = [sys.executable, "-c", KILLED.replace("{0}", place), str(target), place]
    assert subprocess.run(code).returncode == -9
    assert (contents(target) if target.exists() else None) == before
    assert (target.parent / ".target.saving").is_dir()  # what the next attempt clears
    with whole_folder(target) as aside:
        fill(aside)
    assert contents(target) == {"a.txt": "new", "deep/b.txt": "new"}


# A real refusal: files of this process may not grow beyond 64 KiB.
REFUSED = """
import json, resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from dynabert_fast.errors import SaveError
from dynabert_fast.files import whole_folder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
large = torch.zeros(2**16)
writers = {
    "safetensors": lambda path: save_file({"x": large}, path),
    "torch.save": lambda path: torch.save({"x": large}, path),
    "text": lambda path: path.write_text("x" * 2**17),
}
said = {}
for name, write in writers.items():
    try:
        with whole_folder(Path(sys.argv[1]) / name) as aside:
            (aside / "small").write_text("new")
            write(aside / "large")
    except SaveError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """A folder of older folders, and what a process said that could not replace them."""
    root = tmp_path_factory.mktemp("refused")
    for name in ("safetensors", "torch.save", "text"):
        fill(root / name, "old", ("small",))
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(root)], capture_output=True, text=True, check=True
    )
    return root, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["safetensors", "torch.save", "text"])
def test_the_system_refuses_to_write(refused, writer):
    root, said = refused
    assert said[writer].startswith(f"could not save {root / writer} (")
    assert "\n" not in said[writer]
    assert contents(root / writer) == {"small": "old"}
    assert sorted(path.name for path in root.iterdir()) == ["safetensors", "text", "torch.save"]


# What happens to a folder of a.txt and deep/b.txt (3 bytes each) after its manifest was written.
DAMAGES = {
    "none": (lambda folder: None, None),
    "a file more": (lambda folder: fill(folder, "x", ("c.txt",)), None),
    "another file": (lambda folder: fill(folder, "now", ("deep/b.txt",)), "deep/b.txt has changed"),
    "longer": (lambda folder: fill(folder, "news", ("a.txt",)), "a.txt has 4 bytes, not 3"),
    "missing": (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "no folder": (shutil.rmtree, f"{MANIFEST} is missing"),
    "no text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), f"{MANIFEST} has changed"),
    **{
        f"manifest {text}": (
            lambda folder, text=text: (folder / MANIFEST).write_text(text),
            f"{MANIFEST} has changed",
        )
        for text in ("", "{", "{}", "[]", "null", '{"a.txt": 3}', '{"a.txt": [3]}')
    },
}


@pytest.mark.parametrize(("harm", "damage"), DAMAGES.values(), ids=DAMAGES.keys())
def test_find_damage(tmp_path, harm, damage):
    folder = tmp_path / "folder"
    fill(folder)
    write_manifest(folder)
    write_manifest(folder)  # which does not list itself
    harm(folder)
    assert find_damage(folder) == damage


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    fill(tmp_path)
    write_manifest(tmp_path)

    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("dynabert_fast.files._crc", fails)
    assert find_damage(tmp_path) == "it cannot be read: [Errno 5] Input/output error"


def test_new_folder(tmp_path):
    assert new_folder(str(tmp_path / "absent" / "deep")) == tmp_path / "absent" / "deep"
    assert list(tmp_path.iterdir()) == []  # only checked
    (tmp_path / "empty").mkdir()
    assert new_folder(tmp_path / "empty") == tmp_path / "empty"
    fill(tmp_path / "full")
    with pytest.raises(InputError, match="full is not empty; name another folder"):
        new_folder(tmp_path / "full")
    for path in (tmp_path / "full" / "a.txt", tmp_path / "full" / "a.txt" / "below"):
        with pytest.raises(InputError, match=r"a\.txt is a file; name a folder"):
            new_folder(path)
    shutil.rmtree(tmp_path / "full")
    new_folder(tmp_path / "full")
