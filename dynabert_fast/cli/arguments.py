"""Arguments that several commands share, and what they mean. Heavy imports stay inside functions."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynabert_fast.errors import InputError
from dynabert_fast.subnet import DEPTHS, WIDTHS

if TYPE_CHECKING:
    from dynabert_fast.data import TaskData
    from dynabert_fast.training import Stage, TrainingOptions

#: The stages in order, and what their options are called in messages.
STAGES = ("finetune", "width", "depth", "final")


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


def multipliers(text: str) -> tuple[float, ...]:
    """`1,0.75,0.5` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers separated by commas, like 1,0.75,0.5, got {text!r}"
        ) from None


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where labelled texts come from."""
    group = parser.add_argument_group(
        "data", "one of: a published task, your own files, a hub data set"
    )
    group.add_argument("--task", help="published task: cola, sst2, mrpc, stsb, ..., trec")
    group.add_argument("--data-dir", help="folder of the task's files, or of many tasks")
    group.add_argument("--train-file", help="your own CSV, TSV or JSONL file")
    group.add_argument("--dev-file", help="development file (default: a tenth of the training file)")
    group.add_argument("--dataset", help="hub data set (or local folder), read with `datasets`")
    group.add_argument("--dataset-config", help="its configuration")
    group.add_argument("--dev-split", default="validation", help="its development split")
    group.add_argument("--text-column", help="column of the text")
    group.add_argument("--pair-column", help="column of the second text, for pairs")
    group.add_argument("--label-column", help="column of the label")
    group.add_argument("--regression", action="store_true", help="labels are numbers to predict")
    group.add_argument("--metric", help="primary metric (default: the task's)")
    group.add_argument("--max-train", type=int, help="keep at most this many training examples")
    group.add_argument("--max-length", type=int, default=128, help="tokens per text (default 128)")
    group.add_argument("--data-seed", type=int, default=0, help="seed of sampling and splitting")


def load_data(args: argparse.Namespace, only_dev: bool = False) -> TaskData:
    """Read the data that the arguments name.

    Args:
        args: Parsed arguments of `add_data`.
        only_dev: The command needs no training data; a lone `--dev-file` is enough.

    Raises:
        InputError: Not exactly one source, a column is missing, or the data cannot be used.
    """
    from dynabert_fast.data import load_files, load_glue, load_hub

    train_file = args.train_file or (args.dev_file if only_dev else None)
    sources = {"--task": args.task, "--train-file": train_file, "--dataset": args.dataset}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise InputError(
            f"give one of {', '.join(sources)}, got {' and '.join(given) or 'none of them'}"
        )
    if args.task:
        if not args.data_dir:
            raise InputError("--task needs --data-dir, the folder of its files")
        data = load_glue(args.task, args.data_dir, max_train=args.max_train, seed=args.data_seed)
    else:
        for option in ("text_column", "label_column"):
            if not getattr(args, option):
                name = "--" + option.replace("_", "-")
                raise InputError(f"{given[0]} needs {name}, the name of a column")
        columns = {
            "text_column": args.text_column,
            "pair_column": args.pair_column,
            "label_column": args.label_column,
            "regression": args.regression,
            "metric": args.metric,
            "max_train": args.max_train,
            "seed": args.data_seed,
        }
        if args.dataset:
            data = load_hub(args.dataset, args.dataset_config, dev_split=args.dev_split, **columns)
        else:
            data = load_files(train_file, args.dev_file, **columns)
    for note in data.notes:
        print(note)
    return data


def align_labels(data: TaskData, names: dict[int, str]) -> TaskData:
    """The data with label ids as a checkpoint numbers them.

    Args:
        data: Labels numbered by the data.
        names: The checkpoint's `id2label`.

    Raises:
        InputError: A label is not one of the checkpoint's.
    """
    if data.task.regression:
        if len(names) != 1:
            raise InputError(f"the checkpoint has {len(names)} classes; regression needs one output")
        return data
    ids = {name: i for i, name in names.items()}
    unknown = [name for name in data.label_names if name not in ids]
    if unknown:
        raise InputError(
            f"label {unknown[0]!r} is not one of the checkpoint's: {', '.join(map(repr, ids))}"
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


def add_grid(parser: argparse.ArgumentParser) -> None:
    """Widths and depths of the grid."""
    group = parser.add_argument_group("sub-networks")
    group.add_argument(
        "--widths", type=multipliers, default=WIDTHS, help="width multipliers (default 1,0.75,0.5,0.25)"
    )
    group.add_argument(
        "--depths", type=multipliers, default=DEPTHS, help="depth multipliers (default 1,0.75,0.5)"
    )


def add_training(parser: argparse.ArgumentParser, per_stage: bool = False) -> None:
    """Hyper-parameters; the defaults are the paper's."""
    group = parser.add_argument_group("training", "defaults are the paper's")
    group.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default 3)")
    group.add_argument("--max-steps", type=int, default=-1, help="stop each stage after this many steps")
    group.add_argument("--batch-size", type=int, default=32, help="examples per step (default 32)")
    group.add_argument("--learning-rate", type=float, default=2e-5, help="peak rate (default 2e-5)")
    if per_stage:
        for stage in STAGES:
            group.add_argument(f"--{stage}-epochs", type=float, help=f"epochs of stage {stage}")
            group.add_argument(f"--{stage}-learning-rate", type=float, help="peak rate, likewise")
    group.add_argument("--warmup", type=float, help="share of steps (default 0; RoBERTa 0.06)")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="clipping (default 1)")
    group.add_argument(
        "--gradient-accumulation", type=int, default=1, help="batches per step (default 1)"
    )
    group.add_argument("--eval-batch-size", type=int, default=64, help="(default 64)")
    group.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default fp32)"
    )
    group.add_argument(
        "--save-every", type=int, default=0, help="also save a checkpoint every so many steps"
    )
    group.add_argument("--seed", type=int, default=42, help="of data order and dropout (default 42)")


def add_distillation(parser: argparse.ArgumentParser) -> None:
    """Weights of the distillation loss and choice of teacher."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--lambda-logits", type=float, default=1.0, help="weight of the logits' loss (default 1)"
    )
    group.add_argument(
        "--lambda-hidden",
        type=float,
        help="weight of the hidden states' loss (default 0.1 for widths, 1 for depths)",
    )
    group.add_argument(
        "--teacher-width",
        choices=("same", "full"),
        default="same",
        help="the teacher runs at the student's width (paper) or at full width (released code)",
    )


def training_options(args: argparse.Namespace, stage: str | None = None) -> TrainingOptions:
    """The hyper-parameters, for one stage where the command has options for each."""
    from dynabert_fast.training import TrainingOptions

    def of_stage(name: str) -> float:
        value = getattr(args, f"{stage}_{name}", None) if stage else None
        return getattr(args, name) if value is None else value

    return TrainingOptions(
        learning_rate=of_stage("learning_rate"),
        epochs=of_stage("epochs"),
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        gradient_accumulation=args.gradient_accumulation,
        precision=args.precision,
        eval_batch_size=args.eval_batch_size,
        save_every=args.save_every,
        seed=args.seed,
    )


def stages_of(args: argparse.Namespace) -> dict[str, Stage]:
    """The stages with the grid and the distillation that the arguments ask for."""
    from dynabert_fast.training import Distillation, stages

    found = stages(args.widths, args.depths)
    for name in ("width", "depth"):
        recipe = found[name].recipe
        assert recipe is not None
        hidden = recipe.hidden if args.lambda_hidden is None else args.lambda_hidden
        recipe = Distillation(args.lambda_logits, hidden, args.teacher_width)
        found[name] = dataclasses.replace(found[name], recipe=recipe)
    return found


def add_output(parser: argparse.ArgumentParser, resumable: bool = True) -> None:
    """The output folder."""
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    if resumable:
        parser.add_argument("--resume", action="store_true", help="go on where a run stopped")


def add_latency(parser: argparse.ArgumentParser) -> None:
    """What latency is measured at."""
    group = parser.add_argument_group("latency", "measured on this device, all sub-networks interleaved")
    group.add_argument("--latency-batch", type=int, default=1, help="sequences (default 1)")
    group.add_argument("--latency-length", type=int, default=128, help="tokens of each (default 128)")
    group.add_argument("--latency-rounds", type=int, default=20, help="timed rounds (default 20)")


def quiet_libraries() -> None:
    """Silence the progress bars and advice of libraries; ours say what matters."""
    import logging
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
