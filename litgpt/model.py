"""The model definition, read from top to bottom: GPT, its blocks, the mixers a block may have, the MLPs, the norms.

Everything a layer needs to know about the call (positions, masks, cache) is in a `Context`; nothing here knows of files or training.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litgpt.attention import Context, Segments, attend, new_context
from litgpt.cache import Cache, KeyValues, Latents, Span, State
from litgpt.config import Config
from litgpt.experts import LLaMAMoE, kept_router_logits, load_balancing_loss
from litgpt.loss import IGNORED, Loss, token_nll, total_nll
from litgpt.recurrent import GatedDelta, ShortConvolution
from litgpt.rope import Rope, rotated

LATENT_NORM_EPS = 1e-6  # of the norms inside latent attention, whatever the other norms have


class GPT(nn.Module):
    """A decoder-only transformer.

    Args:
        config: The architecture.
    """

    block_class: type["Block"]  # set below; variants put their own in its place

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                h=nn.ModuleList(self.block_class(config, i) for i in range(config.n_layer)),
                ln_f=new_norm(config),
            )
        )
        if config.learned_positions:
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.rope = Rope(config)
        self.n_recomputed = 0  # so many blocks are computed again in their backward pass instead of keeping what they made
        self.expert_balance = 0.0  # how much `Loss.aux` makes of an uneven spread of tokens over experts
        self.tie()

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """Return a randomly initialised model of a known name, see `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))

    def tie(self) -> None:
        """Let the head use the embedding's matrix, if the config says so. Call it again after making a meta model real."""
        if self.config.tie_embeddings:
            getattr(self.lm_head, "linear", self.lm_head).weight = self.transformer.wte.weight  # a wrapped head keeps the layer inside

    def new_cache(self, rows: int, length: int, chunk: int | None = None, rewind: int = 0) -> Cache:
        """Return an empty memory of `rows` sequences.

        Args:
            rows: How many sequences fit.
            length: How many tokens fit in each.
            chunk: The most tokens that one call may add to a row; by default all. A smaller one makes sliding windows smaller.
            rewind: How many tokens `Cache.truncate` can always take back.
        """
        chunk, weight = chunk or length, self.transformer.wte.weight
        states = [block.new_state(rows, length, chunk, rewind, weight.dtype, weight.device) for block in self.transformer.h]
        return Cache(states, rows, length, chunk, rewind, weight.device)

    def forward(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        cache: Cache | Span | None = None,
        targets: Tensor | None = None,
        segments: Segments | None = None,
        output: str = "logits",
        select: str | Tensor | None = None,
    ) -> Tensor | Loss:
        """Return logits (B, T, V), or what `output` names.

        Args:
            idx: Token ids, (B, T).
            positions: Of each token, (T,) or (B, T), -1 is padding; 0, 1, ... by default. Not with a cache, which knows them.
            cache: Continues all its rows by T tokens each; a `Cache.span` chooses rows and how many tokens each gets.
            targets: The id that follows each token, (B, T), -100 does not count. Makes the result a `Loss`.
            segments: The sequences packed into idx, (1, N); without it a row is one sequence.
            output: "logits", "hidden" (the final norm's output) or, with targets, "token_nll" (B, T).
            select: Which tokens reach the head: "last" of each row or segment, or indices (n,) into the B * T tokens; then (n, V).

        Raises:
            ValueError: `positions` or `segments` beside a cache, which knows both; or an unknown `output` or `select`.
        """
        if output not in ("logits", "hidden", "token_nll") or (output == "token_nll" and targets is None):
            raise ValueError(f"`output` is 'logits', 'hidden' or, with targets, 'token_nll', but got {output!r}.")
        if isinstance(select, str) and select != "last":
            raise ValueError(f"`select` is 'last' or the indices of tokens, but got {select!r}.")
        if cache is not None and (positions is not None or segments is not None):
            raise ValueError("A cache knows the positions of its rows: pass neither `positions` nor `segments` beside it.")
        span = cache.span([idx.size(1)] * idx.size(0)) if isinstance(cache, Cache) else cache
        balanced = self.expert_balance > 0 and targets is not None and self.config.n_expert > 0
        with kept_router_logits(self) if balanced else nullcontext([]) as router_logits:
            x = self._blocks(idx, positions, segments, span)  # (B, T, C)
        if select is not None:
            x = x.flatten(0, 1)[last_tokens(idx, positions, segments, span) if isinstance(select, str) else select]  # (n, C)
        x = self.transformer.ln_f(x)
        if output == "hidden":
            return x
        if targets is None:
            return self._finished(self.lm_head(x))
        if output == "token_nll":
            return token_nll(self.lm_head, x, targets, finish=self._finished)
        config, real = self.config, None if positions is None else (positions >= 0).expand_as(idx)
        unevenness = load_balancing_loss(router_logits, config.n_expert, config.n_expert_per_token, real) if balanced else 0.0
        nll = total_nll(self.lm_head, x, targets, finish=self._finished)
        return Loss(nll, (targets != IGNORED).sum(), self.expert_balance * unevenness)

    def _finished(self, logits: Tensor) -> Tensor:
        """Return what the head's output has to become: scaled, and soft-capped."""
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.final_logit_softcapping
        return logits if cap is None else (logits / cap).tanh() * cap

    def _embedded(self, idx: Tensor) -> Tensor:
        x, scale = self.transformer.wte(idx), self.config.scale_embeddings
        if scale is True:
            return x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)  # rounded to the type, as the models were trained
        return x if scale is False else x * scale

    def _blocks(self, idx: Tensor, positions: Tensor | None, segments: Segments | None, span: Span | None) -> Tensor:
        x = self._embedded(idx)
        kind = x.device.type
        pairs = zip(self.config.windows, self.config.mixers, strict=True)
        windows = {window for window, mixer in pairs if mixer in ("attention", "latent")}
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        context = new_context(idx, positions, segments, span, windows, self.rope, dtype)
        if self.config.learned_positions:
            x = x + self.transformer.wpe(context.positions.clamp(min=0))
        states = [None] * self.config.n_layer if span is None else span.cache.states
        for i, (block, state) in enumerate(zip(self.transformer.h, states, strict=True)):
            if i < self.n_recomputed and torch.is_grad_enabled():
                x = checkpoint(block, x, context, state, use_reentrant=False)
            else:
                x = block(x, context, state)
        if span is not None:
            span.commit()
        return x


def last_tokens(idx: Tensor, positions: Tensor | None, segments: Segments | None, span: Span | None) -> Tensor:
    """Return where, among the B * T tokens, the last one of each row or segment stands."""
    if span is not None:
        return span.last()
    if segments is not None:
        return segments.ends - 1
    places = torch.arange(idx.numel(), device=idx.device).view_as(idx)
    return (places if positions is None else torch.where(positions < 0, -1, places)).amax(1)


class Block(nn.Module):
    """One layer: a mixer and an MLP, each of which adds to the residual stream.

    One after the other,  x = x + attn(norm_1(x));  x = x + mlp(norm_2(x)),
    or side by side,      x = x + attn(norm_1(x)) + mlp(norm_2(x)),  where the MLP may read norm_1(x) instead.
    What they add may be normalised (`post_attention_norm`, `post_mlp_norm`) and scaled.

    Args:
        config: The architecture.
        i: Which layer this is, from 0.
    """

    mixers: dict[str, type[nn.Module]]  # set below; variants put their own in its place

    def __init__(self, config: Config, i: int) -> None:
        super().__init__()
        self.parallel, self.shared, self.scale = config.parallel_residual, config.shared_attention_norm, config.residual_scale
        self.norm_1 = new_norm(config, config.norm_1)
        self.attn = self.mixers[config.mixers[i]](config, i)
        self.post_attention_norm = new_norm(config, config.post_attention_norm)
        self.norm_2 = new_norm(config, config.norm_2 and not config.shared_attention_norm)
        self.mlp = MLPS[mlp_class_name(config, i)](config)
        self.post_mlp_norm = new_norm(config, config.post_mlp_norm)

    def new_state(self, rows: int, length: int, chunk: int, rewind: int, dtype: torch.dtype, device: torch.device) -> State:
        """Return the empty memory of this layer's mixer."""
        return self.attn.new_state(rows, length, chunk, rewind, dtype, device)

    def forward(self, x: Tensor, context: Context, state: State | None = None) -> Tensor:
        normed = self.norm_1(x)
        attended = self._added(x, self.post_attention_norm(self.attn(normed, context, state)))  # (B, T, C)
        if not self.shared:
            normed = self.norm_2(x if self.parallel else attended)
        return self._added(attended, self.post_mlp_norm(self.mlp(normed)))

    def _added(self, x: Tensor, update: Tensor) -> Tensor:
        return x + (update if self.scale == 1 else update * self.scale)


class CausalSelfAttention(nn.Module):
    """Attention to the tokens before, within a window if the layer has one; several query heads may share keys and values.

    `qkv` yields [all q | all k | all v]. How many heads those are its width says, so that a slice of the heads needs no other class.
    """

    def __init__(self, config: Config, i: int) -> None:
        super().__init__()
        self.window, self.head_size = config.windows[i], config.head_size
        self.turns, self.interleave = config.turns[i], config.rope_interleave
        self.scale, self.softcap, self.clip = config.softmax_scale, config.attention_logit_softcapping, config.clip_qkv
        self.shares = config.n_head // config.n_query_groups  # query heads for each key head
        self.qkv = Linear(config.n_embd, sum(config.qkv_sizes), bias=config.attn_bias)
        self.proj = Linear(config.qkv_sizes[0], config.n_embd, bias=config.attn_proj_bias)
        if config.norm_qk:
            self.norm_q, self.norm_k = (new_head_norm(config, heads) for heads in (config.n_head, config.n_query_groups))
            self.flat = config.norm_qk_type == "olmo2"  # the norm sees all heads at once
        else:
            self.norm_q = None
        if config.attention_gate:
            self.gate = Linear(config.n_embd, config.qkv_sizes[0], bias=config.attn_bias)
        else:
            self.gate = None
        self.sinks = nn.Parameter(torch.zeros(config.n_head)) if config.attention_sinks else None

    def new_state(self, rows: int, length: int, chunk: int, rewind: int, dtype: torch.dtype, device: torch.device) -> KeyValues:
        """Return the empty keys and values of this layer."""
        groups = self.qkv.out_features // self.head_size // (self.shares + 2)
        return KeyValues.zeros(rows, groups, length, max(chunk, rewind), self.head_size, self.window, dtype, device)

    def forward(self, x: Tensor, context: Context, state: KeyValues | None = None) -> Tensor:
        q, k, v = self.heads(x, context.rotations[self.turns])
        if context.query_scale is not None:
            q = q * context.query_scale
        y = self.gathered(q, k, v, context, state).flatten(2)  # (B, T, H D)
        return self.proj(y if self.gate is None else y * self.gate(x).sigmoid())  # (B, T, C)

    def heads(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H, D), keys and values (B, T, G, D) of tokens (B, T, C), turned unless `rotation` is None."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_size))  # (B, T, H + 2 G, D)
        groups = heads.size(2) // (self.shares + 2)
        turning, v = heads.split((heads.size(2) - groups, groups), dim=2)
        if self.norm_q is not None:
            turning = torch.cat(self._normed(*turning.split((self.shares * groups, groups), dim=2)), dim=2)
        if self.clip is not None:
            turning, v = turning.clamp(-self.clip, self.clip), v.clamp(-self.clip, self.clip)
        if rotation is not None:
            turning = rotated(turning, rotation, self.interleave)
            v = v.contiguous() if torch.is_grad_enabled() else v  # a view would keep all of qkv for the backward pass
        q, k = turning.split((self.shares * groups, groups), dim=2)
        return q, k, v

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: KeyValues | None) -> Tensor:
        """Return what queries gather from the keys they see, (B, T, H, D). Adapter adds what they gather from its prefix."""
        return attend(q, k, v, self.window, context, state, self.scale, self.softcap, self.sinks)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.flat:
            return tuple(norm(x.flatten(2)).view_as(x) for norm, x in ((self.norm_q, q), (self.norm_k, k)))
        return self.norm_q(q), self.norm_k(k)


class LatentAttention(nn.Module):
    """Attention whose cache holds, for each token, one latent and one rotated key that all heads share (arXiv:2405.04434).

    `kv_b` makes a head's keys and values from the latent. A cached call over few tokens leaves the latents as they are: it multiplies
    queries by the part of `kv_b` that makes keys, looks at the latents with one key head for all, and multiplies what it gathers by the
    part that makes values. How many heads there are the width of `q_b` and `kv_b` says.

    Args:
        config: The architecture; `latent_attention` names the sizes.
        i: Which layer this is, from 0.
    """

    def __init__(self, config: Config, i: int) -> None:
        super().__init__()
        sizes = config.latent_attention
        assert sizes is not None
        self.window, self.turns, self.interleave = config.windows[i], config.turns[i], config.rope_interleave
        self.rank, self.turning = sizes["kv_lora_rank"], sizes["qk_rope_head_dim"]
        self.still, self.value_size = sizes["qk_nope_head_dim"], sizes["v_head_dim"]  # still: the features of a key that do not turn
        self.scale = config.attention_scale or latent_scale(config.head_size, config.rope_adjustments)
        q_rank, width = sizes["q_lora_rank"], config.n_head * config.head_size
        if q_rank is None:
            self.q = Linear(config.n_embd, width, bias=False)
        else:
            self.q = None
            self.q_a = Linear(config.n_embd, q_rank, bias=config.attn_bias)
            self.q_a_norm = RMSNorm(q_rank, LATENT_NORM_EPS)
            self.q_b = Linear(q_rank, width, bias=False)
        self.kv_a = Linear(config.n_embd, self.rank + self.turning, bias=config.attn_bias)
        self.kv_a_norm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b = Linear(self.rank, config.n_head * (self.still + self.value_size), bias=False)
        self.proj = Linear(config.n_head * self.value_size, config.n_embd, bias=config.attn_proj_bias)

    def new_state(self, rows: int, length: int, chunk: int, rewind: int, dtype: torch.dtype, device: torch.device) -> Latents:
        """Return the empty latents of this layer."""
        return Latents.zeros(rows, length, max(chunk, rewind), self.rank + self.turning, self.window, dtype, device)

    def forward(self, x: Tensor, context: Context, state: Latents | None = None) -> Tensor:
        rotation = context.rotations[self.turns]
        queries = self.q_b(self.q_a_norm(self.q_a(x))) if self.q is None else self.q(x)
        still, turning = queries.unflatten(-1, (-1, self.still + self.turning)).split((self.still, self.turning), dim=-1)  # (B, T, H, ...)
        turned = rotated(turning, rotation, self.interleave)
        if context.query_scale is not None:
            still, turned = still * context.query_scale, turned * context.query_scale
        latent, key = self.kv_a(x).split((self.rank, self.turning), dim=-1)
        key = rotated(key.unsqueeze(2), rotation, self.interleave)
        shared = torch.cat((self.kv_a_norm(latent).unsqueeze(2), key), dim=-1)  # (B, T, 1, W)
        if state is not None and self._absorbs(x, context.span):
            return self.proj(self._attend_to_latents(still, turned, shared, context, state).flatten(2))
        q = torch.cat((still, turned), dim=-1)  # (B, T, H, D)
        k, v = self.expanded(shared.squeeze(2)) if state is None else (shared, shared)
        view = None if state is None else _Expanding(state, self.expanded)
        return self.proj(attend(q, k, v, self.window, context, view, self.scale).flatten(2))  # (B, T, C)

    def expanded(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values, (B, S, H, ...) each, that the heads make of what they share, (B, S, W)."""
        latent, key = shared.split((self.rank, self.turning), dim=-1)
        still, v = self.kv_b(latent).unflatten(-1, (-1, self.still + self.value_size)).split((self.still, self.value_size), dim=-1)
        return torch.cat((still, key.unsqueeze(2).expand(-1, -1, still.size(2), -1)), dim=-1), v

    def _absorbs(self, x: Tensor, span: Span) -> bool:
        """Return whether multiplying the queries by `kv_b` takes fewer products than expanding the latents."""
        if type(self.kv_b) is not Linear:  # wrapped or quantized: it can only be called
            return False
        T, S, size = max(span.counts) if span.packed else x.size(1), span.read, self.still + self.value_size
        return T * S * (2 * self.rank - size) + T * self.rank * size <= S * self.rank * size

    def _attend_to_latents(self, still: Tensor, turned: Tensor, shared: Tensor, context: Context, state: Latents) -> Tensor:
        by_head = self.kv_b.weight.to(still.dtype).unflatten(0, (-1, self.still + self.value_size))
        to_keys, to_values = by_head.split((self.still, self.value_size), dim=1)  # (H, ..., rank)
        q = torch.cat((torch.einsum("bthn,hnr->bthr", still, to_keys), turned), dim=-1)  # (B, T, H, W)
        gathered = attend(q, shared, shared, self.window, context, state, self.scale)[..., : self.rank]
        return torch.einsum("bthr,hvr->bthv", gathered, to_values)


class _Expanding(NamedTuple):
    """Latents as attention sees them that looks at each head's own keys and values."""

    state: Latents
    expand: Callable[[Tensor], tuple[Tensor, Tensor]]

    def write(self, k: Tensor, v: Tensor, span: Span) -> None:
        self.state.write(k, v, span)

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        k, v = self.expand(self.state.read(span)[0].squeeze(1))
        return k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, ...)


def latent_scale(head_size: int, scaling: dict[str, Any] | None) -> float:
    """Return what scores are multiplied by: the inverse root of the head size, times the square of YaRN's factor (arXiv:2309.00071).

    Args:
        head_size: Features of a key, turned and still.
        scaling: `Config.rope_adjustments`; its `mscale_all_dim` makes long contexts' scores sharper.
    """
    mscale, factor = (scaling or {}).get("mscale_all_dim"), (scaling or {}).get("factor", 1.0)
    sharper = 0.1 * mscale * math.log(factor) + 1.0 if mscale and factor > 1 else 1.0
    return head_size**-0.5 * sharper**2


class Linear(nn.Linear):
    """A linear layer. One row in bf16 on a CPU is multiplied as a vector, which takes three quarters of the time."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        is_row = x.numel() == weight.size(1) and x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
        if not is_row or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight, bias)
        y = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())
        return y.view(*x.shape[:-1], -1)


class GptNeoxMLP(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.approximate = config.gelu_approximate
        self.fc = Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate=self.approximate))


class LLaMAMLP(nn.Module):
    """A gated MLP (SwiGLU, arXiv:2002.05202).

    Args:
        config: The architecture.
        width: Inside; by default `intermediate_size`.
    """

    def __init__(self, config: Config, width: int | None = None) -> None:
        super().__init__()
        width = width or config.intermediate_size
        self.approximate = config.gelu_approximate
        self.fc_1 = Linear(config.n_embd, width, bias=config.mlp_bias)
        self.fc_2 = Linear(config.n_embd, width, bias=config.mlp_bias)
        self.proj = Linear(width, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class GemmaMLP(LLaMAMLP):
    """A gated MLP whose gate is a GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc_1(x), approximate=self.approximate) * self.fc_2(x))


class RMSNorm(nn.Module):
    """Scale each token's features to a mean square of 1, then by a weight (arXiv:1910.07467). Sums in fp32.

    Args:
        size: How many features.
        eps: Added to the mean square.
        offset: Multiply by 1 + weight instead.
    """

    def __init__(self, size: int, eps: float = 1e-6, offset: bool = False) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.zeros(size) if offset else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.offset and x.dtype.itemsize < 4:  # 1 + weight has more digits than a 16-bit type
            wide = 1 + self.weight.float()
            return F.rms_norm(x.float(), wide.shape, wide, self.eps).to(x.dtype)
        weight = self.weight.to(x.dtype) + 1 if self.offset else self.weight.to(x.dtype)
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _SmallRMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class _SmallRMSNorm(torch.autograd.Function):
    """`F.rms_norm` that keeps nothing but its input for the backward pass; torch's own keeps several copies in fp32 on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide, grad = x.to(wide), grad.to(wide)
        scale = torch.rsqrt(torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square() / x.size(-1) + ctx.eps)  # (B, T, 1)
        normed = x_wide * scale
        products = grad * normed
        along = (products @ weight.to(wide)).unsqueeze(-1) / x.size(-1)  # what of the gradient points along x, whose length does not count
        grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
        grad_weight = products.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x.to(x.dtype), grad_weight, None


class HeadNorm(nn.Module):
    """A LayerNorm over each head, with weights of its own and no bias."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, size))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, H, D)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """A layer norm whose weights may be of a wider type than its input, as they are where parts of a 16-bit model are trained."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if part is None else part.to(x.dtype) for part in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


GPT.block_class = Block
Block.mixers = {
    "attention": CausalSelfAttention,
    "latent": LatentAttention,
    "short_conv": ShortConvolution,
    "gated_delta": GatedDelta,
}
MLPS = {"GptNeoxMLP": GptNeoxMLP, "LLaMAMLP": LLaMAMLP, "GemmaMLP": GemmaMLP, "LLaMAMoE": LLaMAMoE}
LLaMAMoE.shared_class = LLaMAMLP


def mlp_class_name(config: Config, i: int) -> str:
    """Return the kind of MLP that a layer has: where a model has experts, its other layers have a `LLaMAMLP`."""
    return "LLaMAMLP" if config.expert_indices is not None and not config.expert_indices[i] else config.mlp_class_name


def new_norm(config: Config, there: bool = True, size: int | None = None) -> nn.Module:
    """Return the kind of norm that the architecture has, or what returns its input."""
    size = size or config.n_embd
    if not there:
        return nn.Identity()
    if config.norm_class_name == "RMSNorm":
        return RMSNorm(size, config.norm_eps, config.norm_add_unit_offset)
    return LayerNorm(size, config.norm_eps, elementwise_affine=config.norm_affine, bias=config.norm_bias)


def new_head_norm(config: Config, heads: int) -> nn.Module:
    """Return a norm of queries or keys."""
    if config.norm_qk_type == "per_head":
        return HeadNorm(heads, config.head_size, config.norm_eps)
    return new_norm(config, size=config.head_size * (heads if config.norm_qk_type == "olmo2" else 1))
