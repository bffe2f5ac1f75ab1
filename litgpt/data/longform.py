"""The LongForm data set: instructions for long texts that people wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from litgpt.data.base import SFTModule
from litgpt.data.download import download_if_missing
from litgpt.data.hf import renamed
from litgpt.data.json_data import load_split
from litgpt.prompts import PromptStyle

URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"
COLUMNS = {"instruction": "input", "output": "output"}


@dataclass(eq=False)
class LongForm(SFTModule):
    """The LongForm data set: 24 thousand instructions for long texts that people wrote, downloaded once."""

    prompt_style: str | PromptStyle | None = field(default="longform", kw_only=True)
    """How a prompt is written."""
    download_dir: Path = Path("./data/longform")
    """The folder that the files `train.json` and `val.json` are kept in."""

    def prepare_data(self) -> None:
        """Download the files, unless they are there."""
        for name in ("train", "val"):
            download_if_missing(self._file(name), f"{URL}/{name}.json")

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        return tuple(load_split(self._file(name), partial(renamed, columns=COLUMNS)) for name in ("train", "val"))

    def _file(self, name: str) -> Path:
        return Path(self.download_dir) / f"{name}.json"
