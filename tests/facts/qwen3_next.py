"""What tests need to know of Qwen3-Next."""

IN_LITGPT = False

SIZES = dict(n_key_heads=2, n_value_heads=4, key_head_size=8, value_head_size=6, kernel_size=4)

TINY = dict(
    n_layer=4,
    head_size=24,
    mixers=["gated_delta", "attention", "gated_delta", "attention"],
    gated_delta=SIZES,
    norm_topk_prob=True,
    shared_intermediate_size=20,
)

VARIANTS = {
    "scores as they are": dict(norm_topk_prob=False),
    "biases": dict(attn_bias=True, attn_proj_bias=True),
    "dense layers": dict(expert_indices=[0, 1, 0, 1]),
    "as many value heads as key heads": dict(gated_delta=SIZES | dict(n_value_heads=2, kernel_size=2)),
    "convolutions of one token": dict(gated_delta=SIZES | dict(kernel_size=1)),
    "attention only": dict(mixers=["attention"] * 4, gated_delta=None),
    "all of each head turns": dict(rotary_percentage=1.0),
    "one key head": dict(n_query_groups=1),
}

OLD = dict(  # as it was published
    architectures=["Qwen3NextForCausalLM"],
    attention_dropout=0.0,
    bos_token_id=3,
    decoder_sparse_step=1,
    eos_token_id=4,
    full_attention_interval=2,
    head_dim=32,
    hidden_act="silu",
    hidden_size=64,
    intermediate_size=96,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_value_head_dim=16,
    max_position_embeddings=262144,
    mlp_only_layers=[1],
    moe_intermediate_size=32,
    norm_topk_prob=True,
    num_attention_heads=4,
    num_experts=8,
    num_experts_per_tok=3,
    num_hidden_layers=5,
    num_key_value_heads=2,
    output_router_logits=False,
    partial_rotary_factor=0.25,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=10000000,
    router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=32,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
    vocab_size=120,
)
