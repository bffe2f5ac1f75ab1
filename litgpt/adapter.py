"""LLaMA-Adapter (arXiv:2303.16199): freeze the model and learn, in its later layers, a prefix of keys and values that all tokens see.

What a token gathers from the prefix is computed apart from what it gathers from the text, and counts as much as a learned gate says,
which begins at zero: so does the training at what the model computed before.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litgpt import config as base
from litgpt import model as base_model
from litgpt.attention import Context, Mask, attend
from litgpt.cache import KeyValues
from litgpt.errors import UserError

LENGTH, START = 10, 2  # how many embeddings a prefix has, and the first layer that has one
EVERYWHERE = Context({}, {None: Mask()})  # where nothing is hidden, and positions do not count


class CausalSelfAttention(base_model.CausalSelfAttention):
    """Attention to the tokens before and, apart from them, to a learned prefix.

    The prefix is a row of embeddings that pass the layer's own projection, norms and clamps, but are not turned: they stand nowhere. All
    queries see it. What they gather is scaled by a gate for each head and added before the output's projection.

    Args:
        config: The architecture, with `adapter_prompt_length`.
        i: Which layer this is, from 0.
    """

    grouped = False  # whether the prefix's keys and values are the rows that LitGPT takes for them, see `add_stored`

    def __init__(self, config: "Config", i: int) -> None:
        super().__init__(config, i)
        self.add_prefix(config.adapter_prompt_length)

    def add_prefix(self, length: int) -> None:
        """Make the embeddings, each as large as a normalised token, and the gates, which begin closed. Both are in fp32."""
        like = dict(device=self.qkv.weight.device, dtype=torch.float32)
        self.adapter_wte = nn.Embedding(length, self.qkv.in_features, **like)
        self.gating_factor = nn.Parameter(torch.zeros(1, 1, self.proj.in_features // self.head_size, 1, **like))

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: KeyValues | None) -> Tensor:
        """Return what queries gather from the text and from the prefix, (B, T, H, D)."""
        y = super().gathered(q, k, v, context, state)
        rows = q.flatten(0, 1).unsqueeze(0)  # all queries see the same, so they may stand in one row
        from_prefix = attend(rows, *self.prefix(q.dtype), None, EVERYWHERE, None, self.scale, self.softcap)
        return y + (self.gating_factor * from_prefix.view_as(q)).to(y.dtype)

    def prefix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the prefix, (1, P, G, D). Made anew in each call, or their gradients would be lost."""
        embeddings = self.adapter_wte.weight.to(dtype).unsqueeze(0)
        if self.grouped:
            groups = self.qkv(embeddings).unflatten(-1, (-1, self.shares + 2, self.head_size))  # (1, P, G, H / G + 2, D)
            return groups[..., -2, :], groups[..., -1, :]
        return self.heads(embeddings, None)[1:]


def add_prefix(attn: base_model.CausalSelfAttention, length: int) -> None:
    """Let the attention of a layer see a prefix too. Its own layers, quantized or not, stay what and where they are."""
    attn.__class__ = CausalSelfAttention
    attn.add_prefix(length)


def add_prefixes(model: base_model.GPT, seed: int) -> None:
    """Put a prefix into every layer from the third on whose attention is plain, drawn on the CPU, one after the other, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for i, block in enumerate(model.transformer.h):
        if i >= START and model.config.mixers[i] == "attention":
            add_prefix(block.attn, LENGTH)
            weight = block.attn.adapter_wte.weight
            if weight.device.type != "meta":
                weight.data.copy_(torch.randn(weight.shape, generator=generator))


def add_adapter(model: base_model.GPT, seed: int = 1337) -> None:
    """Put prefixes into a model and freeze all but them and their gates.

    Args:
        model: Computes as before, for the gates are closed.
        seed: Decides what the prefixes begin as.

    Raises:
        UserError: The model has no place for them.
    """
    check_prefixes(model.config, START)
    add_prefixes(model, seed)
    mark_only_adapter_as_trainable(model)


def check_prefixes(config: base.Config, start: int) -> None:
    """Raise a UserError for an architecture in which prefixes alone would train nothing, or not all layers that they are for."""
    way = "Use finetune_lora or finetune_adapter_v2."
    if config.n_layer <= start:
        raise UserError(f"Adapter puts a prefix into every layer from number {start} on, but the model has {config.n_layer} layers. {way}")
    if other := next((mixer for mixer in config.mixers if mixer != "attention"), None):
        raise UserError(f"Adapter puts a prefix beside the keys and values of plain attention, but the model has {other!r} layers. {way}")


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the prefixes and their gates."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = adapter_filter(name, parameter)


def adapter_filter(key: str, value: Any) -> bool:
    """Say whether an entry of a state dict belongs to a prefix or is its gate."""
    return "adapter_wte" in key or "gating_factor" in key


@dataclass
class Config(base.Config):
    """An architecture and the size and place of its prefixes, in one object."""

    adapter_prompt_length: int = LENGTH
    """How many embeddings a prefix has."""
    adapter_start_layer: int = START
    """The first layer that has one, counted from 0."""


class Block(base_model.Block):
    """A layer whose attention, where it is plain, sees a prefix from `adapter_start_layer` on."""

    def __init__(self, config: Config, i: int) -> None:
        super().__init__(config, i)
        if i >= config.adapter_start_layer and config.mixers[i] == "attention":
            add_prefix(self.attn, config.adapter_prompt_length)


class GPT(base_model.GPT):
    """A `GPT` with prefixes as its config says; see `mark_only_adapter_as_trainable`.

    Raises:
        UserError: The architecture has no place for them.
    """

    block_class = Block

    def __init__(self, config: Config) -> None:
        check_prefixes(config, config.adapter_start_layer)
        super().__init__(config)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """Return a randomly initialised model of a known name, see `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))
