"""Alpaca's instructions with answers by GPT-4."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.alpaca import Alpaca


@dataclass(eq=False)
class AlpacaGPT4(Alpaca):
    """Alpaca's 52 thousand instructions with answers by GPT-4, downloaded once."""

    val_split_fraction: float = 0.03847  # 2000 samples
    """The share of the samples to validate on."""
    download_dir: Path = Path("./data/alpacagpt4")
    """The folder that the file is kept in."""
    file_url: str = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"
    """Where the file comes from."""
    file_name: str = "alpacagpt4_data_cleaned_archive.json"
    """The file's name in that folder."""
