"""Finetuning samples from files of one's own: JSON, JSON lines, Parquet, CSV, each also compressed."""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.data.base import SFTModule, split
from litgpt.data.records import Record, messages_of, without_nulls
from litgpt.errors import MissingFile, UserError, optional
from litgpt.files import is_file, is_folder, read_bytes

log = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
COMPRESSED = (".gz", ".zst")
DEFAULT_FRACTION = 0.05
LONGEST_CELL = 2**31 - 1  # characters, all that a C long holds everywhere

Read = tuple[list[str], list]  # where each record stands, for messages, and the records


@dataclass(eq=False)
class JSON(SFTModule):
    """Samples from your own files: `instruction`, `output` and maybe `input`, or `messages` with `role` and `content`."""

    json_path: Path
    """A `.json` (a list), `.jsonl` (a sample a line), `.parquet` or `.csv` file, which may be compressed (`.gz`, `.zst`), or a folder
    with the files `train` and `val` of such a type."""
    val_split_fraction: float | None = None
    """The share of a single file's samples to validate on. By default 0.05. At least one sample is held out, unless it is 0."""

    def prepare_data(self) -> None:
        """Check what can be checked at once: that the files are there and belong to one of the two layouts."""
        find_files(self.json_path, self.val_split_fraction, "json_path")

    def records(self) -> tuple[list[Record], list[Record]]:
        """The samples to train on and those to validate on."""
        return load_splits(*find_files(self.json_path, self.val_split_fraction, "json_path"), self.val_split_fraction, self.seed)


def find_files(path: Path, val_split_fraction: float | None, option: str) -> tuple[Path, Path | None]:
    """The file of samples to train on and that of samples to validate on, which is None if they are one file.

    Args:
        path: A file, or a folder with both.
        val_split_fraction: Which share of one file to validate on.
        option: What the path is called.

    Raises:
        MissingFile: There is no such file.
        UserError: It is of no kind that is read, or there is a fraction although there are two files.
    """
    path = Path(path)
    if is_folder(path):
        if val_split_fraction is not None:
            raise UserError(f"{path} is a folder with its own `val` file, so `val_split_fraction` has no meaning. Leave it out.")
        return _find(path, "train"), _find(path, "val")
    if not path.exists():
        raise MissingFile(f"There is no file or folder {path}. `{option}` must name a {_any_of(SUFFIXES)} file, or a folder with two.")
    _reader(path)
    return path, None


def load_splits(
    train: Path,
    val: Path | None,
    val_split_fraction: float | None,
    seed: int,
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> tuple[list[Record], list[Record]]:
    """The samples to train on and those to validate on, of two files or of one.

    Args:
        train: The first file.
        val: The second, if there are two.
        val_split_fraction: Which share of one file to validate on; by default 0.05.
        seed: Decides which.
        convert: Makes each record what `messages_of` reads.

    Raises:
        UserError: As `load_split` and `split`.
    """
    samples = load_split(train, convert)
    if val is not None:
        return samples, load_split(val, convert)
    if val_split_fraction is None:
        val_split_fraction = DEFAULT_FRACTION
        log.warning("`val_split_fraction` is not set: validating on %s of %s.", val_split_fraction, train)
    try:
        return split(samples, val_split_fraction, seed)
    except UserError as error:
        raise UserError(f"{train}: {error}") from None


def load_split(json_path: Path, convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None) -> list[Record]:
    """The samples of one file, each checked. Each knows its place, for what only the prompt style can find wrong with it.

    Args:
        json_path: A `.json`, `.jsonl`, `.parquet` or `.csv` file, which may be compressed.
        convert: Makes each record what `messages_of` reads.

    Raises:
        UserError: The file cannot be read as what its name says, is empty, or a record misses a key; which one is said.
    """
    path = Path(json_path)
    read = _reader(path)
    if not is_file(path):
        raise MissingFile(f"There is no file {path}.")
    places, records = read(path)
    if not records:
        raise UserError(f"{path} is empty: it has no records.")
    placed = []
    for place, record in zip(places, records):
        try:
            record = record if convert is None else convert(record)
            messages_of(record)
        except UserError as error:
            raise UserError(f"{path}, {place}: {error}") from None
        placed.append(Record(record))
        placed[-1].place = f"{path}, {place}"
    return placed


def read_json_records(path: Path) -> Read:
    """Return the records of a JSON file and where each stands, for messages."""
    text = _text(path)
    if not text.strip():
        return [], []
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " If each line is a record, name it `.jsonl`." if error.msg == "Extra data" else ""
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {_too_much(error)}") from None
    if not isinstance(records, list):
        raise UserError(f"{path} must hold a list of records, but holds a {type(records).__name__}. Put the records in [ ].")
    return [f"record {number}" for number in range(1, len(records) + 1)], records


def read_jsonl(path: Path) -> Read:
    """Return the records of a file of JSON lines and where each stands, for messages."""
    places, records = [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not splitlines: JSON texts may hold U+2028
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON in line {number}, column {error.colno}: {error.msg}.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read, line {number}: {_too_much(error)}") from None
        places.append(f"line {number}")
    return places, records


def _too_much(error: ValueError | RecursionError) -> str:
    """Return what valid JSON has too much of for Python to read it."""
    what = "its values are nested too deep" if isinstance(error, RecursionError) else "a number in it has thousands of digits"
    return f"{what}. A record has the keys `instruction` and `output`, or `messages`."


def read_parquet(path: Path) -> Read:
    """Return the records of a Parquet file and where each stands, for messages."""
    parquet, arrow = optional("pyarrow.parquet", "all"), optional("pyarrow", "all")
    source = io.BytesIO(_bytes(path)) if path.suffix in COMPRESSED else path
    try:
        records = [without_nulls(row) for row in parquet.read_table(source).to_pylist()]
    except (arrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:  # the last ones: dates that Python lacks
        raise UserError(f"{path} cannot be read as Parquet: {str(error).partition(chr(10))[0]}") from None
    return [f"row {number}" for number in range(1, len(records) + 1)], records


def read_csv(path: Path) -> Read:
    """Return the rows of a table of texts, whose first row names the columns, and where each stands, for messages."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    limit = csv.field_size_limit(LONGEST_CELL)  # it is a global, and 128 KiB by default
    places, records, header, line = [], [], None, 0
    try:
        for row in reader:
            line, place = reader.line_num, f"line {line + 1}"  # a row may have several
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
                    raise UserError(f"{path} has {mark!r} between its columns. Save it with commas.")
                if len(set(header)) < len(header):
                    raise UserError(f"{path} names a column twice in its first line: {', '.join(header)}. Rename one.")
                continue
            if len(row) != len(header):
                way = "Put texts with commas in quotes." if len(row) > len(header) else "Add commas, one for each value that is missing."
                raise UserError(f"{path}, {place}: of its {len(header)} columns it has {len(row)}. {way}")
            records.append(dict(zip(header, row)))
            places.append(place)
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV in line {reader.line_num}: {error}.") from None
    finally:
        csv.field_size_limit(limit)
    return places, records


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded. Save it as UTF-8.") from None


def _bytes(path: Path) -> bytes:
    """Return what a file holds, decompressed."""
    content = read_bytes(path)
    try:
        if path.suffix == ".gz":
            return gzip.decompress(content)
        return _from_zst(content) if path.suffix == ".zst" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be decompressed ({error}). Compress or download it again.") from None


def _from_zst(content: bytes) -> bytes:
    """Return what Zstandard has compressed, which may be several frames.

    Raises:
        EOFError: The last one is not complete.
        zlib.error: It is something else.
    """
    package = optional("zstandard", "all")
    whole = []
    while content:
        frame = package.ZstdDecompressor().decompressobj()
        try:
            whole.append(frame.decompress(content))
        except package.ZstdError as error:
            raise zlib.error(str(error)) from None
        if not frame.eof:
            raise EOFError("it ends too early")
        content = frame.unused_data
    return b"".join(whole)


READERS: dict[str, Callable[[Path], Read]] = dict(zip(SUFFIXES, (read_json_records, read_jsonl, read_parquet, read_csv)))


def _reader(path: Path) -> Callable[[Path], Read]:
    """Return what reads a file, by its name."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if suffix not in READERS:
        kinds = f"{_any_of(SUFFIXES)} files, which may be compressed ({' or '.join(COMPRESSED)})"
        raise UserError(f"{path} ends in {path.suffix!r}, but samples are read from {kinds}.")
    return READERS[suffix]


def _find(folder: Path, name: str) -> Path:
    possible = (folder / f"{name}{suffix}{compressed}" for suffix in SUFFIXES for compressed in ("", *COMPRESSED))
    found = [file for file in possible if is_file(file)]
    if len(found) > 1:
        raise UserError(f"The folder {folder} has {' and '.join(file.name for file in found)}, of which one would be left out. Keep one.")
    if found:
        return found[0]
    raise MissingFile(f"The folder {folder} has no {_any_of([name + suffix for suffix in SUFFIXES])}. It must hold a train and a val file.")


def _any_of(words: list[str] | tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}"
