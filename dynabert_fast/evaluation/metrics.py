"""Task metrics as fractions. The first of a result is the primary one: of it, more is better."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from dynabert_fast.data.tasks import CLASSIFICATION_METRICS, REGRESSION_METRICS
from dynabert_fast.errors import InputError

Array = NDArray[Any]


def _f1(labels: Array, predicted: Array, num_labels: int) -> float:
    """F1 of class 1 where there are two classes, else the mean of every class's F1."""
    average = "binary" if num_labels == 2 else "macro"
    return float(f1_score(labels, predicted, average=average, zero_division=0.0))


def _matthews(labels: Array, predicted: Array, num_labels: int) -> float:
    # One class on either side: the coefficient is 0 by definition, and scikit-learn may warn.
    if np.all(labels == labels[0]) or np.all(predicted == predicted[0]):
        return 0.0
    return float(matthews_corrcoef(labels, predicted))


def _accuracy(labels: Array, predicted: Array, num_labels: int) -> float:
    return float(accuracy_score(labels, predicted))


def _correlation(function: Callable[..., Any], labels: Array, predicted: Array) -> float:
    """A correlation coefficient; 0 where a side is constant, for which it is not defined."""
    if np.ptp(labels) == 0 or np.ptp(predicted) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(function(labels, predicted).statistic)


def _pearson(labels: Array, predicted: Array) -> float:
    return _correlation(stats.pearsonr, labels, predicted)


def _spearman(labels: Array, predicted: Array) -> float:
    return _correlation(stats.spearmanr, labels, predicted)


def _mse(labels: Array, predicted: Array) -> float:
    return float(np.mean((labels - predicted) ** 2))


_CLASSIFICATION = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews}
_REGRESSION: dict[str, Callable[[Array, Array], float]] = {
    "spearman": _spearman,
    "pearson": _pearson,
    "mse": _mse,
    "neg_mse": lambda labels, predicted: -_mse(labels, predicted),
}

# What is reported for a metric's name, the primary one first.
_REPORTED: dict[str, tuple[str, ...]] = {
    "accuracy": ("accuracy",),
    "accuracy_f1": ("accuracy", "f1"),
    "f1": ("f1", "accuracy"),
    "matthews": ("matthews", "accuracy"),
    "spearman": ("spearman", "pearson"),
    "pearson": ("pearson", "spearman"),
    "neg_mse": ("neg_mse", "spearman", "pearson"),
}


def primary_metric(metric: str) -> str:
    """Returns the key of the value that a task's ``metric`` is judged by; of it, more is better.

    Raises:
        InputError: the metric is not one of ``CLASSIFICATION_METRICS`` or ``REGRESSION_METRICS``.
    """
    return _reported(metric)[0]


def compute_metrics(metric: str, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Judges predictions by a task's metric.

    Args:
        metric: a ``Task.metric``.
        predictions: for classification logits ``[n, num_labels]``, of which the highest counts, or
            class ids ``[n]``; for regression values ``[n]`` or ``[n, 1]``.
        labels: class ids or target values ``[n]``.

    Returns:
        Fractions (not percent; mean squared errors in squared label units) by name, the primary one
        first. F1 is that of class 1 with two classes, else the mean over the classes. Matthews and
        the correlations are 0 where either side is constant.

    Raises:
        InputError: an unknown metric, shapes that do not fit, no rows, or values not finite.
    """
    reported = _reported(metric)
    predicted, target = np.asarray(predictions), np.asarray(labels)
    if metric in REGRESSION_METRICS and predicted.ndim == 2 and predicted.shape[1] == 1:
        predicted = predicted[:, 0]
    _check(metric, predicted, target)
    if metric in REGRESSION_METRICS:
        target, predicted = target.astype(np.float64), predicted.astype(np.float64)
        return {name: _REGRESSION[name](target, predicted) for name in reported}
    if predicted.ndim == 2:
        num_labels = predicted.shape[1]
        predicted = predicted.argmax(axis=1)
    else:
        num_labels = 1 + int(max(predicted.max(), target.max()))
    return {name: _CLASSIFICATION[name](target, predicted, num_labels) for name in reported}


def _reported(metric: str) -> tuple[str, ...]:
    if metric not in _REPORTED:
        allowed = ", ".join(CLASSIFICATION_METRICS + REGRESSION_METRICS)
        raise InputError(f"unknown metric {metric!r}: choose one of {allowed}")
    return _REPORTED[metric]


def _check(metric: str, predicted: Array, target: Array) -> None:
    dimensions = (1,) if metric in REGRESSION_METRICS else (1, 2)
    if predicted.ndim not in dimensions or target.shape != predicted.shape[:1]:
        raise InputError(
            f"{metric} needs one prediction per label, got predictions of shape {predicted.shape} "
            f"and labels of shape {target.shape}"
        )
    if len(target) == 0:
        raise InputError(f"{metric} needs at least one row, got none")
    for name, values in (("predictions", predicted), ("labels", target)):
        bad = ~np.isfinite(values)
        if bad.any():
            first = int(np.argwhere(bad)[0, 0])
            raise InputError(
                f"{int(bad.sum())} of the {name} are not finite (first in row {first}): the model "
                "has diverged or its weights are damaged; lower the learning rate or go back to an "
                "earlier checkpoint"
            )
