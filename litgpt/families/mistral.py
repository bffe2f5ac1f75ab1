"""Mistral: the Llama block with a sliding window and no biases."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import LLAMA_BASE, LLAMA_FIELDS, LLAMA_WEIGHTS

B7 = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=14336)
LARGE = dict(n_layer=88, n_head=96, n_embd=12288, intermediate_size=28672, block_size=131072)
V1 = dict(vocab_size=32000, padded_vocab_size=32000, rope_base=10000, sliding_window_size=4096)
V2 = dict(vocab_size=32000, padded_vocab_size=32000)

MISTRAL = Family(
    model_type="mistral",
    architectures=["MistralForCausalLM"],
    fields=[
        *LLAMA_FIELDS,
        field("intermediate_size", "intermediate_size", default=14336),
        field("num_key_value_heads", "n_query_groups", default=8),
        field("max_position_embeddings", "block_size", default=131072),
        field("sliding_window", "sliding_window_size", default=4096),
    ],
    weights=LLAMA_WEIGHTS,
    base=LLAMA_BASE,
    brands=[
        Brand(
            "mistralai",
            base=dict(block_size=32768, vocab_size=32768, padded_vocab_size=32768, n_query_groups=8, norm_eps=1e-5, rope_base=1_000_000),
            sizes={
                "Mathstral-7B-v0.1": B7 | dict(sliding_window_size=4096),
                "Mistral-7B{,-Instruct}-v0.1": B7 | V1,
                "Mistral-7B-Instruct-v0.2": B7 | V2,
                "Mistral-7B{,-Instruct}-v0.3": B7,
                "Mistral-Large-Instruct-{2407,2411}": LARGE,
            },
            prompt={"Mistral-7B-Instruct-v0.{1,2,3}": "codellama", "Mistral-Large-Instruct-{2407,2411}": "codellama"},
            published_as={"Mathstral-7B-v0.1": "mathstral-7B-v0.1"},
        ),
        Brand(
            "unsloth",
            base=dict(block_size=32768, n_query_groups=8, norm_eps=1e-5, rope_base=1_000_000) | V2,
            sizes={"Mistral-7B-v0.2": B7},
        ),
    ],
)
