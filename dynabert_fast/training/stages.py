"""The stages of DynaBERT training, each from one checkpoint folder to the next.

| stage    | student / teacher                            | sub-networks | loss                  |
|----------|----------------------------------------------|--------------|-----------------------|
| finetune | the pretrained encoder / none                | full         | labels                |
| width    | the rewired model / the fine-tuned, full     | all widths   | SCE + 0.1 sum of MSE  |
| depth    | stage "width"'s model / the same, same width | whole grid   | SCE + sum of MSE      |
| final    | stage "depth"'s model / none                 | whole grid   | labels                |

Hyper-parameters default to the paper's for every stage: learning rate 2e-5, batch 32, 3 epochs,
linear decay, AdamW without weight decay, gradients clipped at 1.0. A `Recipe` may change those of
stage `depth`, and its loss; `fit` and `train-depth` on the command line have one by default.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import operator
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dynabert_fast.data import Collator, EncodedDataset
from dynabert_fast.errors import InputError
from dynabert_fast.evaluation.grid import write_aside
from dynabert_fast.files import checkpoints_folder, find_damage, new_whole_folder, whole_folder
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.subnet import DEPTHS, WIDTHS, Subnet, grid
from dynabert_fast.training.losses import Distillation, HiddenTarget
from dynabert_fast.training.schedules import Schedule
from dynabert_fast.training.settings import refuse_others
from dynabert_fast.training.trainer import (
    CHECKPOINTING,
    GRID_SUM,
    ElasticTrainer,
    checkpoints,
)

_logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Stage:
    """What one stage trains.

    Attributes:
        name: Its name.
        widths: Width multipliers trained together.
        depths: Depth multipliers trained together.
        recipe: The distillation loss; `None` trains on labels.
    """

    name: str
    widths: tuple[float, ...]
    depths: tuple[float, ...]
    recipe: Distillation | None

    def subnets(self, model: DynaBertForSequenceClassification) -> tuple[Subnet, ...]:
        """Its sub-networks in training order: depth outer, width inner, descending."""
        return grid(model.config, self.widths, self.depths)

    def check(self, config: DynaBertConfig, schedule: Schedule) -> None:
        """Refuse what a model or a schedule does not have.

        Raises:
            InputError: A multiplier keeps no head or layer, or no sub-network has an assistant and
                the recipe gives it weight.
        """
        subnets = grid(config, self.widths, self.depths)
        if self.recipe is None or not self.recipe.assistant:
            return
        ends = schedule.kind == "random" or (schedule.kind == "sandwich" and not schedule.count)
        others = () if ends else subnets
        if not any(self.recipe.assistant_of(s, others) for s in subnets):
            drawn = "" if schedule.kind == "grid" else f" and schedule {schedule.kind}"
            raise InputError(
                "no sub-network has an assistant, a deeper one of its width below depth 1: train "
                "at two depths below 1 or more, by schedule grid or by a sandwich that draws, or "
                "give assistants no weight (--lambda-assistant 0, assistant=0); got depths "
                f"{', '.join(map(str, self.depths))}{drawn}"
            )


@dataclass(frozen=True)
class Recipe:
    """How stage `depth` is trained; all else is the paper's in every recipe.

    Attributes:
        steps: Times the steps of an epoch: each has so many times less examples (or tokens) than
            in the other stages. The number of `max_steps` stays.
        rate: Times the learning rate of the other stages.
        warmup: Share of the steps with a rising rate; `None` as in the other stages.
        hidden_target: See `Distillation`.
        labels: See `Distillation`.
        assistant: See `Distillation`.
    """

    steps: int = 1
    rate: float = 1.0
    warmup: float | None = None
    hidden_target: HiddenTarget = "input"
    labels: float = 0.0
    assistant: float = 0.0

    def training(self, options: TrainingOptions) -> TrainingOptions:
        """The options of stage `depth`, given those of the other stages.

        Fewer accumulated batches come before smaller ones. A step of too few examples to divide
        is made as small as can be, at the rate of the other stages.
        """
        batches = -(-options.gradient_accumulation // self.steps)
        size = options.batch_size * options.gradient_accumulation // (self.steps * batches)
        tokens = options.tokens_per_step
        divided = size if tokens is None else tokens // self.steps
        return replace(
            options,
            batch_size=max(1, size),
            gradient_accumulation=batches,
            tokens_per_step=None if tokens is None else max(1, divided),
            learning_rate=options.learning_rate * (self.rate if divided else 1.0),
            warmup=options.warmup if self.warmup is None else self.warmup,
        )


#: By name. `small-batches`, the command's default, left sub-networks nearer to their teacher on
#: four of five tasks, level on the largest (docs/quality.md). What those of less depth lack is
#: steps, and as all are one pass, a batch of 8 examples still is some hundred rows of each layer.
RECIPES = {
    "paper": Recipe(),
    "small-batches": Recipe(steps=4, rate=2.0, warmup=0.1, hidden_target="output", labels=1.0),
}


def stages(
    widths: Sequence[float] = WIDTHS,
    depths: Sequence[float] = DEPTHS,
    recipe: Recipe = RECIPES["paper"],
) -> dict[str, Stage]:
    """The four stages by name, for a grid of widths and depths.

    Losses are the paper's, but for what the recipe changes in stage `depth`.
    """
    widths, depths = tuple(widths), tuple(depths)
    # The fine-tuned teacher was never trained to be good at less than its full width.
    every_width = Distillation(hidden=0.1, teacher_width="full")
    of_depths = Distillation(
        hidden_target=recipe.hidden_target, labels=recipe.labels, assistant=recipe.assistant
    )
    return {
        "finetune": Stage("finetune", (1.0,), (1.0,), None),
        "width": Stage("width", widths, (1.0,), every_width),
        "depth": Stage("depth", widths, depths, of_depths),
        "final": Stage("final", widths, depths, None),
    }


# Options that are whole numbers, those that may be left out, and those that are counts from 1 on.
_OPTIONAL = ("tokens_per_step", "subnets_per_pass")
_COUNTS = ("batch_size", "gradient_accumulation", "eval_batch_size", *_OPTIONAL)
_WHOLE = (*_COUNTS, "max_steps", "save_every", "seed")


@dataclass(frozen=True)
class TrainingOptions:
    """Hyper-parameters of a stage; the defaults are the paper's.

    Attributes:
        learning_rate: Peak learning rate of AdamW.
        batch_size: Examples per batch and process.
        tokens_per_step: Instead of a number of examples: an optimiser step takes as many examples
            as fit so many real tokens, over all processes and accumulated batches together. A step
            then has the same examples whatever the number of processes; each of them has about
            its part of the tokens. `batch_size` is not used.
        epochs: Passes over the training data.
        max_steps: Stop after so many optimiser steps instead (-1: do not).
        warmup: Share of the steps with a rising learning rate; default 0, and 0.06 for RoBERTa.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped at this norm once a step, over all sub-networks.
        gradient_accumulation: Batches whose gradients make one step.
        precision: `fp32`, or `bf16` / `fp16` autocast.
        eval_batch_size: Examples per batch in evaluation.
        save_every: Also save a checkpoint every so many steps (0: after each epoch only).
        schedule: Which of a stage's sub-networks each step trains.
        subnets_per_pass: At most so many in one forward and backward pass, to bound the memory of
            activations; default all of a step's.
        checkpointing: Keep only the input of each layer for the backward pass, and compute the
            layer again there: less memory, a third more work.
        seed: Of the data order, of dropout and of the schedule.
    """

    learning_rate: float = 2e-5
    batch_size: int = 32
    tokens_per_step: int | None = None
    epochs: float = 3.0
    max_steps: int = -1
    warmup: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    precision: Precision = "fp32"
    eval_batch_size: int = 64
    save_every: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    subnets_per_pass: int | None = None
    checkpointing: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        for name in _WHOLE:
            if (value := getattr(self, name)) is None and name in _OPTIONAL:
                continue
            try:  # numpy's become Python's, which JSON has
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise InputError(f"{name} must be a whole number, got {value!r}") from None
        for name in ("learning_rate", "epochs", "weight_decay", "max_grad_norm"):
            if not isinstance(value := getattr(self, name), Real) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value!r}")
        for name in ("learning_rate", "epochs", *_COUNTS):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise InputError(f"{name} must be above 0, got {value}")
        for name in ("weight_decay", "max_grad_norm", "save_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"max_steps must be above 0, or -1 for epochs, got {self.max_steps}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed must be in 0 to {(1 << 32) - 1}, got {self.seed}")
        if not isinstance(self.schedule, Schedule):
            raise InputError(f"schedule must be a Schedule, got {self.schedule!r}")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise InputError(f"warmup is a share of the steps in [0, 1), got {self.warmup}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise InputError(f"precision must be fp32, bf16 or fp16, got {self.precision!r}")

    def arguments(self, output: Path, is_roberta: bool, progress: bool = True) -> TrainingArguments:
        """The Hugging Face training arguments."""
        warmup = self.warmup if self.warmup is not None else 0.06 if is_roberta else 0.0
        return TrainingArguments(
            output_dir=str(output),
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.eval_batch_size,
            num_train_epochs=self.epochs,
            max_steps=self.max_steps,
            warmup_steps=warmup,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            gradient_accumulation_steps=self.gradient_accumulation,
            lr_scheduler_type="linear",
            adam_epsilon=1e-8,
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model=GRID_SUM,
            greater_is_better=True,
            logging_steps=50,
            # It waits for the device after every step; the trainer's `_watch_loss` does not.
            logging_nan_inf_filter=False,
            seed=self.seed,
            report_to="none",
            disable_tqdm=not progress,
            use_cpu=not torch.cuda.is_available(),
            # A layer that a step's last sub-network drops has its gradient from the earlier ones.
            ddp_find_unused_parameters=True,
            remove_unused_columns=False,
            # Copies to the device from pinned memory.
            accelerator_config={"non_blocking": torch.cuda.is_available()},
            **({CHECKPOINTING: True} if self.checkpointing else {}),
        )


def check_precision(options: TrainingOptions) -> None:
    """Refuse `fp16` where there is no GPU: accelerate would train in fp32 and not say so.

    Raises:
        InputError: As said.
    """
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("fp16 trains on GPUs only, and torch sees none here; choose bf16 or fp32")


def process_group() -> PartialState:
    """The processes that `torchrun` started; one may wait for a day for what another does alone."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


@dataclass(frozen=True)
class StageData:
    """What every stage of one task shares, tokenised once.

    Attributes:
        train: Training examples.
        dev: Development examples; they choose the best checkpoint.
        collator: Pads a batch.
        tokenizer: Saved beside the model.
        metric: Primary metric, as `compute_metrics` takes it.
    """

    train: EncodedDataset
    dev: EncodedDataset
    collator: Collator
    tokenizer: PreTrainedTokenizerBase
    metric: str


def run_stage(
    stage: Stage,
    model: DynaBertForSequenceClassification,
    data: StageData,
    output: str | Path,
    options: TrainingOptions | None = None,
    teacher: DynaBertForSequenceClassification | None = None,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Train one stage and save the best checkpoint's model and tokenizer as `output`.

    `output` appears when it is whole. Checkpoints live in `<output>.checkpoints` until then: the
    best, the newest and the one before. With `resume`, an interrupted run goes on from the newest
    that is not damaged and ends with the same weights.

    Args:
        stage: What to train.
        model: The student; left with the best checkpoint's weights.
        data: The task.
        output: Folder to make.
        options: Hyper-parameters.
        teacher: The fixed teacher, for stages that distil.
        resume: Go on where an interrupted run stopped; nothing is done if `output` is there.
        progress: Show progress bars.

    Raises:
        InputError: `output` or its checkpoints exist (without `resume`), the checkpoints are of a
            run of other settings, data, student, teacher or number of processes, all of them are
            damaged, the teacher is missing or does not fit the student, there are no examples or
            such as a model cannot read, or the precision is not for this device.
        SaveError: A checkpoint could not be written.
        TrainingError: A loss is NaN or infinite; the batch is beside the checkpoints.
    """
    output, options = Path(output), options or TrainingOptions()
    if stage.recipe is not None:
        if teacher is None:
            raise InputError(f"stage {stage.name} distils: give the teacher's checkpoint")
        check_teacher(stage.recipe, model.config, teacher.config)
    stage.check(model.config, options.schedule)
    run = checkpoints_folder(output)
    if resume and (output / "config.json").is_file():
        shutil.rmtree(run, ignore_errors=True)  # where the earlier process was killed before this
        return
    check_precision(options)
    for name, examples in (("training", data.train), ("development", data.dev)):
        if not len(examples):
            raise InputError(f"stage {stage.name}: there are no {name} examples")
    new_whole_folder(output)
    last = _last_checkpoint(run, resume)
    settings = {
        "stage": asdict(stage),
        "training": asdict(replace(options, save_every=0)),  # which may change
        "metric": data.metric,
        "train_examples": len(data.train),
        "dev_examples": len(data.dev),
        "data": [data.train.digest(), data.dev.digest()],
        "teacher": None if teacher is None else _digest(teacher),
        "student": _digest(model),
        "processes": process_group().num_processes,
    }
    record = run / "settings.json"
    if last is not None and record.is_file():
        default = {
            "stage": asdict(stages().get(stage.name, stage)),
            "training": asdict(TrainingOptions()),
            **{name: settings[name] for name in ("student", "processes")},
        }
        refuse_others(record, run, settings, default)
    trainer = ElasticTrainer(
        model=model,
        args=options.arguments(run, model.config.is_roberta, progress),
        subnets=stage.subnets(model),
        train_dataset=data.train,
        eval_dataset=data.dev,
        data_collator=data.collator,
        metric=data.metric,
        teacher=teacher if stage.recipe is not None else None,
        recipe=stage.recipe,
        tokens_per_step=options.tokens_per_step,
        schedule=options.schedule,
        subnets_per_pass=options.subnets_per_pass,
        save_every=options.save_every,
        processing_class=data.tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    report = _Progress(stage.name) if progress else _Log(stage.name)
    trainer.add_callback(report)
    first = trainer.is_world_process_zero()
    if first:
        print(f"{stage.name}: {_describe_memory(trainer)}", flush=True)

    def write_settings() -> None:
        if first:
            write_aside(record, json.dumps(settings, indent=2) + "\n")

    trainer.together(record, write_settings)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        if isinstance(report, _Progress):
            report.close()
        with contextlib.suppress(OSError):
            if first and not checkpoints(run):
                record.unlink()
            run.rmdir()  # of no effect where it holds checkpoints, as it should
    for wrapper in ("forward", "_original_forward"):  # accelerate's autocast: of training only
        model.__dict__.pop(wrapper, None)

    def save() -> None:
        if not first:
            return
        with whole_folder(output) as aside:
            model.save_pretrained(aside)
            data.tokenizer.save_pretrained(aside)
        shutil.rmtree(run, ignore_errors=True)

    trainer.together(output, save)


def _digest(model: DynaBertForSequenceClassification) -> str:
    """A short hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _describe_memory(trainer: ElasticTrainer) -> str:
    """`12 sub-networks a step, at most 4096 tokens: 2.1 GB at its peak (weights and ...)`."""
    memory, tokens = trainer.step_memory()
    count = len(trainer.schedule.choose(trainer.subnets, trainer.args.seed, 0))
    networks = f"{count} sub-networks" if count > 1 else "one network"
    parts = f"weights and optimiser {memory.weights / 1e9:.2f}, activations "
    parts += f"{(memory.activations + memory.backward) / 1e9:.2f}"
    if memory.teacher:
        parts += f", the teacher's hidden states {memory.teacher / 1e9:.2f}"
    return (
        f"{networks} a step, batches of at most {tokens} tokens: about {memory.total / 1e9:.2f} GB "
        f"({parts})"
    )


def check_teacher(recipe: Distillation, student: DynaBertConfig, teacher: DynaBertConfig) -> None:
    """Refuse a teacher that cannot read the student's batches, or whose outputs cannot be compared.

    Raises:
        InputError: Their families, vocabularies or labels differ, or hidden states are matched and
            their sizes differ.
    """
    equal = dict.fromkeys(("backbone", "vocab_size"), "both read the same tokens")
    if recipe.hidden:
        sizes = (
            "hidden states can be matched between equal sizes only: set the weight of hidden "
            "states to 0"
        )
        equal |= dict.fromkeys(("num_hidden_layers", "hidden_size"), sizes)
    for name, reason in equal.items():
        values = getattr(teacher, name), getattr(student, name)
        if values[0] != values[1]:
            raise InputError(
                f"the teacher's {name} is {values[0]}, the student's is {values[1]}; {reason}"
            )
    if student.id2label != teacher.id2label:
        raise InputError(
            f"the teacher's labels are {list(teacher.id2label.values())}, the student's are "
            f"{list(student.id2label.values())}; they must be the same, in the same order"
        )


def _last_checkpoint(run: Path, resume: bool) -> Path | None:
    found = checkpoints(run)
    if found and not resume:
        raise InputError(
            f"{run} holds an interrupted run; add --resume (resume=True) to go on, or delete it"
        )
    for _, folder in reversed(found):
        damage = _find_damage(folder)
        if damage is None:
            return folder
        _logger.warning("checkpoint %s is damaged (%s) and is not used", folder, damage)
    if found:
        raise InputError(
            f"no checkpoint in {run} is whole (the last one tried: {damage}); restore one from a "
            "backup, or delete the folder to train from the start"
        )
    return None


def _find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or with the best one, which it needs in the end."""
    damage = find_damage(checkpoint)
    if damage:
        return damage
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    step = state.get("best_global_step")
    best = checkpoint.with_name(f"checkpoint-{step}")
    if not step or best == checkpoint:
        return None
    damage = find_damage(best) if best.is_dir() else "missing"
    return f"its best checkpoint {best.name} is: {damage}" if damage else None


class _Log(TrainerCallback):
    """One short line per report."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def write(self, line: str) -> None:
        print(line, flush=True)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the loss, or the grid's mean and ends after an evaluation."""
        if not state.is_world_process_zero or logs is None:
            return
        where = f"{self.stage}: step {state.global_step}/{state.max_steps}"
        if f"eval_{GRID_SUM}" in logs:
            self.write(f"{where}, {_describe_grid(logs)}")
        elif "loss" in logs:
            self.write(f"{where}, loss {logs['loss']:.4f}, rate {logs['learning_rate']:.2e}")


class _Progress(ProgressCallback):
    """Progress bars with one short line per report."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.log = _Log(stage)

    def close(self) -> None:
        """Close the bar of a training that was cut short, so that it does not follow the error."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None:
            self.log.write = self.training_bar.write  # type: ignore[method-assign]
        self.log.on_log(args, state, control, logs=logs)


def _describe_grid(logs: dict[str, float]) -> str:
    """`accuracy: w1.00-d1.00 0.8730 to w0.25-d0.50 0.8120, mean of 12 0.8510`, from a log."""
    cells: dict[str, tuple[str, float]] = {}
    for key, value in logs.items():
        parts = key.split(
            "_", 2
        )  # eval_<sub-network>_<metric>; the first metric is the primary one
        if len(parts) == 3 and parts[1].startswith(("w", "l")):
            cells.setdefault(parts[1], (parts[2], value))
    names = list(cells)
    metric = cells[names[0]][0]
    if len(names) == 1:
        return f"{metric} {cells[names[0]][1]:.4f}"
    mean = logs[f"eval_{GRID_SUM}"] / len(names)
    ends = " to ".join(f"{name} {cells[name][1]:.4f}" for name in (names[0], names[-1]))
    return f"{metric}: {ends}, mean of {len(names)} {mean:.4f}"
