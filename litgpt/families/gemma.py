"""Gemma: a Llama block with a GELU as the MLP's gate, scaled embeddings, and norms that multiply by 1 + weight."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import GELUS, LLAMA_WEIGHTS, one_of

GELU_FIRST = {"gelu_pytorch_tanh": "tanh"} | GELUS  # the usual name of it here
MEANT = {"gelu": "tanh"}  # the first files say so, but the models were trained with the approximation
GEMMA_BASE = dict(
    norm_class_name="RMSNorm",
    norm_eps=1e-6,
    norm_add_unit_offset=True,
    mlp_class_name="GemmaMLP",
    gelu_approximate="tanh",
    bias=False,
    parallel_residual=False,
    rotary_percentage=1.0,
    scale_embeddings=True,
    tie_embeddings=True,
)
GEMMA_FIELDS = [
    field("rms_norm_eps", "norm_eps", default=1e-6),
    field("tie_word_embeddings", "tie_embeddings", default=True),
    field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
]

G_2B = dict(n_layer=18, n_head=8, n_query_groups=1, n_embd=2048, head_size=256, intermediate_size=16384)
G_7B = dict(n_layer=28, n_head=16, n_embd=3072, head_size=256, intermediate_size=24576)

GEMMA = Family(
    model_type="gemma",
    architectures=["GemmaForCausalLM"],
    fields=[
        *GEMMA_FIELDS,
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=256000),
        field("hidden_size", "n_embd", default=3072),
        field("intermediate_size", "intermediate_size", default=24576),
        field("num_hidden_layers", "n_layer", default=28),
        field("num_attention_heads", "n_head", default=16),
        field("num_key_value_heads", "n_query_groups", default=16),
        field("head_dim", "head_size", default=256),
        field("max_position_embeddings", "block_size", default=8192),
        field("hidden_act", "gelu_approximate", default="gelu_pytorch_tanh", **one_of(GELU_FIRST | MEANT)),
        *rope_fields(["rope_theta"]),
    ],
    weights=LLAMA_WEIGHTS,
    base=GEMMA_BASE,
    brands=[
        Brand(
            "google",
            base=dict(block_size=8192, vocab_size=256000, padded_vocab_size=256000),
            sizes={
                "Gemma-2b{,-it}": G_2B,
                "Gemma-7b{,-it}": G_7B,
                "CodeGemma-2b": G_2B,
                "CodeGemma-7b{,-it}": G_7B,
            },
            prompt={"Gemma-{2b,7b}-it": "gemma", "CodeGemma-7b-it": "gemma"},
            published_as={
                "Gemma-{2b,7b}{,-it}": "gemma-{2b,7b}{,-it}",
                "CodeGemma-2b": "codegemma-2b",
                "CodeGemma-7b{,-it}": "codegemma-7b{,-it}",
            },
        ),
    ],
)
