"""GPT-2: learned positions, LayerNorm, biases, layers whose weights are stored with inputs as rows."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import GELUS, four_times, one_of, only
from litgpt.weights import ignored, same, tied, transposed

GPT2 = Family(
    model_type="gpt2",
    architectures=["GPT2LMHeadModel"],
    fields=[
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=50257),
        field("n_positions", "block_size", default=1024),
        field("n_embd", "n_embd", default=768),
        field("n_layer", "n_layer", default=12),
        field("n_head", "n_head", default=12),
        four_times("n_inner", "n_embd", 768),
        field("layer_norm_epsilon", "norm_eps", default=1e-5),
        field("activation_function", "gelu_approximate", default="gelu_new", **one_of(GELUS, "activation_function")),
        field("tie_word_embeddings", "tie_embeddings", default=True),
        only("scale_attn_weights", True),
        only("scale_attn_by_inverse_layer_idx", False),
        only("add_cross_attention", False),
    ],
    weights=[
        same("transformer.wte.weight", "transformer.wte.weight"),
        same("transformer.wpe.weight", "transformer.wpe.weight"),
        same("transformer.h.{}.ln_1.*", "transformer.h.{}.norm_1.*"),
        transposed("transformer.h.{}.attn.c_attn.*", "transformer.h.{}.attn.qkv.*"),
        transposed("transformer.h.{}.attn.c_proj.*", "transformer.h.{}.attn.proj.*"),
        same("transformer.h.{}.ln_2.*", "transformer.h.{}.norm_2.*"),
        transposed("transformer.h.{}.mlp.c_fc.*", "transformer.h.{}.mlp.fc.*"),
        transposed("transformer.h.{}.mlp.c_proj.*", "transformer.h.{}.mlp.proj.*"),
        same("transformer.ln_f.*", "transformer.ln_f.*"),
        tied("lm_head.weight", "lm_head.weight"),
        ignored("transformer.h.{}.attn.bias"),
        ignored("transformer.h.{}.attn.masked_bias"),
    ],
    prefixes=tuple((name, f"transformer.{name}") for name in ("wte.", "wpe.", "h.", "ln_f.")),  # the first files have no head's model
    base=dict(
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        bias=True,
        parallel_residual=False,
        rotary_percentage=0.0,
        learned_positions=True,
        tie_embeddings=True,
    ),
    brands=[
        Brand(
            "openai-community",
            base=dict(block_size=1024, vocab_size=50257, padded_vocab_size=50257),
            sizes={
                "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
                "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
                "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
                "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
            },
        ),
        Brand(
            "distilbert",
            base=dict(block_size=1024, vocab_size=50257, padded_vocab_size=50257),
            sizes={"distilgpt2": dict(n_layer=6, n_head=12, n_embd=768)},
        ),
    ],
)
