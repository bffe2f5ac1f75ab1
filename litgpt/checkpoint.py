"""Read and write checkpoint directories: Hugging Face's layout, LitGPT's, and the steps of our own runs."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from litgpt import names
from litgpt.config import Config
from litgpt.errors import MissingFile, UserError, disk_error
from litgpt.lora import LoRA, LoRALinear, add_lora, lora_filter, merge_lora_weights
from litgpt.model import GPT
from litgpt.translate import adapter_to_peft, add_updates, dequantized, peft_updates, translate
from litgpt.weights import interleaved_qkv

AGAIN = "Config and weights are of different models: download or convert the checkpoint again."
MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {name: getattr(torch, name) for name in names.DTYPES}


# Reading


def load_model(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", model_class: Callable[[Config], GPT] = GPT
) -> GPT:
    """Return the model of a checkpoint directory, in eval mode; LoRA updates that lie beside its weights are merged in.

    Args:
        folder: Holds weights and the config that describes them, see DESIGN "Which file counts"; or a PEFT adapter, which names its base.
        dtype: Of the parameters; by default as they are stored.
        device: Where to put them.
        model_class: Makes the model of its config.

    Raises:
        MissingFile: The folder lacks weights or config.
        UserError: A file is damaged, or the weights do not fit the config.
    """
    if has_lora(folder):
        model, _ = load_lora(folder, None, dtype, device, model_class)
        merge_lora_weights(model)
        return model.eval()
    config = Config.from_checkpoint(folder)
    weights = {name: _moved(tensor, dtype, device) for name, tensor in read_weights(folder, config)}
    if not config.tie_embeddings and not hf_weight_files(folder) and _is_tied(weights):
        config = replace(config, tie_embeddings=True)
    return assemble(config, weights, str(folder), model_class)


def assemble(config: Config, weights: dict[str, Tensor], where: str, model_class: Callable[[Config], GPT] = GPT) -> GPT:
    """Return a model that holds these tensors themselves, in eval mode.

    Args:
        config: The architecture.
        weights: All parameters under our names; a tied head may be missing.
        where: Where they come from, for error messages.
        model_class: Makes the model of its config.
    """
    with torch.device("meta"), _WithoutInitialisation():
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


class _WithoutInitialisation(TorchFunctionMode):
    """Draw no first weights. On the meta device that would be for nothing, and import torch's compiler, which takes seconds."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def read_weights(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder under our names, one after the other as they are read from the disk."""
    if files := hf_weight_files(folder):
        stream = (pair for file in files for pair in _read_file(file))
        yield from translate(dequantized(stream, None), config.rules, config, to_ours=True)
    elif (file := folder / names.LIT_WEIGHTS).is_file():
        yield from _modern(_unwrapped(file), config)
    elif (folder / names.RUN_STATE / names.STATE).is_file():
        yield from _read_step(folder)
    else:
        raise MissingFile(f"{folder} holds no weights: neither *.safetensors nor *.bin nor {names.LIT_WEIGHTS}.")


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the largest part of a folder's weights."""
    sizes: dict[torch.dtype, int] = {}
    for _, tensor in read_raw(folder):
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else torch.float32


def read_raw(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder under the names they are stored by."""
    if files := hf_weight_files(folder):
        yield from (pair for file in files for pair in _read_file(file))
    elif (folder / names.LIT_WEIGHTS).is_file():
        yield from _unwrapped(folder / names.LIT_WEIGHTS).items()
    elif (folder / names.RUN_STATE / names.STATE).is_file():
        yield from _read_step(folder)
    else:
        raise MissingFile(f"{folder} holds no weights: neither *.safetensors nor *.bin nor {names.LIT_WEIGHTS}.")


def hf_weight_files(folder: Path) -> list[Path]:
    """Return the files that hold Hugging Face's weights: safetensors, else `.bin`, else none."""
    for index, single, pattern in (
        (names.SAFETENSORS_INDEX, names.SAFETENSORS, "*.safetensors"),
        (names.BIN_INDEX, names.BIN, "*.bin"),
    ):
        if (folder / index).is_file():
            described = read_json(folder / index)
            if not isinstance(described, dict) or not isinstance(listed := described.get("weight_map"), dict):
                raise UserError(f"{folder / index} is damaged. Delete it and download it again.")
            for name in listed.values():  # anything else would lead out of the folder
                if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                    way = "but may only name files that lie beside it. Use a checkpoint from another source."
                    raise UserError(f"{folder / index} names {name!r}, {way}")
            files = [folder / name for name in sorted(set(listed.values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise MissingFile(f"{folder / index} names {missing[0]!r}, which is not there. Download the checkpoint again.")
            return files
        found = sorted(path for path in folder.glob(pattern) if path.name not in ("training_args.bin", names.ADAPTER_WEIGHTS))
        if found:
            return [folder / single] if (folder / single).is_file() else found
    return []


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}. Download it again.") from None


def _read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix != ".safetensors":
        yield from _unwrapped(file).items()
        return
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def _read_step(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a step of a run. Ranks that had shared them out wrote slices, which are put together."""
    slices: dict[str, list[tuple[Path, list[int], list[int]]]] = {}
    for file in sorted((folder / names.RUN_STATE).glob("*.safetensors")):
        with _opened(file) as opened:
            places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118
                if "/" not in name:  # what the optimizer and the generators remember has one
                    slices.setdefault(name, []).append((file, places[name]["saved_offsets"], opened.get_slice(name).get_shape()))
    for name, parts in slices.items():
        tensors = []
        for file, _, _ in parts:
            with _opened(file) as opened:
                tensors.append(opened.get_tensor(name))
        ends = [[offset + size for offset, size in zip(offsets, shape, strict=True)] for _, offsets, shape in parts]
        whole = tensors[0] if len(parts) == 1 else tensors[0].new_empty([max(sizes) for sizes in zip(*ends, strict=True)])
        for (_, offsets, _), end, tensor in zip(parts, ends, tensors, strict=True) if len(parts) > 1 else ():
            whole[tuple(slice(a, b) for a, b in zip(offsets, end, strict=True))] = tensor
        yield name, whole


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; one that is damaged is a UserError."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut off ({error}). Delete it and download it again.") from None


def _load_pickle(file: Path) -> Any:
    """Read a file of `torch.save`, which may hold tensors and plain values only."""
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # the format of torch before 1.6
    except Exception as error:  # torch raises almost anything for a file that is damaged
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{file} holds more than tensors, and reading it could run any code. Only plain weights are read.") from None
        raise UserError(f"{file} is damaged or no file of torch.save ({type(error).__name__}). Download or write it again.") from None


def _unwrapped(file: Path) -> dict[str, Tensor]:
    """Return the weights that a file of `torch.save` holds: plain, under "model", or with the prefix of a compiled model."""
    loaded = _load_pickle(file)
    weights = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(weights, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in weights.items()):
        raise UserError(f"{file} must hold a dictionary of names and tensors, plain or under 'model', but does not. Write it again.")
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}


def _modern(weights: dict[str, Tensor], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Rename LitGPT's older `attn.attn` weights, whose rows are ordered by query group, to `attn.qkv`."""
    old = "transformer.h.{}.attn.attn.*"
    rule = [interleaved_qkv(old, "transformer.h.{}.attn.qkv.*")]
    for name, tensor in weights.items():
        match = re.fullmatch(r"(.*\.attn)\.attn\.(.*)", name)
        if match is None:
            yield name, tensor
        elif match[2] in ("weight", "bias", "linear.weight", "linear.bias"):
            plain = name.replace(".linear.", ".")
            yield from translate([(plain, tensor)], rule, config, to_ours=True)
        else:  # factors of LoRA: A is stacked by q, k, v in both layouts, and so is B
            yield f"{match[1]}.qkv.{match[2]}", tensor


def _moved(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _is_tied(weights: dict[str, Tensor]) -> bool:
    """Say whether head and embedding are one matrix: LitGPT stores both and does not say."""
    head, embedding = weights.get("lm_head.weight"), weights.get("transformer.wte.weight")
    return head is not None and embedding is not None and head.shape == embedding.shape and torch.equal(head, embedding)


# LoRA beside its base


def has_lora(folder: Path) -> bool:
    """Say whether a folder holds LoRA updates without merged weights: LitGPT's, PEFT's, or a step of a LoRA run."""
    if hf_weight_files(folder) or (folder / names.LIT_WEIGHTS).is_file():
        return False
    if (folder / names.LIT_LORA).is_file() or (folder / names.ADAPTER_CONFIG).is_file():
        return True
    return (folder / names.RUN_STATE / names.STATE).is_file() and any("lora_" in name for name, _ in read_raw(folder))


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
    if (folder / names.ADAPTER_CONFIG).is_file():
        settings = read_json(folder / names.ADAPTER_CONFIG)
        base = base or base_of(folder, settings.get("base_model_name_or_path"))
        return _with_peft_adapter(folder, settings, base, dtype, device, model_class), base
    hyperparameters = read_hyperparameters(folder)
    base = base or base_of(folder, hyperparameters.get("checkpoint_dir"))
    model = load_model(base, dtype, device, model_class)
    settings = {key.removeprefix("lora_"): value for key, value in hyperparameters.items() if key.startswith("lora_")}
    if unknown := settings.keys() - {field.name for field in fields(LoRA)}:
        raise UserError(f"{folder / names.HYPERPARAMETERS} holds `lora_{min(unknown)}`, which is no option of LoRA. Remove it.")
    add_lora(model, LoRA(**settings))
    stored = _unwrapped(folder / names.LIT_LORA) if (folder / names.LIT_LORA).is_file() else dict(read_raw(folder))
    updates = {name: tensor for name, tensor in _modern(stored, model.config) if lora_filter(name, tensor) and "/" not in name}
    expected = {name: parameter for name, parameter in model.named_parameters() if lora_filter(name, parameter)}
    if updates.keys() != expected.keys() or any(updates[name].shape != expected[name].shape for name in updates):
        raise UserError(f"The LoRA weights in {folder} do not fit the settings in its {names.HYPERPARAMETERS} and the base model {base}.")
    model.load_state_dict({name: tensor.to(device) for name, tensor in updates.items()}, strict=False)
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
    for key in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices"):
        if settings.get(key):
            raise UserError(f"{folder} uses PEFT's `{key}`, which is not supported. Merge it with PEFT first.")
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        raise UserError(f"{folder} is not a plain LoRA adapter of PEFT, the only kind that is read.")
    if not hf_weight_files(base):
        raise UserError(
            f"{base} has no weights in Hugging Face's layout, which a PEFT adapter belongs to. Convert it with convert_from_litgpt."
        )
    config = Config.from_checkpoint(base)
    updates = peft_updates(dict(_read_file(folder / names.ADAPTER_WEIGHTS)), settings, config)
    stream = ((name, _moved(tensor, dtype, device)) for name, tensor in read_raw(base))
    weights = dict(translate(add_updates(stream, updates), config.rules, config, to_ours=True))
    return assemble(config, weights, str(folder), model_class)


def described_by(folder: Path) -> Path:
    """Return the folder whose config and tokenizer a checkpoint is used with: itself, or the base that a PEFT adapter names."""
    if not (folder / names.ADAPTER_CONFIG).is_file() or (folder / names.CONFIG).is_file():
        return folder
    return base_of(folder, read_json(folder / names.ADAPTER_CONFIG).get("base_model_name_or_path"))


def read_hyperparameters(folder: Path) -> dict[str, Any]:
    """Return the options of the run that wrote a folder."""
    file = folder / names.HYPERPARAMETERS
    if not file.is_file():
        raise MissingFile(f"{folder} lacks {names.HYPERPARAMETERS}, which says how its LoRA weights were trained and beside which model.")
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold the options of a run, but does not.")
    return values


def base_of(folder: Path, name: str | None) -> Path:
    """Return the folder of the model that LoRA weights were trained beside, by the name they give it."""
    for candidate in (Path(name), Path(names.CHECKPOINTS) / name, folder / name) if name and isinstance(name, str) else ():
        if candidate.is_dir():
            return candidate
    raise MissingFile(
        f"The base model {name!r} of {folder} is not there. Name it with: merge_lora {folder} --pretrained_checkpoint_dir DIR"
    )


# Writing


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into that gets the name `path` once all is on the disk; on any error nothing is left.

    Args:
        path: The folder to make.
        overwrite: Put it in the place of an existing one, which stays until the new one is complete.

    Raises:
        UserError: `path` exists and is not to be overwritten, or the disk is full or forbids writing.
    """
    path = path.absolute()
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists. Choose another folder, or delete it first.")
    partial, previous = path.with_name(path.name + names.PARTIAL), path.with_name(path.name + ".old" + names.PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        written = list(partial.rglob("*"))
        for file in written:
            file.chmod(file.stat().st_mode | partial.stat().st_mode & 0o666)  # safetensors lets nobody else read its files
        sync(*written, partial)
        shutil.rmtree(previous, ignore_errors=True)
        if path.exists():
            path.rename(previous)
        partial.rename(path)
        sync(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if message := disk_error(error):
            raise UserError(f"{path} could not be written: {message}") from error
        raise


def sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Config,
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    extras: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a complete Hugging Face folder: weights, config, and the source's tokenizer and other side files. All or nothing.

    Args:
        folder: Where to.
        weights: All parameters under our names.
        config: Their architecture. One that no family of checkpoints can express is written under our own names.
        source: The checkpoint directory they come from: its `config.json` and tokenizer files are carried over.
        dtype: Of the weights; by default as they are.
        extras: Writes further files into the folder.
        overwrite: Replace an existing folder.
    """
    with atomic_folder(folder, overwrite) as partial:
        write_weights(partial, weights, config, dtype)
        write_config(partial, config, source, dtype or next(iter(weights.values())).dtype)
        if source is not None:
            copy_side_files(source, partial)
        if extras is not None:
            extras(partial)


def write_weights(folder: Path, weights: Mapping[str, Tensor], config: Config, dtype: torch.dtype | None = None) -> None:
    """Write safetensors under Hugging Face's names, in shards of 5 GB, each written as soon as it is full."""
    stream = ((name, tensor.detach()) for name, tensor in weights.items())
    if config.family is not None:
        stream = translate(stream, config.rules, config, to_ours=False)
    elif config.tie_embeddings:
        stream = ((name, tensor) for name, tensor in stream if name != "lm_head.weight")
    write_shards(folder, ((name, _moved(tensor, dtype, "cpu").contiguous()) for name, tensor in stream))


def write_shards(folder: Path, stream: Iterable[tuple[str, Tensor]], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensors as `model.safetensors`, or as several files and their index where that would grow too large."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in stream:
        if shard and size + tensor.nbytes > max_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / names.SAFETENSORS)
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (folder / f"shard-{i}").rename(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: files[i] for i, held in enumerate(shards) for name in held}}
    (folder / names.SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2))


def write_config(folder: Path, config: Config, source: Path | None, dtype: torch.dtype) -> None:
    """Write `config.json` after the source's, and `model_config.yaml`."""
    original = read_json(source / names.CONFIG) if source is not None and (source / names.CONFIG).is_file() else None
    if original is not None and original.get("model_type") != config.family:
        original = None  # the tokenizer's folder may be that of another model
    described = config.to_hf(original) if config.family is not None else config.to_own()
    described["torch_dtype"] = described["dtype"] = str(dtype).removeprefix("torch.")
    (folder / names.CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    config.save(folder / names.LIT_CONFIG)


def copy_side_files(source: Path, target: Path, *more: str) -> None:
    """Copy the tokenizer's files, `generation_config.json` and the prompt style, where the target has none of its own."""
    for name in (*names.TOKENIZER_FILES, names.GENERATION_CONFIG, names.PROMPT_STYLE, *more):
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)


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
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    tensors, described = adapter_to_peft(layers, model.config, lora)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / names.ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / names.ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": base} | described, indent=2) + "\n")

    return write
