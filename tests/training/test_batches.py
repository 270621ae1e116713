"""Batches of a budget of tokens, their packing, and shares of the global batch."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import find_batch_size, send_to_device
from torch import distributed
from torch.utils.data._utils.pin_memory import pin_memory

from dynabert_fast.errors import InputError
from dynabert_fast.models.packed import PackedSequences
from dynabert_fast.training import TrainingOptions
from dynabert_fast.training.batches import PackingCollator, batch_shares

# Examples and tokens of the batches of two processes.
COUNTS = {"unequal": [(3, 40), (5, 24)], "equal": [(7, 11), (7, 11)]}


def work(rank: int, folder: Path) -> None:
    """What one of two processes does: its shares, for each of `COUNTS`."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    shares = {
        name: [s.item() for s in batch_shares(*counts[rank], torch.device("cpu"))]
        for name, counts in COUNTS.items()
    }
    (folder / f"{rank}.json").write_text(json.dumps(shares))
    distributed.destroy_process_group()


if __name__ == "__job__":
    work(**ARGUMENTS)  # type: ignore[name-defined]  # noqa: F821


# --- shares ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shares(tmp_path_factory, start_job) -> list[dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("shares")
    jobs = [start_job(__file__, {"rank": rank, "folder": folder}) for rank in (0, 1)]
    assert [job.wait() for job in jobs] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_shares_make_the_mean_of_processes_the_global_mean(shares):
    torch.manual_seed(0)
    for which in (0, 1):  # examples, tokens
        parts = [torch.rand(counts[which], dtype=torch.float64) for counts in COUNTS["unequal"]]
        means = [p.mean() * s["unequal"][which] for p, s in zip(parts, shares, strict=True)]
        torch.testing.assert_close(sum(means) / 2, torch.cat(parts).mean(), rtol=1e-14, atol=0)


def test_equal_counts_have_a_share_of_one(shares):
    assert [s["equal"] for s in shares] == [[1.0, 1.0]] * 2


def test_one_process_has_a_share_of_one():
    found = batch_shares(3, 40, torch.device("cpu"))
    assert [(share.item(), share.shape) for share in found] == [(1.0, ())] * 2


# --- packing --------------------------------------------------------------------------------------


def test_packing_of_a_batch(make_data):
    data = make_data("pair", train=6)
    items = [data.train[i] for i in range(6)]
    plain, batch = data.collator(items), PackingCollator(data.collator)(items)
    assert list(batch) == list(plain)
    packed = batch.pop("attention_mask")
    assert isinstance(packed, PackedSequences)
    mask = plain.pop("attention_mask")
    assert torch.equal(packed.unpack(packed.pack(mask)), mask)
    assert packed.offsets.diff().tolist() == data.train.lengths
    assert packed.max_length == max(data.train.lengths)
    for name, tensor in plain.items():
        assert torch.equal(batch[name], tensor)


def test_packing_moves_with_its_batch(make_data):
    """As accelerate moves batches, and without reading a value: the meta device has none."""
    data = make_data("pair", train=6)
    batch = PackingCollator(data.collator)([data.train[i] for i in range(6)])
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)
    packed = moved["attention_mask"]
    tensors = [packed.offsets, packed.indices, *(moved[n] for n in moved if n != "attention_mask")]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert packed.shape == (6, packed.max_length)
    assert find_batch_size(batch) == 6


def test_packing_is_pinned(make_data, monkeypatch):
    """As a loader pins batches for a GPU; without one, what is asked for is all there is to see."""
    data = make_data("pair", train=6)
    batch = PackingCollator(data.collator)([data.train[i] for i in range(6)])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: pinned.append(id(t)) or t)
    pin_memory(batch)
    packed = batch.pop("attention_mask")
    assert sorted(pinned) == sorted(map(id, (packed.offsets, packed.indices, *batch.values())))


# --- the trainer's batches ------------------------------------------------------------------------

BUDGET = {"tokens_per_step": 64, "epochs": 2.0, "learning_rate": 1e-30}


def train(make_trainer: Any, stop: int | None = None, resume: Any = None, **changes: Any) -> Any:
    """Trainer, and the texts of each batch that it was given; the model does not run."""
    trainer = make_trainer("finetune", TrainingOptions(**{**BUDGET, **changes}), train=40)
    seen = []

    def training_step(model, inputs, *args):
        if len(seen) == stop:
            raise KeyboardInterrupt
        packed = inputs["attention_mask"]
        mask = packed.unpack(packed.pack(torch.ones_like(inputs["input_ids"])))
        rows = zip(inputs["input_ids"], mask, strict=True)
        seen.append([ids[real == 1].tolist() for ids, real in rows])
        return torch.zeros(())

    trainer.training_step = training_step
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        assert stop is not None
    return trainer, seen


@pytest.mark.parametrize("parts", [1, 3], ids=["plain", "accumulation"])
def test_steps_hold_the_budget_and_epochs_every_text(make_trainer, parts):
    trainer, seen = train(make_trainer, gradient_accumulation=parts)
    per_epoch = trainer.state.max_steps // 2
    assert len(seen) == trainer.state.global_step * parts == 2 * per_epoch * parts
    steps = [[*chain(*seen[i : i + parts])] for i in range(0, len(seen), parts)]
    assert all(32 < sum(map(len, step)) <= 64 for step in steps)
    texts = sorted(trainer.train_dataset[i]["input_ids"] for i in range(40))
    assert sorted(chain(*steps[:per_epoch])) == sorted(chain(*steps[per_epoch:])) == texts
    assert steps[:per_epoch] != steps[per_epoch:]


def test_number_of_steps_may_be_given(make_trainer):
    _, whole = train(make_trainer)
    trainer, seen = train(make_trainer, max_steps=3)
    assert trainer.state.global_step == 3
    assert seen == whole[:3]


@pytest.mark.parametrize("parts", [1, 2], ids=["plain", "accumulation"])
def test_resumed_with_the_batches_that_were_left(make_trainer, tmp_path, parts):
    """Interrupted in the second epoch, after a checkpoint in the middle of it."""
    options = {"gradient_accumulation": parts, "save_every": 1}
    trainer, whole = train(make_trainer, **options)
    steps = trainer.state.max_steps // 2 + 2
    train(make_trainer, stop=steps * parts, **options)
    last = tmp_path / "run" / f"checkpoint-{steps}"
    assert last.is_dir()
    _, rest = train(make_trainer, resume=str(last), **options)
    assert rest == whole[steps * parts :]


def test_budget_too_small(make_trainer):
    with pytest.raises(InputError, match=r"tokens_per_step must be at least .*, got 8"):
        make_trainer("finetune", TrainingOptions(tokens_per_step=8), train=40)
    with pytest.raises(InputError, match="tokens_per_step must be above 0, got 0"):
        TrainingOptions(tokens_per_step=0)
