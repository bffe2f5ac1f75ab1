"""The Alpaca data set, cleaned: 52 thousand instructions with answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from litgpt.data.base import SFTModule, split
from litgpt.data.download import download_if_missing
from litgpt.data.json_data import load_split

__all__ = ["Alpaca", "download_if_missing"]


@dataclass(eq=False)
class Alpaca(SFTModule):
    """The cleaned Alpaca data set: 52 thousand instructions with answers, downloaded once."""

    val_split_fraction: float = 0.03865  # 2000 samples
    """The share of the samples to validate on."""
    download_dir: Path = Path("./data/alpaca")
    """The folder that the file is kept in."""
    file_url: str = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
    """Where the file comes from, unless it is in that folder already."""
    file_name: str = "alpaca_data_cleaned_archive.json"
    """The file's name in that folder."""

    @property
    def file(self) -> Path:
        """Where the file is kept."""
        return Path(self.download_dir) / self.file_name

    def prepare_data(self) -> None:
        """Download the file, unless it is there."""
        download_if_missing(self.file, self.file_url)

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        return split(load_split(self.file), self.val_split_fraction, self.seed)
