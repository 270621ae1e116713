"""Weights as the CPU engine reads them: panels whose prefixes are the sub-networks' weights.

A map of K inputs onto columns is stored as panels of 64 columns, K-major inside the panel, in words
of 32 bits (1 float, 2 bf16 or 4 int8 of consecutive K): `[columns / 64, K / group, 64, group]`. A
prefix of the columns is the first panels, a prefix of K the first rows of each panel, so one buffer
serves every width. Where each array lies is decided by the native code (`_cpu.layout`).

int8: weight = scale of its column x int8, so a scale holds for every prefix. Activations are int8 +
128 as unsigned bytes; what the 128 adds to a sum, 128 x the sum of the column's int8 weights, is
kept with the other sign, as running totals over blocks of K, so that every prefix finds its own.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from dynabert_fast.engine.native import DTYPES, native_module
from dynabert_fast.errors import InputError, SaveError
from dynabert_fast.subnet import Subnet

#: Activations of the FFN.
ACTIVATIONS = ("", "gelu", "gelu_tanh", "relu")

PANEL = 64
_GROUP = {"fp32": 1, "bf16": 2, "int8": 4}
_NUMPY = {"f": np.float32, "h": np.uint16, "b": np.int8, "i": np.int32}

_MAGIC = b"DYNABERT"
_VERSION = 1
# magic, version, bytes of the JSON header, CRC-32 of it
_PREAMBLE = struct.Struct("<8sIII")
_PAGE = 4096
_LONGEST_HEADER = 1 << 26
# Linux reads no more than this at one advice where a disk is set up as usual.
_READ_AHEAD = 1 << 17


@dataclass(frozen=True)
class PackedConfig:
    """The shape of a packed model; what `Subnet` needs to know of one, and the tokenizer's user.

    Attributes:
        dtype: One of `DTYPES`.
        activation: Of the FFN: "", "gelu", "gelu_tanh" or "relu".
        vocab_size: Rows of the word embeddings.
        max_position_embeddings: Rows of the position embeddings.
        type_vocab_size: Rows of the token-type embeddings.
        hidden_size: D.
        head_size: d.
        num_labels: Outputs of the classification head, 0 without one.
        first_position: RoBERTa's padding id + 1, 0 for BERT.
        padding_id: The id that RoBERTa's positions do not count, -1 for BERT.
        layer_norm_eps: Added to the variance.
        layer_heads: Heads of each layer.
        layer_neurons: FFN neurons of each layer.
        label_names: Of the classes, may be empty.
    """

    dtype: str
    activation: str
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_size: int
    head_size: int
    num_labels: int
    first_position: int
    padding_id: int
    layer_norm_eps: float
    layer_heads: tuple[int, ...]
    layer_neurons: tuple[int, ...]
    label_names: tuple[str, ...] = field(default=())

    @property
    def max_tokens(self) -> int:
        """Longest sequence that the position embeddings allow."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def of(cls, config: Any, dtype: str, num_labels: int) -> PackedConfig:
        """From a `DynaBertConfig`.

        Raises:
            InputError: The type is unknown.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        padding = (config.pad_token_id or 0) if config.is_roberta else -1
        names = config.id2label or {}
        return cls(
            dtype=dtype,
            activation=config.activation,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            hidden_size=config.hidden_size,
            head_size=config.head_size,
            num_labels=num_labels,
            first_position=padding + 1,
            padding_id=padding,
            layer_norm_eps=config.layer_norm_eps,
            layer_heads=tuple(config.layer_heads),
            layer_neurons=tuple(config.layer_neurons),
            label_names=tuple(str(names.get(i, i)) for i in range(num_labels)),
        )

    @classmethod
    def read(cls, found: Any) -> PackedConfig:
        """From what a file's header says.

        Raises:
            InputError: A field is missing, unknown, or of another type.
        """
        known = {f.name: f.type for f in fields(cls)}
        if not isinstance(found, dict) or set(found) != set(known):
            raise InputError(f"the header must describe {', '.join(known)}")
        values: dict[str, Any] = {}
        for name, kind in known.items():
            value = found[name]
            if kind in ("int", "str"):
                good = type(value) is (int if kind == "int" else str)
            elif kind == "float":
                good = type(value) in (int, float)
            else:
                inner = int if "int" in str(kind) else str
                good = isinstance(value, list) and all(type(v) is inner for v in value)
                value = tuple(value) if good else value
            if not good:
                raise InputError(f"{name} must be of type {kind}, got {value!r:.80}")
            values[name] = value
        config = cls(**values)
        if len(config.label_names) != config.num_labels:
            raise InputError(
                f"there must be {config.num_labels} label_names, got {len(config.label_names)}"
            )
        return config

    def native(self) -> dict[str, Any]:
        """The fields as the native code takes them.

        Raises:
            InputError: A name is unknown, or an integer does not fit 32 bits.
        """
        found = asdict(self)
        for name, known in (("dtype", DTYPES), ("activation", ACTIVATIONS)):
            if found[name] not in known:
                raise InputError(f"{name} must be one of {known}, got {found[name]!r:.80}")
        numbers = [v for v in found.values() if type(v) is int]
        for value in (*numbers, *self.layer_heads, *self.layer_neurons):
            if not -(2**31) <= value < 2**31:
                raise InputError(f"a dimension is out of range: {value}")
        return found


def pack(config: PackedConfig, weight: Callable[[str], np.ndarray]) -> np.ndarray:
    """Pack a model.

    Args:
        config: Its shape.
        weight: float32 array of a parameter, by its name in `DynaBertModel`
            ("pooler.dense.weight"), or "classifier.weight" and "classifier.bias".

    Returns:
        The packed bytes, `[n]` uint8, aligned to 64.
    """
    _cpu = native_module()
    native = config.native()
    buffer = _aligned(_cpu.packed_bytes(native))
    targets: dict[str, np.ndarray] = {}
    blocks: dict[str, int] = {}
    for name, kind, shape, block, offset, size in _cpu.layout(native):
        blocks[name] = block
        targets[name] = buffer[offset : offset + size].view(_NUMPY[kind]).reshape(shape)
    dtype = config.dtype
    for name in ("word", "position", "token_type"):
        _pack_table(dtype, targets, name, weight(f"embeddings.{name}.weight"))
    _pack_norm(targets, "embedding_norm", "embeddings.norm", weight)
    for i in range(len(config.layer_heads)):
        ours, theirs = f"layer.{i}", f"encoder.layer.{i}"
        for name, source, transposed in (
            ("qkv", "attention.qkv", False),
            ("out", "attention.out", True),
            ("up", "ffn.up", False),
            ("down", "ffn.down", True),
        ):
            if transposed:
                matrix = weight(f"{theirs}.{source}.weight_t").T
            else:
                matrix = weight(f"{theirs}.{source}.weight").reshape(-1, config.hidden_size)
            bias = weight(f"{theirs}.{source}.bias").reshape(-1)
            _pack_matrix(dtype, targets, blocks, f"{ours}.{name}", matrix, bias)
        _pack_norm(targets, f"{ours}.attention_norm", f"{theirs}.attention.norm", weight)
        _pack_norm(targets, f"{ours}.ffn_norm", f"{theirs}.ffn.norm", weight)
    pooler = weight("pooler.dense.weight"), weight("pooler.dense.bias")
    _pack_matrix(dtype, targets, blocks, "pooler", *pooler)
    if config.num_labels:
        targets["classifier.weight"][...] = weight("classifier.weight")
        targets["classifier.bias"][...] = weight("classifier.bias")
    return buffer


def _aligned(size: int) -> np.ndarray:
    """Zeroed bytes on a boundary of 64."""
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits (uint16), rounded to nearest even; NaN stays NaN."""
    u = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (u >> np.uint32(16)) & np.uint32(1)
    rounded = (u + np.uint32(0x7FFF) + even) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def quantise_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[R, C]` to int8 and the float32 scale of each row: `values ~ int8 * scale`.

    Raises:
        InputError: A value is not finite.
    """
    top = np.abs(values).max(axis=1, initial=0)
    if not np.isfinite(top).all():
        raise InputError("int8 needs finite weights, and the model has NaN or infinite ones")
    scale = (top / 127).astype(np.float32)
    # Where the inverse would overflow, the row is as good as zero.
    scale[scale < np.finfo(np.float32).tiny] = 0
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.rint(values * inverse[:, None]).clip(-127, 127).astype(np.int8), scale


def _pack_table(dtype: str, targets: Mapping[str, np.ndarray], name: str, rows: np.ndarray) -> None:
    if dtype == "int8":
        targets[f"{name}.rows"][...], targets[f"{name}.scale"][...] = quantise_rows(rows)
    else:
        targets[f"{name}.rows"][...] = to_bf16(rows) if dtype == "bf16" else rows


def _pack_norm(
    targets: Mapping[str, np.ndarray], ours: str, theirs: str, weight: Callable[[str], np.ndarray]
) -> None:
    targets[f"{ours}.weight"][...] = weight(f"{theirs}.weight")
    targets[f"{ours}.bias"][...] = weight(f"{theirs}.bias")


def _pack_matrix(
    dtype: str,
    targets: Mapping[str, np.ndarray],
    blocks: Mapping[str, int],
    name: str,
    matrix: np.ndarray,
    bias: np.ndarray,
) -> None:
    """`[columns, K]` into its panels, with what belongs to them."""
    columns, rows = matrix.shape
    targets[f"{name}.bias"][:columns] = bias
    if dtype == "int8":
        matrix, scale = quantise_rows(matrix)
        targets[f"{name}.scale"][:columns] = scale
        compensation = targets[f"{name}.compensation"]  # [blocks of K, columns padded]
        starts = np.arange(0, rows, blocks[f"{name}.compensation"])
        sums = np.add.reduceat(matrix, starts, axis=1, dtype=np.int32)
        compensation[:, :columns] = -128 * sums.cumsum(1, dtype=np.int32).T
    elif dtype == "bf16":
        matrix = to_bf16(matrix)
    panels = targets[f"{name}.panels"]  # [P, K / group, 64, group]
    count, words, _, group = panels.shape
    whole = np.zeros((count * PANEL, words * group), panels.dtype)
    whole[:columns, :rows] = matrix
    panels[...] = whole.reshape(count, PANEL, words, group).transpose(0, 2, 1, 3)


def used_ranges(config: PackedConfig, subnet: Subnet) -> Iterator[tuple[int, int]]:
    """Offset and size of the packed bytes that a sub-network reads, but for the words' rows."""
    sections = native_module().layout(config.native())
    blocks = {name: block for name, _, _, block, _, _ in sections if block}
    kept = {layer: i for i, layer in enumerate(subnet.layers)}
    for name, _, shape, _, offset, size in sections:
        parts = name.split(".")
        if name == "word.rows" or (parts[0] == "layer" and int(parts[1]) not in kept):
            continue
        if parts[0] != "layer" or parts[-1] != "panels":
            yield offset, size
            continue
        i, matrix = kept[int(parts[1])], parts[2]
        rows, neurons = subnet.heads[i] * config.head_size, subnet.neurons[i]
        extent = {"qkv": 3 * rows, "out": rows, "up": neurons, "down": neurons}[matrix]
        panels, words, columns, group = shape
        bytes_of_word = columns * size // math.prod(shape) * group
        panel = words * bytes_of_word
        if matrix in ("qkv", "up"):
            yield offset, -(-extent // columns) * panel
            continue
        block = blocks.get(f"layer.{parts[1]}.{matrix}.compensation", group)
        used = min(words, -(-extent // block) * block // group) * bytes_of_word
        for p in range(panels):
            yield offset + p * panel, used


def prefetch(config: PackedConfig, packed: np.ndarray, subnet: Subnet) -> None:
    """Have the system read what a sub-network needs of a mapped file, and no more, meanwhile."""
    mapped = getattr(packed.base, "obj", None)  # of the memoryview that numpy keeps
    if not isinstance(mapped, mmap.mmap):
        return
    start = len(mapped) - packed.nbytes
    for offset, size in used_ranges(config, subnet):
        end = start + offset + size
        for begin in range((start + offset) // mmap.PAGESIZE * mmap.PAGESIZE, end, _READ_AHEAD):
            mapped.madvise(mmap.MADV_WILLNEED, begin, min(end - begin, _READ_AHEAD))


def write_file(path: Path, config: PackedConfig, packed: np.ndarray) -> None:
    """Write a packed model beside its place and rename it: a file is whole or absent.

    Layout: 20 bytes (magic, version, size and CRC-32 of the header), the header in JSON, zeros up
    to a page, the packed bytes. Little-endian.

    Raises:
        SaveError: The system refused; an older file of that name is untouched.
    """
    header = json.dumps({"model": asdict(config), "crc32": zlib.crc32(packed.data)}).encode()
    preamble = _PREAMBLE.pack(_MAGIC, _VERSION, len(header), zlib.crc32(header))
    # Short enough where the name itself is as long as a name may be.
    aside = path.parent / f".{path.name[:100]}.{secrets.token_hex(4)}"
    written = False
    try:
        with aside.open("xb") as file:
            written = True
            file.write(preamble + header)
            file.write(b"\0" * (-file.tell() % _PAGE))
            file.write(packed.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        written = False
    except OSError as error:
        raise SaveError(
            f"could not save {path} ({error.strerror or error}); what was there before is intact: "
            "free some space or choose another place"
        ) from error
    finally:
        if written:
            aside.unlink(missing_ok=True)


def read_file(path: Path, *, verify: bool = False) -> tuple[PackedConfig, np.ndarray]:
    """Map a file that `write_file` wrote; pages are read when they are first used.

    Args:
        path: The file.
        verify: Read it all and compare its checksum.

    Returns:
        The shape, and the packed bytes: `[n]` uint8, read-only, on a page's boundary.

    Raises:
        InputError: There is no such file, or it is foreign, truncated or corrupt.
    """
    _cpu = native_module()

    def refuse(why: str) -> InputError:
        return InputError(f"{path} is not a packed model that can be read: {why}; pack it again")

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise refuse("it is not a file")
        if status.st_size < _PREAMBLE.size:
            raise refuse(f"it has {status.st_size} bytes")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Nothing beside a page that is used is read with it: `prefetch` knows what will be.
        mapped.madvise(mmap.MADV_RANDOM)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from error
    size = len(mapped)
    magic, version, length, checksum = _PREAMBLE.unpack_from(mapped)
    if magic != _MAGIC:
        raise refuse("it begins with other bytes than a packed model does")
    if version != _VERSION:
        raise refuse(f"its version is {version}, this library reads {_VERSION}")
    header = mapped[_PREAMBLE.size : _PREAMBLE.size + length] if length <= _LONGEST_HEADER else b""
    if len(header) != length or zlib.crc32(header) != checksum:
        raise refuse("its header is damaged")
    start = _PREAMBLE.size + length
    start += -start % _PAGE
    try:
        found = json.loads(header)
        if not isinstance(found, dict) or set(found) != {"model", "crc32"}:
            raise ValueError("it must have the fields model and crc32")
        config = PackedConfig.read(found["model"])
        expected = _cpu.packed_bytes(config.native())
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is wrong ({error})") from error
    if size != start + expected:
        raise refuse(f"it has {size} bytes where {start + expected} belong")
    packed = np.frombuffer(mapped, np.uint8, expected, start)
    if verify and zlib.crc32(packed.data) != found["crc32"]:
        raise refuse("its checksum differs")
    return config, packed
