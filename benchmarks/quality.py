"""Accuracy of every sub-network on real tasks, and what rewiring and distillation are worth.

    python benchmarks/quality.py --task trec --data-dir DATA --model MODEL --work WORK

fine-tunes a teacher, then compares, over the same grid and development set:

    sliced                      prefixes of the teacher, not trained
    sliced, rewired             prefixes of the rewired teacher, not trained
    widths distilled, unsorted  stage "width" from the teacher as it is
    widths distilled            stage "width" from the rewired teacher
    distilled                   stage "depth" from the latter: the whole pipeline

Every part is resumable: run it again after an interruption. Results go to
`benchmarks/results/quality/<task>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dynabert_fast.cli.arguments import quiet_libraries
from dynabert_fast.data import load_glue
from dynabert_fast.evaluation import environment, make_batches, primary_metric, score_grid
from dynabert_fast.subnet import DEPTHS, WIDTHS, grid
from dynabert_fast.training import TrainingOptions, run_stage, stages
from dynabert_fast.training.pipeline import (
    finetune,
    load_model,
    load_tokenizer,
    rewire_checkpoint,
    stage_data,
)

RESULTS = Path(__file__).parent / "results" / "quality"

#: Title of each comparison: the folder of its model and the depths that it was made for.
COMPARED = {
    "sliced": ("teacher", DEPTHS),
    "sliced, rewired": ("rewired", DEPTHS),
    "widths distilled, unsorted": ("width-unsorted", (1.0,)),
    "widths distilled": ("width", (1.0,)),
    "distilled": ("dynabert", DEPTHS),
}


def main() -> None:
    """Run what is missing, then write the tables."""
    args = _arguments()
    quiet_libraries()
    data = load_glue(args.task, args.data_dir, max_train=args.max_train)
    encoded = stage_data(data, load_tokenizer(args.model), args.max_length)
    work = Path(args.work) / data.task.name
    work.mkdir(parents=True, exist_ok=True)
    distil = _options(args, args.epochs)
    teacher, rewired = work / "teacher", work / "rewired"
    finetune(args.model, data, encoded, teacher, _options(args, args.finetune_epochs), resume=True)
    if not rewired.is_dir():
        rewire_checkpoint(teacher, encoded, rewired)
    for name, student, taught_by, folder in (
        ("width", rewired, teacher, "width"),
        ("depth", work / "width", work / "width", "dynabert"),
        ("width", teacher, teacher, "width-unsorted"),
    ):
        if not (work / folder).is_dir():
            models = load_model(student), load_model(taught_by)
            run_stage(
                stages()[name], models[0], encoded, work / folder, distil, models[1], resume=True
            )
    _write(args, data, encoded, work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", required=True, help="pretrained encoder")
    parser.add_argument("--model-name", default="all-MiniLM-L6-v2")
    parser.add_argument("--work", required=True, help="folder for checkpoints")
    parser.add_argument("--max-train", type=int)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--finetune-epochs", type=float, default=3)
    parser.add_argument("--epochs", type=float, default=3, help="of both distillation stages")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def _options(args: argparse.Namespace, epochs: float) -> TrainingOptions:
    return TrainingOptions(
        learning_rate=args.learning_rate,
        epochs=epochs,
        precision=args.precision,
        seed=args.seed,
        save_every=100,
    )


def _write(args: argparse.Namespace, data: Any, encoded: Any, work: Path) -> None:
    batches = make_batches(encoded.dev, encoded.collator, 64)
    grids: dict[str, dict[str, float]] = {}
    for title, (folder, depths) in COMPARED.items():
        model = load_model(work / folder)
        subnets = grid(model.config, WIDTHS, depths)
        scores = score_grid(model, batches, subnets, encoded.metric)
        grids[title] = {name: next(iter(values.values())) for name, values in scores.items()}
    arguments = {k: v for k, v in vars(args).items() if k not in ("data_dir", "model", "work")}
    result = {
        "task": data.task.name,
        "metric": primary_metric(encoded.metric),
        "train_examples": len(data.train),
        "dev_examples": len(data.dev),
        "arguments": arguments,
        "environment": environment(model),
        "grids": grids,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{data.task.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{data.task.name}.md").write_text(_markdown(result))
    print(_markdown(result))


def _markdown(result: dict[str, Any]) -> str:
    """One table for each way of making sub-networks: rows are widths, columns depths."""
    given = result["arguments"]
    lines = [
        f"# {result['task']}: {result['metric']} x 100, {result['dev_examples']} examples",
        "",
        f"{given['model_name']}, {result['train_examples']} training examples, "
        f"{given['finetune_epochs']:g} epochs of fine-tuning, {given['epochs']:g} of each "
        f"distillation stage, rate {given['learning_rate']:g}, batch 32, at most "
        f"{given['max_length']} tokens, {given['precision']} training, seed {given['seed']}.",
    ]
    for title, cells in result["grids"].items():
        lines += ["", f"**{title}**", ""]
        depths = COMPARED[title][1]
        lines.append("| width \\ depth | " + " | ".join(map(str, depths)) + " |")
        lines.append("|---" * (len(depths) + 1) + "|")
        for width in WIDTHS:
            row = [f"{100 * cells[f'w{width:.2f}-d{depth:.2f}']:.1f}" for depth in depths]
            lines.append(f"| {width} | " + " | ".join(row) + " |")
    env = result["environment"]
    lines += ["", f"{env['device']}, torch {env['torch']}, transformers {env['transformers']}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
