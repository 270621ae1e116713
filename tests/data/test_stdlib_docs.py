from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from dynabert_fast.data.loading import Examples, TaskData
from dynabert_fast.data.stdlib_docs import TOPICS, build_stdlib_docs
from dynabert_fast.errors import InputError

WORDS = "apple bridge candle desert engine forest garden hammer island jacket kettle ladder".split()


def sentence(number: int, prefix: str = "") -> str:
    """A sentence of its own: no other number's shares three words in a row with it."""
    names = [f"{prefix}{WORDS[number // 12**k % 12]}" for k in range(4)]
    return f"{names[0]} meets {names[1]} near {names[2]} before {names[3]} leaves {names[0]} again."


def library(folder: Path, **extra: str) -> Path:
    """A small library: 60 functions per topic in one module of each, plus `extra` module docs."""
    for topic, module in zip("cfnx", ("queue", "shutil", "ssl", "random"), strict=True):
        functions = [f'def f{i}():\n    """{sentence(i * 31 + 7, topic)}"""\n' for i in range(60)]
        (folder / f"{module}.py").write_text("\n".join(functions))
    for module, doc in extra.items():
        (folder / f"{module}.py").write_text(f'r"""{doc}"""\nraise SystemExit("executed")\n')
    return folder


def texts(data: TaskData) -> list[str]:
    return data.train.texts + data.dev.texts


@pytest.fixture(scope="module")
def real() -> TaskData:
    return build_stdlib_docs()


def test_real_library(real: TaskData) -> None:
    assert real.label_names == ("concurrency", "files", "network", "numeric")
    total = len(real.train) + len(real.dev)
    assert 2000 < total < 4000
    for topic in range(4):
        count, dev = (examples.labels.count(topic) for examples in (real.train, real.dev))
        assert count > 200
        assert dev / (count + dev) == pytest.approx(0.15, abs=0.01)
    assert real.notes[0].startswith(
        f"{total} docstring paragraphs of the standard library of Python 3"
    )


def test_real_library_is_prose_and_says_nothing_twice(real: TaskData) -> None:
    assert max(Counter(texts(real)).values()) == 1
    for text in texts(real):
        assert ">>>" not in text
        assert len(text.split()) >= 9
        assert text == " ".join(text.split())


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def test_near_duplicates_never_straddle_the_split(real: TaskData) -> None:
    having = defaultdict(set)
    for text in real.train.texts:
        for shingle in shingles(text):
            having[shingle].add(text)
    for text in real.dev.texts:
        own = shingles(text)
        for other_text in set().union(*(having[shingle] for shingle in own)):
            other = shingles(other_text)
            assert len(own & other) < 0.5 * len(own | other), (text, other_text)
            assert len(own & other) < 0.7 * min(len(own), len(other)), (text, other_text)


def test_seed_chooses_the_split(tmp_path: Path) -> None:
    library(tmp_path)
    first, again, other = (build_stdlib_docs(seed, library=tmp_path) for seed in (0, 0, 1))
    assert again == first
    assert sorted(texts(other)) == sorted(texts(first))
    assert set(other.dev.texts) != set(first.dev.texts)


def test_order_is_random(real: TaskData) -> None:
    for part in (real.train, real.dev):
        assert set(part.labels[:40]) == {0, 1, 2, 3}


def test_labels_follow_the_modules(tmp_path: Path) -> None:
    data = build_stdlib_docs(library=library(tmp_path))
    for part in (data.train, data.dev):
        for text, label in zip(part.texts, part.labels, strict=True):
            assert "cfnx".index(text[0]) == label
    assert (len(data.train), len(data.dev)) == (204, 36)


PROSE = "This is a plain paragraph of more than nine simple words, which stays."
PARAGRAPHS = {
    "kept": (PROSE, PROSE),
    "spaces": (PROSE.replace(" ", "\n   "), PROSE),
    "with names": (f"{PROSE} See urllib.parse, and x_y.", f"{PROSE} See urllib.parse, and x_y."),
    "short": ("Only a handful of words are in here.", None),
    "doctest": (f">>> call()\n{PROSE}", None),
    "signature": ("connect(host, port, and a lot of other plain words in here)", None),
    "arrow": ("get(key[, default]) -> value for this key if present, else the default", None),
    "definition": (f"def this one {PROSE}", None),
    "code": ("x = f(1) + y[2]; if x == 3: return {4: 5} and so on", None),
}


@pytest.mark.parametrize(("paragraph", "expected"), PARAGRAPHS.values(), ids=PARAGRAPHS)
def test_filter(tmp_path: Path, paragraph: str, expected: str | None) -> None:
    data = build_stdlib_docs(library=library(tmp_path, glob=f"Short title.\n\n{paragraph}\n\nEnd."))
    base = set(texts(build_stdlib_docs(library=library(tmp_path, glob=""))))
    assert set(texts(data)) - base == ({expected} if expected else set())


def test_modules_are_not_executed(tmp_path: Path) -> None:
    build_stdlib_docs(library=library(tmp_path, glob=PROSE))  # the module ends the process if run


NESTED = """
match 1:
    case 1:
        try:
            pass
        except OSError:
            class A:
                'In a class. {0}'
                async def f(self):
                    'In a coroutine. {0} {0} {0}'
                    def inner():
                        'In a function. {0} {0}'
"""


def test_packages_and_nested_definitions(tmp_path: Path) -> None:
    package = library(tmp_path) / "asyncio"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "deep.py").write_text(NESTED.format(PROSE))
    found = [text for text in texts(build_stdlib_docs(library=tmp_path)) if PROSE in text]
    assert sorted(found) == [
        f"In a class. {PROSE}",
        f"In a coroutine. {PROSE} {PROSE} {PROSE}",
        f"In a function. {PROSE} {PROSE}",
    ]


def test_a_text_under_two_topics_is_left_out(tmp_path: Path) -> None:
    nearly = PROSE.replace("stays", "remains")
    for other in (PROSE, nearly):
        data = build_stdlib_docs(library=library(tmp_path, glob=PROSE, ftplib=other))
        assert not {PROSE, nearly} & set(texts(data))
    same_topic = build_stdlib_docs(library=library(tmp_path, glob=PROSE, ftplib="", gzip=PROSE))
    assert texts(same_topic).count(PROSE) == 1


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_of_near_duplicates_stays_together(tmp_path: Path, seed: int) -> None:
    """The ends of the chain have nothing in common, but each link has half of the next."""
    long = [f"{sentence(1500 + i)[:-1]}" for i in range(6)]
    chain = [f"{long[i]} and {long[i + 1]}." for i in range(5)]
    data = build_stdlib_docs(seed, 0.3, library(tmp_path, glob="\n\n".join([*chain, *long])))

    def holds(part: Examples) -> set[str]:
        return {text for text in part.texts if text in chain or text in long}

    assert sorted(map(len, (holds(data.train), holds(data.dev)))) == [0, 11]


@pytest.mark.parametrize("module", ["queue", "shutil", "ssl", "random"])
def test_library_without_sources(tmp_path: Path, module: str) -> None:
    (library(tmp_path) / f"{module}.py").rename(tmp_path / f"{module}.pyc")
    with pytest.raises(InputError, match=r"found 0 paragraphs on \w+ in .*without its library's"):
        build_stdlib_docs(library=tmp_path)


def test_library_in_a_zip_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found 0 paragraphs on concurrency"):
        build_stdlib_docs(library=tmp_path / "python311.zip")


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(InputError, match="dev_fraction must be between 0 and 1"):
        build_stdlib_docs(dev_fraction=fraction)


def test_topics_share_no_module() -> None:
    assert max(Counter(module for modules in TOPICS.values() for module in modules).values()) == 1
