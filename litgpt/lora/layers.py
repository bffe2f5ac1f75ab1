"""The layers that updates stand beside: linear ones, and experts; and the products of the two factors of an update."""

import math
from collections.abc import Iterable
from copy import copy
from itertools import chain
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt.errors import UserError
from litgpt.experts import Experts, Rows, grouped_linear
from litgpt.model import Linear


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
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.sizes = sizes or [self.out_features]
        self.enabled = enabled or [True] * len(self.sizes)
        self.dropout = Dropout(dropout)
        like = dict(device=device_of(linear), dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r * sum(self.enabled), self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(sum(self.updated_sizes), r, **like))
        self.lora_magnitude = nn.Parameter(torch.empty(sum(self.updated_sizes), **like)) if dora else None
        self.reset_parameters()

    @property
    def updated_sizes(self) -> list[int]:
        """The rows of the blocks that get an update."""
        return [size for size, enabled in zip(self.sizes, self.enabled, strict=True) if enabled]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start from no update at all: A is uniform as a linear layer's weight, B is zero, and rows are as long as they are."""
        draw_uniform(self.lora_A, self.in_features, generator)
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
        plain = Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        merged = updated(weight, self.lora_A, self.spread(), self.scaling, magnitudes)
        plain.weight = nn.Parameter(merged, requires_grad=False)
        plain.bias = bias
        return plain

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the weights of a plain linear layer under their own names."""
        take_inside(state_dict, prefix, "linear", ("weight", "bias"))
        if self.lora_magnitude is not None and (key := f"{prefix}linear.weight") in state_dict:
            norms = torch.linalg.vector_norm(state_dict[key].float(), dim=1)
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
            draw_uniform(A, A.size(2), generator)
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
        take_inside(state_dict, prefix, "base", self.base._parameters)
        super()._load_from_state_dict(state_dict, prefix, *args)


def take_inside(state_dict: dict[str, Tensor], prefix: str, inside: str, leaves: Iterable[str]) -> None:
    """Rename what belongs to a layer of this prefix to what it is called now that the layer is inside another one."""
    for leaf in leaves:
        if (key := prefix + leaf) in state_dict:
            state_dict[f"{prefix}{inside}.{leaf}"] = state_dict.pop(key)


def draw_uniform(factor: nn.Parameter, width: int, generator: torch.Generator | None) -> None:
    """Fill a factor as a linear layer of so many inputs is filled; with numbers of the CPU, so that all devices begin with the same."""
    if not factor.is_meta:
        bound = 1 / math.sqrt(width)
        factor.data.copy_(torch.empty(factor.shape, device="cpu").uniform_(-bound, bound, generator=generator))


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
