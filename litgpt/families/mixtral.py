"""Mixtral: Mistral's block with experts in the place of its MLP, of which each token uses two."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import FRAME_WEIGHTS, LLAMA_BASE, LLAMA_FIELDS, QKV, head_dim, with_defaults, with_experts
from litgpt.weights import alias, joined, same, stacked

B7 = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=14336, block_size=32768, vocab_size=32000, padded_vocab_size=32000)
B22 = dict(n_layer=56, n_head=48, n_embd=6144, intermediate_size=16384, block_size=65536, vocab_size=32768, padded_vocab_size=32768)

MIXTRAL = Family(
    model_type="mixtral",
    architectures=["MixtralForCausalLM"],
    fields=[
        *(row for row in with_experts(with_defaults(LLAMA_FIELDS, rms_norm_eps=1e-5, rope_theta=1_000_000)) if row.ours[0] != "head_size"),
        head_dim(4096, 32),
        field("intermediate_size", "intermediate_size", default=14336),
        field("num_key_value_heads", "n_query_groups", default=8),
        field("max_position_embeddings", "block_size", default=131072),
        field("sliding_window", "sliding_window_size"),
        field("num_local_experts", "n_expert", default=8),
        field("num_experts_per_tok", "n_expert_per_token", default=2),
    ],
    weights=[
        *FRAME_WEIGHTS,
        joined(QKV, "transformer.h.{}.attn.qkv.*"),
        same("model.layers.{}.block_sparse_moe.gate.weight", "transformer.h.{}.mlp.gate.weight"),
        stacked(
            [f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{x}.weight" for x in ("w1", "w3")],
            "transformer.h.{}.mlp.experts.gate_up",
            "n_expert",
        ),
        stacked("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", "transformer.h.{}.mlp.experts.down", "n_expert"),
        alias("model.layers.{}.mlp.gate.weight", "transformer.h.{}.mlp.gate.weight"),
        alias("model.layers.{}.mlp.experts.gate_up_proj", "transformer.h.{}.mlp.experts.gate_up"),
        alias("model.layers.{}.mlp.experts.down_proj", "transformer.h.{}.mlp.experts.down"),
    ],
    base=LLAMA_BASE | dict(mlp_class_name="LLaMAMoE", norm_topk_prob=True),
    brands=[
        Brand(
            "mistralai",
            base=dict(n_query_groups=8, norm_eps=1e-5, rope_base=1_000_000, n_expert=8, n_expert_per_token=2),
            sizes={"Mixtral-8x7B{,-Instruct}-v0.1": B7, "Mixtral-8x22B{,-Instruct}-v0.1": B22},
            prompt={"Mixtral-8x7B-Instruct-v0.1": "mistral", "Mixtral-8x22B-Instruct-v0.1": "mistral-v3"},
        ),
    ],
)
