"""Teach an encoder to fill in masked words: the model that augmentation needs.

    python benchmarks/masked_lm.py --data-dir DATA --model MODEL --output FOLDER

For where there is a BERT without the head of a masked language model, and none with it. It trains
on the training texts of the tasks, with `transformers`' collator (15 % of the tokens: eight of ten
masked, one another word, one itself), and says how many of the development texts' it finds.
FOLDER then serves `quality.py --masked-lm` and `dynabert-fast fit --augment-model`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    get_linear_schedule_with_warmup,
    set_seed,
)

from dynabert_fast.cli.arguments import COUNT, POSITIVE, quiet_libraries
from dynabert_fast.data import Examples, load_glue
from dynabert_fast.data.tasks import GLUE_TASKS
from dynabert_fast.errors import InputError, SaveError
from dynabert_fast.files import new_folder, whole_folder

TASKS = ("trec", "cola", "stsb", "rte", "sst2")
BATCH = 32
MAX_LENGTH = 128
JUDGED = 2000  # texts, at most
Batch = dict[str, Tensor]


def texts_of(examples: Examples) -> list[str]:
    """Both texts of pairs, each by itself."""
    return [*examples.texts, *(examples.pairs or ())]


def batches(
    ids: Sequence[list[int]], collate: DataCollatorForLanguageModeling, seed: int
) -> Iterator[Batch]:
    """Texts of like length together, batches in random order."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(ids), generator=generator)
    by_length = sorted(range(len(ids)), key=lambda i: (len(ids[i]), float(noise[i])))
    groups = [by_length[i : i + BATCH] for i in range(0, len(by_length), BATCH)]
    for group in torch.randperm(len(groups), generator=generator).tolist():
        yield collate([{"input_ids": ids[i]} for i in groups[group]])


def masked(model: BertForMaskedLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits `[M, V]` of the masked places alone, and what stood there `[M]`."""
    device = model.device
    there = batch["labels"].to(device)
    hidden = model.bert(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
    ).last_hidden_state
    chosen = there != -100
    return model.cls(hidden[chosen]), there[chosen]


@torch.no_grad()
def share_found(model: BertForMaskedLM, given: Sequence[Batch]) -> float:
    """Share of the masked words whose logit is the largest."""
    model.eval()
    right = total = 0
    for batch in given:
        logits, words = masked(model, batch)
        right += int((logits.argmax(-1) == words).sum())
        total += len(words)
    model.train()
    return right / max(total, 1)


def train(
    model: BertForMaskedLM,
    ids: Sequence[list[int]],
    collate: DataCollatorForLanguageModeling,
    epochs: int,
    rate: float,
) -> None:
    """AdamW, a tenth of warm-up, linear decay; bf16 by autocast.

    The head is new: it begins with how often each word comes, and learns at ten times the rate.
    """
    total = epochs * -(-len(ids) // BATCH)
    size = model.config.vocab_size
    counts = torch.bincount(torch.tensor([i for text in ids for i in text]), minlength=size)
    with torch.no_grad():
        model.cls.predictions.bias.copy_((counts + 1).log() - counts.sum().log())
    encoder = list(model.bert.parameters())  # the words' vectors, tied to the head's, among them
    theirs = {id(parameter) for parameter in encoder}
    head = [parameter for parameter in model.parameters() if id(parameter) not in theirs]
    groups = [{"params": encoder}, {"params": head, "lr": 10 * rate}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, total // 10, total)
    model.train()
    step, start = 0, time.perf_counter()
    for epoch in range(epochs):
        for batch in batches(ids, collate, epoch):
            with torch.autocast(model.device.type, torch.bfloat16):
                logits, words = masked(model, batch)
            loss = cross_entropy(logits.float(), words)
            if len(words):  # short texts may have none
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            step += 1
            if step % 200 == 0:
                passed = time.perf_counter() - start
                print(f"step {step}/{total}, loss {loss.item():.3f}, {passed:.0f} s", flush=True)


def make(args: argparse.Namespace, output: Path) -> None:
    """Train on the tasks' texts, say what came of it, save."""
    tasks = [load_glue(task, args.data_dir) for task in args.tasks]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = BertForMaskedLM.from_pretrained(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]

    seen = encode([text for task in tasks for text in texts_of(task.train)])
    unseen = encode([text for task in tasks for text in texts_of(task.dev)])
    held = list(batches(unseen[:: -(-len(unseen) // JUDGED)], collate, 0))
    print(f"{len(seen)} texts; {share_found(model, held):.3f} of masked words found before")
    train(model, seen, collate, args.epochs, args.rate)
    print(f"{share_found(model, held):.3f} of masked words found after")
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="folder with the tasks' folders")
    parser.add_argument("--model", required=True, help="a BERT: folder or hub id")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--tasks", nargs="+", choices=GLUE_TASKS, default=TASKS)
    parser.add_argument("--epochs", type=COUNT, default=1)
    parser.add_argument("--rate", type=POSITIVE, default=2e-4)
    args = parser.parse_args(argv)
    quiet_libraries()
    set_seed(0)
    try:
        make(args, new_folder(args.output))
    except (InputError, SaveError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
