"""Settings of a run in a file beside it: a resumed run must have the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynabert_fast.errors import InputError


def refuse_others(
    file: Path,
    run: Path,
    settings: dict[str, Any],
    default: dict[str, Any],
    free: tuple[str, ...] = (),
) -> None:
    """Refuse to go on with a run of other settings.

    Args:
        file: Where the run wrote its settings.
        run: Its folder, for the error.
        settings: Today's.
        default: What a setting was that the file does not have: it is older than the option.
        free: Beginnings of dotted names that may differ.

    Raises:
        InputError: A setting differs, or the file cannot be read.
    """
    try:
        before = _flat(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} cannot be read ({error}); choose another folder") from error
    # As a file of JSON gives them back.
    now, usual = (_flat(json.loads(json.dumps(given))) for given in (settings, default))
    # The data last: a differing number of examples says more than a digest.
    for key in sorted(now.keys() | before.keys(), key=lambda key: (key == "data", key)):
        if key.startswith(free):
            continue
        then = before[key] if key in before else usual.get(key)
        if then != now.get(key):
            raise InputError(
                f"{run} was started with {key} {then}, not {now.get(key)}; "
                f"resume with the settings of its {file.name}, or choose another folder"
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, such as `training.width.epochs`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
