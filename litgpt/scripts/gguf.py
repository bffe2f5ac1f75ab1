"""Read GGUF files, llama.cpp's format: weights, architecture, tokenizer and chat template become a Hugging Face folder.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from litgpt import names
from litgpt.checkpoint import DTYPES, assemble, atomic_folder, write_shards
from litgpt.config import Config
from litgpt.errors import MissingFile, UserError, did_you_mean, optional
from litgpt.rope import inverse_frequencies
from litgpt.translate import translate
from litgpt.weights import Rule, ignored, joined, same, tied

Metadata = dict[str, Any]


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
    reader, metadata = _opened(path)
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"{path} holds a model of the architecture {name!r}, but GGUF files are read of: {', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[name]
    described = architecture.describe(path, metadata, reader) | {"torch_dtype": dtype, "dtype": dtype}
    config = Config.from_hf(described)
    shapes = [(tensor.name, torch.empty(tensor.shape.tolist()[::-1], device="meta")) for tensor in reader.tensors]
    assemble(config, dict(_translated(shapes, architecture, config, path)), str(path))
    tokenizer = build_tokenizer(path, metadata)
    with atomic_folder(out_dir, overwrite) as partial:
        stream = _translated(_dequantized(reader, path), architecture, config, path)
        stream = translate(((name, tensor.to(DTYPES[dtype])) for name, tensor in stream), config.rules, config, to_ours=False)
        write_shards(partial, ((name, tensor.contiguous()) for name, tensor in stream))
        tokenizer.save(str(partial / names.TOKENIZER_JSON))
        _write_json(partial / names.TOKENIZER_CONFIG, _tokenizer_config(metadata, described["max_position_embeddings"]))
        _write_json(partial / names.GENERATION_CONFIG, _generation_config(metadata))
        _write_json(partial / names.CONFIG, config.to_hf(described))
    return out_dir


def _opened(path: Path) -> tuple[Any, Metadata]:
    """Return the package's reader of a file that is complete, and the file's metadata."""
    if not path.is_file():
        raise MissingFile(f"There is no GGUF file {str(path)!r}.")
    gguf = optional("gguf", "gguf")
    damaged = f"{path} is cut off, damaged or no GGUF file. Delete it and download it again."
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # of a damaged file the reader believes every number, so anything may follow
        raise UserError(f"{damaged[:-1]} ({type(error).__name__} while reading its header).") from None
    end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    if end == 0 or end > path.stat().st_size:
        raise UserError(damaged)
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path} is one part of several. Join them with llama.cpp's tool: llama-gguf-split --merge FIRST_PART OUT.gguf")
    return reader, metadata


def _dequantized(reader: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in fp32, one after the other."""
    gguf = optional("gguf", "gguf")
    for tensor in reader.tensors:
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"The weight {tensor.name!r} of {path} is stored as {kind}, which the package `gguf` cannot read.") from None
        yield tensor.name, torch.from_numpy(values if values.flags.writeable else values.copy())


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Architectures


@dataclass(frozen=True)
class Architecture:
    """How GGUF stores the models of one architecture."""

    describe: Callable[[Path, Metadata, Any], dict[str, Any]]  # file, metadata, reader -> what `config.json` will say
    rules: list[Rule]
    turned: dict[str, str]  # endings of weights whose rows are stored in another order -> the config's number of heads in them


def _translated(
    stream: Iterator[tuple[str, Tensor]] | list[tuple[str, Tensor]], architecture: Architecture, config: Config, path: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights under our names, with all rows in Hugging Face's order."""

    def unturned(name: str, tensor: Tensor) -> Tensor:
        heads = next((getattr(config, field) for part, field in architecture.turned.items() if f".{part}." in name), None)
        if heads is None:
            return tensor
        if tensor.size(0) % (2 * heads):
            raise UserError(f"In {path} the weight {name!r} has {tensor.size(0)} rows, which do not fit {heads} heads.")
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # pairs of neighbours -> two halves

    return translate(((name, unturned(name, tensor)) for name, tensor in stream), architecture.rules, config, to_ours=True)


LLAMA_RULES = [
    same("token_embd.*", "transformer.wte.*"),
    same("blk.{}.attn_norm.*", "transformer.h.{}.norm_1.*"),
    joined(["blk.{}.attn_q.*", "blk.{}.attn_k.*", "blk.{}.attn_v.*"], "transformer.h.{}.attn.qkv.*"),
    same("blk.{}.attn_output.*", "transformer.h.{}.attn.proj.*"),
    same("blk.{}.ffn_norm.*", "transformer.h.{}.norm_2.*"),
    same("blk.{}.ffn_gate.*", "transformer.h.{}.mlp.fc_1.*"),
    same("blk.{}.ffn_up.*", "transformer.h.{}.mlp.fc_2.*"),
    same("blk.{}.ffn_down.*", "transformer.h.{}.mlp.proj.*"),
    same("output_norm.*", "transformer.ln_f.*"),
    tied("output.*", "lm_head.*"),
    ignored("rope_freqs.weight"),  # `_llama_rope` reads it
]


def _describe_llama(path: Path, metadata: Metadata, reader: Any) -> dict[str, Any]:
    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, (int, float)):
            return _shortest(value)
        raise UserError(f"{path} gives llama.{key} = {value!r}, but a llama model needs one number there.")

    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    heads, width = number("attention.head_count"), number("embedding_length")
    head_size = number("attention.key_length", width // heads)
    if number("rope.dimension_count", head_size) != head_size or number("attention.value_length", head_size) != head_size:
        raise UserError(f"{path} has heads that are rotated in part or of unequal sizes, which no llama model of Hugging Face's has.")
    if number("expert_count", 0):
        raise UserError(f"{path} is a mixture of {number('expert_count')} experts, which is not supported yet.")
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": number("context_length"),
        "vocab_size": shapes.get("token_embd.weight", [0, 0])[1],  # what the metadata says may differ from it
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }
    return described | {"rope_scaling": _llama_rope(path, metadata, reader, described)} | _special_ids(metadata)


def _llama_rope(path: Path, metadata: Metadata, reader: Any, described: dict[str, Any]) -> dict[str, Any] | None:
    """Return how positions are scaled: as the metadata names it or, for Llama 3, as it follows from a tensor of factors."""
    stored = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = _shortest(metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0)))
    original = metadata.get("llama.rope.scaling.original_context_length", described["max_position_embeddings"])
    if stored is not None:
        factors = torch.tensor(stored).float()
        shape = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
        scaling = {"rope_type": "llama3", "factor": round(factors.max().item(), 4)} | shape
        plain, _ = inverse_frequencies(Config.from_hf(described | {"rope_scaling": None}))
        scaled, _ = inverse_frequencies(Config.from_hf(described | {"rope_scaling": scaling}))
        if factors.shape == plain.shape and torch.allclose(plain / scaled, factors, rtol=1e-3):
            return scaling
    elif kind == "none" or factor == 1:
        return None
    elif kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UserError(f"{path} scales its rotary embedding ({kind}) in a way that is not known, so the model would compute wrong numbers.")


def _shortest(value: float | int) -> float | int:
    """Return the shortest decimal number that is the same in fp32, in which GGUF stores all fractions."""
    if isinstance(value, int):
        return value
    return next(short for digits in range(1, 18) if _as_fp32(short := float(f"{value:.{digits}g}")) == _as_fp32(value))


def _as_fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


ARCHITECTURES = {
    "llama": Architecture(_describe_llama, LLAMA_RULES, {"attn_q": "n_head", "attn_k": "n_query_groups"}),
}


# Tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type

LLAMA_3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words before byte pairs are merged, for some values of `tokenizer.ggml.pre`."""

    called: tuple[str, ...]
    words: str | None = None  # a regular expression; None is that of GPT-2
    single_digits: bool = False  # cut out every digit first
    whole_words: bool = False  # a word that is a token needs no merges (`ignore_merges`)
    add_bos: bool = False  # where the metadata does not say

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return it as one of the package `tokenizers`."""
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.single_digits else []
        words = [pre_tokenizers.Split(Regex(self.words), "isolated")] if self.words else []
        return pre_tokenizers.Sequence([*digits, *words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.words is None)])


PRE_TOKENIZERS = [
    PreTokenizer(("gpt-2", "olmo", "phi-2", "mpt", "jais", "trillion")),
    PreTokenizer(("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"), single_digits=True),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), LLAMA_3_WORDS, whole_words=True, add_bos=True),
    PreTokenizer(("dbrx", "smaug-bpe"), LLAMA_3_WORDS),
    PreTokenizer(("qwen2", "deepseek-r1-qwen", "megrez"), LLAMA_3_WORDS.replace("{1,3}", "")),
    PreTokenizer(("tekken",), TEKKEN_WORDS, whole_words=True, add_bos=True),
]


def build_tokenizer(path: Path, metadata: Metadata) -> Tokenizer:
    """Return the tokenizer that the metadata of a GGUF file describes."""
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens", [])
    if kind not in TOKENIZERS:
        raise UserError(f"{path} has a tokenizer of the kind {kind!r}, but these are read: {', '.join(TOKENIZERS)}.")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not tokens or len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise UserError(
            f"The tokenizer in {path} is damaged: it has {len(set(tokens))} different tokens of {len(tokens)}, {len(types)} with a type."
        )
    tokenizer = TOKENIZERS[kind](path, metadata, tokens, types)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=of_type != USER_DEFINED, normalized=False)
            for token, of_type in zip(tokens, types)
            if of_type in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    ends = {side: tokens[id] for side, id in _added_ends(metadata).items()}
    if ends:
        template = [*([ends["bos"]] if "bos" in ends else []), "$A", *([ends["eos"]] if "eos" in ends else [])]
        second = [piece.replace("$A", "$B") + ":1" for piece in template]
        pairs = [(token, tokens.index(token)) for token in set(ends.values())]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=template + second, special_tokens=pairs)
    return tokenizer


def _byte_level(path: Path, metadata: Metadata, tokens: list[str], types: list[int]) -> Tokenizer:
    """Byte pairs over bytes, as in GPT-2."""
    pre_tokenizer = _pre_tokenizer(path, metadata)
    merges = [
        (merge[0] + left, right) for merge in metadata.get("tokenizer.ggml.merges", []) for left, _, right in [merge[1:].partition(" ")]
    ]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    known = [pair for pair in merges if pair[0] in vocabulary and pair[1] in vocabulary and "".join(pair) in vocabulary]
    if len(known) != len(merges):
        raise UserError(f"The tokenizer in {path} is damaged: {len(merges) - len(known)} of its merges are of no tokens.")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre_tokenizer.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(path: Path, metadata: Metadata) -> PreTokenizer:
    called = metadata.get("tokenizer.ggml.pre")
    found = next((pre_tokenizer for pre_tokenizer in PRE_TOKENIZERS if called in pre_tokenizer.called), None)
    if found is None:
        known = ", ".join(name for pre_tokenizer in PRE_TOKENIZERS for name in pre_tokenizer.called)
        raise UserError(f"{path} cuts text into words by the rule {called!r}, which is not known. Known are: {known}.")
    return found


def _sentencepiece(path: Path, metadata: Metadata, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's byte pairs, as in Llama 2: two neighbours may merge if the result is a token, and the highest score goes first."""
    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise UserError(f"The tokenizer in {path} is damaged: it has {len(scores)} scores for {len(tokens)} tokens.")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pieces = {token for token, of_type in zip(tokens, types) if of_type == NORMAL}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(pieces, key=lambda token: (-scores[vocabulary[token]], vocabulary[token]))
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    unknown = next((token for token, of_type in zip(tokens, types) if of_type == UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if space else []), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if space else [])])
    return tokenizer


TOKENIZERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _special_ids(metadata: Metadata) -> dict[str, int]:
    """Return the ids of the special tokens under the names that they have in `config.json`."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}") for ours, theirs in keys.items()}
    return {name: id for name, id in ids.items() if id is not None and 0 <= id < len(metadata.get("tokenizer.ggml.tokens", []))}


def _added_ends(metadata: Metadata) -> dict[str, int]:
    """Return the ids of the tokens that are put around every text: maybe "bos", maybe "eos"."""
    pre_tokenizer = next((item for item in PRE_TOKENIZERS if metadata.get("tokenizer.ggml.pre") in item.called), None)
    default = metadata["tokenizer.ggml.model"] == "llama" or (pre_tokenizer is not None and pre_tokenizer.add_bos)
    wanted = {"bos": metadata.get("tokenizer.ggml.add_bos_token", default), "eos": metadata.get("tokenizer.ggml.add_eos_token", False)}
    ids = _special_ids(metadata)
    return {side: ids[f"{side}_token_id"] for side, add in wanted.items() if add and f"{side}_token_id" in ids}


def _tokenizer_config(metadata: Metadata, context: int) -> dict[str, Any]:
    tokens, ends = metadata["tokenizer.ggml.tokens"], _added_ends(metadata)
    values: dict[str, Any] = {name.removesuffix("_id"): tokens[id] for name, id in _special_ids(metadata).items()}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is not None and 0 <= unknown < len(tokens):
        values["unk_token"] = tokens[unknown]
    values |= {"add_bos_token": "bos" in ends, "add_eos_token": "eos" in ends, "clean_up_tokenization_spaces": False}
    values |= {"model_max_length": context, "tokenizer_class": "PreTrainedTokenizerFast"}
    template = metadata.get("tokenizer.chat_template")
    return values | ({"chat_template": template} if template else {})


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    """Return how generation begins and ends; a chat model may end a turn with a token of its own."""
    ids = _special_ids(metadata)
    ends = dict.fromkeys(id for id in (ids.get("eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")) if id is not None)
    if ends:
        ids["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends))
    return ids
