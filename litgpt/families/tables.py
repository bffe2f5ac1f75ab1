"""Rows of fields, rules for weights and values that several families share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Field, Joint, field
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


# How positions are stretched: for each of their types the keys that it has, of which the first ones have to be there

ROPE_KEYS = {
    "linear": (["factor"], []),
    "dynamic": (["factor"], []),
    "llama3": (["factor", "low_freq_factor", "high_freq_factor"], ["original_max_seq_len"]),
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
TRAINED = "original_max_position_embeddings"  # how long sequences were before positions were stretched
ROPE_SPELLINGS = {"original_max_seq_len": TRAINED}  # the others are spelled as we spell them
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


def parse_still_rope(value: Any) -> dict[str, Any] | None:
    """Return the same of a model that does not scale queries by their position, whatever `config.json` says."""
    parsed = parse_rope(value)
    return parsed and {key: setting for key, setting in parsed.items() if key != "llama_4_scaling_beta"}


def format_rope(adjustments: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the `rope_scaling` of a `rope_adjustments`."""
    if not adjustments:
        return None
    kind = rope_type(adjustments)
    needed, optional = ROPE_KEYS[kind]
    keys = {ours: ROPE_SPELLINGS.get(ours, ours) for ours in [*needed, *optional] if adjustments.get(ours) is not None}
    return {"rope_type": kind} | {theirs: adjustments[ours] for ours, theirs in keys.items()}


class Scaling(Field):
    """The row for `rope_adjustments`, of which the length of pretraining may stand outside the mapping, and then counts more."""

    def read(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """Return our field of their `config.json`."""
        return {name: _as_trained(adjustments, mapping) for name, adjustments in super().read(mapping).items()}

    def write(self, mapping: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """Put our field into their `config.json`; a length of pretraining that has changed is changed wherever it stands."""
        adjustments = fields[self.ours[0]]
        trained = (adjustments or {}).get("original_max_seq_len")
        if trained is not None and mapping.get(TRAINED) not in (None, trained):
            for place in (mapping, *(mapping.get(spelling) for spelling in self.theirs)):
                if isinstance(place, dict) and place.get(TRAINED) is not None:
                    place[TRAINED] = trained
        elif trained is None and _as_trained(adjustments, mapping) != adjustments:
            del mapping[TRAINED]
        Field.write(replace(self, parse=lambda said: _as_trained(self.parse(said), mapping)), mapping, fields)


def _as_trained(adjustments: dict[str, Any] | None, mapping: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `rope_adjustments` with the length of pretraining that stands outside of them, if it does and their kind has one."""
    if adjustments is None or mapping.get(TRAINED) is None or "original_max_seq_len" not in sum(ROPE_KEYS[rope_type(adjustments)], []):
        return adjustments
    return adjustments | dict(original_max_seq_len=whole(mapping, TRAINED, 0, most=2**31))


def rope_fields(base: list[str], share: list[str] | None = None, default_share: float = 1.0, default_base: float = 10000) -> list[Field]:
    """Return the rows for rotary embeddings. The scaling comes first: what it writes is then completed by the others.

    Args:
        base: The older spellings of the base.
        share: The older spellings of the rotated share of a head, where a model may rotate less than all.
        default_share: That share where it is left out.
        default_base: The base where it is left out.
    """
    nested = ("rope_theta", "partial_rotary_factor")  # transformers 5 has them in the same mapping; the next rows write them

    def respell(said: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in said.items() if key not in nested}

    rows = [
        Scaling(("rope_scaling", "rope_parameters"), ("rope_adjustments",), None, parse_still_rope, format_rope, respell),
        field(["rope_parameters.rope_theta", *base], "rope_base", default=default_base, parse=whole_if_equal, format=float),
    ]
    if share is not None:
        rows.append(field(["rope_parameters.partial_rotary_factor", *share], "rotary_percentage", default=default_share))
    return rows


def parse_ropes(mapping: Mapping[str, Any], base: float, local_base: float) -> tuple[Any, Any, dict[str, Any] | None]:
    """Return both bases and the `rope_adjustments` of a model whose layers with a window turn by angles of their own, never stretched.

    Args:
        mapping: What `config.json` says, as transformers 5 for each kind of layers or as 4 in one.
        base: Of layers that see all, where no kind of layers has its own.
        local_base: Of layers with a window, likewise.
    """
    nested, scaling = mapping.get("rope_parameters") or {}, mapping.get("rope_scaling") or {}
    if not isinstance(nested, Mapping) or not nested.keys() <= {FULL, SLIDING}:
        raise UserError(f"`rope_parameters` is {nested!r} in config.json, but a mapping for each of {FULL} and {SLIDING} is expected.")
    full, local = nested.get(FULL) or {}, nested.get(SLIDING) or {}
    if not all(isinstance(part, Mapping) for part in (full, local, scaling)):
        raise UserError(f"`rope_parameters` and `rope_scaling` hold mappings in config.json, but got {nested!r} and {scaling!r}.")
    if parse_rope(dict(local)) is not None:
        raise UserError(f"`rope_parameters` stretches the positions of {SLIDING} layers in config.json, which is not supported.")
    bases = (whole_if_equal(part.get("rope_theta", usual)) for part, usual in ((full, base), (local, local_base)))
    return *bases, parse_rope({**full, **scaling})


def half_said(mapping: Mapping[str, Any]) -> bool:
    """Return whether `rope_scaling` names its kind by the older word alone, which transformers 5 overlooks here."""
    scaling = mapping.get("rope_scaling")
    return isinstance(scaling, Mapping) and "type" in scaling and "rope_type" not in scaling


def format_ropes(base: float, local_base: float, adjustments: dict[str, Any] | None) -> dict[str, Any]:
    """Return what `parse_ropes` reads, as transformers 4 and as 5 spells it."""
    scaling = format_rope(adjustments)
    nested = {
        SLIDING: {"rope_type": "default", "rope_theta": float(local_base)},
        FULL: {"rope_type": "default"} | (scaling or {}) | {"rope_theta": float(base)},
    }
    return dict(rope_theta=float(base), rope_scaling=scaling, rope_parameters=nested)


def whole_if_equal(value: Any) -> Any:
    """Return 10000 for 10000.0, as the base of a rotary embedding is usually written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


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


def stretched(rows: Iterable[Field | Joint], scaling: dict[str, Any], parse: Callable = parse_still_rope) -> list[Field | Joint]:
    """Return rows of which the one for the scaling of positions means a certain one where `config.json` says nothing of it.

    Args:
        rows: Those of a family without.
        scaling: As `config.json` spells it.
        parse: Reads it.
    """

    def parse_said(value: Any) -> dict[str, Any] | None:
        return parse(scaling if value is None else value)

    return [replace(row, default=scaling, parse=parse_said) if row.ours == ("rope_adjustments",) else row for row in rows]


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

SLIDING, FULL = "sliding_attention", "full_attention"


def whole(mapping: Mapping[str, Any], key: str, default: int, most: int = 10_000) -> int:
    """Return a whole number that an entry of `config.json` has to be, where it counts something."""
    value = mapping.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise UserError(f"`{key}` is a whole number of at most {most} in config.json, but got {value!r}.")
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
