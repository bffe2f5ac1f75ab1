"""What tests need to know of Gemma."""

TIED = ["Gemma-{2b,7b}{,-it}", "CodeGemma-2b", "CodeGemma-7b{,-it}"]

TINY = dict(name="tiny-Gemma", head_size=12)  # LitGPT looks at the name

VARIANTS = {
    "one group": dict(n_query_groups=1),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "exact gelu": dict(gelu_approximate="none"),
    "linear": dict(rope_adjustments=dict(factor=4.0)),
}

OLD = dict(  # as it was published
    architectures=["GemmaForCausalLM"],
    attention_bias=False,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    head_dim=24,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=64,
    intermediate_size=80,
    max_position_embeddings=8192,
    num_attention_heads=4,
    num_hidden_layers=3,
    num_key_value_heads=1,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=20000.0,
    torch_dtype="bfloat16",
    vocab_size=120,
)
