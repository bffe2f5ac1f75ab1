"""Any data set that the package `datasets` can load: from the Hugging Face hub, from a folder, from a file."""

import logging
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from litgpt.data.base import SFTModule, split
from litgpt.data.json_data import DEFAULT_FRACTION
from litgpt.data.records import Record, messages_of, without_nulls
from litgpt.errors import MissingFile, UserError, did_you_mean, optional

log = logging.getLogger(__name__)

PARTS = ("instruction", "input", "output", "messages", "conversations", "system", "tools")  # of a sample
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}  # what reads a single file


class Table(Sequence[Record]):
    """Rows as samples, each made when it is asked for: so what holds the rows can stay on the disk, and is not changed.

    Args:
        rows: What a file or a data set holds.
        name: Where they are from, for messages.
        convert: Makes a sample of a row, as a new mapping.
        indices: Which of the rows; by default all.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        name: str,
        convert: Callable[[Any], dict[str, Any]],
        indices: Sequence[int] | None = None,
    ) -> None:
        self.rows, self.name, self.convert = rows, name, convert
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        row = self.indices[index]
        place = f"{self.name}, record {row + 1}"
        try:
            record = Record(self.convert(self.rows[row]))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        record.place = place
        return record

    def split(self, fraction: float, seed: int) -> "tuple[Table, Table]":
        """Return the samples to train on and the others, drawn at random as `split` draws them."""
        try:
            train, val = split(self.indices, fraction, seed)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        return Table(self.rows, self.name, self.convert, train), Table(self.rows, self.name, self.convert, val)


@dataclass(eq=False)
class HF(SFTModule):
    """Any data set of the Hugging Face hub, or a local one, with instructions and answers or with messages."""

    repo_id: str
    """`ORG/NAME` on the hub; or a local folder of data files, one that `save_to_disk` wrote, or a file (`.json`, `.jsonl`, `.parquet`)."""
    split: str = "train"
    """The part to train on, also such as `train[:1000]` or `train+test`."""
    val_split: str | None = None
    """The part to validate on. By default samples are held out, see `val_split_fraction`."""
    val_split_fraction: float | None = None
    """The share of the training part's samples to validate on, if no part is named for that. By default 0.05."""
    name: str | None = None
    """Which of the data set's configurations to read, if it has several."""
    columns: dict[str, str] | None = None
    """Which column holds what, such as `{"instruction": "question", "output": "answer"}` or `{"messages": "chat"}`, out of instruction,
    input, output, messages, conversations, system and tools. No other column is read. By default they have names that `JSON` knows."""
    revision: str | None = None
    """The branch, tag or commit on the hub. By default the newest."""
    access_token: str | None = field(default=None, repr=False)
    """A token of the hub, for data sets that are not open to everyone. By default the environment variable `HF_TOKEN`."""
    download_dir: Path | None = None
    """The folder that downloads are kept in. By default that of the package `datasets`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.repo_id.strip():
            raise UserError("`repo_id` is empty. Name a data set of the hub, as ORG/NAME, or a local folder.")
        self._token, self.access_token = self.access_token, None  # a run writes down the arguments of its data set
        if self.val_split is not None and self.val_split_fraction is not None:
            raise UserError(
                f"`val_split` {self.val_split!r} is what to validate on, so `val_split_fraction` has no meaning. Leave one out."
            )
        if self.val_split is not None and (shared := overlap(self.split, self.val_split)):
            raise UserError(
                f"`split` {self.split!r} and `val_split` {self.val_split!r} share {shared!r}, so it would be trained and validated on. "
                "Name another part or slices that lie apart, such as 'train[:90%]' and 'train[90%:]', or leave `val_split` out."
            )
        for part in self.columns or ():
            if part not in PARTS:
                raise UserError(f"`columns` says which column holds {', '.join(PARTS)}, but names {part!r}.{did_you_mean(part, PARTS)}")

    def prepare_data(self) -> None:
        """Download the data set, unless it is there."""
        for part in filter(None, (self.split, self.val_split)):
            self._table(part)

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        train = self._table(self.split)
        if self.val_split is not None:
            return train, self._table(self.val_split)
        fraction = self.val_split_fraction
        if fraction is None:
            fraction = DEFAULT_FRACTION
            log.warning("Neither `val_split` nor `val_split_fraction` is set: validating on %s of %s.", fraction, train.name)
        return train.split(fraction, self.seed)

    def _table(self, part: str) -> Table:
        rows = load_rows(self.repo_id, part, self.name, self.revision, self._token, self.download_dir)
        place = f"{self.repo_id}, {part}"
        if self.columns is None:
            return _checked(Table(rows, place, without_nulls))
        try:
            check_columns(self.columns, rows.column_names)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        rows = rows.select_columns(sorted(set(self.columns.values())))  # others may hold pictures, which would be decoded
        return Table(rows, place, partial(_converted, columns=self.columns))


def _checked(table: Table) -> Table:
    """Return a table whose columns were not named, if its first row has those of a sample."""
    try:
        messages_of(table[0] if len(table) else {})
    except UserError as error:
        way = 'Say which column holds what with `--data.columns`, such as \'{"instruction": "question", "output": "answer"}\'.'
        raise UserError(f"{table.name}: {error} {way}") from None
    return table


def named_parts(spec: str) -> list[tuple[str, str]]:
    """Return what a split such as `train[:10]+test` takes, each time as the name of the part, and the whole term."""
    return [(term.partition("[")[0], term) for term in map(str.strip, spec.split("+"))]


def overlap(one: str, other: str) -> str | None:
    """Return what two splits both take, if they do so whatever the data set holds: slices of one part may lie apart.

    Args:
        one: Such as `train[:1000]` or `train+test`.
        other: The same.
    """
    common = (
        max(term, other_term, key=len)  # the slice, if one is
        for (name, term), (other_name, other_term) in product(named_parts(one), named_parts(other))
        if name == other_name and (term == other_term or name in (term, other_term))
    )
    return next(common, None)


def load_rows(
    repo_id: str,
    part: str,
    name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    download_dir: Path | None = None,
) -> Any:
    """Return one part of a data set as a `datasets.Dataset`, whose rows stay on the disk. No code of the data set is run.

    Args:
        repo_id: See `HF`, as the others.
        part: Such as `train`.
        name: Which configuration.
        revision: Which version.
        token: For the hub.
        download_dir: Where downloads are kept.

    Raises:
        UserError: It cannot be had, or has no such part, configuration or version.
    """
    datasets, path = optional("datasets", "all"), Path(repo_id)
    cache = None if download_dir is None else str(download_dir)
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()  # by `save_to_disk`
    for option, value in (("name", name), ("revision", revision)):
        if value is not None and (is_saved or path.is_file()):
            what = "a folder that `save_to_disk` wrote" if is_saved else "a file"
            raise UserError(f"`{option}` {value!r} has no meaning, for {repo_id} is {what}. Leave it out.")
    with clear_errors(repo_id):
        if path.is_file():
            builder = next((BUILDERS[suffix] for suffix in reversed(path.suffixes) if suffix in BUILDERS), None)  # `.gz` may come after it
            if builder is None:
                raise UserError(f"{path} is none of the files that data sets are read from: {', '.join(BUILDERS)}. Try `--data JSON`.")
            return datasets.load_dataset(builder, data_files=str(path), split=part, cache_dir=cache)
        if is_saved:
            saved = datasets.load_from_disk(repo_id)
            return sliced(saved if isinstance(saved, Mapping) else {"train": saved}, part, repo_id)
        return datasets.load_dataset(repo_id, name, split=part, revision=revision, token=token, cache_dir=cache)


def sliced(parts: Mapping[str, Any], spec: str, repo_id: str) -> Any:
    """Return what a split takes of the parts of a saved data set, as one `datasets.Dataset`.

    Args:
        parts: All parts.
        spec: Such as `train[:1000]` or `train+test`.
        repo_id: What the data set is called, for messages.

    Raises:
        UserError: There is no such part.
    """
    datasets = optional("datasets", "all")
    if spec in parts:
        return parts[spec]
    for name, _ in named_parts(spec):
        if name not in parts:
            raise UserError(f"{repo_id} has no part {name!r}, but {', '.join(parts)}.{did_you_mean(name, parts)}")
    spans = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in parts.items()})
    return datasets.concatenate_datasets([parts[span.splitname].select(range(span.from_, span.to)) for span in spans])


def renamed(row: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the parts of a sample, each from its column.

    Args:
        row: One row of a table.
        columns: For each part of a sample, the column that it is in.

    Raises:
        UserError: There is no such column.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"A record must be a mapping with the keys {', '.join(columns.values())}, but this is a {type(row).__name__}.")
    check_columns(columns, row)
    return {part: row[column] for part, column in columns.items()}


def check_columns(columns: Mapping[str, str], known: Mapping[str, Any] | Sequence[str]) -> None:
    """Raise a UserError for a column that a table does not have."""
    for column in columns.values():
        if column not in known:
            names = ", ".join(map(str, known)) or "none"
            raise UserError(f"There is no column {column!r}; there are {names}.{did_you_mean(column, map(str, known))}")


def _converted(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return without_nulls(renamed(row, columns))


@contextmanager
def clear_errors(repo_id: str) -> Iterator[None]:
    """Turn what may happen while a data set is fetched and read into one sentence with the way out.

    Args:
        repo_id: What was asked for.
    """
    datasets, hub = optional("datasets.exceptions", "all"), optional("huggingface_hub.errors", "all")
    token = "put a token into the environment variable HF_TOKEN or into `--data.access_token`"
    try:
        yield
    except UserError:
        raise
    except (datasets.DatasetNotFoundError, hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        if "gated" in str(error):
            page = f"https://huggingface.co/datasets/{repo_id}"
            raise UserError(
                f"{repo_id} is gated: the hub gives it to those who were given access. Ask for that on {page}, and {token}."
            ) from None
        if "Revision" in str(error):
            raise MissingFile(f"{_sentence(error)} Leave `--data.revision` out for the newest.") from None
        missing = f"There is no file or folder {repo_id}, and no such data set on the hub that is open to all."
        raise MissingFile(f"{missing} If it is private, {token}.") from None
    except StopIteration:  # what `datasets` says to a file without a record
        raise UserError(f"The data set {repo_id} cannot be read: it has an empty file.") from None
    except (datasets.DatasetsError, hub.HTTPError, OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
        while isinstance(error, datasets.DatasetsError) and error.__cause__ is not None:  # which says what went wrong
            error = error.__cause__
        if isinstance(error, ConnectionError | hub.HTTPError | hub.LocalEntryNotFoundError) and not Path(repo_id).exists():
            way = "Check the network, or download it elsewhere and name the local folder in its place."
            raise UserError(f"The data set {repo_id} cannot be fetched from the hub: {_sentence(error)} {way}") from None
        hint = " The revision `refs/convert/parquet` may hold it as plain files." if "scripts are no longer" in str(error) else ""
        raise UserError(f"The data set {repo_id} cannot be read: {_sentence(error)}{hint}") from None


def _sentence(error: BaseException) -> str:
    """Return what an error says, on one line and without advice that is not for our users."""
    text = " ".join(re.split("Example of usage|For more information|Please pass ", str(error))[0].split())[:400] or type(error).__name__
    return text if text.endswith(".") else f"{text}."
