"""Who may look at whom: masks from positions and segments, and the attention that uses them."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.cache import KeyValues, Span, upload
from litgpt.rope import Rope

SHORT = 256  # up to so many tokens fp32 is faster than bf16 in attention's backward pass on a CPU


class Segments:
    """The sequences that are packed into one row, (1, N), in order. Each one's positions start at 0.

    With `lengths` as Python ints every segment is computed on its own, without a mask. `without_lengths` masks by ids instead, for a
    model that is compiled whole: it would be compiled anew for every packing.

    Args:
        lengths: How many tokens each segment has.
        device: Where the model computes.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self.lengths: list[int] | None = list(lengths)
        self.ids = upload([[i for i, n in enumerate(lengths) for _ in range(n)]], device)  # (1, N)
        self.positions = upload([[place for n in lengths for place in range(n)]], device)  # (1, N)
        self.borders = upload([0, *accumulate(lengths)], device, torch.int32)  # (n + 1,)
        self.ends = self.borders[1:].long()  # (n,)

    def without_lengths(self) -> "Segments":
        """Return the same segments, known by ids only."""
        segments = Segments.__new__(Segments)
        segments.__dict__ |= self.__dict__ | {"lengths": None}
        return segments


class Mask(NamedTuple):
    """What queries see: everything, everything up to themselves (`causal`), or what `visible` says."""

    visible: Tensor | None = None  # (B, 1, T, S), True where a query sees a key
    causal: bool = False


@dataclass
class Context:
    """What every layer needs to know about the tokens of one call."""

    rotations: dict[int | None, tuple[Tensor, Tensor] | None]  # cosines and sines, (B or 1, T, 1, n), by the kind of angles
    masks: dict[int | None, Mask]  # by window
    tokens: Tensor | None = None  # (B, T), False where a position is padding; None if there is none
    ids: Tensor | None = None  # (B, T), the segment of every token
    positions: Tensor | None = None  # (T,) or (B, T)
    query_scale: Tensor | None = None  # (B or 1, T, 1, 1), what queries of far positions are multiplied by
    span: Span | None = None
    pieces: list[tuple[slice, "Context"]] | None = None  # packed tokens, segment by segment
    segments: Segments | None = None  # those of the pieces, without a cache
    look: Callable[..., Tensor] | None = None  # how attention goes through the pieces


def new_context(
    idx: Tensor,
    positions: Tensor | None,
    segments: Segments | None,
    span: Span | None,
    windows: Iterable[int | None],
    rope: Rope,
    dtype: torch.dtype,
) -> Context:
    """Return positions, rotations and masks of one call; see `GPT.forward` for the arguments.

    Args:
        windows: The different windows that the model's layers have.
        rope: The model's angles.
        dtype: What queries and keys are computed in.
    """
    T, device = idx.size(1), idx.device
    if span is not None:
        positions = span.positions
    elif segments is not None:
        positions = segments.positions
    places = torch.arange(T, device=device) if positions is None else positions
    if rope.depends_on_length and segments is not None and segments.lengths is not None:
        rotations = rotations_by_segment(places, segments.lengths, rope, dtype)
    else:
        rotations = rope.rotations(places, T if span is None else span.cache.length, dtype)
    context = Context(rotations, {}, span=span, positions=places, query_scale=rope.query_scale(places, dtype))
    if span is not None and span.packed:
        context.pieces = [(at, Context({}, {w: cached_mask(piece, w) for w in windows}, span=piece)) for at, piece in span.pieces()]
    elif span is not None:
        context.tokens = span.positions >= 0 if span.padded else None
        context.masks = {w: cached_mask(span, w) for w in windows}
    elif segments is not None and segments.lengths is not None:
        context.ids = segments.ids  # recurrent layers take all segments at once
        context.segments, context.pieces = segments, pieces_of(segments.lengths, windows, device)
        context.look = _uncompiled() if "torch._dynamo" in sys.modules else None
    elif positions is None:
        context.masks = {w: causal_mask(T, w, device) for w in windows}
    else:
        positions = positions.view(-1, T)
        context.ids = None if segments is None else segments.ids
        context.tokens = positions >= 0 if segments is None else None
        context.masks = {w: Mask(visible(positions, positions, w, context.ids)) for w in windows}
    return context


def pieces_of(lengths: Sequence[int], windows: Iterable[int | None], device: torch.device) -> list[tuple[slice, Context]]:
    """Return where segments of known lengths lie in a row, and for each what a layer needs to know that looks within it."""
    contexts = {n: Context({}, {w: causal_mask(n, w, device) for w in windows}) for n in set(lengths)}
    return [(slice(end - n, end), contexts[n]) for n, end in zip(lengths, accumulate(lengths), strict=True)]


def rotations_by_segment(
    places: Tensor, lengths: Sequence[int], rope: Rope, dtype: torch.dtype
) -> dict[int | None, tuple[Tensor, Tensor] | None]:
    """Return what `Rope.rotations` does, for angles that depend on how long a sequence is: each segment turns as it would alone."""
    parts = [rope.rotations(piece, n, dtype) for piece, n in zip(places.split(lengths, 1), lengths, strict=True)]
    return {
        kind: None if turned is None else tuple(torch.cat(pieces, 1) for pieces in zip(*(part[kind] for part in parts), strict=True))
        for kind, turned in parts[0].items()
    }


def visible(queries: Tensor, keys: Tensor, window: int | None, ids: Tensor | None = None) -> Tensor:
    """Return which of the positions (B, S) a query at (B, T) sees, (B, 1, T, S). Padding sees all, so that no row is empty."""
    distance = queries.unsqueeze(2) - keys.unsqueeze(1)  # (B, T, S)
    seen = (distance >= 0) & (keys >= 0).unsqueeze(1)
    if window is not None:
        seen &= distance < window
    if ids is not None:
        seen &= ids.unsqueeze(2) == ids.unsqueeze(1)
    return (seen | (queries < 0).unsqueeze(2)).unsqueeze(1)


def causal_mask(T: int, window: int | None, device: torch.device) -> Mask:
    """Return what T tokens in a row see of each other."""
    if window is None or T <= window:
        return Mask(causal=T > 1)
    places = torch.arange(T, device=device).unsqueeze(0)
    return Mask(visible(places, places, window))


def cached_mask(span: Span, window: int | None) -> Mask:
    """Return what the tokens of a span see of the slots that attention reads."""
    T = span.positions.size(1)
    if span.aligned and (window is None or span.read <= window) and (T == 1 or T == span.read):
        return Mask(causal=T > 1)
    size = span.cache.sizes[window]
    last = (span.ends - 1).unsqueeze(1)  # (B, 1)
    slots = torch.arange(min(span.read, size), device=last.device)
    held = last - (last - slots).remainder(size)  # (B, S), the position in each slot; negative where there is none yet
    return Mask(visible(span.positions, held, window))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    context: Context,
    state: KeyValues | None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return what each query gathers from the keys it sees, (B, T, H, E).

    Args:
        q: Queries, (B, T, H, D).
        k: Keys, (B, T, G, D); each is shared by H / G query heads.
        v: Values, (B, T, G, E).
        window: How many tokens a query sees; None if all before it.
        context: Of this call.
        state: The layer's keys and values of earlier calls.
        scale: Of the scores; by default the inverse root of D.
        softcap: Scores s become c tanh(s / c).
        sinks: For each head a score that competes with those of all keys and stands for none, (H,).
    """
    if state is not None:
        state.write(k, v, context.span)
    look = _look if context.pieces is None else context.look or _look_piece_by_piece
    return look(q, k, v, window, context, state, scale, softcap, sinks)


def _look_piece_by_piece(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, context: Context, state: KeyValues | None, scale: float | None, *more: Any
) -> Tensor:
    if context.segments is not None and runs_varlen(q, v) and all(part is None for part in more):
        return _look_at_once(q, k, v, window, context.segments, scale)
    sizes = [at.stop - at.start for at, _ in context.pieces]
    split = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), context.pieces, strict=True)  # a slice's gradient is as long as q
    return torch.cat([_look(*qkv, window, piece, state, scale, *more) for *qkv, (_, piece) in split], dim=1)


@cache
def _uncompiled() -> Callable[..., Tensor]:
    """Return attention piece by piece for compiled blocks: they break off around it, for it would be compiled anew for every packing."""
    return torch.compiler.disable(_look_piece_by_piece)


def runs_varlen(q: Tensor, v: Tensor) -> bool:
    """Return whether torch's attention over segments of any lengths can be used, which has one kernel for all of them."""
    D = q.size(-1)
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and D == v.size(-1) and D % 8 == 0 and D <= 256


def _look_at_once(q: Tensor, k: Tensor, v: Tensor, window: int | None, segments: Segments, scale: float | None) -> Tensor:
    """Return what queries gather in all segments, by one kernel."""
    if k.size(2) != q.size(2):  # torch 2.11 knows no groups here
        k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    borders, longest = segments.borders, max(segments.lengths)
    sides = (-1 if window is None else window - 1, 0)  # how many tokens before and after its own a query sees
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn  # loads torch's compiler, which takes seconds
    return varlen_attn(q[0], k[0], v[0], borders, borders, longest, longest, scale=scale, window_size=sides).unsqueeze(0)


def _look(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    context: Context,
    state: KeyValues | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    k, v = (k.transpose(1, 2), v.transpose(1, 2)) if state is None else state.read(context.span)  # (B, G, S, D)
    mask, (B, T, H, D) = context.masks[window], q.shape
    if softcap is not None or sinks is not None:
        return _weighted(q, k, v, mask, D**-0.5 if scale is None else scale, softcap, sinks)
    G = k.size(1)
    if H != G and not mask.causal and (T == 1 or G == 1):  # the heads of a group are queries of one head: no key is repeated
        seen = mask.visible if T == 1 or mask.visible is None else mask.visible.repeat(1, 1, H, 1)
        y = F.scaled_dot_product_attention(q.transpose(1, 2).reshape(B, G, -1, D), k, v, seen, scale=scale)  # (B, G, H T / G, E)
        return y.reshape(B, H, T, -1).transpose(1, 2)
    if mask.causal and T <= SHORT and q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled() and D == v.size(-1):
        return _ShortInBf16.apply(q.transpose(1, 2), k, v, scale).transpose(1, 2)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask.visible, is_causal=mask.causal, scale=scale, enable_gqa=H != G)
    return y.transpose(1, 2)


class _ShortInBf16(torch.autograd.Function):
    """Causal attention on a CPU in bf16 with a backward pass in fp32: for short texts torch's own takes up to three times as long."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True, scale=scale)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, sums = ctx.saved_tensors
        wide = (x.float() for x in (grad, q, k, v, y))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*wide, sums, 0.0, True, scale=ctx.scale)
        return *(x.to(q.dtype) for x in grads), None


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention written out, for what the fused one lacks."""
    (B, T, _, _), (G, S) = q.shape, k.shape[1:3]
    queries = q.transpose(1, 2).unflatten(1, (G, -1))  # (B, G, H / G, T, D)
    scores = queries @ k.unsqueeze(2).transpose(-1, -2) * scale  # (B, G, H / G, T, S)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril() if mask.causal else mask.visible
    if seen is not None:
        scores = scores.masked_fill(~(seen if mask.causal else seen.unsqueeze(2)), float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(1, G, -1, 1, 1).expand(B, -1, -1, T, 1)), dim=-1)
    y = scores.softmax(-1)[..., :S].to(v.dtype) @ v.unsqueeze(2)  # (B, G, H / G, T, E)
    return y.flatten(1, 2).transpose(1, 2)
