"""Conversations from files of one's own, as OpenAI and ShareGPT write them, with functions that the assistant calls."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.data.base import SFTModule
from litgpt.data.json_data import find_files, load_splits
from litgpt.data.records import CONVERSATIONS, Record, conversation_of, shown
from litgpt.errors import UserError, did_you_mean


@dataclass(eq=False)
class Chat(SFTModule):
    """Conversations from your own files: OpenAI's `messages` or ShareGPT's `conversations`, of several turns, with `tools` if you like."""

    path: Path
    """A `.json` (a list), `.jsonl` (a conversation a line), `.parquet` or `.csv` file, which may be compressed (`.gz`, `.zst`), or a
    folder with the files `train` and `val` of such a type."""
    val_split_fraction: float | None = None
    """The share of a single file's conversations to validate on. By default 0.05. At least one is held out, unless it is 0."""
    messages_key: str | None = None
    """What a record calls its list of messages. By default `messages` or `conversations`."""
    role_key: str | None = None
    """What a message calls its speaker. By default `role` or `from`."""
    content_key: str | None = None
    """What a message calls its text. By default `content` or `value`."""

    def prepare_data(self) -> None:
        """Check what can be checked at once: that the files are there and belong to one of the two layouts."""
        find_files(self.path, self.val_split_fraction, "path")

    def records(self) -> tuple[list[Record], list[Record]]:
        """The conversations to train on and those to validate on."""
        return load_splits(*find_files(self.path, self.val_split_fraction, "path"), self.val_split_fraction, self.seed, self._converted)

    def _converted(self, record: Any) -> Mapping[str, Any]:
        """Return a conversation under the usual names."""
        if not isinstance(record, Mapping):
            raise UserError(
                f"A conversation must be a mapping with the key `{self.messages_key or 'messages'}`, but this is {shown(record)}."
            )
        keys = (self.messages_key,) if self.messages_key else tuple(CONVERSATIONS)
        key = next((key for key in keys if record.get(key) is not None), None)
        if key is None:
            names = " or ".join(f"`{key}`" for key in keys)
            found = ", ".join(f"`{name}`" for name in record) or "no keys"
            raise UserError(f"It has no {names}, but {found}.{did_you_mean(keys[0], map(str, record))}")
        return {"messages": conversation_of(record, key, self.role_key, self.content_key), "tools": record.get("tools")}
