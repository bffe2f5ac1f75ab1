"""What tests need to know of Gemma 3."""

ACTIVATION = "hidden_activation"
PLAIN_ROPE = False  # layers with a window have a base of their own
TIED = ["Gemma-3-270m{,-it}", "Gemma-3-{1b,4b,12b,27b}-{pt,it}"]

TINY = dict(
    name="tiny-Gemma",  # which LitGPT looks at
    n_layer=3,
    head_size=12,
    attention_scores_scalar=20,
    sliding_window_indices=[1, 0, 1],
    rope_indices=[1, 0, 1],
    rope_base=5000,
    rope_local_base_freq=100,
)

VARIANTS = {
    "positions stretched where all is seen": dict(rope_adjustments=dict(factor=8.0)),
    "one group": dict(n_query_groups=1),
    "no window": dict(sliding_window_size=None, rope_indices=[0, 0, 0]),
    "soft cap": dict(final_logit_softcapping=3.0),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "exact gelu": dict(gelu_approximate="none"),
}

OLD = dict(  # as it was published
    architectures=["Gemma3ForCausalLM"],
    attention_bias=False,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=24,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=64,
    intermediate_size=80,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_hidden_layers=5,
    num_key_value_heads=1,
    query_pre_attn_scalar=144,
    rope_local_base_freq=3000,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
    rope_theta=500000,
    sliding_window=64,
    sliding_window_pattern=2,
    torch_dtype="bfloat16",
    vocab_size=120,
)
