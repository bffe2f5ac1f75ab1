"""Mixers whose memory does not grow with the text: a short convolution and a gated delta rule."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.attention import Context
from litgpt.cache import DeltaState, Recent
from litgpt.config import Config

CHUNK = 64  # tokens that the delta rule computes side by side


class ShortConvolution(nn.Module):
    """LFM2's mixer: a convolution over the last few tokens, gated on both sides, y = out(C * conv(B * x)).

    Args:
        config: The architecture; `short_conv` names the sizes.
        i: Which layer this is, from 0.
    """

    def __init__(self, config: Config, i: int) -> None:
        super().__init__()
        width, bias, kernel = config.n_embd, config.short_conv["bias"], config.short_conv["kernel_size"]
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.conv = nn.Conv1d(width, width, kernel, groups=width, bias=bias)  # holds the weights, (C, 1, K)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def new_state(self, rows: int, length: int, chunk: int, rewind: int, dtype: torch.dtype, device: torch.device) -> Recent:
        """Return the empty memory of this layer: what the convolution last saw."""
        width, _, kernel = self.conv.weight.shape
        return Recent.zeros(rows, kernel - 1 + rewind, width, dtype, device)

    def forward(self, x: Tensor, context: Context, state: Recent | None = None) -> Tensor:
        before, after, inputs = self.in_proj(x).chunk(3, dim=-1)  # (B, T, C) each
        return self.out_proj(after * by_sequence(self._mix, before * inputs, context, state))

    def _mix(self, inputs: Tensor, context: Context, state: Recent | None) -> Tensor:
        earlier = None
        if state is not None:
            earlier, _ = state.read(context.span)
            state.write(inputs, context.span)
        return causal_convolution(inputs, self.conv, earlier, context.ids)


class GatedDelta(nn.Module):
    """Qwen3-Next's linear attention: a matrix per head that forgets by a gate and is corrected by the delta rule (arXiv:2412.06464).

    Several value heads share the queries and keys of one key head. How many key heads there are the width of `in_proj_qkvz` says.

    Args:
        config: The architecture; `gated_delta` names the sizes.
        i: Which layer this is, from 0.
    """

    def __init__(self, config: Config, i: int) -> None:
        super().__init__()
        sizes = config.gated_delta
        self.key_size, self.value_size = sizes["key_head_size"], sizes["value_head_size"]
        self.shares = sizes["n_value_heads"] // sizes["n_key_heads"]  # value heads for each key head
        keys, values = sizes["n_key_heads"] * self.key_size, sizes["n_value_heads"] * self.value_size
        self.in_proj_qkvz = nn.Linear(config.n_embd, 2 * keys + 2 * values, bias=False)  # by key head: [q | k | its v | its z]
        self.in_proj_ba = nn.Linear(config.n_embd, 2 * sizes["n_value_heads"], bias=False)  # by key head: [its b | its a]
        width = 2 * keys + values
        self.conv = nn.Conv1d(width, width, sizes["kernel_size"], groups=width, bias=False)  # holds the weights, (C, 1, K)
        self.dt_bias = nn.Parameter(torch.ones(sizes["n_value_heads"]))
        self.A_log = nn.Parameter(torch.empty(sizes["n_value_heads"]).uniform_(0.01, 16).log())
        self.norm = GatedRMSNorm(self.value_size, config.norm_eps)
        self.out_proj = nn.Linear(values, config.n_embd, bias=False)

    def new_state(self, rows: int, length: int, chunk: int, rewind: int, dtype: torch.dtype, device: torch.device) -> DeltaState:
        """Return the empty memory of this layer."""
        (width, _, kernel), heads = self.conv.weight.shape, self.A_log.numel()
        inputs = torch.zeros((rows, kernel + rewind, width + 2 * heads), dtype=dtype, device=device)
        matrix = torch.zeros((rows, heads, self.key_size, self.value_size), dtype=torch.float32, device=device)
        return DeltaState(inputs, matrix=matrix)

    def forward(self, x: Tensor, context: Context, state: DeltaState | None = None) -> Tensor:
        sizes = self.key_size, self.key_size, self.shares * self.value_size, self.shares * self.value_size
        q, k, v, z = self.in_proj_qkvz(x).unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)  # (B, T, G, ...)
        b, a = self.in_proj_ba(x).unflatten(-1, (-1, 2 * self.shares)).chunk(2, dim=-1)  # (B, T, G, H / G)
        inputs = torch.cat([part.flatten(2) for part in (q, k, v, b, a)], dim=-1)
        y = by_sequence(self._mix, inputs, context, state)  # (B, T, H, V), fp32
        return self.out_proj(self.norm(y, z.reshape(y.shape)).flatten(2))

    def _mix(self, inputs: Tensor, context: Context, state: DeltaState | None) -> Tensor:
        width = self.conv.weight.size(0)
        if state is None:
            return self._rule(inputs[..., :width], inputs[..., width:], ids=context.ids)[0]
        span, split = context.span, self.conv.weight.size(-1) - 1
        pending = state.size - split  # the last tokens, which the matrix may not know yet, are computed again
        earlier, places = state.read(span)  # (B, N, C), (B, N)
        state.write(inputs, span)
        later = torch.cat((earlier[:, split:].to(inputs.dtype), inputs), dim=1)  # (B, pending + T, C)
        places = torch.cat((places[:, split:], span.positions), dim=1)
        real = places >= span.floors[:, :1] if pending or span.padded else None
        y, matrix = self._rule(
            later[..., :width],
            later[..., width:],
            earlier=earlier[:, :split, :width],
            matrix=state.read_matrix(span),
            real=real,
            folded=real & (places < span.floors[:, 1:]) if pending else None,
        )
        state.write_matrix(matrix, span)
        return y[:, pending:]

    def _rule(
        self,
        qkv: Tensor,
        ba: Tensor,
        earlier: Tensor | None = None,
        matrix: Tensor | None = None,
        real: Tensor | None = None,
        folded: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what each token reads, (B, T, H, V), and the matrices after the folded tokens, (B, H, K, V), both in fp32."""
        mixed, groups = F.silu(causal_convolution(qkv, self.conv, earlier, ids)), ba.size(-1) // 2 // self.shares
        keys = groups * self.key_size
        q, k, v = (part.unflatten(-1, (groups, -1)) for part in mixed.split((keys, keys, mixed.size(-1) - 2 * keys), dim=-1))
        b, a = (part.float().unflatten(-1, (groups, self.shares)) for part in ba.chunk(2, dim=-1))  # (B, T, G, R)
        decay = -self.A_log.float().exp().view_as(a[0, 0]) * F.softplus(a + self.dt_bias.float().view_as(a[0, 0]))
        rate = b.sigmoid()
        if real is not None:  # what is no token changes nothing
            decay, rate = (part.masked_fill(~real[..., None, None], 0.0) for part in (decay, rate))
        return gated_delta_rule(unit(q), unit(k), v.unflatten(-1, (self.shares, -1)).float(), decay, rate, matrix, folded, ids)


class GatedRMSNorm(nn.Module):
    """Scale features to a mean square of 1, then by a weight and by the SiLU of a gate, all in fp32.

    Args:
        size: How many features.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return (normed * F.silu(gate.float())).to(gate.dtype)


def by_sequence(mix: Callable[[Tensor, Context, Any], Tensor], inputs: Tensor, context: Context, state: Recent | None) -> Tensor:
    """Return what `mix` makes of (B, T, C), which it sees one sequence a row, padding at its end.

    Args:
        mix: Maps inputs, context and state to (B, T, ...). It bounds sequences by `context.ids`, if there are any.
        inputs: Of all tokens.
        context: Of the call.
        state: The layer's memory.
    """
    if context.pieces is not None and context.ids is None:
        return torch.cat([mix(inputs[:, at], piece, state) for at, piece in context.pieces if at.stop > at.start], dim=1)
    if context.tokens is None or state is not None:  # a span has its padding at the end
        return mix(inputs, context, state)
    order = context.tokens.logical_not().byte().argsort(dim=1, stable=True)  # (B, T), padding last
    y = mix(inputs.take_along_dim(order.unsqueeze(-1), dim=1), context, state)
    back = order.argsort(dim=1).view(*order.shape, *[1] * (y.ndim - 2))
    return y.take_along_dim(back, dim=1)


def causal_convolution(x: Tensor, conv: nn.Conv1d, earlier: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """Return the depthwise convolution of each feature with itself at the last K tokens, (B, T, C); sums in fp32.

    Written as K products, which is faster here than torch's convolution and stops at the borders of segments.

    Args:
        x: Inputs, (B, T, C).
        conv: Has the weights, (C, 1, K), the last for the token itself, and perhaps a bias.
        earlier: The inputs before, (B, K - 1, C) or more; zeros by default.
        ids: The segment of every token, (B, T); a token sees only its own.
    """
    taps, T = conv.weight.squeeze(1).to(torch.promote_types(x.dtype, torch.float32)).unbind(-1), x.size(1)
    reach = len(taps) - 1
    wide = F.pad(x, (0, 0, reach, 0)) if earlier is None else torch.cat((earlier[:, earlier.size(1) - reach :].to(x.dtype), x), dim=1)
    y = x * taps[-1] if conv.bias is None else torch.addcmul(conv.bias.to(taps[-1].dtype), x, taps[-1])
    for back in range(1, len(taps)):
        seen = wide[:, reach - back : reach - back + T]
        if ids is not None:
            seen = seen * (F.pad(ids, (back, 0), value=-1)[:, :T] == ids).unsqueeze(-1)
        y = torch.addcmul(y, seen, taps[-1 - back])
    return y.to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """Return vectors of length 1, in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    rate: Tensor,
    matrix: Tensor | None = None,
    folded: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y = M^T q / sqrt(K) of every token, (B, T, H, V), and the last matrices, (B, H, K, V).

    With each token M = exp(decay) M first, then M = M + k (rate (v - M^T k))^T. G key heads have R value heads each, H = G R. Computes
    in fp32 whatever autocast says.

    Args:
        q: Queries of length 1, (B, T, G, K).
        k: Keys of length 1, (B, T, G, K).
        v: Values, (B, T, G, R, V).
        decay: Logarithms, (B, T, G, R); 0 at what is no token.
        rate: Between 0 and 1, (B, T, G, R); 0 at what is no token.
        matrix: The matrices before, (B, H, K, V); zeros by default.
        folded: Which tokens the returned matrices know, (B, T), the first ones of each row; by default all.
        ids: The segment of every token, (B, T), without `matrix`; each starts with zeros.
    """
    with torch.autocast(q.device.type, enabled=False):
        if matrix is None:
            matrix = torch.zeros((), dtype=q.dtype, device=q.device).expand(q.size(0), v.size(2) * v.size(3), q.size(-1), v.size(-1))
        matrix = matrix.unflatten(1, v.shape[2:4])  # (B, G, R, K, V)
        q = (q * q.size(-1) ** -0.5).unsqueeze(3)  # (B, T, G, 1, K)
        rows = q, k.unsqueeze(3), v, decay.unsqueeze(-1), rate.unsqueeze(-1)
        if q.size(1) == 1 and folded is None:
            y, matrix = _one_token(*(part.squeeze(1) for part in rows), matrix)
            return y.unsqueeze(1).flatten(2, 3), matrix.flatten(1, 2)
        y, matrix = _chunk_by_chunk(*rows, matrix, folded, ids)
        return y.flatten(2, 3), matrix.flatten(1, 2)


def _one_token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return what one token reads, (B, G, R, V), and the matrices after it, (B, G, R, K, V)."""
    matrix = matrix * decay.exp().unsqueeze(-1)
    missing = rate * (v - (matrix * k.unsqueeze(-1)).sum(-2))  # (B, G, R, V)
    matrix = torch.addcmul(matrix, k.unsqueeze(-1), missing.unsqueeze(-2))
    return (matrix * q.unsqueeze(-1)).sum(-2), matrix


def _chunk_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, matrix: Tensor, folded: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what tokens read, (B, T, G, R, V), and the matrices, (B, G, R, K, V).

    Within a chunk all tokens' corrections solve one triangular system; matrices go from chunk to chunk (arXiv:2412.06464, section 3.3).
    """
    T, size = q.size(1), min(CHUNK, q.size(1))
    q, k, v, decay, rate = (_in_chunks(part, size) for part in (q, k, v, decay, rate))  # (B, G, R or 1, n, c, ...)
    total = decay.cumsum(-2)  # from the chunk's start
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    below = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    between = (decay * below).cumsum(-2)  # (B, G, R, n, c, c), from the column's token to the row's; a difference of totals is not so exact
    left = between[..., -1, :].unsqueeze(-1)  # to the chunk's end
    inherits = total.new_ones(())
    carried = total[..., -1:, :].exp()  # what is left of a matrix after the chunk
    if ids is not None:
        ids = _in_chunks(ids[..., None, None, None], size)
        last = ids[..., -1:, :]
        before = F.pad(last, (0, 0, 0, 0, 1, 0), value=-1)[..., :-1, :, :]
        seen = seen & (ids == ids.transpose(-1, -2))
        inherits, left, carried = ids == before, left.masked_fill(ids != last, float("-inf")), carried * (last == before)
    fade = between.masked_fill(~seen, float("-inf")).exp()
    links = (rate * fade * (k @ k.transpose(-1, -2))).tril(-1)
    known = total.exp() * inherits  # how much of the chunk's first matrix a token still finds
    right = torch.cat((rate * v, rate * known * k), dim=-1)
    solved = torch.linalg.solve_triangular(links, right, upper=False, unitriangular=True)
    new, old = solved.split((v.size(-1), k.size(-1)), dim=-1)  # corrections if the matrix were zero, and what each would read of it
    reads, looks = q * known, q @ k.transpose(-1, -2) * fade
    kept = k * left.exp()
    parts = [part.unbind(-3) for part in (new, old, reads, looks, kept, carried)]
    fold = _folds(k, decay, total, folded, size)
    result, ys = matrix, []
    for i, (new, old, reads, looks, kept, carried) in enumerate(zip(*parts, strict=True)):
        corrections = new - old @ matrix  # (B, G, R, c, V)
        ys.append(reads @ matrix + looks @ corrections)
        if fold is not None:
            keys, left, any_folded = (part[..., i, :, :] for part in fold)
            result = torch.where(any_folded, left * matrix + keys.transpose(-1, -2) @ corrections, result)
        matrix = carried * matrix + kept.transpose(-1, -2) @ corrections
    y = torch.stack(ys, dim=-3).movedim((-3, -2), (1, 2)).flatten(1, 2)[:, :T]
    return y, matrix if fold is None else result


def _folds(k: Tensor, decay: Tensor, total: Tensor, folded: Tensor | None, size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what takes a chunk's first matrix to the one after its folded tokens: keys, decay, and whether there are any."""
    if folded is None:
        return None
    folded = _in_chunks(folded[..., None, None, None], size)  # (B, 1, 1, n, c, 1)
    reach = (decay * folded).sum(-2, keepdim=True)
    keys = k * (reach - total).masked_fill(~folded, float("-inf")).exp()
    return keys, reach.exp(), folded.any(-2, keepdim=True)


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """Return (B, T, G, R, D) as (B, G, R, n, c, D), filled up with zeros."""
    filled = F.pad(x, (0, 0) * 3 + (0, -x.size(1) % size))
    return filled.unflatten(1, (-1, size)).movedim((1, 2), (-3, -2))
