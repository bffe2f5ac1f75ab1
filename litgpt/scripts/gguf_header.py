"""Read what a GGUF file says before its weights, and believe no number in it that the file's size does not bear out.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from codecs import iterdecode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litgpt.errors import MissingFile, UserError, optional
from litgpt.files import check_readable, is_file

MAGIC = b"GGUF"
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> its code in `struct`
STRING, ARRAY = 8, 9
LEAST_ENTRY = 13  # bytes: the length of a key, a type, and one byte
LEAST_TENSOR = 32  # bytes: the length of a name, a number of dimensions and one of them, a type, an offset
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**16
PIECE = 2**16  # how many bytes of a text are decoded at a time


@dataclass(frozen=True)
class StoredTensor:
    """Where one weight lies."""

    name: str
    shape: tuple[int, ...]
    """The outermost dimension first, as torch has it."""
    kind: Any
    """How its numbers are stored: a `gguf.GGMLQuantizationType`."""
    begin: int
    """Its first byte in the file."""
    n_bytes: int


class Metadata:
    """The entries before the weights. Each getter raises a `UserError` where an entry is of another type."""

    def __init__(self, path: Path, entries: dict[str, Any]) -> None:
        self.path = path
        self.entries = entries

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a text, or the default where there is none."""
        return self._checked(key, default, str, "a text")

    def flag(self, key: str, default: bool) -> bool:
        """Return whether something is so."""
        return self._checked(key, default, bool, "true or false")

    def number(self, key: str, default: Any = None) -> Any:
        """Return a finite number; one that is stored in fp32 as the shortest decimal number that is the same there."""
        value = self.entries.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{self.path} gives {key} = {_shown(value)}, but one number is needed there.")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of texts, which is empty where there is none."""
        value = self.entries.get(key, [])
        if not isinstance(value, list):
            raise UserError(f"{self.path} gives {key} = {_shown(value)}, but a list of texts is needed there.")
        return value

    def numbers(self, key: str) -> list[Any] | None:
        """Return a list of numbers, or None where there is none."""
        value = self.entries.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise UserError(f"{self.path} gives {key} = {_shown(value)}, but a list of numbers is needed there.")
        return None if value is None else value.tolist()

    def _checked(self, key: str, default: Any, kind: type, wanted: str) -> Any:
        value = self.entries.get(key, default)
        if value is not default and not isinstance(value, kind):
            raise UserError(f"{self.path} gives {key} = {_shown(value)}, but {wanted} is needed there.")
        return value


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself, and its bytes, which are read where they are looked at."""

    path: Path
    metadata: Metadata
    tensors: dict[str, StoredTensor]
    data: np.ndarray

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its weights."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights in fp32, one after the other."""
        for name in self.tensors:
            yield name, self.weight(name)

    def weight(self, name: str) -> Tensor:
        """Return one weight in fp32.

        Raises:
            UserError: The package `gguf` cannot undo how it is stored.
        """
        gguf, tensor = optional("gguf", "gguf"), self.tensors[name]
        stored = self.data[tensor.begin : tensor.begin + tensor.n_bytes].reshape(*tensor.shape[:-1], -1)
        try:
            values = gguf.dequantize(stored, tensor.kind)
        except NotImplementedError:
            kind = tensor.kind.name
            raise UserError(f"The weight {name!r} of {self.path} is stored as {kind}, which the package `gguf` cannot read.") from None
        return torch.from_numpy(values if values.flags.writeable else values.copy())


def read_header(path: Path) -> Header:
    """Return what a GGUF file says before its weights.

    Raises:
        MissingFile: There is no such file.
        UserError: It is cut off, damaged, or something else.
    """
    if not is_file(path):
        raise MissingFile(f"There is no GGUF file {str(path)!r}.")
    check_readable(path)
    size = path.stat().st_size
    data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)
    reader = _Reader(path, data)
    if size < 24 or bytes(data[:4]) != MAGIC:
        raise reader.damaged("it does not begin as one")
    reader.position = 4
    version = reader.number("I")
    if version not in (2, 3):
        raise reader.damaged(f"its version is {version}, but 2 and 3 are read, in little-endian order")
    n_tensors, n_entries = reader.number("Q"), reader.number("Q")
    entries = reader.entries(n_entries)
    tensors = reader.tensors(n_tensors, _alignment(reader, entries))
    return Header(path, Metadata(path, entries), tensors, data)


class _Reader:
    """Reads a file from front to back; a count is compared with the bytes that are left before anything is made of it."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.view, self.position = path, data, memoryview(data), 0

    def damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is cut off, damaged or no GGUF file: {reason}. Delete it and download it again.")

    def room(self, count: int, least: int, of: str) -> None:
        """Refuse a count of things that would not fit into the rest of the file."""
        if count * least > len(self.view) - self.position:
            raise self.damaged(f"it ends before {of}")

    def number(self, code: str) -> Any:
        self.room(1, struct.calcsize(code), "its header does")
        (value,) = struct.unpack_from(f"<{code}", self.view, self.position)
        self.position += struct.calcsize(code)
        return _shortest(value) if code == "f" else value

    def text(self) -> str:
        length = self.number("Q")
        self.room(length, 1, "a text in its header does")
        begin, self.position = self.position, self.position + length
        try:
            if length <= PIECE:
                return str(self.view[begin : self.position], "utf-8")
            pieces = (self.view[i : min(i + PIECE, self.position)] for i in range(begin, self.position, PIECE))
            return "".join(iterdecode(pieces, "utf-8"))  # a wrong length may make a text of all weights, and fails in the first piece
        except UnicodeDecodeError:
            raise self.damaged("a text in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise self.damaged(f"an entry of its header is of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            self.room(count, 8, "a list in its header does")
            return [self.text() for _ in range(count)]
        if inner not in NUMBERS:
            raise self.damaged(f"a list in its header is of the unknown type {inner}")
        dtype = np.dtype(f"<{NUMBERS[inner]}" if inner != 7 else "?")
        self.room(count, dtype.itemsize, "a list in its header does")
        values = np.frombuffer(self.view, dtype, count, self.position) if count else np.empty(0, dtype)
        self.position += count * dtype.itemsize
        return values

    def entries(self, count: int) -> dict[str, Any]:
        self.room(count, LEAST_ENTRY, "its header does")
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.text()
            if key in found:
                raise self.damaged(f"its header gives {_shown(key)} twice")
            found[key] = self.value(self.number("I"))
        return found

    def tensors(self, count: int, alignment: int) -> dict[str, StoredTensor]:
        self.room(count, LEAST_TENSOR, "its list of weights does")
        listed = [self.tensor() for _ in range(count)]
        begin = -(-self.position // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        end = begin
        for name, shape, kind, offset in sorted(listed, key=lambda item: item[3]):
            n_bytes = self.size(name, shape, kind)
            if name in found:
                raise self.damaged(f"it holds the weight {_shown(name)} twice")
            if offset % alignment or begin + offset < end:
                raise self.damaged(f"the weight {_shown(name)} lies inside of another")
            end = begin + offset + n_bytes
            if end > len(self.view):
                raise self.damaged(f"it ends before the weight {_shown(name)} does")
            found[name] = StoredTensor(name, shape, kind, begin + offset, n_bytes)
        if not found:
            raise self.damaged("it holds no weights")
        return {name: found[name] for name, *_ in listed}

    def tensor(self) -> tuple[str, tuple[int, ...], Any, int]:
        name, n_dimensions = self.text(), self.number("I")
        if not 0 < n_dimensions <= MAX_DIMENSIONS:
            raise self.damaged(f"the weight {_shown(name)} has {n_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dimensions))[::-1]
        kinds, kind = optional("gguf", "gguf").GGMLQuantizationType, self.number("I")
        if kind not in list(kinds):
            raise self.damaged(f"the weight {_shown(name)} is stored in the unknown way {kind}")
        return name, shape, kinds(kind), self.number("Q")

    def size(self, name: str, shape: tuple[int, ...], kind: Any) -> int:
        per_block, n_bytes = optional("gguf", "gguf").GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % per_block:
            raise self.damaged(f"the weight {_shown(name)} has the shape {shape}, which {kind.name} cannot have")
        return math.prod(shape) // per_block * n_bytes


def _alignment(reader: _Reader, entries: dict[str, Any]) -> int:
    value = entries.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise reader.damaged(f"its weights are aligned to {_shown(value)} bytes")
    return value


def _shown(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) and value.size < 10 else value)
    return text if len(text) < 60 else f"{text[:60]}..."


def _shortest(value: float) -> float:
    """Return the shortest decimal number that is the same in fp32."""
    if not math.isfinite(value):
        return value
    return next(short for digits in range(1, 18) if float(np.float32(short := float(f"{value:.{digits}g}"))) == value)
