"""Tiny tasks of every kind, trainers for them, and processes that may be killed."""

from __future__ import annotations

import gc
import multiprocessing
import random
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from dynabert_fast.data import Examples, Task, TaskData
from dynabert_fast.training import (
    Distillation,
    ElasticTrainer,
    StageData,
    TrainingOptions,
    stages,
)
from dynabert_fast.training.pipeline import head_changes, stage_data

# As many as the vocabulary of `make_model` holds. The first words speak for class 0, and so on.
WORDS = [a + b for a in "bdfgklmn" for b in ("a", "e", "i", "o", "u", "ai", "ou")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMES = {
    "binary": ("no", "yes"),
    "many": ("north", "east", "south", "west"),
    "pair": ("same", "other"),
    "regression": (),
}
DROPOUT_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="session", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Accelerate collects garbage whenever a training begins: spare it what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """What is tested here is order and arithmetic, bit for bit: not on a GPU, if there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    return BertTokenizerFast.from_pretrained(folder, model_max_length=24)


def make_examples(kind: str, count: int, rng: random.Random, length: int | None) -> Examples:
    """Texts of 2 to 9 words (or of `length`), with a label that their words tell."""
    classes = len(NAMES[kind]) or 5
    share = len(WORDS) // classes
    texts, pairs, labels = [], [], []
    for _ in range(count):
        label = rng.randrange(classes)
        own = WORDS[label * share : (label + 1) * share]
        number = length or rng.randint(2, 9)
        texts.append(
            " ".join(rng.choice(own if rng.random() < 0.7 else WORDS) for _ in range(number))
        )
        pairs.append(" ".join(rng.choices(own, k=number // 2 + 1)))
        labels.append(label)
    targets: list[Any] = [label / 2 for label in labels] if kind == "regression" else labels
    return Examples(texts, pairs if kind == "pair" else None, targets)


@pytest.fixture(scope="session")
def make_task() -> Callable[..., TaskData]:
    """`make_task(kind, train=12, dev=6, seed=0, length=None)`: binary, many, pair or regression."""

    def make(kind="binary", train=12, dev=6, seed=0, length=None):
        rng = random.Random(seed)
        columns = ("text", "second") if kind == "pair" else ("text",)
        regression = kind == "regression"
        task = Task(kind, columns, "label", "spearman" if regression else "accuracy", regression)
        train_part = make_examples(kind, train, rng, length)
        return TaskData(task, train_part, make_examples(kind, dev, rng, length), NAMES[kind])

    return make


@pytest.fixture(scope="session")
def make_data(make_task, tokenizer) -> Callable[..., StageData]:
    """`make_data("binary", ...)`: the task, tokenised."""
    return lambda *args, **kwargs: stage_data(make_task(*args, **kwargs), tokenizer, 16)


@pytest.fixture(scope="session")
def make_student(make_model, make_task) -> Callable[..., Any]:
    """`make_student("binary", seed=0, **config)`: a classifier with the task's head."""

    def make(kind="binary", **fields):
        data = make_task(kind, 1, 1)
        return make_model(**{**head_changes(data), "num_labels": data.num_labels, **fields})

    return make


@pytest.fixture
def make_trainer(make_student, make_data, tmp_path) -> Callable[..., ElasticTrainer]:
    """`make_trainer(stage, options, recipe=None, kind="binary", train=12, dropout=False, **model)`.

    The trainer of a stage and its teacher, over 4-layer models; checkpoints in `tmp_path / "run"`.
    """

    def make(
        stage: str = "depth",
        options: TrainingOptions | None = None,
        recipe: Distillation | None = None,
        kind: str = "binary",
        train: int = 12,
        dropout: bool = False,
        length: int | None = None,
        **fields: Any,
    ) -> ElasticTrainer:
        options = options or TrainingOptions()
        fields = fields if dropout else {**DROPOUT_OFF, **fields}
        model, data = make_student(kind, **fields), make_data(kind, train, length=length)
        chosen = stages()[stage]
        chosen = replace(chosen, recipe=recipe or chosen.recipe)
        distils = chosen.recipe is not None
        trainer = ElasticTrainer(
            model=model,
            args=options.arguments(tmp_path / "run", model.config.is_roberta, progress=False),
            subnets=chosen.subnets(model),
            train_dataset=data.train,
            eval_dataset=data.dev,
            data_collator=data.collator,
            metric=data.metric,
            teacher=make_student(kind, **{**fields, "seed": 1}) if distils else None,
            recipe=chosen.recipe,
            tokens_per_step=options.tokens_per_step,
            schedule=options.schedule,
            subnets_per_pass=options.subnets_per_pass,
            save_every=options.save_every,
            processing_class=data.tokenizer,
        )
        return trainer

    return make


# A fresh interpreter takes seconds to import torch and transformers. The fork server does so once
# and computes nothing, so that its children start in no time and share no state with this process.
_PRELOADED = ["dynabert_fast.training.pipeline", "transformers.trainer", "pytest"]


class Job:
    """A process that runs a file's `__job__` part with a global `ARGUMENTS`."""

    def __init__(self, path: str | Path, arguments: dict[str, Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.process = context.Process(
            target=runpy.run_path, args=(str(path), {"ARGUMENTS": arguments}, "__job__")
        )
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # for the server, which starts with the first job
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """Its exit code: 0, 1 after an exception, -9 where it was killed."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"the process still ran after {seconds} s")
        return self.process.exitcode


@pytest.fixture(scope="session")
def start_job() -> Callable[..., Job]:
    """`start_job(__file__, {...})`: run the `__job__` part of a file in a process of its own."""
    return Job


@pytest.fixture
def same_weights() -> Callable[..., None]:
    """`same_weights(a, b)`: two state dicts are equal bit for bit."""

    def check(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
        assert left.keys() == right.keys()
        different = [name for name in left if not torch.equal(left[name], right[name])]
        assert not different, different

    return check
