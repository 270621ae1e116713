"""`evaluate` and `export`: what a trained checkpoint is good for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dynabert_fast.cli import arguments as shared
from dynabert_fast.engine import DTYPES
from dynabert_fast.errors import InputError


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
    shared.add_grid(parser)
    shared.add_latency(parser)

    parser = shared.add_command(
        commands,
        "export",
        "save a sub-network as a stand-alone checkpoint, and check it against the slice",
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


def _evaluate(args: argparse.Namespace) -> None:
    shared.quiet_libraries()
    from dynabert_fast.evaluation import PackedModel, evaluate_grid
    from dynabert_fast.files import old_or_new_folder
    from dynabert_fast.subnet import Subnet, grid
    from dynabert_fast.training.pipeline import check_length, load_config, load_model, write_grid

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
        PackedModel(model, args.engine) if args.engine else model,
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
    from dynabert_fast.files import new_folder, whole_folder
    from dynabert_fast.subnet import Subnet
    from dynabert_fast.training.pipeline import load_config, load_model, load_tokenizer

    new_folder(args.output)
    subnet = Subnet.parse(load_config(args.checkpoint), args.subnet)
    tokenizer = load_tokenizer(args.checkpoint)
    model = load_model(args.checkpoint).eval()
    part = model.extract(subnet)
    with whole_folder(args.output) as aside:
        part.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        # What was written must compute the same bits as the slice that it was taken from.
        ids = torch.arange(16).remainder(model.config.vocab_size).view(2, 8)
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
