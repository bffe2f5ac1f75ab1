"""What tests need to know of Falcon."""

ACTIVATION = "activation"
TIED = ["falcon-{7b,40b}{,-instruct}", "falcon-180B{,-chat}"]

TINY = dict(n_query_groups=2)

VARIANTS = {
    "one key head and one norm": dict(n_query_groups=1, shared_attention_norm=True),
    "one key head and two norms": dict(n_query_groups=1),
    "a few key heads and one norm": dict(shared_attention_norm=True),
    "no groups, one norm": dict(n_query_groups=4, shared_attention_norm=True),
    "one after the other, biases": dict(n_query_groups=4, parallel_residual=False, bias=True),
    "one after the other, one key head": dict(n_query_groups=1, parallel_residual=False),
    "narrow": dict(intermediate_size=40),
}

OLD = dict(  # as first published
    architectures=["FalconForCausalLM"],
    alibi=False,
    apply_residual_connection_post_layernorm=False,
    attention_dropout=0.0,
    bias=False,
    bos_token_id=11,
    eos_token_id=11,
    hidden_dropout=0.0,
    hidden_size=64,
    layer_norm_epsilon=1e-05,
    multi_query=True,
    new_decoder_architecture=True,
    num_attention_heads=8,
    num_hidden_layers=2,
    num_kv_heads=4,
    parallel_attn=True,
    torch_dtype="bfloat16",
    vocab_size=120,
)
