from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest

from dynabert_fast.data.tasks import CLASSIFICATION_METRICS, GLUE_TASKS, REGRESSION_METRICS
from dynabert_fast.errors import InputError
from dynabert_fast.evaluation.metrics import compute_metrics, primary_metric

METRICS = CLASSIFICATION_METRICS + REGRESSION_METRICS


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """Nothing here may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def logits(*classes: int, num_labels: int = 2) -> np.ndarray:
    """Logits ``[n, num_labels]`` whose highest are these classes."""
    noise = np.random.default_rng(0).uniform(-1, 1, (len(classes), num_labels))
    noise[np.arange(len(classes)), classes] += 3
    return noise.astype(np.float32)


# By hand: 4 true positives, 1 false positive, 2 false negatives, 3 true negatives.
LABELS = [1, 1, 1, 1, 0, 1, 1, 0, 0, 0]
PREDICTED = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
BINARY = {"accuracy": 0.7, "f1": 8 / 11, "matthews": (4 * 3 - 1 * 2) / (5 * 6 * 4 * 5) ** 0.5}


@pytest.mark.parametrize(
    ("metric", "names"),
    [
        ("accuracy", ["accuracy"]),
        ("accuracy_f1", ["accuracy", "f1"]),
        ("f1", ["f1", "accuracy"]),
        ("matthews", ["matthews", "accuracy"]),
    ],
)
@pytest.mark.parametrize("form", ["logits", "classes"])
def test_two_classes(metric: str, names: list[str], form: str) -> None:
    predictions = logits(*PREDICTED) if form == "logits" else np.array(PREDICTED)
    result = compute_metrics(metric, predictions, LABELS)
    assert list(result) == names
    assert result == pytest.approx({name: BINARY[name] for name in names}, abs=1e-12)


@pytest.mark.parametrize("form", ["logits", "classes"])
def test_f1_of_three_classes_is_their_mean(form: str) -> None:
    labels, predicted = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 2]
    predictions = logits(*predicted, num_labels=3) if form == "logits" else predicted
    result = compute_metrics("f1", predictions, labels)
    assert result == pytest.approx({"f1": (1 / 2 + 4 / 5 + 2 / 3) / 3, "accuracy": 4 / 6})


def test_correlations_by_hand() -> None:
    # Ranks 1 2 3 4 against 1 3 2 4: rho = 1 - 6 * 2 / (4 * 15).
    predictions, labels = np.array([[0.1], [0.5], [0.4], [9.0]]), [0.0, 1.0, 2.0, 3.0]
    result = compute_metrics("spearman", predictions, labels)
    assert list(result) == ["spearman", "pearson"]
    assert result["spearman"] == pytest.approx(0.8)
    assert result["pearson"] == pytest.approx(np.corrcoef(predictions[:, 0], labels)[0, 1])
    assert list(compute_metrics("pearson", predictions, labels)) == ["pearson", "spearman"]
    assert compute_metrics("spearman", predictions[:, 0], labels) == result


def test_squared_error_is_negative_so_that_more_is_better() -> None:
    result = compute_metrics("neg_mse", np.array([1.0, 2.0, 3.0]), [1.0, 4.0, 4.0])
    assert list(result) == ["neg_mse", "spearman", "pearson"]
    assert result["neg_mse"] == pytest.approx(-5 / 3)


@pytest.mark.parametrize("metric", METRICS)
def test_first_key_is_the_primary_metric_and_better_is_higher(metric: str) -> None:
    regression = metric in REGRESSION_METRICS
    perfect, worse = ([0.0, 1.0, 2.0], [0.5, 0.0, 1.0]) if regression else ([0, 1, 1], [1, 0, 1])
    labels = perfect
    best, other = compute_metrics(metric, perfect, labels), compute_metrics(metric, worse, labels)
    primary = primary_metric(metric)
    assert next(iter(best)) == primary
    assert best[primary] > other[primary]
    assert all(type(value) is float for value in best.values())


def test_every_task_has_a_metric() -> None:
    primary = {name: primary_metric(task.metric) for name, task in GLUE_TASKS.items()}
    assert primary.pop("cola") == "matthews"
    assert primary.pop("stsb") == "spearman"
    assert set(primary.values()) == {"accuracy"}


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]),
        ([1.0], [1.0]),
        ([0.1 + 0.2, 0.3, 0.3], [5.0, 5.0, 5.0]),
    ],
    ids=["predictions", "labels", "one row", "both, nearly"],
)
def test_constants_have_no_correlation(
    metric: str, predictions: list[float], labels: list[float]
) -> None:
    assert compute_metrics(metric, predictions, labels) == {"spearman": 0.0, "pearson": 0.0}


def test_nearly_constant_predictions_do_not_warn() -> None:
    predictions = 1e8 + np.array([0.0, 1e-7, 3e-7])
    assert set(compute_metrics("pearson", predictions, [1.0, 2.0, 3.0])) == {"pearson", "spearman"}


@pytest.mark.parametrize("metric", CLASSIFICATION_METRICS)
@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        ((0, 0, 0), [0, 1, 1]),
        ((0, 1, 0), [1, 1, 1]),
        ((1, 1, 1), [1, 1, 1]),
        ((0, 0, 0), [0, 0, 0]),
    ],
)
def test_one_class_only(metric: str, predicted: tuple[int, ...], labels: list[int]) -> None:
    result = compute_metrics(metric, logits(*predicted), labels)
    if metric == "matthews":
        assert result["matthews"] == 0.0
    assert result["accuracy"] == np.mean(np.array(predicted) == labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_values_that_are_not_finite(metric: str, bad: float) -> None:
    if metric in CLASSIFICATION_METRICS:
        predictions = logits(0, 1, 1, 0)
        predictions[2, 1] = bad
    else:
        predictions = np.array([0.0, 1.0, bad, 3.0])
    with pytest.raises(InputError, match=r"1 of the predictions are not finite \(first in row 2\)"):
        compute_metrics(metric, predictions, [0, 1, 1, 0])


def test_labels_that_are_not_finite() -> None:
    with pytest.raises(InputError, match=r"1 of the labels are not finite \(first in row 0\)"):
        compute_metrics("neg_mse", [1.0, 2.0], [np.nan, 1.0])


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "message"),
    [
        (
            "accuracy",
            np.zeros((3, 2)),
            [0, 1],
            r"predictions of shape \(3, 2\) and labels of shape \(2,\)",
        ),
        ("accuracy", np.zeros((2, 2, 2)), [0, 1], "one prediction per label"),
        ("accuracy", np.zeros((2, 2)), [[0], [1]], "one prediction per label"),
        ("accuracy", 1, 1, "one prediction per label"),
        ("spearman", np.zeros((2, 2)), [0.0, 1.0], r"got predictions of shape \(2, 2\)"),
        ("accuracy", np.zeros((0, 2)), [], "accuracy needs at least one row, got none"),
        ("spearman", [], [], "spearman needs at least one row, got none"),
        ("bleu", [0], [0], "unknown metric 'bleu': choose one of accuracy, .*, neg_mse"),
    ],
)
def test_bad_input(metric: str, predictions: object, labels: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compute_metrics(metric, predictions, labels)  # type: ignore[arg-type]


def test_unknown_primary_metric() -> None:
    with pytest.raises(InputError, match="unknown metric 'loss'"):
        primary_metric("loss")
