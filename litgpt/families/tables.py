"""Rows of fields, rules for weights and values that several families share."""

from collections.abc import Callable, Mapping
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Field, Joint, field
from litgpt.weights import Rule, ignored, joined, same, tied

# What `config.json` says about the activation, and what we call it

GELUS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
}
GATED_MLPS = {"silu": "LLaMAMLP", "swish": "LLaMAMLP"}  # which MLP has it as its gate


def one_of(names: dict[str, str]) -> dict[str, Any]:
    """Return how to parse and format an activation that has one of these names there; the first of equals is written."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise UserError(f"`hidden_act` is {value!r} in config.json, which is not supported here. Supported are: {', '.join(names)}.")
        return names[value]

    def format(value: Any) -> str | None:
        return next((theirs for theirs, ours in names.items() if ours == value), None)

    return dict(parse=parse, format=format)


# How positions are stretched: for each of their types the keys that it has, of which the first ones have to be there

ROPE_KEYS = {
    "linear": (["factor"], []),
    "dynamic": (["factor"], ["original_max_seq_len"]),
    "llama3": (["factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"], []),
    "longrope": (["short_factor", "long_factor"], ["factor", "original_max_seq_len", "attention_factor"]),
    "yarn": (
        ["factor"],
        [
            "original_max_seq_len",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "llama_4_scaling_beta",
        ],
    ),
}
ROPE_SPELLINGS = {"original_max_seq_len": "original_max_position_embeddings"}  # the others are spelled as we spell them
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # without them nothing would tell yarn from linear


def rope_type(adjustments: dict[str, Any]) -> str:
    """Return what Hugging Face calls a `rope_adjustments` of ours."""
    if adjustments.get("dynamic"):
        return "dynamic"
    if "long_factor" in adjustments:
        return "longrope"
    if "low_freq_factor" in adjustments or "high_freq_factor" in adjustments:
        return "llama3"
    return "yarn" if YARN_BETAS.keys() & adjustments.keys() or adjustments.get("rope_type") == "yarn" else "linear"


def parse_rope(value: Any) -> dict[str, Any] | None:
    """Return the `rope_adjustments` of a `rope_scaling` or `rope_parameters`; further keys are ignored, as transformers does."""
    if not value:
        return None
    if not isinstance(value, dict) or any(isinstance(nested, dict) for nested in value.values()):
        raise UserError(f"`rope_parameters` is {value!r} in config.json, but one set of values for all layers is expected.")
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "default":
        return None
    if kind not in list(ROPE_KEYS):  # a list, as `kind` may be anything
        raise UserError(f"`rope_type` is {kind!r} in config.json, which is not supported. Supported are: default, {', '.join(ROPE_KEYS)}.")
    needed, optional = ROPE_KEYS[kind]
    spelled = {ours: value.get(ROPE_SPELLINGS.get(ours, ours)) for ours in [*needed, *optional]}
    if missing := [ROPE_SPELLINGS.get(ours, ours) for ours in needed if spelled[ours] is None]:
        raise UserError(f"`rope_type` is {kind!r} in config.json, which needs {missing[0]!r}, but that is not there.")
    extra = {"dynamic": {"dynamic": True}, "yarn": YARN_BETAS}.get(kind, {})
    return extra | {ours: setting for ours, setting in spelled.items() if setting is not None}


def format_rope(adjustments: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the `rope_scaling` of a `rope_adjustments`."""
    if not adjustments:
        return None
    kind = rope_type(adjustments)
    needed, optional = ROPE_KEYS[kind]
    keys = {ours: ROPE_SPELLINGS.get(ours, ours) for ours in [*needed, *optional] if adjustments.get(ours) is not None}
    return {"rope_type": kind} | {theirs: adjustments[ours] for ours, theirs in keys.items()}


def rope_fields(base: list[str], share: list[str] | None = None, default_share: float = 1.0) -> list[Field]:
    """Return the rows for rotary embeddings. The scaling comes first: what it writes is then completed by the others.

    Args:
        base: The older spellings of the base.
        share: The older spellings of the rotated share of a head, where a model may rotate less than all.
        default_share: That share where it is left out.
    """
    nested = ("rope_theta", "partial_rotary_factor")  # transformers 5 has them in the same mapping; the next rows write them

    def respell(said: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in said.items() if key not in nested}

    rows = [
        field(["rope_scaling", "rope_parameters"], "rope_adjustments", parse=parse_rope, format=format_rope, respell=respell),
        field(["rope_parameters.rope_theta", *base], "rope_base", default=10000, parse=whole_if_equal, format=float),
    ]
    if share is not None:
        rows.append(field(["rope_parameters.partial_rotary_factor", *share], "rotary_percentage", default=default_share))
    return rows


def whole_if_equal(value: Any) -> Any:
    """Return 10000 for 10000.0, as the base of a rotary embedding is usually written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# What each layer is

SLIDING, FULL = "sliding_attention", "full_attention"


def whole(mapping: Mapping[str, Any], key: str, default: int) -> int:
    """Return a whole number that an entry of `config.json` has to be, where it counts something."""
    value = mapping.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10_000:
        raise UserError(f"`{key}` is a whole number of at most 10000 in config.json, but got {value!r}.")
    return value


def layer_types(
    mapping: Mapping[str, Any], default: Callable[[int], str], n_layer: int, known: tuple[str, ...] = (SLIDING, FULL)
) -> list[str]:
    """Return what each layer is.

    Args:
        mapping: What `config.json` says.
        default: What a layer is where it does not say.
        n_layer: How many layers there are, where it does not say.
        known: What a layer may be.
    """
    n_layer = whole(mapping, "num_hidden_layers", n_layer)
    types = mapping.get("layer_types")
    types = [default(i) for i in range(n_layer)] if types is None else types
    if not isinstance(types, list) or len(types) < n_layer or any(kind not in list(known) for kind in types):
        raise UserError(
            f"`layer_types` says for each of {n_layer} layers which of {', '.join(known)} it is, but got {types!r} in config.json."
        )
    return types[:n_layer]


def windows(
    default_window: int | None,
    default: Callable[[Mapping[str, Any], int], str] = lambda mapping, i: SLIDING,
    n_layer: int = 32,
    extra: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda fields: {},
    used: Callable[[Mapping[str, Any]], bool] = lambda mapping: True,
) -> Joint:
    """Return the row for layers of which some see a window only.

    Args:
        default_window: Its size, where `config.json` does not say.
        default: What layer i is, where `layer_types` is not there.
        n_layer: How many layers there are, where `config.json` does not say.
        extra: Further entries to write, from our fields.
        used: Whether the window is used at all.
    """

    def parse(mapping: Mapping[str, Any]) -> dict[str, Any]:
        size = mapping.get("sliding_window", default_window) if used(mapping) else None
        kinds = layer_types(mapping, lambda i: default(mapping, i), n_layer)
        there = size is not None and SLIDING in kinds
        indices = [int(kind == SLIDING) for kind in kinds] if there else None
        return dict(sliding_window_size=size if there else None, sliding_window_indices=indices)

    def format(fields: Mapping[str, Any]) -> dict[str, Any]:
        indices = fields["sliding_window_indices"] or [0] * fields["n_layer"]
        kinds = [SLIDING if index else FULL for index in indices]
        return dict(sliding_window=fields["sliding_window_size"], layer_types=kinds) | extra(fields)

    return Joint(("layer_types", "sliding_window"), ("sliding_window_size", "sliding_window_indices"), parse, format)


# The decoder that most families vary

LLAMA_BASE: dict[str, Any] = dict(
    norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", bias=False, parallel_residual=False, rotary_percentage=1.0
)

LLAMA_FIELDS = [
    field("vocab_size", ["padded_vocab_size", "vocab_size"], default=32000),
    field("hidden_size", "n_embd", default=4096),
    field("num_hidden_layers", "n_layer", default=32),
    field("num_attention_heads", "n_head", default=32),
    field("head_dim", "head_size"),
    field("rms_norm_eps", "norm_eps", default=1e-6),
    field("hidden_act", "mlp_class_name", default="silu", **one_of(GATED_MLPS)),
    field("tie_word_embeddings", "tie_embeddings", default=False),
    *rope_fields(["rope_theta"]),
]

LLAMA_WEIGHTS: list[Rule] = [
    same("model.embed_tokens.weight", "transformer.wte.weight"),
    same("model.layers.{}.input_layernorm.*", "transformer.h.{}.norm_1.*"),
    joined([f"model.layers.{{}}.self_attn.{x}_proj.*" for x in "qkv"], "transformer.h.{}.attn.qkv.*"),
    same("model.layers.{}.self_attn.o_proj.*", "transformer.h.{}.attn.proj.*"),
    same("model.layers.{}.post_attention_layernorm.*", "transformer.h.{}.norm_2.*"),
    same("model.layers.{}.mlp.gate_proj.*", "transformer.h.{}.mlp.fc_1.*"),
    same("model.layers.{}.mlp.up_proj.*", "transformer.h.{}.mlp.fc_2.*"),
    same("model.layers.{}.mlp.down_proj.*", "transformer.h.{}.mlp.proj.*"),
    same("model.norm.*", "transformer.ln_f.*"),
    tied("lm_head.weight", "lm_head.weight"),
    ignored("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    ignored("model.rotary_emb.inv_freq"),
]
