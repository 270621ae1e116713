"""The evaluation grid: metric, cost and measured latency of every sub-network of one model.

The data are batched once, by length. All sub-networks run on a batch together, as a `SubnetTree`:
what they have in common is computed once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from dynabert_fast.errors import InputError, SaveError
from dynabert_fast.evaluation.cost import count_flops, count_parameters
from dynabert_fast.evaluation.latency import (
    Latency,
    PackedModel,
    environment,
    inference,
    measure_latency,
)
from dynabert_fast.evaluation.metrics import compute_metrics, primary_metric
from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.tree import SubnetTree

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dynabert_fast.data.encoding import Collator, EncodedDataset
    from dynabert_fast.subnet import Subnet

NOT_MEASURED = "–"

# Rows of a layer that sub-networks run on together (tokens times nodes), unless one of them has
# more: a larger batch is split. For BERT-base 8 ki rows are 100 MB of FFN activations, and more are
# slower on a CPU.
_ROWS = 1 << 13

PARETO = "Pareto: no other sub-network costs as little and scores as well, and is better in one."


@dataclass(frozen=True)
class Batches:
    """A data set, collated once and reused by every sub-network.

    Attributes:
        inputs: What the model takes, one dict of tensors per batch, longest sequences first.
        order: For each row of the batches, one after another, its index in the data set, `[n]`.
        labels: The labels in the data set's order, `[n]`.
        tokens: Tokens in the data set, padding not counted.
    """

    inputs: tuple[dict[str, Tensor], ...]
    order: np.ndarray
    labels: np.ndarray
    tokens: int


@dataclass(frozen=True)
class Cell:
    """One sub-network of a grid.

    Attributes:
        subnet: Its name, `str(Subnet)`.
        width: Width multiplier, `None` for explicit extents.
        depth: Depth multiplier, `None` for explicit extents.
        metrics: Scores by name, as fractions; the primary metric is named by the grid.
        parameters: Parameters that it uses.
        flops: Floating-point operations for one sequence of the grid's `latency_length`.
        latency: Wall-clock time of one batch.
    """

    subnet: str
    width: float | None
    depth: float | None
    metrics: dict[str, float]
    parameters: int
    flops: int
    latency: Latency

    @property
    def on_grid(self) -> bool:
        """Whether it was built from multipliers, and so has a place in the width x depth table."""
        return self.width is not None and self.depth is not None


@dataclass(frozen=True)
class Grid:
    """Every sub-network that was evaluated, and how.

    Attributes:
        cells: The sub-networks in the order given.
        model: What the model is called in tables, may be empty.
        task: What the task is called in tables, may be empty.
        metric: Name of the primary metric; larger is better.
        examples: Examples in the evaluation set.
        tokens: Tokens in the evaluation set, padding not counted.
        latency_batch_size: Sequences per timed batch.
        latency_length: Tokens per timed sequence; FLOPs are for one such sequence.
        latency_rounds: Timed passes of each sub-network.
        environment: Device, threads, dtype and versions; see `environment`.

    Raises:
        InputError: There is no cell.
    """

    cells: tuple[Cell, ...]
    model: str
    task: str
    metric: str
    examples: int
    tokens: int
    latency_batch_size: int
    latency_length: int
    latency_rounds: int
    environment: dict[str, str]

    def __post_init__(self) -> None:
        """Refuse a grid without cells."""
        if not self.cells:
            raise InputError("an evaluation grid needs at least one sub-network, got none")

    @property
    def full(self) -> Cell | None:
        """The cell of the whole model, `None` where it was not evaluated."""
        return next((cell for cell in self.cells if cell.width == cell.depth == 1), None)

    @property
    def widths(self) -> tuple[float, ...]:
        """Width multipliers that occur, descending."""
        return tuple(sorted({c.width for c in self.cells if c.width is not None}, reverse=True))

    @property
    def depths(self) -> tuple[float, ...]:
        """Depth multipliers that occur, descending."""
        return tuple(sorted({c.depth for c in self.cells if c.depth is not None}, reverse=True))

    def at(self, width: float, depth: float) -> Cell | None:
        """The cell of these multipliers, `None` where it was not evaluated."""
        return next((c for c in self.cells if (c.width, c.depth) == (width, depth)), None)

    def score(self, cell: Cell) -> float:
        """The primary metric of `cell`."""
        return cell.metrics[self.metric]

    def speed_up(self, cell: Cell) -> float | None:
        """Latency of the whole model over that of `cell`; `None` without the whole model."""
        full = self.full
        return full.latency.median_ms / cell.latency.median_ms if full else None

    @property
    def total(self) -> float:
        """Sum of the primary metric over the grid, which decides the best checkpoint."""
        return sum(map(self.score, self.cells))

    def pareto(self, cost: Literal["latency", "flops"] = "latency") -> tuple[Cell, ...]:
        """The cells that no other dominates.

        One dominates another if it costs no more and scores no less, and does better in one.

        Args:
            cost: Against the measured median latency, or against FLOPs.

        Returns:
            The cells, cheapest first.
        """

        def price(cell: Cell) -> float:
            return cell.flops if cost == "flops" else cell.latency.median_ms

        points = {(price(cell), self.score(cell)) for cell in self.cells}
        front = {
            (p, s)
            for p, s in points
            if not any(p2 <= p and s2 >= s and (p2, s2) != (p, s) for p2, s2 in points)
        }
        best = (cell for cell in self.cells if (price(cell), self.score(cell)) in front)
        return tuple(sorted(best, key=price))

    def to_json(self) -> str:
        """Write as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Grid:
        """Read what `to_json` wrote.

        Raises:
            InputError: The text is not JSON, or not of a grid.
        """
        try:
            data = json.loads(text)
            cells = tuple(_cell(entry) for entry in data.pop("cells"))
            return cls(cells=cells, **data)
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"expected the JSON of an evaluation grid, as `Grid.save` writes it, got "
                f"{type(error).__name__}: {error}"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to `path`; a file that is there survives a failure."""
        write_aside(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Grid:
        """Read what `save` wrote.

        Raises:
            InputError: The file does not hold a grid.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def to_markdown(self) -> str:
        """Write as Markdown: the metric by width and depth, all columns, and the conditions."""
        parts = [f"### {_escape(self.heading)}", self._list_table(), self._conditions()]
        if self.widths:
            parts.insert(1, self._metric_table())
        return "\n\n".join(parts) + "\n"

    @property
    def heading(self) -> str:
        """Model and task in one line."""
        return ", ".join(filter(None, (self.model, self.task))) or "Evaluation"

    def _metric_table(self) -> str:
        """Rows are widths and columns depths, as in Table 1 of the paper."""
        rows = []
        for width in self.widths:
            cells = [self.at(width, depth) for depth in self.depths]
            scores = (
                format_score(self.metric, self.score(c)) if c else NOT_MEASURED for c in cells
            )
            rows.append([f"**{width:g}**", *scores])
        corner = f"{_escape(metric_column(self.metric))}: width \\ depth"
        return _table([corner, *(f"{depth:g}" for depth in self.depths)], rows)

    def _list_table(self) -> str:
        names = self.metric_names
        head = ["sub-network", *map(metric_column, names), "parameters, M", "GFLOPs"]
        head += ["latency, ms", "speed-up", "Pareto in"]
        fronts = {"latency": self.pareto("latency"), "FLOPs": self.pareto("flops")}
        rows = [
            [
                cell.subnet,
                *(format_score(name, cell.metrics[name]) for name in names),
                format_quantity(cell.parameters / 1e6),
                format_quantity(cell.flops / 1e9),
                format_quantity(cell.latency.median_ms),
                format_speed_up(self.speed_up(cell)),
                ", ".join(cost for cost, front in fronts.items() if cell in front),
            ]
            for cell in self.cells
        ]
        return _table([_escape(title) for title in head], rows)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric, the primary one first."""
        names = self.cells[0].metrics
        return (self.metric, *(name for name in names if name != self.metric))

    def _conditions(self) -> str:
        env = self.environment
        return (
            f"Metrics on {count_noun(self.examples, 'example')} "
            f"({count_noun(self.tokens, 'token')}). "
            f"Latency: median of {count_noun(self.latency_rounds, 'pass', 'passes')}, "
            f"batch {self.latency_batch_size}, length {self.latency_length}, {env['dtype']}, on "
            f"{_escape(env['device'])}, {count_noun(int(env['threads']), 'CPU thread')}. "
            f"GFLOPs: one sequence of that length. {PARETO}\n\n"
            f"dynabert_fast {env['dynabert_fast']}, torch {env['torch']}, "
            f"transformers {env['transformers']}, Python {env['python']}."
        )


def make_batches(dataset: EncodedDataset, collator: Collator, batch_size: int = 32) -> Batches:
    """Sort a data set by length, longest first, and collate it.

    Args:
        dataset: Encoded examples with labels.
        collator: Pads a list of examples to the longest of them.
        batch_size: Examples per batch, at least 1.

    Raises:
        InputError: The data set is empty or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if len(dataset) == 0:
        raise InputError("evaluation needs at least one example, got an empty data set")
    lengths = np.asarray(dataset.lengths)
    order = np.argsort(-lengths, kind="stable")
    inputs, labels = [], []
    for start in range(0, len(order), batch_size):
        batch = dict(collator([dataset[int(i)] for i in order[start : start + batch_size]]))
        labels.append(batch.pop("labels").numpy())
        inputs.append(batch)
    return Batches(
        tuple(inputs), order, _restore(np.concatenate(labels), order), int(lengths.sum())
    )


def predict(
    model: nn.Module, batches: Batches, subnet: Subnet, *, bar: tqdm | None = None
) -> np.ndarray:
    """Run one sub-network over the data set.

    Args:
        model: The model; its training or evaluation mode is the same afterwards.
        batches: From `make_batches`.
        subnet: The sub-network.
        bar: A progress bar to advance by one for each batch.

    Returns:
        The logits in the data set's order, float32 `[n, num_labels]`.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    logits = []
    with inference(model):
        for batch in batches.inputs:
            output = model(**{k: v.to(device) for k, v in batch.items()}, subnet=subnet)
            logits.append(output.logits)
            if bar is not None:
                bar.update()
        # One copy at the end: a copy for each batch would wait for the device each time.
        return _restore(torch.cat(logits).float().cpu().numpy(), batches.order)


def score_grid(
    model: nn.Module,
    batches: Batches,
    subnets: Sequence[Subnet],
    metric: str,
    *,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Compute the metrics of every sub-network.

    Args:
        model: The model; its training or evaluation mode is the same afterwards.
        batches: From `make_batches`.
        subnets: The sub-networks.
        metric: As `compute_metrics` takes it.
        progress: Show a progress bar.

    Returns:
        By the sub-network's name, its metrics, the primary one first.

    Raises:
        InputError: No sub-network, or an unknown metric.
    """
    if not subnets:
        raise InputError("evaluation needs at least one sub-network, got none")
    primary_metric(metric)  # an unknown one fails before anything long runs
    scores = {}
    total = len(subnets) * len(batches.inputs)
    # leave=None: a bar below another one, as in training, goes when it is full.
    with tqdm(total=total, desc="evaluate", disable=not progress, unit="batch", leave=None) as bar:
        together = _predict_all(model, batches, subnets, bar)
        for i, subnet in enumerate(subnets):
            if together is None:
                bar.set_postfix_str(str(subnet), refresh=False)
            logits = predict(model, batches, subnet, bar=bar) if together is None else together[i]
            scores[str(subnet)] = compute_metrics(metric, logits, batches.labels)
    return scores


def _predict_all(
    model: nn.Module, batches: Batches, subnets: Sequence[Subnet], bar: tqdm
) -> list[np.ndarray] | None:
    """As `predict` for each sub-network; `None` where the model runs one at a time (an engine)."""
    if not isinstance(model, DynaBertForSequenceClassification):
        return None
    tree = SubnetTree(subnets)
    nodes = max(len(level.heads) for level in tree.levels)
    logits = []
    with inference(model):
        for batch in batches.inputs:
            count, length = batch["input_ids"].shape
            size = max(1, max(_ROWS, count * length) // (nodes * length))
            on = {k: v.to(model.device) for k, v in batch.items()}
            for start in range(0, count, size):
                part = {k: v[start : start + size] for k, v in on.items()}
                logits.append(model(**part, subnet=tree).logits)
            bar.update(len(subnets))
        found = torch.cat(logits, 1).float().cpu().numpy()
    return [_restore(own, batches.order) for own in found]


def total_score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Sum the primary metric, the first of each sub-network, over what `score_grid` returned."""
    return sum(next(iter(metrics.values())) for metrics in scores.values())


def evaluate_grid(
    model: PreTrainedModel | PackedModel,
    dataset: EncodedDataset,
    collator: Collator,
    subnets: Sequence[Subnet],
    metric: str,
    *,
    model_name: str = "",
    task: str = "",
    batch_size: int = 32,
    latency_batch_size: int = 1,
    latency_length: int = 128,
    warmup: int = 3,
    rounds: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Grid:
    """Fill the grid: metrics, parameters, FLOPs and measured latency of every sub-network.

    Args:
        model: The model; its training or evaluation mode is the same afterwards.
        dataset: Encoded examples with labels.
        collator: Pads a list of examples to the longest of them.
        subnets: The sub-networks, in the order of the table.
        metric: As `compute_metrics` takes it.
        model_name: What tables call the model.
        task: What tables call the task.
        batch_size: Examples per batch when predicting.
        latency_batch_size: Sequences per timed batch.
        latency_length: Tokens per timed sequence.
        warmup: Timed rounds that are not counted.
        rounds: Timed rounds that are counted.
        seed: Of the timed tokens and of the order in each round.
        progress: Show progress bars.

    Raises:
        InputError: No example, no sub-network, an unknown metric or a number below its minimum.
    """
    primary = primary_metric(metric)  # an unknown metric fails before anything long runs
    batches = make_batches(dataset, collator, batch_size)
    latency = measure_latency(
        model, subnets, latency_batch_size, latency_length, warmup, rounds, seed, progress=progress
    )
    scores = score_grid(model, batches, subnets, metric, progress=progress)
    cells = tuple(
        Cell(
            subnet=str(subnet),
            width=subnet.width,
            depth=subnet.depth,
            metrics=scores[str(subnet)],
            parameters=count_parameters(model.config, subnet),
            flops=count_flops(model.config, subnet, latency_length),
            latency=latency[subnet],
        )
        for subnet in subnets
    )
    return Grid(
        cells=cells,
        model=model_name,
        task=task,
        metric=primary,
        examples=len(dataset),
        tokens=batches.tokens,
        latency_batch_size=latency_batch_size,
        latency_length=latency_length,
        latency_rounds=rounds,
        environment=environment(model),
    )


def write_aside(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` beside `path`, then rename: a full disk leaves the old file as it was.

    Raises:
        SaveError: It could not be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        raise SaveError(f"could not write {target} ({error.strerror}); free some space") from error
    finally:
        aside.unlink(missing_ok=True)  # gone already where the rename succeeded


def metric_label(name: str) -> str:
    """A metric's name for people: `f1` becomes `F1`."""
    return {"f1": "F1", "neg_mse": "negative MSE"}.get(name, name.replace("_", " "))


def metric_column(name: str) -> str:
    """A metric's name with its unit."""
    return f"{metric_label(name)}, %" if is_fraction(name) else metric_label(name)


def format_score(metric: str, value: float) -> str:
    """A fraction in percent with one decimal, an error in its own unit with three."""
    return f"{100 * value:.1f}" if is_fraction(metric) else f"{value:.3f}"


def is_fraction(metric: str) -> bool:
    """Whether a metric is at most 1 and is shown in percent; a squared error is not."""
    return not metric.endswith("mse")


def format_quantity(value: float) -> str:
    """About three significant digits, and one decimal from 10 on."""
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def format_speed_up(value: float | None) -> str:
    """A ratio such as `3.4×`."""
    return NOT_MEASURED if value is None else f"{value:.1f}×"


def count_noun(number: int, noun: str, plural: str | None = None) -> str:
    """A number and its noun: `1 token`, `12,000 tokens`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _restore(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Undo a sort: row `i` of the result is the row that came from index `i`."""
    restored = np.empty_like(rows)
    restored[order] = rows
    return restored


def _cell(entry: dict[str, Any]) -> Cell:
    """Read one cell of `Grid.to_json`."""
    return Cell(**{**entry, "latency": Latency(**entry["latency"])})


def _escape(text: str) -> str:
    """Keep a name from ending a table cell or a heading, or from being read as HTML or Markdown."""
    return " ".join(re.sub(r"([\\|<&*_`\[])", r"\\\1", text).split())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with numbers to the right of the first column."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
