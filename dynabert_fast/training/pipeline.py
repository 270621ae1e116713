"""`fit`: fine-tune, rewire, train widths, train depths, evaluate; one resumable output folder.

output/
  fit.json       the settings, which a resumed run must repeat
  teacher/       the fine-tuned model
  rewired/       the same function, heads and neurons sorted by importance
  width/         stage 1: every width is good
  dynabert/      stage 2: every width and depth is good
  final/         stage 3, if asked for
  grid.json      the evaluation grid
  grid.md        the same as a table
  report.html    the same as a page
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from dynabert_fast.data import Collator, EncodedDataset, TaskData
from dynabert_fast.errors import InputError
from dynabert_fast.evaluation import Grid, evaluate_grid, write_report
from dynabert_fast.evaluation.grid import write_aside
from dynabert_fast.files import new_folder, whole_folder
from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.rewiring import Accumulation, measure_importance, rewire
from dynabert_fast.training.stages import Stage, StageData, TrainingOptions, run_stage, stages

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FitOptions:
    """What `fit` does beside training.

    Attributes:
        stages: The four stages, see `stages.stages`.
        training: Hyper-parameters of each stage, by name.
        max_length: Longer texts are cut to this many tokens.
        rewiring: How importance is accumulated; `None` leaves heads and neurons unsorted.
        final: Also run stage 3 (fine-tuning of the grid on labels).
        latency_batch_size: Of the latency measurement.
        latency_length: Tokens per sequence, likewise.
        latency_rounds: Timed rounds, likewise.
    """

    stages: Mapping[str, Stage] = field(default_factory=stages)
    training: Mapping[str, TrainingOptions] = field(
        default_factory=lambda: {name: TrainingOptions() for name in stages()}
    )
    max_length: int = 128
    rewiring: Accumulation | None = "per_batch"
    final: bool = False
    latency_batch_size: int = 1
    latency_length: int = 128
    latency_rounds: int = 20


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub id.

    Raises:
        InputError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source} has no tokenizer that loads ({reason})") from error


def load_model(source: str | Path, **changes: Any) -> DynaBertForSequenceClassification:
    """A sequence classifier from a checkpoint folder or hub id.

    Args:
        source: Folder or hub id.
        **changes: Fields of the configuration to set, `num_labels=2` for instance.

    Raises:
        InputError: It is not a checkpoint, or one of another architecture or size.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise InputError(f"{source} is not a checkpoint: it has no config.json")
    try:
        return DynaBertForSequenceClassification.from_pretrained(source, **changes)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source} does not load as a checkpoint ({reason})") from error


def stage_data(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> StageData:
    """Tokenise a task once, for every stage."""
    return StageData(
        EncodedDataset(data.train, tokenizer, max_length),
        EncodedDataset(data.dev, tokenizer, max_length),
        Collator(tokenizer.pad_token_id),
        tokenizer,
        data.task.metric,
    )


def head_changes(data: TaskData) -> dict[str, Any]:
    """The configuration fields of a classification head for this task."""
    if data.task.regression:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(data.label_names))
    return {
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "problem_type": "single_label_classification",
    }


def finetune(
    source: str | Path,
    data: TaskData,
    encoded: StageData,
    output: Path,
    options: TrainingOptions,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Put a new head on a pretrained encoder and train all of it on labels."""
    set_seed(options.seed)  # of the head's initial weights
    model = load_model(source, ignore_mismatched_sizes=True, **head_changes(data))
    run_stage(stages()["finetune"], model, encoded, output, options, None, resume, progress)


def rewire_checkpoint(
    source: str | Path,
    encoded: StageData,
    output: Path,
    accumulation: Accumulation = "per_batch",
    batch_size: int = 32,
    progress: bool = True,
) -> None:
    """Measure importance on the development set and save the sorted model as `output`."""
    new_folder(output)
    model = load_model(source)
    importance = measure_importance(
        model, _batches(encoded, batch_size, model.device), accumulation, progress
    )
    rewire(model, importance)
    with whole_folder(output) as aside:
        model.save_pretrained(aside)
        encoded.tokenizer.save_pretrained(aside)


def _batches(encoded: StageData, size: int, device: Any) -> Iterator[dict[str, Tensor]]:
    dev = encoded.dev
    for start in range(0, len(dev), size):
        rows = range(start, min(start + size, len(dev)))
        batch = encoded.collator([dev[i] for i in rows])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def fit(
    source: str | Path,
    data: TaskData,
    output: str | Path,
    options: FitOptions | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Grid:
    """Run the whole pipeline and return the grid of the trained model.

    Args:
        source: Pretrained encoder: folder or hub id.
        data: The task.
        output: Folder to fill, laid out as this module's docstring says.
        options: What to run and how.
        resume: Go on where an earlier run in `output` stopped.
        progress: Show progress bars and say which stage runs.

    Raises:
        InputError: `output` is not empty (without `resume`), or its run had other settings.
        SaveError: Something could not be written.
    """
    output, options = Path(output), options or FitOptions()
    _start(output, _settings(source, data, options), resume)
    tokenizer = load_tokenizer(source)
    encoded = stage_data(data, tokenizer, options.max_length)
    teacher, rewired = output / "teacher", output / "rewired"
    width, dynabert, final = output / "width", output / "dynabert", output / "final"

    def step(folder: Path, title: str, run: Callable[[], None]) -> None:
        """Run what makes `folder`, unless it is there; then it is whole."""
        if folder.is_dir():
            _say(progress, f"{title}: done before")
            return
        _say(progress, title)
        run()

    def train(name: str, student: Path, taught_by: Path | None, folder: Path) -> None:
        run_stage(
            options.stages[name],
            load_model(student),
            encoded,
            folder,
            options.training[name],
            load_model(taught_by) if taught_by else None,
            True,
            progress,
        )

    step(
        teacher,
        "fine-tuning",
        lambda: finetune(
            source, data, encoded, teacher, options.training["finetune"], True, progress
        ),
    )
    sort = options.rewiring
    if sort is not None:
        step(
            rewired,
            "rewiring",
            lambda: rewire_checkpoint(teacher, encoded, rewired, sort, progress=progress),
        )
    start = rewired if sort is not None else teacher
    step(width, "training widths", lambda: train("width", start, teacher, width))
    step(dynabert, "training widths and depths", lambda: train("depth", width, width, dynabert))
    if options.final:
        step(final, "final fine-tuning", lambda: train("final", dynabert, None, final))
    last = final if options.final else dynabert
    _say(progress, "evaluating")
    return evaluate_checkpoint(last, data, encoded, output, options, Path(source).name, progress)


def evaluate_checkpoint(
    checkpoint: Path,
    data: TaskData,
    encoded: StageData,
    output: Path,
    options: FitOptions,
    model_name: str,
    progress: bool = True,
) -> Grid:
    """Evaluate the grid of a checkpoint and write `grid.json`, `grid.md` and `report.html`."""
    model = load_model(checkpoint)
    grid = evaluate_grid(
        model,
        encoded.dev,
        encoded.collator,
        options.stages["depth"].subnets(model),
        encoded.metric,
        model_name=model_name,
        task=data.task.name,
        latency_batch_size=options.latency_batch_size,
        latency_length=options.latency_length,
        rounds=options.latency_rounds,
        progress=progress,
    )
    write_grid(grid, output)
    return grid


def write_grid(grid: Grid, output: Path) -> None:
    """Write a grid as `grid.json`, `grid.md` and `report.html` into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    grid.save(output / "grid.json")
    write_aside(output / "grid.md", grid.to_markdown())
    write_report(grid, output / "report.html")


def _settings(source: str | Path, data: TaskData, options: FitOptions) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it resumes."""
    settings = {
        "model": str(source),
        "task": data.task.name,
        "train_examples": len(data.train),
        "dev_examples": len(data.dev),
        "max_length": options.max_length,
        "rewiring": options.rewiring,
        "final": options.final,
        "stages": {name: asdict(stage) for name, stage in options.stages.items()},
        "training": {name: asdict(values) for name, values in options.training.items()},
    }
    return json.loads(json.dumps(settings))


def _start(output: Path, settings: dict[str, Any], resume: bool) -> None:
    """Make the output folder, or check that it belongs to a run of the same settings."""
    record = output / "fit.json"
    if resume and record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            key = changed[0]
            raise InputError(
                f"{output} was started with {key} {before.get(key)}, not {settings[key]}; "
                "resume with the settings of its fit.json, or choose another folder"
            )
        return
    new_folder(output).mkdir(parents=True, exist_ok=True)
    write_aside(record, json.dumps(settings, indent=2) + "\n")


def _say(progress: bool, message: str) -> None:
    if progress:
        print(f"== {message}", flush=True)
