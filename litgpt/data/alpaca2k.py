"""Two thousand of Alpaca's instructions, to try things out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from litgpt.data.base import SFTModule
from litgpt.data.hf import Table, load_rows


@dataclass(eq=False)
class Alpaca2k(SFTModule):
    """Two thousand of Alpaca's instructions with answers, from the hub, to try things out."""

    val_split_fraction: float = 0.05
    """The share of the samples to validate on."""
    download_dir: Path = Path("./data/alpaca2k")
    """The folder that the download is kept in."""
    repo_id: str = "mhenrichsen/alpaca_2k_test"
    """The data set's name on the hub, or a local folder."""

    def prepare_data(self) -> None:
        """Download the data set, unless it is there."""
        self._table()

    def records(self) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
        """The samples to train on and those to validate on."""
        return self._table().split(self.val_split_fraction, self.seed)

    def _table(self) -> Table:
        return Table(load_rows(self.repo_id, "train", download_dir=self.download_dir), self.repo_id, dict)
