"""Mistral: the Llama block with a sliding window and no biases."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import LLAMA_BASE, LLAMA_FIELDS, LLAMA_WEIGHTS

B7 = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=14336)
LARGE = dict(n_layer=88, n_head=96, n_embd=12288, intermediate_size=28672, block_size=131072)
SMALL_VOCAB = dict(vocab_size=32000, padded_vocab_size=32000)
V1 = SMALL_VOCAB | dict(rope_base=10000, sliding_window_size=4096)
PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))  # with eyes, as transformers 5 has it in memory and as files do
EYES = tuple(root + part for root in ("", "model.") for part in ("vision_tower.", "multi_modal_projector."))

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
                "Mistral-7B-Instruct-v0.2": B7 | SMALL_VOCAB,
                "Mistral-7B{,-Instruct}-v0.3": B7,
                "Mistral-Large-Instruct-{2407,2411}": LARGE,
            },
            prompt={
                "Mistral-7B-Instruct-v0.{1,2}": "mistral",
                "Mistral-7B-Instruct-v0.3": "mistral-v3",
                "Mistral-Large-Instruct-2407": "mistral-v3",
                "Mistral-Large-Instruct-2411": "mistral-v7",
                "Mathstral-7B-v0.1": "mistral-v3",
            },
            published_as={"Mathstral-7B-v0.1": "mathstral-7B-v0.1"},
        ),
        Brand(
            "unsloth",
            base=dict(block_size=32768, n_query_groups=8, norm_eps=1e-5, rope_base=1_000_000) | SMALL_VOCAB,
            sizes={"Mistral-7B-v0.2": B7},
        ),
        Brand(
            "h2oai",
            base=dict(block_size=8192, n_query_groups=8, norm_eps=1e-5, rope_base=10000, sliding_window_size=None) | SMALL_VOCAB,
            sizes={"Danube2-1.8b-{base,sft,chat}": dict(n_layer=24, n_head=32, n_embd=2560, intermediate_size=6912)},
            prompt={"Danube2-1.8b-{sft,chat}": "h2oai"},
            published_as={"Danube2-1.8b-{base,sft,chat}": "h2o-danube2-1.8b-{base,sft,chat}"},
        ),
    ],
    wrappers=("mistral3",),
    prefixes=PREFIXES,
    others=EYES,
)
