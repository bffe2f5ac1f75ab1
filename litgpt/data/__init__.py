"""The data sets to train on."""

from litgpt.data.alpaca import Alpaca
from litgpt.data.base import DataModule, SFTDataset, get_sft_collate_fn
from litgpt.data.json_data import JSON
from litgpt.data.text_files import TextFiles

__all__ = ["Alpaca", "DataModule", "JSON", "SFTDataset", "TextFiles", "get_sft_collate_fn"]
