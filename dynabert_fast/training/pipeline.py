"""`fit`: fine-tune, rewire, train widths, train depths, evaluate; one resumable output folder.

output/
  fit.json       the settings, which a resumed run must repeat (but for stages that have not begun)
  teacher/       the fine-tuned model
  rewired/       the same function, heads and neurons sorted by importance
  augmented.json what the two stages below train on, if asked for
  width/         stage 1: every width is good
  dynabert/      stage 2: every width and depth is good
  final/         stage 3, if asked for
  grid.json      the evaluation grid
  grid.md        the same as a table
  report.html    the same as a page
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from dynabert_fast.data import Collator, EncodedDataset, Examples, TaskData, TokenBudgetSampler
from dynabert_fast.data.augmentation import Augmentation, augment, load_masked_lm
from dynabert_fast.errors import InputError, lacks_memory
from dynabert_fast.evaluation import Grid, evaluate_grid, write_report
from dynabert_fast.evaluation.grid import write_aside
from dynabert_fast.files import checkpoints_folder, new_folder, new_whole_folder, whole_folder
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.rewiring import Accumulation, measure_importance, rewire
from dynabert_fast.training.settings import refuse_others
from dynabert_fast.training.stages import (
    Stage,
    StageData,
    TrainingOptions,
    check_precision,
    process_group,
    run_stage,
    stages,
)
from dynabert_fast.training.trainer import widen

if TYPE_CHECKING:
    from torch import Tensor


#: Of each stage, in order.
FOLDERS = {"finetune": "teacher", "width": "width", "depth": "dynabert", "final": "final"}


@dataclass(frozen=True)
class FitOptions:
    """What `fit` does beside training.

    Defaults are the paper's. With `recipe = RECIPES["small-batches"]`, the command's default, give
    `stages(recipe=recipe)` and, for stage `depth`, `recipe.training(TrainingOptions())`.

    Attributes:
        stages: The four stages, see `stages.stages`.
        training: Hyper-parameters of each stage, by name.
        max_length: Longer texts are cut to this many tokens.
        rewiring: How importance is accumulated; `None` leaves heads and neurons unsorted.
        final: Also run stage 3 (fine-tuning of the grid on labels).
        augmentation: How the training texts of the stages that distil are multiplied.
        masked_lm: With `augmentation`: folder or hub id of the masked language model.
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
    augmentation: Augmentation | None = None
    masked_lm: str | Path | None = None
    latency_batch_size: int = 1
    latency_length: int = 128
    latency_rounds: int = 20


# What the hub takes for a name; a path may look like one, anything else is a path.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")

# Parameters that fine-tuning makes anew where a pretrained encoder lacks them.
_HEAD = ("classifier.", "dynabert.pooler.")


@contextlib.contextmanager
def _loading(source: str | Path, problem: str = "does not load as a checkpoint") -> Iterator[None]:
    """`InputError` in one line for whatever a library says of a checkpoint that does not load."""
    path = Path(source)
    if path.is_file():
        raise InputError(f"{source} is a file; name the folder of a checkpoint")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{source} is not a checkpoint: it has no config.json")
    here = path.is_dir()
    if not here and (isinstance(source, Path) or not _HUB_ID.fullmatch(source)):
        raise InputError(f"{source} does not exist; name the folder of a checkpoint, or a hub id")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a library finds: tokenizers raises nothing more special
        if lacks_memory(error):
            raise
        reason = " ".join((str(error).splitlines() or [type(error).__name__])[:2])
        where = "" if here else " is not a folder, and from the hub it"
        raise InputError(f"{source}{where} {problem} ({reason})") from error


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub id.

    Raises:
        InputError: There is none.
    """
    folder = Path(source)
    none = f"{source} has no tokenizer; copy that of its pretrained model into it"
    with _loading(source, "has no tokenizer that loads"):
        if folder.is_dir() and not any(map(list, map(folder.glob, _TOKENIZER_FILES))):
            raise InputError(none)
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of nothing
        raise InputError(none)
    return tokenizer


def load_config(source: str | Path) -> DynaBertConfig:
    """The configuration of a checkpoint folder or hub id: quick, to check a command against.

    Raises:
        InputError: It is not a checkpoint, or one of another architecture.
    """
    with _loading(source):
        return DynaBertConfig.from_pretrained(str(source))


def load_model(source: str | Path, **changes: Any) -> DynaBertForSequenceClassification:
    """A sequence classifier from a checkpoint folder or hub id.

    Args:
        source: Folder or hub id.
        **changes: Fields of the configuration to set, of a new head for instance; the classifier's
            weights are drawn anew where the checkpoint lacks them or has them in another size.

    Raises:
        InputError: It is not a checkpoint, one of another architecture, or one that lacks weights.
    """
    with _loading(source):
        model, report = DynaBertForSequenceClassification.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **changes
        )
    drawn = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    lacking = [name for name in drawn if not (changes and name.startswith(_HEAD))]
    if lacking:
        first = min(lacking, key=lambda name: (name.startswith(_HEAD), name))
        advice = "fine-tune it first" if first.startswith(_HEAD) else "copy or save it again"
        raise InputError(f"{source} has no {first} of the size that its config.json says; {advice}")
    return model


def check_steps(encoded: StageData, options: FitOptions, processes: int) -> None:
    """Refuse steps of too few tokens before hours of training lead to them.

    Raises:
        InputError: A stage's `tokens_per_step` leaves less than an example for each batch.
    """
    for name, training in options.training.items():
        if training.tokens_per_step is None:
            continue
        lengths = encoded.train.lengths
        if options.augmentation is not None and options.stages[name].recipe is not None:
            lengths = [options.max_length] * len(lengths)  # texts that are not there yet
        parts = processes * training.gradient_accumulation
        try:
            TokenBudgetSampler(lengths, training.tokens_per_step, parts)
        except InputError as error:
            raise InputError(f"stage {name}: {error}") from None


def check_vocabulary(teacher: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher with a tokenizer of its own that gives a token another id.

    Tokens that one of the two has and the other has not are no reason: they may have been added.

    Raises:
        InputError: As said.
    """
    try:
        theirs = load_tokenizer(teacher).get_vocab()
    except InputError:
        return  # it came without one
    ours = tokenizer.get_vocab()
    if unlike := [token for token in theirs.keys() & ours.keys() if theirs[token] != ours[token]]:
        token = min(unlike)
        raise InputError(
            f"{teacher} has another vocabulary than the student ({token!r} is {theirs[token]}, "
            f"not {ours[token]}); both read the same tokens"
        )


def check_length(name: str, length: int, config: DynaBertConfig) -> None:
    """Raise `InputError` where `length` tokens are more than the model has positions."""
    if length > config.max_tokens:
        raise InputError(
            f"{name} must be at most {config.max_tokens}, the longest sequence of the model, "
            f"got {length}"
        )


def device() -> str:
    """Where what is not training runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_options(config: DynaBertConfig, options: FitOptions) -> None:
    """Refuse options that do not fit a model, before any work is done.

    Raises:
        InputError: A multiplier keeps no head or layer, nobody has an assistant, a length is beyond
            the model's, augmentation has no masked language model, or a value is none of its
            option's.
    """
    if options.rewiring not in (None, *get_args(Accumulation)):
        allowed = ", ".join(map(repr, get_args(Accumulation)))
        raise InputError(f"rewiring must be {allowed} or None, got {options.rewiring!r}")
    for name in ("max_length", "latency_batch_size", "latency_length", "latency_rounds"):
        if not getattr(options, name) >= 1:
            raise InputError(f"{name} must be at least 1, got {getattr(options, name)}")
    if options.augmentation is not None and not options.masked_lm:
        raise InputError("augmentation needs a masked language model: name its folder or hub id")
    for name, stage in options.stages.items():
        stage.check(config, options.training.get(name, TrainingOptions()).schedule)
    check_length("max_length", options.max_length, config)
    check_length("latency_length", options.latency_length, config)


def stage_data(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> StageData:
    """Tokenise a task once, for every stage."""
    return StageData(
        EncodedDataset(data.train, tokenizer, max_length),
        EncodedDataset(data.dev, tokenizer, max_length),
        Collator(tokenizer.pad_token_id or 0),  # where it has none: padding is not computed
        tokenizer,
        data.task.metric,
    )


def augmented(
    examples: Examples,
    encoded: StageData,
    masked_lm: str | Path,
    augmentation: Augmentation,
    max_length: int,
    file: Path | None = None,
    progress: bool = True,
) -> StageData:
    """The task with multiplied training examples.

    Args:
        examples: The training examples.
        encoded: The task, tokenised.
        masked_lm: Folder or hub id of the masked language model.
        augmentation: How.
        max_length: As in `stage_data`.
        file: Where to keep the examples; if it is there, they are read from it.
        progress: Show a progress bar.

    Raises:
        InputError: The masked language model cannot serve, or what is in `file` is damaged.
        SaveError: `file` could not be written.
    """
    if file is not None and file.is_file():
        try:
            found = Examples(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{file} is damaged; delete it, and it is made anew") from error
    else:
        model, tokenizer = load_masked_lm(masked_lm)
        model.to(device())
        found = augment(examples, model, tokenizer, augmentation, progress)
        if file is not None:
            write_aside(file, json.dumps(asdict(found)) + "\n")
    return replace(encoded, train=EncodedDataset(found, encoded.tokenizer, max_length))


def head_changes(data: TaskData) -> dict[str, Any]:
    """The configuration fields of a classification head for this task.

    Raises:
        InputError: All training examples are of one class.
    """
    if data.task.regression:
        return {"num_labels": 1, "problem_type": "regression"}
    if len(data.label_names) < 2:
        raise InputError(
            f"every label is {data.label_names[0]!r}; classification needs two or more"
        )
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
    model = load_model(source, **head_changes(data))
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
    new_whole_folder(output)
    model = load_model(source).to(device())
    widen(model)
    importance = measure_importance(
        model, _batches(encoded, batch_size, model.device), accumulation, progress
    )
    rewire(model, importance)
    with whole_folder(output) as aside:
        model.save_pretrained(aside)
        encoded.tokenizer.save_pretrained(aside)


def _batches(encoded: StageData, size: int, device: Any) -> list[dict[str, Tensor]]:
    """The development set in order: a list, so that a progress bar knows its length."""
    dev, batches = encoded.dev, []
    for start in range(0, len(dev), size):
        rows = range(start, min(start + size, len(dev)))
        batch = encoded.collator([dev[i] for i in rows])
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def fit(
    source: str | Path,
    data: TaskData,
    output: str | Path,
    options: FitOptions | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Grid:
    """Run the whole pipeline and return the grid of the trained model.

    Under `torchrun` all processes train; the first does what is not training, and says what runs.

    Args:
        source: Pretrained encoder: folder or hub id.
        data: The task.
        output: Folder to fill, laid out as this module's docstring says.
        options: What to run and how.
        resume: Go on where an earlier run in `output` stopped.
        progress: Show progress bars and say which stage runs.

    Raises:
        InputError: `output` is not empty (without `resume`), its run had other settings, `source`
            does not load, or the options do not fit it; then nothing was written.
        SaveError: Something could not be written.
        TrainingError: A loss is not finite.
    """
    output, options = Path(output), options or FitOptions()
    check_options(load_config(source), options)
    settings = _settings(source, data, options)
    # The others wait while the first augments, rewires and evaluates: hours, with much data.
    processes = process_group()
    first = processes.is_main_process
    progress = progress and first
    begun = not first or _begun(output, settings, resume)
    teacher, width, dynabert, final = (output / name for name in FOLDERS.values())
    rewired = output / "rewired"
    encoded = stage_data(data, load_tokenizer(source), options.max_length)
    check_steps(encoded, options, processes.num_processes)
    for name, folder in FOLDERS.items():
        if not (output / folder).is_dir() and (options.final or name != "final"):
            check_precision(options.training[name])
    if not begun:
        load_model(source, **head_changes(data))  # refuses damaged weights before a folder is made
        if options.masked_lm:
            load_masked_lm(options.masked_lm)
        output.mkdir(parents=True, exist_ok=True)
    if first:  # of stages that had not begun, a resumed run has its own
        write_aside(output / "fit.json", json.dumps(settings, indent=2) + "\n")

    def step(folder: Path, title: str, run: Callable[[], None], together: bool = True) -> None:
        """Run what makes `folder`, unless it is there; then it is whole."""
        processes.wait_for_everyone()  # it is there for all
        done = folder.is_dir()
        processes.wait_for_everyone()  # everyone has looked
        _say(progress, f"{title}: done before" if done else title)
        if done and first:  # a process that was killed may not have come to this
            shutil.rmtree(checkpoints_folder(folder), ignore_errors=True)
        if not done and (together or first):
            run()

    def train(name: str, student: Path, taught_by: Path | None, folder: Path) -> None:
        examples = encoded
        if options.augmentation and options.masked_lm and taught_by:
            with processes.main_process_first():
                examples = augmented(
                    data.train,
                    encoded,
                    options.masked_lm,
                    options.augmentation,
                    options.max_length,
                    output / "augmented.json",
                    progress,
                )
            _say(progress, f"{len(data.train)} examples augmented to {len(examples.train)}")
        run_stage(
            options.stages[name],
            load_model(student),
            examples,
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
            together=False,
        )
    start = rewired if sort is not None else teacher
    step(width, "training widths", lambda: train("width", start, teacher, width))
    step(dynabert, "training widths and depths", lambda: train("depth", width, width, dynabert))
    if options.final:
        step(final, "final fine-tuning", lambda: train("final", dynabert, None, final))
    last = final if options.final else dynabert
    processes.wait_for_everyone()
    _say(progress, "evaluating")
    if first:
        name = Path(source).name
        evaluate_checkpoint(last, data, encoded, output, options, name, progress)
    processes.wait_for_everyone()
    return Grid.load(output / "grid.json")


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
    model = load_model(checkpoint).to(device())
    grid = evaluate_grid(
        model,
        encoded.dev,
        encoded.collator,
        options.stages["depth"].subnets(model),
        encoded.metric,
        model_name=model_name,
        task=data.task.name,
        batch_size=options.training["depth"].eval_batch_size,
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
    return {
        "model": str(source),
        "task": data.task.name,
        "metric": data.task.metric,
        "train_examples": len(data.train),
        "dev_examples": len(data.dev),
        "data": _digest(data),
        **_choices(options),
    }


def _choices(options: FitOptions) -> dict[str, Any]:
    """The part of the settings that is not the data's."""
    return {
        "max_length": options.max_length,
        "rewiring": options.rewiring,
        "final": options.final,
        "augmentation": options.augmentation
        and {**asdict(options.augmentation), "model": str(options.masked_lm)},
        "stages": {name: asdict(stage) for name, stage in options.stages.items()},
        # How often checkpoints are saved may change.
        "training": {
            name: asdict(replace(values, save_every=0)) for name, values in options.training.items()
        },
    }


def _digest(data: TaskData) -> str:
    """A short hash of all texts and labels: the same files sampled anew are other data."""
    digest = hashlib.sha256()
    for examples in (data.train, data.dev):
        columns = (examples.texts, examples.pairs, examples.labels)
        digest.update(json.dumps(columns).encode())
    return digest.hexdigest()[:16]


def _begun(output: Path, settings: dict[str, Any], resume: bool) -> bool:
    """Whether `output` holds a run to go on with; it is one of the same settings, or else new."""
    record = output / "fit.json"
    if not (resume and record.is_file()):
        new_folder(output)
        return False
    # A stage that has not begun may have other settings than were planned; one that was
    # interrupted compares its own, those of its checkpoints.
    open_ = {name for name, folder in FOLDERS.items() if not (output / folder).is_dir()}
    refuse_others(
        record,
        output,
        settings,
        _choices(FitOptions()),
        free=tuple(f"{part}.{name}." for part in ("stages", "training") for name in open_),
    )
    return True


def _say(progress: bool, message: str) -> None:
    if progress:
        print(f"== {message}", flush=True)
