"""Gemma 3: as Gemma 2, but with norms of queries and keys, no soft caps, and angles of their own in layers with a window."""

from collections.abc import Mapping
from typing import Any

from litgpt.families.family import Brand, Family, Joint, field
from litgpt.families.gemma2 import SANDWICH_BASE, SANDWICH_FIELDS, SANDWICH_WEIGHTS, window_size
from litgpt.families.ropes import format_ropes, half_said, parse_ropes
from litgpt.families.tables import FULL, SLIDING, float_or_none, layer_types, whole
from litgpt.weights import alias, same


def parse_layers(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers have the window, and the angles of those with and without it."""
    pattern = whole(mapping, "sliding_window_pattern", 6) or 6
    kinds = layer_types(mapping, lambda i: SLIDING if (i + 1) % pattern else FULL, 26)
    usual = mapping.get("rope_theta", 1_000_000), mapping.get("rope_local_base_freq", 10_000)
    base, local_base, adjustments = parse_ropes(mapping, *usual)
    indices, size = [int(kind == SLIDING) for kind in kinds], mapping.get("sliding_window", 4096)
    there = size is not None and 1 in indices
    return dict(
        sliding_window_size=size if there else None,
        sliding_window_indices=indices if there else None,
        rope_indices=indices,
        rope_base=base,
        rope_local_base_freq=local_base,
        rope_adjustments=adjustments,
    )


def format_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `parse_layers` reads, as transformers 4 and as 5 spells it."""
    indices, local_base = fields["rope_indices"] or [0] * fields["n_layer"], float(fields["rope_local_base_freq"] or 10_000)
    kinds = [SLIDING if index else FULL for index in indices]
    ropes = format_ropes(fields["rope_base"], local_base, fields["rope_adjustments"])
    return dict(layer_types=kinds, **window_size(fields), rope_local_base_freq=local_base) | ropes


def five_of_six(n_layer: int) -> dict[str, Any]:
    """Return the fields of so many layers of which every sixth sees all and the others have a window."""
    indices = [int((i + 1) % 6 > 0) for i in range(n_layer)]
    return dict(n_layer=n_layer, sliding_window_indices=indices, rope_indices=indices)


SEEING = dict(block_size=131072, padded_vocab_size=262208, sliding_window_size=1024, rope_adjustments=dict(factor=8.0))
G3_27B = dict(n_head=32, n_query_groups=16, n_embd=5376, head_size=128, intermediate_size=21504, attention_scores_scalar=168)

GEMMA_3 = Family(
    model_type="gemma3_text",
    architectures=["Gemma3ForCausalLM"],
    fields=[
        *SANDWICH_FIELDS,
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=262208),
        field("max_position_embeddings", "block_size", default=131072),
        field("final_logit_softcapping", "final_logit_softcapping", format=float_or_none),
        Joint(
            ("layer_types", "sliding_window", "rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"),
            ("sliding_window_size", "sliding_window_indices", "rope_indices", "rope_base", "rope_local_base_freq", "rope_adjustments"),
            parse_layers,
            format_layers,
            half_said,
        ),
    ],
    weights=[
        alias("language_model.lm_head.weight", "lm_head.weight"),
        *SANDWICH_WEIGHTS,
        same("model.layers.{}.self_attn.q_norm.*", "transformer.h.{}.attn.norm_q.*"),
        same("model.layers.{}.self_attn.k_norm.*", "transformer.h.{}.attn.norm_k.*"),
    ],
    wrappers=("gemma3",),
    prefixes=(("language_model.model.", "model."), ("model.language_model.", "model.")),
    others=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    base=SANDWICH_BASE | dict(norm_qk=True),
    brands=[
        Brand(
            "google",
            base=dict(
                block_size=32768,
                vocab_size=262144,
                padded_vocab_size=262144,
                head_size=256,
                attention_scores_scalar=256,
                sliding_window_size=512,
                rope_base=1_000_000,
                rope_local_base_freq=10_000,
            ),
            sizes={
                "Gemma-3-270m{,-it}": five_of_six(18) | dict(n_head=4, n_query_groups=1, n_embd=640, intermediate_size=2048),
                "Gemma-3-1b-{pt,it}": five_of_six(26) | dict(n_head=4, n_query_groups=1, n_embd=1152, intermediate_size=6912),
                "Gemma-3-4b-{pt,it}": five_of_six(34) | dict(n_head=8, n_query_groups=4, n_embd=2560, intermediate_size=10240) | SEEING,
                "Gemma-3-12b-{pt,it}": five_of_six(48) | dict(n_head=16, n_query_groups=8, n_embd=3840, intermediate_size=15360) | SEEING,
                "Gemma-3-27b-{pt,it}": five_of_six(62) | G3_27B | SEEING,
            },
            prompt={"Gemma-3-{270m,1b,4b,12b,27b}-it": "gemma"},
            published_as={"Gemma-3-270m{,-it}": "gemma-3-270m{,-it}", "Gemma-3-{1b,4b,12b,27b}-{pt,it}": "gemma-3-{1b,4b,12b,27b}-{pt,it}"},
        ),
    ],
)
