"""Turn any checkpoint that we read into a complete Hugging Face folder."""

from pathlib import Path

from litgpt.checkpoint import described_by, load_model, write_checkpoint
from litgpt.scripts.download import find_checkpoint
from litgpt.weight_files import MAX_SHARD_SIZE, shard_bytes


def convert_lit_checkpoint(checkpoint_dir: Path, output_dir: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write a complete Hugging Face folder (safetensors, config and tokenizer) of a checkpoint directory, LitGPT's layout included.

    transformers, vLLM, PEFT and llama.cpp load the result as it is. LoRA updates beside the weights are merged in.

    Args:
        checkpoint_dir: Holds `lit_model.pth` and `model_config.yaml`, or any other layout that we read.
        output_dir: The folder to write. It must not exist, or be empty.
        max_shard_size: How large a file of weights may grow, such as 5GB, 500MB or 2GiB; a larger model is written into several files.
    """
    n_bytes = shard_bytes(max_shard_size)
    folder = find_checkpoint(checkpoint_dir, needs_tokenizer=False)
    model = load_model(folder)
    model.config.to_hf()  # raises where no family of Hugging Face's has such a model
    write_checkpoint(output_dir, model.state_dict(), model.config, source=described_by(folder), max_shard_bytes=n_bytes)
    print(f"Saved {output_dir}.")
