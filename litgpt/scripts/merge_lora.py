"""Merge LoRA updates into the weights they were trained beside."""

import shutil
from pathlib import Path
from uuid import uuid4

from litgpt import names
from litgpt.checkpoint import check_side_files, copy_side_files, has_lora, load_lora, refuse_adapter, write_checkpoint
from litgpt.errors import MissingFile, UserError
from litgpt.files import is_file, is_folder, read_yaml
from litgpt.hardware import products_dtype
from litgpt.lora import merge_lora_weights
from litgpt.scripts.convert_lit_checkpoint import name_stop_tokens
from litgpt.scripts.download import find_checkpoint
from litgpt.weight_files import MAX_SHARD_SIZE, plain_files, shard_bytes


def merge_lora(
    checkpoint_dir: Path,
    pretrained_checkpoint_dir: Path | None = None,
    precision: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Add LoRA updates to the weights they were trained beside, which makes a folder that every command and transformers can load.

    The merged weights are written into the same folder, beside the updates. A folder that is merged already is left as it is.

    Args:
        checkpoint_dir: A folder that `finetune_lora` wrote (a step, or LitGPT's with `lit_model.pth.lora`), or a PEFT adapter.
        pretrained_checkpoint_dir: The model that was finetuned. By default the one that the updates name.
        precision: The type of the merged weights: `32-true`, `bf16-true` or `16-true`. By default that of the pretrained model.
        max_shard_size: How large a file of weights may grow, such as 5GB, 500MB or 2GiB; a larger model is written into several files.
    """
    n_bytes = shard_bytes(max_shard_size)
    folder = next((path for path in (checkpoint_dir, Path(names.CHECKPOINTS) / checkpoint_dir) if is_folder(path)), None)
    folder = folder.absolute() if folder is not None else None
    if folder is None:
        raise MissingFile(
            f"There is no folder {str(checkpoint_dir)!r}, neither here nor in {names.CHECKPOINTS}/. Give one that finetune_lora wrote."
        )
    refuse_adapter(folder)
    if not has_lora(folder):
        if plain_files(folder) and was_trained_with_lora(folder):
            print(f"The LoRA weights of {folder} are merged already.")
            return
        raise UserError(f"{folder} holds no LoRA updates: neither {names.LIT_LORA} nor {names.ADAPTER_CONFIG} nor a step of finetune_lora.")
    check_side_files(folder)
    base = find_checkpoint(pretrained_checkpoint_dir, needs_tokenizer=False) if pretrained_checkpoint_dir is not None else None
    model, base = load_lora(folder, base)
    check_side_files(base)
    merge_lora_weights(model)
    dtype = products_dtype(precision) if precision is not None else None  # else each weight keeps its own
    merged = folder / f"merged-{uuid4().hex[:8]}"  # its files are moved up when all of them are written

    def extras(folder: Path) -> None:
        copy_side_files(base, folder)
        name_stop_tokens(folder)

    origin = dict(source=folder, base=base, dtype=dtype, extras=extras, max_shard_bytes=n_bytes)
    write_checkpoint(merged, model.state_dict(), model.config, **origin)
    for file in sorted(merged.iterdir()):
        file.replace(folder / file.name)
    shutil.rmtree(merged)
    print(f"Saved the merged weights to {folder}.")


def was_trained_with_lora(folder: Path) -> bool:
    """Say whether a folder with whole weights is the result of a LoRA run: it holds the updates too, or the run's options."""
    adapters = (folder / names.LIT_LORA, folder / names.ADAPTER_CONFIG, folder / names.ADAPTER / names.ADAPTER_CONFIG)
    return any(map(is_file, adapters)) or "lora_r" in read_yaml(folder / names.HYPERPARAMETERS)
