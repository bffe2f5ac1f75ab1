"""LFM2: most layers mix tokens by a short convolution, the others by attention with norms of queries and keys."""

from collections.abc import Mapping
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Brand, Family, Joint, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import FULL, LLAMA_BASE, head_dim, layer_types, whole
from litgpt.weights import ignored, joined, same, tied

CONVOLUTION = "conv"


def parse_layers(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return what mixes tokens in each layer, and the sizes of the convolutions."""
    attending = mapping.get("full_attn_idxs")
    if not isinstance(attending, list | None):
        raise UserError(f"`full_attn_idxs` lists layers in config.json, but got {attending!r}.")
    kinds = layer_types(mapping, lambda i: FULL if attending is None or i in attending else CONVOLUTION, 32, (FULL, CONVOLUTION))
    bias = mapping.get("conv_bias")
    sizes = dict(kernel_size=whole(mapping, "conv_L_cache", 3), bias=False if bias is None else bias)
    mixers = ["short_conv" if kind == CONVOLUTION else "attention" for kind in kinds]
    return dict(mixers=mixers, short_conv=sizes if CONVOLUTION in kinds else None)


def format_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `parse_layers` reads."""
    mixers, sizes = fields["mixers"] or ["attention"] * fields["n_layer"], fields["short_conv"]
    written = dict(
        layer_types=[CONVOLUTION if mixer == "short_conv" else FULL for mixer in mixers],
        full_attn_idxs=[i for i, mixer in enumerate(mixers) if mixer == "attention"],
    )
    return written | (dict(conv_L_cache=sizes["kernel_size"], conv_bias=sizes["bias"]) if sizes else {})


def parse_width(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the width of the MLP, which may be two thirds of what is said, rounded up."""
    said = "intermediate_size" if mapping.get("block_ff_dim") is None else "block_ff_dim"
    width, multiple = whole(mapping, said, 12288, most=2**29), whole(mapping, "block_multiple_of", 256, most=2**29)
    adjusted, factor = mapping.get("block_auto_adjust_ff_dim"), mapping.get("block_ffn_dim_multiplier", 1.0)
    if adjusted or adjusted is None:
        if multiple == 0 or isinstance(factor, bool) or not isinstance(factor, int | float | None) or not 0 < (factor or 1) < 1e6:
            said = f"{multiple!r} and {factor!r}"
            raise UserError(f"`block_multiple_of` and `block_ffn_dim_multiplier` are numbers above 0 in config.json, but got {said}.")
        width = int((1 if factor is None else factor) * int(2 * width / 3))
        width = -(-width // multiple) * multiple
    return dict(intermediate_size=width)


def format_width(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `parse_width` reads, said plainly."""
    width = fields["intermediate_size"]
    return dict(intermediate_size=width, block_ff_dim=width, block_auto_adjust_ff_dim=False)


def layers(n_layer: int, *attending: int) -> dict[str, Any]:
    """Return the fields of a model in which these layers have attention and the others a convolution."""
    return dict(n_layer=n_layer, mixers=["attention" if i in attending else "short_conv" for i in range(n_layer)])


SMALL = layers(16, 2, 5, 8, 10, 12, 14)

LFM_2 = Family(
    model_type="lfm2",
    architectures=["Lfm2ForCausalLM"],
    fields=[
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=65536),
        field("hidden_size", "n_embd", default=2560),
        field("num_hidden_layers", "n_layer", default=32),
        field("num_attention_heads", "n_head", default=32),
        field("num_key_value_heads", "n_query_groups", default=8),
        head_dim(2560, 32),
        field("norm_eps", "norm_eps", default=1e-5),
        field("max_position_embeddings", "block_size", default=128_000),
        field(["tie_embedding", "tie_word_embeddings"], "tie_embeddings", default=True),
        *rope_fields(["rope_theta"], default_base=1_000_000),
        Joint(("layer_types", "full_attn_idxs", "conv_L_cache", "conv_bias"), ("mixers", "short_conv"), parse_layers, format_layers),
        Joint(("intermediate_size", "block_ff_dim", "block_auto_adjust_ff_dim"), ("intermediate_size",), parse_width, format_width),
    ],
    weights=[
        same("model.embed_tokens.weight", "transformer.wte.weight"),
        same("model.layers.{}.operator_norm.*", "transformer.h.{}.norm_1.*"),
        joined([f"model.layers.{{}}.self_attn.{x}_proj.*" for x in "qkv"], "transformer.h.{}.attn.qkv.*"),
        same("model.layers.{}.self_attn.q_layernorm.*", "transformer.h.{}.attn.norm_q.*"),
        same("model.layers.{}.self_attn.k_layernorm.*", "transformer.h.{}.attn.norm_k.*"),
        same("model.layers.{}.self_attn.out_proj.*", "transformer.h.{}.attn.proj.*"),
        same("model.layers.{}.conv.in_proj.*", "transformer.h.{}.attn.in_proj.*"),
        same("model.layers.{}.conv.conv.*", "transformer.h.{}.attn.conv.*"),
        same("model.layers.{}.conv.out_proj.*", "transformer.h.{}.attn.out_proj.*"),
        same("model.layers.{}.ffn_norm.*", "transformer.h.{}.norm_2.*"),
        same("model.layers.{}.feed_forward.w1.*", "transformer.h.{}.mlp.fc_1.*"),
        same("model.layers.{}.feed_forward.w3.*", "transformer.h.{}.mlp.fc_2.*"),
        same("model.layers.{}.feed_forward.w2.*", "transformer.h.{}.mlp.proj.*"),
        same("model.embedding_norm.*", "transformer.ln_f.*"),
        tied("lm_head.weight", "lm_head.weight"),
        ignored("model.pos_emb.inv_freq"),
        ignored("model.rotary_emb.inv_freq"),
    ],
    base=LLAMA_BASE | dict(norm_qk=True, norm_eps=1e-5),
    brands=[
        Brand(
            "LiquidAI",
            base=dict(
                block_size=128_000,
                vocab_size=65536,
                padded_vocab_size=65536,
                n_query_groups=8,
                rope_base=1_000_000,
                tie_embeddings=True,
                short_conv=dict(kernel_size=3, bias=False),
            ),
            sizes={
                "LFM2-350M": SMALL | dict(n_embd=1024, n_head=16, intermediate_size=4608),
                "LFM2-700M": SMALL | dict(n_embd=1536, n_head=24, intermediate_size=6912),
                "LFM2-1.2B": SMALL | dict(n_embd=2048, n_head=32, intermediate_size=8192),
                "LFM2-2.6B": layers(30, 2, 5, 9, 13, 17, 21, 24, 27) | dict(n_embd=2048, n_head=32, intermediate_size=10752),
            },
        ),
    ],
)
