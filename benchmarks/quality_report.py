"""`docs/quality.md`, from what `quality.py` found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynabert_fast.evaluation.grid import write_aside
from dynabert_fast.subnet import DEPTHS, WIDTHS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quality.md"

#: Table 1 of the paper, BERT-base, GLUE development sets: the teacher, then depths 1, .75, .5 of
#: each width.
PAPER: dict[str, tuple[float, dict[float, tuple[float, ...]]]] = {
    "sst2": (
        92.9,
        {
            1.0: (93.2, 93.3, 92.7),
            0.75: (93.0, 93.1, 92.8),
            0.5: (93.3, 92.7, 91.6),
            0.25: (92.8, 92.0, 92.0),
        },
    ),
    "cola": (
        58.1,
        {
            1.0: (59.7, 59.1, 54.6),
            0.75: (60.8, 59.6, 53.2),
            0.5: (58.4, 56.8, 48.5),
            0.25: (50.9, 51.6, 43.7),
        },
    ),
    "stsb": (
        89.8,
        {
            1.0: (90.1, 89.5, 88.6),
            0.75: (90.0, 89.4, 88.5),
            0.5: (89.8, 89.2, 88.2),
            0.25: (89.2, 88.3, 87.0),
        },
    ),
    "rte": (
        71.1,
        {
            1.0: (72.2, 71.8, 66.1),
            0.75: (71.8, 73.3, 65.7),
            0.5: (72.2, 72.2, 67.9),
            0.25: (68.6, 68.6, 63.2),
        },
    ),
}

TITLES = {"trec": "TREC", "cola": "CoLA", "stsb": "STS-B", "rte": "RTE", "sst2": "SST-2"}
METRICS = {"matthews": "Matthews", "spearman": "Spearman", "accuracy": "accuracy"}
NONE = "–"

Record = Mapping[str, Any]


def write(
    results: Path, recipes: Mapping[str, str], main: str, default: str, page: Path = PAGE
) -> None:
    """Write the page.

    Args:
        results: Folder of `<task>.json`.
        recipes: Title of each recipe, in order.
        main: The recipe that the others are compared with.
        default: The recipe that the package trains by.
        page: The file to write.
    """
    files = (results / f"{task}.json" for task in TITLES)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    tasks = [task for task in found if of_recipe(task, main)]
    head = _head(tasks, recipes, main, default)
    write_aside(page, "\n".join([*head, *_sections(tasks, recipes, main, default)]))


def of_recipe(task: Record, recipe: str) -> list[Record]:
    """The task's runs of a recipe, by seed."""
    return [run for run in task.get("runs", ()) if run["recipe"] == recipe]


def paper_drops(task: str) -> dict[str, float]:
    """Teacher minus cell in the paper, in points, by the cell's name; empty if not in the paper."""
    if task not in PAPER:
        return {}
    teacher, rows = PAPER[task]
    return {
        _name(width, depth): teacher - rows[width][i]
        for width in WIDTHS
        for i, depth in enumerate(DEPTHS)
    }


def drops(runs: Iterable[Record]) -> dict[str, list[float]]:
    """Teacher minus cell in points: for each cell one number a seed, from that seed's teacher."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, score in run["cells"].items():
            found.setdefault(name, []).append(100 * (run["teacher"] - score))
    return found


def mean_cell(run: Record) -> float:
    """Mean score of the cells, in points."""
    return 100 * statistics.fmean(run["cells"].values())


def worst_cell(run: Record) -> float:
    """Lowest score of the cells, in points."""
    return 100 * min(run["cells"].values())


def differences(
    runs: Sequence[Record], base: Sequence[Record], of: Callable[[Record], float]
) -> list[float]:
    """How much more one recipe's runs have, on the seeds that both have."""
    values = {run["seed"]: of(run) for run in base}
    return [of(run) - values[run["seed"]] for run in runs if run["seed"] in values]


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """`56.1 ± 0.4`: mean and sample standard deviation; one value has no spread."""
    if not values:
        return NONE
    mean = _number(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _head(
    tasks: Sequence[Record], recipes: Mapping[str, str], main: str, default: str
) -> list[str]:
    lines = [
        "# Accuracy of every sub-network",
        "",
        f"Scores x 100 on development sets. `{main}` is {recipes[main]} (its stages and losses; "
        "at another rate, for fewer epochs, and without augmented data, see each task), "
        f"`{default}` the default of `fit` and `train-depth`, `--recipe small-batches`, at the "
        "same rate and epochs. "
        "Mean and sample standard deviation over seeds (data order, dropout, new head). "
        "*Drop*: a cell's distance "
        "from the teacher of the same seed; below zero it is better than its teacher. Published "
        "drops are those of the paper's Table 1 (BERT-base, 12 layers, augmented data): larger "
        "models, so compare drops, not scores, and mind that these have less to spare: the "
        "smallest cell here is 3 layers of 3 heads of size 32. TREC is not in the paper.",
        "",
        "    python benchmarks/quality.py --data-dir DATA --model MODEL --model-name NAME "
        "--work WORK",
        "    python benchmarks/quality.py --report",
        "",
        "run what is missing (all of it, with another folder for `--results`: days; `--tasks`, "
        "`--recipes`, `--seeds` and `--time-limit` choose), and write this page. "
        "All numbers, settings, times and versions stand in "
        "[benchmarks/results/quality/](../benchmarks/results/quality/). Recipes that augment need "
        "`--masked-lm`: here what `python benchmarks/masked_lm.py --data-dir DATA --model MODEL "
        "--output mlm` makes of the same encoder and the tasks' training texts.",
        "",
        "The development set also sorts heads and neurons, and chooses the best epoch of each "
        "stage, as in the paper; that of TREC is its published test set.",
    ]
    if not tasks:
        return [*lines, "", "Nothing was run yet.", ""]
    shown = (default, main) if default != main else (main,)
    rows = []
    for task in tasks:
        runs, theirs = of_recipe(task, main), paper_drops(task["task"])
        found = {recipe: of_recipe(task, recipe) for recipe in shown}
        rows.append(
            [
                TITLES[task["task"]],
                METRICS[task["metric"]],
                " and ".join(str(len(found[recipe])) for recipe in shown),
                spread([100 * run["teacher"] for run in runs]),
                *(spread([100 * r["teacher"] - mean_cell(r) for r in found[x]]) for x in shown),
                _number(statistics.fmean(theirs.values())) if theirs else NONE,
                *(_fewer(found[recipe], theirs) for recipe in shown),
            ]
        )
    by = [f"`{recipe}`" for recipe in shown]
    head = ["task", "metric", "seeds", "teacher", *(f"mean drop by {name}" for name in by)]
    head += ["published", *(f"cells that drop less, by {name}" for name in by)]
    return [*lines, "", *_table(head, rows), ""]


def _fewer(runs: Sequence[Record], theirs: Mapping[str, float]) -> str:
    """How many cells drop less than the paper's, on the mean."""
    if not runs or not theirs:
        return NONE
    means = {name: statistics.fmean(values) for name, values in drops(runs).items()}
    return f"{sum(means[name] < theirs[name] for name in theirs)} of {len(theirs)}"


def _sections(
    tasks: Sequence[Record], recipes: Mapping[str, str], main: str, default: str
) -> Iterable[str]:
    changed = [r for r in recipes if r != main and any(of_recipe(task, r) for task in tasks)]
    if changed:
        yield from _overview(tasks, {recipe: recipes[recipe] for recipe in changed}, main)
    for task in tasks:
        yield from _task(task, recipes, main, default)


def _overview(tasks: Sequence[Record], changed: Mapping[str, str], main: str) -> Iterable[str]:
    yield from ("## What each part is worth", "")
    yield from (f"Mean of the 12 cells, less that of `{main}` with the same seeds.", "")
    rows = []
    for recipe, title in changed.items():
        cells = [
            spread(differences(of_recipe(task, recipe), of_recipe(task, main), mean_cell), "+.1f")
            for task in tasks
        ]
        rows.append([f"`{recipe}`", title, *cells])
    yield from _table(["recipe", "", *(TITLES[task["task"]] for task in tasks)], rows)
    yield ""


def _task(task: Record, recipes: Mapping[str, str], main: str, default: str) -> Iterable[str]:
    name, runs = task["task"], of_recipe(task, main)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    yield from (f"## {TITLES[name]}", "")
    yield (
        f"{METRICS[task['metric']]}, {task['train_examples']:,} training and "
        f"{task['dev_examples']:,} development examples, {task['model']}, seeds {seeds}. "
        f"{_settings(runs[0])}"
    )
    teacher = spread([100 * run["teacher"] for run in runs])
    yield from ("", f"Teacher: {teacher}.", "")
    theirs = paper_drops(name)
    gains = {  # a recipe that trains a model for each cell is a measure, not a choice
        recipe: gain
        for recipe in recipes
        if (gain := differences(of_recipe(task, recipe), runs, mean_cell))
        and all(run.get("models", 1) == 1 for run in of_recipe(task, recipe))
    }
    best = max(gains, key=lambda recipe: statistics.fmean(gains[recipe]))
    first = default if of_recipe(task, default) else main
    yield from (*_scores(of_recipe(task, first), first), "")
    for recipe in dict.fromkeys((first, main, best)):
        yield from (*_drops(of_recipe(task, recipe), theirs, recipe), "")
    rows = [
        [
            f"`{recipe}`" if recipe != main else f"**`{recipe}`**",
            title,
            ", ".join(str(run["seed"]) for run in found),
            spread([mean_cell(run) for run in found]),
            spread([worst_cell(run) for run in found]),
            spread([100 * run["teacher"] - mean_cell(run) for run in found]),
            NONE if recipe == main else spread(differences(found, runs, mean_cell), "+.1f"),
            NONE if recipe == main else spread(differences(found, runs, worst_cell), "+.1f"),
            spread([_minutes(run) for run in found]),
        ]
        for recipe, title in recipes.items()
        if (found := of_recipe(task, recipe))
    ]
    paper = f" (published: {_number(statistics.fmean(theirs.values()))})" if theirs else ""
    head = ["recipe", "", "seeds", "mean of cells", "worst cell", f"mean drop{paper}"]
    yield from _table([*head, f"mean, to `{main}`", "worst, to it", "minutes"], rows)
    yield from ("", *_baselines(runs), "")
    yield from (_conditions(task), "")


def _by(recipe: str, runs: Sequence[Record]) -> str:
    return f"by `{recipe}`, seeds {', '.join(str(run['seed']) for run in runs)}"


def _scores(runs: Sequence[Record], recipe: str) -> list[str]:
    """Each cell's score."""
    scores = {cell: [100 * run["cells"][cell] for run in runs] for cell in runs[0]["cells"]}
    return _grid(f"score {_by(recipe, runs)}: width \\ depth", lambda cell: spread(scores[cell]))


def _drops(runs: Sequence[Record], theirs: Mapping[str, float], recipe: str) -> list[str]:
    """Each cell's distance from its teacher, beside the paper's."""
    ours = drops(runs)
    corner = f"drop {_by(recipe, runs)}{', here (published)' if theirs else ' (not in the paper)'}"

    def drop(cell: str) -> str:
        own = spread(ours[cell])
        return f"{own} ({_number(theirs[cell])})" if theirs else own

    return _grid(f"{corner}: width \\ depth", drop)


def _baselines(runs: Sequence[Record]) -> list[str]:
    """Without distillation: the teacher cut to size; and what the stage of widths alone gives."""
    kept = [run for run in runs if "baselines" in run]
    if not kept:
        return []
    rows = []
    for title in kept[0]["baselines"]:
        row = [title]
        for depth in DEPTHS:
            for width in WIDTHS:
                cell = _name(width, depth)
                found = [run["baselines"][title] for run in kept]
                values = [100 * scores[cell] for scores in found if cell in scores]
                row.append(_number(statistics.fmean(values)) if values else NONE)
        rows.append(row)
    names = [f"{width:g}, {depth:g}" for depth in DEPTHS for width in WIDTHS]
    return [
        "Before distillation (width, depth): the teacher cut to size, the rewired teacher cut to "
        "size, and the model after its stage of widths.",
        "",
        *_table(["", *names], rows),
    ]


def _settings(run: Record) -> str:
    stages = {
        stage: settings.get("training", settings)
        for stage, settings in run["settings"].items()
        if stage != "rewire"
    }
    teacher, *others = (stages[name] for name in stages if name != "start")
    base = others[0] if others else teacher
    epochs = ", ".join(
        f"{_stage(name)} {s['epochs']:g}" for name, s in stages.items() if name != "start"
    )
    text = f"Epochs: {epochs}; {_steps(base)}, at most {base['max_length']} tokens, "
    text += f"{base['precision']}."
    if _steps(teacher) != _steps(base):
        text += f" The teacher: {_steps(teacher)}."
    if "start" in stages:
        text += f" It starts from a teacher of {TITLES[stages['start']['task']]}."
    return text


def _steps(settings: Mapping[str, Any]) -> str:
    warmup = settings.get("warmup", 0)
    return (
        f"rate {settings['learning_rate']:g}{f' with {warmup:.0%} of warm-up' if warmup else ''}, "
        f"batch {settings['batch_size']}"
    )


def _stage(name: str) -> str:
    return {"finetune": "teacher", "width": "widths", "depth": "depths"}.get(name, name)


def _conditions(task: Record) -> str:
    kinds = {
        f"{env['device']}, {env['threads']} CPU threads, torch {env['torch']}, transformers "
        f"{env['transformers']}, Python {env['python']}, dynabert_fast {env['dynabert_fast']}"
        for env in (run["environment"] for run in task["runs"])
    }
    commits = list(dict.fromkeys(run["commit"] for run in task["runs"]))
    return f"On {'; '.join(sorted(kinds))}. Commits: {', '.join(commits)}."


def _minutes(run: Record) -> float:
    """Everything that the run needed, also what it shared with others."""
    return sum(run["seconds"].values()) / 60


def _grid(corner: str, cell: Callable[[str], str]) -> list[str]:
    """Rows are widths and columns depths, as in Table 1 of the paper."""
    rows = [[f"{width:g}", *(cell(_name(width, depth)) for depth in DEPTHS)] for width in WIDTHS]
    return _table([corner, *(f"{depth:g}" for depth in DEPTHS)], rows)


def _name(width: float, depth: float) -> str:
    return f"w{width:.2f}-d{depth:.2f}"


def _number(value: float, form: str = ".1f") -> str:
    text = format(value, form)
    return text.replace("-", "−") if float(text) else format(0.0, form).lstrip("+")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
