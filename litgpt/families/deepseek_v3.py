"""DeepSeek-V3 and R1: latent attention, experts in groups that sigmoids choose, and experts that all tokens use."""

from collections.abc import Mapping
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Brand, Family, Joint, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import (
    DECODER_FIELDS,
    EXPERT_WEIGHTS,
    FRAME_WEIGHTS,
    LLAMA_BASE,
    MLP_WEIGHTS,
    only,
    whole,
    with_defaults,
    with_experts,
)
from litgpt.weights import beyond, same

SIZES = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)


def parse_latent(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of latent attention; a `q_lora_rank` of null means that queries have no latent."""
    sizes = {key: whole(mapping, key, default, most=2**29) for key, default in SIZES.items()}
    return dict(latent_attention={"q_lora_rank": mapping.get("q_lora_rank", 1536)} | sizes)


def parse_experts(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers have experts, and how wide those are that all tokens use."""
    n_layer, dense = whole(mapping, "num_hidden_layers", 61), whole(mapping, "first_k_dense_replace", 3)
    width, shared = whole(mapping, "moe_intermediate_size", 2048, most=2**29), whole(mapping, "n_shared_experts", 1)
    if not width or not shared:
        raise UserError(f"`moe_intermediate_size` and `n_shared_experts` are above 0 in config.json, but got {width} and {shared}.")
    indices = [int(i >= dense) for i in range(n_layer)]
    return dict(moe_intermediate_size=width, shared_intermediate_size=width * shared, expert_indices=indices)


def format_experts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `parse_experts` reads."""
    width, indices = fields["moe_intermediate_size"], fields["expert_indices"] or []
    return dict(
        moe_intermediate_size=width,
        n_shared_experts=(fields["shared_intermediate_size"] or 0) // (width or 1),
        first_k_dense_replace=indices.index(1) if 1 in indices else len(indices),
    )


V3 = dict(n_layer=61, n_embd=7168, n_head=128, intermediate_size=18432, moe_intermediate_size=2048, n_expert=256, n_expert_per_token=8)
YARN = dict(beta_fast=32, beta_slow=1, factor=40, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0)
MOONLIGHT = dict(n_layer=27, n_embd=2048, n_head=16, intermediate_size=11264, moe_intermediate_size=1408, n_expert=64, n_expert_per_token=6)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architectures=["DeepseekV3ForCausalLM"],
    fields=[
        *(
            row
            for row in with_experts(
                with_defaults(DECODER_FIELDS, vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128)
            )
            if row.ours[0] != "head_size"
        ),
        field("num_key_value_heads", "n_query_groups", default=128),
        field("intermediate_size", "intermediate_size", default=18432),
        field("max_position_embeddings", "block_size", default=4096),
        *rope_fields(["rope_theta"]),
        field("rope_interleave", "rope_interleave", default=True),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
        Joint(("q_lora_rank", *SIZES), ("latent_attention",), parse_latent, lambda fields: dict(fields["latent_attention"] or {})),
        field(["n_routed_experts", "num_local_experts"], "n_expert", default=256),
        field("num_experts_per_tok", "n_expert_per_token", default=8),
        Joint(
            ("moe_intermediate_size", "n_shared_experts", "first_k_dense_replace"),
            ("moe_intermediate_size", "shared_intermediate_size", "expert_indices"),
            parse_experts,
            format_experts,
        ),
        field("n_group", "n_expert_groups", default=8),
        field("topk_group", "n_topk_groups", default=4),
        field("norm_topk_prob", "norm_topk_prob", default=True),
        field("routed_scaling_factor", "routed_scaling_factor", default=2.5, format=float),
        only("scoring_func", "sigmoid"),
        only("topk_method", "noaux_tc"),
        only("moe_layer_freq", 1),
    ],
    weights=[
        *FRAME_WEIGHTS,
        same("model.layers.{}.self_attn.q_proj.*", "transformer.h.{}.attn.q.*"),
        same("model.layers.{}.self_attn.q_a_proj.*", "transformer.h.{}.attn.q_a.*"),
        same("model.layers.{}.self_attn.q_a_layernorm.*", "transformer.h.{}.attn.q_a_norm.*"),
        same("model.layers.{}.self_attn.q_b_proj.*", "transformer.h.{}.attn.q_b.*"),
        same("model.layers.{}.self_attn.kv_a_proj_with_mqa.*", "transformer.h.{}.attn.kv_a.*"),
        same("model.layers.{}.self_attn.kv_a_layernorm.*", "transformer.h.{}.attn.kv_a_norm.*"),
        same("model.layers.{}.self_attn.kv_b_proj.*", "transformer.h.{}.attn.kv_b.*"),
        *MLP_WEIGHTS,
        same("model.layers.{}.mlp.gate.weight", "transformer.h.{}.mlp.gate.weight"),
        same("model.layers.{}.mlp.gate.e_score_correction_bias", "transformer.h.{}.mlp.correction"),
        *EXPERT_WEIGHTS,
        same("model.layers.{}.mlp.shared_experts.gate_proj.*", "transformer.h.{}.mlp.shared.fc_1.*"),
        same("model.layers.{}.mlp.shared_experts.up_proj.*", "transformer.h.{}.mlp.shared.fc_2.*"),
        same("model.layers.{}.mlp.shared_experts.down_proj.*", "transformer.h.{}.mlp.shared.proj.*"),
        beyond("model.layers."),  # predict tokens further ahead
    ],
    base=LLAMA_BASE | dict(mlp_class_name="LLaMAMoE", norm_eps=1e-6, expert_scores="sigmoid"),
    brands=[
        Brand(
            "deepseek-ai",
            base=dict(
                block_size=163840,
                vocab_size=129280,
                padded_vocab_size=129280,
                rope_adjustments=YARN,
                rope_interleave=True,
                latent_attention=dict(q_lora_rank=1536, **SIZES),
                n_expert_groups=8,
                n_topk_groups=4,
                n_topk_scores_per_group=2,
                norm_topk_prob=True,
                routed_scaling_factor=2.5,
                n_shared_expert=1,
                first_k_dense_replace=3,
            ),
            sizes={"DeepSeek-V3{,-Base,-0324,.1,.1-Base,.1-Terminus}": V3, "DeepSeek-R1{,-Zero,-0528}": V3},
            prompt={"DeepSeek-R1{,-0528}": "r1"},
        ),
        Brand(
            "moonshotai",
            base=dict(
                block_size=8192,
                norm_eps=1e-5,
                vocab_size=163840,
                padded_vocab_size=163840,
                rope_base=50000,
                rope_interleave=True,
                latent_attention=dict(q_lora_rank=None, **SIZES),
                n_expert_groups=1,
                n_topk_groups=1,
                n_topk_scores_per_group=2,
                norm_topk_prob=True,
                routed_scaling_factor=2.446,
                n_shared_expert=2,
                first_k_dense_replace=1,
            ),
            sizes={"Moonlight-16B-A3B{,-Instruct}": MOONLIGHT},
        ),
    ],
)
