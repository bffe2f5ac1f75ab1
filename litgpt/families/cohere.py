"""Command R and Aya: attention and MLP side by side behind one LayerNorm without bias, neighbouring features turn, logits are scaled."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import GATED_MLPS, LLAMA_WEIGHTS, head_dim, one_of
from litgpt.weights import same

COMMAND_R = dict(n_layer=40, n_head=64, n_embd=8192, intermediate_size=22528, rope_base=8_000_000)
COMMAND_R_PLUS = dict(n_layer=64, n_head=96, n_query_groups=8, n_embd=12288, intermediate_size=33792, norm_qk=True, logit_scale=5 / 6)
B32 = dict(n_layer=40, n_head=64, n_query_groups=8, n_embd=8192, intermediate_size=24576, rope_base=4_000_000)
B8 = dict(n_layer=32, n_head=32, n_query_groups=8, n_embd=4096, intermediate_size=14336)

COHERE = Family(
    model_type="cohere",
    architectures=["CohereForCausalLM"],
    fields=[
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=256000),
        field("hidden_size", "n_embd", default=8192),
        field("num_hidden_layers", "n_layer", default=40),
        field("num_attention_heads", "n_head", default=64),
        field("num_key_value_heads", "n_query_groups"),
        head_dim(8192, 64),
        field("intermediate_size", "intermediate_size", default=22528),
        field("max_position_embeddings", "block_size", default=8192),
        field("layer_norm_eps", "norm_eps", default=1e-5),
        field("hidden_act", "mlp_class_name", default="silu", **one_of(GATED_MLPS)),
        field("logit_scale", "logit_scale", default=0.0625, format=float),
        field("use_qk_norm", "norm_qk", default=False),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
        field("tie_word_embeddings", "tie_embeddings", default=True),
        *rope_fields(["rope_theta"], default_base=500_000),
    ],
    weights=[
        *LLAMA_WEIGHTS,
        same("model.layers.{}.self_attn.q_norm.weight", "transformer.h.{}.attn.norm_q.weight"),
        same("model.layers.{}.self_attn.k_norm.weight", "transformer.h.{}.attn.norm_k.weight"),
    ],
    base=dict(
        norm_class_name="LayerNorm",
        norm_bias=False,
        norm_qk_type="per_head",
        shared_attention_norm=True,
        parallel_residual=True,
        mlp_class_name="LLaMAMLP",
        bias=False,
        rotary_percentage=1.0,
        rope_interleave=True,
        tie_embeddings=True,
        logit_scale=0.0625,
    ),
    brands=[
        Brand(
            "CohereLabs",
            base=dict(block_size=8192, vocab_size=255029, padded_vocab_size=256000),
            sizes={
                "c4ai-command-r-v01": COMMAND_R,
                "c4ai-command-r-08-2024": B32 | dict(block_size=131072),
                "c4ai-command-r-plus": COMMAND_R_PLUS | dict(rope_base=75_000_000),
                "c4ai-command-r-plus-08-2024": COMMAND_R_PLUS | dict(rope_base=8_000_000, block_size=131072),
                "aya-23-8B": B8,
                "aya-23-35B": COMMAND_R,
                "aya-expanse-8b": B8 | dict(logit_scale=0.125),
                "aya-expanse-32b": B32,
            },
            prompt="command-r",
            also={
                "c4ai-command-r-{v01,08-2024,plus,plus-08-2024}": "CohereForAI/c4ai-command-r-{v01,08-2024,plus,plus-08-2024}",
                "aya-{23-8B,23-35B,expanse-8b,expanse-32b}": "CohereForAI/aya-{23-8B,23-35B,expanse-8b,expanse-32b}",
            },
        ),
    ],
)
