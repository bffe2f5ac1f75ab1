"""What tests need to know of OLMo."""

TIED = ["OLMo-1B-hf"]

TINY = dict(name="tiny-OLMo")  # by such a name LitGPT knows that norms have no weights

VARIANTS = {
    "clipped": dict(clip_qkv=0.5),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "no groups": dict(n_query_groups=4),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["OlmoForCausalLM"],
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_hidden_layers=3,
    intermediate_size=80,
    clip_qkv=8.0,
    rope_theta=20000.0,
    torch_dtype="float32",
    vocab_size=120,
)
