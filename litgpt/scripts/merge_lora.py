"""Merge LoRA updates into the weights they were trained beside."""

from pathlib import Path

import torch

from litgpt import names
from litgpt.checkpoint import check_side_files, copy_side_files, has_lora, load_lora, refuse_adapter, write_checkpoint
from litgpt.errors import MissingFile, UserError
from litgpt.files import is_file, is_folder, read_yaml
from litgpt.hardware import products_dtype
from litgpt.lora import merge_lora_weights
from litgpt.scripts.convert_lit_checkpoint import name_stop_tokens
from litgpt.scripts.download import find_checkpoint
from litgpt.weight_files import MAX_SHARD_SIZE, plain_files, shard_bytes

MERGED = ".merged-by-litgpt"  # a folder in that of the updates: what is in it is complete, and still has to be moved up


def merge_lora(
    checkpoint_dir: Path,
    pretrained_checkpoint_dir: Path | None = None,
    precision: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Add LoRA updates to the weights they were trained beside, which makes a folder that every command and transformers can load.

    The merged weights are written into the same folder, beside the updates; those of PEFT move into `adapter/`, or transformers would
    add them again. A folder that is merged already is left as it is.

    Args:
        checkpoint_dir: A folder that `finetune_lora` wrote (a step, or LitGPT's with `lit_model.pth.lora`), or a PEFT adapter.
        pretrained_checkpoint_dir: The model that was finetuned. By default the one that the updates name.
        precision: The type of the merged weights: `32-true`, `bf16-true` or `16-true`. By default that of the pretrained model.
        max_shard_size: How large a file of weights may grow, such as 5GB, 500MB or 2GiB; a larger model is written into several files.
    """
    n_bytes = shard_bytes(max_shard_size)
    dtype = products_dtype(precision) if precision is not None else None  # else each weight keeps its own
    folder = next((path for path in (checkpoint_dir, Path(names.CHECKPOINTS) / checkpoint_dir) if is_folder(path)), None)
    folder = folder.absolute() if folder is not None else None
    if folder is None:
        raise MissingFile(
            f"There is no folder {str(checkpoint_dir)!r}, neither here nor in {names.CHECKPOINTS}/. Give one that finetune_lora wrote."
        )
    if is_folder(folder / MERGED):  # of a program that was killed while it moved the files
        move_up(folder)
        return
    refuse_adapter(folder)
    if not has_lora(folder):
        if plain_files(folder) and was_trained_with_lora(folder):
            print(f"The LoRA weights of {folder} are merged already.")
            return
        raise UserError(f"{folder} holds no LoRA updates: neither {names.LIT_LORA} nor {names.ADAPTER_CONFIG} nor a step of finetune_lora.")
    is_peft = is_file(folder / names.ADAPTER_CONFIG)
    if is_peft and (folder / names.ADAPTER).exists():
        raise UserError(f"{folder / names.ADAPTER} is in the way, where the updates are moved to. Move it, or delete it.")
    check_side_files(folder)
    base = find_checkpoint(pretrained_checkpoint_dir, needs_tokenizer=False) if pretrained_checkpoint_dir is not None else None
    wide = None if dtype in (None, torch.bfloat16) else torch.float32  # the sum must not be rounded to fewer bits than are asked for
    model, base = load_lora(folder, base, wide)
    check_side_files(base)
    merge_lora_weights(model)

    def extras(merged: Path) -> None:
        copy_side_files(base, merged)
        name_stop_tokens(merged)
        if is_peft:
            (merged / names.ADAPTER).mkdir()
            copy_side_files(folder, merged / names.ADAPTER, names.ADAPTER_WEIGHTS, names.ADAPTER_CONFIG)

    origin = dict(source=folder, base=base, dtype=dtype, extras=extras, max_shard_bytes=n_bytes)
    write_checkpoint(folder / MERGED, model.state_dict(), model.config, **origin)
    move_up(folder)


def move_up(folder: Path) -> None:
    """Move merged files into the folder of the updates. Whoever is killed here can begin again, and nothing is ever added twice."""
    merged = folder / MERGED
    if is_folder(merged / names.ADAPTER):
        (merged / names.ADAPTER).replace(folder / names.ADAPTER)
    for name in (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS):
        if is_file(folder / names.ADAPTER / name):
            (folder / name).unlink(missing_ok=True)
    for file in sorted(merged.iterdir()):
        file.replace(folder / file.name)
    merged.rmdir()
    print(f"Saved the merged weights to {folder}.")


def was_trained_with_lora(folder: Path) -> bool:
    """Say whether a folder with whole weights is the result of a LoRA run: it holds the updates too, or the run's options."""
    adapters = (folder / names.LIT_LORA, folder / names.ADAPTER_CONFIG, folder / names.ADAPTER / names.ADAPTER_CONFIG)
    return any(map(is_file, adapters)) or "lora_r" in read_yaml(folder / names.HYPERPARAMETERS)
