"""Entry point of `dynabert-fast`: the parser, and one clear line for whatever goes wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dynabert_fast import __version__
from dynabert_fast.cli import checkpoints, info, quickstart, training
from dynabert_fast.errors import InputError, SaveError

#: Exit codes: 0 done, 1 the system refused (a full disk), 2 bad input, 130 interrupted.
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="dynabert-fast",
        description="One set of BERT weights, many models: train, evaluate and export sub-networks.",
        epilog="dynabert-fast COMMAND --help shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (quickstart, training, checkpoints, info):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except InputError as error:
        return _report(error, BAD_INPUT)
    except SaveError as error:
        return _report(error, FAILED)
    except KeyboardInterrupt:
        print("\ninterrupted; a run with an output folder goes on with --resume", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, say) has gone: not an error
        sys.stderr.close()
        return 0
    except OSError as error:
        return _report(error, FAILED)
    return 0


def _report(error: Exception, code: int) -> int:
    print(f"dynabert-fast: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
