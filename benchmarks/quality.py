"""Accuracy of every sub-network on real tasks, for the paper's recipe and changes of it.

    python benchmarks/quality.py --data-dir DATA --model MODEL --model-name NAME --work WORK
    python benchmarks/quality.py --report

The first runs what is missing in `benchmarks/results/quality/<task>.json`, one (task, seed, recipe)
after the other, and writes that file after each. It may be killed at any time: run it again to go
on, also from the middle of a stage. The second writes `docs/quality.md` from these files.

A stage's folder in WORK is named after everything that decides its weights, so recipes share what
they have in common: a teacher for each (task, seed), its rewired copy, often the stage of widths.
A result whose settings are no longer those below is missing, and is replaced by a run of today's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import quality_report
import torch

from dynabert_fast.cli.arguments import COUNT, POSITIVE, quiet_libraries
from dynabert_fast.data import TaskData, load_glue
from dynabert_fast.data.augmentation import Augmentation
from dynabert_fast.errors import InputError, SaveError, TrainingError
from dynabert_fast.evaluation import environment, make_batches, primary_metric, score_grid
from dynabert_fast.evaluation.grid import Batches, write_aside
from dynabert_fast.files import checkpoints_folder, whole_folder
from dynabert_fast.models import DynaBertForSequenceClassification
from dynabert_fast.subnet import DEPTHS, WIDTHS, Subnet, grid
from dynabert_fast.training import Distillation, StageData, TrainingOptions, run_stage, stages
from dynabert_fast.training.pipeline import (
    augmented,
    finetune,
    load_model,
    load_tokenizer,
    rewire_checkpoint,
    stage_data,
)
from dynabert_fast.training.schedules import Schedule
from dynabert_fast.training.stages import RECIPES as PACKAGE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality"

# --- what is run ----------------------------------------------------------------------------------

#: Epochs of each stage by task, cheapest task first. The paper's 3 epochs are over augmented data,
#: up to 31 times as many sentences.
EPOCHS: dict[str, dict[str, float]] = {
    "trec": {"finetune": 3, "width": 1, "depth": 2, "final": 1},
    "cola": {"finetune": 3, "width": 1, "depth": 2, "final": 1},
    "stsb": {"finetune": 3, "width": 1, "depth": 1, "final": 1},
    "rte": {"finetune": 5, "width": 1, "depth": 2, "final": 1},
    "sst2": {"finetune": 2, "width": 1, "depth": 1, "final": 1},
}

#: Tasks that take hours; their ablations come last.
LARGE = ("sst2",)

#: Of every stage. The rest is the paper's: linear decay without warm-up, no weight decay, gradients
#: clipped at 1. Its rate of 2e-5 is for BERT-base and some ten times as many steps.
TRAINING: dict[str, Any] = {"learning_rate": 1e-4, "batch_size": 32, "precision": "bf16"}
MAX_LENGTH = 128

#: Of a task's teacher alone.
TEACHER: dict[str, dict[str, Any]] = {
    "rte": {"learning_rate": 5e-5, "batch_size": 16, "warmup": 0.1},
}

#: Teachers that start from another task's: 2,490 pairs alone do not teach this encoder, made for
#: single sentences, to compare two. (RoBERTa's teachers of RTE start from MNLI, also of STS-B.)
START = {"rte": "stsb"}

#: Steps between checkpoints: what a killed run loses at most, one or two minutes of it.
SAVE_EVERY = 50

#: The paper's losses, by stage; None learns from labels.
DISTILLATION: dict[str, dict[str, Any] | None] = {
    "width": {"logits": 1.0, "hidden": 0.1, "teacher_width": "full"},
    "depth": {"logits": 1.0, "hidden": 1.0, "teacher_width": "same"},
    "final": None,
}


@dataclass(frozen=True)
class Recipe:
    """The paper's recipe with changes.

    Attributes:
        title: In tables.
        sort: Rewire first.
        stages: What is trained, in order, after the teacher.
        distillation: Changes of `DISTILLATION` by stage; `None` learns from labels.
        training: Changes of `TrainingOptions` by stage.
        epochs: Times the task's epochs, by stage; default 1.
        copies: Of each training example with words replaced, by stage; default none.
        students: Of a task in `START`: teacher and students begin as the other task's students by
            this recipe, sorted already, instead of as its teacher.
        alone: The last stage is trained anew for each sub-network, without the others.
    """

    title: str
    sort: bool = True
    stages: tuple[str, ...] = ("width", "depth")
    distillation: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epochs: Mapping[str, float] = field(default_factory=dict)
    copies: Mapping[str, int] = field(default_factory=dict)
    students: str | None = None
    alone: bool = False

    @property
    def unsupported(self) -> list[str]:
        """Options that it names and this version does not have."""
        names = {
            f.name for kind in (Distillation, TrainingOptions) for f in dataclasses.fields(kind)
        }
        changes = (*self.training.values(), *self.distillation.values())
        return sorted({name for given in changes for name in given or ()} - names)


def _both(changes: Any) -> dict[str, Any]:
    return {"width": changes, "depth": changes}


# The package's recipe, at this page's rate.
_SMALL = {
    "batch_size": TRAINING["batch_size"] // PACKAGE["small-batches"].steps,
    "learning_rate": PACKAGE["small-batches"].rate * TRAINING["learning_rate"],
    "warmup": PACKAGE["small-batches"].warmup,
}
_OUTPUTS = {"depth": {"hidden_target": PACKAGE["small-batches"].hidden_target}}
_LABELS = {"depth": {**_OUTPUTS["depth"], "labels": PACKAGE["small-batches"].labels}}
_OF_SMALL = Recipe("", distillation=_OUTPUTS, training={"depth": _SMALL})
_OF_LABELS = dataclasses.replace(_OF_SMALL, distillation=_LABELS)

MAIN = "paper"
DEFAULT = "small-labels"  # of the command, at this page's rate and epochs
RECIPES: dict[str, Recipe] = {
    MAIN: Recipe("the paper's recipe"),
    "unsorted": Recipe("no rewiring", sort=False),
    "labels": Recipe("labels only, no distillation", distillation=_both(None)),
    "logits": Recipe("no loss on hidden states", distillation=_both({"hidden": 0.0})),
    "full-teacher": Recipe(
        "teacher of stage `depth` at full width", distillation={"depth": {"teacher_width": "full"}}
    ),
    "sandwich": Recipe(
        "stage `depth` by sandwich: largest, smallest and 2 others a step",
        training={"depth": {"schedule": {"kind": "sandwich", "count": 2}}},
    ),
    "rate": Recipe(
        "stage `depth` at three times the rate, with warm-up",
        training={"depth": {"learning_rate": 3e-4, "warmup": 0.1}},
    ),
    "rate-longer": Recipe(
        "the same, and twice the epochs",
        training={"depth": {"learning_rate": 3e-4, "warmup": 0.1}},
        epochs=_both(2.0),
    ),
    "small": dataclasses.replace(
        _OF_SMALL,
        title="stage `depth` in batches of 8 at twice the rate, with warm-up; "
        "hidden states learn from outputs",
    ),
    "small-input": dataclasses.replace(
        _OF_SMALL,
        title="the same, but hidden states learn from inputs, as the paper's",
        distillation={},
    ),
    "small-longer": dataclasses.replace(
        _OF_SMALL, title="`small`, with stage `depth` four times as long", epochs={"depth": 4.0}
    ),
    "augmented": dataclasses.replace(
        _OF_SMALL,
        title="`small`, with 3 copies of each example in stage `depth`: as many steps as "
        "`small-longer`",
        copies={"depth": 3},
    ),
    "elastic-start": dataclasses.replace(
        _OF_SMALL,
        title="`small`, begun with another task's students by `small-longer` instead of its "
        "teacher",
        sort=False,
        students="small-longer",
    ),
    "small-labels": dataclasses.replace(
        _OF_LABELS, title="`small`, and a loss on labels in stage `depth`"
    ),
    "small-assistant": dataclasses.replace(
        _OF_LABELS,
        title="`small-labels`, and half depths learn from three quarters' logits too",
        distillation={"depth": {**_LABELS["depth"], "assistant": 1.0}},
    ),
    "labels-longer": dataclasses.replace(
        _OF_LABELS,
        title="`small-labels`, with stage `depth` four times as long",
        epochs={"depth": 4.0},
    ),
    "alone": dataclasses.replace(
        _OF_LABELS,
        title="`small-labels`, with stage `depth` for each sub-network alone: 12 times",
        alone=True,
    ),
    "longer": Recipe("twice the epochs", epochs=_both(2.0)),
    "direct": Recipe(
        "straight to the grid, no stage `width`, twice the epochs",
        stages=("depth",),
        distillation={"depth": {"teacher_width": "full"}},
        epochs={"depth": 2.0},
    ),
    "narrow": Recipe("losses weighted by 1 / width", distillation=_both({"width_exponent": -1.0})),
    "final": Recipe("and final fine-tuning on labels", stages=("width", "depth", "final")),
}


@dataclass(frozen=True)
class Part:
    """One folder: how it is made, and from which others.

    Attributes:
        task: Whose examples it is made with.
        stage: `start` (another task's teacher), `finetune`, `rewire`, `augment` (texts, not
            weights) or a stage of training.
        settings: What decides its weights beside its parents, JSON.
        student: Whose weights it starts with; `None`: the pretrained encoder's.
        teacher: Whom it learns from; `None`: labels.
        texts: What it learns from; `None`: the task's.
    """

    task: str
    stage: str
    settings: dict[str, Any]
    student: Part | None = None
    teacher: Part | None = None
    texts: Part | None = None

    @cached_property
    def folder(self) -> str:
        """Its name: the same settings and parents give the same."""
        parents = [part and part.folder for part in (self.student, self.teacher)]
        parents += [self.texts.folder] if self.texts else []
        text = json.dumps([self.stage, self.settings, *parents], sort_keys=True)
        return f"{self.stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Run:
    """One recipe on one task with one seed."""

    task: str
    seed: int
    recipe: str

    @property
    def possible(self) -> bool:
        """Whether the recipe has what it needs on this task."""
        return self.task in START or not RECIPES[self.recipe].students

    def parts(self, model_name: str, masked_lm: str = "") -> list[Part]:
        """Everything to make, in order: what the teacher starts from, teacher, rewired, stages.

        Args:
            model_name: Of the pretrained encoder.
            masked_lm: Of the model that proposes words; only recipes with copies have one.
        """
        recipe, epochs = RECIPES[self.recipe], EPOCHS[self.task]
        base = TRAINING | {"seed": self.seed, "max_length": MAX_LENGTH}

        def taught(task: str) -> dict[str, Any]:
            training = base | TEACHER.get(task, {}) | {"epochs": float(EPOCHS[task]["finetune"])}
            return {"task": task, "model": model_name, **training}

        found: list[Part] = []
        if recipe.students:
            found += Run(START[self.task], self.seed, recipe.students).parts(model_name, masked_lm)
        elif other := START.get(self.task):
            found.append(Part(other, "start", taught(other)))
        teacher = Part(self.task, "finetune", taught(self.task), found[-1] if found else None)
        found.append(teacher)
        if recipe.sort:
            found.append(Part(self.task, "rewire", {"accumulation": "per_batch"}, teacher))
        taught_by = teacher
        for stage in recipe.stages:
            loss, changes = DISTILLATION[stage], recipe.distillation.get(stage, {})
            distilled = None if loss is None or changes is None else {**loss, **changes}
            training = {**base, "epochs": epochs[stage] * recipe.epochs.get(stage, 1.0)}
            training |= recipe.training.get(stage, {})
            settings = {"training": training, "distillation": distilled}
            texts = None
            if copies := recipe.copies.get(stage):
                how = {"masked_lm": masked_lm, "copies": copies, "seed": 0}
                texts = Part(self.task, "augment", how)
                found.insert(0, texts)
            student, teacher_ = found[-1], taught_by if distilled else None
            each: list[dict[str, Any]] = [settings]
            if recipe.alone and stage == recipe.stages[-1]:
                each = [settings | {"widths": [w], "depths": [d]} for d in DEPTHS for w in WIDTHS]
            found += [Part(self.task, stage, own, student, teacher_, texts) for own in each]
            taught_by = found[-1]
        return found


def plan(tasks: Sequence[str], seeds: int, recipes: Sequence[str]) -> list[Run]:
    """Every run, the cheapest that say most first.

    The main recipe on every small task with one seed, then with the others; changes of it on small
    tasks; then the same of large tasks.
    """

    def rank(run: Run) -> tuple[int, ...]:
        main = run.recipe == MAIN
        phase = (run.seed > 1) if main else 2
        order = (list(RECIPES).index(run.recipe), list(EPOCHS).index(run.task))
        return (run.task in LARGE, phase, run.seed, *order)

    runs = [Run(t, s, r) for t in tasks for s in range(1, seeds + 1) for r in recipes]
    return sorted((run for run in runs if run.possible), key=rank)


# --- running it -----------------------------------------------------------------------------------


class Session:
    """One task's data, its folder of weights and its file of results.

    Args:
        args: The command's arguments.
        task: Its name.
    """

    def __init__(self, args: argparse.Namespace, task: str) -> None:
        self.args = args
        self.task = task
        self.work = Path(args.work) / task
        self.file = Path(args.results) / f"{task}.json"

    def parts(self, run: Run) -> list[Part]:
        """What a run makes, with the command's models."""
        masked_lm = self.args.masked_lm
        return run.parts(self.args.model_name, Path(masked_lm).name if masked_lm else "")

    def _task(self, task: str) -> tuple[TaskData, StageData]:
        if task == self.task:
            return self.data, self.encoded
        data = load_glue(task, self.args.data_dir)
        return data, stage_data(data, load_tokenizer(self.args.model), MAX_LENGTH)

    @cached_property
    def data(self) -> TaskData:
        return load_glue(self.task, self.args.data_dir)

    @cached_property
    def encoded(self) -> StageData:
        return stage_data(self.data, load_tokenizer(self.args.model), MAX_LENGTH)

    @cached_property
    def dev(self) -> Batches:
        return make_batches(self.encoded.dev, self.encoded.collator, 64)

    def records(self) -> list[dict[str, Any]]:
        """What was found so far."""
        return load_results(self.file).get("runs", [])

    def missing(self, run: Run) -> bool:
        """Whether there is no result of this run with today's settings."""
        wanted = (run.recipe, run.seed, self.parts(run)[-1].folder)
        found = ((r["recipe"], r["seed"], r["weights"]) for r in self.records())
        return wanted not in found

    def run(self, run: Run) -> dict[str, Any]:
        """Make what is not there, evaluate, write the results, delete what nobody needs."""
        parts = self.parts(run)
        for part in parts:
            self._make(part, run.seed)
        record = self._evaluate(run, parts)
        self._write(record)
        self._clean(run.seed)
        return record

    def _make(self, part: Part, seed: int) -> None:
        folder = self.work / part.folder
        if folder.is_dir():  # it appeared when it was whole; what its run left may be there
            shutil.rmtree(checkpoints_folder(folder), ignore_errors=True)
            return
        print(f"-- {folder}", flush=True)
        self.work.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        try:
            if part.stage == "rewire":
                assert part.student is not None
                student = self.work / part.student.folder
                rewire_checkpoint(student, self._task(part.task)[1], folder, progress=False)
            elif part.stage == "augment":
                with whole_folder(folder) as aside:
                    self._augmented(part, aside)
            elif part.stage in ("start", "finetune"):
                source = self.work / part.student.folder if part.student else self.args.model
                data, encoded = self._task(part.task)
                finetune(source, data, encoded, folder, _options(part.settings), True, False)
            else:
                self._train(part, folder)
        finally:  # of an interrupted stage too: its next session adds its own
            self._count(part.folder, time.perf_counter() - start)

    def _augmented(self, part: Part, folder: Path) -> StageData:
        options = Augmentation(copies=part.settings["copies"], seed=part.settings["seed"])
        file, masked_lm = folder / "examples.json", self.args.masked_lm
        return augmented(
            self.data.train, self.encoded, masked_lm, options, MAX_LENGTH, file, progress=False
        )

    def _train(self, part: Part, folder: Path) -> None:
        assert part.student is not None
        loss = part.settings["distillation"]
        of_grid = stages(*_grid_of(part))[part.stage]
        stage = dataclasses.replace(of_grid, recipe=None if loss is None else Distillation(**loss))
        run_stage(
            stage,
            load_model(self.work / part.student.folder),
            self._augmented(part.texts, self.work / part.texts.folder)
            if part.texts
            else self._task(part.task)[1],
            folder,
            _options(part.settings["training"]),
            load_model(self.work / part.teacher.folder) if part.teacher else None,
            resume=True,
            progress=False,
        )

    def _evaluate(self, run: Run, parts: list[Part]) -> dict[str, Any]:
        start = time.perf_counter()
        made = {part.stage: part for part in parts}
        teacher = self._load(made["finetune"])
        cells = grid(teacher.config, WIDTHS, DEPTHS)
        last = [p for p in parts if (p.task, p.stage) == (self.task, parts[-1].stage)]
        record: dict[str, Any] = {
            "recipe": run.recipe,
            "seed": run.seed,
            "weights": parts[-1].folder,
            "teacher": next(iter(self._scores(teacher, cells[:1]).values())),
            "cells": {name: x for part in last for name, x in self._cells(part).items()},
            "models": len(last),
        }
        if run.recipe == MAIN:
            sorted_, widths = self._load(made["rewire"]), self._load(made["width"])
            record["baselines"] = {
                "sliced": self._scores(teacher, cells),
                "rewired and sliced": self._scores(sorted_, cells),
                "stage width": self._scores(widths, grid(widths.config, WIDTHS, (1.0,))),
            }
        seconds = self._seconds()
        names = [self._name(part) for part in parts]
        spent = dict.fromkeys(names, 0.0)
        for name, part in zip(names, parts, strict=True):
            spent[name] = round(spent[name] + seconds[part.folder], 1)
        record["seconds"] = spent | {"evaluate": round(time.perf_counter() - start, 1)}
        record["settings"] = {
            name: {k: v for k, v in part.settings.items() if k not in ("widths", "depths")}
            for name, part in zip(names, parts, strict=True)
        }
        return record | {"environment": environment(teacher), "commit": _commit()}

    def _name(self, part: Part) -> str:
        """In results."""
        own = part.task == self.task or part.stage == "start"
        return part.stage if own else f"{part.task} {part.stage}"

    def _load(self, part: Part) -> DynaBertForSequenceClassification:
        return load_model(self.work / part.folder).to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )

    def _cells(self, part: Part) -> dict[str, float]:
        """The scores of what a stage trained."""
        model = self._load(part)
        return self._scores(model, grid(model.config, *_grid_of(part)))

    def _scores(self, model: Any, subnets: Sequence[Subnet]) -> dict[str, float]:
        metric = self.encoded.metric
        scores = score_grid(model, self.dev, subnets, metric, progress=False)
        return {name: values[primary_metric(metric)] for name, values in scores.items()}

    def _write(self, record: dict[str, Any]) -> None:
        identity = record["recipe"], record["seed"]
        runs = [r for r in self.records() if (r["recipe"], r["seed"]) != identity]
        known = [*RECIPES, *(r["recipe"] for r in runs)]  # a recipe may be gone by now
        runs = sorted([*runs, record], key=lambda r: (known.index(r["recipe"]), r["seed"]))
        result = {
            "task": self.task,
            "metric": primary_metric(self.encoded.metric),
            "model": self.args.model_name,
            "train_examples": len(self.data.train),
            "dev_examples": len(self.data.dev),
            "runs": runs,
        }
        write_aside(self.file, json.dumps(result, indent=2) + "\n")

    def _clean(self, seed: int) -> None:
        """Delete this seed's folders that no missing run starts from; teachers and texts stay."""
        every = (Run(self.task, seed, recipe) for recipe in RECIPES)
        runs = {run.recipe: run for run in every if run.possible}
        all_parts = {r: self.parts(run) for r, run in runs.items()}
        kept = ("start", "finetune", "augment")
        needed = {p.folder for parts in all_parts.values() for p in parts if p.stage in kept}
        for recipe, parts in all_parts.items():
            if self.missing(runs[recipe]):
                needed |= {part.folder for part in parts}
        for folder in {part.folder for parts in all_parts.values() for part in parts} - needed:
            shutil.rmtree(self.work / folder, ignore_errors=True)

    def _seconds(self) -> dict[str, float]:
        file = self.work / "seconds.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _count(self, folder: str, seconds: float) -> None:
        known = self._seconds()
        known[folder] = known.get(folder, 0.0) + seconds
        write_aside(self.work / "seconds.json", json.dumps(known, indent=2) + "\n")


def _grid_of(part: Part) -> tuple[Sequence[float], Sequence[float]]:
    """The widths and depths that a stage trains."""
    return part.settings.get("widths", WIDTHS), part.settings.get("depths", DEPTHS)


def _options(settings: dict[str, Any]) -> TrainingOptions:
    names = {f.name for f in dataclasses.fields(TrainingOptions)}
    given = {name: value for name, value in settings.items() if name in names}
    if "schedule" in given:
        given["schedule"] = Schedule(**given["schedule"])
    return TrainingOptions(**given, save_every=SAVE_EVERY)


def load_results(file: Path) -> dict[str, Any]:
    """A file of results, empty if it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", "dynabert_fast", "csrc", __file__)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+changes" * bool(changed)


def run_missing(args: argparse.Namespace) -> None:
    """Run what is missing; a signal or the time limit ends it in good order."""
    recipes = []
    for recipe in args.recipes:
        if absent := RECIPES[recipe].unsupported:
            print(f"skipped: {recipe} needs the option {', '.join(absent)}, not in this version")
        elif RECIPES[recipe].copies and not args.masked_lm:
            print(f"skipped: {recipe} needs --masked-lm")
        else:
            recipes.append(recipe)
    for recipe in recipes:
        if not any(Run(task, 1, recipe).possible for task in args.tasks):
            print(f"skipped: {recipe} needs a task that starts from another: {', '.join(START)}")
    sessions = {task: Session(args, task) for task in args.tasks}
    runs = [r for r in plan(args.tasks, args.seeds, recipes) if sessions[r.task].missing(r)]
    print(f"{len(runs)} runs are missing", flush=True)
    with _Stop(args.time_limit) as stop:
        for number, run in enumerate(runs, start=1):
            where = f"{run.task}, seed {run.seed}, {run.recipe}"
            print(f"== {number} of {len(runs)}: {where}", flush=True)
            try:
                record = sessions[run.task].run(run)
            except TrainingError as error:  # of this run; the others may do better
                print(f"== {where}: {error}", flush=True)
                continue
            cells = record["cells"].values()
            print(
                f"== {where}: teacher {record['teacher']:.4f}, mean of {len(cells)} "
                f"{sum(cells) / len(cells):.4f}, worst {min(cells):.4f}, "
                f"{sum(record['seconds'].values()):.0f} s",
                flush=True,
            )
    if stop.came:
        print("stopped; the same command goes on from here", flush=True)


class _Stop:
    """Leaves the block at the end of the time, at SIGTERM and at Ctrl-C.

    An interrupt within a library may come out of it as any other error (safetensors does so): once
    a stop has come, no error is reported. What was saved is whole, as after a kill.

    Args:
        minutes: The time; `None`: no end.
    """

    SIGNALS = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)

    def __init__(self, minutes: float | None) -> None:
        self.seconds = 60 * (minutes or 0)
        self.came = False

    def _interrupt(self, *_: Any) -> None:
        self.came = True
        raise KeyboardInterrupt

    def __enter__(self) -> _Stop:
        self.before = {number: signal.signal(number, self._interrupt) for number in self.SIGNALS}
        # Once more if it came where Python ignores errors, but not while the first still unwinds.
        signal.setitimer(signal.ITIMER_REAL, self.seconds, 60)
        return self

    def __exit__(self, *_: Any) -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        return self.came


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def names(of: Sequence[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            given = text.split(",")
            if unknown := sorted(set(given) - set(of)):
                allowed = ", ".join(of)
                raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; choose of {allowed}")
            return list(dict.fromkeys(given))

        return read

    parser.add_argument("--report", action="store_true", help="only write docs/quality.md")
    parser.add_argument("--data-dir", help="folder with the tasks' folders")
    parser.add_argument("--model", help="pretrained encoder: folder or hub id")
    parser.add_argument(
        "--model-name", help="of it, in results and for weights in WORK (default its last part)"
    )
    parser.add_argument(
        "--masked-lm", help="for recipes that augment: folder or hub id (`masked_lm.py` makes one)"
    )
    parser.add_argument("--work", help="folder for weights")
    parser.add_argument("--tasks", type=names(list(EPOCHS)), default=list(EPOCHS))
    parser.add_argument("--seeds", type=COUNT, default=3, help="how many, from 1 (default 3)")
    parser.add_argument("--recipes", type=names(list(RECIPES)), default=list(RECIPES))
    parser.add_argument("--time-limit", type=POSITIVE, metavar="MINUTES")
    parser.add_argument("--results", default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    lacking = [
        f"--{n}" for n in ("data-dir", "model", "work") if not vars(args)[n.replace("-", "_")]
    ]
    if lacking and not args.report:
        parser.error(f"give {', '.join(lacking)}, or --report")
    if args.model_name is None and args.model:
        args.model_name = Path(args.model).name
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = _arguments(argv)
    try:
        if args.report:
            titles = {name: recipe.title for name, recipe in RECIPES.items()}
            quality_report.write(Path(args.results), titles, MAIN, DEFAULT)
        else:
            quiet_libraries()
            run_missing(args)
    except (InputError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
