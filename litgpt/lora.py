"""Low-rank adaptation (arXiv:2106.09685) and its kin: freeze the model and learn small updates beside chosen linear layers.

rsLoRA (arXiv:2312.03732) scales updates otherwise, LoRA+ (arXiv:2402.12354) trains B faster than A, and DoRA (arXiv:2402.09353)
also learns how long each row of the updated weight is.
"""

import hashlib
import math
from copy import copy
from dataclasses import dataclass, fields, replace
from itertools import chain
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
NUMBER = int | float, "a number"
KINDS = {"r": (int, "an integer"), "alpha": NUMBER, "dropout": NUMBER, "targets": (str | None, "a text")}  # of options that are no switches
KINDS["plus_ratio"] = int | float | None, "a number"


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
    targets: str | None = None
    """"all-linear" turns on every switch above but `head`, which still decides about the head; None leaves all to them."""
    rslora: bool = False
    """Whether the update is scaled by alpha / sqrt(r) instead."""
    dora: bool = False
    """Whether the length of each updated row of a weight is learned apart from its direction."""
    plus_ratio: float | None = None
    """How many times the learning rate of A that of B is; by default they are equal."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (wanted, kind) = getattr(self, field.name), KINDS.get(field.name, (bool, "true or false"))
            is_flag = isinstance(value, bool)
            if not isinstance(value, wanted) or is_flag != (wanted is bool) or (isinstance(value, float) and not math.isfinite(value)):
                raise UserError(f"`lora_{field.name}` is {kind}, but got {value!r:.40}.")
        if self.r < 1:
            raise UserError(f"`lora_r` is the rank of the update and at least 1, but got {self.r}.")
        if self.alpha <= 0:
            raise UserError(f"`lora_alpha` scales the update and is a number above 0, but got {self.alpha}. Use twice the rank, say.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"`lora_dropout` is a probability below 1, but got {self.dropout}. Use 0 to drop nothing.")
        if self.plus_ratio is not None and self.plus_ratio <= 0:
            raise UserError(f"`lora_plus_ratio` multiplies a learning rate and is above 0, but got {self.plus_ratio}. Use 16, say.")
        if self.targets is not None:
            self._choose_all_linear()
        if not any((self.query, self.key, self.value, self.projection, self.mlp, self.head)):
            raise UserError(
                "All of `lora_query`, `lora_key`, `lora_value`, `lora_projection`, `lora_mlp` and `lora_head` are false. Turn one on."
            )

    def _choose_all_linear(self) -> None:
        if self.targets != "all-linear":
            raise UserError(f"`lora_targets` is 'all-linear' or left out, but got {self.targets!r:.40}. Single parts have switches.")
        for part in ("query", "value"):  # the others are false unless they are given
            if not getattr(self, part):
                raise UserError(f"`lora_targets` all-linear contradicts `lora_{part}` false. Leave one of them out.")
        for part in ("key", "projection", "mlp"):
            object.__setattr__(self, part, True)

    @property
    def scaling(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

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


# Layers


class LoRALinear(nn.Module):
    """A frozen linear layer and a trainable low-rank update of chosen row blocks, y = W x + s B A x with s = alpha / r.

    With DoRA the rows of W + s B A are then given the lengths of a trainable vector m, y = m (W + s B A) x / norm(W + s B A).

    Args:
        linear: The layer W, or any that has `in_features`, `out_features`, `weight`, `bias` and, if its weight is quantized, `dequantize`.
        r: The rank of each block's update.
        alpha: The update is scaled by alpha / r.
        dropout: How likely an input of A is dropped while training.
        sizes: The rows of each block (for a fused projection: those of q, k and v); by default one block.
        enabled: Which blocks get an update; by default all.
        dora: Whether the updated rows have trainable lengths.
    """

    def __init__(
        self,
        linear: nn.Module,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        sizes: list[int] | None = None,
        enabled: list[bool] | None = None,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.linear, self.r, self.scaling = linear, r, alpha / r
        self.sizes = sizes or [linear.out_features]
        self.enabled = enabled or [True] * len(self.sizes)
        self.dropout = Dropout(dropout)
        like = dict(device=device_of(linear), dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r * sum(self.enabled), linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(sum(self.updated_sizes), r, **like))
        self.lora_magnitude = nn.Parameter(torch.empty(sum(self.updated_sizes), **like)) if dora else None
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
        """Start from no update at all: A is uniform as a linear layer's weight, B is zero, and rows are as long as they are."""
        bound = 1 / math.sqrt(self.linear.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude is not None and not self.lora_magnitude.is_meta:
            self.lora_magnitude.data.copy_(self._norms())

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x)
        A, B = self.lora_A.to(x.dtype), self.spread() * self.scaling
        if self._may_be_fused(x):
            return _Updated.apply(x, None if dropped is x else dropped, A, B.to(x.dtype), self.linear)
        y = self.linear(x)
        if self.lora_magnitude is not None:
            longer = self.longer()
            plain = y if dropped is x else self.linear(dropped)
            plain = plain if self.linear.bias is None else plain - self.linear.bias.to(y.dtype)
            # 1 is added by `addcmul`, after rounding: what is learned would be lost in a bf16 number near 1
            y, B = torch.addcmul(y, plain, longer.to(y.dtype)), B * (1 + longer).unsqueeze(1)
        return y + F.linear(F.linear(dropped, A), B.to(x.dtype))

    def _may_be_fused(self, x: Tensor) -> bool:
        """Say whether `_Updated` may do it: it knows no derivatives of the layer's own weights, and compilers fuse better themselves."""
        if self.lora_magnitude is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not torch.is_autocast_enabled(x.device.type) and not any(p.requires_grad for p in self.linear.parameters())

    def longer(self) -> Tensor:
        """Return by how much the rows of W + s B A are made longer, (out,), as a share of their lengths: DoRA's m / norm - 1."""
        return self.over_all_rows(self.lora_magnitude / self._norms() - 1)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """Return the lengths of the updated rows of W + s B A, which DoRA takes for constants."""
        return self._updated_rows(norms_of_sum(full_weight(self.linear), self.lora_A, self.spread() * self.scaling))

    def _updated_rows(self, values: Tensor) -> Tensor:
        """Return those of the values of all rows that belong to rows with an update."""
        return torch.cat([rows for rows, enabled in zip(values.split(self.sizes), self.enabled, strict=True) if enabled])

    def magnitudes(self) -> Tensor:
        """Return the lengths of all rows of the updated weight, (out,): what is learned of those that are updated, else W's own."""
        return self.over_all_rows(self.lora_magnitude, row_norms(self.linear))

    def spread(self) -> Tensor:
        """Return B over the whole layer, (out, n r): each block's factor in its own rows and columns, zero elsewhere."""
        if len(self.sizes) == 1:
            return self.lora_B
        return self.over_all_rows(torch.block_diag(*self.lora_B.split(self.updated_sizes)))

    def over_all_rows(self, values: Tensor, others: Tensor | None = None) -> Tensor:
        """Return values of the updated rows (R, ...) as values of all rows (out, ...), which are zero or `others` elsewhere."""
        if all(self.enabled):
            return values
        others = values.new_zeros(self.out_features, *values.shape[1:]) if others is None else others
        blocks = iter(values.split(self.updated_sizes))
        parts = zip(others.split(self.sizes), self.enabled, strict=True)
        return torch.cat([next(blocks) if enabled else rows for rows, enabled in parts])

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain linear layer that computes the same, in the weight's own dtype.

        Raises:
            UserError: The weight is quantized, so that adding a small update to it would lose most of that.
        """
        _check_is_whole(self.linear, "weight")
        weight, bias = self.linear.weight, self.linear.bias
        magnitudes = None if self.lora_magnitude is None else self.magnitudes()
        plain = base_model.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        merged = updated(weight, self.lora_A, self.spread(), self.scaling, magnitudes)
        plain.weight = nn.Parameter(merged, requires_grad=False)
        plain.bias = bias
        return plain

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the weights of a plain linear layer under their own names."""
        for name in ("weight", "bias"):
            if (key := prefix + name) in state_dict:
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(key)
                if name == "weight" and self.lora_magnitude is not None:
                    norms = torch.linalg.vector_norm(state_dict[f"{prefix}linear.weight"].float(), dim=1)
                    state_dict.setdefault(f"{prefix}lora_magnitude", self._updated_rows(norms))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Dropout(nn.Dropout):
    """Dropout that takes a third of the time of torch's own on a CPU, and keeps one byte of each input for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return super().forward(x) if x.device.type != "cpu" or torch.compiler.is_compiling() else _Dropped.apply(x, self.p)


class _Dropped(torch.autograd.Function):
    """Draws 16 bits for each input, which is enough for a probability, and fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= min(round(p * 2**16), 2**16 - 1) - 2**15
        kept, ctx.scale = kept.view(torch.uint8), 1 / (1 - p)  # bytes are multiplied faster than truths
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.scale), None


class _Updated(torch.autograd.Function):
    """A frozen layer's output and its update, added in place; keeps no more than the update's input and hidden values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, A: Tensor, B: Tensor, linear: nn.Module) -> Tensor:
        seen, y = x if dropped is None else dropped, linear(x)
        hidden = F.linear(seen, A)  # (..., n r)
        ctx.save_for_backward(seen, hidden, A, B)
        ctx.linear, ctx.same = linear, dropped is None
        y.view(-1, y.size(-1)).addmm_(hidden.view(-1, hidden.size(-1)), B.T)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, hidden, A, B = ctx.saved_tensors
        rows = grad.reshape(-1, grad.size(-1))  # (N, out)
        grad_hidden, grad_x, grad_seen = rows @ B, None, None
        grad_A = grad_hidden.T @ seen.reshape(-1, seen.size(-1))
        grad_B = (hidden.view(-1, hidden.size(-1)).T @ rows).T
        if ctx.needs_input_grad[0]:
            grad_x = rows @ full_weight(ctx.linear, rows.dtype)
            if ctx.same:
                grad_x.addmm_(grad_hidden, A)
            else:
                grad_seen = (grad_hidden @ A).view(seen.shape)
            grad_x = grad_x.view(seen.shape)
        return grad_x, grad_seen, grad_A, grad_B, None


class LoRAExperts(Experts):
    """Frozen experts and trainable low-rank updates of each one's two matrices, y = W x + s B A x with s = alpha / r.

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
        """Return plain experts that compute the same, in the weights' own dtype.

        Raises:
            UserError: See `LoRALinear.merged`.
        """
        _check_is_whole(self.base, "gate_up")
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


def updated(weight: Tensor, A: Tensor, B: Tensor, scale: float, magnitudes: Tensor | None = None) -> Tensor:
    """Return W + scale * B A in the weight's dtype, of one matrix or of a stack, of which one at a time is there in fp32.

    Args:
        weight: W, (out, in) or (E, out, in).
        A: (r, in) or (E, r, in)
        B: (out, r) or (E, out, r)
        scale: See above.
        magnitudes: The lengths that the rows of a matrix are then given, (out,); by default they keep theirs.
    """
    if weight.ndim == 3:
        stack = torch.empty_like(weight)
        for e in range(len(stack)):
            stack[e] = updated(weight[e], A[e], B[e], scale)
        return stack
    wide = weight.float() + scale * (B.float() @ A.float()).to(weight.device)
    if magnitudes is not None:
        lengths = torch.linalg.vector_norm(wide, dim=1).clamp_(min=1e-30)  # a row may be zero
        wide *= (magnitudes.to(wide) / lengths).unsqueeze(1)
    return wide.to(weight.dtype)


def full_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return a linear layer's weight, (out, in), in a type that can be multiplied; by default as it is stored or was quantized."""
    return layer.dequantize(dtype) if hasattr(layer, "dequantize") else layer.weight.to(dtype)


def _check_is_whole(layer: nn.Module, leaf: str) -> None:
    if leaf not in layer._parameters:  # what it has is made of fewer bits
        raise UserError("Updates cannot be added to quantized weights. Load the base model without `quantize` and merge them there.")


def norms_of_sum(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return the lengths of the rows of W + B A, (out,), without making that matrix; not quite 0, for a row may be zero."""
    weight = weight.to(A.device)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, A.dtype)).to(A.dtype).square()
    products = F.linear(weight, A.to(weight.dtype)).to(A.dtype)  # W A^T, (out, r)
    return (squares + ((2 * products + B @ (A @ A.T)) * B).sum(1)).clamp(min=torch.finfo(A.dtype).tiny).sqrt()


def device_of(layer: nn.Module) -> torch.device:
    """Return where a layer is, without asking for its weight, which may have to be made."""
    return next(chain(layer.parameters(), layer.buffers())).device


def row_norms(layer: nn.Module) -> Tensor:
    """Return the lengths of the rows of a linear layer's weight, (out,)."""
    return torch.linalg.vector_norm(full_weight(layer).detach().float(), dim=1)


# Models


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
    if lora.mlp and lora.dropout and model.config.n_expert:
        raise UserError(
            f"`lora_dropout` is 0 where `lora_mlp` updates experts, but got {lora.dropout}. Set it to 0, or turn `lora_mlp` off."
        )
    if lora.mlp and lora.dora and model.config.n_expert:
        raise UserError(
            "`lora_dora` cannot be used where `lora_mlp` updates experts, since PEFT has no DoRA of them. Turn one of them off."
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
        device = next(layer.parameters(recurse=False)).device
        if device.type != "meta":
            layer.reset_parameters(torch.Generator(device).manual_seed(seed_of(seed, name)))
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
            add_lora(self, LoRA(**{field.name: getattr(config, f"lora_{field.name}") for field in fields(LoRA)}))
            self.requires_grad_(True)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """Return a randomly initialised model of a known name, see `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))
