"""Updates in a whole model: put beside its layers, trained alone, merged into its weights."""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn as nn

from litgpt import config as base
from litgpt import model as base_model
from litgpt.errors import UserError
from litgpt.experts import Experts
from litgpt.lora.layers import LoRAExperts, LoRALinear
from litgpt.lora.settings import LoRA


def add_lora(model: nn.Module, lora: LoRA, seed: int = 1337) -> None:
    """Wrap the layers that `lora` chooses and freeze all but their updates.

    Args:
        model: A `GPT`; its own weights stay as they are, and so does what it computes.
        lora: Sizes and choices.
        seed: Every update starts from (seed, its layer's name), so that the start does not depend on how a model is spread.

    Raises:
        UserError: Inputs of experts' updates would be dropped or their rows' lengths learned, which PEFT's format cannot express; or
            the rank is beyond any layer's.
    """
    other = "turn `lora_mlp` off" if lora.targets is None else "leave out `lora_targets`"
    if lora.mlp and lora.dropout and model.config.n_expert:
        raise UserError(f"`lora_dropout` is 0 where `lora_mlp` updates experts, but got {lora.dropout}. Set it to 0, or {other}.")
    if lora.mlp and lora.dora and model.config.n_expert:
        raise UserError(
            f"`lora_dora` cannot be used where `lora_mlp` updates experts, since PEFT has no DoRA of them. Turn it off, or {other}."
        )
    layers = [(name, layer) for name, layer in model.named_modules() if can_be_wrapped(layer) and any(lora.enabled(name))]
    highest = max((_highest_rank(layer) for _, layer in layers), default=lora.r)
    if lora.r > highest:
        raise UserError(f"`lora_r` is {lora.r}, but the update of no layer it is for can have a rank above {highest}. Lower it.")
    alpha = lora.scaling * lora.r  # rsLoRA is plain LoRA with a larger one
    for name, plain in layers:
        enabled = lora.enabled(name)
        if isinstance(plain, Experts):
            layer = LoRAExperts(plain, lora.r, alpha)
        else:
            sizes = model.config.qkv_sizes if len(enabled) == 3 else None
            layer = LoRALinear(plain, lora.r, alpha, lora.dropout, sizes, enabled, lora.dora)
        layer.reset_parameters(torch.Generator().manual_seed(seed_of(seed, name)))
        model.set_submodule(name, layer)
    mark_only_lora_as_trainable(model)


def can_be_wrapped(layer: nn.Module) -> bool:
    """Say whether an update can stand beside a layer: it is linear, plain or quantized, or holds experts."""
    return isinstance(layer, nn.Linear | Experts) or hasattr(layer, "dequantize")


def _highest_rank(layer: nn.Module) -> int:
    """Return the highest rank that an update of a layer can have, where a higher one would only cost memory."""
    if isinstance(layer, Experts):
        return max(min(layer.gate_up.shape[1:]), min(layer.down.shape[1:]))
    return min(layer.in_features, layer.out_features)


def seed_of(seed: int, name: str) -> int:
    """Return a seed for one parameter, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze everything but the updates.

    Args:
        model: A model with LoRA layers.
        bias: Which biases to train too: "none", "lora_only" (those of wrapped layers) or "all".

    Raises:
        UserError: `bias` is something else.
    """
    if bias not in ("none", "lora_only", "all"):
        raise UserError(f"`bias` is 'none', 'lora_only' or 'all', but got {bias!r}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or (bias == "all" and name.endswith("bias"))
    if bias == "lora_only":
        for module in model.modules():
            if isinstance(module, LoRALinear) and module.linear.bias is not None:
                module.linear.bias.requires_grad = True


def lora_filter(key: str, value: Any) -> bool:
    """Say whether an entry of a state dict belongs to an update."""
    return "lora_" in key


@torch.no_grad()
def merge_lora_weights(model: nn.Module) -> None:
    """Add every update to its layer's weight and put plain layers back. A head that was tied gets a weight of its own."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear | LoRAExperts):
            if name == "lm_head":
                model.config = replace(model.config, tie_embeddings=False)
            model.set_submodule(name, layer.merged())


@dataclass
class Config(base.Config):
    """An architecture and its LoRA settings, in one object; see `LoRA` for what they mean."""

    lora_r: int = 0
    lora_alpha: float = 1
    lora_dropout: float = 0.0
    lora_query: bool = False
    lora_key: bool = False
    lora_value: bool = False
    lora_projection: bool = False
    lora_mlp: bool = False
    lora_head: bool = False
    lora_targets: str | None = None
    lora_rslora: bool = False
    lora_dora: bool = False
    lora_plus_ratio: float | None = None


class GPT(base_model.GPT):
    """A `GPT` whose layers are wrapped as its config says.

    Args:
        config: With `lora_r` 0 nothing is wrapped.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.lora_r > 0:
            settings = {field.name: getattr(config, f"lora_{field.name}") for field in fields(LoRA)}
            if config.lora_targets is not None:
                settings |= dict(query=True, value=True)  # false is their default here, and no wish
            add_lora(self, LoRA(**settings))
            self.requires_grad_(True)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """Return a randomly initialised model of a known name, see `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))
