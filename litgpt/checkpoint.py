"""Read and write checkpoint directories: Hugging Face's layout, LitGPT's, and the steps of our own runs."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from litgpt import names
from litgpt.adapter_v2 import add_stored, is_new
from litgpt.config import Config
from litgpt.errors import MissingFile, UserError
from litgpt.experts import EXACT
from litgpt.families import FAMILIES
from litgpt.families.family import TOKEN_IDS
from litgpt.files import atomic_folder, check_readable, is_file, is_folder, read_json, read_yaml
from litgpt.litgpt_layout import from_litgpt_names
from litgpt.lora import LoRA, add_lora, lora_filter, merge_lora_weights
from litgpt.model import GPT
from litgpt.multimodal import is_whole, other_weights, spelled_as_in, text_weights
from litgpt.peft_format import (
    Updates,
    adapter_to_peft,
    add_updates,
    check_plain,
    peft_updates,
    updates_tied_head,
    usual_names,
    within_whole,
)
from litgpt.tokenizer import Tokenizer
from litgpt.translate import translate
from litgpt.weight_files import (
    hf_weight_files,
    plain_files,
    read_file,
    read_headers,
    read_plain,
    read_raw,
    read_step,
    step_files,
    unwrapped,
    write_shards,
)

AGAIN = "Config and weights are of different models: download or convert the checkpoint again."
DTYPES = {name: getattr(torch, name) for name in names.DTYPES}


# Reading


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_class: Callable[[Config], GPT] = GPT,
    adapter: Path | None = None,
    prepare: Callable[[GPT], None] | None = None,
) -> GPT:
    """Return the model of a checkpoint directory, in eval mode, with what was trained beside it: LoRA's updates are merged in.

    Args:
        folder: Holds weights and the config that describes them, see DESIGN "Which file counts"; or an adapter, which names its base.
        dtype: Of the parameters; by default as they are stored.
        device: Where to put them.
        model_class: Makes the model of its config.
        adapter: Holds LoRA updates, or what Adapter trained, for this model, whatever model they name as their base; see `has_updates`.
        prepare: Changes the model when LoRA's updates are in it and what Adapter trained is not yet, such as `quantize_model`.

    Raises:
        MissingFile: The folder lacks weights or config.
        UserError: A file is damaged, or the weights do not fit the config.
    """
    if has_adapter(adapter or folder):
        return load_adapter(adapter or folder, folder if adapter else None, dtype, device, model_class, prepare)
    if adapter is not None or has_lora(folder):
        model, _ = load_lora(adapter or folder, folder if adapter else None, dtype, device, model_class)
        merge_lora_weights(model)
    else:
        config = Config.from_checkpoint(folder)
        weights = {name: _moved(tensor, dtype, device, name) for name, tensor in read_weights(folder, config)}
        if not config.tie_embeddings and not hf_weight_files(folder) and _is_tied(weights):
            config = replace(config, tie_embeddings=True)
        model = assemble(config, weights, str(folder), model_class)
    if prepare is not None:
        prepare(model)
    return model.eval()


def assemble(config: Config, weights: dict[str, Tensor], where: str, model_class: Callable[[Config], GPT] = GPT) -> GPT:
    """Return a model that holds these tensors themselves, in eval mode.

    Args:
        config: The architecture.
        weights: All parameters under our names; a tied head may be missing.
        where: Where they come from, for error messages.
        model_class: Makes the model of its config.
    """
    if config.tie_embeddings and "lm_head.weight" in weights and not _is_tied(weights):
        config = replace(config, tie_embeddings=False)  # as transformers does
        print(f"{where} says that head and embedding are one matrix, but holds two that differ, so they are kept apart.", file=sys.stderr)
    with weightless():
        model = model_class(config)
    expected = model.state_dict()
    if config.tie_embeddings:
        expected.pop("lm_head.weight")
        weights.pop("lm_head.weight", None)
    if missing := sorted(expected.keys() - weights.keys()):
        raise UserError(f"{where} lacks {len(missing)} weights of the model that its config describes, first {missing[0]!r}. {AGAIN}")
    if extra := sorted(weights.keys() - expected.keys()):
        raise UserError(
            f"{where} holds {len(extra)} weights that the model its config describes does not have, first {extra[0]!r}. {AGAIN}"
        )
    for name, parameter in expected.items():
        if not weights[name].is_floating_point() or weights[name].layout != torch.strided:
            raise UserError(f"In {where} the weight {name!r} is of the type {weights[name].dtype}, not of floating-point numbers. {AGAIN}")
        if weights[name].shape != parameter.shape:
            shapes = f"{tuple(weights[name].shape)} and the config makes it {tuple(parameter.shape)}"
            raise UserError(f"In {where} the shape of {name!r} is {shapes}. {AGAIN}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model.eval()


@contextmanager
def weightless() -> Iterator[None]:
    """Let models that are made meanwhile be on the meta device."""
    with torch.device("meta"), _WithoutInitialisation():
        yield


class _WithoutInitialisation(TorchFunctionMode):
    """Draw no first weights. On the meta device that would be for nothing, and import torch's compiler, which takes seconds."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def read_weights(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder under our names, one after the other as they are read from the disk."""
    if hf_weight_files(folder):
        yield from translate(text_weights(read_plain(folder), config), config.rules, config, to_ours=True)
    elif is_file(file := folder / names.LIT_WEIGHTS):
        yield from from_litgpt_names(unwrapped(file).items(), config)
    else:
        yield from read_step(step_files(folder))


def _moved(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str, name: str = "") -> Tensor:
    """Return a weight on a device and in a type, but in fp32 if it is called as what has to be exact."""
    dtype = torch.float32 if name.endswith(EXACT) else dtype
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _is_tied(weights: dict[str, Tensor]) -> bool:
    """Say whether head and embedding are one matrix: LitGPT stores both and does not say."""
    head, embedding = weights.get("lm_head.weight"), weights.get("transformer.wte.weight")
    return head is not None and embedding is not None and head.shape == embedding.shape and torch.equal(head, embedding)


# LoRA beside its base


def has_lora(folder: Path) -> bool:
    """Say whether a folder holds LoRA updates without merged weights: LitGPT's, PEFT's, or a step of a LoRA run."""
    if plain_files(folder):
        return False
    if is_file(folder / names.LIT_LORA) or is_file(folder / names.ADAPTER_CONFIG):
        return True
    return is_file(folder / names.RUN_STATE / names.STATE) and any("lora_" in name for name, _, _ in read_headers(folder))


def has_updates(folder: Path) -> bool:
    """Say whether a folder holds no whole weights, but what was trained beside those of another: by LoRA, Adapter or Adapter v2."""
    return has_adapter(folder) or has_lora(folder)


def find_adapter(argument: str | Path | None) -> Path | None:
    """Return the folder of updates that an argument means: a folder, or one in `checkpoints/`.

    Raises:
        MissingFile: There is none.
        UserError: It holds neither LoRA updates nor what Adapter trained.
    """
    if argument is None:
        return None
    folder = next((path for path in (Path(argument), Path(names.CHECKPOINTS) / argument) if is_folder(path)), None)
    if folder is None:
        raise MissingFile(f"There is no folder {str(argument)!r} with LoRA updates, neither here nor in {names.CHECKPOINTS}/.")
    if is_file(folder / names.ADAPTER / names.ADAPTER_CONFIG):  # as in a run's folder with the merged model
        folder = folder / names.ADAPTER
    if not is_file(folder / names.ADAPTER_CONFIG) and not has_updates(folder):
        files = f"neither {names.ADAPTER_CONFIG} nor {names.LIT_LORA} nor {names.OWN_ADAPTER}"
        raise UserError(f"{folder} holds no LoRA updates: {files} nor a step of a run that trained an adapter.")
    return folder.absolute()


def load_lora(
    folder: Path,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_class: Callable[[Config], GPT] = GPT,
) -> tuple[GPT, Path]:
    """Return the model that a folder's LoRA updates belong to, with them, and the folder of its base.

    LitGPT's updates and those of our runs are wrapped around their layers (`merge_lora_weights` adds them); PEFT's are added already.

    Args:
        folder: See `has_lora`.
        base: The model that was finetuned; by default the one that the folder names.
        dtype: Of the base's parameters; by default as they are stored.
        device: Where to put them.
        model_class: Makes the model of its config.
    """
    base = base or named_base(folder)
    if is_file(folder / names.ADAPTER_CONFIG):
        return _with_peft_adapter(folder, read_json(folder / names.ADAPTER_CONFIG), base, dtype, device, model_class), base
    model = load_model(base, dtype, device, model_class)
    add_lora(model, lora_settings(folder))
    load_updates(model, folder, base)
    return model, base


def lora_settings(folder: Path) -> LoRA:
    """Return the settings of the run that wrote a folder.

    Args:
        folder: See `has_lora`; none of PEFT's.

    Raises:
        UserError: What it says of them is wrong.
    """
    if has_adapter(folder):
        raise UserError(f"{folder} holds what Adapter trained, not LoRA updates. Name that folder in the place of the model.")
    options = read_hyperparameters(folder).items()
    settings = {key.removeprefix("lora_"): value for key, value in options if key.startswith("lora_")}
    if unknown := settings.keys() - {field.name for field in fields(LoRA)}:
        raise UserError(f"{folder / names.HYPERPARAMETERS} holds `lora_{min(unknown)}`, which is no option of LoRA. Remove it.")
    try:
        return LoRA(**settings)
    except UserError as error:
        raise UserError(f"{folder / names.HYPERPARAMETERS} does not say how the LoRA weights were made: {error}") from None


def load_updates(model: GPT, folder: Path, base: Path) -> None:
    """Give a model's LoRA layers the updates in a folder, in fp32.

    Args:
        model: Wrapped as `lora_settings` says. The layers of one on the meta device get updates on the CPU.
        folder: See `has_lora`; none of PEFT's.
        base: The model's folder, for messages.

    Raises:
        UserError: They do not fit.
    """
    stored = unwrapped(folder / names.LIT_LORA) if is_file(folder / names.LIT_LORA) else dict(read_raw(folder))
    modern = from_litgpt_names(stored.items(), model.config)
    updates = {name: tensor for name, tensor in modern if lora_filter(name, tensor) and "/" not in name}
    expected = {name: parameter for name, parameter in model.named_parameters() if lora_filter(name, parameter)}
    fits = all(tensor.is_floating_point() and tensor.shape == expected[name].shape for name, tensor in updates.items() if name in expected)
    if updates.keys() != expected.keys() or not fits:
        raise UserError(f"The LoRA weights in {folder} do not fit the settings in its {names.HYPERPARAMETERS} and the base model {base}.")
    device = next(iter(expected.values())).device
    device = "cpu" if device.type == "meta" else device
    made = {name: tensor.to(device, torch.float32) for name, tensor in updates.items()}
    model.load_state_dict(made, strict=False, assign=True)


def _with_peft_adapter(
    folder: Path,
    settings: dict[str, Any],
    base: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    model_class: Callable[[Config], GPT],
) -> GPT:
    """Return the base model with PEFT's updates added to its weights, which have Hugging Face's names in both."""
    if not hf_weight_files(base):
        raise UserError(
            f"{base} has no weights in Hugging Face's layout, which a PEFT adapter belongs to. Convert it with convert_from_litgpt."
        )
    config = Config.from_checkpoint(base)
    updates = read_peft_updates(folder, settings, config)
    untie = updates_tied_head(updates, config)
    stream = usual_names(text_weights(read_plain(base), config), config, untie)
    stream = ((name, _moved(tensor, dtype if name in updates.layers else None, device)) for name, tensor in stream)
    config = replace(config, tie_embeddings=config.tie_embeddings and not untie)
    translated = translate(add_updates(stream, updates.layers), config.rules, config, to_ours=True)
    moved = ((name, _moved(tensor, dtype, device, name)) for name, tensor in translated)
    weights = dict(add_updates(moved, updates.stacks))
    return assemble(config, weights, str(folder), model_class)


def read_peft_updates(folder: Path, settings: dict[str, Any], config: Config) -> Updates:
    """Return the updates in a PEFT adapter; those of other parts of a multimodal model are named in one line on stderr.

    Args:
        folder: The adapter's.
        settings: What its `adapter_config.json` holds.
        config: The architecture of its base.

    Raises:
        UserError: It is more than low-rank updates, or damaged.
    """
    check_plain(settings, folder)
    updates = peft_updates(dict(read_file(folder / names.ADAPTER_WEIGHTS)), settings, config)
    if updates.others:
        print(f"Skipped {len(updates.others)} updates of other parts, first {updates.others[0]}.", file=sys.stderr, flush=True)
    return updates


def described_by(folder: Path) -> Path:
    """Return the folder whose config and tokenizer a checkpoint is used with: itself, or the base that a PEFT adapter names."""
    if not is_file(folder / names.ADAPTER_CONFIG) or is_file(folder / names.CONFIG):
        return folder
    return named_base(folder)


def read_hyperparameters(folder: Path) -> dict[str, Any]:
    """Return the options of the run that wrote a folder."""
    file = folder / names.HYPERPARAMETERS
    if not is_file(file):
        raise MissingFile(f"{folder} lacks {names.HYPERPARAMETERS}, which says how what it holds was trained and beside which model.")
    return read_yaml(file)


def named_base(folder: Path) -> Path:
    """Return the folder of the model that a folder of updates names as the one they were trained beside.

    Args:
        folder: See `has_updates`, or a PEFT adapter.

    Raises:
        MissingFile: The model is not there.
    """
    if is_file(folder / names.ADAPTER_CONFIG):
        return base_of(folder, read_json(folder / names.ADAPTER_CONFIG).get("base_model_name_or_path"))
    if is_file(folder / names.OWN_ADAPTER):
        return base_of(folder, read_yaml(folder / names.OWN_ADAPTER_BASE).get("checkpoint_dir"), "generate DIR --adapter {}")
    return base_of(folder, read_hyperparameters(folder).get("checkpoint_dir"))


def base_of(folder: Path, name: str | None, way: str = "merge_lora {} --pretrained_checkpoint_dir DIR") -> Path:
    """Return the folder of the model that updates were trained beside, by the name they give it; `way` is a command that names it."""
    for candidate in (Path(name), Path(names.CHECKPOINTS) / name, folder / name) if name and isinstance(name, str) else ():
        if is_folder(candidate):
            return candidate
    raise MissingFile(f"The base model {name!r} of {folder} is not there. Name it with: {way.format(folder)}")


# Adapter beside its base


def has_adapter(folder: Path) -> bool:
    """Say whether a folder holds what Adapter or Adapter v2 trained: ours, LitGPT's, or a step of a run."""
    if is_file(folder / names.OWN_ADAPTER):
        return True
    if plain_files(folder):
        return False
    if is_file(folder / names.LIT_ADAPTER) or is_file(folder / names.LIT_ADAPTER_V2):
        return True
    return is_file(folder / names.RUN_STATE / names.STATE) and any(is_new(name) for name, _, _ in read_headers(folder))


def refuse_adapter(folder: Path) -> None:
    """Raise a UserError if a folder holds what Adapter trained, for commands that need a model's own weights and nothing beside them."""
    if has_adapter(folder):
        raise UserError(
            f"{folder} holds what Adapter trained beside a model, which cannot be made a part of its weights. "
            "Name the model instead; generate, chat, serve and evaluate take the folder as it is."
        )


def load_adapter(
    folder: Path,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_class: Callable[[Config], GPT] = GPT,
    prepare: Callable[[GPT], None] | None = None,
) -> GPT:
    """Return a model with what Adapter or Adapter v2 trained beside it, in eval mode.

    Args:
        folder: See `has_adapter`.
        base: The model that was finetuned; by default the one that the folder names.
        dtype: Of the base's parameters; by default as they are stored.
        device: Where to put them.
        model_class: Makes the model of its config.
        prepare: See `load_model`.

    Raises:
        MissingFile: The base is not there.
        UserError: The two do not fit, or LitGPT's `finetune_adapter` wrote the folder.
    """
    ours, litgpts = is_file(folder / names.OWN_ADAPTER), is_file(folder / names.LIT_ADAPTER_V2)
    if is_file(folder / names.LIT_ADAPTER) and not (ours or litgpts):
        raise UserError(
            f"{folder / names.LIT_ADAPTER} is of LitGPT's finetune_adapter, which never trains its prefixes and takes rows of queries for "
            "their keys and values. Train it again with: litgpt finetune_adapter"
        )
    base = base or named_base(folder)
    model = load_model(base, dtype, device, model_class, prepare=prepare)
    if ours:
        stored = dict(read_file(folder / names.OWN_ADAPTER))
    else:
        stored = unwrapped(folder / names.LIT_ADAPTER_V2) if litgpts else dict(read_step(step_files(folder)))
    grouped = litgpts and not any(".attn.attn." in name for name in stored)  # which versions before the change had
    if not add_stored(model, dict(from_litgpt_names(stored.items(), model.config)) if litgpts else stored, grouped):
        raise UserError(f"What Adapter trained in {folder} does not fit the base model {base}. Name the model it was trained beside.")
    return model.eval()


# Writing


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
        stream = ((name, _moved(tensor.detach(), dtype, device, name)) for name, tensor in weights.items())
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
