"""What tests need to know of gpt-oss."""

IN_LITGPT = False

YARN = dict(factor=32.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=16, truncate=False)

TINY = dict(
    n_layer=3,
    head_size=8,
    attn_bias=True,
    attn_proj_bias=True,
    intermediate_size=24,
    sliding_window_indices=[1, 0, 1],
    rope_base=150000,
    rope_adjustments=YARN,
)

VARIANTS = {
    "positions as they are": dict(rope_adjustments=None),
    "rounded ends of the ramp": dict(rope_adjustments=YARN | dict(truncate=True)),
    "no biases in attention": dict(attn_bias=False, attn_proj_bias=False),
    "a low limit": dict(swiglu_limit=0.5),
    "no windows": dict(sliding_window_size=None),
    "windows the other way round": dict(sliding_window_indices=[0, 1, 0]),
    "wide heads, no groups": dict(head_size=16, n_query_groups=4),
}

OLD = dict(  # as it was published
    architectures=["GptOssForCausalLM"],
    attention_bias=True,
    attention_dropout=0.0,
    eos_token_id=2,
    experts_per_token=2,
    head_dim=16,
    hidden_act="silu",
    hidden_size=64,
    initial_context_length=4096,
    intermediate_size=64,
    layer_types=["sliding_attention", "full_attention"] * 2,
    max_position_embeddings=131072,
    num_attention_heads=4,
    num_experts_per_tok=2,
    num_hidden_layers=4,
    num_key_value_heads=2,
    num_local_experts=8,
    output_router_logits=False,
    pad_token_id=1,
    rms_norm_eps=1e-05,
    rope_scaling={
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    rope_theta=150000,
    router_aux_loss_coef=0.9,
    sliding_window=128,
    swiglu_limit=7.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
    vocab_size=120,
)
