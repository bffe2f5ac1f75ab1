"""Cross entropy that never holds the logits of all tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a target that does not count
CHUNK = 256  # how many tokens have logits at the same time
CPU_CHUNK = 128  # on a CPU, whose caches hold what so few take,
TRAINED_CHUNK = 512  # unless the head is trained: then each chunk has a gradient as large as the head, to be added to the others
ROW_MULTIPLE = 64  # for a bf16 product of a new shape a CPU's library writes a program: milliseconds and 0.9 MB, of which it keeps 1,024

Head = Callable[[Tensor], Tensor]
Finish = Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """What a forward pass with targets returns. Divide by the targets of the whole step, not of one microbatch."""

    nll: Tensor  # the sum over all targets
    n_targets: Tensor
    aux: Tensor | float = 0.0  # of experts


def as_is(logits: Tensor) -> Tensor:
    """Return the logits."""
    return logits


def total_nll(head: Head, hidden: Tensor, targets: Tensor, chunk: int | None = None, finish: Finish = as_is) -> Tensor:
    """Return the sum of what `token_nll` returns, which takes the same arguments; faster where gradients are wanted.

    In the sum all tokens count alike, so their gradients are computed while their logits are there, and the backward pass only has to
    scale them. Under fp16 they would underflow without the loss's scale, and a head that is a plain function does not say what it trains:
    those compute their logits once more.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad] if isinstance(head, nn.Module) else None
    in_graph = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    counted = _counted(targets)
    nothing_counts = counted is not None and not len(counted)
    if trained is None or not in_graph or nothing_counts or torch.float16 in (hidden.dtype, _autocast_dtype(hidden)):
        return token_nll(head, hidden, targets, chunk, finish).sum()
    rows, following, n = _chosen(hidden, targets, counted)
    return _Total.apply(head, finish, rows, following, n, chunk or _chunk(hidden, trained), *trained)


def token_nll(head: Head, hidden: Tensor, targets: Tensor, chunk: int | None = None, finish: Finish = as_is) -> Tensor:
    """Return the negative log-likelihood of every target, (B, T), 0 where it is ignored; in fp32, or fp64 where the logits are.

    Tokens whose target is ignored never reach the head, and only `chunk` tokens have logits at a time: the backward pass computes them
    again. `head` is called, not unpacked, so that any layer may stand there (LoRA, quantized, sharded); it is called at least once, so
    that the result has a gradient on every rank.

    Args:
        head: Turns (n, C) into logits (n, V), each row by itself.
        hidden: (B, T, C)
        targets: (B, T), the id that follows each token; -100 does not count. Beside hidden states on a GPU they may lie on the CPU, where
            counting them waits for nothing.
        chunk: How many tokens have logits at the same time; by default few where the head is not trained and on a CPU.
        finish: What the head's output has to pass to become logits (scaling, soft-capping).
    """
    counted = _counted(targets)
    if counted is not None and not len(counted):
        counted = counted.new_zeros(1)
    rows, following, n = _chosen(hidden, targets, counted)
    trained = not isinstance(head, nn.Module) or any(parameter.requires_grad for parameter in head.parameters())
    size = chunk or _chunk(hidden, trained)
    pairs = list(zip(rows.split(size), following.split(size), strict=True))
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        *early, last = pairs  # the last one's backward pass comes first, so keeping its logits costs nothing at the peak
        parts = [checkpoint(_nll, head, finish, h, t, use_reentrant=False) for h, t in early] + [_nll(head, finish, *last)]
    else:
        parts = [_nll(head, finish, h, t) for h, t in pairs]
    nll = torch.cat(parts)[:n]
    return (nll if counted is None else nll.new_zeros(targets.numel()).index_copy(0, _beside(hidden, counted), nll)).view_as(targets)


def _counted(targets: Tensor) -> Tensor | None:
    """Return where those stand that count, (n,), or None if they all do."""
    counted = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    return None if len(counted) == targets.numel() else counted


def _chosen(hidden: Tensor, targets: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Return the hidden states whose targets count, (n, C), those targets, (n,), and n.

    In bf16 on a CPU more of them may follow, that do not count, to make a multiple of ROW_MULTIPLE.
    """
    rows, following = hidden.flatten(0, 1), targets.flatten().long()
    if counted is None:
        return rows, _beside(hidden, following), len(rows)
    n, is_rounded = len(counted), hidden.device.type == "cpu" and torch.bfloat16 in (hidden.dtype, _autocast_dtype(hidden))
    more = (0, -n % ROW_MULTIPLE if is_rounded else 0)
    return rows.index_select(0, _beside(hidden, F.pad(counted, more))), _beside(hidden, F.pad(following[counted], more)), n


def _beside(hidden: Tensor, values: Tensor) -> Tensor:
    """Return the values on the device of the hidden states, without waiting for it."""
    if values.device == hidden.device:
        return values
    return (values.pin_memory() if hidden.is_cuda else values).to(hidden.device, non_blocking=True)


def _chunk(hidden: Tensor, trained: bool) -> int:
    return TRAINED_CHUNK if trained else CPU_CHUNK if hidden.device.type == "cpu" else CHUNK


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _nll(head: Head, finish: Finish, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = finish(head(hidden))
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=IGNORED, reduction="none")


class _Total(torch.autograd.Function):
    """The sum of the losses of all rows, whose gradients are made in the forward pass, chunk by chunk.

    They are made before the first chunk. Small tensors that outlive a chunk would lie between the large ones of it and the next, and the
    C library could give none of them back: a fifth of a step's memory.
    """

    @staticmethod
    def forward(ctx: Any, head: Head, finish: Finish, hidden: Tensor, targets: Tensor, n: int, chunk: int, *trained: Tensor) -> Tensor:
        gradients = [torch.empty_like(part) for part in (hidden, *trained)]
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, max(1, len(hidden)), chunk):  # once without rows, for the gradients to be zeros
            at = slice(start, start + chunk)
            some, following = hidden[at].detach().requires_grad_(), targets[at]
            with torch.enable_grad():
                logits = finish(head(some))
            p, counting = logits.detach().to(total.dtype).log_softmax(-1), slice(max(0, n - start))
            total += F.nll_loss(p[counting], following[counting], reduction="sum")
            p.exp_()[torch.arange(len(p), device=p.device), following] -= 1  # the gradient at the logits
            p[counting.stop :] = 0
            p = p.to(logits.dtype)
            of_rows, *of_trained = torch.autograd.grad(logits, [some, *trained], p)
            gradients[0][at] = of_rows
            for gradient in gradients[1:]:
                more = of_trained.pop(0)  # whose place is needed for the next one's
                gradient.copy_(more) if start == 0 else gradient.add_(more)
                del more
            del some, logits, p, of_rows
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_rows, *of_trained = (gradient.mul_(grad) for gradient in ctx.saved_tensors)  # in place: a second pass is refused
        return None, None, of_rows, None, None, None, *of_trained
