"""Steps of stage 2, ours and the plain loop's, for the benchmarks on a CPU and on a GPU.

    python -m benchmarks.distillation WHO PRECISION TEACHER [SUBNETS_PER_PASS]

prints the peak memory of one step at length 128 as a process of its own, see `peak_memory`.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import Dataset

from dynabert_fast.data import Collator, LengthGroupedSampler
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.models.conversion import to_huggingface
from dynabert_fast.models.packed import PackedSequences
from dynabert_fast.subnet import Subnet, grid
from dynabert_fast.training import Distillation, ElasticTrainer, TrainingOptions, stages

from .baselines.dynabert_loop import DistillationLoop, LoopBert
from .bench_model import SIZES
from .bench_ops import agree
from .lengths import draw
from .race import THREADS

BATCH = 32
LENGTH = 128
MEGABATCH = 50 * BATCH  # examples among which LengthGroupedSampler sorts
DROPOUT_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DTYPES = {"fp32": None, "bf16": torch.bfloat16}

Batch = dict[str, Tensor]
Models = tuple[DynaBertForSequenceClassification, DynaBertForSequenceClassification]


class Texts(Dataset[dict[str, Any]]):
    """Random tokens of given lengths."""

    largest_id = 29999

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.labels = [index % 2 for index in range(len(self.lengths))]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = self.lengths[index]
        ids = torch.randint(
            1000, self.largest_id + 1, (length,), generator=torch.Generator().manual_seed(index)
        )
        item = {"input_ids": ids.tolist(), "token_type_ids": [0] * length}
        return item | {"attention_mask": [1] * length, "labels": self.labels[index]}


def models(size: str, **fields: Any) -> Models:
    """A random student and a random teacher of a size of `bench_model.SIZES`."""
    config = DynaBertConfig(**SIZES[size], num_labels=2, **fields)
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(DynaBertForSequenceClassification(config))
    return made[0], made[1]


# ---- the contestants ----


class Ours:
    """Steps of `ElasticTrainer`, with its optimiser, prepared as `train` prepares them.

    Args:
        models: Copied. Student and teacher; `None` for the latter trains on labels.
        precision: As `TrainingOptions` takes it.
        teacher_width: `same` or `full`.
        subnets_per_pass: As the trainer takes it.
    """

    def __init__(
        self,
        models: tuple[DynaBertForSequenceClassification, DynaBertForSequenceClassification | None],
        precision: str,
        teacher_width: str = "same",
        subnets_per_pass: int | None = None,
    ) -> None:
        student, teacher = copy.deepcopy(models)
        options = TrainingOptions(batch_size=BATCH, precision=precision)
        folder = tempfile.gettempdir()  # nothing is saved
        data = Texts([4])
        self.trainer = ElasticTrainer(
            model=student,
            args=options.arguments(folder, is_roberta=False, progress=False),
            subnets=stages()["depth"].subnets(student),
            train_dataset=data,
            eval_dataset=data,
            data_collator=Collator(0),
            metric="accuracy",
            teacher=teacher,
            recipe=None if teacher is None else Distillation(teacher_width=teacher_width),
            subnets_per_pass=subnets_per_pass,
        )
        self.trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
        optimizer = self.trainer.create_optimizer()
        self.model, self.optimizer = self.trainer.accelerator.prepare(student, optimizer)
        self.state = dict(AcceleratorState().__dict__)

    def gradients(self, batch: Batch) -> Tensor:
        # Accelerate has one state for all trainers, the last one's: its precision is the teacher's.
        AcceleratorState().__dict__.update(self.state)
        return self.trainer.training_step(self.model, self.collated(batch))

    def collated(self, batch: Batch) -> dict[str, Any]:
        """A batch on the host as the trainer's loader gives it: packed there, then moved."""
        mask, device = batch["attention_mask"], self.trainer.args.device
        packed = PackedSequences.from_mask(tuple(mask.shape), mask, mask.device)
        return on(device, batch) | {"attention_mask": packed.to(device)}

    def step(self, batch: Batch) -> Tensor:
        loss = self.gradients(batch)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def loop(models: Models, precision: str = "fp32", teacher: str = "same", sdpa: bool = False) -> Any:
    """The plain loop with the same weights and a teacher pass for each width."""
    student, fixed = (LoopBert.of(model, sdpa) for model in models)
    return DistillationLoop(
        student,
        fixed,
        grid(student.config),
        teacher_width=teacher,
        dtype=DTYPES[precision],
        learning_rate=TrainingOptions().learning_rate,
    )


@functools.cache
def check(size: str, precision: str, loop_precision: str = "fp32", device: str = "cpu") -> None:
    """Without dropout and padding both have the same gradients, at either teacher."""
    pair = tuple(model.to(device) for model in models(size, **DROPOUT_OFF))
    batch = collate(Texts([16] * 4), range(4))
    for teacher in ("same", "full"):
        ours = Ours(pair, precision, teacher)
        plain = loop(pair, loop_precision, teacher)
        ours.gradients(batch)
        plain.gradients(on(device, batch))
        student = ours.trainer.model
        found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        got = to_huggingface(found, student.config)
        want = {n: p.grad for n, p in plain.student.named_parameters() if p.grad is not None}
        assert got.keys() == want.keys()
        flat = (torch.cat([by[name].flatten() for name in want]) for by in (got, want))
        agree(precision, *([one] for one in flat))


# ---- batches ----


def collate(texts: Texts, indices: Iterable[int]) -> Batch:
    batch = Collator(0)([texts[index] for index in indices])
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def on(device: str | torch.device, batch: Batch) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def fixed(examples: int = BATCH, length: int = LENGTH) -> Batch:
    return collate(Texts([length] * examples), range(examples))


def random_batches(data: str, count: int) -> list[Batch]:
    """Batches of a shuffled training set; see `_spread`."""
    texts = Texts(draw(data, MEGABATCH))
    order = list(range(MEGABATCH))  # drawn at random
    return _spread(texts, order, count, max)


def grouped_batches(data: str, count: int) -> list[Batch]:
    """Batches of the same texts, as our sampler makes them; see `_spread`."""
    texts = Texts(draw(data, MEGABATCH))
    return _spread(texts, list(LengthGroupedSampler(texts.lengths, BATCH)), count, sum)


def _spread(
    texts: Texts, order: Sequence[int], count: int, cost: Callable[[list[int]], int]
) -> list[Batch]:
    """Of all batches, by cost, those in the middle of `count` equal shares: few that stand for all.

    The costs of what is picked and of all differ by less than 5 %, or it fails.
    """
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    costs = {i: cost([texts.lengths[j] for j in batch]) for i, batch in enumerate(batches)}
    by_cost = sorted(costs, key=costs.__getitem__)
    picked = [by_cost[(2 * i + 1) * len(by_cost) // (2 * count)] for i in range(count)]
    share = sum(costs[i] for i in picked) / count / (sum(costs.values()) / len(costs))
    assert 0.95 < share < 1.05, share
    return [collate(texts, batches[i]) for i in picked]


# ---- work and memory ----


def operations(config: DynaBertConfig, subnets: Iterable[Subnet], lengths: Sequence[int]) -> float:
    """Of the forward pass's matrix products, each layer that sub-networks share counted once."""
    chains = [tuple(zip(s.layers, s.heads, s.neurons, strict=True)) for s in subnets]
    nodes = {chain[: i + 1] for chain in chains for i in range(len(chain))}
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    total = 0.0
    for *_, (_, heads, neurons) in nodes:
        inner = heads * config.head_size
        total += 2.0 * tokens * config.hidden_size * (4 * inner + 2 * neurons)
        total += 2.0 * squares * 2 * inner
    return total


def step_operations(config: DynaBertConfig, lengths: Sequence[int]) -> tuple[float, float]:
    """Of the student's forward and backward, and of the teacher at each width."""
    subnets = grid(config)
    teachers = {Subnet.from_multipliers(config, subnet.width) for subnet in subnets}
    return 3 * operations(config, subnets, lengths), operations(config, teachers, lengths)


def lengths_of(batch: Batch) -> list[int]:
    return batch["attention_mask"].sum(1).tolist()


def peak_memory(who: str, precision: str, teacher: str, subnets_per_pass: int | None) -> int:
    """Bytes that this process grows by at its peak: models, optimiser and one step.

    What it holds after the imports is taken off. The optimiser's state is made by a small step.
    """
    torch.set_num_threads(THREADS)
    before = _status("VmRSS")
    pair = models("minilm")
    contestant = (
        loop(pair, precision, teacher)
        if who == "loop"
        else Ours(pair, precision, teacher, subnets_per_pass)
    )
    del pair
    contestant.step(fixed(1, 8))
    contestant.step(fixed())
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    who, precision, teacher, *per_pass = sys.argv[1:]
    print(peak_memory(who, precision, teacher, int(per_pass[0]) if per_pass else None))
