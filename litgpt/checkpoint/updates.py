"""Folders that hold no whole weights, but what was trained beside those of another model: by LoRA, Adapter or Adapter v2."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from litgpt import names
from litgpt.adapter_v2 import is_new
from litgpt.config import Config
from litgpt.errors import MissingFile, UserError
from litgpt.files import is_file, is_folder, read_json, read_yaml
from litgpt.litgpt_layout import from_litgpt_names
from litgpt.lora import LoRA, lora_filter
from litgpt.model import GPT
from litgpt.peft_format import Updates, check_plain, peft_updates
from litgpt.weight_files import plain_files, read_file, read_headers, read_raw, unwrapped

# Which folders


def has_lora(folder: Path) -> bool:
    """Say whether a folder holds LoRA updates without merged weights: LitGPT's, PEFT's, or a step of a LoRA run."""
    if plain_files(folder):
        return False
    if is_file(folder / names.LIT_LORA) or is_file(folder / names.ADAPTER_CONFIG):
        return True
    return is_file(folder / names.RUN_STATE / names.STATE) and any("lora_" in name for name, _, _ in read_headers(folder))


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


# The model beside which it was trained


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
    is_own = is_file(folder / names.OWN_ADAPTER)
    name = (read_yaml(folder / names.OWN_ADAPTER_BASE) if is_own else read_hyperparameters(folder)).get("checkpoint_dir")
    return base_of(folder, name, "generate DIR --adapter {}") if has_adapter(folder) else base_of(folder, name)


def base_of(folder: Path, name: str | None, way: str = "merge_lora {} --pretrained_checkpoint_dir DIR") -> Path:
    """Return the folder of the model that updates were trained beside, by the name they give it; `way` is a command that names it."""
    for candidate in (Path(name), Path(names.CHECKPOINTS) / name, folder / name) if name and isinstance(name, str) else ():
        if is_folder(candidate) and candidate.resolve() != folder.resolve():  # or reading it would never end
            return candidate
    raise MissingFile(f"The base model {name!r} of {folder} is not there. Name it with: {way.format(folder)}")


# LoRA's updates


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
