"""Check the fields of a config, and put values in the place of None."""

import math
from collections.abc import Mapping
from typing import Any

from litgpt.errors import UserError, did_you_mean
from litgpt.families.ropes import format_rope, parse_rope

MIXERS = ("attention", "latent", "short_conv", "gated_delta")
CHOICES = {
    "norm_class_name": ("LayerNorm", "RMSNorm"),
    "norm_qk_type": ("default", "olmo2", "per_head"),
    "mlp_class_name": ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE"),
    "gelu_approximate": ("none", "tanh"),
    "expert_scores": ("softmax", "sigmoid"),
}
COUNTS = (  # whole numbers above 0
    *("block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple", "padded_vocab_size"),
    *("n_head", "head_size", "n_query_groups", "sliding_window_size", "intermediate_size", "moe_intermediate_size"),
    *("n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "n_shared_expert", "shared_intermediate_size"),
)
COUNTS_OR_ZERO = ("n_expert", "n_expert_per_token", "first_k_dense_replace")
MOST = {"n_layer": 10_000, "n_expert": 100_000}  # a damaged file must not make us fill the memory
NUMBERS = (  # above 0
    *("rope_base", "rope_condense_ratio", "rope_local_base_freq", "attention_scores_scalar", "attention_scale"),
    *("attention_logit_softcapping", "final_logit_softcapping", "clip_qkv", "swiglu_limit"),
    *("residual_scale", "logit_scale", "routed_scaling_factor"),
)
NUMBERS_OR_ZERO = ("norm_eps", "rotary_percentage")
FLAGS = (
    *("norm_affine", "norm_bias", "norm_add_unit_offset", "norm_1", "norm_2", "norm_qk"),
    *("shared_attention_norm", "post_attention_norm", "post_mlp_norm", "parallel_residual"),
    *("bias", "attn_bias", "attn_proj_bias", "mlp_bias", "lm_head_bias", "tie_embeddings"),
    *("attention_sinks", "attention_gate", "learned_positions", "rope_interleave"),
    *("norm_topk_prob", "router_bias", "expert_bias", "shared_expert_gate"),
)
PARTS = {  # what the mappings of a mixer's sizes hold
    "latent_attention": ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    "short_conv": ("kernel_size", "bias"),
    "gated_delta": ("n_key_heads", "n_value_heads", "key_head_size", "value_head_size", "kernel_size"),
}
NEEDS = {"latent": "latent_attention", "short_conv": "short_conv", "gated_delta": "gated_delta"}  # by mixer
ROPE_KEYS = {  # of `rope_adjustments`
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("rope_type", "dynamic", "attention_factor", "truncate", "short_factor", "long_factor", "llama_4_scaling_beta"),
}


def complete(config: Any, defaults: Mapping[str, Any]) -> None:
    """Check all fields, and put values in the place of None.

    Args:
        config: Anything that has the fields of a `Config`.
        defaults: Of the fields; where one is None, None is allowed.

    Raises:
        UserError: A value has the wrong type or size, or two do not go together.
    """
    _check_types(config, defaults)
    config.name = config.name or config.hf_config.get("name", "")
    _complete_heads(config)
    if config.padded_vocab_size is None:
        config.padded_vocab_size = find_multiple(config.vocab_size, config.padding_multiple)
    config.vocab_size = min(config.vocab_size, config.padded_vocab_size)
    if config.intermediate_size is None:
        if config.mlp_class_name != "GptNeoxMLP":
            raise UserError(f"`mlp_class_name` is {config.mlp_class_name!r}, which needs an `intermediate_size`, but that is not given.")
        config.intermediate_size = 4 * config.n_embd
    for name in ("attn_bias", "attn_proj_bias", "mlp_bias"):
        if getattr(config, name) is None:
            setattr(config, name, config.bias)
    _complete_layers(config)
    _complete_experts(config)
    if config.rope_adjustments is not None:
        config.rope_adjustments = dict(config.rope_adjustments) or None
        canonical_rope(config.rope_adjustments)  # checks it
        _check_factors(config)


def find_multiple(n: int, k: int) -> int:
    """Return the smallest multiple of k that is at least n."""
    if k < 1:
        raise UserError(f"`padding_multiple` is at least 1, but got {k}.")
    return -(-n // k) * k


def canonical_rope(adjustments: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return `rope_adjustments` spelled in the one way that families write.

    Raises:
        UserError: A key is not known, or a value is missing or no number.
    """
    if not adjustments:
        return None
    for key, value in adjustments.items():
        if key not in ROPE_KEYS:
            raise UserError(f"`rope_adjustments` has no key {key!r}.{did_you_mean(str(key), ROPE_KEYS)}")
        if key in ("short_factor", "long_factor"):
            right, rule = isinstance(value, list) and all(_is_number(item) and item > 0 for item in value), "a list of numbers above 0"
        elif key in ("dynamic", "truncate"):
            right, rule = isinstance(value, bool), "true or false"
        else:
            right = (
                key == "rope_type" or value is None or (_is_number(value) and (value > 0 or key not in ("factor", "original_max_seq_len")))
            )
            rule = "a number above 0"
        if not right:
            raise UserError(f"`{key}` in `rope_adjustments` is {rule}, but got {value!r}.")
    try:
        return parse_rope(format_rope(adjustments))
    except UserError:
        raise UserError(f"`rope_adjustments` lacks a value that its kind of scaling needs: {adjustments!r}.") from None


def _check_factors(config: Any) -> None:
    """Raise a `UserError` unless LongRoPE has a factor for each pair of features that turns."""
    pairs = _turning(config) // 2
    for key in ("short_factor", "long_factor"):
        factors = (config.rope_adjustments or {}).get(key)
        if factors is not None and len(factors) != pairs:
            raise UserError(f"`{key}` in `rope_adjustments` has a number for each of {pairs} pairs that turn, but got {len(factors)}.")


def _turning(config: Any) -> int:
    """Return how many features of a head turn."""
    if config.latent_attention is not None:
        return config.latent_attention["qk_rope_head_dim"]
    return int(config.rotary_percentage * config.head_size)


def _complete_heads(config: Any) -> None:
    latent = config.latent_attention
    if latent is not None:
        config.head_size = latent["qk_rope_head_dim"] + latent["qk_nope_head_dim"]
    if config.head_size is None:
        if config.n_embd % config.n_head:
            raise UserError(
                f"`n_embd` is a multiple of `n_head`, unless `head_size` is given, but got {config.n_embd} and {config.n_head}."
            )
        config.head_size = config.n_embd // config.n_head
    config.n_query_groups = config.n_query_groups or config.n_head
    if latent is not None and config.n_query_groups != config.n_head:
        raise UserError(
            f"`n_query_groups` is `n_head` where keys are made from a latent, but got {config.n_query_groups} and {config.n_head}."
        )
    if config.n_head % config.n_query_groups:
        raise UserError(f"`n_head` is a multiple of `n_query_groups`, but got {config.n_head} and {config.n_query_groups}.")
    turning = _turning(config)
    if turning % 2:
        raise UserError(
            f"The features of a head turn in pairs, but `rotary_percentage` {config.rotary_percentage} of "
            f"`head_size` {config.head_size} is {turning}. Choose an even number."
        )
    if config.shared_attention_norm and not (config.parallel_residual and config.norm_1):
        raise UserError(
            "`shared_attention_norm` gives attention's norm to the MLP beside it, which needs `parallel_residual` and `norm_1`."
        )


def _complete_layers(config: Any) -> None:
    if config.sliding_window_size is None:
        config.sliding_window_indices = None
    else:
        config.sliding_window_indices = per_layer(config, "sliding_window_indices", 1, (0, 1))
        if not any(config.sliding_window_indices):
            config.sliding_window_size = config.sliding_window_indices = None
    config.mixers = per_layer(config, "mixers", "latent" if config.latent_attention is not None else "attention", MIXERS)
    for mixer, sizes in NEEDS.items():
        if (mixer in config.mixers) != (getattr(config, sizes) is not None):
            raise UserError(f"Layers of the kind {mixer!r} and the sizes in `{sizes}` belong together, but only one of them is given.")
    config.rope_indices = per_layer(config, "rope_indices", 0 if config.rope_local_base_freq is None else 1, (0, 1, None))
    if 1 in config.rope_indices and config.rope_local_base_freq is None:
        raise UserError("`rope_indices` names layers that turn by the local base, but `rope_local_base_freq` is not given.")
    if config.rope_local_base_freq is None and None not in config.rope_indices:
        config.rope_indices = None


def _complete_experts(config: Any) -> None:
    if not config.n_expert:
        config.expert_indices = None
        if config.mlp_class_name == "LLaMAMoE":
            raise UserError("`n_expert` is 0, but a model whose MLPs are 'LLaMAMoE' has experts; those without are not supported.")
        return
    if config.mlp_class_name != "LLaMAMoE":
        raise UserError(f"`mlp_class_name` is 'LLaMAMoE' where `n_expert` is above 0, but got {config.mlp_class_name!r}.")
    if not 0 < config.n_expert_per_token <= config.n_expert:
        raise UserError(f"`n_expert_per_token` is 1 to `n_expert`, which is {config.n_expert}, but got {config.n_expert_per_token}.")
    if config.expert_indices is None:
        dense = config.first_k_dense_replace or 0
        config.expert_indices = [int(i >= dense) for i in range(config.n_layer)]
    config.expert_indices = per_layer(config, "expert_indices", 1, (0, 1))
    config.first_k_dense_replace = None  # has become expert_indices
    config.moe_intermediate_size = config.moe_intermediate_size or config.intermediate_size
    if config.n_shared_expert and config.shared_intermediate_size is None:
        config.shared_intermediate_size = config.moe_intermediate_size * config.n_shared_expert
    config.n_shared_expert = None  # has become shared_intermediate_size
    _check_groups(config)


def _check_groups(config: Any) -> None:
    groups, chosen, scores = config.n_expert_groups, config.n_topk_groups, config.n_topk_scores_per_group
    if (groups is None) != (chosen is None):
        raise UserError("`n_expert_groups` and `n_topk_groups` belong together, but only one of them is given.")
    if groups is None:
        return
    size = config.n_expert // groups
    config.n_topk_scores_per_group = scores or min(2, size)
    if config.n_expert % groups or chosen > groups or config.n_topk_scores_per_group > size or config.n_expert_per_token > chosen * size:
        raise UserError(
            f"{config.n_expert} experts do not fall into {groups} groups of which {chosen} are chosen "
            f"by their {config.n_topk_scores_per_group} best, for {config.n_expert_per_token} experts a token."
        )


def per_layer(config: Any, name: str, default: Any, allowed: tuple) -> list:
    """Return one value for each layer; a list for a deeper model is cut, so that a config can be made shallower."""
    values = getattr(config, name)
    if values is None:
        values = [default] * config.n_layer
    if not isinstance(values, list | tuple):
        raise UserError(f"`{name}` is a list with one value for each layer, but got {values!r}.")
    if len(values) < config.n_layer:
        raise UserError(f"`{name}` has one value for each layer, but got {len(values)} for {config.n_layer} layers.")
    for value in values:
        if isinstance(value, bool | float | list | dict) or value not in allowed:
            raise UserError(f"`{name}` holds {value!r}, but allowed are: {', '.join(map(repr, allowed))}.")
    return list(values[: config.n_layer])


def _check_types(config: Any, defaults: Mapping[str, Any]) -> None:
    if not isinstance(config.hf_config, dict) or not isinstance(config.name, str):
        raise UserError(f"`name` is a text and `hf_config` a mapping, but got {config.name!r} and {config.hf_config!r}.")
    for name in FLAGS:
        if not isinstance(value := getattr(config, name), bool) and not (value is None and defaults[name] is None):
            raise UserError(f"`{name}` is true or false, but got {value!r}.")
    for name in (*COUNTS, *COUNTS_OR_ZERO, *NUMBERS, *NUMBERS_OR_ZERO):
        value = number(getattr(config, name))
        setattr(config, name, value)
        if value is not None or defaults[name] is not None:
            _check_number(name, value)
    if config.rotary_percentage > 1:
        raise UserError(f"`rotary_percentage` is a share between 0 and 1, but got {config.rotary_percentage}.")
    if not isinstance(config.scale_embeddings, bool) and not (_is_number(config.scale_embeddings) and config.scale_embeddings > 0):
        raise UserError(f"`scale_embeddings` is true, false or a factor above 0, but got {config.scale_embeddings!r}.")
    for name, allowed in CHOICES.items():
        if (value := getattr(config, name)) not in list(allowed):  # a list, as the value may be anything
            raise UserError(f"`{name}` is one of {', '.join(allowed)}, but got {value!r}.{did_you_mean(str(value), allowed)}")
    if not isinstance(config.rope_adjustments, dict | None):
        raise UserError(f"`rope_adjustments` is a mapping or null, but got {config.rope_adjustments!r}.")
    for name, keys in PARTS.items():
        _check_parts(name, getattr(config, name), keys)
    if (delta := config.gated_delta) is not None and delta["n_value_heads"] % delta["n_key_heads"]:
        raise UserError(
            f"`n_value_heads` is a multiple of `n_key_heads` in `gated_delta`, but got {delta['n_value_heads']} and {delta['n_key_heads']}."
        )


def _check_number(name: str, value: Any) -> None:
    whole, zero = name in (*COUNTS, *COUNTS_OR_ZERO), name in (*COUNTS_OR_ZERO, *NUMBERS_OR_ZERO)
    most = MOST.get(name, 2**31)
    right = _is_number(value) and (value >= 0 if zero else value > 0) and (not whole or (isinstance(value, int) and value <= most))
    if not right:
        rule = (
            f"a {'' if zero else 'positive '}whole number of at most {most}"
            if whole
            else ("a number of at least 0" if zero else "a positive number")
        )
        raise UserError(f"`{name}` is {rule}, but got {value!r}.")


def _check_parts(name: str, parts: Any, keys: tuple[str, ...]) -> None:
    if parts is None:
        return
    if not isinstance(parts, dict) or not parts.keys() <= set(keys) or not set(keys) - {"q_lora_rank"} <= parts.keys():
        raise UserError(f"`{name}` is null or a mapping with {', '.join(keys)}, but got {parts!r}.")
    for key, value in parts.items():
        right = isinstance(value, bool) if key == "bias" else _is_number(value) and isinstance(value, int) and 0 < value <= 2**31
        if not right and not (key == "q_lora_rank" and value is None):
            raise UserError(f"`{key}` in `{name}` is {'true or false' if key == 'bias' else 'a positive whole number'}, but got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> Any:
    """Return the number that a text spells (YAML reads `1e-5` as text), and a whole one without a fraction as such."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value
