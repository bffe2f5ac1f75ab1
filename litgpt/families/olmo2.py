"""OLMo 2: norms after attention and MLP instead of before them, and one over all queries and all keys."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import LLAMA_BASE, LLAMA_FIELDS, LLAMA_WEIGHTS, head_dim, with_defaults
from litgpt.weights import same

B1 = dict(n_layer=16, n_head=16, n_embd=2048, intermediate_size=8192)
B7 = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=11008)
B13 = dict(n_layer=40, n_head=40, n_embd=5120, intermediate_size=13824)
B32 = dict(n_layer=64, n_head=40, n_query_groups=8, n_embd=5120, intermediate_size=27648)

OLMO2_FIELDS = [
    *(row for row in with_defaults(LLAMA_FIELDS, vocab_size=50304, rms_norm_eps=1e-5) if row.ours[0] != "head_size"),
    head_dim(4096, 32),
    field("intermediate_size", "intermediate_size", default=11008),
    field("num_key_value_heads", "n_query_groups"),
    field("max_position_embeddings", "block_size", default=2048),
    field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
]
OLMO2_WEIGHTS = [
    *(rule for rule in LLAMA_WEIGHTS if "transformer.h.{}.norm_2.*" not in rule.ours),
    same("model.layers.{}.post_attention_layernorm.*", "transformer.h.{}.post_attention_norm.*"),
    same("model.layers.{}.post_feedforward_layernorm.*", "transformer.h.{}.post_mlp_norm.*"),
    same("model.layers.{}.self_attn.q_norm.*", "transformer.h.{}.attn.norm_q.*"),
    same("model.layers.{}.self_attn.k_norm.*", "transformer.h.{}.attn.norm_k.*"),
]
OLMO2_BASE = LLAMA_BASE | dict(norm_1=False, norm_2=False, post_attention_norm=True, post_mlp_norm=True, norm_qk=True, norm_qk_type="olmo2")

OLMO2 = Family(
    model_type="olmo2",
    architectures=["Olmo2ForCausalLM"],
    fields=OLMO2_FIELDS,
    weights=OLMO2_WEIGHTS,
    base=OLMO2_BASE,
    brands=[
        Brand(
            "allenai",
            base=dict(block_size=4096, norm_eps=1e-6, rope_base=500_000, vocab_size=100278, padded_vocab_size=100352),
            sizes={
                "OLMo-2-0425-1B{,-SFT,-DPO,-Instruct}": B1,
                "OLMo-2-1124-7B{,-SFT,-DPO,-Instruct}": B7,
                "OLMo-2-1124-13B{,-SFT,-DPO,-Instruct}": B13,
                "OLMo-2-0325-32B{,-SFT,-DPO,-Instruct}": B32,
            },
            prompt={
                "OLMo-2-0425-1B-{SFT,DPO,Instruct}": "olmo2",
                "OLMo-2-1124-{7B,13B}-{SFT,DPO,Instruct}": "olmo2",
                "OLMo-2-0325-32B-{SFT,DPO,Instruct}": "olmo2",
            },
        ),
    ],
)
