"""The token store of pretraining: texts encoded once, kept in a memory-mapped file, and read in windows of equal length."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from litgpt.errors import UserError, disk_error
from litgpt.files import check_readable, is_file, read_bytes, read_json
from litgpt.names import PARTIAL, TOKENIZER_FILES
from litgpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 1  # part of every key, so that a new layout is never mistaken for an old one
INDEX = "index.json"
TOKENS = "tokens.bin"
DTYPES = {"uint16": torch.uint16, "uint32": torch.uint32}
STARTS = "documents.bin"  # int64: where each document begins
MAX_HELD_OUT = 2**20  # tokens; more of them cost time and say nothing new
FEW_WINDOWS = 8  # from here on, dropping less than one window does not matter

Encoded = tuple[Sequence[int], Sequence[int]]  # ids, and the places among them where a document begins


class TokenStore:
    """The tokens of many documents, one after the other, in a folder that is written once and then only read.

    Attributes:
        folder: Where it lies.
        documents: int64, (number of documents,): the place of each one's first token.
    """

    def __init__(self, folder: Path) -> None:
        """Open a store. Nothing is read yet; several processes share one copy in memory.

        Raises:
            UserError: It is damaged.
        """
        self.folder = Path(folder)
        index = read_json(self.folder / INDEX, way=f"Delete {self.folder}; it is built anew from the texts.")
        self._n_tokens = index.get("n_tokens")
        self._tokens = self._mapped(TOKENS, DTYPES.get(str(index.get("dtype"))), self._n_tokens)
        self.documents = self._mapped(STARTS, torch.int64, index.get("n_documents"))

    def _mapped(self, name: str, dtype: torch.dtype | None, size: Any) -> Tensor:
        """Return the numbers in a file, which has to hold as many as the index says."""
        file = self.folder / name
        if dtype is None or type(size) is not int or size < 1 or not is_file(file) or file.stat().st_size != size * dtype.itemsize:
            raise UserError(f"The token store {self.folder} is damaged. Delete it; it is built anew from the texts.")
        check_readable(file)
        return torch.from_file(str(file), shared=False, size=size, dtype=dtype)

    def __len__(self) -> int:
        return self._n_tokens

    def __reduce__(self) -> tuple:
        return TokenStore, (self.folder,)  # a worker opens the files instead of receiving them

    def read(self, start: int, end: int) -> Tensor:
        """The tokens from `start` up to `end`, int64, (end - start,)."""
        return self._tokens[start:end].to(torch.int64)

    def document_lengths(self, start: int, end: int) -> list[int]:
        """How many of the tokens from `start` up to `end` belong to each of the documents they come from; the sum is `end - start`."""
        first, last = torch.searchsorted(self.documents, torch.tensor([start, end]), right=False).tolist()
        inner = [place for place in self.documents[first:last].tolist() if place > start]
        return [after - before for before, after in zip([start, *inner], [*inner, end])]


class TokenDataset(Dataset):
    """Windows of a store: sample i is an int64 tensor of `length` + 1 tokens, the first `length` being inputs, the last `length` targets.

    Windows lie side by side, so that each token is a target once; a last piece shorter than a window is left out.

    Args:
        store: The tokens.
        length: How many targets a window has.
        start: The first token that belongs to the data set.
        end: The token after the last one that does. By default all to the end.
    """

    def __init__(self, store: TokenStore, length: int, start: int = 0, end: int | None = None) -> None:
        self.store = store
        self.length = length
        self.start = start
        self.end = len(store) if end is None else end

    def __len__(self) -> int:
        return max(0, (self.end - self.start - 1) // self.length)

    def __getitem__(self, index: int) -> Tensor:
        start, end = self._span(index)
        return self.store.read(start, end)

    def document_lengths(self, index: int) -> list[int]:
        """How many tokens of window `index` belong to each of the documents in it; the sum is `length` + 1."""
        return self.store.document_lengths(*self._span(index))

    def _span(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = self.start + index % len(self) * self.length
        return start, start + self.length + 1


def held_out_from(n_tokens: int, length: int) -> int:
    """The place where the tail begins that is kept for validation: 5 %, but at least a window of `length` if that is at most a tenth.

    Args:
        n_tokens: All tokens.
        length: The length of a window.
    """
    window = min(length + 1, n_tokens // 10)
    return n_tokens - max(2, window, min(n_tokens // 20, MAX_HELD_OUT))


def fitting_length(n_tokens: int, length: int) -> int:
    """The length of windows, at most `length`, that leaves out next to nothing of few tokens.

    Args:
        n_tokens: The tokens to cut up.
        length: The greatest length.
    """
    n_windows = -(-(n_tokens - 1) // length)
    return length if n_windows > FEW_WINDOWS else (n_tokens - 1) // n_windows


def store_key(files: Sequence[Path], tokenizer: Tokenizer, settings: dict[str, Any]) -> str:
    """A name for the tokens of these files: another one as soon as a file, the tokenizer or a setting changes.

    Args:
        files: Known by their names, sizes and times of change.
        tokenizer: Known by the contents of its files.
        settings: Whatever else decides what the tokens are; must be JSON.
    """
    known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps([FORMAT, known, settings, tokenizer.bos_id, tokenizer.eos_id, tokenizer.use_bos]).encode())
    for name in TOKENIZER_FILES:
        path = tokenizer.checkpoint_dir / name
        if is_file(path):
            digest.update(name.encode() + b"\0" + hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()[:20]


def open_store(
    place: Path, key: str, jobs: Sequence[Any], encode: Callable[[Any], Encoded], *, vocab_size: int, num_workers: int = 0
) -> TokenStore:
    """The store of that key, built if it is not there. It appears whole or not at all, also where several processes build it at once.

    Args:
        place: The folder that holds stores. If it cannot be written, one in the system's folder for temporary files is used.
        key: The store's name, from `store_key`.
        jobs: What to encode, in this order.
        encode: Turns one job into ids and the places where documents begin. Must be picklable with `num_workers`.
        vocab_size: Decides whether a token takes two bytes or four.
        num_workers: How many processes encode; 0 encodes in this one.

    Raises:
        UserError: There is nothing in the texts, or no room to write.
    """
    name = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:8]  # a key knows its files' names, but not their folder
    spare = Path(tempfile.gettempdir()) / f"litgpt-tokens-{getattr(os, 'getuid', int)()}" / name
    for folder in (place, spare):
        if is_file(folder / key / INDEX):
            return TokenStore(folder / key)
    unfinished = _new_folder(place, spare, f"{key}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        _fill(unfinished, jobs, encode, vocab_size, num_workers)
        return _publish(unfinished, unfinished.parent / key)
    except OSError as error:
        if message := disk_error(error):
            raise UserError(f"Tokens cannot be written to {unfinished.parent}: {message}") from None
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _new_folder(place: Path, spare: Path, name: str) -> Path:
    try:
        (place / name).mkdir(parents=True)
        return place / name
    except OSError as error:
        log.warning("%s cannot be written (%s), so the tokens go to %s.", place, error.strerror, spare)
    try:
        (spare / name).mkdir(parents=True)
        return spare / name
    except OSError as error:
        why = disk_error(error) or f"{error.strerror}. Copy the texts elsewhere."
        raise UserError(f"Tokens can be written neither to {place} nor to {spare}: {why}") from None


def _publish(unfinished: Path, target: Path) -> TokenStore:
    try:
        unfinished.rename(target)
    except OSError:
        if not is_file(target / INDEX):
            raise
        # another process was faster, and wrote the same
    return TokenStore(target)


def _fill(folder: Path, jobs: Sequence[Any], encode: Callable[[Any], Encoded], vocab_size: int, num_workers: int) -> None:
    """Write all files of a store, the index last."""
    narrow = vocab_size <= 2**16
    try:
        n_tokens, starts = _write_tokens(folder / TOKENS, "H" if narrow else "I", jobs, encode, num_workers)
    except OverflowError:  # tokens that were added beyond the vocabulary
        narrow = False
        n_tokens, starts = _write_tokens(folder / TOKENS, "I", jobs, encode, num_workers)
    if n_tokens == 0:
        raise UserError("There is no text in the files to make tokens of.")
    _write(folder / STARTS, starts.tobytes())
    index = {"dtype": "uint16" if narrow else "uint32", "n_tokens": n_tokens, "n_documents": len(starts)}
    _write(folder / INDEX, json.dumps(index).encode())


def _write_tokens(path: Path, typecode: str, jobs: Sequence[Any], encode: Callable[[Any], Encoded], num_workers: int) -> tuple[int, array]:
    n_tokens, starts = 0, array("q")
    with open(path, "wb") as file:
        for ids, firsts in _encoded(jobs, partial(_packed, encode=encode, typecode=typecode), num_workers):
            starts.extend(n_tokens + first for first in firsts)
            ids.tofile(file)
            n_tokens += len(ids)
        file.flush()
        os.fsync(file.fileno())
    return n_tokens, starts


def _packed(job: Any, encode: Callable[[Any], Encoded], typecode: str) -> tuple[array, Sequence[int]]:
    ids, starts = encode(job)
    return array(typecode, ids), starts


def _encoded(jobs: Sequence[Any], encode: Callable[[Any], tuple], num_workers: int) -> Iterator[tuple[array, Sequence[int]]]:
    """What `encode` makes of each job, in their order."""
    if num_workers < 2 or len(jobs) < 2:
        yield from map(encode, jobs)
        return
    with ProcessPoolExecutor(min(num_workers, len(jobs)), initializer=_begin_worker, initargs=(encode,)) as pool:
        yield from pool.map(_in_worker, jobs)


def _begin_worker(encode: Callable[[Any], tuple]) -> None:
    global _encode  # sent once to each process, instead of with every job
    _encode = encode


def _in_worker(job: Any) -> tuple[array, Sequence[int]]:
    return _encode(job)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
