"""What tests need to know of Qwen 2 with experts."""

IN_LITGPT = False  # which always makes the weights of the chosen experts sum to 1

TINY = dict(n_layer=3, expert_indices=[1, 0, 1], shared_intermediate_size=20, sliding_window_indices=[1, 0, 0])

VARIANTS = {
    "weights that sum to 1": dict(norm_topk_prob=True),
    "no window": dict(sliding_window_size=None),
    "experts everywhere": dict(expert_indices=[1, 1, 1]),
    "no biases": dict(attn_bias=False),
    "wide heads": dict(head_size=16),
    "no groups": dict(n_query_groups=4),
}

OLD = dict(  # as transformers 4 spells it
    architectures=["Qwen2MoeForCausalLM"],
    attention_dropout=0.0,
    bos_token_id=3,
    decoder_sparse_step=2,
    eos_token_id=3,
    hidden_act="silu",
    hidden_size=64,
    initializer_range=0.02,
    intermediate_size=80,
    max_position_embeddings=8192,
    max_window_layers=3,
    mlp_only_layers=[3],
    moe_intermediate_size=24,
    norm_topk_prob=False,
    num_attention_heads=4,
    num_experts=6,
    num_experts_per_tok=4,
    num_hidden_layers=4,
    num_key_value_heads=4,
    output_router_logits=False,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=40,
    sliding_window=64,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_sliding_window=True,
    vocab_size=120,
)
