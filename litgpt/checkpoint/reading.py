"""Models from checkpoint directories: Hugging Face's layout, LitGPT's, the steps of our own runs, and what was trained beside a model."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from litgpt import names
from litgpt.adapter_v2 import add_stored
from litgpt.checkpoint.updates import has_adapter, has_lora, load_updates, lora_settings, named_base, read_peft_updates
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.experts import EXACT
from litgpt.files import is_file, read_json
from litgpt.litgpt_layout import from_litgpt_names
from litgpt.lora import add_lora, merge_lora_weights
from litgpt.model import GPT
from litgpt.multimodal import text_weights
from litgpt.peft_format import add_updates, updates_tied_head, usual_names
from litgpt.translate import translate
from litgpt.weight_files import hf_weight_files, read_file, read_plain, read_step, step_files, unwrapped

AGAIN = "Config and weights are of different models: download or convert the checkpoint again."
DTYPES = {name: getattr(torch, name) for name in names.DTYPES}


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
        weights = {name: moved(tensor, dtype, device, name) for name, tensor in read_weights(folder, config)}
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


def moved(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str, name: str = "") -> Tensor:
    """Return a weight on a device and in a type, but in fp32 if it is called as what has to be exact."""
    dtype = torch.float32 if name.endswith(EXACT) else dtype
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _is_tied(weights: dict[str, Tensor]) -> bool:
    """Say whether head and embedding are one matrix: LitGPT stores both and does not say."""
    head, embedding = weights.get("lm_head.weight"), weights.get("transformer.wte.weight")
    return head is not None and embedding is not None and head.shape == embedding.shape and torch.equal(head, embedding)


# Beside its base


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
    stream = ((name, moved(tensor, dtype if name in updates.layers else None, device)) for name, tensor in stream)
    config = replace(config, tie_embeddings=config.tie_embeddings and not untie)
    translated = translate(add_updates(stream, updates.layers), config.rules, config, to_ours=True)
    ours = ((name, moved(tensor, dtype, device, name)) for name, tensor in translated)
    weights = dict(add_updates(ours, updates.stacks))
    return assemble(config, weights, str(folder), model_class)


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
