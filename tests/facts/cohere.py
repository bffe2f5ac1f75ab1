"""What tests need to know of Command R."""

TIED = [
    "c4ai-command-r-{v01,08-2024,plus,plus-08-2024}",
    "aya-23-{8B,35B}",
    "aya-expanse-{8b,32b}",
]
IN_LITGPT = False  # it has no LayerNorm without bias, and scales no logits

VARIANTS = {
    "normed heads": dict(norm_qk=True),
    "normed heads, no groups": dict(norm_qk=True, n_query_groups=4),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "wide heads": dict(head_size=16),
    "plain logits": dict(logit_scale=1.0),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["CohereForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_hidden_layers=3,
    intermediate_size=80,
    layer_norm_eps=1e-05,
    logit_scale=0.8333333333333334,
    use_qk_norm=True,
    rope_theta=75000000.0,
    torch_dtype="float16",
    vocab_size=120,
)
