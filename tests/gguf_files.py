"""Tiny GGUF files for tests, written as llama.cpp's converter writes them."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import vocabularies
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from litgpt.checkpoint import write_checkpoint
from litgpt.config import Config
from litgpt.families import FAMILIES
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer as OurTokenizer

SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>"]
CORPUS = [
    "The quick brown fox can't jump over 1234567 lazy dogs.\n\n    def f(x):\n        return x ** 2  # 100%",
    "Ünïcödé, 日本語 and 🤖 emoji; THEY'LL we'll   three spaces",
]
PARTS = {  # transformers' names and llama.cpp's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOPS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def byte_level_tokenizer(vocab_size: int = 320, pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Return a small byte-level BPE tokenizer whose first tokens are special; by default SmolLM2's way to cut words."""
    tokenizer = Tokenizer(models.BPE())
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a random llama in fp32 whose norms are not all ones."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes | dict(max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False) | changes)
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model.eval()


def gguf_name(name: str) -> str:
    """Return llama.cpp's name for a weight of transformers' llama."""
    if name in TOPS:
        return TOPS[name]
    _, _, i, *part, leaf = name.split(".")
    return f"blk.{i}.{PARTS['.'.join(part)]}.{leaf}"


def gguf_weights(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Return the weights under llama.cpp's names, in its order of rows: it rotates neighbours, transformers rotates halves."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if "q_proj" in name or "k_proj" in name:
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        weights[gguf_name(name)] = tensor.detach().numpy().copy()
    return weights


def write_gguf(
    path: Path,
    model: LlamaForCausalLM | None = None,
    tokenizer: Tokenizer | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    metadata: dict[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a model and its tokenizer.

    Args:
        path: The file.
        model: By default a new `tiny_llama`.
        tokenizer: By default a new `byte_level_tokenizer`.
        kind: How matrices are stored; vectors are in fp32.
        raw: Tensors that are stored as they are, with their kind, in place of the model's or beside them.
        metadata: Keys that are added or replaced; None leaves one out.
        architecture: What the file calls it.
    """
    model = model or tiny_llama()
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    values = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    }
    for key, value in (values | tokenizer_metadata(tokenizer or byte_level_tokenizer()) | (metadata or {})).items():
        if value is not None:
            _add(writer, key, value)
    raw = raw or {}
    for name, weight in gguf_weights(model).items():
        if name not in raw:
            stored = kind if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(weight, stored), raw_dtype=stored)
    for name, (data, stored) in raw.items():
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how a GGUF file describes a byte-level BPE tokenizer."""
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = tokenizer_merges(tokenizer)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    }


def tokenizer_merges(tokenizer: Tokenizer) -> list[str]:
    """Return the merges of a tokenizer, each as two tokens and a space between."""

    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# Checkpoints of ours, and llama.cpp, which runs what is written of them

SIZES = dict(n_layer=2, n_embd=64, n_head=4, n_query_groups=2, intermediate_size=96, block_size=128)
ALTERNATE, FIVE_OF_SIX = [1, 0, 1, 0], [1, 1, 1, 1, 1, 0, 1]
HEADS = dict(head_size=32, attention_scores_scalar=32)
GEMMA_2 = dict(n_layer=4, sliding_window_size=8, sliding_window_indices=ALTERNATE) | HEADS
GEMMA_3 = dict(n_layer=7, sliding_window_size=8, sliding_window_indices=FIVE_OF_SIX, rope_indices=FIVE_OF_SIX) | HEADS
LLAMA_3 = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
YARN = dict(factor=4.0, original_max_seq_len=32, beta_fast=32.0, beta_slow=1.0)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # a tiny model: its family, the kind of its tokenizer, its fields
    "llama": ("llama", "byte_level", {}),
    "llama, tied and biased": (
        "llama",
        "sentencepiece",
        dict(tie_embeddings=True, attn_bias=True, attn_proj_bias=True, mlp_bias=True),
    ),
    "llama, stretched as Llama 3": ("llama", "byte_level", dict(rope_adjustments=LLAMA_3, rope_base=500_000, head_size=64)),
    "llama, stretched evenly": ("llama", "byte_level", dict(rope_adjustments=dict(factor=4.0))),
    "llama, stretched by YaRN": ("llama", "byte_level", dict(rope_adjustments=YARN)),
    "mistral": ("mistral", "sentencepiece", dict(sliding_window_size=100)),
    "mistral without a window": ("mistral", "sentencepiece", {}),
    "qwen2": ("qwen2", "byte_level", {}),
    "qwen2, tied": ("qwen2", "byte_level", dict(tie_embeddings=True)),
    "qwen3": ("qwen3", "byte_level", dict(head_size=32)),
    "gemma": ("gemma", "sentencepiece", dict(head_size=32)),
    "gemma2": ("gemma2", "sentencepiece", GEMMA_2 | dict(attention_logit_softcapping=5.0, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", "sentencepiece", GEMMA_3 | dict(rope_base=1_000_000, rope_local_base_freq=10_000)),
    "gemma3, stretched": (
        "gemma3_text",
        "sentencepiece",
        GEMMA_3 | dict(rope_base=1000, rope_local_base_freq=50, rope_adjustments=dict(factor=8.0), final_logit_softcapping=3.0),
    ),
}


def tiny_checkpoint(folder: Path, case: str, **changes: Any) -> GPT:
    """Write a random model of a case and its tokenizer, and return the model; its vectors are exact in bfloat16, as published ones are."""
    family, kind, fields = CASES[case]
    tokenizer = OurTokenizer(vocabularies.write(folder.with_name(f"{folder.name}-tokenizer"), kind))
    n_tokens = next(i for i in range(10_000) if tokenizer.text(i) is None)
    sizes = dict(family=family, vocab_size=n_tokens, padded_vocab_size=n_tokens + 5)
    model = GPT(Config(**FAMILIES[family].base | SIZES | sizes | fields | changes)).eval()
    for name, parameter in model.named_parameters():
        is_plain_norm = ("norm" in name or "ln_f" in name) and name.endswith("weight") and not model.config.norm_add_unit_offset
        torch.nn.init.normal_(parameter, mean=float(is_plain_norm), std=0.2)
        if parameter.ndim == 1:
            parameter.data = parameter.data.bfloat16().float()
    write_checkpoint(folder, model.state_dict(), model.config, source=tokenizer.checkpoint_dir)
    return model


class LlamaCpp:
    """llama.cpp with a model, in fp32 wherever it can."""

    def __init__(self, file: Path) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 512, 1, 1
        settings.warmup = settings.fit_params = False
        settings.verbosity = 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with BOS and EOS as the file says."""
        return self._post("/tokenize", dict(content=text, add_special=True, parse_special=True))["tokens"]

    def template(self, messages: list[dict[str, str]]) -> str:
        """Return the text of a conversation up to where the answer begins."""
        return self._post("/apply-template", dict(messages=messages))["prompt"]

    def continued(self, prompt: list[int], n_tokens: int) -> list[int]:
        """Return the likeliest token, again and again, up to one that ends a generation."""
        greedy = dict(temperature=0, samplers=["top_k"], top_k=1, cache_prompt=False)
        return self._post("/completion", dict(prompt=prompt, n_predict=n_tokens, return_tokens=True) | greedy)["tokens"]

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        body = json.dumps(content).encode()
        request = urllib.request.Request(self.server.listening_address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
