"""Turn any checkpoint that we read into a complete Hugging Face folder."""

import shutil
from pathlib import Path

from litgpt import names
from litgpt.checkpoint import check_side_files, described_by, load_model, refuse_adapter, write_checkpoint
from litgpt.errors import UserError
from litgpt.files import is_file
from litgpt.prompts import has_prompt_style, load_prompt_style, save_stop_tokens
from litgpt.scripts.download import find_checkpoint
from litgpt.tokenizer import Tokenizer
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
    refuse_adapter(folder)
    source = described_by(folder)
    check_side_files(source)
    model = load_model(folder)
    model.config.to_hf()  # raises where no family of Hugging Face's has such a model

    def extras(output: Path) -> None:
        if has_prompt_style(folder):  # of an adapter, whose base may have another one
            shutil.copyfile(folder / names.PROMPT_STYLE, output / names.PROMPT_STYLE)
        name_stop_tokens(output)

    base = folder if folder != source else None  # an adapter of a multimodal model may hold updates of parts that are not computed here
    write_checkpoint(output_dir, model.state_dict(), model.config, source=source, base=base, extras=extras, max_shard_bytes=n_bytes)
    print(f"Saved {output_dir}.")


def name_stop_tokens(folder: Path) -> None:
    """Let `generation_config.json` name what ends an answer in the folder's prompt style, as LitGPT's folders do not."""
    if not (is_file(folder / names.TOKENIZER_JSON) and has_prompt_style(folder)):
        return
    try:
        style = load_prompt_style(folder)
    except UserError:  # a class of the user's own, which is not needed here
        return
    save_stop_tokens(style, Tokenizer(folder), folder)
