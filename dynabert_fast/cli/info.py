"""`info`: versions, devices, backends, the CPU engine, and what a checkpoint holds."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dynabert_fast import __version__
from dynabert_fast.cli import arguments as shared
from dynabert_fast.errors import InputError, MissingPackageError


def add_commands(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "info",
        "versions, devices, backends, the CPU engine, and the sub-networks of a checkpoint",
        """
dynabert-fast info
dynabert-fast info sst2/dynabert""",
        _info,
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="also describe this checkpoint: folder or hub id"
    )
    shared.add_grid(parser, fitting=True)
    parser.add_argument(
        "--length",
        type=shared.COUNT,
        default=128,
        metavar="N",
        help="tokens for the FLOPs (default 128)",
    )


def _info(args: argparse.Namespace) -> None:
    import platform

    about = ""
    if args.checkpoint:
        shared.quiet_libraries()
        about = _describe(args)
    print(f"dynabert-fast {__version__}, Python {platform.python_version()}")
    print(_torch_part())
    print(_cuda_module())
    print(_engine())
    if about:
        print(about)


def _torch_part() -> str:
    """Versions, devices and backends of the model in torch; the CPU engine does without."""
    try:
        shared.quiet_libraries()
        import torch
        import transformers
    except ModuleNotFoundError as error:
        if missing := MissingPackageError.explain(error, "the model in torch"):
            return str(missing)
        raise
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"devices: {', '.join(_devices())}; {torch.get_num_threads()} CPU threads\n"
        f"{_backend_table()}"
    )


def _cuda_module() -> str:
    """For which GPUs the CUDA code is built, or why it is not."""
    from dynabert_fast.engine.native import cuda_module

    try:
        return f"CUDA module: built for {cuda_module().architectures}"
    except InputError as error:
        return str(error)


def _engine() -> str:
    """Whether the CPU engine is built, and which instruction set it uses."""
    from dynabert_fast.engine import ISA_VARIABLE, isas

    try:
        found = isas()
    except InputError as error:
        return str(error)
    forced = os.environ.get(ISA_VARIABLE)
    if not forced:
        used = f"uses {found[0]}"
    elif forced in found:
        used = f"uses {forced}"
    else:
        used = f"refuses to run: {forced} is not one of these"
    return (
        f"CPU engine: {used} ({ISA_VARIABLE}: {forced or 'not set'})\n"
        f"  instruction sets here, fastest first: {', '.join(found)}"
    )


def _devices() -> list[str]:
    import torch

    names = ["cpu"]
    if torch.cuda.is_available():
        names += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return names


def _backend_table() -> str:
    """Which backend computes each kernel here, and why the others do not."""
    import torch

    from dynabert_fast.ops import backends, forced_backend
    from dynabert_fast.ops.reference import KERNELS
    from dynabert_fast.ops.registry import PRIORITY

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = backends()
    lines = [f"backends on {device.type}, fastest first (forced: {forced_backend() or 'none'}):"]
    for name in PRIORITY:
        if name not in found:
            lines.append(f"  {name:<10} not part of this installation")
            continue
        refusals: dict[str, list[str]] = {}
        for kernel in KERNELS:
            if reason := found[name].reason_against(kernel, device, torch.float32):
                refusals.setdefault(reason, []).append(kernel)
        served = len(KERNELS) - sum(map(len, refusals.values()))
        lines.append(f"  {name:<10} serves {served} of {len(KERNELS)} kernels")
        lines += [f"    {', '.join(kernels)}: {reason}" for reason, kernels in refusals.items()]
    return "\n".join(lines)


def _describe(args: argparse.Namespace) -> str:
    from dynabert_fast.evaluation import count_flops, count_parameters
    from dynabert_fast.evaluation.grid import format_quantity
    from dynabert_fast.rewiring import Rewiring
    from dynabert_fast.subnet import grid
    from dynabert_fast.training.pipeline import load_config

    config = load_config(args.checkpoint)
    labels = ", ".join(str(config.id2label[i]) for i in sorted(config.id2label))
    lines = [
        f"{args.checkpoint}: {config.backbone}, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, heads of {config.head_size}; labels: {labels}",
        f"rewired: {'yes' if Rewiring.load(args.checkpoint) else 'no'}",
        f"{'sub-network':<14}{'parameters':>14}{f'GFLOPs at {args.length}':>18}",
    ]
    for subnet in grid(config, args.widths, args.depths):
        parameters = format_quantity(count_parameters(config, subnet) / 1e6)
        flops = format_quantity(count_flops(config, subnet, args.length) / 1e9)
        lines.append(f"{subnet!s:<14}{parameters:>12} M{flops:>18}")
    return "\n".join(lines)
