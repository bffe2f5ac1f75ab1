"""What tests need to know of Gemma 2."""

ACTIVATION = "hidden_activation"
TIED = ["Gemma-2-{2b,9b,27b}{,-it}"]

TINY = dict(
    name="tiny-Gemma",  # which LitGPT looks at
    head_size=12,
    attention_scores_scalar=20,
    attention_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    sliding_window_indices=[1, 0],
)

VARIANTS = {
    "one group": dict(n_query_groups=1),
    "no soft caps": dict(attention_logit_softcapping=None, final_logit_softcapping=None),
    "no window": dict(sliding_window_size=None),
    "windows everywhere": dict(sliding_window_indices=[1, 1]),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "exact gelu": dict(gelu_approximate="none"),
    "linear": dict(rope_adjustments=dict(factor=4.0)),
}

OLD = dict(  # as it was published
    architectures=["Gemma2ForCausalLM"],
    attention_bias=False,
    attn_logit_softcapping=30.0,
    final_logit_softcapping=20.0,
    cache_implementation="hybrid",
    head_dim=24,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=64,
    intermediate_size=80,
    num_attention_heads=4,
    num_hidden_layers=3,
    num_key_value_heads=2,
    query_pre_attn_scalar=144,
    rope_theta=20000.0,
    sliding_window=64,
    sliding_window_size=64,
    torch_dtype="float32",
    use_bidirectional_attention=False,
    vocab_size=120,
)
