"""Training makes narrow and shallow sub-networks good, on a task that is learnt in seconds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dynabert_fast.data import Collator, EncodedDataset, Examples
from dynabert_fast.evaluation import make_batches, score_grid
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.rewiring import measure_importance, rewire
from dynabert_fast.subnet import grid
from dynabert_fast.training import StageData, TrainingOptions, run_stage, stages

OPTIONS = TrainingOptions(batch_size=16, epochs=2, learning_rate=2e-3)


class _Words:
    """A tokenizer of numbered words: all that `EncodedDataset` and saving ask for."""

    pad_token_id = 0

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 1

    def __call__(self, texts, pairs=None, **_):
        return {"input_ids": [[1, *map(int, text.split())] for text in texts]}

    def save_pretrained(self, folder) -> None:
        """Nothing to save."""


def _examples(count: int, seed: int) -> Examples:
    """Class: which of words 2 and 3 is among the others."""
    rng = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = rng.randrange(2)
        words = [rng.randrange(4, 12) for _ in range(rng.randrange(3, 8))]
        words.insert(rng.randrange(len(words)), 2 + label)
        texts.append(" ".join(map(str, words)))
        labels.append(label)
    return Examples(texts, None, labels)


@pytest.mark.slow
def test_every_stage_improves_the_grid(tmp_path):
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
    )
    words = _Words()
    train, dev = (EncodedDataset(_examples(*of), words, 16) for of in ((480, 1), (200, 2)))
    data = StageData(train, dev, Collator(0), words, "accuracy")
    batches = make_batches(dev, data.collator)
    load = DynaBertForSequenceClassification.from_pretrained

    def scores(model, depths=(1.0, 0.75, 0.5)) -> list[float]:
        found = score_grid(model, batches, grid(config, depths=depths), "accuracy", progress=False)
        return [score["accuracy"] for score in found.values()]

    def run(name, model, teacher=None, options=OPTIONS):
        run_stage(stages()[name], model, data, tmp_path / name, options, teacher, progress=False)
        return load(tmp_path / name)

    teacher = run(
        "finetune", DynaBertForSequenceClassification(config), None, replace(OPTIONS, epochs=5)
    )
    student = load(tmp_path / "finetune")
    rewire(
        student,
        measure_importance(student, [data.collator([dev[i] for i in range(200)])], progress=False),
    )
    width = run("width", student, teacher)
    depth = run("depth", load(tmp_path / "width"), width)
    assert scores(teacher)[0] > 0.95, "the teacher did not learn the task"
    assert min(scores(teacher)) < 0.8, "the task is too easy to tell anything"
    assert min(scores(width, (1.0,))) > 0.95
    assert min(scores(depth)) > 0.95
