"""Rows of fields, rules for weights and values that several families share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import FULL, SLIDING, Field, Joint, field, whole
from litgpt.families.ropes import rope_fields
from litgpt.weights import Rule, alias, ignored, joined, same, stacked, tied

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


def one_of(names: dict[str, str], entry: str = "hidden_act") -> dict[str, Any]:
    """Return how to parse and format an activation that has one of these names there; the first of equals is written."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise UserError(f"`{entry}` is {value!r} in config.json, which is not supported here. Supported are: {', '.join(names)}.")
        return names[value]

    def format(value: Any) -> str | None:
        return next((theirs for theirs, ours in names.items() if ours == value), None)

    return dict(parse=parse, format=format)


def given(key: str) -> Callable[[Any], Any]:
    """Return how to parse a number that has to be there, for null would leave open what we would compute."""

    def parse(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
            raise UserError(f"`{key}` is a number other than 0 in config.json, but got {value!r}.")
        return value

    return parse


# Entries of other kinds


def with_defaults(rows: Iterable[Field | Joint], **defaults: Any) -> list[Field | Joint]:
    """Return rows of which some mean another value where their entry is left out.

    Args:
        rows: Another family's.
        **defaults: That value, by the older spelling of the entry.
    """
    return [replace(row, default=defaults[row.theirs[-1]]) if row.theirs[-1] in defaults else row for row in rows]


def with_experts(rows: Iterable[Field | Joint]) -> list[Field | Joint]:
    """Return the rows of a family as one has them that differs from it by its experts."""
    activation = field("hidden_act", "mlp_class_name", default="silu", **one_of(dict.fromkeys(GATED_MLPS, "LLaMAMoE")))
    return [activation if row.ours == ("mlp_class_name",) else row for row in rows]


def only(entry: str, value: Any, default: Any = None) -> Joint:
    """Return the row for an entry that must say what we compute.

    Args:
        entry: Its name.
        value: What it has to be.
        default: What it means where it is left out; by default the value.
    """

    def parse(mapping: Mapping[str, Any]) -> dict[str, Any]:
        said = mapping.get(entry)
        said = (value if default is None else default) if said is None else said
        if said is not value and (type(said) is not type(value) or said != value):
            raise UserError(f"`{entry}` is {said!r} in config.json, which is not supported. Supported is: {value!r}.")
        return {}

    return Joint((entry,), (), parse, lambda fields: {entry: value})


def four_times(entry: str, of: str, default: int) -> Joint:
    """Return the row for the width of an MLP that has four times the width of the model where it is not given.

    Args:
        entry: The MLP's width.
        of: The model's.
        default: The model's where that is not given.
    """

    def parse(mapping: Mapping[str, Any]) -> dict[str, Any]:
        width = mapping.get(entry)
        return dict(intermediate_size=4 * whole(mapping, of, default, most=2**29) if width is None else width)

    return Joint((entry, of), ("intermediate_size",), parse, lambda fields: {entry: fields["intermediate_size"]})


def head_dim(n_embd: int, n_head: int) -> Joint:
    """Return the row for the size of a head where transformers has no entry for it, but obeys one that is there.

    Args:
        n_embd: How wide the model is, where `config.json` does not say.
        n_head: How many heads there are, where it does not say.
    """

    def parse(mapping: Mapping[str, Any]) -> dict[str, Any]:
        said = mapping.get("head_dim")
        width, heads = whole(mapping, "hidden_size", n_embd, most=2**29), whole(mapping, "num_attention_heads", n_head, most=2**29)
        return dict(head_size=width // heads if said is None and heads and width % heads == 0 else said)

    return Joint(("head_dim", "hidden_size"), ("head_size",), parse, lambda fields: dict(head_dim=fields["head_size"]))


def float_or_none(value: float | None) -> float | None:
    """Return 30.0 for 30, the kind of number that transformers insists on."""
    return None if value is None else float(value)


# What each layer is


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


def expert_layers(n_layer: int) -> Joint:
    """Return the row for layers of which some have experts: every nth, except the ones that are named.

    Args:
        n_layer: How many layers there are, where `config.json` does not say.
    """

    def parse(mapping: Mapping[str, Any]) -> dict[str, Any]:
        n, step, dense = (
            whole(mapping, "num_hidden_layers", n_layer),
            whole(mapping, "decoder_sparse_step", 1),
            mapping.get("mlp_only_layers"),
        )
        if step == 0 or not isinstance(dense, list | None):
            said = f"{mapping.get('decoder_sparse_step')!r} and {dense!r}"
            raise UserError(f"`decoder_sparse_step` is a number above 0 and `mlp_only_layers` a list in config.json, but got {said}.")
        return dict(expert_indices=[int(i not in (dense or []) and (i + 1) % step == 0) for i in range(n)])

    def format(fields: Mapping[str, Any]) -> dict[str, Any]:
        return dict(decoder_sparse_step=1, mlp_only_layers=[i for i, index in enumerate(fields["expert_indices"] or []) if not index])

    return Joint(("decoder_sparse_step", "mlp_only_layers"), ("expert_indices",), parse, format)


# The decoder that most families vary

LLAMA_BASE: dict[str, Any] = dict(
    norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", bias=False, parallel_residual=False, rotary_percentage=1.0
)

DECODER_FIELDS = [
    field("vocab_size", ["padded_vocab_size", "vocab_size"], default=32000),
    field("hidden_size", "n_embd", default=4096),
    field("num_hidden_layers", "n_layer", default=32),
    field("num_attention_heads", "n_head", default=32),
    field("head_dim", "head_size"),
    field("rms_norm_eps", "norm_eps", default=1e-6),
    field("hidden_act", "mlp_class_name", default="silu", **one_of(GATED_MLPS)),
    field("tie_word_embeddings", "tie_embeddings", default=False),
]
LLAMA_FIELDS = [*DECODER_FIELDS, *rope_fields(["rope_theta"])]

QKV = [f"model.layers.{{}}.self_attn.{x}_proj.*" for x in "qkv"]
FRAME_WEIGHTS: list[Rule] = [  # without queries, keys and values, and without MLPs
    same("model.embed_tokens.weight", "transformer.wte.weight"),
    same("model.layers.{}.input_layernorm.*", "transformer.h.{}.norm_1.*"),
    same("model.layers.{}.self_attn.o_proj.*", "transformer.h.{}.attn.proj.*"),
    same("model.layers.{}.post_attention_layernorm.*", "transformer.h.{}.norm_2.*"),
    same("model.norm.*", "transformer.ln_f.*"),
    tied("lm_head.weight", "lm_head.weight"),
    ignored("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    ignored("model.rotary_emb.inv_freq"),
]
MLP_WEIGHTS: list[Rule] = [
    same("model.layers.{}.mlp.gate_proj.*", "transformer.h.{}.mlp.fc_1.*"),
    same("model.layers.{}.mlp.up_proj.*", "transformer.h.{}.mlp.fc_2.*"),
    same("model.layers.{}.mlp.down_proj.*", "transformer.h.{}.mlp.proj.*"),
]
LLAMA_WEIGHTS: list[Rule] = [*FRAME_WEIGHTS, joined(QKV, "transformer.h.{}.attn.qkv.*"), *MLP_WEIGHTS]
EXPERT_WEIGHTS: list[Rule] = [  # as most families have them in files, and as transformers 5 has them in memory
    stacked(
        [f"model.layers.{{}}.mlp.experts.{{}}.{x}_proj.weight" for x in ("gate", "up")], "transformer.h.{}.mlp.experts.gate_up", "n_expert"
    ),
    stacked("model.layers.{}.mlp.experts.{}.down_proj.weight", "transformer.h.{}.mlp.experts.down", "n_expert"),
    alias("model.layers.{}.mlp.experts.gate_up_proj", "transformer.h.{}.mlp.experts.gate_up"),
    alias("model.layers.{}.mlp.experts.down_proj", "transformer.h.{}.mlp.experts.down"),
]
