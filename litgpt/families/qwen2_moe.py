"""Qwen 1.5 and 2 with experts: Qwen 2's block, with experts and an MLP beside them that sees every token and has a gate."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import (
    EXPERT_WEIGHTS,
    FULL,
    LLAMA_BASE,
    LLAMA_FIELDS,
    LLAMA_WEIGHTS,
    SLIDING,
    expert_layers,
    head_dim,
    whole,
    windows,
    with_defaults,
    with_experts,
)
from litgpt.weights import Rule, same

A2_7B = dict(n_layer=24, n_head=16, n_embd=2048, intermediate_size=5632, moe_intermediate_size=1408, shared_intermediate_size=5632)
A14B = dict(
    n_layer=28,
    n_head=28,
    n_query_groups=4,
    n_embd=3584,
    intermediate_size=18944,
    moe_intermediate_size=2560,
    shared_intermediate_size=20480,
)
CHOICE_OF_60 = dict(n_expert=60, n_expert_per_token=4)
CHOICE_OF_64 = dict(n_expert=64, n_expert_per_token=8)

GATED_EXPERT_WEIGHTS: list[Rule] = [  # with one that all tokens use, as its gate says
    *EXPERT_WEIGHTS,
    same("model.layers.{}.mlp.gate.weight", "transformer.h.{}.mlp.gate.weight"),
    same("model.layers.{}.mlp.shared_expert.gate_proj.weight", "transformer.h.{}.mlp.shared.fc_1.weight"),
    same("model.layers.{}.mlp.shared_expert.up_proj.weight", "transformer.h.{}.mlp.shared.fc_2.weight"),
    same("model.layers.{}.mlp.shared_expert.down_proj.weight", "transformer.h.{}.mlp.shared.proj.weight"),
    same("model.layers.{}.mlp.shared_expert_gate.weight", "transformer.h.{}.mlp.shared_gate.weight"),
]

QWEN_2_MOE = Family(
    model_type="qwen2_moe",
    architectures=["Qwen2MoeForCausalLM"],
    fields=[
        *(
            row
            for row in with_experts(
                with_defaults(LLAMA_FIELDS, vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16)
            )
            if row.ours[0] != "head_size"
        ),
        head_dim(2048, 16),
        field("intermediate_size", "intermediate_size", default=5632),
        field("num_key_value_heads", "n_query_groups", default=16),
        field("max_position_embeddings", "block_size", default=32768),
        field("qkv_bias", "attn_bias", default=True),
        windows(
            4096,
            lambda mapping, i: SLIDING if i % 2 == 0 and i < whole(mapping, "max_window_layers", 28) else FULL,
            n_layer=24,
            extra=lambda fields: dict(use_sliding_window=fields["sliding_window_size"] is not None),
            used=lambda mapping: bool(mapping.get("use_sliding_window")),
        ),
        expert_layers(24),
        field("num_experts", "n_expert", default=60),
        field("num_experts_per_tok", "n_expert_per_token", default=4),
        field("moe_intermediate_size", "moe_intermediate_size", default=1408),
        field("shared_expert_intermediate_size", "shared_intermediate_size", default=5632),
        field("norm_topk_prob", "norm_topk_prob", default=False),
    ],
    weights=[
        *LLAMA_WEIGHTS,
        *GATED_EXPERT_WEIGHTS,
    ],
    base=LLAMA_BASE | dict(mlp_class_name="LLaMAMoE", attn_bias=True, shared_expert_gate=True),
    brands=[
        Brand(
            "Qwen",
            base=dict(block_size=32768, vocab_size=151643, padded_vocab_size=151936, norm_eps=1e-6, rope_base=1_000_000),
            sizes={
                "Qwen1.5-MoE-A2.7B": A2_7B | CHOICE_OF_60 | dict(block_size=8192),
                "Qwen1.5-MoE-A2.7B-Chat": A2_7B | CHOICE_OF_60,
                "Qwen2-57B-A14B": A14B | CHOICE_OF_64 | dict(block_size=131072),
                "Qwen2-57B-A14B-Instruct": A14B | CHOICE_OF_64,
            },
            prompt={"Qwen1.5-MoE-A2.7B-Chat": "qwen2", "Qwen2-57B-A14B-Instruct": "qwen2"},
        ),
    ],
)
