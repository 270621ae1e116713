"""The exceptions that the command line prints as a single line."""

from __future__ import annotations

#: What the extra `train` brings, as it is imported.
TRAIN_PACKAGES = frozenset(
    "accelerate huggingface_hub jinja2 safetensors scipy sklearn torch tqdm transformers".split()
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch, which may not be here, says that memory is used up."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, of a GPU
        or "can't allocate memory" in str(error)  # torch's, of a CPU
    )


class InputError(ValueError):
    """Bad input: says what was given, what is allowed and what to do."""


class SaveError(OSError):
    """Something could not be written; says what, why, and that what was saved before is intact."""


class TrainingError(ArithmeticError):
    """Training cannot go on, as a loss is NaN; says where, what was kept and what to change."""


class MissingPackageError(ImportError, InputError):
    """A package of the extra `train` is not installed; says how to get it."""

    @classmethod
    def explain(cls, error: ModuleNotFoundError, what: str) -> MissingPackageError | None:
        """What to raise instead of `error`, if a package of `train` is what `what` misses."""
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN_PACKAGES:
            return None
        return cls(f"{what} needs {package}: pip install dynabert-fast[train]", name=error.name)
