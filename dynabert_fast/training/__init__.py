"""DynaBERT's training stages on the Hugging Face Trainer."""

from __future__ import annotations

from dynabert_fast.training.losses import (
    Distillation,
    TreeDistillation,
    distillation_loss,
    matched_layers,
)
from dynabert_fast.training.schedules import Schedule
from dynabert_fast.training.stages import (
    RECIPES,
    Recipe,
    Stage,
    StageData,
    TrainingOptions,
    check_teacher,
    run_stage,
    stages,
)
from dynabert_fast.training.trainer import ElasticTrainer

__all__ = [
    "RECIPES",
    "Distillation",
    "ElasticTrainer",
    "Recipe",
    "Schedule",
    "Stage",
    "StageData",
    "TrainingOptions",
    "TreeDistillation",
    "check_teacher",
    "distillation_loss",
    "matched_layers",
    "run_stage",
    "stages",
]
