"""Read and write checkpoint directories: Hugging Face's layout, LitGPT's, and the steps of our own runs."""

from litgpt.checkpoint.reading import DTYPES, assemble, load_adapter, load_lora, load_model, read_weights, weightless
from litgpt.checkpoint.updates import (
    described_by,
    find_adapter,
    has_adapter,
    has_lora,
    has_updates,
    load_updates,
    lora_settings,
    named_base,
    read_hyperparameters,
    read_peft_updates,
    refuse_adapter,
)
from litgpt.checkpoint.writing import (
    adapter_writer,
    check_side_files,
    copy_side_files,
    write_adapter,
    write_checkpoint,
    write_config,
)

__all__ = [
    "DTYPES",
    "adapter_writer",
    "assemble",
    "check_side_files",
    "copy_side_files",
    "described_by",
    "find_adapter",
    "has_adapter",
    "has_lora",
    "has_updates",
    "load_adapter",
    "load_lora",
    "load_model",
    "load_updates",
    "lora_settings",
    "named_base",
    "read_hyperparameters",
    "read_peft_updates",
    "read_weights",
    "refuse_adapter",
    "weightless",
    "write_adapter",
    "write_checkpoint",
    "write_config",
]
