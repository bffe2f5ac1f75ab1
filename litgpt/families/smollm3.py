"""SmolLM3: the Llama block, in which every fourth layer does not turn queries and keys."""

from collections.abc import Mapping
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Brand, Family, Joint, field
from litgpt.families.tables import FULL, LLAMA_BASE, LLAMA_FIELDS, LLAMA_WEIGHTS, SLIDING, head_dim, whole, windows, with_defaults


def turning(mapping: Mapping[str, Any]) -> list[int]:
    """Return for each layer 1 if it turns queries and keys, else 0."""
    n_layer, every = whole(mapping, "num_hidden_layers", 36), whole(mapping, "no_rope_layer_interval", 4)
    said = mapping.get("no_rope_layers")
    if said is None:
        return [int(every == 0 or (i + 1) % every != 0) for i in range(n_layer)]
    if not isinstance(said, list) or len(said) < n_layer or any(value not in (0, 1) for value in said):
        raise UserError(f"`no_rope_layers` says for each of {n_layer} layers 1 if it has RoPE, else 0, but got {said!r} in config.json.")
    return said[:n_layer]


def parse_turning(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers turn."""
    turns = turning(mapping)
    return dict(rope_indices=None if all(turns) else [0 if turn else None for turn in turns])


def format_turning(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry for the layers that turn."""
    return dict(no_rope_layers=[int(kind is not None) for kind in fields["rope_indices"] or [0] * fields["n_layer"]])


SMOLLM3 = Family(
    model_type="smollm3",
    architectures=["SmolLM3ForCausalLM"],
    fields=[
        *(
            row
            for row in with_defaults(
                LLAMA_FIELDS,
                vocab_size=128256,
                hidden_size=2048,
                num_hidden_layers=36,
                num_attention_heads=16,
                rope_theta=2_000_000,
                tie_word_embeddings=True,
            )
            if row.ours[0] != "head_size"
        ),
        head_dim(2048, 16),
        field("intermediate_size", "intermediate_size", default=11008),
        field("num_key_value_heads", "n_query_groups", default=4),
        field("max_position_embeddings", "block_size", default=32768),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
        field("mlp_bias", "mlp_bias", default=False),
        Joint(("no_rope_layers", "no_rope_layer_interval", "num_hidden_layers"), ("rope_indices",), parse_turning, format_turning),
        windows(
            None,
            default=lambda mapping, i: FULL if turning(mapping)[i] else SLIDING,
            n_layer=36,
            extra=lambda fields: dict(use_sliding_window=fields["sliding_window_size"] is not None),
            used=lambda mapping: bool(mapping.get("use_sliding_window")),
        ),
    ],
    weights=LLAMA_WEIGHTS,
    base=LLAMA_BASE | dict(tie_embeddings=True),
    brands=[
        Brand(
            "HuggingFaceTB",
            base=dict(
                block_size=65536,
                n_layer=36,
                n_head=16,
                n_query_groups=4,
                n_embd=2048,
                intermediate_size=11008,
                norm_eps=1e-6,
                rope_base=5_000_000,
                rope_indices=[0, 0, 0, None] * 9,
                vocab_size=128256,
                padded_vocab_size=128256,
            ),
            sizes={"SmolLM3-3B{,-Base}": {}},
        ),
    ],
)
