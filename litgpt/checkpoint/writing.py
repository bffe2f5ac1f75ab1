"""Checkpoint directories from models: complete Hugging Face folders, and PEFT adapters."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from litgpt import names
from litgpt.adapter_v2 import is_new
from litgpt.checkpoint.reading import moved
from litgpt.checkpoint.updates import base_of, has_lora
from litgpt.config import Config
from litgpt.errors import MissingFile, UserError
from litgpt.families import FAMILIES
from litgpt.families.family import TOKEN_IDS
from litgpt.files import atomic_folder, check_readable, is_file, read_json, read_yaml
from litgpt.lora import LoRA
from litgpt.model import GPT
from litgpt.multimodal import is_whole, other_weights, spelled_as_in
from litgpt.peft_format import adapter_to_peft, peft_updates, within_whole
from litgpt.tokenizer import Tokenizer
from litgpt.translate import translate
from litgpt.weight_files import hf_weight_files, read_file, write_shards


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Config,
    *,
    source: Path | None = None,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    extras: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a complete Hugging Face folder: weights, config, and the source's tokenizer and other side files. All or nothing.

    Where the source is a multimodal model, or was trained from one that is still there, the result is that model with the new text part.

    Args:
        folder: Where to.
        weights: All parameters under our names.
        config: Their architecture. One that no family of checkpoints can express is written under our own names.
        source: The checkpoint directory they come from: its `config.json` and tokenizer files are carried over.
        base: The model that they were trained from; by default the one that the source names.
        dtype: Of the weights; by default as they are.
        extras: Writes further files into the folder.
        overwrite: Replace an existing folder.
        max_shard_bytes: How large a file of weights may grow; by default 5 GB.

    Raises:
        UserError: The weights hold what Adapter trained, which no Hugging Face model has.
    """
    if (name := next(filter(is_new, weights), None)) is not None:
        raise UserError(
            f"The model has what Adapter trained beside it ({name!r}), which cannot be made a part of its weights. "
            "Use the adapter's folder as it is."
        )
    sees = config.family is not None and FAMILIES[config.family].wrappers
    whole = next((found for found in _origins(source, base) if is_whole(found, config)), None) if sees else None
    if whole is not None:
        _check_others(config, source, base)
    with atomic_folder(folder, overwrite) as partial:
        write_weights(partial, weights, config, dtype, max_shard_bytes, whole)
        write_config(partial, config, source, dtype or next(iter(weights.values())).dtype, whole)
        for origin in dict.fromkeys(found for found in (source, whole) if found is not None):
            copy_side_files(origin, partial)
        if extras is not None:
            extras(partial)
        write_ends(partial)


def _check_others(config: Config, *origins: Path | None) -> None:
    """Refuse to write a multimodal model with updates of its text alone if an adapter among the origins changes other parts too."""
    for folder in (found for found in origins if found is not None and is_file(found / names.ADAPTER_CONFIG) and has_lora(found)):
        updates = peft_updates(dict(read_file(folder / names.ADAPTER_WEIGHTS)), read_json(folder / names.ADAPTER_CONFIG), config)
        if updates.others:
            raise UserError(
                f"{folder} also updates {updates.others[0]!r}, which is no part of the text model and would be left as it was. "
                "Merge it with PEFT."
            )


def _origins(folder: Path | None, base: Path | None) -> Iterator[Path]:
    """Yield the folders that a checkpoint comes from, as far as they are there: its own, and that of the model it was trained from."""
    yield from (known for known in (folder, base) if known is not None)
    if folder is None or base is not None:
        return
    options, adapter = read_yaml(folder / names.HYPERPARAMETERS), read_json(folder / names.ADAPTER_CONFIG)
    named = [options.get("checkpoint_dir"), options.get("initial_checkpoint_dir"), adapter.get("base_model_name_or_path")]
    try:
        yield base_of(folder, next(filter(None, named), None))
    except MissingFile:
        return


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Config,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    whole: Path | None = None,
) -> None:
    """Write safetensors under Hugging Face's names; no more than one of them is held beside the given ones.

    Args:
        folder: Where to.
        weights: All parameters under our names.
        config: Their architecture.
        dtype: What they are written in; by default as they are.
        max_shard_bytes: How large a file may grow.
        whole: A multimodal model whose other weights are copied, and whose spelling of names is kept.
    """

    def theirs(device: str) -> Iterator[tuple[str, Tensor]]:
        stream = ((name, moved(tensor.detach(), dtype, device, name)) for name, tensor in weights.items())
        if config.family is not None:
            stream = translate(stream, config.rules, config, to_ours=False)
        elif config.tie_embeddings:
            stream = ((name, tensor) for name, tensor in stream if name != "lm_head.weight")
        if whole is None:
            return stream
        others = ((name, tensor.to(device)) for name, tensor in other_weights(whole, config))
        return chain(spelled_as_in(whole, stream, config), others)

    write_shards(folder, theirs("cpu"), max_shard_bytes, plan=theirs("meta"))


def write_config(folder: Path, config: Config, source: Path | None, dtype: torch.dtype, whole: Path | None = None) -> None:
    """Write `config.json` after the source's, and `model_config.yaml`.

    Args:
        folder: Where to.
        config: The architecture.
        source: The checkpoint directory it comes from.
        dtype: Of the weights.
        whole: The multimodal model that it is written as a part of.
    """
    origin, written = whole or source, str(dtype).removeprefix("torch.")
    original = read_json(origin / names.CONFIG) or None if origin is not None else None
    if original is not None and whole is None:
        original = _text_part(original, config)
    described = config.to_hf(original) if config.family is not None else config.to_own()
    described["torch_dtype"] = described["dtype"] = written
    if whole is not None:
        described["text_config"] |= {key: written for key in ("torch_dtype", "dtype") if key in described["text_config"]}
    (folder / names.CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    config.save(folder / names.LIT_CONFIG)


def _text_part(original: dict[str, Any], config: Config) -> dict[str, Any] | None:
    """Return what a source's `config.json` says of the text model, or None: the tokenizer's folder may be that of another model."""
    model_type, text = original.get("model_type"), original.get("text_config")
    if config.family is not None and model_type in FAMILIES[config.family].wrappers and isinstance(text, dict):
        ids = {key: original[key] for key in TOKEN_IDS if key in original}
        original, model_type = ids | text, text.get("model_type", config.family)
    return original | {"model_type": model_type} if model_type == config.family else None


def _is_wrapped(folder: Path, config: Config) -> bool:
    """Say whether transformers reads a folder as a multimodal model whose text part is of the config's family."""
    wrappers = FAMILIES[config.family].wrappers if config.family is not None else ()
    return read_json(folder / names.CONFIG).get("model_type") in wrappers and bool(hf_weight_files(folder))


def write_ends(folder: Path) -> None:
    """Let `generation_config.json` name all tokens that end a text, so that other programs stop there too.

    Args:
        folder: Holds a tokenizer, or a `config.json` that has the ids.
    """
    file = folder / names.GENERATION_CONFIG
    values, described = read_json(file, repair=True), read_json(folder / names.CONFIG)
    described |= described.get("text_config") or {}
    new = {key: described.get(key) for key in ("bos_token_id", "eos_token_id") if values.get(key) is None}
    if is_file(folder / names.TOKENIZER_JSON):
        tokenizer, said = Tokenizer(folder), values.get("eos_token_id")
        ends = list(tokenizer.eos_ids)
        if not set(ends) <= set(said if isinstance(said, list) else [said]):
            new["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        if values.get("bos_token_id") is None and tokenizer.bos_id is not None:
            new["bos_token_id"] = tokenizer.bos_id
    if new := {key: value for key, value in new.items() if value is not None}:
        file.write_text(json.dumps(values | new, indent=2) + "\n", encoding="utf-8")


def copy_side_files(source: Path, target: Path, *more: str) -> None:
    """Copy the files of tokenizer and processor, `generation_config.json` and the prompt style, where the target has none of its own."""
    for name in (*names.TOKENIZER_FILES, *names.PROCESSOR_FILES, names.GENERATION_CONFIG, names.PROMPT_STYLE, *more):
        if is_file(source / name) and not (target / name).exists():
            check_readable(source / name)  # or the target would be blamed
            shutil.copyfile(source / name, target / name)


def check_side_files(folder: Path) -> None:
    """Refuse damaged files of tokenizer and generation where they lie, before a copy of them would be blamed.

    Raises:
        UserError: One is damaged.
    """
    read_json(folder / names.GENERATION_CONFIG, repair=True)
    if is_file(folder / names.TOKENIZER_JSON):
        Tokenizer(folder)


def write_adapter(folder: Path, model: GPT, lora: LoRA, base: str) -> None:
    """Write the LoRA updates of a model as a PEFT adapter; see `adapter_writer`."""
    adapter_writer(model, lora, base)(folder)


def adapter_writer(model: GPT, lora: LoRA, base: str) -> Callable[[Path], None]:
    """Return what writes the LoRA updates of a model, as they are now, into a folder as a PEFT adapter.

    Args:
        model: Still with its LoRA layers; they may be merged before the adapter is written.
        lora: Their settings.
        base: The name or folder of the model they were trained beside.

    Raises:
        UserError: No family of checkpoints can express the model.
    """
    tensors, described = adapter_to_peft(model, lora)
    if _is_wrapped(Path(base), model.config):
        tensors, described = within_whole(tensors, described, model.config)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / names.ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / names.ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": base} | described, indent=2) + "\n")

    return write
