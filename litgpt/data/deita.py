"""The Deita data set: ten thousand conversations, chosen for their quality and complexity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from litgpt.data.base import SFTModule
from litgpt.data.hf import Table, load_rows, renamed
from litgpt.data.records import messages_of, without_nulls

COLUMNS = {"messages": "messages"}


@dataclass(eq=False)
class Deita(SFTModule):
    """The Deita data set: ten thousand conversations, chosen for their quality and complexity, from the hub."""

    include_multiturn_conversations: bool = False
    """Whether to learn whole conversations, every answer with all that comes before it, instead of first answers only."""
    download_dir: Path = Path("./data/deita")
    """The folder that the download is kept in."""
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"
    """The data set's name on the hub, or a local folder."""

    def prepare_data(self) -> None:
        """Download the data set, unless it is there."""
        self.records()

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        return self._table("train_sft"), self._table("test_sft")

    def _table(self, part: str) -> Table:
        rows = load_rows(self.repo_id, part, download_dir=self.download_dir)
        return Table(rows, f"{self.repo_id}, {part}", partial(conversation, whole=self.include_multiturn_conversations))


def conversation(row: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """Return a sample with all messages of a conversation, or with those up to the first answer.

    Args:
        row: Has the `messages`.
        whole: Whether to take all of them.
    """
    messages = messages_of(without_nulls(renamed(row, COLUMNS)))
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    return {"messages": messages if whole else messages[: first + 1]}
