"""OLMo: the Llama block with LayerNorms that have no weights."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import LLAMA_BASE, LLAMA_FIELDS, LLAMA_WEIGHTS, float_or_none, head_dim, with_defaults

B1 = dict(n_layer=16, n_head=16, n_embd=2048, intermediate_size=8192, tie_embeddings=True)
B7 = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=11008)

OLMO = Family(
    model_type="olmo",
    architectures=["OlmoForCausalLM"],
    fields=[
        *(row for row in with_defaults(LLAMA_FIELDS, vocab_size=50304) if row.ours[0] not in ("norm_eps", "head_size")),
        head_dim(4096, 32),
        field("intermediate_size", "intermediate_size", default=11008),
        field("num_key_value_heads", "n_query_groups"),
        field("max_position_embeddings", "block_size", default=2048),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
        field("clip_qkv", "clip_qkv", format=float_or_none),
    ],
    weights=LLAMA_WEIGHTS,
    base=LLAMA_BASE | dict(norm_class_name="LayerNorm", norm_affine=False, norm_eps=1e-5),
    brands=[
        Brand(
            "allenai",
            base=dict(block_size=2048, vocab_size=50280, padded_vocab_size=50304),
            sizes={
                "OLMo-1B-hf": B1,
                "OLMo-7B{,-Instruct}-hf": B7,
                "OLMo-7B-{0424,0724}-hf": B7 | dict(block_size=4096, clip_qkv=8.0),
            },
            prompt={"OLMo-7B-Instruct-hf": "olmo"},
        ),
    ],
)
