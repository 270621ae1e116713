"""The exceptions that the command line prints as a single line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: says what was given, what is allowed and what to do."""


class SaveError(OSError):
    """Something could not be written; says what, why, and that what was saved before is intact."""
