"""The one decode loop: prompts go in, sampled tokens come out, row by row. What one row draws never depends on its neighbours."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor
from torch.compiler import set_stance

from litgpt.cache import Cache, upload
from litgpt.errors import UserError
from litgpt.hardware import GB, device_memory_gb
from litgpt.model import GPT
from litgpt.tokenizer import StreamDecoder, Tokenizer

CHUNK = 2048  # the most prompt tokens that one call of the model sees: more would only cost memory
BUCKET = 256  # compiled attention reads a multiple of so many tokens, so that there are few graphs
FEWER = "Lower `max_new_tokens`, or a fixed size of the memory if you set one."
NO_TOKEN = -1  # what is drawn where there are no probabilities
PREFIX = 1024  # how many of the likeliest tokens `top_p` looks at before it sorts all of them


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
    generator: Random = field(init=False, repr=False)
    counts: Tensor | None = field(init=False, default=None, repr=False)  # (2, V): how often each token was prompted, and generated

    def __post_init__(self) -> None:
        if not 0.0 <= self.top_p <= 1.0:
            raise UserError(f"`top_p` is a probability, but got {self.top_p}. Use 1.0 to sample from all tokens.")
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"`temperature` must be 0 or more, but got {self.temperature}. Use 0 to take the likeliest token.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"`top_k` counts the tokens to choose from, but got {self.top_k}. Use null (None) to sample from all tokens.")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise UserError(f"`repetition_penalty` must be above 0, but got {self.repetition_penalty}. Use 1.0 for none.")
        if self.seed is None:
            self.seed = int(torch.randint(2**62, (), device="cpu"))
        self.generator = Random(self.seed)

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
    logits = penalized(logits, rows)
    drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
    if len(drawn) < len(rows):
        tokens = logits.argmax(-1)
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
        raise UserError(
            "The model computes no numbers (NaN or infinity): its weights are damaged, or `precision` is too small for them. "
            "Download or train it again, or try 32-true."
        )
    return drawn


def probabilities(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Return what each row draws from, (B, V): penalties are not applied here, see `penalized`."""
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


class StopMatcher:
    """Holds back what may turn out to be the start of a stop sequence, of tokens or of characters.

    Args:
        sequences: Any of them ends the row. Where two end at the same place, the longer one is taken away.
    """

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.sequences = [list(sequence) for sequence in sequences if len(sequence) > 0]
        self.held: list = []
        self.stopped: list | None = None  # the sequence that was found

    def push(self, new: Iterable) -> list:
        """Take tokens or characters and return those that are now safe to show."""
        if self.stopped is not None:
            return []
        shown = []
        for element in new:
            self.held.append(element)
            found = [sequence for sequence in self.sequences if self.held[-len(sequence) :] == sequence]
            if found:
                self.stopped = max(found, key=len)
                shown += self.held[: -len(self.stopped)]
                self.held = []
                break
            waiting = max((n for sequence in self.sequences if (n := self._overlap(sequence))), default=0)
            n_safe = len(self.held) - waiting
            shown += self.held[:n_safe]
            del self.held[:n_safe]
        return shown

    def flush(self) -> list:
        """Return what is still held back: nothing more will come."""
        held, self.held = self.held, []
        return held

    def _overlap(self, sequence: list) -> int:
        """Return how long a start of the sequence stands at the end of what is held."""
        longest = min(len(sequence) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held[-n:] == sequence[:n]), 0)


def compile_blocks(model: GPT, backend: str | Callable = "inductor") -> None:
    """Compile each block in place, so that no parameter's name changes, for decoding with a cache of `new_cache`."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # all blocks share one code object
    for block in model.transformer.h:
        block.compile(backend=backend, dynamic=False)


def new_cache(model: GPT, rows: int, length: int, rewind: int = 0) -> Cache:
    """Return an empty memory as `GPT.new_cache` does; for a compiled model one whose use does not compile anew for every length.

    Args:
        model: The model.
        rows: How many sequences fit.
        length: How many tokens fit in each.
        rewind: How many tokens can always be taken back.

    Raises:
        UserError: The device has not enough memory.
    """
    compiled = model.transformer.h[0]._compiled_call_impl is not None
    if compiled:
        length = min(-(-length // BUCKET) * BUCKET, model.config.block_size)
    sizes = dict(chunk=min(CHUNK, length), rewind=min(rewind, length))
    _check_memory(model, rows, length, **sizes)
    try:
        cache = model.new_cache(rows, length, **sizes)
    except torch.OutOfMemoryError:  # of a GPU, which may hold more than the weights
        raise UserError(f"The device has no memory left to remember {rows * length:,} tokens. {FEWER}") from None
    cache.bucket = BUCKET if compiled else 1
    return cache


def _check_memory(model: GPT, rows: int, length: int, chunk: int, rewind: int) -> None:
    """Refuse a memory that does not fit beside the weights. The system would grant it, and stop the program once it is written to."""
    weight = model.transformer.wte.weight
    states = [block.new_state(rows, length, chunk, rewind, weight.dtype, torch.device("meta")) for block in model.transformer.h]
    needed = rows * sum(part.nbytes for state in states if state is not None for part in state.parts(0, length)) / GB
    taken, there = sum(parameter.nbytes for parameter in model.parameters()) / GB, device_memory_gb(weight.device)
    if needed + taken > there:
        raise UserError(
            f"To remember {rows * length:,} tokens takes {needed:,.1f} GB, but this machine's {weight.device.type} has {there:.1f} GB, of "
            f"which the weights take {taken:.1f} GB. {FEWER}"
        )


@torch.inference_mode()
def prefill(model: GPT, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Feed each row its prompt, chunk by chunk, and return the logits of each one's last token, (B, V).

    Args:
        model: The model.
        prompts: What the rows 0, 1, ... of the cache have not seen yet, at least one token each.
        cache: The memory of the rows.
    """
    known = model.config.padded_vocab_size
    if (highest := max(token for prompt in prompts for token in prompt)) >= known:
        raise UserError(
            f"The prompt has the token id {highest}, but the model knows {known} tokens. Use the tokenizer it was trained with."
        )
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for start in range(0, max(map(len, prompts)), cache.chunk):
        pieces = {row: prompt[start : start + cache.chunk] for row, prompt in enumerate(prompts) if len(prompt) > start}
        counts = [len(piece) for piece in pieces.values()]
        packed = min(counts) < max(counts)
        tokens = [[token for piece in pieces.values() for token in piece]] if packed else [list(piece) for piece in pieces.values()]
        logits = model(upload(tokens, cache.device), cache=cache.span(counts, list(pieces), packed=packed), select="last")
        if len(prompts) == len(pieces) and start + cache.chunk >= max(map(len, prompts)):
            return logits
        for row, row_logits in zip(pieces, logits, strict=True):
            found[row] = row_logits
    return torch.stack(found)


@torch.inference_mode()
def decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[RowState],
    cache: Cache,
    max_new_tokens: int,
    stop: Iterable[Sequence[int]] = (),
    include_stop: bool = False,
) -> Iterator[list[list[int]]]:
    """Yield, after every step, each row's new tokens that are safe to show.

    A row ends at a stop sequence, after `max_new_tokens`, or where its place in the cache is full; then it takes no more time.

    Args:
        model: The model.
        prompts: What the rows 0, 1, ... of the cache have not seen yet, at least one token each.
        rows: How each row is sampled.
        cache: The memory of the rows. It knows all tokens afterwards but the last one of each row.
        max_new_tokens: How many tokens to add to each row at most.
        stop: Token sequences that end a row.
        include_stop: Whether to show them.
    """
    stop = [list(sequence) for sequence in stop]
    matchers = [StopMatcher(stop) for _ in rows]
    logits = prefill(model, prompts, cache) if cache.bucket == 1 else _eager_prefill(model, prompts, cache)
    for row, prompt in zip(rows, prompts, strict=True):
        row.count_prompt(prompt, logits.size(-1), logits.device)
    running = list(range(len(rows)))
    for n in range(1, max_new_tokens + 1):
        tokens = sample(logits, [rows[i] for i in running])  # (B,)
        shown: list[list[int]] = [[] for _ in rows]
        going = []
        for place, (i, token) in enumerate(zip(running, checked(tokens), strict=True)):
            matcher = matchers[i]
            shown[i] = matcher.push([token])
            if matcher.stopped is not None:
                shown[i] += matcher.stopped if include_stop else []
            elif n == max_new_tokens or cache.lengths[i] == cache.length:
                shown[i] += matcher.flush()
            else:
                going.append(place)
        yield shown
        if not going:
            return
        if len(going) < len(running):
            tokens, running = tokens[upload(going, tokens.device)], [running[place] for place in going]
        span = cache.span([1] * len(running), running)
        logits = model(tokens.unsqueeze(1), cache=span, select="last")  # (B, V)


def _eager_prefill(model: GPT, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Feed prompts to a compiled model: they have all lengths, and only single tokens are worth compiling for."""
    bucket, cache.bucket = cache.bucket, 1
    try:
        with set_stance("force_eager"):
            return prefill(model, prompts, cache)
    finally:
        cache.bucket = bucket


def room(n_prompt: int, max_new_tokens: int, context: int) -> int:
    """Return how many tokens may be generated: as many as asked for, or as the context leaves.

    Raises:
        UserError: It leaves none, or none are asked for.
    """
    if max_new_tokens < 1:
        raise UserError(f"`max_new_tokens` must be at least 1, but got {max_new_tokens}.")
    if n_prompt == 0:
        raise UserError("The prompt has no tokens. Say something, for there is nothing to go on from.")
    if n_prompt >= context:
        needed = f"The prompt has {n_prompt} tokens, but the context is {context} tokens, of which an answer needs at least one."
        raise UserError(f"{needed} Shorten the prompt.")
    return min(max_new_tokens, context - n_prompt)


def complete(
    model: GPT,
    prompt: Sequence[int],
    row: RowState,
    max_new_tokens: int,
    stop: Iterable[Sequence[int]] = (),
    include_stop: bool = False,
    cache: Cache | None = None,
) -> Iterator[list[int]]:
    """Yield the tokens that go on from one prompt, up to the model's context; see `decode`.

    Args:
        model: The model.
        prompt: Token ids.
        row: How to sample.
        max_new_tokens: How many tokens to generate at most.
        stop: Token sequences that end the answer.
        include_stop: Whether to yield them.
        cache: An empty memory of one row; by default one that just fits.

    Raises:
        UserError: The prompt is empty or too long. It is raised by the call, not by the first token.
    """
    n_new = room(len(prompt), max_new_tokens, model.config.block_size if cache is None else cache.length)
    cache = cache or new_cache(model, 1, len(prompt) + n_new)
    return (new for [new] in decode(model, [prompt], [row], cache, n_new, stop, include_stop))


def stream_text(
    tokenizer: Tokenizer, tokens: Iterable[Sequence[int]], stop_strings: Iterable[str] = (), behind: Sequence[int] = ()
) -> Iterator[str]:
    """Yield text as soon as it is certain: no half characters, nothing that may belong to a stop string.

    Args:
        tokenizer: The tokenizer.
        tokens: The new ids of each step.
        stop_strings: The text ends before the first of these.
        behind: The ids that the tokens go on from, if their text does so too: then the first word keeps its space.
    """
    decoder, matcher = StreamDecoder(tokenizer), StopMatcher(stop_strings)
    for token in behind:
        decoder.push(token)
    decoder.flush()
    for new in tokens:
        text = "".join(matcher.push("".join(map(decoder.push, new))))
        if text:
            yield text
        if matcher.stopped is not None:
            return
    text = "".join(matcher.push(decoder.flush()) + matcher.flush())
    if text:
        yield text


def recorded(steps: Iterable[list[int]], made: list[int]) -> Iterator[list[int]]:
    """Pass on the tokens of each step, and append them to `made`."""
    for new in steps:
        made += new
        yield new
