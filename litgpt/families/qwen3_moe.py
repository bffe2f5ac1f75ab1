"""Qwen 3 with experts: Qwen 3's block with many small experts in the place of its MLP."""

from collections.abc import Mapping
from typing import Any

from litgpt.families.family import Brand, Family, Joint, field
from litgpt.families.tables import (
    EXPERT_WEIGHTS,
    LLAMA_BASE,
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    expert_layers,
    head_dim,
    with_defaults,
    with_experts,
)
from litgpt.weights import same

A3B = dict(n_layer=48, n_head=32, n_embd=2048, intermediate_size=6144, moe_intermediate_size=768)
A22B = dict(n_layer=94, n_head=64, n_embd=4096, intermediate_size=12288, moe_intermediate_size=1536)
LONG = dict(block_size=262144)


def parse_window(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the window that all layers have, if it is used."""
    return dict(sliding_window_size=mapping.get("sliding_window", 4096) if mapping.get("use_sliding_window") else None)


def format_window(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `parse_window` reads."""
    size = fields["sliding_window_size"]
    return dict(use_sliding_window=size is not None, sliding_window=size)


QWEN_3_MOE = Family(
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    fields=[
        *(
            row
            for row in with_experts(with_defaults(LLAMA_FIELDS, vocab_size=151936, hidden_size=2048, num_hidden_layers=24))
            if row.ours[0] != "head_size"
        ),
        head_dim(2048, 32),
        field("intermediate_size", "intermediate_size", default=6144),
        field("num_key_value_heads", "n_query_groups", default=4),
        field("max_position_embeddings", "block_size", default=32768),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
        Joint(("use_sliding_window", "sliding_window"), ("sliding_window_size",), parse_window, format_window),
        expert_layers(24),
        field(["num_local_experts", "num_experts"], "n_expert", default=128),
        field("num_experts_per_tok", "n_expert_per_token", default=8),
        field("moe_intermediate_size", "moe_intermediate_size", default=768),
        field("norm_topk_prob", "norm_topk_prob", default=False),
    ],
    weights=[
        *LLAMA_WEIGHTS,
        *EXPERT_WEIGHTS,
        same("model.layers.{}.self_attn.q_norm.*", "transformer.h.{}.attn.norm_q.*"),
        same("model.layers.{}.self_attn.k_norm.*", "transformer.h.{}.attn.norm_k.*"),
        same("model.layers.{}.mlp.gate.weight", "transformer.h.{}.mlp.gate.weight"),
    ],
    base=LLAMA_BASE | dict(mlp_class_name="LLaMAMoE", norm_qk=True),
    brands=[
        Brand(
            "Qwen",
            base=dict(
                block_size=40960,
                vocab_size=151643,
                padded_vocab_size=151936,
                n_query_groups=4,
                head_size=128,
                norm_eps=1e-6,
                rope_base=1_000_000,
                n_expert=128,
                n_expert_per_token=8,
                norm_topk_prob=True,
            ),
            sizes={
                "Qwen3-30B-A3B": A3B,
                "Qwen3-30B-A3B-Base": A3B | dict(block_size=32768),
                "Qwen3-30B-A3B-{Instruct,Thinking}-2507": A3B | LONG | dict(rope_base=10_000_000),
                "Qwen3-235B-A22B": A22B,
                "Qwen3-235B-A22B-{Instruct,Thinking}-2507": A22B | LONG | dict(rope_base=5_000_000),
            },
            prompt={
                "Qwen3-{30B-A3B,235B-A22B}": "qwen3",
                "Qwen3-{30B-A3B,235B-A22B}-{Instruct,Thinking}-2507": "qwen3",
            },
        ),
    ],
)
