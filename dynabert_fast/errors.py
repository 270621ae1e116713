"""The one exception type for bad input, so that the command line can print it as a single line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: says what was given, what is allowed and what to do."""
