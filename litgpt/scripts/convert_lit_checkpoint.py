"""Turn any checkpoint that we read into a complete Hugging Face folder."""

from pathlib import Path

from litgpt.checkpoint import described_by, load_model, write_checkpoint
from litgpt.scripts.download import find_checkpoint


def convert_lit_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Write a complete Hugging Face folder (safetensors, config and tokenizer) of a checkpoint directory, LitGPT's layout included.

    transformers, vLLM, PEFT and llama.cpp load the result as it is. LoRA updates beside the weights are merged in.

    Args:
        checkpoint_dir: Holds `lit_model.pth` and `model_config.yaml`, or any other layout that we read.
        output_dir: The folder to write. It must not exist, or be empty.
    """
    folder = find_checkpoint(checkpoint_dir, needs_tokenizer=False)
    model = load_model(folder)
    model.config.to_hf()  # raises where no family of Hugging Face's has such a model
    write_checkpoint(output_dir, model.state_dict(), model.config, source=described_by(folder))
    print(f"Saved {output_dir}.")
