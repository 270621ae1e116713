"""Entry point of `dynabert-fast`: the parser, and one clear line for whatever goes wrong."""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
from collections.abc import Sequence

from dynabert_fast import __version__
from dynabert_fast.cli import bench, checkpoints, info, quickstart, training
from dynabert_fast.cli.arguments import PROGRAM, Parser
from dynabert_fast.errors import InputError, MissingPackageError, TrainingError, lacks_memory

#: Exit codes: 0 done, 1 the system refused (a full disk) or a loss was NaN, 2 bad input; 130
#: interrupted and 141 nobody reads the output any more, as a shell reports SIGINT and SIGPIPE.
FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 1, 2, 130, 141


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = Parser(
        prog=PROGRAM,
        description="One set of BERT weights, many models: train, evaluate, export sub-networks.",
        epilog="dynabert-fast COMMAND --help shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (quickstart, training, checkpoints, bench, info):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    _use_any_console()
    words = sys.argv[1:] if argv is None else argv
    if unreadable := [word for word in words if not _is_text(word)]:
        print(f"{PROGRAM}: error: {unreadable[0]!r} is not UTF-8; rename it", file=sys.stderr)
        return BAD_INPUT
    args = build_parser().parse_args(words)
    code, message = 0, ""
    try:
        args.run(args)
        leave_processes()
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that has gone is noticed here, not when Python exits
    except InputError as error:
        code, message = BAD_INPUT, f"error: {error}"
    except ModuleNotFoundError as error:
        missing = MissingPackageError.explain(error, f"{PROGRAM} {args.command}")
        if missing is None:
            raise
        code, message = BAD_INPUT, f"error: {missing}"
    except TrainingError as error:
        code, message = FAILED, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        code, message = FAILED, f"error: {_lacking_memory(error)}"
    except OSError as error:  # SaveError among them
        code, message = _refusal(error)
    except KeyboardInterrupt:
        goes_on = hasattr(args, "resume")
        code = INTERRUPTED
        message = "interrupted" + ("; the same command with --resume goes on" if goes_on else "")
    # Here the exception is gone, and with it the progress bars that would follow the message.
    if message:
        print(f"{PROGRAM}: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _use_any_console() -> None:
    """Have what the console's encoding lacks printed as an escape, as on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_text(word: str) -> bool:
    """Whether an argument was UTF-8; other bytes come as halves of UTF-16 pairs."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lacking_memory(error: Exception) -> str:
    """What to say where memory is used up."""
    owner = "the GPU" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    text = str(error)
    text = text[max(0, text.find("DefaultCPUAllocator")) :].partition(". ")[0]
    reason = f" ({' '.join(text.split())})" if text else ""
    return (
        f"{owner} has not enough memory; smaller batches need less, and so does training with "
        f"--subnets-per-pass or --checkpointing{reason}"
    )


def leave_processes() -> None:
    """Under `torchrun`: end the group, or its threads may abort a process that is done."""
    distributed = sys.modules.get("torch.distributed")  # not imported for this
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # trainers, which are cycles, hold the group too
        distributed.destroy_process_group()


def _refusal(error: OSError) -> tuple[int, str]:
    """Exit code and message for what the operating system refused."""
    if not isinstance(error, BrokenPipeError):
        return FAILED, f"error: {error}"
    # The reader of our output (head, say) has gone. What is left in the buffer must not raise again
    # when Python closes the stream.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNREAD, ""


if __name__ == "__main__":
    sys.exit(main())
