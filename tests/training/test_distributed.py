"""Two processes with parts of a batch each end with the weights of one with whole batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from dynabert_fast.cli.main import leave_processes
from dynabert_fast.data import load_files
from dynabert_fast.training import ElasticTrainer, Recipe, TrainingOptions, run_stage, stages
from dynabert_fast.training.pipeline import load_model, load_tokenizer, stage_data

# 24 texts, 8 a step in all processes: three steps an epoch. In "tokens" they have 2 to 9 words, and
# a step as many as fit: processes have unequal numbers of examples and of tokens. Float64, so that
# rounding is not what is compared.
OPTIONS = {"epochs": 2.0, "learning_rate": 1e-3, "save_every": 2}
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation": 2},
    "passes": {"subnets_per_pass": 2},
    "tokens": {"tokens_per_step": 64, "texts": "unequal"},
    "dropout": {"seed": 1},  # resumed, below
}


def train(
    folder: Path, output: Path, dropout: bool = False, texts: str = "train", **changes: Any
) -> None:
    data = load_files(
        folder / f"{texts}.csv", folder / "dev.csv", text_column="text", label_column="label"
    )
    student, teacher = (load_model(folder / name).double() for name in ("student", "teacher"))
    if not dropout:
        student.config.hidden_dropout_prob = student.config.attention_probs_dropout_prob = 0.0
        student = type(student)(student.config).double()
        student.load_state_dict(load_model(folder / "student").double().state_dict())
    run_stage(
        stages((1.0, 0.5), (1.0, 0.75, 0.5), Recipe(assistant=0.5))["depth"],
        student,
        stage_data(data, load_tokenizer(folder / "student"), 16),
        output,
        TrainingOptions(**OPTIONS, **changes),
        teacher,
        resume=True,
        progress=False,
    )


LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
SETTINGS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


class Observed:
    """What training did in this process: texts of each step, passes that exchanged gradients."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.texts: list[Any] = []
        self.seeds: list[int] = []
        self.exchanges: list[bool] = []
        self.stop_at = stop_at
        self.step, self.forward = ElasticTrainer.training_step, DistributedDataParallel.forward

    def __enter__(self) -> Observed:
        def step(trainer: Any, model: Any, inputs: Any, *args: Any) -> Any:
            if trainer.state.global_step == self.stop_at:
                raise KeyboardInterrupt
            self.texts.append(inputs["input_ids"].tolist())
            self.seeds.append(torch.initial_seed())
            return self.step(trainer, model, inputs, *args)

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.exchanges.append(model.require_backward_grad_sync)
            return self.forward(model, *args, **kwargs)

        ElasticTrainer.training_step, DistributedDataParallel.forward = step, forward
        return self

    def __exit__(self, kind: Any, *_: Any) -> bool:
        ElasticTrainer.training_step, DistributedDataParallel.forward = self.step, self.forward
        return kind is KeyboardInterrupt


def work(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    seen = {}
    for name in ("plain", "accumulation", "passes", "tokens"):
        with Observed() as seen[name]:
            train(folder, folder / name, batch_size=4, **SCENARIOS[name])
    # Interrupted in the second epoch, after a step of it, and resumed.
    with Observed() as seen["whole"]:
        train(folder, folder / "whole", dropout=True, batch_size=4)
    with Observed(stop_at=5):
        train(folder, folder / "resumed", dropout=True, batch_size=4)
    with Observed() as seen["resumed"]:
        train(folder, folder / "resumed", dropout=True, batch_size=4)
    report = {name: [o.texts, o.exchanges, o.seeds] for name, o in seen.items()}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))
    leave_processes()


if __name__ == "__main__":
    work(Path(sys.argv[1]))


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_task, make_student, tokenizer):
    """Everything that two processes made."""
    folder = tmp_path_factory.mktemp("distributed")
    task = make_task("binary", train=24, dev=4, length=5)
    for name, seed in (("student", 0), ("teacher", 1)):
        make_student("binary", seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    unequal = make_task("binary", train=24, dev=1)
    for name, part in (("train", task.train), ("dev", task.dev), ("unequal", unequal.train)):
        lines = [f"{text},{label}" for text, label in zip(part.texts, part.labels, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    done = subprocess.run(
        [sys.executable, *LAUNCH, __file__, str(folder)],
        env=os.environ | SETTINGS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """For each process and scenario: the texts of its steps, and its exchanges."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["plain", "accumulation", "passes", "tokens"])
def test_two_processes_are_one_with_twice_the_batch(folder, tmp_path, name):
    train(folder, tmp_path / "one", batch_size=8, **SCENARIOS[name])
    one, two, start = (
        load_file(path / "model.safetensors")
        for path in (tmp_path / "one", folder / name, folder / "student")
    )
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == torch.float64
        torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-9, msg=key)
        # All of it has moved, but for key biases, on which attention does not depend.
        if not key.endswith("key.bias"):
            assert (one[key] - start[key]).abs().max() > 1e-4


def test_gradients_are_exchanged_once_a_step(seen):
    for process in seen:
        assert process["plain"][1] == [True] * 6
        assert process["passes"][1] == [False, False, False, True] * 6
        # The epoch's third batch makes a step of its own.
        assert process["accumulation"][1] == [False, True, True] * 2


def test_processes_have_unequal_parts_of_a_step_of_tokens(seen):
    texts = [process["tokens"][0] for process in seen]
    assert len(texts[0]) == len(texts[1]) > 4
    assert len(texts[0]) % 2 == 0  # epochs of whole steps
    counts = [[len(step) for step in process] for process in texts]
    assert any(a != b for a, b in zip(*counts, strict=True))
    tokens = [[sum(t != 0 for row in step for t in row) for step in p] for p in texts]
    assert any(a != b for a, b in zip(*tokens, strict=True))
    assert all(a + b <= 64 for a, b in zip(*tokens, strict=True))


def test_processes_drop_other_values(seen):
    """With one seed for all, twice the texts would be twice the same noise."""
    first, second = (set(process["whole"][2]) for process in seen)
    assert len(first) == len(second) == 1
    assert first != second


def test_each_text_goes_to_one_process(seen):
    for name in ("plain", "whole"):
        for epoch in (slice(0, 3), slice(3, 6)):
            texts = [{tuple(text) for step in p[name][0][epoch] for text in step} for p in seen]
            assert len(texts[0] | texts[1]) == 24
            assert not texts[0] & texts[1]


def test_every_epoch_has_an_order_of_its_own(seen):
    for process in seen:
        texts = process["plain"][0]
        assert texts[:3] != texts[3:]


def test_resumed_in_the_second_epoch(folder, seen):
    for process in seen:
        assert process["resumed"][0] == process["whole"][0][4:]
    whole, resumed = (folder / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert not list(folder.glob("*.checkpoints"))


def test_fit_in_two_processes(folder, tmp_path):
    """The command under torchrun: every folder is made once, and one process speaks."""
    out = tmp_path / "out"
    options = (
        f"--model {folder}/student --train-file {folder}/train.csv --dev-file {folder}/dev.csv"
    )
    options += f" --text-column text --label-column label --output {out} --max-length 16"
    options += " --epochs 1 --batch-size 4 --latency-rounds 1 --latency-length 8"
    done = subprocess.run(
        [sys.executable, *LAUNCH, "-m", "dynabert_fast.cli.main", "fit", *options.split()],
        env=os.environ | SETTINGS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"teacher", "rewired", "width", "dynabert", "grid.json"} <= {
        p.name for p in out.iterdir()
    }
    assert not list(out.glob("*.checkpoints"))
    assert done.stdout.count("report: ") == 1
    assert done.stderr.count("importance: 100%") == 1
    # 24 texts, 4 in each of two processes, and 1 of depths
    for stage, steps in (("finetune", 3), ("width", 3), ("depth", 12)):
        assert done.stdout.count(f"{stage}: step {steps}/{steps}, ") == 1
