"""OLMoE: the Llama block with experts, and a norm over all queries and all keys."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import (
    EXPERT_WEIGHTS,
    FRAME_WEIGHTS,
    LLAMA_BASE,
    LLAMA_FIELDS,
    QKV,
    float_or_none,
    head_dim,
    with_defaults,
    with_experts,
)
from litgpt.weights import joined, same

OLMOE = Family(
    model_type="olmoe",
    architectures=["OlmoeForCausalLM"],
    fields=[
        *(
            row
            for row in with_experts(
                with_defaults(
                    LLAMA_FIELDS, vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, rms_norm_eps=1e-5
                )
            )
            if row.ours[0] != "head_size"
        ),
        head_dim(2048, 16),
        field("intermediate_size", "intermediate_size", default=2048),
        field("num_key_value_heads", "n_query_groups"),
        field("max_position_embeddings", "block_size", default=4096),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
        field("clip_qkv", "clip_qkv", format=float_or_none),
        field("num_experts", "n_expert", default=64),
        field("num_experts_per_tok", "n_expert_per_token", default=8),
        field("norm_topk_prob", "norm_topk_prob", default=False),
    ],
    weights=[
        *FRAME_WEIGHTS,
        joined(QKV, "transformer.h.{}.attn.qkv.*"),
        *EXPERT_WEIGHTS,
        same("model.layers.{}.self_attn.q_norm.*", "transformer.h.{}.attn.norm_q.*"),
        same("model.layers.{}.self_attn.k_norm.*", "transformer.h.{}.attn.norm_k.*"),
        same("model.layers.{}.mlp.gate.weight", "transformer.h.{}.mlp.gate.weight"),
    ],
    base=LLAMA_BASE | dict(mlp_class_name="LLaMAMoE", norm_qk=True, norm_qk_type="olmo2"),
    brands=[
        Brand(
            "allenai",
            base=dict(block_size=4096, vocab_size=50280, padded_vocab_size=50304, norm_eps=1e-5, n_expert=64, n_expert_per_token=8),
            sizes={"OLMoE-1B-7B-0924{,-SFT,-Instruct}": dict(n_layer=16, n_head=16, n_embd=2048, intermediate_size=1024)},
            prompt={"OLMoE-1B-7B-0924-{SFT,Instruct}": "olmo"},
        ),
    ],
)
