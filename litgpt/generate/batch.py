"""The one decode loop: prompts join, every step adds a token to each row, finished rows leave."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.compiler import set_stance

from litgpt.cache import Cache, Span, upload
from litgpt.errors import UserError
from litgpt.generate.sampling import NO_NUMBERS, NO_TOKEN, RowState, sample
from litgpt.generate.stopping import StopMatcher
from litgpt.model import GPT

COPIED = 32  # fewer tokens are computed again rather than copied from another row


class TokenLogprob(NamedTuple):
    """How likely a token was, as natural logarithms of the model's own probabilities, before temperature and penalties."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens at its place


class AdapterSlots(Protocol):
    """Tells the model's layers which adapter each token uses, see `litgpt.deploy.adapters`."""

    def set(self, tokens: list[int], selected: list[int]) -> None:
        """Take the slots of all tokens of the next call, and of those that reach the head."""


@dataclass(eq=False)
class Answer:
    """A prompt and what goes on from it.

    Args:
        prompt: Token ids, at least one.
        row: How to sample.
        max_new_tokens: The most tokens to add; with 0 only the prompt is scored.
        stop: Token sequences that end it.
        n_logprobs: Keep how likely each new token was, and so many of the likeliest tokens at its place; None keeps nothing.
        scores_prompt: Keep the same for the prompt's tokens.
        slot: Which adapter to use; 0 is none.
    """

    prompt: list[int]
    row: RowState
    max_new_tokens: int
    stop: Sequence[Sequence[int]] = ()
    n_logprobs: int | None = None
    scores_prompt: bool = False
    slot: int = 0
    made: list[int] = field(init=False, default_factory=list)  # all new tokens, a stop sequence included
    n_shown: int = field(init=False, default=0)  # how many of them are certain to be part of the answer
    finish: str | None = field(init=False, default=None)  # "stop", "length" or "error"; None while it goes on
    logprobs: list[TokenLogprob] = field(init=False, default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(init=False, default_factory=list)  # the first token has none
    n_reused: int = field(init=False, default=0)  # tokens of the prompt that were remembered from earlier
    place: int | None = field(init=False, default=None)  # its row of the memory
    n_before: int = field(init=False, default=0)  # tokens that the row knew before the prompt's first

    def __post_init__(self) -> None:
        self.matcher = StopMatcher(self.stop)

    @property
    def error(self) -> str:
        """Why it finished with "error", in one sentence."""
        return (self.row.grammar and self.row.grammar.error) or NO_NUMBERS

    def unseen(self, n_known: int, most: int) -> list[int]:
        """Return the next tokens to feed, at most so many, of a row that knows `n_known`."""
        at, n = n_known - self.n_before, len(self.prompt)
        return self.prompt[at : at + most] if at < n else self.made[at - n : at - n + most]

    def known(self, length: int) -> list[int]:
        """Return the tokens of prompt and answer that a row of this length remembers."""
        n = length - self.n_before
        return self.prompt[:n] + self.made[: max(n - len(self.prompt), 0)]


class Batch:
    """Rows of one memory that are continued together.

    Args:
        model: The model.
        cache: The memory.
        max_tokens: How many tokens one step may feed, at least one for each row. Rows that generate come first, prompts take what is left.
        keeps_prefixes: Free rows go on remembering what they last knew, for prompts that begin alike.
        adapters: Where the model's layers look up each token's adapter.
    """

    def __init__(
        self, model: GPT, cache: Cache, max_tokens: int, keeps_prefixes: bool = False, adapters: AdapterSlots | None = None
    ) -> None:
        self.model, self.cache, self.max_tokens, self.adapters = model, cache, max_tokens, adapters
        self.keeps_prefixes = keeps_prefixes
        self.running: list[Answer] = []
        self.free = set(range(len(cache.lengths)))
        self.kept: dict[int, tuple[int, list[int]]] = {}  # by free row, the longest unused first: adapter and tokens

    @property
    def n_free(self) -> int:
        """How many answers may join."""
        return len(self.free)

    def join(self, answer: Answer, place: int | None = None) -> None:
        """Let an answer take part in the next steps.

        Args:
            answer: What to add.
            place: The row to go on with, behind what it remembers; by default a free one, less what the prompt does not begin with.

        Raises:
            UserError: The model does not know a token of the prompt.
        """
        vocab_size = self.model.config.padded_vocab_size
        check_ids(answer.prompt, vocab_size)
        if place is None:
            place = self._find_place(answer)
        else:
            answer.n_before = self.cache.lengths[place]
        self.free.discard(place)
        self.kept.pop(place, None)
        answer.place = place
        answer.row.count_prompt(answer.prompt, vocab_size, self.cache.device)
        if answer.scores_prompt:
            answer.prompt_logprobs.append(None)
        self.running.append(answer)

    def leave(self, answer: Answer) -> None:
        """Take an answer out, finished or not."""
        self.running.remove(answer)
        place, answer.place = answer.place, None
        self.free.add(place)
        if self.keeps_prefixes:
            self.kept[place] = (answer.slot, answer.known(self.cache.lengths[place]))

    def forget(self, slot: int | None = None) -> None:
        """Drop what free rows remember, of one adapter or of all."""
        for place in [place for place, (used, _) in self.kept.items() if slot in (None, used)]:
            del self.kept[place]

    @torch.inference_mode()
    def step(self) -> list[tuple[Answer, list[int]]]:
        """Feed each row what it has not seen yet and draw tokens where that is all; return what can be shown now.

        An answer of which nothing new is certain is left out, unless it has finished: then it has left the batch.
        """
        fed = self._schedule()
        if not fed:
            return []
        logits, ends = self._call(fed)  # (n, V); where each answer's own end
        for (answer, tokens), end in zip(fed, ends, strict=True):
            if answer.scores_prompt and not answer.made:
                self._score_prompt(answer, logits[end - len(tokens) : end])
        whole = [(answer, end - 1) for (answer, _), end in zip(fed, ends, strict=True) if self._is_fed(answer)]
        ended = [answer for answer, _ in whole if answer.max_new_tokens == 0]
        for answer in ended:
            answer.finish = "length"
            self.leave(answer)
        return [(answer, []) for answer in ended] + self._drawn([pair for pair in whole if pair[0].finish is None], logits)

    def _drawn(self, whole: list[tuple[Answer, int]], logits: Tensor) -> list[tuple[Answer, list[int]]]:
        """Draw a token for each answer, whose logits stand at the number beside it."""
        if not whole:
            return []
        answers, at = [answer for answer, _ in whole], [place for _, place in whole]
        if at != list(range(len(logits))):
            logits = logits[upload(at, logits.device)]
        drawn = sample(logits, [answer.row for answer in answers]).tolist()  # the only line that waits for the device
        self._keep_logprobs(answers, logits, drawn)
        return self._pushed(answers, drawn)

    def _is_fed(self, answer: Answer) -> bool:
        return self.cache.lengths[answer.place] - answer.n_before == len(answer.prompt) + len(answer.made)

    def _pushed(self, answers: list[Answer], drawn: list[int]) -> list[tuple[Answer, list[int]]]:
        """Add the drawn tokens to their answers and return what is to be shown."""
        changed = []
        for answer, token in zip(answers, drawn, strict=True):
            if token == NO_TOKEN:
                answer.finish, shown = "error", []
            else:
                shown = self._push(answer, token)
            answer.n_shown += len(shown)
            if answer.finish is not None:
                self.leave(answer)
            if shown or answer.finish is not None:
                changed.append((answer, shown))
        return changed

    def _push(self, answer: Answer, token: int) -> list[int]:
        answer.made.append(token)
        shown, grammar = answer.matcher.push([token]), answer.row.grammar
        if answer.matcher.stopped is not None:
            answer.finish = "stop"
            return shown
        if grammar is not None:
            grammar.accept(token)
        if grammar is not None and grammar.error:
            answer.finish = "error"
        elif grammar is not None and grammar.is_finished:
            answer.finish = "stop"
        elif len(answer.made) == answer.max_new_tokens or self.cache.lengths[answer.place] == self.cache.length:
            answer.finish = "length"
        return shown if answer.finish is None else shown + answer.matcher.flush()

    # What a step feeds

    def _schedule(self) -> list[tuple[Answer, list[int]]]:
        """Choose what each answer feeds, by row: those that generate first, prompts in the room that is left."""
        fed, room = [], self.max_tokens
        for answer in sorted(self.running, key=lambda answer: not answer.made):
            tokens = answer.unseen(self.cache.lengths[answer.place], min(room, self.cache.chunk))
            if tokens:
                fed.append((answer, tokens))
                room -= len(tokens)
        if fed and all(len(tokens) == 1 for _, tokens in fed):
            self._move_together([answer for answer, _ in fed])
        return sorted(fed, key=lambda pair: pair[0].place)

    def _call(self, fed: list[tuple[Answer, list[int]]]) -> tuple[Tensor, list[int]]:
        """Return the logits of the tokens that matter, and for each answer where its own end among them."""
        answers, tokens = zip(*fed, strict=True)
        places, counts = [answer.place for answer in answers], [len(piece) for piece in tokens]
        scored = [answer.scores_prompt and not answer.made for answer in answers]
        ends = []
        for is_scored, n in zip(scored, counts, strict=True):
            ends.append((ends[-1] if ends else 0) + (n if is_scored else 1))
        cache = self.cache
        if max(counts) == 1:  # rows between them take part as padding: that costs less than a copy of what all rows remember
            first, last = places[0], places[-1]
            ends = [place - first + 1 for place in places]
            slots, idx = [0] * (last + 1 - first), [[0]] * (last + 1 - first)
            for answer, piece in fed:
                slots[answer.place - first], idx[answer.place - first] = answer.slot, piece
            span = cache.span([int(first + i in places) for i in range(len(idx))], range(first, last + 1))
            return self._logits(idx, span, "last", slots, slots), ends
        packed = len(fed) > 1 and (min(counts) < max(counts) or any(scored))
        idx = [[token for piece in tokens for token in piece]] if packed else [list(piece) for piece in tokens]
        slots = [answer.slot for answer, piece in fed for _ in piece]
        select: str | Tensor = "last"
        if any(scored):
            stops = [sum(counts[: i + 1]) for i in range(len(counts))]
            chosen = [i for all_, n, stop in zip(scored, counts, stops, strict=True) for i in range(stop - (n if all_ else 1), stop)]
            select, selected = upload(chosen, cache.device), [slots[i] for i in chosen]
        else:
            selected = [answer.slot for answer in answers]
        bucket, cache.bucket = cache.bucket, 1  # prompts have all lengths, and only single tokens are worth compiling for
        try:
            span = cache.span(counts, places, packed=packed)
            if bucket == 1:
                return self._logits(idx, span, select, slots, selected), ends
            with set_stance("force_eager"):
                return self._logits(idx, span, select, slots, selected), ends
        finally:
            cache.bucket = bucket

    def _logits(self, idx: list[list[int]], span: Span, select: str | Tensor, slots: list[int], selected: list[int]) -> Tensor:
        if self.adapters is not None:
            self.adapters.set(slots, selected)
        return self.model(upload(idx, self.cache.device), cache=span, select=select)

    # Probabilities

    def _score_prompt(self, answer: Answer, logits: Tensor) -> None:
        """Keep how likely the prompt's tokens behind those of `logits` (n, V) were."""
        done = len(answer.prompt_logprobs)
        targets = answer.prompt[done : done + len(logits)]
        answer.prompt_logprobs += logprobs_of(logits[: len(targets)], targets, answer.n_logprobs or 0)

    def _keep_logprobs(self, answers: list[Answer], logits: Tensor, drawn: list[int]) -> None:
        for i, (answer, token) in enumerate(zip(answers, drawn, strict=True)):
            if answer.n_logprobs is not None and token != NO_TOKEN:
                answer.logprobs += logprobs_of(logits[i : i + 1], [token], answer.n_logprobs)

    # Which rows

    def _find_place(self, answer: Answer) -> int:
        """Choose a free row and let it remember as much of the prompt as any row does."""
        source, n = self._longest_prefix(answer) if self.keeps_prefixes and not answer.scores_prompt else (None, 0)
        if source in self.free and 2 * n >= len(self.kept[source][1]):
            place = source
        else:
            empty = self.free - self.kept.keys()
            place = min(empty) if empty else next(iter(self.kept))
            if n >= COPIED and source != place:
                self.cache.copy(source, place)
            elif source != place:
                n = 0
        answer.n_reused = self.cache.truncate(place, n)
        return place

    def _longest_prefix(self, answer: Answer) -> tuple[int | None, int]:
        """Return which row remembers most of a prompt, and how many tokens of it, at most all but the last one."""
        remembered = dict(self.kept)
        remembered |= {other.place: (other.slot, other.known(self.cache.lengths[other.place])) for other in self.running}
        best, most = None, 0
        for place, (slot, tokens) in remembered.items():
            n = min(common_length(tokens, answer.prompt), len(answer.prompt) - 1) if slot == answer.slot else 0
            if n > most and n >= self.cache.floors[place]:
                best, most = place, n
        return best, most

    def _move_together(self, answers: list[Answer]) -> None:
        """Let the rows of answers lie close together, for idle rows between them cost time."""
        while max(answer.place for answer in answers) - min(answer.place for answer in answers) >= 2 * len(answers):
            top = max(answers, key=lambda answer: answer.place)
            self._exchange(top, min(place for place in self.free if place > min(answer.place for answer in answers)))

    def _exchange(self, answer: Answer, place: int) -> None:
        """Move an answer to a free row, and what that row remembers to the answer's."""
        old, kept = answer.place, self.kept.pop(place, None)
        snapshot = None if kept is None else self.cache.snapshot(place)
        self.cache.copy(old, place)
        self.free.remove(place)
        self.free.add(old)
        answer.place = place
        if snapshot is not None:
            self.cache.restore(old, snapshot)
            self.kept[old] = kept


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids that the model does not know.

    Raises:
        UserError: There is one.
    """
    if max(ids) >= vocab_size or min(ids) < 0:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise UserError(
            f"The prompt has the token id {wrong}, but the model knows {vocab_size} tokens. Use the tokenizer it was trained with."
        )


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # compares slices, which is fast
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def logprobs_of(logits: Tensor, tokens: Sequence[int], n_top: int) -> list[TokenLogprob]:
    """Return how likely tokens were.

    Args:
        logits: Of the tokens' places, (n, V).
        tokens: The tokens, n of them.
        n_top: How many of the likeliest tokens to name for each.
    """
    if not tokens:
        return []
    logs = logits.float().log_softmax(-1)
    own = logs.gather(1, upload([[token] for token in tokens], logs.device)).squeeze(1).tolist()
    if n_top == 0:
        return [TokenLogprob(token, logprob, []) for token, logprob in zip(tokens, own, strict=True)]
    values, indices = logs.topk(min(n_top, logs.size(-1)))
    tops = [list(zip(ids, logs_, strict=True)) for ids, logs_ in zip(indices.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*each) for each in zip(tokens, own, tops, strict=True)]
