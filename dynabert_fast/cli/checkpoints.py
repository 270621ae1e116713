"""`evaluate`, `export` and `pack`: what a trained checkpoint is good for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynabert_fast.cli import arguments as shared
from dynabert_fast.engine import DTYPES
from dynabert_fast.errors import InputError

if TYPE_CHECKING:
    from dynabert_fast.models import DynaBertForSequenceClassification, DynaBertModel


def add_commands(commands: Any) -> None:
    """Add the commands."""
    parser = shared.add_command(
        commands,
        "evaluate",
        "fill the grid: metric, parameters, FLOPs and measured latency of every sub-network",
        """
dynabert-fast evaluate sst2/dynabert --task sst2 --data-dir glue/SST-2 --output sst2-grid
dynabert-fast evaluate out --dev-file dev.csv --text-column text --label-column label
dynabert-fast evaluate out --task rte --data-dir glue --subnets w0.50-d0.75,w0.25-d0.50
dynabert-fast evaluate sst2/dynabert --task sst2 --data-dir glue/SST-2 --engine int8""",
        _evaluate,
    )
    parser.add_argument("checkpoint", help="folder or hub id")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="also write grid.json, grid.md and report.html into this folder (an earlier "
        "evaluation's are replaced)",
    )
    parser.add_argument(
        "--subnets", metavar="LIST", help="names of sub-networks instead of the grid, by commas"
    )
    parser.add_argument(
        "--engine",
        choices=DTYPES,
        help="evaluate the CPU engine with weights of that type instead of the torch model",
    )
    parser.add_argument(
        "--eval-batch-size",
        type=shared.COUNT,
        default=64,
        metavar="N",
        help="examples per batch (default 64)",
    )
    shared.add_data(parser)
    shared.add_grid(parser, fitting=True)
    shared.add_latency(parser)

    parser = shared.add_command(
        commands,
        "export",
        "save a sub-network as a checkpoint of its own, and check it against the slice",
        """
dynabert-fast export sst2/dynabert --subnet w0.50-d0.75 --output sst2-small
dynabert-fast export sst2/dynabert --subnet l0+2-h12+6-n1536+768 --output sst2-odd""",
        _export,
    )
    parser.add_argument("checkpoint", help="folder or hub id")
    parser.add_argument(
        "--subnet",
        metavar="NAME",
        required=True,
        help="w0.50-d0.75, or layers, heads, neurons: l0+2-h12+6-n1536+768",
    )
    shared.add_output(parser, resumable=False)

    parser = shared.add_command(
        commands,
        "pack",
        "write the CPU engine's file: one copy of the weights for every sub-network",
        """
dynabert-fast pack sst2/dynabert --dtype int8 --output sst2.dynabert
dynabert-fast pack sst2/dynabert --dtype bf16 --output sst2-bf16.dynabert""",
        _pack,
    )
    parser.add_argument(
        "checkpoint", help="folder or hub id; without a head, its encoder is packed"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="int8",
        help="type of the weights and of the arithmetic (default int8)",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="file to write, a new one"
    )


def _evaluate(args: argparse.Namespace) -> None:
    shared.quiet_libraries()
    from dynabert_fast.evaluation import PackedModel, evaluate_grid
    from dynabert_fast.files import old_or_new_folder
    from dynabert_fast.subnet import Subnet, grid
    from dynabert_fast.training.pipeline import (
        check_length,
        device,
        load_config,
        load_model,
        write_grid,
    )

    if args.output:
        old_or_new_folder(args.output)
    config = load_config(args.checkpoint)
    if args.subnets:
        subnets = tuple(Subnet.parse(config, name.strip()) for name in args.subnets.split(","))
    else:
        subnets = grid(config, args.widths, args.depths)
    check_length("latency_length", args.latency_length, config)
    data, encoded = shared.prepare(args, args.checkpoint, only_dev=True)
    model = load_model(args.checkpoint)
    result = evaluate_grid(
        PackedModel(model, args.engine) if args.engine else model.to(device()),
        encoded.dev,
        encoded.collator,
        subnets,
        encoded.metric,
        model_name=Path(args.checkpoint).name,
        task=data.task.name,
        batch_size=args.eval_batch_size,
        latency_batch_size=args.latency_batch,
        latency_length=args.latency_length,
        rounds=args.latency_rounds,
    )
    print(result.to_markdown())
    if args.output:
        write_grid(result, args.output)
        print(f"report: {args.output / 'report.html'}")


def _export(args: argparse.Namespace) -> None:
    shared.quiet_libraries()
    import torch

    from dynabert_fast.evaluation.grid import format_quantity
    from dynabert_fast.files import new_whole_folder, whole_folder
    from dynabert_fast.subnet import Subnet
    from dynabert_fast.training.pipeline import load_config, load_model, load_tokenizer

    new_whole_folder(args.output)
    subnet = Subnet.parse(load_config(args.checkpoint), args.subnet)
    tokenizer = load_tokenizer(args.checkpoint)
    model = load_model(args.checkpoint).eval()
    model.check_finite()
    part = model.extract(subnet)
    with whole_folder(args.output) as aside:
        part.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        # What was written must compute the same bits as the slice that it was taken from.
        length = min(8, model.config.max_tokens)
        ids = torch.arange(2 * length).remainder(model.config.vocab_size).view(2, length)
        with torch.inference_mode():
            exported = load_model(aside).eval()(input_ids=ids).logits
            sliced = model(input_ids=ids, subnet=subnet).logits
        if not torch.equal(exported, sliced):
            raise InputError(
                f"{args.output}: the export of {subnet} differs from the slice by "
                f"{float((exported - sliced).abs().max()):.1e}; nothing was saved"
            )
    count = format_quantity(sum(p.numel() for p in part.parameters()) / 1e6)
    print(f"saved: {args.output} ({subnet}, {count} M parameters, equal bit for bit)")


def _pack(args: argparse.Namespace) -> None:
    shared.quiet_libraries()
    from dynabert_fast.engine import CpuEngine
    from dynabert_fast.files import old_or_new_folder

    path: Path = args.output
    old_or_new_folder(path.parent)
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists; name another file, or delete it first")
    engine = _load_any(args.checkpoint).pack(args.dtype, threads=1)
    assert isinstance(engine, CpuEngine)  # the model is on the CPU
    path.parent.mkdir(parents=True, exist_ok=True)
    engine.save(path)
    print(f"saved: {path} ({args.dtype}, {path.stat().st_size:,} bytes)")


def _load_any(source: str) -> DynaBertForSequenceClassification | DynaBertModel:
    """The classifier of a checkpoint, or the encoder of one that has no such head."""
    from dynabert_fast.models import DynaBertModel
    from dynabert_fast.training.pipeline import _loading, load_config, load_model

    saved_from = load_config(source).architectures or ["of a SequenceClassification"]
    if any("SequenceClassification" in name for name in saved_from):
        return load_model(source)
    with _loading(source):
        model, report = DynaBertModel.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True
        )
    drawn = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    pooler = {name for name in drawn if name.startswith("pooler.")}
    if drawn - pooler:
        raise InputError(
            f"{source} has no {min(drawn - pooler)} of the size that its config.json says; "
            "copy or save it again"
        )
    if pooler:
        for parameter in model.pooler.parameters():
            parameter.data.zero_()
        print("note: the checkpoint has no pooler; pooler_output will be 0")
    return model
