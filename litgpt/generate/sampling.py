"""From logits to tokens, row by row: what one row draws never depends on its neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from litgpt.cache import upload
from litgpt.errors import UserError

NO_TOKEN = -1  # what is drawn where there are no probabilities
NO_NUMBERS = (
    "The model computes no numbers (NaN or infinity): its weights are damaged, or `precision` is too small for them. "
    "Download or train it again, or try 32-true."
)
MOST = 1_000_000  # of temperatures and penalties: logits that they multiply stay numbers in fp32
PREFIX = 1024  # how many of the likeliest tokens `top_p` looks at before it sorts all of them


class Rules(Protocol):
    """What a row may say next, such as a grammar's state."""

    error: str | None  # why nothing can be said any more
    is_finished: bool  # whether nothing may follow

    def allowed(self) -> Tensor:
        """Return which tokens may come next, (V,), on the CPU: none if there is an `error`."""

    def accept(self, token: int) -> None:
        """Go on behind a token."""


@dataclass
class RowState:
    """How one row is sampled, and what its sampling remembers. One Python number per token is all the randomness a row uses.

    Args:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Draw from the k likeliest tokens only; None from all.
        top_p: Draw from the fewest likeliest tokens whose probabilities reach this sum.
        repetition_penalty: Divides positive logits, and multiplies negative ones, of all tokens seen so far (arXiv:1909.05858).
        presence_penalty: Subtracted from the logits of tokens generated so far.
        frequency_penalty: The same, times how often each was generated.
        seed: Of this row's own generator; None draws one from torch's, which `torch.manual_seed` sets.
        min_p: Draw from tokens only that are at least this times as likely as the likeliest one (arXiv:2407.01082).
        grammar: What the row may say; None is anything.

    Raises:
        UserError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_p: float = 0.0
    grammar: Rules | None = None
    generator: Random = field(init=False, repr=False)
    counts: Tensor | None = field(init=False, default=None, repr=False)  # (2, V): how often each token was prompted, and generated

    def __post_init__(self) -> None:
        if not 0.0 <= self.top_p <= 1.0:
            raise UserError(f"`top_p` is a probability, but got {self.top_p}. Use 1.0 to sample from all tokens.")
        if not 0.0 <= self.temperature <= MOST:
            raise UserError(f"`temperature` must be 0 or more, up to {MOST:,}, but got {self.temperature}. 0 takes the likeliest token.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"`top_k` counts the tokens to choose from, but got {self.top_k}. Use null (None) to sample from all tokens.")
        if not 1 / MOST <= self.repetition_penalty <= MOST:
            raise UserError(f"`repetition_penalty` must be above 0, up to {MOST:,}, but got {self.repetition_penalty}. Use 1.0 for none.")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"`min_p` is a part of the likeliest token's probability, but got {self.min_p}. Use 0 for no limit.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MOST <= getattr(self, name) <= MOST:
                raise UserError(f"`{name}` is a number, from -{MOST:,} to {MOST:,}, but got {getattr(self, name)}. Use 0 for none.")
        if self.seed is None:
            self.seed = int(torch.randint(2**62, (), device="cpu"))
        self.generator = Random(self.seed % 2**64)  # which takes no notice of a sign

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5 or self.top_p == 0.0 or self.top_k == 1

    @property
    def is_limited(self) -> bool:
        return self.top_k is not None or self.top_p < 1.0

    @property
    def is_penalized(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def count_prompt(self, prompt: Sequence[int], vocab_size: int, device: torch.device) -> None:
        """Remember the prompt's tokens, if a penalty asks for them."""
        if self.is_penalized:
            seen = torch.bincount(torch.tensor(prompt, dtype=torch.long), minlength=vocab_size).float()
            self.counts = torch.stack((seen, torch.zeros_like(seen))).to(device)


def sample(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Draw one token per row, (B, V) -> (B,), and count it; see `checked` for rows whose logits are no numbers."""
    usable = logits.amax(-1).isfinite()  # NaN and infinity come through
    logits = permitted(penalized(logits, rows), rows)
    if any(row.grammar is not None for row in rows):
        usable &= logits.amax(-1).isfinite()  # a grammar that has failed allows nothing
    drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
    if len(drawn) < len(rows):
        tokens = logits.max(-1).indices  # four times as fast in bf16 as `argmax`, and takes the first of equal ones too
    if drawn:
        chosen = [rows[i] for i in drawn]
        at = slice(None) if len(drawn) == len(rows) else upload(drawn, logits.device)
        new = draw(probabilities(logits[at], chosen), [row.generator.random() for row in chosen])
        if len(drawn) == len(rows):
            tokens = new
        else:
            tokens[at] = new
    for i, row in enumerate(rows):
        if row.counts is not None:
            row.counts[1].scatter_add_(0, tokens[i : i + 1], row.counts.new_ones(1))
    return tokens.masked_fill(~usable, NO_TOKEN)


def checked(tokens: Tensor) -> list[int]:
    """Return the drawn tokens of all rows, (B,), as numbers, for which a device has to be waited for.

    Raises:
        UserError: The model computed none to draw by.
    """
    drawn = tokens.tolist()
    if NO_TOKEN in drawn:
        raise UserError(NO_NUMBERS)
    return drawn


def probabilities(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Return what each row draws from, (B, V): penalties and grammars are not applied here, see `penalized` and `permitted`."""
    if any(row.is_greedy for row in rows):
        greedy = torch.nn.functional.one_hot(logits.argmax(-1), logits.size(-1)).float()
        if all(row.is_greedy for row in rows):
            return greedy
        drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
        at = upload(drawn, logits.device)
        return greedy.index_copy(0, at, probabilities(logits[at], [rows[i] for i in drawn]))
    logits = logits.float() / _column([row.temperature for row in rows], logits)
    limited = [i for i, row in enumerate(rows) if row.is_limited]
    if len(limited) == len(rows):
        logits = _limited(logits, rows)
    elif limited:
        at = upload(limited, logits.device)
        logits = logits.index_copy(0, at, _limited(logits[at], [rows[i] for i in limited]))
    if any(row.min_p > 0 for row in rows):
        margins = _column([log(row.min_p) if row.min_p > 0 else float("-inf") for row in rows], logits)
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + margins, float("-inf"))
    return logits.softmax(-1)


def _limited(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Return the logits, -inf for all but the likeliest tokens that `top_k` and `top_p` leave; of equal ones the first is likelier.

    The values of the likeliest tokens, not their order, decide what stays, so the result is the same however many were sorted.
    """
    width = logits.size(-1)
    k = [min(row.top_k or width, width) for row in rows]
    n_sorted = max(n if n < width else PREFIX for n in k)
    if logits.device.type != "cpu":  # a device sorts fast, but is not to be waited for
        n_sorted = width
    while True:
        n_sorted = min(n_sorted, width)
        ordered = logits.topk(n_sorted).values  # (B, n)
        n_kept = _n_kept(ordered, logits, k, rows)  # (B, 1)
        if n_sorted == width or not any(n == n_sorted < limit for n, limit in zip(n_kept.flatten().tolist(), k, strict=True)):
            break
        n_sorted *= 16
    smallest = ordered.gather(-1, (n_kept - 1).clamp(min=0))  # (B, 1), and of NaN anything
    n_larger = (ordered > smallest).sum(-1, keepdim=True)
    equal = logits == smallest
    kept = (logits > smallest) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= n_kept - n_larger))
    return logits.masked_fill(~kept, float("-inf"))


def _n_kept(ordered: Tensor, logits: Tensor, k: list[int], rows: Sequence[RowState]) -> Tensor:
    """Return how many of the sorted logits (B, n) stay, (B, 1)."""
    within = torch.arange(ordered.size(-1), device=ordered.device) < upload(k, ordered.device).unsqueeze(1)
    if all(row.top_p == 1.0 for row in rows):
        return within.sum(-1, keepdim=True)
    masses = (ordered - ordered[:, :1]).exp() * within  # (B, n), as multiples of the likeliest token's
    sums = masses.cumsum(-1)
    before, total, width = sums - masses, sums[:, -1:], logits.size(-1)
    if width in k:  # rows without `top_k`: a softmax sums each row in the same order, whatever the batch
        everything = 1 / logits.softmax(-1).amax(-1, keepdim=True)
        total = torch.where(_column([float(n == width) for n in k], logits) > 0, everything, total)
    limit = _column([row.top_p if row.top_p < 1.0 else 2.0 for row in rows], logits) * total
    return (within & (before < limit)).sum(-1, keepdim=True)


def penalized(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Return the logits (B, V) less what rows with penalties take from tokens they have seen."""
    chosen = [i for i, row in enumerate(rows) if row.counts is not None]
    if not chosen:
        return logits
    logits = logits.float().clone()
    for i in chosen:
        row, (prompted, generated) = rows[i], rows[i].counts
        x = torch.where(logits[i] > 0, logits[i] / row.repetition_penalty, logits[i] * row.repetition_penalty)
        x = torch.where(prompted + generated > 0, x, logits[i])
        logits[i] = x - row.presence_penalty * (generated > 0) - row.frequency_penalty * generated
    return logits


def permitted(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Return the logits (B, V), -inf for what the rows' grammars do not allow."""
    bound = [i for i, row in enumerate(rows) if row.grammar is not None]
    if not bound:
        return logits
    logits = logits.clone()
    for i in bound:
        logits[i].masked_fill_(~rows[i].grammar.allowed().to(logits.device), float("-inf"))
    return logits


def draw(probs: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Return where the running sum of probabilities passes a number from [0, 1), (B, V) -> (B,).

    The sums are in double precision: in single, a parallel sum may rise, by rounding, at a token whose probability is zero.
    """
    dtype = torch.float if probs.device.type == "mps" else torch.double
    sums = probs.cumsum(-1, dtype=dtype)
    marks = upload([[u] for u in uniforms], probs.device, dtype) * sums[:, -1:]
    return torch.searchsorted(sums, marks, right=True).squeeze(1).clamp(max=probs.size(-1) - 1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return upload(values, like.device, torch.float).unsqueeze(1)  # (B, 1)
