"""A packed model's file: whole or absent, mapped, refused with a clear error if it is foreign."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from dynabert_fast.engine import CpuEngine, load
from dynabert_fast.engine.native import native_module
from dynabert_fast.engine.packing import used_ranges
from dynabert_fast.errors import InputError, SaveError
from dynabert_fast.subnet import Subnet

BASE, HEAD = "bert, odd sizes, base", "bert"
PREAMBLE = struct.Struct("<8sIII")
PAGE = 4096
IDS = np.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def engine(make_case, make_engine):
    return make_engine(make_case(BASE), "int8")


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory):
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("whole") / "model.dynabert"
    engine.save(path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.dynabert"


def header_of(data):
    return json.loads(data[PREAMBLE.size :][: PREAMBLE.unpack_from(data)[2]])


def with_header(data, header, magic=b"DYNABERT", version=1):
    """A file with another header, whose checksum is right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = PREAMBLE.size + PREAMBLE.unpack_from(data)[2]
    packed = data[start + -start % PAGE :]
    preamble = PREAMBLE.pack(magic, version, len(text), zlib.crc32(text))
    return preamble + text + b"\0" * (-(len(preamble) + len(text)) % PAGE) + packed


# --- there and back -------------------------------------------------------------------------------


def test_round_trip(case, dtype, make_engine, path, same):
    engine = make_engine(case, dtype)
    engine.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for verify in (False, True):
        loaded = load(str(path), threads=2, verify=verify)
        assert loaded.config == engine.config
        assert loaded.threads == 2
        assert same(loaded._packed, engine._packed)
        assert not loaded._packed.flags.writeable
        for subnet in case.subnets().values():
            assert same(loaded(IDS, subnet=subnet), engine(IDS, subnet=subnet))
    again = path.with_name("again")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_bytes_of_a_file(engine, whole):
    """One page of header, then the weights."""
    assert len(whole) == PAGE + engine.nbytes
    found = header_of(whole)
    assert found["crc32"] == zlib.crc32(engine._packed)
    assert found["model"]["layer_neurons"] == [301] * 4
    assert with_header(whole, found) == whole


def test_label_names(make_model, path):
    names = {0: "schlecht", 1: "gut", 2: "größer \U0001f600"}
    model = make_model()
    model.config.id2label = names
    model.pack().save(path)
    assert load(path).config.label_names == tuple(names.values())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_file_mode(engine, path, mask, mode):
    before = os.umask(mask)
    try:
        engine.save(path)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_saving_over_a_file_that_is_in_use(make_case, make_engine, path, same):
    old, new = (make_engine(make_case(BASE), dtype) for dtype in ("int8", "bf16"))
    old.save(path)
    loaded = load(path)
    new.save(path)
    assert same(load(path)(IDS), new(IDS))
    assert same(loaded(IDS), old(IDS))
    # And over its own.
    loaded = load(path)
    loaded.save(path)
    assert same(loaded(IDS), new(IDS))
    assert same(load(path, verify=True)(IDS), new(IDS))
    path.unlink()
    assert same(loaded(IDS), new(IDS))


def test_many_writers_of_one_file(make_case, make_engine, path, same):
    engines = [make_engine(make_case(BASE), dtype) for dtype in ("fp32", "bf16", "int8")]

    def write(engine):
        for _ in range(5):
            engine.save(path)

    threads = [threading.Thread(target=write, args=(e,)) for e in engines for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found = load(path, verify=True)
    (writer,) = (e for e in engines if e.config == found.config)
    assert same(found(IDS), writer(IDS))


# --- a write that fails ---------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size):
    """Files cannot grow beyond it, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def failing(name, error):
    def fail(*args, **kwargs):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
FAILURES = {
    "full disk": lambda: file_size_limit(10_000),
    "full disk, header": lambda: file_size_limit(100),
    "flush": lambda: failing("fsync", NO_SPACE),
    "rename": lambda: failing("replace", OSError(errno.EROFS, "Read-only file system")),
}


@pytest.mark.parametrize("earlier", [True, False], ids=["earlier file", "no file"])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_failing_write_leaves_what_was_there(engine, path, failure, earlier):
    if earlier:
        path.write_bytes(b"precious")
    with pytest.raises(SaveError, match="what was there before is intact") as caught, failure():
        engine.save(path)
    assert str(path) in str(caught.value)
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == (
        [(path.name, b"precious")] if earlier else []
    )


def test_an_interrupted_write_leaves_what_was_there(engine, path):
    path.write_bytes(b"precious")
    with pytest.raises(KeyboardInterrupt), failing("fsync", KeyboardInterrupt()):
        engine.save(path)
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [(path.name, b"precious")]


def test_places_that_cannot_be_written(engine, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for place in ("no/where", "folder", "file/model", "x" * 300, "."):
        with pytest.raises(SaveError, match="could not save"):
            engine.save(tmp_path / place)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "inner"]
    engine.save(tmp_path / ("x" * 255))  # the longest name there is
    assert load(tmp_path / ("x" * 255)).config == engine.config


# --- files that are refused -----------------------------------------------------------------------


def edited(**changes):
    """A header with other fields of the model."""

    def edit(data):
        header = header_of(data)
        header["model"].update(changes)
        return with_header(data, header)

    return edit


def flip(at):
    return lambda data: data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


FOREIGN = {
    "empty": (lambda d: b"", "it has 0 bytes"),
    "a few bytes": (lambda d: d[:19], "it has 19 bytes"),
    "text": (lambda d: b"a film, a plot, a cast\n" * 99, "begins with other bytes"),
    "zeros": (lambda d: bytes(len(d)), "begins with other bytes"),
    "zip": (lambda d: b"PK\3\4" + d[4:], "begins with other bytes"),
    "other magic": (lambda d: with_header(d, header_of(d), magic=b"DYNABERU"), "other bytes"),
    "newer": (lambda d: with_header(d, header_of(d), version=2), "version is 2, .* reads 1"),
    "half a header": (lambda d: d[:200], "its header is damaged"),
    "no weights": (lambda d: d[:PAGE], r"it has 4096 bytes where \d+ belong"),
    "last byte missing": (lambda d: d[:-1], r"it has \d+ bytes where \d+ belong"),
    "a byte too many": (lambda d: d + b"\0", r"it has \d+ bytes where \d+ belong"),
    "damaged header": (flip(100), "its header is damaged"),
    "damaged checksum": (flip(16), "its header is damaged"),
    "huge header": (lambda d: d[:12] + b"\xff" * 8 + d[20:], "its header is damaged"),
    "header of 64 MB": (lambda d: d[:12] + b"\0\0\0\4" + d[16:], "its header is damaged"),
    "no JSON": (lambda d: with_header(d, b"{"), "its header is wrong"),
    "no text": (lambda d: with_header(d, b"\xff\xfe\xff"), "its header is wrong"),
    "empty header": (lambda d: with_header(d, b""), "its header is wrong"),
    "a list": (lambda d: with_header(d, [1]), "must have the fields model and crc32"),
    "a number": (lambda d: with_header(d, 3), "must have the fields model and crc32"),
    "no checksum": (
        lambda d: with_header(d, {"model": header_of(d)["model"]}),
        "must have the fields model and crc32",
    ),
    "no model": (
        lambda d: with_header(d, {"model": None, "crc32": 0}),
        "the header must describe dtype, ",
    ),
    "nested": (lambda d: with_header(d, b"[" * 10**6), "its header is wrong"),
    "nested objects": (lambda d: with_header(d, b'{"a":' * 10**5), "its header is wrong"),
    "endless number": (
        lambda d: with_header(d, b'{"model":' + b"9" * 10**5 + b', "crc32":1}'),
        "its header is wrong",
    ),
    "a field missing": (
        lambda d: with_header(d, {"model": {"dtype": "int8"}, "crc32": 0}),
        "the header must describe dtype, ",
    ),
    "an unknown field": (edited(experts=8), "the header must describe dtype, "),
    "unknown type": (edited(dtype="int4"), "dtype must be one of .* got 'int4'"),
    "a surrogate": (edited(dtype="\ud800"), "dtype must be one of"),
    "unknown activation": (edited(activation="silu"), "activation must be one of .* got 'silu'"),
    "another surrogate": (edited(activation="\udfff"), "activation must be one of"),
    "text for a number": (edited(hidden_size="77"), "hidden_size must be of type int, got '77'"),
    "float for a number": (edited(hidden_size=77.0), "hidden_size must be of type int, got 77.0"),
    "bool for a number": (edited(num_labels=False), "num_labels must be of type int, got False"),
    "nothing for a number": (edited(head_size=None), "head_size must be of type int, got None"),
    "a number for a list": (edited(layer_heads=4), "layer_heads must be of type .*, got 4"),
    "a text in a list": (edited(layer_heads=["4"] * 4), "layer_heads must be of type"),
    "too large": (edited(vocab_size=2**31), "out of range: 2147483648"),
    "far too large": (edited(hidden_size=10**400), "out of range: 1000"),
    "far too large a float": (edited(layer_norm_eps=10**400), "out of range: 1000"),
    "a large product": (edited(vocab_size=2**24, hidden_size=2**16), "bytes where .* belong"),
    "negative": (edited(vocab_size=-1), "vocab_size must be in 1 to .*, got -1"),
    "none": (edited(hidden_size=0), "hidden_size must be in 1 to .*, got 0"),
    "NaN": (edited(layer_norm_eps=float("nan")), "layer_norm_eps must be in 0 to 1"),
    "infinity": (edited(layer_norm_eps=float("inf")), "layer_norm_eps must be in 0 to 1"),
    "no layer": (edited(layer_heads=[], layer_neurons=[]), "num_hidden_layers must be in 1 to"),
    "layers that differ": (edited(layer_neurons=[301] * 3), "must be given for each layer"),
    "layer of nothing": (edited(layer_heads=[4, 0, 4, 4]), "heads of a layer must be in 1 to"),
    "another size": (edited(hidden_size=78), r"it has \d+ bytes where \d+ belong"),
    "positions": (edited(first_position=78), "first_position must be in 0 to 77, got 78"),
    "names of no class": (edited(label_names=["a"]), "there must be 0 label_names, got 1"),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_file(whole, path, change, message):
    path.write_bytes(change(whole))
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path} is not a packed model that can be read: ")
    assert str(caught.value).endswith("; pack it again")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for place, message in (
        ("nowhere", "cannot read .*nowhere: No such file or directory"),
        ("x" * 300, "File name too long"),
        ("loop", "symbolic links"),
        (".", "it is not a file"),
        ("pipe", "it is not a file"),
        ("/dev/zero", "it is not a file"),
        ("a\0b", "null"),
    ):
        with pytest.raises(InputError, match=message):
            load(tmp_path / place)


def test_verify(engine, whole, path, same):
    """A damaged weight is seen where it is asked for; without, the file opens and runs."""
    for at in (PAGE, len(whole) // 2, len(whole) - 1):
        path.write_bytes(flip(at)(whole))
        with pytest.raises(InputError, match="its checksum differs"):
            load(path, verify=True)
        assert load(path)(IDS) is not None
    path.write_bytes(with_header(whole, header_of(whole) | {"crc32": "0"}))
    with pytest.raises(InputError, match="its checksum differs"):
        load(path, verify=True)
    assert same(load(path)(IDS), engine(IDS))


@pytest.mark.parametrize("script", ["fuzz_files.py", "fuzz_calls.py"])
@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("layers that differ", "int8", 1),
        pytest.param("layers that differ", "fp32", 4, marks=pytest.mark.slow),
        pytest.param(HEAD, "bf16", 4, marks=pytest.mark.slow),
        pytest.param(HEAD, "int8", 4, marks=pytest.mark.slow),
    ],
)
def test_fuzz(make_case, make_engine, path, environment, script, name, dtype, count):
    """In a process of its own: a crash is a red test and no more."""
    make_engine(make_case(name), dtype).save(path)
    command = [str(Path(__file__).with_name(script)), str(path), str(count)]
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


# --- what is read ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(make_model, tmp_path_factory):
    """A file of 24 MB, most of it layers, as in a real model."""
    model = make_model(
        base=True,
        hidden_size=384,
        num_attention_heads=12,
        num_hidden_layers=12,
        intermediate_size=1536,
        vocab_size=4000,
        max_position_embeddings=128,
    )
    path = tmp_path_factory.mktemp("large") / "model.dynabert"
    model.pack("int8").save(path)
    return path


def cached(engine):
    """Pages of an engine's file that the system has read."""
    array = engine._packed
    start = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.ctypes.data + array.nbytes - start
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), pages) == 0
    return sum(page & 1 for page in pages)


@pytest.fixture
def cold(large):
    """`cold()`: an engine of a file that the system has to read anew."""

    def open_it():
        descriptor = os.open(large, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        engine = load(large, threads=1)
        if cached(engine) > 0.1 * engine.nbytes / mmap.PAGESIZE:
            pytest.skip("this file system does not drop a file from its cache")
        return engine

    return open_it


@pytest.mark.parametrize(("width", "depth"), [(0.25, 0.5), (0.75, 0.5), (1, 1)])
def test_only_the_used_prefix_is_read(cold, width, depth):
    """From the disk, the rows of the words and what `used_ranges` says, rounded out to pages."""
    engine = cold()
    before = cached(engine)
    subnet = Subnet.from_multipliers(engine.config, width, depth)
    ids = np.arange(0, 3200, 100)[None]
    assert np.isfinite(engine(ids, subnet=subnet).last_hidden_state).all()
    read = cached(engine) - before
    ranges = list(used_ranges(engine.config, subnet))
    used = sum(size for _, size in ranges) / mmap.PAGESIZE
    assert used - before <= read <= used + 2 * len(ranges) + 2 * ids.size
    # The layers' weights are a prefix in each dimension.
    layers = 12 * (4 * 384**2 + 2 * 384 * 1536) / mmap.PAGESIZE
    assert used < 1.1 * (width * depth * layers) + 0.05 * layers


def test_a_sub_network_finds_what_was_read_for_it(cold):
    """No page is waited for that could have been known: a longer text reads no more."""
    engine = cold()
    subnet = Subnet.from_multipliers(engine.config, 0.5, 0.5)
    engine(np.array([[7]]), subnet=subnet)
    before = cached(engine)
    engine(np.full((3, 128), 7), subnet=subnet)
    assert cached(engine) == before


def test_a_file_is_not_read_to_be_opened(cold):
    engine = cold()
    assert cached(engine) < 0.02 * engine.nbytes / mmap.PAGESIZE


def test_nothing_else_is_used(case, dtype, make_engine, same):
    """All bytes but those of the words and of `used_ranges` may be anything."""
    engine = make_engine(case, dtype)
    sections = {s[0]: s for s in native_module().layout(engine.config.native())}
    *_, words, size = sections["word.rows"]
    for subnet in case.subnets().values():
        noise = np.full(engine.nbytes + 64, 0xFF, np.uint8)  # NaN as bf16 and as float32
        start = -noise.ctypes.data % 64
        noise = noise[start : start + engine.nbytes]
        for at, count in (*used_ranges(engine.config, subnet), (words, size)):
            assert (noise[at : at + count] == 0xFF).all()  # no range twice
            noise[at : at + count] = engine._packed[at : at + count]
        alike = CpuEngine(engine.config, noise, threads=1)
        assert same(alike(IDS, subnet=subnet), engine(IDS, subnet=subnet))
