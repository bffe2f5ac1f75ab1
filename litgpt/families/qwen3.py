"""Qwen 3: the Llama block with norms of queries and keys, and heads whose size does not follow from the width."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.qwen2 import QWEN_FIELDS
from litgpt.families.tables import LLAMA_BASE, LLAMA_WEIGHTS, with_defaults
from litgpt.weights import same

TIED = dict(tie_embeddings=True)
Q3_0_6B = TIED | dict(n_layer=28, n_head=16, n_embd=1024, intermediate_size=3072)
Q3_1_7B = TIED | dict(n_layer=28, n_head=16, n_embd=2048, intermediate_size=6144)
Q3_4B = TIED | dict(n_layer=36, n_head=32, n_embd=2560, intermediate_size=9728)
Q3_8B = dict(n_layer=36, n_head=32, n_embd=4096, intermediate_size=12288)
Q3_14B = dict(n_layer=40, n_head=40, n_embd=5120, intermediate_size=17408)
Q3_32B = dict(n_layer=64, n_head=64, n_embd=5120, intermediate_size=25600)
PRETRAINED = dict(block_size=32768)
LONG = dict(block_size=262144, rope_base=5_000_000)

QWEN_3 = Family(
    model_type="qwen3",
    architectures=["Qwen3ForCausalLM"],
    fields=[
        *with_defaults(QWEN_FIELDS, head_dim=128),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
    ],
    weights=[
        *LLAMA_WEIGHTS,
        same("model.layers.{}.self_attn.q_norm.*", "transformer.h.{}.attn.norm_q.*"),
        same("model.layers.{}.self_attn.k_norm.*", "transformer.h.{}.attn.norm_k.*"),
    ],
    base=LLAMA_BASE | dict(norm_eps=1e-6, norm_qk=True),
    brands=[
        Brand(
            "Qwen",
            base=dict(block_size=40960, vocab_size=151643, padded_vocab_size=151936, n_query_groups=8, head_size=128, rope_base=1_000_000),
            sizes={
                "Qwen3-0.6B": Q3_0_6B,
                "Qwen3-0.6B-Base": Q3_0_6B | PRETRAINED,
                "Qwen3-1.7B": Q3_1_7B,
                "Qwen3-1.7B-Base": Q3_1_7B | PRETRAINED,
                "Qwen3-4B": Q3_4B,
                "Qwen3-4B-Base": Q3_4B | PRETRAINED,
                "Qwen3-4B-{Instruct,Thinking}-2507": Q3_4B | LONG,
                "Qwen3-8B": Q3_8B,
                "Qwen3-8B-Base": Q3_8B | PRETRAINED,
                "Qwen3-14B": Q3_14B,
                "Qwen3-14B-Base": Q3_14B | PRETRAINED,
                "Qwen3-32B": Q3_32B,
            },
            prompt={"Qwen3-{0.6B,1.7B,4B,8B,14B,32B}": "qwen3", "Qwen3-4B-{Instruct,Thinking}-2507": "qwen3"},
        ),
    ],
)
