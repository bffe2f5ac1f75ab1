"""What tests need to know of Qwen 3 with experts."""

TINY = dict(head_size=12, n_layer=3, expert_indices=[0, 1, 1], norm_topk_prob=True, sliding_window_size=None)

VARIANTS = {
    "weights that do not sum to 1": dict(norm_topk_prob=False),
    "window": dict(sliding_window_size=5),
    "experts everywhere": dict(expert_indices=[1, 1, 1]),
    "no experts at all": dict(expert_indices=[0, 0, 0]),
    "biases in attention": dict(attn_bias=True, attn_proj_bias=True),
    "no groups": dict(n_query_groups=4),
}

OLD = dict(  # as it was published
    architectures=["Qwen3MoeForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=3,
    decoder_sparse_step=1,
    eos_token_id=4,
    head_dim=24,
    hidden_act="silu",
    hidden_size=64,
    initializer_range=0.02,
    intermediate_size=80,
    max_position_embeddings=40960,
    max_window_layers=3,
    mlp_only_layers=[],
    moe_intermediate_size=24,
    norm_topk_prob=True,
    num_attention_heads=4,
    num_experts=6,
    num_experts_per_tok=3,
    num_hidden_layers=3,
    num_key_value_heads=2,
    output_router_logits=False,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.001,
    sliding_window=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_sliding_window=False,
    vocab_size=120,
)
