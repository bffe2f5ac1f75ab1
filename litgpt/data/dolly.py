"""The Dolly data set: 15 thousand instructions with answers, both written by people."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.alpaca import Alpaca


@dataclass(eq=False)
class Dolly(Alpaca):
    """The Dolly data set: 15 thousand instructions with answers, both written by people, downloaded once."""

    val_split_fraction: float = 0.1
    download_dir: Path = Path("./data/dolly")
    file_url: str = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"
    file_name: str = "databricks-dolly-15k.jsonl"
