"""Finetuning samples from files of one's own: JSON, JSON lines, Parquet."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from litgpt.data.base import Record, SFTModule, messages_of, split
from litgpt.errors import MissingFile, UserError, optional

log = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".parquet")
DEFAULT_FRACTION = 0.05


@dataclass(eq=False)
class JSON(SFTModule):
    """Samples from your own files: `instruction`, `output` and maybe `input`, or `messages` with `role` and `content`."""

    json_path: Path
    """A `.json` (a list), `.jsonl` (a sample a line) or `.parquet` file, or a folder with the files `train` and `val` of such a type."""
    val_split_fraction: float | None = None
    """The share of a single file's samples to validate on. By default 0.05. At least one sample is held out, unless it is 0."""

    def prepare_data(self) -> None:
        """Check what can be checked at once: that the files are there and belong to one of the two layouts."""
        self._files()

    def records(self) -> tuple[list[dict], list[dict]]:
        """The samples to train on and those to validate on."""
        train, val = self._files()
        if val is not None:
            return load_split(train), load_split(val)
        fraction = self.val_split_fraction
        if fraction is None:
            fraction = DEFAULT_FRACTION
            log.warning("`val_split_fraction` is not set: validating on %s of %s.", fraction, train)
        samples = load_split(train)
        try:
            return split(samples, fraction, self.seed)
        except UserError as error:
            raise UserError(f"{train}: {error}") from None

    def _files(self) -> tuple[Path, Path | None]:
        path = Path(self.json_path)
        if path.is_dir():
            if self.val_split_fraction is not None:
                raise UserError(f"{path} is a folder with its own `val` file, so `val_split_fraction` has no meaning. Leave it out.")
            return _find(path, "train"), _find(path, "val")
        if not path.exists():
            raise MissingFile(f"There is no file or folder {path}. `json_path` must name a {_any_of(SUFFIXES)} file, or a folder with two.")
        _check_suffix(path)
        return path, None


def load_split(json_path: Path) -> list[Record]:
    """The samples of one file, each checked. Each knows its place, for what only the prompt style can find wrong with it.

    Args:
        json_path: A `.json`, `.jsonl` or `.parquet` file.

    Raises:
        UserError: The file cannot be read as what its name says, is empty, or a record misses a key; which one is said.
    """
    path = Path(json_path)
    _check_suffix(path)
    if not path.is_file():
        raise MissingFile(f"There is no file {path}.")
    places, records = {".json": read_json_records, ".jsonl": read_jsonl, ".parquet": read_parquet}[path.suffix](path)
    if not records:
        raise UserError(f"{path} is empty: it has no records.")
    placed = []
    for place, record in zip(places, records):
        try:
            messages_of(record)
        except UserError as error:
            raise UserError(f"{path}, {place}: {error}") from None
        placed.append(Record(record))
        placed[-1].place = f"{path}, {place}"
    return placed


def read_json_records(path: Path) -> tuple[list[str], list]:
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


def read_jsonl(path: Path) -> tuple[list[str], list]:
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


def read_parquet(path: Path) -> tuple[list[str], list]:
    """Return the records of a Parquet file and where each stands, for messages."""
    parquet, arrow = optional("pyarrow.parquet", "all"), optional("pyarrow", "all")
    try:
        records = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    return [f"row {number}" for number in range(1, len(records) + 1)], records


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded. Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _find(folder: Path, name: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / name).with_suffix(suffix).is_file():
            return (folder / name).with_suffix(suffix)
    raise MissingFile(f"The folder {folder} has no {_any_of([name + suffix for suffix in SUFFIXES])}. It must hold a train and a val file.")


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} ends in {path.suffix!r}, but samples are read from {_any_of(SUFFIXES)} files.")


def _any_of(words: list[str] | tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}"
