"""Cross entropy that never holds the logits of all tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a target that does not count
CHUNK = 256  # how many tokens have logits at the same time
CPU_CHUNK = 64  # a CPU's caches hold what so few take, but a head that is trained is read anew for each chunk


class Loss(NamedTuple):
    """What a forward pass with targets returns. Divide by the targets of the whole step, not of one microbatch."""

    nll: Tensor  # the sum over all targets
    n_targets: Tensor
    aux: Tensor | float = 0.0  # of experts


def token_nll(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    finish: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Tensor:
    """Return the negative log-likelihood of every target, (B, T), 0 where it is ignored; in fp32, or fp64 where the logits are.

    Tokens whose target is ignored never reach the head, and only `chunk` tokens have logits at a time. Where the head is not trained,
    their gradients are computed at once, while the logits are there; else the backward pass computes the logits again. `head` is called,
    not unpacked, so that any layer may stand there (LoRA, quantized, sharded); it is called at least once, so that the result has a
    gradient on every rank.

    Args:
        head: Turns (n, C) into logits (n, V), each row by itself.
        hidden: (B, T, C)
        targets: (B, T), the id that follows each token; -100 does not count. Beside hidden states on a GPU they may lie on the CPU, where
            counting them waits for nothing.
        chunk: How many tokens have logits at the same time; by default few where the head is not trained and on a CPU.
        finish: What the head's output has to pass to become logits (scaling, soft-capping).
    """
    chunk = chunk or (CPU_CHUNK if hidden.device.type == "cpu" and _is_frozen(head) else CHUNK)
    rows, following = hidden.flatten(0, 1), targets.flatten().long()
    counted = (following != IGNORED).nonzero().squeeze(1)  # (n,)
    if is_partial := len(counted) < len(following):
        counted = counted if len(counted) else counted.new_zeros(1)
        following, counted = following[counted], _beside(hidden, counted)
        rows = rows.index_select(0, counted)
    nll = _by_chunk(head, finish, rows, _beside(hidden, following), chunk)
    return (nll.new_zeros(targets.numel()).index_copy(0, counted, nll) if is_partial else nll).view_as(targets)


def _beside(hidden: Tensor, values: Tensor) -> Tensor:
    """Return the values on the device of the hidden states, without waiting for it."""
    if values.device == hidden.device:
        return values
    return (values.pin_memory() if hidden.is_cuda else values).to(hidden.device, non_blocking=True)


def _by_chunk(head: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Return the losses of all rows, (n,)."""
    at_once = _is_frozen(head) and hidden.dtype != torch.float16 and not torch.is_autocast_enabled(hidden.device.type)
    if torch.is_grad_enabled() and hidden.requires_grad and at_once:
        return _AtOnce.apply(head, finish, hidden, targets, chunk)
    pairs = list(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([_nll(head, finish, h, t) for h, t in pairs])
    *early, last = pairs  # the last one's backward pass comes first, so keeping its logits costs nothing at the peak
    return torch.cat([checkpoint(_nll, head, finish, h, t, use_reentrant=False) for h, t in early] + [_nll(head, finish, *last)])


def _nll(head: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    logits = finish(head(hidden))
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=IGNORED, reduction="none")


def _is_frozen(head: Callable[[Tensor], Tensor]) -> bool:
    return isinstance(head, nn.Module) and not any(parameter.requires_grad for parameter in head.parameters())


class _AtOnce(torch.autograd.Function):
    """Losses whose gradients are computed in the forward pass: a row's loss depends on that row alone, so they only have to be scaled.

    Losses and gradients are made before the first chunk. Small tensors that outlive a chunk would lie between the large ones of it and the
    next, and the C library could give none of them back: a fifth of a step's memory.
    """

    @staticmethod
    def forward(
        ctx: Any, head: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int
    ) -> Tensor:
        gradients = torch.empty_like(hidden)
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            with torch.enable_grad():
                some = hidden[at].detach().requires_grad_()
                found = _nll(head, finish, some, targets[at])
                gradients[at] = torch.autograd.grad(found.sum(), some)[0]
            losses[at] = found.detach()
            del found
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return None, None, (gradients * grad.unsqueeze(-1)).to(gradients.dtype), None, None
