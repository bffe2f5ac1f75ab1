"""What llama.cpp calls the parts of each architecture in its files, as data for both directions."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.families import FAMILIES
from litgpt.families.ropes import format_rope, parse_rope, rope_type
from litgpt.rope import inverse_frequencies
from litgpt.scripts.gguf_header import Metadata
from litgpt.translate import translate
from litgpt.weights import Rule, ignored, joined, same, tied

ROPE_FACTORS = "rope_freqs.weight"  # what each pair's frequency is divided by, where no entry says it
LLAMA = "llama"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
PATTERN = "attention.sliding_window_pattern"

FIELDS = {  # what an entry is called behind the name of the architecture -> our field
    "context_length": "block_size",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_query_groups",
    "attention.key_length": "head_size",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_base",
}
BIASES = {"attn_bias": "blk.0.attn_q.bias", "attn_proj_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_gate.bias"}

BLOCK = [
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
    ignored(ROPE_FACTORS),
]
NORMS_OF_HEADS = [
    same("blk.{}.attn_q_norm.*", "transformer.h.{}.attn.norm_q.*"),
    same("blk.{}.attn_k_norm.*", "transformer.h.{}.attn.norm_k.*"),
]
NORMS_BEHIND = [
    same("blk.{}.post_attention_norm.*", "transformer.h.{}.post_attention_norm.*"),
    same("blk.{}.post_ffw_norm.*", "transformer.h.{}.post_mlp_norm.*"),
]


@dataclass(frozen=True)
class Architecture:
    """How GGUF files hold the models of one architecture, and what llama.cpp computes where they do not say."""

    name: str
    """llama.cpp's name for it."""
    families: tuple[str, ...]
    """The `model_type`s that it holds."""
    rules: list[Rule]
    """How its weights are called."""
    extra: dict[str, str] = field(default_factory=dict)
    """Further entries, like `FIELDS`."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Our fields where an entry is missing."""
    turned: bool = False
    """Whether the rows of queries and keys are stored so that neighbours are turned together, instead of two halves of a head."""
    unit_offset: bool = False
    """Whether norms are stored as what they multiply by: 1 + weight."""
    may_have: tuple[str, ...] = ()
    """Which of our fields for biases may be true, and `tie_embeddings` if it may be false."""
    period: int | None = None
    """Every layer of this number sees all tokens and the others a window. None: llama.cpp knows no windows of it."""
    local_rope: bool = False
    """Whether layers with a window turn by a base of their own."""
    odd_depth: int | None = None
    """The depth at which scores are divided by the root of width / heads instead of that of a head's size."""

    @property
    def fields(self) -> dict[str, str]:
        """All entries that hold one of our fields."""
        return FIELDS | self.extra


WINDOW = {"attention.sliding_window": "sliding_window_size"}
SOFTCAPS = {"attn_logit_softcapping": "attention_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(LLAMA, ("llama", "mistral"), BLOCK, WINDOW, turned=True, may_have=(*BIASES, "tie_embeddings")),
        Architecture("qwen2", ("qwen2",), BLOCK, may_have=("attn_bias", "tie_embeddings")),
        Architecture("qwen3", ("qwen3",), BLOCK + NORMS_OF_HEADS, may_have=("tie_embeddings",)),
        Architecture("gemma", ("gemma",), BLOCK, unit_offset=True),
        Architecture(
            "gemma2",
            ("gemma2",),
            BLOCK + NORMS_BEHIND,
            WINDOW | SOFTCAPS,
            dict(sliding_window_size=4096, attention_logit_softcapping=50.0, final_logit_softcapping=30.0),
            unit_offset=True,
            period=2,
            odd_depth=46,
        ),
        Architecture(
            "gemma3",
            ("gemma3_text",),
            BLOCK + NORMS_OF_HEADS + NORMS_BEHIND,
            WINDOW | {"final_logit_softcapping": "final_logit_softcapping", "rope.freq_base_swa": "rope_local_base_freq"},
            dict(rope_base=1_000_000, rope_local_base_freq=10_000),
            unit_offset=True,
            may_have=("tie_embeddings",),
            period=6,
            local_rope=True,
            odd_depth=62,
        ),
    )
}


# Metadata


def config_of(architecture: Architecture, metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], factors: Tensor | None) -> Config:
    """Return the config that the entries of a GGUF file stand for.

    Args:
        architecture: The file's.
        metadata: Its entries.
        shapes: The shapes of its weights, outermost dimension first.
        factors: The weight `rope_freqs.weight`, if there is one.

    Raises:
        UserError: An entry is missing, does not fit the weights, or asks for something that is not supported.
    """
    read = _Entries(architecture.name, metadata)
    fields = _plain_fields(architecture, read)
    fields |= dict(attn_bias=False, attn_proj_bias=False, mlp_bias=False, tie_embeddings=True)
    fields |= {name: BIASES[name] in shapes for name in BIASES if name in architecture.may_have}
    if "tie_embeddings" in architecture.may_have:
        fields["tie_embeddings"] = HEAD not in shapes
    embedding = shapes.get(EMBEDDING, ())
    fields["vocab_size"] = fields["padded_vocab_size"] = embedding[0] if len(embedding) == 2 else 0
    _check_sizes(fields, shapes, read)
    family = _family(architecture, fields)
    fields = FAMILIES[family].base | fields | _layers(architecture, fields, read) | dict(family=family)
    fields["rope_adjustments"] = parse_rope(_rope(read, fields, factors))
    return Config(**fields)


class _Entries:
    """The entries of one architecture."""

    def __init__(self, name: str, metadata: Metadata) -> None:
        self.name, self.metadata = name, metadata
        self.path = metadata.path

    def has(self, key: str) -> bool:
        return f"{self.name}.{key}" in self.metadata.entries

    def number(self, key: str, default: Any = None) -> Any:
        return self.metadata.number(f"{self.name}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or not 0 < value <= 2**31:
            raise UserError(f"{self.path} gives {self.name}.{key} = {value!r}, but a whole number above 0 is needed there.")
        return value


def _plain_fields(architecture: Architecture, read: _Entries) -> dict[str, Any]:
    heads, width = read.whole("attention.head_count"), read.whole("embedding_length")
    defaults = {"n_query_groups": heads, "head_size": width // heads, "rope_base": 10_000} | architecture.defaults
    optional = {"sliding_window_size", "final_logit_softcapping"} - architecture.defaults.keys()
    fields = {
        ours: read.number(key, defaults.get(ours)) for key, ours in architecture.fields.items() if ours not in optional or read.has(key)
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.number(key, fields["head_size"]) != fields["head_size"]:
            raise UserError(
                f"{read.path} has heads that are rotated in part or of unequal sizes, which no {architecture.name} model of "
                "Hugging Face's has."
            )
    if read.number("expert_count", 0):
        raise UserError(f"{read.path} is a mixture of {read.number('expert_count')} experts, which is not supported yet.")
    return fields


def _check_sizes(fields: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], read: _Entries) -> None:
    """Compare what costs memory with the weights that are there, before anything of that size is made."""
    if fields["n_layer"] > len(shapes):
        raise UserError(f"{read.path} lacks weights: it holds {len(shapes)}, too few for {fields['n_layer']} layers.")
    rows = shapes.get("blk.0.attn_q.weight", (0,))[0]
    if fields["n_head"] * fields["head_size"] != rows:
        raise UserError(
            f"In {read.path} the weight 'blk.0.attn_q.weight' has {rows} rows, which do not fit {fields['n_head']} heads of "
            f"{fields['head_size']}."
        )


def _family(architecture: Architecture, fields: Mapping[str, Any]) -> str:
    """Return the first family, or the one with windows where there are some."""
    windowed = architecture.period is None and fields.get("sliding_window_size") is not None
    return architecture.families[-1 if windowed else 0]


def _layers(architecture: Architecture, fields: Mapping[str, Any], read: _Entries) -> dict[str, Any]:
    """Return what is not the same for all layers, and the scale of scores, which no entry gives."""
    if architecture.odd_depth is None:
        return {}
    n_layer = fields["n_layer"]
    indices = _pattern(architecture, n_layer, read)
    odd = n_layer == architecture.odd_depth
    found = dict(attention_scores_scalar=fields["n_embd"] // fields["n_head"] if odd else fields["head_size"])
    if fields.get("sliding_window_size") is not None:
        found |= dict(sliding_window_indices=indices)
    return found | (dict(rope_indices=indices) if architecture.local_rope else {})


def _pattern(architecture: Architecture, n_layer: int, read: _Entries) -> list[int]:
    """Return for each layer 1 if it sees a window, else 0."""
    listed = read.metadata.entries.get(f"{architecture.name}.{PATTERN}")
    if listed is not None and not isinstance(listed, int | float):
        flags = read.metadata.numbers(f"{architecture.name}.{PATTERN}") or []
        if len(flags) < n_layer:
            raise UserError(f"{read.path} says for {len(flags)} layers whether they see a window, but has {n_layer}.")
        return [int(bool(flag)) for flag in flags[:n_layer]]
    period = architecture.period if listed is None else read.whole(PATTERN)
    return [int(i % period < period - 1) for i in range(n_layer)]


def _rope(read: _Entries, fields: dict[str, Any], factors: Tensor | None) -> dict[str, Any] | None:
    """Return how positions are scaled: as the entries name it or, for Llama 3, as it follows from a tensor of factors."""
    kind = read.metadata.text(f"{read.name}.rope.scaling.type", "none")
    factor = read.number("rope.scaling.factor", read.number("rope.scale_linear", 1.0))
    if factors is not None:
        if factors.shape == (fields["head_size"] // 2,) and factors.isfinite().all() and factors.min() > 0:
            for scaling in _llama3_scalings(factors, Config(**fields)):
                config = Config(**fields | dict(rope_adjustments=parse_rope(scaling)))
                if torch.allclose(rope_factors(config), factors, rtol=1e-3):
                    return scaling
    elif kind == "none" or factor == 1:
        return None
    elif kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        original = "rope.scaling.original_context_length"
        known = {"original_max_position_embeddings": read.whole(original)} if read.has(original) else {}
        return {"rope_type": "yarn", "factor": factor} | known
    raise UserError(
        f"{read.path} scales its rotary embedding ({kind}) in a way that is not known, so the model would compute wrong numbers."
    )


def _llama3_scalings(factors: Tensor, config: Config) -> Iterator[dict[str, Any]]:
    """Yield what Llama 3's scaling may have been: as Meta has it, and as the pairs say that are stretched in part.

    How much of a pair's frequency is kept grows with the turns it makes over the context of pretraining, from 0 at `low_freq_factor` to 1
    at `high_freq_factor`. Only the ratios of these three numbers matter, so one may be 1.
    """
    most = factors.max().item()
    scaling = {"rope_type": "llama3", "factor": round(most, 4), "low_freq_factor": 1.0}
    yield scaling | dict(high_freq_factor=4.0, original_max_position_embeddings=8192)
    kept = (1 / factors - 1 / most) / (1 - 1 / most) if most > 1 else factors - factors
    between = ((kept > 1e-4) & (kept < 1 - 1e-4)).nonzero().flatten().tolist()
    if len(between) < 2:
        return
    plain = inverse_frequencies(config)[0].double()
    first, last = between[0], between[-1]
    slope = ((kept[first] - kept[last]) / (plain[first] - plain[last])).item()  # original / (2 pi (high - low))
    low = slope * plain[first].item() - kept[first].item()  # low / (high - low)
    if slope > 0 and low > 0:
        original = round(2 * math.pi * slope / low)
        yield scaling | dict(high_freq_factor=round(1 + 1 / low, 4), original_max_position_embeddings=max(original, 1))


def rope_factors(config: Config) -> Tensor:
    """Return by how much the frequency of each rotated pair is divided, (rope_n_elem / 2,) in fp32."""
    stretched, _ = inverse_frequencies(config)
    plain = replace(config, rope_adjustments=None)
    return inverse_frequencies(plain)[0] / stretched


def entries_of(architecture: Architecture, config: Config) -> dict[str, Any]:
    """Return the entries of a GGUF file that describe a config; `config_of` turns them back.

    Raises:
        UserError: llama.cpp knows no such scaling of positions.
    """
    name = architecture.name
    values = {f"{name}.{key}": getattr(config, ours) for key, ours in architecture.fields.items()}
    values |= {f"{name}.attention.value_length": config.head_size, f"{name}.rope.dimension_count": config.head_size}
    values |= {f"{name}.vocab_size": config.padded_vocab_size}
    floats = ("epsilon", "freq_base", "freq_base_swa", "softcapping")
    values = {key: float(value) if key.endswith(floats) else value for key, value in values.items() if value is not None}
    scaling = format_rope(stretched(config)) or {}
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        values |= {f"{name}.rope.scaling.type": kind, f"{name}.rope.scaling.factor": float(scaling["factor"])}
        if (original := scaling.get("original_max_position_embeddings")) is not None:
            values[f"{name}.rope.scaling.original_context_length"] = original
    elif kind is not None and (kind != "llama3" or name != LLAMA):  # of other models it does not read the factors
        raise UserError(f"This model scales its positions by {kind!r}, which llama.cpp does not know for {name} models.")
    return values


def stretched(config: Config) -> dict[str, Any] | None:
    """Return `rope_adjustments`, with `rope_condense_ratio` in them."""
    if config.rope_condense_ratio == 1:
        return config.rope_adjustments
    return {"factor": config.rope_condense_ratio * (config.rope_adjustments or {}).get("factor", 1.0)}


def stored_factors(config: Config) -> Tensor | None:
    """Return the weight `rope_freqs.weight`, which only Llama 3's scaling needs."""
    return rope_factors(config) if config.rope_adjustments and rope_type(config.rope_adjustments) == "llama3" else None


# Weights


def to_ours(architecture: Architecture, stream: Iterable[tuple[str, Tensor]], config: Config, where: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a GGUF file under our names and laid out as ours are.

    Args:
        architecture: The file's.
        stream: The names and weights.
        config: Their sizes.
        where: What to call the file.
    """
    restored = ((name, _restored(architecture, name, tensor, config, where)) for name, tensor in stream)
    return translate(restored, architecture.rules, config, to_ours=True)


def to_theirs(architecture: Architecture, stream: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield our weights under the names and laid out as in a GGUF file.

    Args:
        architecture: What llama.cpp calls the model.
        stream: Our names and weights.
        config: Their sizes.
    """
    for name, tensor in translate(stream, architecture.rules, config, to_ours=False):
        heads = _turned_heads(architecture, name, config)
        if heads is not None:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # two halves -> pairs of neighbours
        elif architecture.unit_offset and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        yield name, tensor


def _restored(architecture: Architecture, name: str, tensor: Tensor, config: Config, where: str) -> Tensor:
    heads = _turned_heads(architecture, name, config)
    if heads is not None:
        if tensor.size(0) % (2 * heads):
            raise UserError(f"In {where} the weight {name!r} has {tensor.size(0)} rows, which do not fit {heads} heads.")
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # pairs of neighbours -> two halves
    if architecture.unit_offset and name.endswith("norm.weight"):
        return tensor - 1
    return tensor


def _turned_heads(architecture: Architecture, name: str, config: Config) -> int | None:
    """Return how many heads a weight has whose rows are stored in another order, or None of any other weight."""
    if not architecture.turned:
        return None
    return config.n_head if ".attn_q." in name else config.n_query_groups if ".attn_k." in name else None
