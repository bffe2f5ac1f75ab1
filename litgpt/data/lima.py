"""The LIMA data set: a thousand conversations, each chosen by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from litgpt.data.base import SFTModule
from litgpt.data.hf import clear_errors
from litgpt.data.json_data import load_splits
from litgpt.errors import UserError
from litgpt.files import is_folder
from litgpt.hub import endpoint

SPEAKERS = ("user", "assistant")  # in turn


@dataclass(eq=False)
class LIMA(SFTModule):
    """The LIMA data set: a thousand conversations, each chosen by hand. The hub gives it to those who asked for access."""

    val_split_fraction: float = 0.1
    """The share of the samples to validate on."""
    include_multiturn_conversations: bool = False
    """Whether to learn whole conversations, every answer with all that comes before it, instead of first answers only."""
    repo_id: str = "GAIR/lima"
    """The data set's name on the hub, or a local folder with its file `train.jsonl`."""
    access_token: str | None = field(default=None, repr=False)
    """A token of the hub. By default the environment variable `HF_TOKEN`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._token, self.access_token = self.access_token, None  # a run writes down the arguments of its data set

    def prepare_data(self) -> None:
        """Download the data set, unless it is there."""
        self._file()

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        convert = partial(conversation, whole=self.include_multiturn_conversations)
        return load_splits(self._file(), None, self.val_split_fraction, self.seed, convert)

    def _file(self) -> Path:
        """Return where the file is. It is fetched by its name, for the data set has a script too, which is not to be run."""
        if is_folder(Path(self.repo_id)):
            return Path(self.repo_id) / "train.jsonl"
        with clear_errors(self.repo_id):
            return Path(hf_hub_download(self.repo_id, "train.jsonl", repo_type="dataset", token=self._token, endpoint=endpoint()))


def conversation(row: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """Return a sample with all messages of a conversation, or with the first question and its answer.

    Args:
        row: Has the `conversations`, a list of texts by user and assistant in turn.
        whole: Whether to take all of them.
    """
    texts = row.get("conversations") if isinstance(row, Mapping) else row
    if not isinstance(texts, list):
        raise UserError(f"`conversations` must be a list of texts, but is {texts!r:.60}.")
    return {"messages": [{"role": SPEAKERS[turn % 2], "content": text} for turn, text in enumerate(texts if whole else texts[:2])]}
