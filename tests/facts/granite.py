"""What tests need to know of Granite."""

IN_LITGPT = False  # it has no such multipliers
TIED = ["granite-{3.0,3.1}-{2b,8b}-{base,instruct}"]

TINY = dict(scale_embeddings=6.0, residual_scale=0.22, attention_scale=0.25, logit_scale=1 / 3)

VARIANTS = {
    "embeddings as they are": dict(scale_embeddings=False, logit_scale=1.0),
    "biases": dict(attn_bias=True, attn_proj_bias=True, mlp_bias=True),
    "wide heads": dict(head_size=16),
    "linear": dict(rope_adjustments=dict(factor=4.0)),
}

OLD = dict(  # as it was published
    architectures=["GraniteForCausalLM"],
    attention_bias=False,
    attention_dropout=0.1,
    attention_multiplier=0.0078125,
    embedding_multiplier=12.0,
    head_dim=24,
    hidden_act="silu",
    hidden_size=64,
    intermediate_size=80,
    logits_scaling=13.7,
    max_position_embeddings=4096,
    mlp_bias=False,
    num_attention_heads=4,
    num_hidden_layers=3,
    num_key_value_heads=2,
    residual_multiplier=0.22,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=20000,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    vocab_size=120,
)
