"""Write a checkpoint as a GGUF file, llama.cpp's format, with an Ollama `Modelfile` beside it."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litgpt import names
from litgpt.checkpoint import described_by, load_model, refuse_adapter
from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean, disk_error, optional
from litgpt.files import cannot_read, cannot_write, sync
from litgpt.model import GPT
from litgpt.prompts import ChatTemplate, Default, find_prompt_style
from litgpt.prompts.style import PromptStyle
from litgpt.scripts.download import find_checkpoint
from litgpt.scripts.gguf_chat import Turns, find_turns, modelfile, stop_texts
from litgpt.scripts.gguf_header import MAGIC, Metadata
from litgpt.scripts.gguf_tables import (
    ARCHITECTURES,
    ROPE_FACTORS,
    Architecture,
    config_of,
    entries_of,
    stored_factors,
    stretched,
    to_theirs,
)
from litgpt.scripts.gguf_tokenizer import as_read, tokenizer_entries
from litgpt.tokenizer import Tokenizer

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # what `--dtype` may say, and what llama.cpp calls it
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # values of general.file_type
STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ALIGNMENT = 32
CHUNK = 2**20  # how many numbers are converted at a time
Q8_BLOCK = 32  # how many numbers share a scale
MODELFILE = "Modelfile"
UNCOMPARED = ("name", "hf_config", "family", "vocab_size", "padding_multiple", "bias", "rope_condense_ratio")


def export_gguf(checkpoint_dir: Path, output: Path, dtype: str | None = None) -> None:
    """Write a checkpoint as a GGUF file, which llama.cpp, Ollama, LM Studio and others run.

    The file holds the weights, the architecture, the tokenizer and the chat template. LoRA updates beside the weights are merged in. A
    `Modelfile` for `ollama create` is written into the same folder. Nothing is overwritten.

    Args:
        checkpoint_dir: A checkpoint of the type llama, mistral, qwen2, qwen3, gemma, gemma2 or gemma3_text.
        output: The file to write, such as `model.gguf`.
        dtype: How matrices are stored: f32, f16, bf16, or q8_0, which takes half the space of f16 and rounds each number to one of 255
            steps. By default as the checkpoint stores them. Vectors are in f32.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"`dtype` is one of {', '.join(DTYPES)}, but got {dtype!r}.{did_you_mean(dtype, DTYPES)}")
    if output.suffix != ".gguf":
        raise UserError(f"The name of a GGUF file ends in .gguf, but {str(output)!r} does not. Add it.")
    _check_free(output)
    optional("gguf", "gguf")
    folder = find_checkpoint(checkpoint_dir)
    refuse_adapter(folder)
    source = described_by(folder)
    architecture = _architecture_of(Config.from_checkpoint(source))
    model = load_model(folder)
    dtype = dtype or STORED.get(model.transformer.wte.weight.dtype, "f32")
    entries, turns, stops = _described(architecture, model, folder, source, dtype)
    _write(output, architecture, model, entries, dtype)
    beside = _write_modelfile(output, modelfile(output.name, turns, stops))
    if architecture.period is None and model.config.sliding_window_size is not None:
        n = model.config.sliding_window_size
        print(f"llama.cpp does not limit what a token of this model sees: it computes the same up to {n} tokens, but not beyond.")
    print(f"Saved {output}, and {beside} for `ollama create NAME -f {beside}`.")


def _check_free(output: Path) -> None:
    """Refuse to overwrite anything but what an export that was killed has left."""
    partial = _partial(output)
    try:
        if output.exists() or output.is_symlink():
            raise UserError(f"{output} already exists. Choose another name, or delete it first.")
        if not partial.exists():
            return
        with partial.open("rb") as file:
            begin = file.read(4)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise cannot_read(partial, error) from None
    if begin not in (b"", MAGIC):
        raise UserError(f"{partial} is in the way, a name that is needed while {output.name} is written. Move it, or delete it.")


def _partial(output: Path) -> Path:
    return output.with_name(output.name + names.PARTIAL)


# What the file says


def _architecture_of(config: Config) -> Architecture:
    """Return what llama.cpp calls the architecture.

    Raises:
        UserError: It is not among those that are written.
    """
    found = next((architecture for architecture in ARCHITECTURES.values() if config.family in architecture.families), None)
    if found is None:
        known = ", ".join(family for architecture in ARCHITECTURES.values() for family in architecture.families)
        raise UserError(f"Models of the type {config.family or 'litgpt'!r} are not written as GGUF files, only those of: {known}.")
    return found


def _described(
    architecture: Architecture, model: GPT, folder: Path, source: Path, dtype: str
) -> tuple[dict[str, Any], Turns | None, list[str]]:
    """Return the entries of the file, how conversations are written, and what ends an answer."""
    config, tokenizer = model.config, Tokenizer(source)
    style = find_prompt_style(folder, tokenizer, config=config)
    turns = None if isinstance(style, Default) else find_turns(style, tokenizer)
    entries = {"general.type": "model", "general.name": config.name or folder.name, "general.file_type": FILE_TYPES[dtype]}
    entries |= {"general.quantization_version": 2} if dtype == "q8_0" else {}
    entries |= entries_of(architecture, config) | tokenizer_entries(source, config.padded_vocab_size)
    if (end := _turn_end(style, tokenizer)) is not None and end < config.padded_vocab_size:
        entries["tokenizer.ggml.eot_token_id"] = end
    template = style.template if isinstance(style, ChatTemplate) else turns.jinja if turns is not None else None
    if template:
        entries["tokenizer.chat_template"] = template
    _verify(architecture, model, entries)
    return entries, turns, stop_texts(style, tokenizer)


def _turn_end(style: PromptStyle, tokenizer: Tokenizer) -> int | None:
    """Return the token that ends an answer, if that is another than the one that ends a text."""
    single = (ids[0] for ids in style.stop_tokens(tokenizer) if len(ids) == 1)
    candidates = [tokenizer.find_token(style.turn_end(tokenizer)), *tokenizer.eos_ids, *single]
    return next((id for id in candidates if id is not None and id != tokenizer.eos_id), None)


def _verify(architecture: Architecture, model: GPT, entries: dict[str, Any]) -> None:
    """Refuse a model of which llama.cpp would compute another one, because no entry says what it takes for granted."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(architecture, model, "meta")}
    config = model.config
    read = config_of(architecture, Metadata(Path("the file"), as_read(entries)), shapes, factors=None)
    beside = {*UNCOMPARED, "rope_adjustments"} if stored_factors(config) is not None else UNCOMPARED  # the factors say all of it
    pairs = ((name, getattr(config, name), getattr(read, name)) for name in config.to_dict() if name not in beside)
    for name, ours, theirs in pairs:
        if name == "attention_scores_scalar":
            ours, theirs = ours or config.head_size, theirs or read.head_size
        elif name == "rope_adjustments":
            ours = stretched(config)
        if ours != theirs:
            raise UserError(
                f"llama.cpp computes {architecture.name} models with the `{name}` {theirs!r} only, but here it is {ours!r:.200}."
            )


# Writing


def _tensors(architecture: Architecture, model: GPT, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as llama.cpp names them and lays them out, on the device "meta" without their numbers."""
    if (factors := stored_factors(model.config)) is not None:
        yield ROPE_FACTORS, factors
    stream = ((name, tensor.detach().to(device)) for name, tensor in model.state_dict().items())
    yield from to_theirs(architecture, stream, model.config)


def _kind(tensor: Tensor, dtype: str) -> str:
    """Return how a weight is stored: vectors in full, and rows that do not fall into blocks in half precision."""
    if tensor.ndim < 2:
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.size(-1) % Q8_BLOCK else dtype


def _n_bytes(tensor: Tensor, kind: str) -> int:
    per_number = {"f32": 4, "f16": 2, "bf16": 2}
    return tensor.numel() // Q8_BLOCK * (Q8_BLOCK + 2) if kind == "q8_0" else tensor.numel() * per_number[kind]


def _write(output: Path, architecture: Architecture, model: GPT, entries: dict[str, Any], dtype: str) -> None:
    """Write the file under another name, which it loses once all of it is on the disk."""
    partial = _partial(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_header(partial, architecture, model, entries, dtype)
        with partial.open("ab") as file:
            for name, tensor in _tensors(architecture, model):
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                for chunk in _chunks(tensor):
                    file.write(_encoded(chunk, _kind(tensor, dtype), name).data)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
        sync(partial)
        _put(partial, output)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if disk_error(error) or isinstance(error, OSError):  # the model is in memory: all that is opened here is written
            raise cannot_write(output, error) from error
        raise


def _put(partial: Path, output: Path) -> None:
    """Give a complete file its name, unless another one has got it meanwhile."""
    _check_free(output)
    os.replace(partial, output)
    sync(output.parent)


def _write_header(partial: Path, architecture: Architecture, model: GPT, entries: dict[str, Any], dtype: str) -> None:
    gguf = optional("gguf", "gguf")
    writer = gguf.GGUFWriter(partial, architecture.name)
    for key, value in entries.items():
        _add(writer, key, value)
    for name, tensor in _tensors(architecture, model, "meta"):
        kind = _kind(tensor, dtype)
        stored, shape = getattr(gguf.GGMLQuantizationType, DTYPES[kind]), tuple(tensor.shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _n_bytes(tensor, kind), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield some whole rows of a weight at a time, so that only these are ever converted."""
    return iter(tensor.split(max(CHUNK // tensor[0].numel(), 1)) if tensor.ndim else [tensor])


def _encoded(chunk: Tensor, kind: str, name: str) -> np.ndarray:
    """Return the bytes of some rows of a weight."""
    plain = chunk.float()
    if kind == "q8_0":
        gguf = optional("gguf", "gguf")
        return gguf.quantize(plain.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0).view(np.uint8)
    stored = plain.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]).contiguous()
    if not stored.isfinite().all():
        raise UserError(f"The weight {name!r} holds numbers that {kind} cannot store. Use `--dtype bf16` or `--dtype f32`.")
    return stored.view(torch.uint8).numpy()


def _write_modelfile(output: Path, text: str) -> Path:
    """Write Ollama's description beside a file, under a name that is free, and return it."""
    candidates = chain((MODELFILE, f"{output.stem}.{MODELFILE}"), (f"{output.stem}-{i}.{MODELFILE}" for i in count(2)))
    path = next(path for path in map(output.with_name, candidates) if not path.exists())
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error
    return path
