"""Qwen3-Next: three layers in four have a gated delta rule, the others gated attention; all have experts and a gated shared one."""

from collections.abc import Mapping
from typing import Any

from litgpt.families.family import Brand, Family, Joint, field
from litgpt.families.qwen2_moe import GATED_EXPERT_WEIGHTS
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import (
    DECODER_FIELDS,
    FRAME_WEIGHTS,
    FULL,
    LLAMA_BASE,
    MLP_WEIGHTS,
    QKV,
    expert_layers,
    layer_types,
    whole,
    with_defaults,
    with_experts,
)
from litgpt.weights import gated_qkv, same, skipped

LINEAR = "linear_attention"
SIZES = {  # ours -> theirs, and what it is where it is left out
    "n_key_heads": ("linear_num_key_heads", 16),
    "n_value_heads": ("linear_num_value_heads", 32),
    "key_head_size": ("linear_key_head_dim", 128),
    "value_head_size": ("linear_value_head_dim", 128),
    "kernel_size": ("linear_conv_kernel_dim", 4),
}


def parse_layers(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return what mixes tokens in each layer, and the sizes of the delta rule."""
    interval = whole(mapping, "full_attention_interval", 4) or 4
    kinds = layer_types(mapping, lambda i: LINEAR if (i + 1) % interval else FULL, 48, (FULL, LINEAR))
    sizes = {ours: whole(mapping, theirs, default) for ours, (theirs, default) in SIZES.items()}
    mixers = ["gated_delta" if kind == LINEAR else "attention" for kind in kinds]
    return dict(mixers=mixers, gated_delta=sizes if LINEAR in kinds else None)


def format_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `parse_layers` reads."""
    mixers, sizes = fields["mixers"] or ["attention"] * fields["n_layer"], fields["gated_delta"] or {}
    kinds = [LINEAR if mixer == "gated_delta" else FULL for mixer in mixers]
    return dict(layer_types=kinds) | {SIZES[ours][0]: size for ours, size in sizes.items()}


QWEN_3_NEXT = Family(
    model_type="qwen3_next",
    architectures=["Qwen3NextForCausalLM"],
    fields=[
        *with_defaults(
            with_experts(DECODER_FIELDS), vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=16, head_dim=256
        ),
        field("num_key_value_heads", "n_query_groups", default=2),
        field("intermediate_size", "intermediate_size", default=5632),
        field("max_position_embeddings", "block_size", default=32768),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
        *rope_fields(["rope_theta"], ["partial_rotary_factor"], default_share=0.25),
        Joint(
            ("layer_types", "full_attention_interval", *(theirs for theirs, _ in SIZES.values())),
            ("mixers", "gated_delta"),
            parse_layers,
            format_layers,
        ),
        field("num_experts", "n_expert", default=512),
        field("num_experts_per_tok", "n_expert_per_token", default=10),
        field("moe_intermediate_size", "moe_intermediate_size", default=512),
        field("shared_expert_intermediate_size", "shared_intermediate_size", default=512),
        field("norm_topk_prob", "norm_topk_prob", default=True),
        expert_layers(48),
    ],
    weights=[
        *FRAME_WEIGHTS,
        gated_qkv(QKV, ["transformer.h.{}.attn.qkv.*", "transformer.h.{}.attn.gate.*"]),
        same("model.layers.{}.self_attn.q_norm.*", "transformer.h.{}.attn.norm_q.*"),
        same("model.layers.{}.self_attn.k_norm.*", "transformer.h.{}.attn.norm_k.*"),
        same("model.layers.{}.linear_attn.in_proj_qkvz.*", "transformer.h.{}.attn.in_proj_qkvz.*"),
        same("model.layers.{}.linear_attn.in_proj_ba.*", "transformer.h.{}.attn.in_proj_ba.*"),
        same("model.layers.{}.linear_attn.conv1d.weight", "transformer.h.{}.attn.conv.weight"),
        same("model.layers.{}.linear_attn.dt_bias", "transformer.h.{}.attn.dt_bias"),
        same("model.layers.{}.linear_attn.A_log", "transformer.h.{}.attn.A_log"),
        same("model.layers.{}.linear_attn.norm.weight", "transformer.h.{}.attn.norm.weight"),
        same("model.layers.{}.linear_attn.out_proj.*", "transformer.h.{}.attn.out_proj.*"),
        *MLP_WEIGHTS,
        *GATED_EXPERT_WEIGHTS,
        skipped("mtp."),  # predicts tokens further ahead
    ],
    base=LLAMA_BASE
    | dict(
        mlp_class_name="LLaMAMoE",
        norm_eps=1e-6,
        norm_add_unit_offset=True,
        norm_qk=True,
        attention_gate=True,
        rotary_percentage=0.25,
        shared_expert_gate=True,
    ),
    brands=[
        Brand(
            "Qwen",
            base=dict(
                block_size=262144,
                vocab_size=151936,
                padded_vocab_size=151936,
                n_query_groups=2,
                head_size=256,
                rope_base=10_000_000,
                gated_delta={ours: default for ours, (_, default) in SIZES.items()},
                norm_topk_prob=True,
                n_expert=512,
                n_expert_per_token=10,
                moe_intermediate_size=512,
                shared_intermediate_size=512,
            ),
            sizes={
                "Qwen3-Next-80B-A3B-{Instruct,Thinking}": dict(
                    n_layer=48,
                    n_embd=2048,
                    n_head=16,
                    intermediate_size=5120,
                    mixers=["gated_delta", "gated_delta", "gated_delta", "attention"] * 12,
                )
            },
            prompt="qwen3",
        ),
    ],
)
