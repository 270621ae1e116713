"""`fit`, and each stage as a command of its own."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynabert_fast.cli import arguments as shared
from dynabert_fast.errors import InputError

if TYPE_CHECKING:
    from dynabert_fast.data.augmentation import Augmentation

_OWN_FILE = "--train-file reviews.csv --text-column review --label-column stars"


def add_commands(commands: Any) -> None:
    """Add the training commands."""
    parser = shared.add_command(
        commands,
        "fit",
        "the whole pipeline: fine-tune, rewire, train widths and depths, evaluate",
        f"""
dynabert-fast fit --model bert-base-uncased --task sst2 --data-dir glue/SST-2 --output sst2
dynabert-fast fit --model roberta-base {_OWN_FILE} --output reviews
dynabert-fast fit --model bert-base-uncased --task sst2 --data-dir glue/SST-2 --output sst2 \\
  --resume""",
        _fit,
    )
    parser.add_argument(
        "--model", required=True, metavar="SOURCE", help="pretrained encoder: folder or hub id"
    )
    shared.add_output(parser)
    parser.add_argument("--final", action="store_true", help="also fine-tune the grid on labels")
    parser.add_argument(
        "--rewiring",
        choices=("per_batch", "running", "none"),
        default="per_batch",
        help="how importance is summed over batches (default per_batch); none: do not sort",
    )
    shared.add_data(parser)
    _add_augmentation(parser)
    shared.add_training(
        parser,
        per_stage=True,
        about="defaults are the paper's; training depths, --recipe takes its part of those of all "
        "stages",
    )
    shared.add_grid(parser)
    shared.add_distillation(parser, of_depths=True)
    shared.add_latency(parser)

    parser = shared.add_command(
        commands,
        "finetune",
        "fine-tune a pretrained encoder on labels (the teacher)",
        "dynabert-fast finetune bert-base-uncased --task rte --data-dir glue/RTE --output teacher",
        _finetune,
    )
    parser.add_argument("model", help="pretrained encoder: folder or hub id")
    shared.add_output(parser)
    shared.add_data(parser)
    shared.add_training(parser, several=False)

    parser = shared.add_command(
        commands,
        "rewire",
        "sort heads and neurons by importance, or show what a checkpoint was sorted by",
        """
dynabert-fast rewire teacher --task rte --data-dir glue/RTE --output rewired
dynabert-fast rewire rewired --show""",
        _rewire,
    )
    parser.add_argument("checkpoint", help="fine-tuned checkpoint: folder or hub id")
    parser.add_argument(
        "--show", action="store_true", help="print importance and order, change nothing"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--accumulation",
        choices=("per_batch", "running"),
        default="per_batch",
        help="sum magnitudes per batch (paper) or of the running sum (released code)",
    )
    parser.add_argument(
        "--batch-size",
        type=shared.COUNT,
        default=32,
        metavar="N",
        help="examples per batch (default 32)",
    )
    shared.add_data(parser)

    for stage, summary, source in (
        ("width", "stage 1: distil the fine-tuned model into every width", "rewired"),
        ("depth", "stage 2: distil the widths into every width and depth", "width"),
        ("final", "stage 3 (optional): fine-tune the whole grid on labels", "dynabert"),
    ):
        name = f"train-{stage}"
        teacher = {"width": " --teacher teacher", "depth": " --teacher width", "final": ""}[stage]
        parser = shared.add_command(
            commands,
            name,
            summary,
            f"dynabert-fast {name} {source}{teacher} --task rte --data-dir glue/RTE --output out",
            partial(_train, stage),
        )
        parser.add_argument("checkpoint", help="the student: folder or hub id")
        if stage != "final":
            parser.add_argument(
                "--teacher", required=True, metavar="SOURCE", help="the fixed teacher's checkpoint"
            )
        shared.add_output(parser)
        shared.add_data(parser)
        if stage != "final":
            _add_augmentation(parser)
        about = "defaults are the paper's"
        if stage == "depth":
            about += ", but for steps, rate and warm-up, which are --recipe's"
        shared.add_training(parser, about=about)
        shared.add_grid(parser)
        if stage != "final":
            shared.add_distillation(parser, of_depths=stage == "depth")


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    """More training texts, for the stages that distil."""
    group = parser.add_argument_group(
        "augmentation", "of the training texts of the stages that distil, as TinyBERT's"
    )
    group.add_argument(
        "--augment",
        type=shared.COUNT,
        metavar="N",
        help="at most so many copies of each example, in English, with words replaced (the paper: "
        "20 or 30; default none)",
    )
    group.add_argument(
        "--augment-model",
        metavar="SOURCE",
        help="masked language model that proposes the words: folder or hub id",
    )
    group.add_argument(
        "--augment-seed",
        type=shared.NATURAL,
        metavar="N",
        help="of what is replaced by what (default 0)",
    )


def _augmentation(args: argparse.Namespace) -> Augmentation | None:
    """How to augment, if at all."""
    if args.augment is None:
        for name in ("model", "seed"):
            if getattr(args, f"augment_{name}") is not None:
                raise InputError(
                    f"--augment-{name} needs --augment, the number of copies of each example"
                )
        return None
    if args.augment_model is None:
        raise InputError(
            "--augment needs --augment-model, a masked language model (bert-base-uncased, say)"
        )
    from dynabert_fast.data.augmentation import Augmentation

    return Augmentation(copies=args.augment, seed=args.augment_seed or 0)


def _fit(args: argparse.Namespace) -> None:
    shared.quiet_libraries()
    from dynabert_fast.files import new_folder
    from dynabert_fast.training.pipeline import FitOptions, check_options, fit, load_config

    for name in ("epochs", "batch-size", "learning-rate"):
        if vars(args)[f"final_{name.replace('-', '_')}"] is not None and not args.final:
            raise InputError(f"--final-{name} needs --final, without which there is no such stage")
    options = FitOptions(
        stages=shared.stages_of(args),
        training={name: shared.training_options(args, name) for name in shared.STAGES},
        max_length=args.max_length,
        rewiring=None if args.rewiring == "none" else args.rewiring,
        final=args.final,
        augmentation=_augmentation(args),
        masked_lm=args.augment_model,
        latency_batch_size=args.latency_batch,
        latency_length=args.latency_length,
        latency_rounds=args.latency_rounds,
    )
    check_options(load_config(args.model), options)
    first = shared.is_first()
    if first and not args.resume:
        new_folder(args.output)
    grid = fit(args.model, shared.load_data(args), args.output, options, args.resume)
    if first:
        print(grid.to_markdown())
        print(f"report: {args.output / 'report.html'}")


def _finetune(args: argparse.Namespace) -> None:
    shared.quiet_libraries()
    from dynabert_fast.training.pipeline import finetune
    from dynabert_fast.training.stages import check_precision

    options = shared.training_options(args, "finetune")
    if shared.done_before(args):
        return
    check_precision(options)
    data, encoded = shared.prepare(args, args.model, new_head=True)
    finetune(args.model, data, encoded, args.output, options, args.resume)
    shared.say(f"saved: {args.output}")


def _rewire(args: argparse.Namespace) -> None:
    if args.show:
        _show(args.checkpoint)
        return
    if args.output is None:
        raise InputError("rewire needs --output, the folder to make, or --show")
    shared.quiet_libraries()
    from dynabert_fast.files import new_whole_folder
    from dynabert_fast.training.pipeline import rewire_checkpoint

    new_whole_folder(args.output)
    _, encoded = shared.prepare(args, args.checkpoint, only_dev=True)
    rewire_checkpoint(args.checkpoint, encoded, args.output, args.accumulation, args.batch_size)
    _show(args.output)
    shared.say(f"saved: {args.output}")


def _show(checkpoint: str | Path) -> None:
    from dynabert_fast.rewiring import FILE_NAME, Rewiring

    if not Path(checkpoint).is_dir():
        raise InputError(f"{checkpoint} is not a folder; rewire --show reads a checkpoint's folder")
    rewiring = Rewiring.load(str(checkpoint))
    if rewiring is None:
        raise InputError(f"{checkpoint} was not rewired: it has no {FILE_NAME}")
    print(rewiring.describe())


def _train(stage: str, args: argparse.Namespace) -> None:
    shared.quiet_libraries()
    from dynabert_fast.training import check_teacher, run_stage, stages
    from dynabert_fast.training.pipeline import (
        augmented,
        check_vocabulary,
        load_config,
        load_model,
        load_tokenizer,
    )
    from dynabert_fast.training.stages import check_precision

    distils = stage != "final"
    augmentation = _augmentation(args) if distils else None
    if augmentation is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"train-{stage} augments in one process; with several use fit, whose first process does"
        )
    found = (shared.stages_of(args) if distils else stages(args.widths, args.depths))[stage]
    options = shared.training_options(args, stage)
    config = load_config(args.checkpoint)
    found.check(config, options.schedule)
    if found.recipe is not None:
        check_teacher(found.recipe, config, load_config(args.teacher))
    if shared.done_before(args):
        return
    check_precision(options)
    if distils:
        check_vocabulary(args.teacher, load_tokenizer(args.checkpoint))
    data, encoded = shared.prepare(args, args.checkpoint)
    if augmentation is not None:
        encoded = augmented(data.train, encoded, args.augment_model, augmentation, args.max_length)
    model = load_model(args.checkpoint)
    teacher = load_model(args.teacher) if distils else None
    run_stage(found, model, encoded, args.output, options, teacher, args.resume)
    shared.say(f"saved: {args.output}")
