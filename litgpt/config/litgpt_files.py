"""What the fields in LitGPT's `model_config.yaml` mean, and how ours are written there."""

from collections.abc import Mapping
from typing import Any

from litgpt.errors import UserError

LITGPTS_FIELDS = {
    *("name", "hf_config", "block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple", "padded_vocab_size"),
    *("norm_class_name", "norm_eps", "norm_qk", "norm_qk_type", "post_attention_norm", "post_mlp_norm", "parallel_residual"),
    *("shared_attention_norm", "norm_1", "norm_2", "n_head", "head_size", "n_query_groups", "attn_bias", "attention_scores_scalar"),
    *("sliding_window_size", "sliding_window_indices", "attention_logit_softcapping", "latent_attention"),
    *(
        "rope_base",
        "rotary_percentage",
        "rope_condense_ratio",
        "rope_adjustments",
        "rope_interleave",
        "rope_local_base_freq",
        "rope_indices",
    ),
    *("intermediate_size", "moe_intermediate_size", "bias", "mlp_class_name", "gelu_approximate", "n_expert", "n_expert_per_token"),
    *("n_shared_expert", "n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "first_k_dense_replace"),
    *("routed_scaling_factor", "norm_topk_prob", "scale_embeddings", "lm_head_bias", "final_logit_softcapping"),
}
LITGPTS_ROPE_KEYS = {
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
OFFSET, PLAIN = "Gemma", "OLMo"  # LitGPT knows by these words in a name that 1 is added to norms' weights, and that norms have none


def from_litgpt(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return our fields of a `model_config.yaml`; one that has fields of ours alone is ours already.

    Args:
        mapping: What the file holds.
    """
    if not mapping.keys() <= LITGPTS_FIELDS:
        return mapping
    kept = {name: value for name, value in mapping.items() if name != "attn_bias" or value}  # LitGPT's false means: as `bias` says
    name, grouped = str(mapping.get("name", "")), mapping.get("n_expert_groups")
    if mapping.get("norm_class_name") == "RMSNorm":
        kept["norm_add_unit_offset"] = OFFSET in name
    else:
        kept["norm_affine"] = PLAIN not in name
    if mapping.get("n_expert"):
        kept |= dict(expert_scores="sigmoid") if grouped else dict(norm_topk_prob=True)
    if mapping.get("rope_local_base_freq") is None:
        kept.pop("rope_indices", None)
    return {name: value for name, value in kept.items() if value is not None}


def to_litgpt(values: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that LitGPT's own `Config` takes.

    Args:
        values: All of ours.
        defaults: Of the fields.

    Raises:
        UserError: LitGPT has no such architecture.
    """
    kept = {name: value for name, value in values.items() if name in LITGPTS_FIELDS}
    kept |= dict(bias=values["mlp_bias"], attn_bias=bool(values["attn_bias"] and not values["mlp_bias"]))
    if values["n_expert"]:
        kept |= _experts(values)
    if "low_freq_factor" in (values["rope_adjustments"] or {}):  # LitGPT needs the length of pretraining, which is by default this
        kept["rope_adjustments"] = dict(original_max_seq_len=values["block_size"]) | values["rope_adjustments"]
    for name, wrong in _problems(values, kept, defaults):
        if wrong:
            raise UserError(f"LitGPT cannot express this config, whose `{name}` is {values[name]!r}.")
    return kept


def _experts(values: dict[str, Any]) -> dict[str, Any]:
    shared = values["shared_intermediate_size"]
    return dict(
        n_shared_expert=shared and shared // values["moe_intermediate_size"],
        first_k_dense_replace=values["expert_indices"].index(1) or None if 1 in values["expert_indices"] else values["n_layer"],
        norm_topk_prob=values["norm_topk_prob"] and values["n_expert_groups"] is not None,
    )


def _problems(values: dict[str, Any], kept: dict[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return fields and whether LitGPT would compute something else for them."""
    rope, rms, latent = values["rope_adjustments"] or {}, values["norm_class_name"] == "RMSNorm", values["latent_attention"] is not None
    grouped, experts = values["n_expert_groups"] is not None, values["n_expert"] > 0
    handled = {"family", "tie_embeddings", "attn_bias", "attn_proj_bias", "mlp_bias", "norm_add_unit_offset", "norm_affine", "mixers"}
    handled |= {"expert_indices", "expert_scores", "shared_intermediate_size", "bias", "norm_bias" if rms else "norm_affine"}
    first, shared = kept["first_k_dense_replace"] or 0, values["shared_intermediate_size"]
    return [
        ("mlp_bias", values["mlp_bias"] != values["attn_proj_bias"]),
        ("attn_bias", values["mlp_bias"] and not values["attn_bias"]),
        ("rope_adjustments", not rope.keys() <= LITGPTS_ROPE_KEYS),
        ("mixers", set(values["mixers"]) != {"latent" if latent else "attention"}),
        ("rope_indices", None in (values["rope_indices"] or [])),
        ("scale_embeddings", not isinstance(values["scale_embeddings"], bool)),
        ("norm_add_unit_offset", rms and values["norm_add_unit_offset"] != (OFFSET in values["name"])),
        ("norm_affine", not rms and values["norm_affine"] == (PLAIN in values["name"])),
        ("expert_indices", experts and values["expert_indices"] != [int(i >= first) for i in range(values["n_layer"])]),
        ("shared_intermediate_size", experts and shared is not None and shared % values["moe_intermediate_size"]),
        ("expert_scores", experts and (values["expert_scores"] == "sigmoid") != grouped),
        ("norm_topk_prob", experts and not grouped and not values["norm_topk_prob"]),
        ("norm_qk_type", values["norm_qk_type"] == "per_head"),
        *((name, values[name] != defaults[name]) for name in defaults.keys() - LITGPTS_FIELDS - handled),
    ]
