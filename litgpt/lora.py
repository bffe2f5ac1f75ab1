"""Low-rank adaptation (arXiv:2106.09685): freeze the model and learn small updates beside chosen linear layers."""

import hashlib
import math
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt import config as base
from litgpt import model as base_model
from litgpt.errors import UserError
from litgpt.experts import Experts, Rows, grouped_linear

MAKES = {  # what layers of other mixers than plain attention make, where it is not their output
    "gate": ["query"],
    **dict.fromkeys(("q", "q_a", "q_b"), ["query"]),
    **dict.fromkeys(("kv_a", "kv_b"), ["key", "value"]),
    **dict.fromkeys(("in_proj", "in_proj_qkvz", "in_proj_ba"), ["query", "key", "value"]),
}


@dataclass(frozen=True)
class LoRA:
    """Which layers get an update, and of what size."""

    r: int = 8
    """The rank of the update."""
    alpha: float = 16
    """The update is scaled by alpha / r."""
    dropout: float = 0.05
    """How likely an input of the update is dropped while training."""
    query: bool = True
    key: bool = False
    value: bool = True
    projection: bool = False
    mlp: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), {"r": int, "alpha": int | float, "dropout": int | float}.get(field.name, bool)
            if not isinstance(value, wanted) or (wanted is not bool and (isinstance(value, bool) or not math.isfinite(value))):
                kind = {int: "an integer", bool: "true or false"}.get(wanted, "a number")
                raise UserError(f"`lora_{field.name}` is {kind}, but got {value!r:.40}.")
        if self.r < 1:
            raise UserError(f"`lora_r` is the rank of the update and at least 1, but got {self.r}.")
        if self.alpha <= 0:
            raise UserError(f"`lora_alpha` scales the update and is a number above 0, but got {self.alpha}. Use twice the rank, say.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"`lora_dropout` is a probability below 1, but got {self.dropout}. Use 0 to drop nothing.")
        if not any((self.query, self.key, self.value, self.projection, self.mlp, self.head)):
            raise UserError(
                "All of `lora_query`, `lora_key`, `lora_value`, `lora_projection`, `lora_mlp` and `lora_head` are false. Turn one on."
            )

    def enabled(self, name: str) -> list[bool]:
        """Return which row blocks of a layer get an update: of `attn.qkv` those of q, k and v, of any other its only one."""
        *_, part, leaf = f".{name}".split(".")
        if (part, leaf) == ("attn", "qkv"):
            return [self.query, self.key, self.value]
        if part == "attn":
            return [any(getattr(self, made) for made in MAKES.get(leaf, ["projection"]))]
        if part in ("mlp", "shared"):
            return [self.mlp and leaf not in ("gate", "shared_gate")]
        return [self.head and leaf == "lm_head"]


class LoRALinear(nn.Module):
    """A frozen linear layer and a trainable low-rank update of chosen row blocks, y = W x + alpha / r * B A x.

    Args:
        linear: The layer W, or any that has `in_features` and `out_features` (quantized, sharded).
        r: The rank of each block's update.
        alpha: The update is scaled by alpha / r.
        dropout: How likely an input of A is dropped while training.
        sizes: The rows of each block (for a fused projection: those of q, k and v); by default one block.
        enabled: Which blocks get an update; by default all.
    """

    def __init__(
        self,
        linear: nn.Module,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        sizes: list[int] | None = None,
        enabled: list[bool] | None = None,
    ) -> None:
        super().__init__()
        self.linear, self.r, self.scaling = linear, r, alpha / r
        self.sizes = sizes or [linear.out_features]
        self.enabled = enabled or [True] * len(self.sizes)
        self.dropout = nn.Dropout(dropout)
        like = dict(device=linear.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r * sum(self.enabled), linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(sum(self.updated_sizes), r, **like))
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        """The width of the input."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """The width of the output."""
        return self.linear.out_features

    @property
    def updated_sizes(self) -> list[int]:
        """The rows of the blocks that get an update."""
        return [size for size, enabled in zip(self.sizes, self.enabled, strict=True) if enabled]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start from no update at all: A is uniform as a linear layer's weight, B is zero."""
        bound = 1 / math.sqrt(self.linear.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., n r)
        return self.linear(x) + (F.linear(hidden, self.spread()) * self.scaling).to(x.dtype)

    def spread(self) -> Tensor:
        """Return B over the whole layer, (out, n r): each block's factor in its own rows and columns, zero elsewhere."""
        if len(self.sizes) == 1:
            return self.lora_B
        rows, column = [], 0
        blocks = iter(self.lora_B.split(self.updated_sizes))
        for size, enabled in zip(self.sizes, self.enabled, strict=True):
            if enabled:
                rows.append(F.pad(next(blocks), (column, self.lora_A.size(0) - self.r - column)))
                column += self.r
            else:
                rows.append(self.lora_B.new_zeros(size, self.lora_A.size(0)))
        return torch.cat(rows)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain linear layer that computes the same, in the weight's own dtype."""
        weight, bias = self.linear.weight, self.linear.bias
        plain = base_model.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(updated(weight, self.lora_A, self.spread(), self.scaling), requires_grad=False)
        plain.bias = bias
        return plain

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the weights of a plain linear layer under their own names."""
        for name in ("weight", "bias"):
            if (key := prefix + name) in state_dict:
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRAExperts(Experts):
    """Frozen experts and trainable low-rank updates of each one's two matrices, y = W x + alpha / r * B A x.

    Args:
        experts: The frozen ones.
        r: The rank of each update.
        alpha: The updates are scaled by alpha / r.
    """

    def __init__(self, experts: Experts, r: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.base, self.r, self.scaling = experts, r, alpha / r
        self.n_expert, self.limit = experts.n_expert, experts.limit
        like = dict(device=experts.gate_up.device, dtype=torch.float32)
        for name, weight in (("up", experts.gate_up), ("down", experts.down)):
            n, outer, inner = weight.shape
            setattr(self, f"lora_{name}_A", nn.Parameter(torch.empty(n, r, inner, **like)))
            setattr(self, f"lora_{name}_B", nn.Parameter(torch.empty(n, outer, r, **like)))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start from no update at all: A is uniform as a linear layer's weight, B is zero."""
        for A, B in ((self.lora_up_A, self.lora_up_B), (self.lora_down_A, self.lora_down_B)):
            bound = 1 / math.sqrt(A.size(2))
            nn.init.uniform_(A, -bound, bound, generator=generator)
            nn.init.zeros_(B)

    def project_up(self, x: Tensor, rows: Rows) -> Tensor:
        hidden = grouped_linear(x, self.lora_up_A.to(x.dtype), rows, spread=True) * self.scaling  # (S, r)
        return self.base.project_up(x, rows) + grouped_linear(hidden, self.lora_up_B.to(x.dtype), rows)

    def project_down(self, x: Tensor, rows: Rows) -> Tensor:
        hidden = grouped_linear(x, self.lora_down_A.to(x.dtype), rows) * self.scaling
        return self.base.project_down(x, rows) + grouped_linear(hidden, self.lora_down_B.to(x.dtype), rows)

    def mixed_bias(self, indices: Tensor, weights: Tensor) -> Tensor | None:
        return self.base.mixed_bias(indices, weights)

    @torch.no_grad()
    def merged(self) -> Experts:
        """Return plain experts that compute the same, in the weights' own dtype."""
        plain = copy(self.base)
        gate_up = updated(self.base.gate_up, self.lora_up_A, self.lora_up_B, self.scaling)
        down = updated(self.base.down, self.lora_down_A, self.lora_down_B, self.scaling)
        weights = dict(gate_up=nn.Parameter(gate_up, requires_grad=False), down=nn.Parameter(down, requires_grad=False))
        plain._parameters = self.base._parameters | weights
        return plain

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the weights of plain experts under their own names."""
        for name in self.base._parameters:
            if (key := prefix + name) in state_dict:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def updated(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A in the weight's dtype, of one matrix or of a stack, of which one at a time is there in fp32."""
    if weight.ndim == 3:
        stack = torch.empty_like(weight)
        for e in range(len(stack)):
            stack[e] = updated(weight[e], A[e], B[e], scale)
        return stack
    return (weight.float() + scale * (B.float() @ A.float()).to(weight.device)).to(weight.dtype)


def add_lora(model: nn.Module, lora: LoRA, seed: int = 1337) -> None:
    """Wrap the layers that `lora` chooses and freeze all but their updates.

    Args:
        model: A `GPT`; its own weights stay as they are, and so does what it computes.
        lora: Sizes and choices.
        seed: Every update starts from (seed, its layer's name), so that the start does not depend on how a model is spread.

    Raises:
        UserError: Inputs of experts' updates would be dropped, which PEFT's format cannot express; or the rank is beyond any layer's.
    """
    if lora.mlp and lora.dropout and model.config.n_expert:
        raise UserError(
            f"`lora_dropout` is 0 where `lora_mlp` updates experts, but got {lora.dropout}. Set it to 0, or turn `lora_mlp` off."
        )
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Experts) and any(lora.enabled(name))]
    highest = max((_highest_rank(layer) for _, layer in layers), default=lora.r)
    if lora.r > highest:
        raise UserError(f"`lora_r` is {lora.r}, but the update of no layer it is for can have a rank above {highest}. Lower it.")
    for name, plain in layers:
        enabled = lora.enabled(name)
        if isinstance(plain, Experts):
            layer = LoRAExperts(plain, lora.r, lora.alpha)
        else:
            sizes = model.config.qkv_sizes if len(enabled) == 3 else None
            layer = LoRALinear(plain, lora.r, lora.alpha, lora.dropout, sizes, enabled)
        device = next(layer.parameters(recurse=False)).device
        if device.type != "meta":
            layer.reset_parameters(torch.Generator(device).manual_seed(seed_of(seed, name)))
        model.set_submodule(name, layer)
    mark_only_lora_as_trainable(model)


def _highest_rank(layer: nn.Linear | Experts) -> int:
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


class GPT(base_model.GPT):
    """A `GPT` whose layers are wrapped as its config says.

    Args:
        config: With `lora_r` 0 nothing is wrapped.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.lora_r > 0:
            add_lora(self, LoRA(**{field.name: getattr(config, f"lora_{field.name}") for field in fields(LoRA)}))
            self.requires_grad_(True)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """Return a randomly initialised model of a known name, see `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))
