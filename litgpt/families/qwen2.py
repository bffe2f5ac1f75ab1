"""Qwen 2 and 2.5, QwQ: the Llama block with biases of queries, keys and values; later layers may have a window."""

from collections.abc import Mapping
from typing import Any

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import FULL, LLAMA_BASE, LLAMA_FIELDS, LLAMA_WEIGHTS, SLIDING, whole, windows, with_defaults


def window_entries(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that say whether and from which layer on the window is used, where transformers knows no `layer_types`."""
    indices = fields["sliding_window_indices"] or [0] * fields["n_layer"]
    first = indices.index(1) if 1 in indices else fields["n_layer"]
    return dict(use_sliding_window=1 in indices, max_window_layers=first)


QWEN_FIELDS = [
    *with_defaults(LLAMA_FIELDS, vocab_size=151936),
    field("intermediate_size", "intermediate_size", default=22016),
    field("num_key_value_heads", "n_query_groups", default=32),
    field("max_position_embeddings", "block_size", default=32768),
    windows(
        4096,
        lambda mapping, i: SLIDING if i >= whole(mapping, "max_window_layers", 28) else FULL,
        extra=window_entries,
        used=lambda mapping: bool(mapping.get("use_sliding_window")),
    ),
]

SMALL = dict(padded_vocab_size=151936, norm_eps=1e-6, tie_embeddings=True)
Q_0_5B = SMALL | dict(n_layer=24, n_head=14, n_query_groups=2, n_embd=896, intermediate_size=4864)
Q_1_5B = SMALL | dict(n_layer=28, n_head=12, n_query_groups=2, n_embd=1536, intermediate_size=8960)
Q_3B = SMALL | dict(n_layer=36, n_head=16, n_query_groups=2, n_embd=2048, intermediate_size=11008)
Q_7B = dict(norm_eps=1e-6, n_layer=28, n_head=28, n_query_groups=4, n_embd=3584, intermediate_size=18944)
Q_14B = dict(n_layer=48, n_head=40, n_query_groups=8, n_embd=5120, intermediate_size=13824)
Q_32B = dict(n_layer=64, n_head=40, n_query_groups=8, n_embd=5120, intermediate_size=27648)
Q_72B = dict(n_layer=80, n_head=64, n_query_groups=8, n_embd=8192, intermediate_size=29568)

BASE = dict(block_size=32768, vocab_size=151643, padded_vocab_size=152064, norm_eps=1e-5, rope_base=1_000_000)
LONG = dict(block_size=131072)
TUNED = dict(norm_eps=1e-6)  # the larger models' base versions have 1e-5
MILLION = dict(block_size=1_010_000, rope_base=10_000_000, norm_eps=1e-5)
MATH = dict(block_size=4096, rope_base=10_000)
DISTILLED_MATH = dict(block_size=131072, rope_base=10_000, tie_embeddings=False)

ALIBABA = [
    Brand(
        "Qwen",
        base=BASE,
        sizes={
            "Qwen2-0.5B": Q_0_5B | LONG,
            "Qwen2-0.5B-Instruct": Q_0_5B,
            "Qwen2-1.5B": Q_1_5B | LONG,
            "Qwen2-1.5B-Instruct": Q_1_5B,
            "Qwen2-7B": Q_7B | LONG,
            "Qwen2-7B-Instruct": Q_7B,
            "Qwen2-72B": Q_72B | LONG,
            "Qwen2-72B-Instruct": Q_72B | TUNED,
            "Qwen2.5-0.5B{,-Instruct}": Q_0_5B,
            "Qwen2.5-1.5B": Q_1_5B | LONG,
            "Qwen2.5-1.5B-Instruct": Q_1_5B,
            "Qwen2.5-3B{,-Instruct}": Q_3B,
            "Qwen2.5-7B": Q_7B | LONG,
            "Qwen2.5-7B-Instruct": Q_7B,
            "Qwen2.5-14B": Q_14B | LONG,
            "Qwen2.5-14B-Instruct": Q_14B | TUNED,
            "Qwen2.5-32B": Q_32B | LONG,
            "Qwen2.5-32B-Instruct": Q_32B | TUNED,
            "Qwen2.5-72B": Q_72B | LONG,
            "Qwen2.5-72B-Instruct": Q_72B | TUNED,
            "Qwen2.5-7B-Instruct-1M": Q_7B | MILLION,
            "Qwen2.5-14B-Instruct-1M": Q_14B | MILLION,
            "Qwen2.5-Coder-0.5B{,-Instruct}": Q_0_5B,
            "Qwen2.5-Coder-1.5B{,-Instruct}": Q_1_5B,
            "Qwen2.5-Coder-3B{,-Instruct}": Q_3B,
            "Qwen2.5-Coder-7B{,-Instruct}": Q_7B,
            "Qwen2.5-Coder-14B": Q_14B,
            "Qwen2.5-Coder-14B-Instruct": Q_14B | TUNED,
            "Qwen2.5-Coder-32B": Q_32B,
            "Qwen2.5-Coder-32B-Instruct": Q_32B | TUNED,
            "Qwen2.5-Math-1.5B{,-Instruct}": Q_1_5B | MATH,
            "Qwen2.5-Math-7B{,-Instruct}": Q_7B | MATH,
            "Qwen2.5-Math-72B{,-Instruct}": Q_72B | MATH,
            "QwQ-32B": Q_32B | LONG,
            "QwQ-32B-Preview": Q_32B,
        },
        prompt={
            "Qwen2.5-{0.5B,1.5B,3B,7B,14B,32B,72B}-Instruct": "qwen2.5",
            "Qwen2.5-{7B,14B}-Instruct-1M": "qwen2.5",
            "Qwen2.5-Coder-{0.5B,1.5B,3B,7B,14B,32B}-Instruct": "qwen2.5",
            "Qwen2.5-Math-{1.5B,7B,72B}-Instruct": "qwen2.5-math",
            "QwQ-32B{,-Preview}": "qwq",
        },
    ),
    Brand(
        "deepseek-ai",
        base=BASE | LONG,
        sizes={
            "R1-Distill-Qwen-1.5B": Q_1_5B | DISTILLED_MATH,
            "R1-Distill-Qwen-7B": Q_7B | DISTILLED_MATH,
            "R1-Distill-Qwen-14B": Q_14B,
            "R1-Distill-Qwen-32B": Q_32B,
        },
        prompt="r1",
        published_as={"R1-Distill-Qwen-{1.5B,7B,14B,32B}": "DeepSeek-R1-Distill-Qwen-{1.5B,7B,14B,32B}"},
    ),
]

QWEN_2 = Family(
    model_type="qwen2",
    architectures=["Qwen2ForCausalLM"],
    fields=QWEN_FIELDS,
    weights=LLAMA_WEIGHTS,
    base=LLAMA_BASE | dict(attn_bias=True),
    brands=ALIBABA,
)
