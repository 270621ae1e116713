"""Arguments that several commands share, and what they mean.

Heavy imports stay inside functions: `--help` answers without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import DEPTHS, WIDTHS

if TYPE_CHECKING:
    from dynabert_fast.data import TaskData
    from dynabert_fast.models import DynaBertConfig
    from dynabert_fast.training import Stage, StageData, TrainingOptions

PROGRAM = "dynabert-fast"

#: The stages in order, and what their options are called in messages.
STAGES = ("finetune", "width", "depth", "final")

_COLUMNS = ("text_column", "pair_column", "label_column", "regression", "metric")
#: The options that go with each source of data.
_SOURCES = {
    "task": ("data_dir",),
    "train_file": ("dev_file", *_COLUMNS),
    "dataset": ("dataset_config", "dev_split", *_COLUMNS),
}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, as every other error here does."""

    def error(self, message: str) -> NoReturn:
        """Report bad usage and exit with code 2."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def add_command(
    commands: Any, name: str, summary: str, examples: str, run: Any
) -> argparse.ArgumentParser:
    """A sub-command whose `--help` ends with examples."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def number(
    kind: type[int] | type[float],
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], Any]:
    """The argparse type of an `int` or finite `float`: `>= least`, `> above` and `< below`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {name}, got {text!r}") from None
        if not (least <= value and above < value < below):  # NaN and infinity too are refused
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (("at least", least), ("above", above), ("below", below))
                if math.isfinite(bound)
            ]
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds)}, got {text}")
        return value

    return parse


COUNT = number(int, least=1)
NATURAL = number(int, least=0)
POSITIVE = number(float, above=0)
NOT_NEGATIVE = number(float, least=0)


def multipliers(text: str) -> tuple[float, ...]:
    """`1,0.75,0.5` as numbers in (0, 1]."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers separated by commas, like 1,0.75,0.5, got {text!r}"
        ) from None
    for value in values:
        if not 0 < value <= 1:  # also refuses NaN
            raise argparse.ArgumentTypeError(f"must be above 0 and at most 1 each, got {value:g}")
    return values


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where labelled texts come from."""
    group = parser.add_argument_group(
        "data", "one of: --task (published), --train-file (your own), --dataset (hub)"
    )
    add = group.add_argument
    add("--task", metavar="NAME", help="published task: cola, sst2, mrpc, stsb, ..., trec")
    add("--data-dir", metavar="DIR", help="folder of the task's files, or of many tasks")
    add("--train-file", metavar="FILE", help="your own CSV, TSV or JSONL file")
    add("--dev-file", metavar="FILE", help="development file (default: a tenth of --train-file)")
    add("--dataset", metavar="NAME", help="hub data set (or local folder), read with `datasets`")
    add("--dataset-config", metavar="NAME", help="its configuration")
    add(
        "--dev-split",
        metavar="NAME",
        help="its development split (default validation), or none: a tenth of the training split",
    )
    add("--text-column", metavar="NAME", help="column of the text")
    add("--pair-column", metavar="NAME", help="column of the second text, for pairs")
    add("--label-column", metavar="NAME", help="column of the label")
    add("--regression", action="store_true", help="labels are numbers to predict")
    add(
        "--metric",
        metavar="NAME",
        help="accuracy, accuracy_f1, f1, matthews; for regression spearman, pearson, neg_mse "
        "(default: the first)",
    )
    add("--max-train", type=COUNT, metavar="N", help="keep at most so many training examples")
    add(
        "--max-length",
        type=COUNT,
        default=128,
        metavar="N",
        help="cut texts to so many tokens (default 128)",
    )
    add(
        "--data-seed",
        type=NATURAL,
        default=0,
        metavar="N",
        help="seed of sampling and splitting (default 0)",
    )


def load_data(args: argparse.Namespace, only_dev: bool = False) -> TaskData:
    """Read the data that the arguments name.

    Args:
        args: Parsed arguments of `add_data`.
        only_dev: The command needs no training data; a lone `--dev-file` is enough.

    Raises:
        InputError: Not exactly one source, a column is missing, or the data cannot be used.
    """
    from dynabert_fast.data import load_files, load_glue, load_hub

    # A development file by itself is a source where nothing is trained.
    lone = only_dev and not (args.task or args.train_file or args.dataset)
    train_file = args.dev_file if lone else args.train_file
    source = _source(args, train_file, only_dev)
    if source == "task":
        if not args.data_dir:
            raise InputError("--task needs --data-dir, the folder of its files")
        data = load_glue(args.task, args.data_dir, max_train=args.max_train, seed=args.data_seed)
    else:
        for option in ("text_column", "label_column"):
            if not getattr(args, option):
                name = _flag("dev_file" if lone else source)
                raise InputError(f"{name} needs {_flag(option)}, the name of a column")
        own = {name: getattr(args, name) for name in _COLUMNS}
        own |= {"max_train": args.max_train, "seed": args.data_seed}
        if source == "dataset":
            split = args.dev_split or "validation"
            dev_split = None if split == "none" else split
            data = load_hub(args.dataset, args.dataset_config, dev_split=dev_split, **own)
        else:
            data = load_files(train_file, args.dev_file, **own)
    for note in data.notes:
        say(note)
    return data


def _source(args: argparse.Namespace, train_file: str | None, only_dev: bool) -> str:
    """Which of `_SOURCES` the data come from; options of another one are refused, not ignored."""
    values = {"task": args.task, "train_file": train_file, "dataset": args.dataset}
    given = [source for source, value in values.items() if value]
    if len(given) != 1:
        allowed = ", ".join(map(_flag, _SOURCES)) + (", or --dev-file alone" if only_dev else "")
        got = " and ".join(map(_flag, given)) or "none of them"
        raise InputError(f"say where the data are: one of {allowed}; got {got}")
    for option in (name for names in _SOURCES.values() for name in names):
        if getattr(args, option) and option not in _SOURCES[given[0]]:
            raise InputError(f"{_flag(option)} does not go with {_flag(given[0])}; leave it out")
    return given[0]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def align_labels(data: TaskData, config: DynaBertConfig) -> TaskData:
    """The data with label ids as a checkpoint numbers them.

    Args:
        data: Labels numbered by the data.
        config: The checkpoint's configuration.

    Raises:
        InputError: A label is not one of the checkpoint's, or one side is regression.
    """
    names: dict[int, str] = config.id2label
    if data.task.regression:
        if len(names) != 1:
            raise InputError(
                f"the checkpoint tells {len(names)} classes apart; regression needs one output"
            )
        return data
    if len(names) == 1:
        raise InputError(
            "the checkpoint predicts a number (it has one output); --regression reads such labels"
        )
    ids = {name: i for i, name in names.items()}
    unknown = [name for name in data.label_names if name not in ids]
    if unknown:
        unnamed = all(name == f"LABEL_{i}" for i, name in names.items())
        advice = " (unnamed: fine-tune it, or name its classes in config.json)" if unnamed else ""
        raise InputError(
            f"label {unknown[0]!r} is not one of the checkpoint's: "
            f"{', '.join(map(repr, ids))}{advice}"
        )
    new = [ids[name] for name in data.label_names]

    def renumber(examples: Any) -> Any:
        return dataclasses.replace(examples, labels=[new[label] for label in examples.labels])

    return dataclasses.replace(
        data,
        train=renumber(data.train),
        dev=renumber(data.dev),
        label_names=tuple(names[i] for i in sorted(names)),
    )


def prepare(
    args: argparse.Namespace, source: str, only_dev: bool = False, new_head: bool = False
) -> tuple[TaskData, StageData]:
    """The data, and the same tokenised for a checkpoint; what can be refused before is.

    Args:
        args: Parsed arguments of `add_data`.
        source: The checkpoint: folder or hub id.
        only_dev: As in `load_data`.
        new_head: The checkpoint's own labels do not matter.

    Raises:
        InputError: The checkpoint or the data cannot be used, or do not fit each other.
    """
    from dynabert_fast.training.pipeline import (
        check_length,
        load_config,
        load_tokenizer,
        stage_data,
    )

    config = load_config(source)
    check_length("max_length", args.max_length, config)
    tokenizer = load_tokenizer(source)
    data = load_data(args, only_dev)
    if not new_head:
        data = align_labels(data, config)
    return data, stage_data(data, tokenizer, args.max_length)


def add_grid(parser: argparse.ArgumentParser, fitting: bool = False) -> None:
    """Widths and depths of the grid; by default all, or those that fit the model."""
    which = " as far as they fit" if fitting else ""
    group = parser.add_argument_group("sub-networks")
    group.add_argument(
        "--widths",
        type=multipliers,
        default=None if fitting else WIDTHS,
        metavar="LIST",
        help=f"width multipliers (default 1,0.75,0.5,0.25{which})",
    )
    group.add_argument(
        "--depths",
        type=multipliers,
        default=None if fitting else DEPTHS,
        metavar="LIST",
        help=f"depth multipliers (default 1,0.75,0.5{which})",
    )


def add_training(
    parser: argparse.ArgumentParser,
    per_stage: bool = False,
    several: bool = True,
    about: str = "defaults are the paper's",
) -> None:
    """Hyper-parameters; the defaults are the paper's. `several`: of sub-networks in a step."""
    group = parser.add_argument_group("training", about)
    size = group.add_mutually_exclusive_group()

    def add(
        name: str, kind: Callable[[str], Any], default: Any, text: str, to: Any = group
    ) -> None:
        to.add_argument(name, type=kind, default=default, metavar="N", help=text)

    add("--epochs", POSITIVE, 3.0, "passes over the data (default 3)")
    add("--max-steps", COUNT, -1, "train each stage for so many steps, instead of --epochs")
    add("--batch-size", COUNT, None, "examples per batch and process (default 32)", to=size)
    add(
        "--tokens-per-step",
        COUNT,
        None,
        "instead: as many examples a step as fit so many tokens, over all processes and "
        "accumulated batches",
        to=size,
    )
    add("--learning-rate", POSITIVE, None, "peak rate (default 2e-5)")
    if per_stage:
        for stage in STAGES:
            add(f"--{stage}-epochs", POSITIVE, None, f"passes of stage {stage}")
            add(f"--{stage}-batch-size", COUNT, None, f"examples per batch of stage {stage}")
            add(f"--{stage}-learning-rate", POSITIVE, None, f"peak rate of stage {stage}")
    add(
        "--warmup",
        number(float, least=0, below=1),
        None,
        "share of the steps with a rising rate (default 0; RoBERTa 0.06)",
    )
    add("--weight-decay", NOT_NEGATIVE, 0.0, "of AdamW (default 0)")
    add("--max-grad-norm", NOT_NEGATIVE, 1.0, "clip gradients at this norm (default 1; 0: do not)")
    add("--gradient-accumulation", COUNT, None, "batches per step (default 1)")
    add("--eval-batch-size", COUNT, 64, "examples per batch in evaluation (default 64)")
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="fp32, or autocast to 16 bits (default fp32; fp16 on GPUs only)",
    )
    text = "also save a checkpoint every so many steps (default: after each epoch only)"
    add("--save-every", NATURAL, 0, text)
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute layers again in the backward pass: much less memory, a third more work",
    )
    seeds = number(int, least=0, below=1 << 32)
    add("--seed", seeds, 42, "of data order, dropout and schedule (default 42)")
    if not several:
        return
    group.add_argument(
        "--schedule",
        choices=("grid", "sandwich", "random"),
        default="grid",
        help="sub-networks of a step: all (default); the largest, the smallest and some others; or "
        "these two and some whose widths differ from layer to layer",
    )
    add("--drawn-subnets", NATURAL, None, "how many of these others a step draws (default 2)")
    add(
        "--subnets-per-pass",
        COUNT,
        None,
        "at most so many sub-networks in one forward and backward pass: less memory, more time "
        "(default all of a step's)",
    )


def add_distillation(parser: argparse.ArgumentParser, of_depths: bool) -> None:
    """Weights of the distillation loss; for the stage of depths also the choice of teacher."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--lambda-logits",
        type=NOT_NEGATIVE,
        default=1.0,
        metavar="N",
        help="weight of the logits' loss (default 1)",
    )
    group.add_argument(
        "--lambda-hidden",
        type=NOT_NEGATIVE,
        metavar="N",
        help="weight of the hidden states' loss (default 0.1 for widths, 1 for depths)",
    )
    if of_depths:
        group.add_argument(
            "--lambda-labels",
            type=NOT_NEGATIVE,
            metavar="N",
            help="training depths, weight of a loss on labels beside them (default 1; 0 by "
            "--recipe paper, and with --augment, whose copies may mean something else)",
        )
        group.add_argument(
            "--lambda-assistant",
            type=NOT_NEGATIVE,
            metavar="N",
            help="training depths, weight of a loss on the logits of a teacher assistant, the "
            "next deeper sub-network of the same width and step below depth 1 (default 0)",
        )
        group.add_argument(
            "--recipe",
            choices=("small-batches", "paper"),
            default="small-batches",
            help="training depths, small-batches (default): a step has a quarter of the examples "
            "or tokens of other stages' (8 examples), at twice the rate (4e-5), with a tenth of "
            "warm-up, --hidden-target output and --lambda-labels 1; paper: as published",
        )
        group.add_argument(
            "--teacher-width",
            choices=("same", "full"),
            default="same",
            help="training depths, the teacher runs at the student's width (paper, default) or "
            "at full width (released code)",
        )
        group.add_argument(
            "--hidden-target",
            choices=("input", "output"),
            help="training depths, a hidden state learns from the teacher's input of the layer "
            "that it goes to (paper) or from its output of the layer that it comes from (default; "
            "input by --recipe paper)",
        )


def training_options(args: argparse.Namespace, stage: str) -> TrainingOptions:
    """The hyper-parameters of a stage: what was given for it, else what the recipe makes of all."""
    from dynabert_fast.training import RECIPES, Schedule, TrainingOptions

    several: dict[str, Any] = {}
    if hasattr(args, "schedule"):
        drawn = args.drawn_subnets
        if drawn is not None and args.schedule == "grid":
            raise InputError("--drawn-subnets needs --schedule sandwich or random; grid trains all")
        several["schedule"] = Schedule(args.schedule, Schedule.count if drawn is None else drawn)
        several["subnets_per_pass"] = args.subnets_per_pass
    options = TrainingOptions(
        epochs=args.epochs,
        max_steps=args.max_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        precision=args.precision,
        eval_batch_size=args.eval_batch_size,
        save_every=args.save_every,
        checkpointing=args.checkpointing,
        seed=args.seed,
        **several,
    )
    steps = ("learning_rate", "batch_size", "tokens_per_step", "gradient_accumulation")
    given = {name: getattr(args, name) for name in steps if getattr(args, name) is not None}
    recipe = RECIPES[args.recipe if stage == "depth" else "paper"]
    if hasattr(args, f"{stage}_epochs"):  # those given are of all stages
        options, given = recipe.training(dataclasses.replace(options, **given)), {}
    else:
        options = recipe.training(options)
    given["warmup"] = args.warmup
    for name in ("epochs", "batch_size", "learning_rate"):
        own = getattr(args, f"{stage}_{name}", None)
        if own is not None and name == "batch_size" and args.tokens_per_step is not None:
            raise InputError(
                f"--{stage}-batch-size {own} goes with steps of examples, not of tokens: leave it "
                f"out, or --tokens-per-step {args.tokens_per_step}"
            )
        given |= {} if own is None else {name: own}
        if own is not None and name == "batch_size":
            given["gradient_accumulation"] = args.gradient_accumulation
    return dataclasses.replace(options, **{k: v for k, v in given.items() if v is not None})


def stages_of(args: argparse.Namespace) -> dict[str, Stage]:
    """The stages with the grid and the distillation that the arguments ask for."""
    from dynabert_fast.training import RECIPES, stages

    of_depths = hasattr(args, "recipe")
    found = stages(args.widths, args.depths, RECIPES[args.recipe if of_depths else "paper"])
    # Widths always learn from the full teacher: it was fine-tuned at that width alone.
    loss = {"logits": args.lambda_logits, "hidden": args.lambda_hidden}
    given: dict[str, dict[str, Any]] = {"width": loss, "depth": dict(loss)}
    if of_depths:
        if args.hidden_target is not None and args.lambda_hidden == 0:
            raise InputError("--hidden-target has nothing to choose with --lambda-hidden 0")
        labels = args.lambda_labels
        if labels is None and args.augment is not None:
            labels = 0.0  # a word that is replaced may change what a text means
        given["depth"] |= {"labels": labels, "hidden_target": args.hidden_target}
        given["depth"]["assistant"] = args.lambda_assistant
        given["depth"]["teacher_width"] = args.teacher_width
    for name, changes in given.items():
        recipe = found[name].recipe
        assert recipe is not None
        recipe = dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})
        found[name] = dataclasses.replace(found[name], recipe=recipe)
    return found


def add_output(parser: argparse.ArgumentParser, resumable: bool = True) -> None:
    """The output folder."""
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    if resumable:
        parser.add_argument("--resume", action="store_true", help="go on where a run stopped")


def done_before(args: argparse.Namespace) -> bool:
    """Whether a resumed stage has nothing left to do, and says so; a new one needs a new folder."""
    from dynabert_fast.files import checkpoints_folder, new_whole_folder

    if args.resume and (args.output / "config.json").is_file():
        if is_first():  # a process that was killed may not have come to this
            shutil.rmtree(checkpoints_folder(args.output), ignore_errors=True)
        say(f"done before: {args.output}")
        return True
    new_whole_folder(args.output)
    return False


def add_latency(parser: argparse.ArgumentParser) -> None:
    """What latency is measured at."""
    group = parser.add_argument_group(
        "latency", "measured on this device, all sub-networks interleaved"
    )
    for name, default, text in (
        ("batch", 1, "sequences per batch (default 1)"),
        ("length", 128, "tokens per sequence (default 128)"),
        ("rounds", 20, "timed passes of each sub-network (default 20)"),
    ):
        group.add_argument(f"--latency-{name}", type=COUNT, default=default, metavar="N", help=text)


def is_first() -> bool:
    """Whether this is the only process, or the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(text)


def quiet_libraries() -> None:
    """Silence the progress bars and advice of libraries; ours say what matters."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # in a log file a bar is a line each time it moves
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    downloads = not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, and of downloads
    if downloads:
        enable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
