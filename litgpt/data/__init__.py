"""The data sets to train on."""

from litgpt.data.alpaca import Alpaca
from litgpt.data.alpaca2k import Alpaca2k
from litgpt.data.alpaca_gpt4 import AlpacaGPT4
from litgpt.data.base import DataModule, SFTDataset, get_sft_collate_fn
from litgpt.data.chat import Chat
from litgpt.data.deita import Deita
from litgpt.data.dolly import Dolly
from litgpt.data.flan import FLAN
from litgpt.data.hf import HF
from litgpt.data.json_data import JSON
from litgpt.data.lima import LIMA
from litgpt.data.longform import LongForm
from litgpt.data.mix import Mix
from litgpt.data.text_files import TextFiles

__all__ = [
    "Alpaca",
    "Alpaca2k",
    "AlpacaGPT4",
    "Chat",
    "DataModule",
    "Deita",
    "Dolly",
    "FLAN",
    "HF",
    "JSON",
    "LIMA",
    "LongForm",
    "Mix",
    "SFTDataset",
    "TextFiles",
    "get_sft_collate_fn",
]
