"""Evaluation of sub-networks: metrics, cost, measured latency, the grid and its report."""

from __future__ import annotations

from dynabert_fast.evaluation.cost import count_flops, count_parameters
from dynabert_fast.evaluation.grid import (
    Batches,
    Cell,
    Grid,
    evaluate_grid,
    make_batches,
    predict,
    score_grid,
    total_score,
)
from dynabert_fast.evaluation.latency import (
    Latency,
    PackedModel,
    environment,
    measure_latency,
)
from dynabert_fast.evaluation.metrics import compute_metrics, primary_metric
from dynabert_fast.evaluation.report import write_report

__all__ = [
    "Batches",
    "Cell",
    "Grid",
    "Latency",
    "PackedModel",
    "compute_metrics",
    "count_flops",
    "count_parameters",
    "environment",
    "evaluate_grid",
    "make_batches",
    "measure_latency",
    "predict",
    "primary_metric",
    "score_grid",
    "total_score",
    "write_report",
]
