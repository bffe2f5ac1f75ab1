"""Read GGUF files, llama.cpp's format: weights, architecture, tokenizer and chat template become a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import torch

from litgpt import names
from litgpt.checkpoint import DTYPES, assemble
from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean
from litgpt.files import atomic_folder
from litgpt.scripts.gguf_header import Header, read_header
from litgpt.scripts.gguf_tables import ARCHITECTURES, ROPE_FACTORS, Architecture, config_of, to_ours
from litgpt.scripts.gguf_tokenizer import Vocabulary, build_tokenizer, generation_config, tokenizer_config
from litgpt.translate import translate
from litgpt.weight_files import write_shards


def import_gguf(path: Path, out_dir: Path, dtype: str = "bfloat16", overwrite: bool = False) -> Path:
    """Write a GGUF file as a Hugging Face folder and return that folder.

    Args:
        path: The file. All quantizations that the package `gguf` can undo are read.
        out_dir: The folder to make. On any error nothing of it is left.
        dtype: The type of the written weights: bfloat16, float16 or float32.
        overwrite: Replace a folder that exists.

    Raises:
        MissingFile: There is no such file.
        UserError: The file is cut off or damaged, or its architecture, tokenizer or quantization is not supported.
    """
    if dtype not in DTYPES:
        raise UserError(f"`dtype` is one of {', '.join(DTYPES)}, but got {dtype!r}.{did_you_mean(dtype, DTYPES)}")
    header = read_header(path)
    architecture = _architecture_of(header)
    factors = header.weight(ROPE_FACTORS) if ROPE_FACTORS in header.tensors else None
    config = config_of(architecture, header.metadata, header.shapes, factors)
    _check_weights(header, architecture, config)
    vocabulary = Vocabulary.read(header.metadata)
    tokenizer = build_tokenizer(vocabulary)
    with atomic_folder(out_dir, overwrite) as partial:
        stream = to_ours(architecture, header.weights(), config, str(path))
        stream = translate(((name, tensor.to(DTYPES[dtype])) for name, tensor in stream), config.rules, config, to_ours=False)
        write_shards(partial, ((name, tensor.contiguous()) for name, tensor in stream))
        tokenizer.save(str(partial / names.TOKENIZER_JSON))
        _write_json(partial / names.TOKENIZER_CONFIG, tokenizer_config(vocabulary, config.block_size))
        _write_json(partial / names.GENERATION_CONFIG, generation_config(vocabulary))
        _write_json(partial / names.CONFIG, _config_json(config, vocabulary, dtype))
    return out_dir


def _architecture_of(header: Header) -> Architecture:
    name = header.metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{header.path} holds a model of the architecture {name!r}, but GGUF files are read of: {', '.join(ARCHITECTURES)}."
        )
    if header.metadata.number("split.count", 1) > 1:
        way = "Join them with llama.cpp's tool: llama-gguf-split --merge FIRST_PART OUT.gguf"
        raise UserError(f"{header.path} is one part of several. {way}")
    return ARCHITECTURES[name]


def _check_weights(header: Header, architecture: Architecture, config: Config) -> None:
    """Refuse a file without exactly the weights that its metadata describes, before any of them is read."""
    shapes = ((name, torch.empty(shape, device="meta")) for name, shape in header.shapes.items())
    assemble(config, dict(to_ours(architecture, shapes, config, str(header.path))), str(header.path))


def _config_json(config: Config, vocabulary: Vocabulary, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of a model, with its special tokens."""
    described = config.to_hf(None)
    return described | vocabulary.special_ids() | {"torch_dtype": dtype, "dtype": dtype}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
