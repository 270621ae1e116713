"""A labelled text set that every Python installation carries, made on the spot.

The texts are docstring paragraphs of the standard library, whose source files are parsed and never
run. The label is the topic of the chapter of the Python library reference that has the module.
"""

from __future__ import annotations

import ast
import platform
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dynabert_fast.data.loading import Examples, TaskData
from dynabert_fast.data.tasks import Task
from dynabert_fast.errors import InputError

# Modules and packages by chapters of the library reference. A version of Python that has no such
# module (telnetlib left in 3.13, compression came in 3.14) goes without. The pure Python twins of C
# modules (_pydecimal, _pyio) stand for them.
TOPICS: dict[str, tuple[str, ...]] = {
    # "Concurrent Execution", and asyncio, which its own page calls a library for concurrent code.
    "concurrency": tuple(
        "_threading_local asyncio concurrent contextvars multiprocessing queue sched subprocess "
        "threading".split()
    ),
    # "File and Directory Access", "Data Persistence", "Data Compression and Archiving",
    # "File Formats", and io.
    "files": tuple(
        "_compression _pyio bz2 compression configparser copyreg csv dbm filecmp fileinput fnmatch "
        "genericpath glob gzip io linecache lzma netrc ntpath pathlib pickle plistlib posixpath "
        "shelve shutil sqlite3 stat tarfile tempfile tomllib zipapp zipfile".split()
    ),
    # "Internet Protocols and Support", and the sockets of "Networking".
    "network": tuple(
        "cgi cgitb ftplib http imaplib ipaddress nntplib poplib selectors smtpd smtplib socket "
        "socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc".split()
    ),
    # "Numeric and Mathematical Modules".
    "numeric": tuple("_pydecimal _pylong decimal fractions numbers random statistics".split()),
}

TASK = Task("stdlib-docs", ("text",), "topic", "accuracy", labels=tuple(TOPICS))

# Fewer paragraphs than this in a topic, and the installation is not a whole one. CPython 3.11 to
# 3.14 have several hundred.
_ENOUGH = 50

_MIN_WORDS = 9
_SHINGLE = 3  # words
_JACCARD = 0.5
_CONTAINMENT = 0.7


def build_stdlib_docs(
    seed: int = 0, dev_fraction: float = 0.15, library: Path | None = None
) -> TaskData:
    """Builds the set: docstring paragraphs of the standard library, by topic.

    Short, code-like and repeated paragraphs are left out. Near-duplicates (3-word shingles with a
    Jaccard index of at least 0.5, or 0.7 of the shorter text contained in the other) form groups; a
    group is on one side of the split, and left out if it has more than one topic.

    Args:
        seed: chooses the split and the order.
        dev_fraction: the part of each topic that is set aside for judging.
        library: the folder of the standard library's sources; default that of this Python.

    Raises:
        InputError: the sources are not there, as in a zipped or byte-compiled installation, or
            ``dev_fraction`` is not between 0 and 1.
    """
    if not 0 < dev_fraction < 1:
        raise InputError(f"dev_fraction must be between 0 and 1, got {dev_fraction}")
    root = library or Path(sysconfig.get_path("stdlib"))
    texts, topics = _unambiguous(_collect(root))
    groups = [
        group for group in _near_duplicates(texts) if len({topics[index] for index in group}) == 1
    ]
    counts = Counter(topics[index] for group in groups for index in group)
    for topic in TOPICS:
        if counts[topic] < _ENOUGH:
            raise InputError(
                f"found {counts[topic]} paragraphs on {topic} in {root}, need {_ENOUGH}: this "
                "Python comes without its library's source files; use another installation"
            )
    train, dev = _split(groups, topics, dev_fraction, random.Random(seed))
    note = f"{counts.total()} docstring paragraphs of the standard library of Python"
    return TaskData(
        TASK,
        _examples(texts, topics, train),
        _examples(texts, topics, dev),
        tuple(TOPICS),
        (f"{note} {platform.python_version()}",),
    )


def _examples(texts: list[str], topics: list[str], indices: list[int]) -> Examples:
    ids = {topic: number for number, topic in enumerate(TOPICS)}
    return Examples([texts[i] for i in indices], None, [ids[topics[i]] for i in indices])


def _collect(root: Path) -> Iterator[tuple[str, str]]:
    """(text, topic) of every paragraph that passes the filter, module by module."""
    for topic, modules in TOPICS.items():
        for module in modules:
            package = root / module
            files = sorted(package.rglob("*.py")) if package.is_dir() else [root / f"{module}.py"]
            for file in filter(Path.is_file, files):
                for text in _paragraphs(file):
                    yield text, topic


def _paragraphs(file: Path) -> Iterator[str]:
    for docstring in _docstrings(ast.parse(file.read_bytes())):
        for paragraph in re.split(r"\n\s*\n", docstring):
            text = " ".join(paragraph.split())
            if _is_prose(text):
                yield text


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, class or function and of all that is defined inside."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        # Not expressions, which are most of a tree and define nothing.
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child)


def _is_prose(text: str) -> bool:
    """Enough words, next to all of them plain, and neither a doctest nor a signature."""
    words = text.split()
    plain = sum(
        bool(re.fullmatch(r"[(\"'`]*[A-Za-z][a-z'-]*[)\"'`]*[.,:;!?]*", word)) for word in words
    )
    starts_like_code = re.match(r"[\w.]+\(.*\) *(->|$)|(def|class|import) ", text)
    return (
        len(words) >= _MIN_WORDS
        and plain >= 0.75 * len(words)
        and ">>>" not in text
        and not starts_like_code
    )


def _unambiguous(pairs: Iterator[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Each text once, with its topic; a text under two topics says nothing of either."""
    found: dict[str, set[str]] = {}
    for text, topic in pairs:
        found.setdefault(text, set()).add(topic)
    kept = [(text, *topics) for text, topics in found.items() if len(topics) == 1]
    return [text for text, _ in kept], [topic for _, topic in kept]


def _near_duplicates(texts: list[str]) -> list[list[int]]:
    """Groups of indices: the connected components of "is nearly the same as" (union-find)."""
    shingles = [_shingles(text) for text in texts]
    parent = list(range(len(texts)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    holders: dict[tuple[str, ...], list[int]] = {}
    for index, own in enumerate(shingles):
        shared = Counter(other for shingle in own for other in holders.get(shingle, ()))
        for other, common in shared.items():
            union = len(own) + len(shingles[other]) - common
            shorter = min(len(own), len(shingles[other]))
            if common >= _JACCARD * union or common >= _CONTAINMENT * shorter:
                parent[find(index)] = find(other)
        for shingle in own:
            holders.setdefault(shingle, []).append(index)
    groups: dict[int, list[int]] = {}
    for index in range(len(texts)):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + _SHINGLE]) for i in range(max(len(words) - _SHINGLE + 1, 1))}


def _split(
    groups: list[list[int]], topics: list[str], dev_fraction: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Whole groups to either side, each topic by itself, both sides in random order."""
    train: list[int] = []
    dev: list[int] = []
    rng.shuffle(groups)
    for topic in TOPICS:
        own = [group for group in groups if topics[group[0]] == topic]
        room = round(dev_fraction * sum(map(len, own)))
        for group in own:
            if len(group) <= room:
                dev += group
                room -= len(group)
            else:
                train += group
    rng.shuffle(train)
    rng.shuffle(dev)
    return train, dev
