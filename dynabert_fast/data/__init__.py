"""Tasks, labelled texts (files, hub, standard library), and their encoding into batches."""

from __future__ import annotations

from dynabert_fast.data.encoding import (
    Collator,
    EncodedDataset,
    LengthGroupedSampler,
    TokenBudgetSampler,
)
from dynabert_fast.data.loading import Examples, TaskData, load_files, load_glue, load_hub
from dynabert_fast.data.stdlib_docs import build_stdlib_docs
from dynabert_fast.data.tasks import GLUE_TASKS, Task, get_task

__all__ = [
    "GLUE_TASKS",
    "Collator",
    "EncodedDataset",
    "Examples",
    "LengthGroupedSampler",
    "Task",
    "TaskData",
    "TokenBudgetSampler",
    "build_stdlib_docs",
    "get_task",
    "load_files",
    "load_glue",
    "load_hub",
]
