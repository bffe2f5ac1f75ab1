"""Alpaca's instructions with answers by GPT-4."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.alpaca import Alpaca


@dataclass(eq=False)
class AlpacaGPT4(Alpaca):
    """Alpaca's 52 thousand instructions with answers by GPT-4, downloaded once."""

    val_split_fraction: float = 0.03847  # 2000 samples
    download_dir: Path = Path("./data/alpacagpt4")
    file_url: str = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"
    file_name: str = "alpacagpt4_data_cleaned_archive.json"
