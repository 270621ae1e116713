"""`bench`: how fast the CPU engine runs here, and where its time goes; `tune`: a GPU's kernels."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynabert_fast.cli import arguments as shared
from dynabert_fast.engine import DTYPES
from dynabert_fast.subnet import Subnet, grid

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from dynabert_fast.engine import CpuEngine

_TORCH_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def add_commands(commands: Any) -> None:
    """Add the commands."""
    parser = shared.add_command(
        commands,
        "bench",
        "measure the CPU engine's sub-networks here, or where the time of one goes",
        """
dynabert-fast bench sst2/dynabert --dtype int8
dynabert-fast bench sst2.dynabert --length 32 --threads 2
dynabert-fast bench sst2/dynabert --profile --subnet w0.25-d0.50""",
        _bench,
    )
    add = parser.add_argument
    add("model", help="a checkpoint's folder or hub id, or a packed file")
    add("--dtype", choices=DTYPES, help="pack the checkpoint so (default int8)")
    add("--subnet", metavar="NAME", help="one sub-network instead of the grid (w0.50-d0.75)")
    add("--batch-size", type=shared.COUNT, default=1, metavar="N", help="sequences (default 1)")
    add("--length", type=shared.COUNT, default=128, metavar="N", help="tokens each (default 128)")
    add("--threads", type=shared.COUNT, metavar="N", help="threads (default: all there are)")
    add("--rounds", type=shared.COUNT, default=20, metavar="N", help="timed calls (default 20)")
    add(
        "--profile",
        action="store_true",
        help="time, share of this processor's peak, and weights read, of each stage",
    )
    parser = shared.add_command(
        commands,
        "tune",
        "time the kernels' configurations, and cuBLASLt, on this GPU, ahead of their first use",
        """
dynabert-fast tune sst2/dynabert
dynabert-fast tune sst2/dynabert --tokens 16384 --train""",
        _tune,
    )
    add = parser.add_argument
    add("model", help="a checkpoint's folder or hub id")
    add("--dtype", choices=tuple(_TORCH_TYPES), default="bf16", help="type (default bf16)")
    add("--tokens", type=shared.COUNT, default=4096, metavar="N", help="most in a batch (4096)")
    add("--length", type=shared.COUNT, default=128, metavar="N", help="of a sequence (default 128)")
    add("--train", action="store_true", help="the kernels of training too, autocast to --dtype")


def _tune(args: argparse.Namespace) -> None:
    import torch

    from dynabert_fast.errors import InputError

    if not torch.cuda.is_available():
        raise InputError("tune needs a CUDA device, and torch sees none here")
    shared.quiet_libraries()
    from dynabert_fast.kernels import tuning
    from dynabert_fast.ops import cuda
    from dynabert_fast.training.pipeline import load_model

    dtype = getattr(torch, _TORCH_TYPES[args.dtype])
    model = load_model(args.model).cuda().to(dtype)
    taught = load_model(args.model).cuda().float() if args.train else None
    length = min(args.length, model.config.max_tokens)
    tokens = 16
    while tokens <= args.tokens:
        ids = torch.randint(1, model.config.vocab_size, (max(1, tokens // length), length)).cuda()
        ids = ids[:, :tokens]
        with torch.no_grad():
            for subnet in grid(model.config):
                model(ids, subnet=subnet)
        if taught is not None:
            for widths, depths in ((None, None), (None, (1.0,)), ((1.0,), (1.0,))):
                distil_once(taught, ids, grid(taught.config, widths, depths), dtype)
        print(f"{tokens} tokens: {len(grid(model.config))} sub-networks")
        tokens *= 2
    print(f"choices: {tuning.cache_file(model.device)}")
    if cuda.why_not(model.device) is None:
        print(f"Triton or cuBLASLt: {cuda.cache_file(model.device)}")


def distil_once(model: Any, ids: Tensor, subnets: Sequence[Subnet], dtype: torch.dtype) -> None:
    """Forward and backward of a training step, the model its own teacher; gradients are dropped."""
    import torch

    from dynabert_fast.training.losses import Distillation, TreeDistillation
    from dynabert_fast.tree import SubnetTree

    tree = SubnetTree(subnets)
    lesson = TreeDistillation(Distillation(), model.config, tree)
    arguments = {"output_hidden_states": True, "unpack": False}
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            wanted = model.eval()(ids, subnet=lesson.teachers, **arguments)
        found = model.train()(ids, subnet=tree, **arguments)
        losses = lesson(found.logits, wanted.logits, found.hidden_states, wanted.hidden_states)
    torch.stack(losses).sum().backward()
    model.zero_grad()


def _bench(args: argparse.Namespace) -> None:
    import numpy as np

    engine = _open(args)
    config = engine.config
    subnets = [Subnet.parse(config, args.subnet)] if args.subnet else list(grid(config))
    shape = (args.batch_size, args.length)
    ids = np.random.default_rng(0).integers(1, max(2, config.vocab_size), shape) % config.vocab_size
    print(f"{engine}; batch {args.batch_size}, length {args.length}, median of {args.rounds} calls")
    if args.profile:
        for subnet in subnets[:1]:
            print(profile(engine, subnet, ids, args.rounds))
        return
    seconds = _times(engine, subnets, ids, args.rounds)
    full = seconds[0]
    for subnet, median in zip(subnets, seconds, strict=True):
        ratio = "" if args.subnet else f"  x{full / median:.2f}"
        print(f"  {subnet}  {1e3 * median:8.2f} ms{ratio}")


def _open(args: argparse.Namespace) -> CpuEngine:
    from dynabert_fast.engine import CpuEngine, load
    from dynabert_fast.errors import InputError

    if Path(args.model).is_file():
        if args.dtype:
            raise InputError("a packed file has its type already; leave --dtype out")
        return load(args.model, args.threads)
    shared.quiet_libraries()
    from dynabert_fast.training.pipeline import load_model

    engine = load_model(args.model).pack(args.dtype or "int8", args.threads)
    assert isinstance(engine, CpuEngine)  # the model is on the CPU
    return engine


def _times(engine: CpuEngine, subnets: list[Subnet], ids: np.ndarray, rounds: int) -> list[float]:
    """Median seconds of each sub-network; one round runs each of them once."""
    import numpy as np

    times = np.empty((rounds, len(subnets)))
    for done in range(-3, rounds):
        for i, subnet in enumerate(subnets):
            start = time.perf_counter()
            engine(ids, subnet=subnet)
            if done >= 0:
                times[done, i] = time.perf_counter() - start
    return list(np.median(times, axis=0))


def profile(engine: CpuEngine, subnet: Subnet, ids: np.ndarray, rounds: int) -> str:
    """A table of the stages of one sub-network.

    The peak is the matrix kernel's own, measured now on data in the first-level cache, times the
    engine's threads. Operations are multiplications and additions, of the linear maps and of
    attention.
    """
    import numpy as np

    from dynabert_fast.engine import measure_peak

    config = engine.config
    samples: dict[str, list[float]] = {}
    whole = []
    for done in range(-3, rounds):
        start = time.perf_counter()
        seconds = engine(ids, subnet=subnet, profile=True).seconds
        if done >= 0:
            whole.append(time.perf_counter() - start)
            for name, value in seconds.items():
                samples.setdefault(name, []).append(value)
    stages = {name: float(np.median(values)) for name, values in samples.items()}
    dtype = config.dtype
    peak = measure_peak(dtype, engine.isa) * engine.threads
    attention_peak = (
        measure_peak("fp32" if dtype == "fp32" else "bf16", engine.isa) * engine.threads
    )
    tokens, length, hidden = ids.size, ids.shape[1], config.hidden_size
    heads = sum(subnet.heads) * config.head_size
    weights = {
        "qkv": 3 * heads * hidden,
        "out": heads * hidden,
        "up": sum(subnet.neurons) * hidden,
        "down": sum(subnet.neurons) * hidden,
    }
    lines = [f"{subnet}: {1e3 * float(np.median(whole)):.2f} ms a call"]
    lines.append(f"  {'stage':<10}{'ms':>9}{'of call':>9}{'GOP/s':>9}{'of peak':>9}{'MB':>9}")
    total = sum(stages.values())

    def row(name: str, seconds: float, operations: float, bound: float, size: float) -> str:
        line = f"  {name:<10}{1e3 * seconds:9.3f}{seconds / total:9.1%}"
        if operations and seconds:
            rate = operations / seconds
            line += f"{rate / 1e9:9.0f}{rate / bound:9.1%}"
            line += f"{size / 1e6:9.2f}" if size else ""
        return line

    for name, seconds in stages.items():
        if name == "attention":
            lines.append(row(name, seconds, 4 * tokens * length * heads, attention_peak, 0))
        else:
            count = weights.get(name, 0)
            size = count * _ELEMENT_BYTES[dtype]
            lines.append(row(name, seconds, 2 * tokens * count, peak, size))
    linear = sum(stages[name] for name in weights)
    operations = 2 * tokens * sum(weights.values())
    size = sum(weights.values()) * _ELEMENT_BYTES[dtype]
    lines.append(row("linear", linear, operations, peak, size))
    lines.append(f"  peak: {peak / 1e9:.0f} GOP/s {dtype}, {engine.threads} threads ({engine.isa})")
    return "\n".join(lines)
