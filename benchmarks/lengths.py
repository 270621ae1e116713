"""Token counts of real training sets, as `lengths.json` keeps them: how many texts have n tokens.

    python benchmarks/lengths.py DATA VOCAB

counts them anew, `[CLS]` and `[SEP]` included: DATA holds `SST-2/train.tsv` and
`trec/train_5500.label`, VOCAB is the `vocab.txt` of an uncased BERT.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
LONGEST = 128


def draw(name: str, count: int, seed: int = 0) -> list[int]:
    """Lengths drawn at random from a training set's."""
    counts = json.loads(FILE.read_text())[name]
    return random.Random(seed).choices(range(len(counts)), counts, k=count)


def _trec(data: Path) -> Iterator[str]:
    for line in (data / "trec" / "train_5500.label").read_text("latin-1").splitlines():
        yield line.partition(" ")[2]


def _sst2(data: Path) -> Iterator[str]:
    with (data / "SST-2" / "train.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["sentence"]


def main() -> None:
    from tokenizers import BertWordPieceTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("vocab")
    args = parser.parse_args()
    tokenizer = BertWordPieceTokenizer(args.vocab, lowercase=True)
    found = {}
    for name, read in (("TREC", _trec), ("SST-2", _sst2)):
        encoded = tokenizer.encode_batch(list(read(args.data)))
        lengths = collections.Counter(min(len(one.ids), LONGEST) for one in encoded)
        found[name] = [lengths[n] for n in range(max(lengths) + 1)]
    lines = (f' "{name}": {json.dumps(counts)}' for name, counts in found.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
