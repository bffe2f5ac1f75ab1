"""What tests need to know of LFM2."""

IN_LITGPT = False
ACTIVATION = None

TINY = dict(
    n_layer=3,
    mixers=["short_conv", "attention", "short_conv"],
    short_conv=dict(kernel_size=3, bias=False),
    tie_embeddings=True,
    rope_base=1_000_000,
)

VARIANTS = {
    "biases": dict(short_conv=dict(kernel_size=3, bias=True)),
    "longer convolutions": dict(short_conv=dict(kernel_size=5, bias=False)),
    "convolutions of one token": dict(short_conv=dict(kernel_size=1, bias=True)),
    "attention only": dict(mixers=["attention"] * 3, short_conv=None),
    "no groups": dict(n_query_groups=4),
}

TIED = ["LFM2-{350M,700M,1.2B,2.6B}"]

OLD = dict(  # as it was published
    architectures=["Lfm2ForCausalLM"],
    block_auto_adjust_ff_dim=True,
    block_dim=64,
    block_ff_dim=1000,
    block_ffn_dim_multiplier=1.0,
    block_mlp_init_scale=1.0,
    block_multiple_of=256,
    block_norm_eps=1e-05,
    block_out_init_scale=1.0,
    block_use_swiglu=True,
    block_use_xavier_init=True,
    bos_token_id=1,
    conv_L_cache=3,
    conv_bias=False,
    conv_dim=64,
    conv_dim_out=64,
    conv_use_xavier_init=True,
    eos_token_id=7,
    full_attn_idxs=[2, 3],
    head_dim=16,
    hidden_size=64,
    initializer_range=0.02,
    max_position_embeddings=128000,
    norm_eps=1e-05,
    num_attention_heads=4,
    num_heads=4,
    num_hidden_layers=5,
    num_key_value_heads=2,
    pad_token_id=0,
    rope_theta=1000000.0,
    tie_embedding=False,
    torch_dtype="bfloat16",
    use_cache=True,
    use_pos_enc=True,
    vocab_size=120,
)
