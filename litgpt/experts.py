"""Mixture of experts: which experts each token goes to, and the products of all of them at once."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt.config import Config

EXACT = ".correction"  # how the names of buffers end that keep their type, whatever the weights are cast to

# The router


def route(logits: Tensor, config: Config, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the experts of each token, (N, k), and how much each of them counts, (N, k) in fp32 (or in float64, if the logits are).

    Softmax scores as in Mixtral (arXiv:2401.04088), or DeepSeek-V3's sigmoids (arXiv:2412.19437, section 2.1.2).

    Args:
        logits: Of each token for each expert, (N, E).
        config: The architecture.
        correction: Added to the scores for the choice alone, (E,).
    """
    k, wide = config.n_expert_per_token, torch.promote_types(logits.dtype, torch.float32)
    if config.router_bias:  # gpt-oss compares logits: two of them may differ where their scores do not
        chosen, indices = logits.topk(k)
        return indices, chosen.softmax(-1, dtype=wide)
    if config.expert_scores == "softmax":
        weights, indices = logits.softmax(-1, dtype=wide).topk(k)
    else:
        scores = logits.to(wide).sigmoid()
        choice = scores if correction is None else scores + correction
        if config.n_expert_groups is not None:
            choice = within_best_groups(choice, config)
        indices = choice.topk(k, sorted=False).indices
        weights = scores.gather(1, indices)
    if config.norm_topk_prob:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total if config.expert_scores == "softmax" else total + 1e-20)  # sigmoids may all be zero
    return indices, weights if config.routed_scaling_factor == 1 else weights * config.routed_scaling_factor


def within_best_groups(scores: Tensor, config: Config) -> Tensor:
    """Return the scores (N, E) with -inf in all groups but the best: those whose own best few sum to the most."""
    grouped = scores.unflatten(1, (config.n_expert_groups, -1))  # (N, G, E / G)
    totals = grouped.topk(config.n_topk_scores_per_group).values.sum(-1)
    best = totals.topk(config.n_topk_groups, sorted=False).indices
    left_out = torch.ones_like(totals, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(left_out.unsqueeze(-1), -math.inf).flatten(1)


def load_balancing_loss(logits: Sequence[Tensor], n_expert: int, k: int, mask: Tensor | None = None) -> Tensor:
    """Return how unevenly tokens are spread (arXiv:2101.03961, equations 4 to 6, over all layers at once); k if perfectly evenly.

    Args:
        logits: The router's of each layer, (N, E).
        n_expert: How many experts a layer has.
        k: How many of them a token goes to.
        mask: N values, 0 where a token is padding.
    """
    counts, n_tokens = 0, 0
    for layer in logits:
        real = layer.new_ones(layer.size(0), dtype=torch.float32) if mask is None else mask.flatten().float()
        scores = layer.softmax(-1, dtype=torch.float32)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
        counts = counts + real @ torch.cat((chosen, scores), 1)  # (2 E,)
        n_tokens = n_tokens + real.sum()
    shares, means = (counts / n_tokens.clamp(min=1)).split(n_expert)
    return n_expert * (shares @ means)


@contextmanager
def kept_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep in a list what the routers yield meanwhile, layer by layer; leave before the backward pass, which may compute layers again."""
    kept: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, LLaMAMoE)]
    for layer in layers:
        layer.kept_logits = kept
    try:
        yield kept
    finally:
        for layer in layers:
            layer.kept_logits = None


# Grouped products


class Rows(NamedTuple):
    """The S = N * k pairs of a token and one of its experts, sorted by expert."""

    order: Tensor  # (S,), which pair each row is, counted token by token
    tokens: Tensor  # (S,), the token of each row
    experts: Tensor  # (S,), the expert of each row
    places: Tensor  # (N, k), the row of each pair
    ends: Tensor  # (E,), int32, how many rows the experts up to this one have


def sort_by_expert(indices: Tensor, n_expert: int) -> Rows:
    """Return the rows of the experts that each token goes to, (N, k). Nothing here waits for the device."""
    experts, order = indices.flatten().sort(stable=True)
    count = torch.arange(max(len(order), n_expert), device=order.device)
    places = torch.empty_like(order).scatter_(0, order, count[: len(order)]).view_as(indices)
    ends = torch.searchsorted(experts, count[:n_expert], right=True, out_int32=True)
    return Rows(order, order // indices.size(1), experts, places, ends)


def grouped_linear(x: Tensor, weight: Tensor, rows: Rows, spread: bool = False) -> Tensor:
    """Return the rows, each times its expert's matrix, (S, out).

    Args:
        x: The rows, (S, in); or the tokens, (N, in), if they are to be `spread` to their rows.
        weight: The experts' matrices, (E, out, in).
        rows: Which rows each expert has.
        spread: Whether x holds tokens.
    """
    if not torch.is_grad_enabled():  # an autograd function takes as long as a small product
        return _products(x.index_select(0, rows.tokens) if spread else x, weight.mT, rows.ends)
    return _GroupedLinear.apply(x, weight, rows.ends, rows.tokens if spread else None, rows.places if spread else None)


class _GroupedLinear(torch.autograd.Function):
    """Keeps tokens rather than rows for the backward pass, of which there are k times as many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, tokens: Tensor | None, places: Tensor | None) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, ends, tokens, places)
        return _products(x if tokens is None else x.index_select(0, tokens), weight.mT, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends, tokens, places = ctx.saved_tensors
        grad, grad_x, grad_weight = grad.contiguous(), None, None
        if weight is not None:
            grad_x = _products(grad, weight, ends)
            grad_x = grad_x if places is None else _row_sums(grad_x, places)
        if x is not None:
            grad_weight = _products(grad.mT, x if tokens is None else x.index_select(0, tokens), ends)
        return grad_x, grad_weight, None, None, None


def sum_of_rows(x: Tensor, rows: Rows) -> Tensor:
    """Return the sum of each token's rows, (N, C) from (S, C)."""
    return _SumOfRows.apply(x, rows.tokens, rows.places) if torch.is_grad_enabled() else _row_sums(x, rows.places)


class _SumOfRows(torch.autograd.Function):
    """Its backward pass copies rows rather than adding them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _row_sums(x, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def _row_sums(x: Tensor, places: Tensor) -> Tensor:
    return F.embedding_bag(places, x, mode="sum") if len(x) else x  # a third of the time of indexing and summing


def _products(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return rows (S, K) times their groups' matrices (G, K, M), (S, M); or columns (K, S) times rows (S, M) of each group, (G, K, M)."""
    if torch.compiler.is_compiling() and not (a.is_cuda and a.dtype == torch.bfloat16):
        return _opaque_products(a, b, ends)  # the compiler knows the kernel in bf16 only
    width = a.size(1) if b.dim() == 3 else a.size(0)
    takes = a.dtype != torch.float64 and all(size * a.element_size() % 16 == 0 for size in (width, b.size(-1)))
    few = a.is_cpu and b.dim() == 3 and b.stride(-1) != 1 and len(a) <= len(b) * (FEW if a.dtype == torch.bfloat16 else 0.25)
    return F.grouped_mm(a, b, offs=ends) if takes and not few else _products_one_by_one(a, b, ends)


FEW = 16  # so many rows of a group or fewer, a CPU multiplies faster in bf16 by `mv`, or with the matrix on the left


def _products_one_by_one(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The same as `_products`, in any dtype and of any size, group by group that has rows."""
    y = a.new_empty(a.size(0), b.size(2)) if b.dim() == 3 else a.new_zeros(len(ends), a.size(0), b.size(1))
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end == start:
            continue
        if b.dim() == 2:
            torch.mm(a[:, start:end], b[start:end], out=y[group])
        elif end - start == 1:
            torch.mv(b[group].t(), a[start], out=y[start])
        elif end - start <= FEW and a.dtype == torch.bfloat16:
            y[start:end] = (b[group].t() @ a[start:end].t()).t()
        else:
            torch.mm(a[start:end], b[group], out=y[start:end])
        start = end
    return y


@torch.library.custom_op("litgpt::grouped_products", mutates_args=())
def _opaque_products(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return _products(a, b, ends)


@_opaque_products.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(a.size(0), b.size(2)) if b.dim() == 3 else a.new_empty(ends.size(0), a.size(0), b.size(1))


# The layer


class Experts(nn.Module):
    """Many gated MLPs whose matrices are stacked. A subclass may put other products in the place of `up` and `down`.

    Args:
        config: The architecture.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        n, inner, outer = config.n_expert, config.moe_intermediate_size, config.n_embd
        self.n_expert, self.limit = n, config.swiglu_limit
        self.gate_up = nn.Parameter(torch.empty(n, 2 * inner, outer))  # rows: all of the gate, then all of what it opens
        self.down = nn.Parameter(torch.empty(n, outer, inner))
        self.gate_up_bias = nn.Parameter(torch.empty(n, 2 * inner)) if config.expert_bias else None
        self.down_bias = nn.Parameter(torch.empty(n, outer)) if config.expert_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a linear layer of each expert would: uniform within 1 / sqrt(inputs)."""
        for weight, bias in ((self.gate_up, self.gate_up_bias), (self.down, self.down_bias)):
            bound = 1 / math.sqrt(weight.size(2))
            for parameter in (weight,) if bias is None else (weight, bias):
                nn.init.uniform_(parameter, -bound, bound)

    def project_up(self, x: Tensor, rows: Rows) -> Tensor:
        """Return each row's gate and what it opens, (S, 2 I), of tokens (N, C)."""
        y = grouped_linear(x, self.gate_up.to(x.dtype), rows, spread=True)
        return y if self.gate_up_bias is None else y + F.embedding(rows.experts, self.gate_up_bias.to(x.dtype))

    def project_down(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what each row (S, I) yields, (S, C), without the bias."""
        return grouped_linear(x, self.down.to(x.dtype), rows)

    def mixed_bias(self, indices: Tensor, weights: Tensor) -> Tensor | None:
        """Return what the biases of each token's experts yield together, (N, C)."""
        if self.down_bias is None:
            return None
        shares = weights.new_zeros(len(weights), self.n_expert).scatter(1, indices, weights)  # (N, E)
        return shares.to(self.down_bias.dtype) @ self.down_bias

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of what each token's experts yield, (N, C).

        Args:
            x: The tokens, (N, C).
            indices: The experts of each, (N, k), all different.
            weights: How much each counts, (N, k).
        """
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        rows = sort_by_expert(indices, self.n_expert)
        inner = gated(self.project_up(x, rows), weights.flatten().index_select(0, rows.order), self.limit)  # (S, I)
        y = sum_of_rows(self.project_down(inner, rows), rows)
        bias = self.mixed_bias(indices, weights)
        return y if bias is None else y + bias.to(y.dtype)


def gated(x: Tensor, weights: Tensor, limit: float | None) -> Tensor:
    """Return the inside of the MLPs, (S, I) from (S, 2 I), times each row's weight (S,).

    Weighted here, rows of (S, C) need not be kept for the weights' gradient. SwiGLU (arXiv:2002.05202); with a limit gpt-oss's
    kind: clamped, the gate sharper by SHARPNESS and what it opens shifted by 1.
    """
    return _Gated.apply(x, weights, limit) if torch.is_grad_enabled() else _gate(x, weights, limit)


def _gate(x: Tensor, weights: Tensor, limit: float | None) -> Tensor:
    gate, up, sharpness = _gate_parts(x, limit)
    return F.silu(gate).mul_(up).mul_(_column(weights, sharpness, x.dtype))


def _column(weights: Tensor, sharpness: float, dtype: torch.dtype) -> Tensor:
    return (weights if sharpness == 1 else weights / sharpness).to(dtype).unsqueeze(1)


class _Gated(torch.autograd.Function):
    """Keeps its input alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.limit = limit
        return _gate(x, weights, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weights = ctx.saved_tensors
        gate, up, sharpness = _gate_parts(x, ctx.limit)
        opened = F.silu(gate)
        weighted = grad * _column(weights, sharpness, grad.dtype)
        if torch.compiler.is_compiling():  # it fuses what is written plainly, and takes no views to write to
            grad_x = torch.cat((torch.ops.aten.silu_backward(weighted * up, gate), weighted * opened), 1)
            grad_gate, grad_up = grad_x.chunk(2, dim=1)
        else:
            grad_x = torch.empty_like(x)
            grad_gate, grad_up = grad_x.chunk(2, dim=1)
            torch.mul(weighted, opened, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=grad_gate)
        grad_weights = opened.mul_(up).mul_(grad).sum(1, dtype=weights.dtype).div_(sharpness)
        if ctx.limit is not None:
            raw_gate, raw_up = x.chunk(2, dim=1)
            grad_gate.mul_(SHARPNESS).masked_fill_(raw_gate > ctx.limit, 0)
            grad_up.masked_fill_(raw_up.abs() > ctx.limit, 0)
        return grad_x, grad_weights, None


SHARPNESS = 1.702  # then the gate is about a GELU (arXiv:1606.08415)


def _gate_parts(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor, float]:
    """Return what `silu` sees, what its result is multiplied by, and what it is divided by."""
    gate, up = x.chunk(2, dim=1)
    if limit is None:
        return gate, up, 1.0
    return gate.clamp(max=limit) * SHARPNESS, up.clamp(-limit, limit) + 1, SHARPNESS


class WideLinear(nn.Linear):
    """A linear layer that computes in fp32, whatever its weight's dtype is: DeepSeek's router."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


class LLaMAMoE(nn.Module):
    """An MLP of which each token uses the few parts that a router chooses, and perhaps a part that all tokens use.

    Args:
        config: The architecture.
    """

    shared_class: type[nn.Module]  # a gated MLP made of (config, its inner width), which the model's file sets

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        is_sigmoid = config.expert_scores == "sigmoid"
        self.gate = (WideLinear if is_sigmoid else nn.Linear)(config.n_embd, config.n_expert, bias=config.router_bias)
        self.register_buffer("correction", torch.zeros(config.n_expert) if is_sigmoid else None)
        self.experts = Experts(config)
        width = config.shared_intermediate_size
        self.shared = None if width is None else self.shared_class(config, width)
        self.shared_gate = nn.Linear(config.n_embd, 1, bias=False) if config.shared_expert_gate else None
        self.kept_logits: list[Tensor] | None = None  # see `kept_router_logits`

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.size(-1))  # (N, C)
        logits = self.gate(tokens)  # (N, E)
        if self.kept_logits is not None:
            self.kept_logits.append(logits)
        y = self.experts(tokens, *route(logits, self.config, self.correction))
        if self.shared is not None:
            shared = self.shared(tokens)
            y = y + (shared if self.shared_gate is None else self.shared_gate(tokens).sigmoid() * shared)
        return y.view(x.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> "LLaMAMoE":
        """Keep the correction in fp32: a rounded one chooses other experts."""
        before = self.correction
        super()._apply(fn, recurse)
        if before is not None and self.correction.dtype != before.dtype:
            self.correction = before.to(self.correction.device)
        return self
