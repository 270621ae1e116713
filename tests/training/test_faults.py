"""What goes wrong in a long training, and what is left then.

A loss that is not finite, a disk that is full, a checkpoint that is damaged: one clear error each,
no process that waits for one that has stopped, and a run that can go on.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import re
import resource
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from dynabert_fast.data import load_files
from dynabert_fast.errors import InputError, SaveError, TrainingError
from dynabert_fast.files import MANIFEST, find_damage
from dynabert_fast.training import ElasticTrainer, TrainingOptions, run_stage, stages, watch
from dynabert_fast.training import trainer as module
from dynabert_fast.training.pipeline import load_model, load_tokenizer, stage_data

NAN, INF = float("nan"), float("inf")

# 12 texts: steps 1 to 3 and 4 to 6; a checkpoint after each, the best after step 3 or 6.
OPTIONS = TrainingOptions(batch_size=4, epochs=2, learning_rate=1e-3, save_every=1)


# --- in a process of its own, one of two ----------------------------------------------------------


def one_of_two(folder: str, fault: str, rank: int, meeting: str) -> None:
    """Train; process 1 meets a fault. Each says how it ended and after how many steps."""
    import torch.distributed as dist

    here, taken = Path(folder), []
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, and not used
    dist.init_process_group(
        "gloo", f"file://{meeting}", timedelta(seconds=40), world_size=2, rank=rank
    )
    step, save = ElasticTrainer.training_step, torch.save

    def faulty(trainer: Any, model: Any, inputs: Any, *args: Any) -> Any:
        taken.append(trainer.state.global_step + 1)
        if fault == "loss" and rank == 1 and len(taken) == 3:
            inputs = {**inputs, "labels": inputs["labels"] * NAN}
        return step(trainer, model, inputs, *args)

    def refuse(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if fault == "disk" and "checkpoint-2" in str(path) and f"rng_state_{rank}" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path, *args, **kwargs)

    ElasticTrainer.training_step = faulty
    if rank == 1:
        torch.save = refuse
    said = "nothing"
    try:
        columns = {"text_column": "text", "label_column": "label", "regression": True}
        run_stage(
            stages()["finetune"],
            load_model(here / "student"),
            stage_data(
                load_files(here / "train.csv", here / "dev.csv", **columns),
                load_tokenizer(here / "student"),
                16,
            ),
            here / fault,
            TrainingOptions(batch_size=2, epochs=1, save_every=1),
            progress=False,
        )
    except (TrainingError, SaveError) as error:
        said = f"{type(error).__name__}: {error}"
    (here / f"{fault}-{rank}.json").write_text(json.dumps([said, taken]))
    dist.destroy_process_group()


if __name__ == "__job__":
    gc.freeze()  # see conftest.py
    one_of_two(**globals()["ARGUMENTS"])


# --- helpers --------------------------------------------------------------------------------------


@pytest.fixture
def go(make_data, make_student, tmp_path):
    """`go(name="out", **options)`: train stage `finetune` into `tmp_path / name`."""

    def run(name="out", data=None, kind="binary", options=OPTIONS, resume=True):
        data, model = data or make_data(kind), make_student(kind, num_hidden_layers=1)
        output = tmp_path / name
        run_stage(stages()["finetune"], model, data, output, options, None, resume, progress=False)
        return (output / "model.safetensors").read_bytes()

    return run


@pytest.fixture
def run(tmp_path):
    """Where the checkpoints of `go()` are."""
    return tmp_path / "out.checkpoints"


def names(folder):
    """What is in a folder of checkpoints, beside the settings of their run."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return found - {"settings.json"}


def folders(*steps):
    return {f"checkpoint-{step}" for step in steps}


@contextmanager
def before_step(monkeypatch, number, act):
    """Call `act(model, inputs)` before the given step of any trainer; yields the steps' numbers."""
    step, taken = ElasticTrainer.training_step, []

    def acts(self, model, inputs, *args):
        taken.append(self.state.global_step + 1)
        if taken[-1] == number:
            act(model, inputs)
        return step(self, model, inputs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ElasticTrainer, "training_step", acts)
        yield taken


def stop(*_):
    raise KeyboardInterrupt


def poison(model, inputs):
    with torch.no_grad():
        model.classifier.weight[0, 0] = NAN


def every_epoch_is_better(monkeypatch):
    """Each evaluation gives more than the one before."""
    totals = itertools.count(1)

    def score_grid(model, batches, subnets, metric, *, progress):
        return {str(subnets[0]): {metric: next(totals)}}

    monkeypatch.setattr(module, "score_grid", score_grid)


# --- losses that are not finite -------------------------------------------------------------------


def alone(**fields):
    """The accelerator of one process."""
    return SimpleNamespace(**{"num_processes": 1, "process_index": 0, "scaler": None, **fields})


def batch(value):
    ids = torch.full((2, 3), value)
    return {"input_ids": ids, "labels": ids[:, 0]}  # one shares the other's memory


BAD = {
    "NaN": torch.tensor(NAN),
    "infinity": torch.tensor(INF),
    "minus infinity": torch.tensor(-INF, dtype=torch.float64),
    "one pass of three": torch.tensor([1.0, NAN, 2.0]),
    "bf16": torch.tensor([1.0, INF], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("losses", BAD.values(), ids=BAD.keys())
def test_a_bad_loss_stops_and_saves_the_batch(tmp_path, losses):
    watched = watch.LossWatch(alone(), tmp_path / "run")
    watched.add(6, 1.25, batch(1), torch.ones_like(losses) * 1e30)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TrainingError) as caught:
        watched.add(7, 1.5, batch(2), losses)
    path = tmp_path / "run" / "bad-batch-step-7.safetensors"
    shown = ", ".join(f"{loss:g}" for loss in losses.reshape(-1).tolist())
    assert str(caught.value) == (
        f"the loss is {shown} in step 7 (epoch 1.50); the batch is in {path}: look at its texts "
        "and labels, or train anew with a lower learning rate, or in bf16 where it was fp16; "
        "earlier checkpoints are intact"
    )
    saved = load_file(path)
    assert saved.keys() == batch(2).keys()
    assert all(torch.equal(saved[name], value) for name, value in batch(2).items())
    with safe_open(path, "pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items()}
    assert (about["step"], about["epoch"]) == (7, 1.5)
    assert str(about["losses"]) == str(losses.reshape(-1).tolist())


class Event:
    """A GPU's: whether somebody waited for it."""

    def __init__(self):
        self.waited = False

    def synchronize(self):
        self.waited = True


@pytest.fixture
def events(monkeypatch):
    """Events of all copies, as if losses came from a GPU."""
    made = []

    def send(values):
        made.append(Event())
        return values, made[-1]

    monkeypatch.setattr(watch, "_send", send)
    return made


def test_losses_of_a_gpu_are_looked_at_later(tmp_path, events):
    watched = watch.LossWatch(alone(), tmp_path)
    watched.add(1, 0.1, batch(1), torch.tensor(NAN))
    watched.add(2, 0.2, batch(2), torch.tensor(1.0))
    assert not any(event.waited for event in events)
    with pytest.raises(TrainingError, match=r"in step 1 \(epoch 0\.10\)"):
        watched.add(3, 0.3, batch(3), torch.tensor(1.0))
    assert [event.waited for event in events] == [True, False, False]
    saved = load_file(tmp_path / "bad-batch-step-1.safetensors")
    assert torch.equal(saved["input_ids"], batch(1)["input_ids"])


def test_finish_waits_for_all(tmp_path, events):
    watched = watch.LossWatch(alone(), tmp_path)
    watched.add(1, 0.1, batch(1), torch.tensor(1.0))
    watched.add(2, 0.2, batch(2), torch.tensor(NAN))
    with pytest.raises(TrainingError, match="step 2"):
        watched.finish()
    watched.add(3, 0.3, batch(3), torch.tensor(NAN))
    watched.clear()
    watched.finish()


@pytest.mark.gpu
def test_no_wait_in_a_step_on_a_gpu(tmp_path):
    watched = watch.LossWatch(alone(), tmp_path)
    losses = [torch.tensor(value, device="cuda") for value in (1.0, 1.0, NAN, 1.0, 1.0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, loss in enumerate(losses[:-1], 1):
            watched.add(step, 0.5, {"input_ids": loss}, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(TrainingError, match="step 3"):
        watched.add(5, 0.5, {}, losses[-1])
    assert load_file(tmp_path / "bad-batch-step-3.safetensors")["input_ids"].isnan()


def test_a_batch_that_cannot_be_saved(tmp_path, monkeypatch):
    def refuse(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(watch, "save_file", refuse)
    with pytest.raises(TrainingError, match=r"loss is nan in step 1 .*could not be saved \(I/O"):
        watch.LossWatch(alone(), tmp_path).add(1, 0.1, batch(1), torch.tensor(NAN))


@pytest.mark.parametrize("own", [1.0, NAN], ids=["another's", "mine too"])
def test_all_processes_stop(tmp_path, own):
    def reduce(flag, reduction):
        assert reduction == "sum"
        return flag + 1  # of another process

    watched = watch.LossWatch(alone(num_processes=3, process_index=2, reduce=reduce), tmp_path)
    message = "another process has a loss that is not finite in step 4" if own == 1 else "is nan in"
    with pytest.raises(TrainingError, match=message):
        watched.add(4, 0.1, batch(1), torch.tensor(own))
    files = {"bad-batch-step-4-process-2.safetensors"} if own != 1 else set()
    assert names(tmp_path) == files


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_training_stops_before_the_weights_are_spoilt(go, run, monkeypatch, kind):
    whole, seen = go("whole", kind=kind), []

    def spoil(model, inputs):
        seen.append(dict(inputs))
        poison(model, inputs)

    with (
        before_step(monkeypatch, 5, spoil) as taken,
        pytest.raises(TrainingError, match=r"the loss is nan in step 5 \(epoch 1\.33\)"),
    ):
        go(kind=kind)
    assert taken == [1, 2, 3, 4, 5]
    assert names(run) == folders(3, 4) | {"bad-batch-step-5.safetensors"}
    saved = load_file(run / "bad-batch-step-5.safetensors")
    mask, packed = saved["attention_mask"], seen[0].pop("attention_mask")
    assert mask.shape == saved["input_ids"].shape
    assert torch.equal(packed.pack(saved["input_ids"]), saved["input_ids"][mask == 1])
    assert 0 < mask.sum() < mask.numel()
    assert saved.keys() == {"attention_mask", *seen[0]}
    assert all(torch.equal(saved[name], value) for name, value in seen[0].items())
    with before_step(monkeypatch, None, None) as taken:
        assert go(kind=kind) == whole  # from the last checkpoint
    assert taken == [5, 6]


def test_a_label_that_is_no_number(go, run, make_task, tokenizer):
    task = make_task("regression")
    task.train.labels[3] = NAN
    with pytest.raises(TrainingError, match="the loss is nan"):
        go(data=stage_data(task, tokenizer, 16), kind="regression")
    (path,) = run.glob("bad-batch-*")
    assert load_file(path)["labels"].isnan().sum() == 1


def test_the_last_losses_of_an_epoch_are_looked_at_before_its_evaluation(
    make_trainer, monkeypatch, events
):
    trainer = make_trainer("finetune", TrainingOptions(batch_size=6, epochs=1))
    monkeypatch.setattr(trainer, "evaluate", None)
    with before_step(monkeypatch, 2, poison), pytest.raises(TrainingError, match="step 2"):
        trainer.train()
    assert len(events) == 2


def test_losses_are_looked_at_before_a_save(make_trainer, monkeypatch, events, tmp_path):
    trainer = make_trainer("finetune", TrainingOptions(batch_size=2, epochs=1, save_every=3))
    monkeypatch.setattr(watch, "_LATER", 9)
    with before_step(monkeypatch, 3, poison), pytest.raises(TrainingError, match=r"loss .* step 3"):
        trainer.train()
    assert names(tmp_path / "run") == {"bad-batch-step-3.safetensors"}


def test_weights_that_are_not_finite_are_not_saved(make_trainer, tmp_path):
    """A gradient overflows where the loss does not, in the step before a save."""

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:  # steps that are done
                poison(model, None)

    trainer = make_trainer("finetune", TrainingOptions(batch_size=2, epochs=1, save_every=2))
    trainer.add_callback(Overflow())
    with pytest.raises(TrainingError, match="weights are not finite after step 4, and are not"):
        trainer.train()
    assert names(tmp_path / "run") == folders(2)


def test_fp16_skips_steps_until_its_scale_is_below_1(make_trainer, make_task, tokenizer, tmp_path):
    trainer = make_trainer("finetune", TrainingOptions(batch_size=2, epochs=1), kind="regression")
    task = make_task("regression")
    task.train.labels[:] = [NAN] * len(task.train.labels)
    trainer.train_dataset = stage_data(task, tokenizer, 16).train
    # Accelerate makes one for fp16 on a GPU.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(TrainingError, match="the loss is nan in step 4"):
        trainer.train()  # at scales 4, 2, 1 and 0.5
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainers_own_filter_is_off(tmp_path, precision):
    """It reads each step's loss, which waits for the device, and then goes on."""
    arguments = TrainingOptions(precision=precision).arguments(tmp_path, False)
    assert not arguments.logging_nan_inf_filter


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def full_disk():
    """No file of this process can grow: the system itself refuses, in every library's way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# From which call on, within the save of a checkpoint, nothing can be written.
FULL = {
    "at once": (ElasticTrainer, "_save_checkpoint", 1),
    "weights": (ElasticTrainer, "save_model", 1),
    "optimizer": (torch, "save", 1),
    "schedule": (torch, "save", 2),
    "generators": (torch, "save", 3),
    "state": (TrainerState, "save_to_json", 1),
    "manifest": (module, "write_manifest", 1),
}
# Calls that fail themselves.
REFUSED = {
    "folder": (Path, "mkdir", 1),
    "flush": (os, "fsync", 1),
    "last flush": (os, "fsync", 9),
    "rename": (Path, "rename", 1),
}


def fails(monkeypatch, owner, attribute, number, how):
    """In the save of checkpoint 6: have a call fail, or nothing be written from it on."""
    original, counted, save = getattr(owner, attribute), [], ElasticTrainer._save_checkpoint

    def call(*args, **kwargs):
        counted.append(1)
        if len(counted) != number:
            return original(*args, **kwargs)
        if how == "refused":
            raise OSError(errno.ENOSPC, "No space left on device")
        limit.__enter__()
        return original(*args, **kwargs)

    limit = full_disk()

    def at_step_6(self, *args):
        if self.state.global_step != 6:
            return save(self, *args)
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, call)
            try:
                return (call if attribute == "_save_checkpoint" else save)(self, *args)
            finally:
                if how == "full":
                    limit.__exit__(None, None, None)

    monkeypatch.setattr(ElasticTrainer, "_save_checkpoint", at_step_6)
    return counted


CALLS = [(*call, "full") for call in FULL.values()] + [
    (*call, "refused") for call in REFUSED.values()
]


@pytest.mark.parametrize("call", CALLS, ids=[*FULL, *REFUSED])
def test_a_full_disk_loses_no_earlier_checkpoint(go, run, monkeypatch, call):
    every_epoch_is_better(monkeypatch)
    whole = go("whole")
    with monkeypatch.context() as patch:
        every_epoch_is_better(patch)
        counted = fails(patch, *call)
        with pytest.raises(SaveError) as caught:
            go()
    assert len(counted) >= call[2]
    message = str(caught.value)
    assert message.startswith(f"could not save {run / 'checkpoint-6'} (")
    assert message.count("could not save") == 1
    assert "what was saved before is intact: free some space" in message
    assert "\n" not in message
    assert names(run) == folders(3, 4, 5)  # 3 is the best
    assert not any(find_damage(run / name) for name in names(run))
    with before_step(monkeypatch, None, None) as taken:
        assert go() == whole
    assert taken == [6]


@pytest.mark.slow
@pytest.mark.parametrize("tenths", [5, 12, 15, 18, 21, 24, 27, 29])
def test_a_small_disk(go, run, tmp_path, monkeypatch, make_data, tenths):
    """A file system with room for so many tenths of a checkpoint: as far as it goes, whole."""
    with before_step(monkeypatch, 2, stop), pytest.raises(KeyboardInterrupt):
        go("sample")
    (sample,) = (tmp_path / "sample.checkpoints").glob("checkpoint-*")
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in sample.iterdir())
    run.mkdir()
    options = f"size={size * tenths // 10 // 4096 * 4096}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(run)]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(SaveError, match=r"No space left|refused a write"):
            go()
        # One more than is kept must fit.
        assert names(run) == folders(*range(1, tenths // 10 + 1))
        assert not any(find_damage(folder) for folder in run.glob("checkpoint-*"))
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)


# --- a damaged checkpoint -------------------------------------------------------------------------


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "weights cut": ("model.safetensors", cut, "model.safetensors has "),
    "weights overwritten": ("model.safetensors", flip, "model.safetensors has changed"),
    "optimizer cut": ("optimizer.pt", cut, "optimizer.pt has "),
    "optimizer overwritten": ("optimizer.pt", flip, "optimizer.pt has changed"),
    "schedule gone": ("scheduler.pt", Path.unlink, "scheduler.pt is missing"),
    "generators overwritten": ("rng_state.pth", flip, "rng_state.pth has changed"),
    "state cut": ("trainer_state.json", cut, "trainer_state.json has "),
    "state emptied": ("trainer_state.json", empty, r"trainer_state.json has 0 bytes, not \d+"),
    "configuration gone": ("config.json", Path.unlink, "config.json is missing"),
    "manifest gone": (MANIFEST, Path.unlink, "manifest.json is missing"),
    "manifest cut": (MANIFEST, cut, "manifest.json has changed"),
    "manifest emptied": (MANIFEST, empty, "manifest.json has changed"),
}


@pytest.fixture
def killed(go, run, monkeypatch):
    """The weights of a whole run, beside one that stopped in step 6, with 3 as its best yet."""
    every_epoch_is_better(monkeypatch)
    whole = go("whole")
    every_epoch_is_better(monkeypatch)
    with before_step(monkeypatch, 6, stop), pytest.raises(KeyboardInterrupt):
        go()
    assert names(run) == folders(3, 4, 5)
    return whole


@pytest.mark.parametrize(("name", "harm", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_the_checkpoint_before_a_damaged_one_is_used(
    killed, go, run, monkeypatch, caplog, name, harm, reason
):
    harm(run / "checkpoint-5" / name)
    with before_step(monkeypatch, None, None) as taken:
        assert go() == killed
    assert taken == [5, 6]
    (record,) = (r for r in caplog.records if r.name.startswith("dynabert_fast"))
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"checkpoint {run / 'checkpoint-5'} is damaged (")
    assert record.getMessage().endswith(") and is not used")
    assert re.search(reason, record.getMessage())


def test_no_whole_checkpoint(killed, go, run, monkeypatch, caplog):
    for name in names(run):
        flip(run / name / "model.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with (
        before_step(monkeypatch, None, None) as taken,
        pytest.raises(InputError, match=r"no checkpoint in .*out\.checkpoints is whole .*changed"),
    ):
        go()
    assert taken == []
    assert len(caplog.records) >= 3
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_best_checkpoint_is_not_what_a_run_ends_with(killed, go, run, caplog):
    """Checkpoints 4 and 5 need it at the end; there is none from before it."""
    flip(run / "checkpoint-3" / "model.safetensors")
    with pytest.raises(InputError, match="no checkpoint in"):
        go()
    assert "its best checkpoint checkpoint-3 is: model.safetensors has changed" in caplog.text


def test_a_damaged_checkpoint_is_not_counted_as_the_one_before(killed, go, run, monkeypatch):
    """Resumed at 4 past a damaged 5: what is kept beside the next one is 4, not 5."""
    flip(run / "checkpoint-5" / "optimizer.pt")
    monkeypatch.setattr(ElasticTrainer, "_load_best_model", stop)
    with pytest.raises(KeyboardInterrupt):
        go(options=replace(OPTIONS, save_every=6))
    assert names(run) == folders(4, 6)


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_task, make_student, tokenizer):
    """A student and data on disk."""
    folder = tmp_path_factory.mktemp("faults")
    make_student("regression", num_hidden_layers=1).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    task = make_task("regression", train=20, dev=4)
    for name, part in (("train", task.train), ("dev", task.dev)):
        lines = [f"{text},{label}" for text, label in zip(part.texts, part.labels, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    return folder


ENDS = {
    "loss": (
        [1, 2, 3],
        ["TrainingError: another process has a loss", "TrainingError: the loss is nan in step 3"],
        folders(1, 2) | {"bad-batch-step-3-process-1.safetensors"},
    ),
    "disk": (
        [1, 2],
        [
            "SaveError: could not save .*checkpoint-2 .another process",
            "SaveError: could not save .*checkpoint-2 .*No space left",
        ],
        folders(1),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "end"), ENDS.items(), ids=ENDS.keys())
def test_two_processes_stop_together(folder, start_job, tmp_path, fault, end):
    """Nobody ends them: a process that waited for the other would time out, and say so."""
    steps, messages, left = end
    meeting = str(tmp_path / "meeting")
    jobs = [
        start_job(
            __file__,
            {"folder": str(folder), "fault": fault, "rank": rank, "meeting": meeting},
        )
        for rank in (0, 1)
    ]
    assert [job.wait(60) for job in jobs] == [0, 0]
    for rank, message in enumerate(messages):
        said, taken = json.loads((folder / f"{fault}-{rank}.json").read_text())
        assert re.match(message, said), said
        assert taken == steps
    run = folder / f"{fault}.checkpoints"
    assert names(run) == left
    assert not any(find_damage(path) for path in run.glob("checkpoint-*"))
