"""Processes killed with SIGKILL and resumed end with the weights of one left in peace."""

from __future__ import annotations

import gc
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dynabert_fast.data import load_files
from dynabert_fast.training import Schedule, TrainingOptions, run_stage, stages, trainer
from dynabert_fast.training.pipeline import load_model, load_tokenizer, stage_data

# 24 texts in batches of 4: steps 1 to 6 and 7 to 12, of two passes each. Checkpoints after 2, 4, 6
# (epoch's end), ...
STEPS, PASSES = 12, 2
OPTIONS = {
    "batch_size": 4, "epochs": 2.0, "save_every": 2, "learning_rate": 1e-3, "subnets_per_pass": 2,
}  # fmt: skip

# Where a process may be killed: just before a call of one of these.
MOMENTS = {
    "step": (trainer.ElasticTrainer, "training_step"),
    "pass": (trainer.ElasticTrainer, "_pass_loss"),
    "evaluation": (trainer.ElasticTrainer, "evaluate"),
    "checkpoint": (trainer.ElasticTrainer, "_save_checkpoint"),
    "weights": (trainer.ElasticTrainer, "save_model"),
    "state": (torch, "save"),
    "flush": (os, "fsync"),
    "rename": (Path, "rename"),
    "deletion": (shutil, "rmtree"),
}


def kill_at(moment: str, call: int) -> None:
    """Have this process killed by the given call of a moment; of "any", every call counts."""
    counter = itertools.count(1)
    for name, (owner, attribute) in MOMENTS.items():
        if moment in (name, "any"):
            setattr(owner, attribute, _deadly(getattr(owner, attribute), counter, call))


def _deadly(function: Any, counter: Iterator[int], call: int) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(counter) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapper


def half_of_a_file(call: int) -> None:
    """Have this process killed in the middle of what the given `torch.save` writes."""
    counter, save = itertools.count(1), torch.save

    def write(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        if next(counter) == call:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = write


def first_epoch_is_best(start: torch.Tensor) -> None:
    """Scores that only the weights decide, and that fall as training goes on."""

    def score_grid(model: Any, batches: Any, subnets: Any, metric: str, **kwargs: Any) -> Any:
        moved = float((model.classifier.weight.detach() - start).norm())
        return {str(subnet): {metric: -moved} for subnet in subnets}

    trainer.score_grid = score_grid


def train(folder: str, output: str, kill: tuple[str, int] | None, **changes: Any) -> None:
    """Stage `depth`, resumed where an earlier process stopped; writes a line for every step."""
    here = Path(folder)
    torch.set_num_threads(1)
    student, tokenizer = load_model(here / "student"), load_tokenizer(here / "student")
    columns = {"text_column": "text", "label_column": "label"}
    data = load_files(here / "train.csv", here / "dev.csv", **columns)
    first_epoch_is_best(student.classifier.weight.detach().clone())
    _log_steps(Path(f"{output}.steps"))
    if kill and kill[0] == "half a file":
        half_of_a_file(kill[1])
    elif kill:
        kill_at(*kill)
    run_stage(
        stages(widths=(1.0, 0.5), depths=(1.0, 0.5))["depth"],
        student,
        stage_data(data, tokenizer, 16),
        output,
        TrainingOptions(**{**OPTIONS, **changes}),
        load_model(here / "teacher"),
        resume=True,
        progress=False,
    )


def _log_steps(log: Path) -> None:
    step = trainer.ElasticTrainer.training_step

    def logged(self: Any, *args: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {self.state.global_step + 1}\n")
        return step(self, *args)

    trainer.ElasticTrainer.training_step = logged


if __name__ == "__job__":
    gc.freeze()  # see conftest.py
    train(**globals()["ARGUMENTS"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_task, make_student, tokenizer):
    """Student, teacher and data on disk."""
    folder = tmp_path_factory.mktemp("resume")
    task = make_task("binary", train=24, dev=6)
    for name, seed in (("student", 0), ("teacher", 1)):
        make_student("binary", seed=seed, num_hidden_layers=2).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, part in (("train", task.train), ("dev", task.dev)):
        lines = [f"{text},{label}" for text, label in zip(part.texts, part.labels, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    return folder


@pytest.fixture(scope="module")
def run(folder, start_job):
    """`run(output, kill, **options)`: train in a process; its exit code and the steps it took."""

    def start(output, kill=None, **options):
        log = Path(f"{output}.steps")
        log.touch()
        arguments = {"folder": str(folder), "output": str(output), "kill": kill, **options}
        job = start_job(__file__, arguments)
        code = job.wait()
        lines = [line.split() for line in log.read_text().splitlines()]
        return code, [int(step) for pid, step in lines if int(pid) == job.process.pid]

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The weights of a run left in peace, as bytes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(output) == (0, list(range(1, STEPS + 1)))
    return (output / "model.safetensors").read_bytes()


def found(output):
    """What there is of a run beside its settings: checkpoints, what is being saved, the output."""
    beside = {path.name for path in output.parent.iterdir()} - {"out.steps", "out.checkpoints"}
    run = Path(f"{output}.checkpoints")
    within = {path.name for path in (run.iterdir() if run.is_dir() else ())}
    return beside | {name for name in within if "settings.json" not in name}


# Where a process is killed; the step that the next one begins with; which checkpoints it finds.
KILLS = {
    "in the first step": (("pass", 2), 1, set()),
    "in a step": (("pass", PASSES * 3 + 2), 3, {"checkpoint-2"}),
    "in the second epoch": (("step", 10), 9, {"checkpoint-6", "checkpoint-8"}),
    "while settings are written": (("flush", 1), 1, set()),
    "while weights are written": (("flush", 2), 1, {".checkpoint-2.saving"}),
    "half through a file": (("half a file", 6), 3, {"checkpoint-2", ".checkpoint-4.saving"}),
    "before a checkpoint has its name": (
        ("rename", 2),
        3,
        {"checkpoint-2", ".checkpoint-4.saving"},
    ),
    "before an old one is deleted": (
        ("deletion", 13), 7, {"checkpoint-2", "checkpoint-4", "checkpoint-6"},
    ),
    "before an epoch's evaluation": (("evaluation", 1), 5, {"checkpoint-2", "checkpoint-4"}),
    "between evaluation and save": (("checkpoint", 3), 5, {"checkpoint-2", "checkpoint-4"}),
    "between two epochs": (("step", 7), 7, {"checkpoint-4", "checkpoint-6"}),
    "before the last save": (
        ("checkpoint", 6), 11, {"checkpoint-6", "checkpoint-8", "checkpoint-10"},
    ),
    "before the output has its name": (
        ("rename", 7), None, {"checkpoint-6", "checkpoint-10", "checkpoint-12", ".out.saving"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "next_step", "left"), KILLS.values(), ids=KILLS.keys())
def test_a_killed_run_ends_with_the_same_weights(run, whole, tmp_path, kill, next_step, left):
    output = tmp_path / "out"
    code, _ = run(output, kill)
    assert code == -signal.SIGKILL
    assert found(output) == left
    code, after = run(output)
    assert code == 0
    assert after == ([] if next_step is None else list(range(next_step, STEPS + 1)))
    assert (output / "model.safetensors").read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.steps"}


@pytest.mark.slow
def test_killed_again_and_again(run, whole, tmp_path):
    """Each process gets a little further than the one before."""
    output, rng = tmp_path / "out", random.Random(0)
    kills = 0
    while not output.exists():
        code, _ = run(output, ("any", rng.randrange(20, 60)))
        kills += code != 0
        assert code in (0, -signal.SIGKILL)
    assert kills >= 2
    assert run(output) == (0, [])  # nothing is left to do
    assert (output / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_ten_times_at_random_steps(run, tmp_path, precision):
    """In a pass of the first, second or third step of each process: one checkpoint at most."""
    options, rng = {"precision": precision, "epochs": 4.0}, random.Random(precision)
    assert run(tmp_path / "whole", **options) == (0, list(range(1, 25)))
    taken = []
    for _ in range(10):
        code, steps = run(tmp_path / "out", ("pass", rng.randint(1, 3 * PASSES)), **options)
        assert code == -signal.SIGKILL
        taken += steps
    code, steps = run(tmp_path / "out", **options)
    assert code == 0
    assert 1 < steps[0] < max(taken) + 1
    assert steps[-1] == 24
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_killed_from_outside(folder, start_job, run, whole, tmp_path):
    """Another process sends the signal, at a time that nobody chose."""
    output, log = tmp_path / "out", tmp_path / "out.steps"
    job = start_job(__file__, {"folder": str(folder), "output": str(output), "kill": None})
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 4):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.process.kill()
    assert job.wait() == -signal.SIGKILL
    code, steps = run(output)
    assert code == 0
    assert steps[0] > 1
    assert (output / "model.safetensors").read_bytes() == whole


# Other ways to divide the work; each is killed once in the second epoch.
SETTINGS = {
    "accumulation, a short last step": {"batch_size": 5, "gradient_accumulation": 2},
    "part of an epoch": {"epochs": 1.5, "save_every": 3},
    "bf16": {"precision": "bf16"},
    "one pass": {"subnets_per_pass": None},
    "sub-networks drawn anew": {"schedule": Schedule("random", 2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_other_settings(run, tmp_path, options):
    assert run(tmp_path / "whole", **options)[0] == 0
    code, _ = run(tmp_path / "out", ("step", 8), **options)
    assert code == -signal.SIGKILL
    code, steps = run(tmp_path / "out", **options)
    assert code == 0
    assert steps[0] > 3
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_what_the_weights_depend_on(run, whole, tmp_path, folder):
    """That the runs above are equal says something: dropout, data order and both epochs matter."""
    reference = load_file(folder / "student" / "model.safetensors")
    for name, options in {"seed": {"seed": 1}, "rate": {"learning_rate": 2e-3}}.items():
        assert run(tmp_path / name, **options)[0] == 0
        assert (tmp_path / name / "model.safetensors").read_bytes() != whole
        weights = load_file(tmp_path / name / "model.safetensors")
        assert all(not torch.equal(weights[key], reference[key]) for key in weights)
