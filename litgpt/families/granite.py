"""Granite: the Llama block with four multipliers: of embeddings, of what a layer adds, of attention's scores and of logits."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Brand, Family, field
from litgpt.families.llama import ROWS
from litgpt.families.tables import LLAMA_BASE, LLAMA_WEIGHTS, given

LOGITS, EMBEDDINGS = given("logits_scaling"), given("embedding_multiplier")


def format_embeddings(value: Any) -> float:
    """Return `embedding_multiplier` of our `scale_embeddings`."""
    if value is True:
        raise UserError("`embedding_multiplier` of a Granite model is a number, which does not depend on its width.")
    return 1.0 if value is False else value


MULTIPLIERS = [
    field(
        "embedding_multiplier",
        "scale_embeddings",
        default=1.0,
        parse=lambda value: False if EMBEDDINGS(value) == 1 else value,
        format=format_embeddings,
    ),
    field("residual_multiplier", "residual_scale", default=1.0, parse=given("residual_multiplier")),
    field("attention_multiplier", "attention_scale", default=1.0, parse=given("attention_multiplier")),
    field("logits_scaling", "logit_scale", default=1.0, parse=lambda value: 1 / LOGITS(value), format=lambda value: 1 / value),
]

G_2B = dict(n_layer=40, n_head=32, n_embd=2048, intermediate_size=8192, attention_scale=0.015625, logit_scale=1 / 8)
G_8B = dict(n_layer=40, n_head=32, n_embd=4096, intermediate_size=12800, attention_scale=0.0078125, logit_scale=1 / 16)
LONG = dict(block_size=131072)

GRANITE = Family(
    model_type="granite",
    architectures=["GraniteForCausalLM"],
    fields=[*ROWS, *MULTIPLIERS],
    weights=LLAMA_WEIGHTS,
    base=LLAMA_BASE,
    brands=[
        Brand(
            "ibm-granite",
            base=dict(
                block_size=4096,
                vocab_size=49155,
                padded_vocab_size=49155,
                tie_embeddings=True,
                norm_eps=1e-5,
                n_query_groups=8,
                scale_embeddings=12.0,
                residual_scale=0.22,
            ),
            sizes={
                "granite-3.0-2b-{base,instruct}": G_2B,
                "granite-3.0-8b-{base,instruct}": G_8B,
                "granite-3.1-2b-{base,instruct}": G_2B | LONG | dict(rope_base=5_000_000),
                "granite-3.1-8b-{base,instruct}": G_8B | LONG | dict(rope_base=10_000_000),
            },
            prompt={"granite-{3.0,3.1}-{2b,8b}-instruct": "granite"},
        ),
    ],
)
