"""The entry point: help, version, exit codes and what happens when a command is cut short."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import distributed

from dynabert_fast import __version__
from dynabert_fast.cli import info
from dynabert_fast.cli.main import build_parser, main
from dynabert_fast.errors import InputError, SaveError, TrainingError

COMMANDS = (
    "quickstart fit finetune rewire train-width train-depth train-final evaluate export pack "
    "bench tune info"
).split()
PROGRAM = [sys.executable, "-m", "dynabert_fast.cli.main"]


def test_every_command_is_known_here():
    (subparsers,) = (a for a in build_parser()._actions if a.dest == "command")
    assert list(subparsers.choices) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_parse(cli, command):
    result = cli(command, "--help")
    assert result.code == 0
    assert result.err == ""
    _, _, examples = result.out.partition("\nexamples:\n")
    lines = examples.replace("\\\n", "").strip().splitlines()
    assert lines
    for line in lines:
        program, *words = line.split()
        assert program == "dynabert-fast"
        assert build_parser().parse_args(words).command == command


def test_help_of_the_program_names_every_command(cli):
    result = cli("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert f"    {command}" in result.out


def test_help_imports_no_heavy_library(environment):
    code = f"""
import contextlib, io, sys
from dynabert_fast.cli.main import main
for command in {COMMANDS!r} + [None]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([command, "--help"] if command else ["--help"])
    assert "usage:" in out.getvalue()
heavy = {{"torch", "transformers", "numpy", "sklearn", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_version(cli):
    result = cli("--version")
    assert (result.code, result.out) == (0, f"dynabert-fast {__version__}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("info", "--frobnicate"), "unrecognized arguments: --frobnicate"),
        (("fit",), "the following arguments are required: --model, --output"),
        (("export", "x", "--output", "y"), "the following arguments are required: --subnet"),
    ],
    ids=["no command", "unknown command", "unknown option", "nothing given", "no subnet"],
)
def test_bad_usage_is_one_line(refused, argv, message):
    assert message in refused(*argv)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (InputError("width is wrong\nand so on"), 2, "width is wrong and so on"),
        (SaveError("could not save x"), 1, "could not save x"),
        (TrainingError("the loss is nan"), 1, "the loss is nan"),
        (OSError(28, "No space left on device", "x"), 1, "No space left on device: 'x'"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..."),
            1,
            "--subnets-per-pass or --checkpointing (CUDA out of memory)",
        ),
        (MemoryError(), 1, "training with --subnets-per-pass or --checkpointing"),
    ],
    ids=["bad input", "not saved", "no number", "operating system", "memory", "Python"],
)
def test_an_error_is_one_line_and_an_exit_code(cli, monkeypatch, raised, code, message):
    def run(args):
        raise raised

    monkeypatch.setattr(info, "_info", run)
    result = cli("info")
    assert result.code == code
    assert result.err.startswith("dynabert-fast: error: ")
    assert result.err.endswith(f"{message}\n")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), RuntimeError("x")])
def test_an_error_of_our_own_is_not_hidden(cli, monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(info, "_info", run)
    with pytest.raises(type(error)):
        cli("info")


def test_a_full_memory_is_one_line(cli, monkeypatch):
    """In torch's words. (To provoke it would have glibc serve this thread from another arena.)"""

    def run(args):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
        )

    monkeypatch.setattr(info, "_info", run)
    result = cli("info")
    assert result.code == 1
    assert result.err.startswith("dynabert-fast: error: this machine has not enough memory; ")
    reason = "(DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes)\n"
    assert result.err.endswith(reason)
    assert result.err.count("\n") == 1


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_done(refused):
    message = r"'t\udcff.csv' is not UTF-8; rename it"
    assert message in refused("fit", "--train-file", "t\udcff.csv")


def test_a_console_of_another_encoding(cli, monkeypatch):
    """A table's signs, or a name, do not end a run that is done."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(info, "_info", lambda args: print("1 × ü"))
    assert main(["info"]) == 0
    assert console.buffer.getvalue() == b"1 \\xd7 \\xfc\n"


def test_without_an_output(monkeypatch):
    """As under `>&-`, where Python has no stream."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(info, "_info", lambda args: print("x"))
    assert main(["info"]) == 0


@pytest.mark.slow
def test_nobody_reads_the_output(environment):
    """As in `dynabert-fast info | true`: no traceback, and not the exit code of a finished run."""
    process = subprocess.Popen(
        [*PROGRAM, "info"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def unexpected(err):
    """Lines of standard error that are not a progress bar of ours."""
    lines = (line.strip("\x1b[A ") for line in re.split("[\r\n]", err))
    return [line for line in lines if line and not re.match(r"(\w+: +)?\d+%\|", line)]


@pytest.mark.slow
def test_interrupt(tmp_path, checkpoints, sources, environment):
    """A real SIGINT in training: exit code 130, one line after the bars, the checkpoint is kept."""
    output = tmp_path / "out"
    command = ["finetune", str(checkpoints["pretrained"]), "--output", str(output)]
    options = ["--max-steps", "1000000", "--save-every", "2", *sources["classes"]]
    process = subprocess.Popen(
        [*PROGRAM, *command, *options, "--batch-size", "8"],
        env=environment,
        # A shell's background job ignores it, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out.checkpoints/checkpoint-*")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    message = "dynabert-fast: interrupted; the same command with --resume goes on"
    assert unexpected(err) == [message]
    assert err.endswith(message + "\n")
    assert list(tmp_path.glob("out.checkpoints/checkpoint-*"))
    assert not output.exists()


@pytest.mark.slow
def test_full_disk(tmp_path, checkpoints, sources, environment):
    words = ["finetune", str(checkpoints["pretrained"]), "--max-steps", "1", *sources["classes"]]
    command = [*PROGRAM, *words, "--output", str(tmp_path / "out")]
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 50; exec "$@"', "-", *command],  # of 1024 bytes
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    (line,) = unexpected(result.stderr)
    assert line.startswith(f"dynabert-fast: error: could not save {tmp_path / 'out'}")
    assert result.stderr.endswith(line + "\n")
    assert not (tmp_path / "out").exists()


def test_a_command_leaves_its_group_of_processes(cli):
    """Threads of a group that is there at the exit abort the process now and then."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert cli("info").code == 0
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
