"""Cross entropy that never holds the logits of all tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a target that does not count


class Loss(NamedTuple):
    """What a forward pass with targets returns. Divide by the targets of the whole step, not of one microbatch."""

    nll: Tensor  # the sum over all targets
    n_targets: Tensor
    aux: Tensor | float = 0.0  # of experts


def token_nll(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Return the negative log-likelihood of every target, (B, T), 0 where it is ignored; in fp32, or fp64 where the logits are.

    Only `chunk` tokens have logits at a time: their backward pass computes them again. The last chunk keeps its own, since
    its backward pass comes first. `head` is called, not unpacked, so that any layer may stand there (LoRA, quantized, sharded).

    Args:
        head: Turns (n, C) into logits (n, V).
        hidden: (B, T, C)
        targets: (B, T), the id that follows each token; -100 does not count.
        chunk: How many tokens have logits at the same time.
    """

    def piece(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), t, ignore_index=IGNORED, reduction="none")

    *early, last = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().long().split(chunk), strict=True)
    losses = [checkpoint(piece, h, t, use_reentrant=False) for h, t in early] + [piece(*last)]
    return torch.cat(losses).view_as(targets)
