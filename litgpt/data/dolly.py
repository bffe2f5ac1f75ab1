"""The Dolly data set: 15 thousand instructions with answers, both written by people."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.alpaca import Alpaca


@dataclass(eq=False)
class Dolly(Alpaca):
    """The Dolly data set: 15 thousand instructions with answers, both written by people, downloaded once."""

    val_split_fraction: float = 0.1
    """The share of the samples to validate on."""
    download_dir: Path = Path("./data/dolly")
    """The folder that the file is kept in."""
    file_url: str = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"
    """Where the file comes from."""
    file_name: str = "databricks-dolly-15k.jsonl"
    """The file's name in that folder."""
