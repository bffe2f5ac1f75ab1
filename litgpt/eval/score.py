"""How likely continuations are. Those of one context share it, and contexts share what they begin with alike."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isnan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.cache import upload
from litgpt.errors import UserError
from litgpt.generate.batch import COPIED, common_length
from litgpt.generate.memory import new_cache
from litgpt.generate.sampling import NO_NUMBERS
from litgpt.model import GPT

READ = 2048  # how many tokens of contexts one call of the model sees
SCORED = 512  # and how many of continuations: each of them has logits
CACHED = 16  # whose logits the caches of a CPU hold: more at a time take twice as long
ROWS = 16  # how many continuations of a context are read at a time
AUTO = {"cpu": 2048, "mps": 4096}  # how many tokens are read at a time where the batch size is chosen for the device
AUTO_ELSEWHERE = 16384

Pair = tuple[Sequence[int], Sequence[int]]  # the ids of a context, at least one, and of what goes on from it


class Score(NamedTuple):
    """How likely a continuation is."""

    logprob: float  # the natural logarithm of its probability
    is_greedy: bool  # whether each of its tokens is the likeliest one


@dataclass
class Question:
    """A context, and continuations of it with the numbers of the pairs that have them."""

    context: tuple[int, ...]
    answers: list[tuple[tuple[int, ...], list[int]]]

    @property
    def is_alone(self) -> bool:
        """Whether there is one continuation, of several tokens: then it is read together with the end of the context."""
        return len(self.answers) == 1 and len(self.answers[0][0]) > 1

    @property
    def read_first(self) -> tuple[int, ...]:
        """What is read before the continuations."""
        return self.context[:-1] if self.is_alone else self.context

    @property
    def n_rows(self) -> int:
        """How many rows of memory it takes: the first token of a continuation follows from the context alone."""
        return max(1, sum(len(answer) > 1 for answer, _ in self.answers))

    @property
    def length(self) -> int:
        """How many tokens a row of it has: the last token of a continuation is only asked for."""
        return len(self.context) + max(len(answer) for answer, _ in self.answers) - 1


@torch.inference_mode()
def scores(
    model: GPT, pairs: Sequence[Pair], batch_size: int | None = None, advance: Callable[[int], object] = lambda n: None
) -> list[Score]:
    """Return how likely each continuation is behind its context.

    What does not fit into the model's context is cut off at the left. No result depends on `batch_size`, but for rounding.

    Args:
        model: The model.
        pairs: Contexts and continuations.
        batch_size: How many contexts to read at a time; by default as many as suit the device.
        advance: Told how many more pairs are done.

    Raises:
        UserError: A continuation is longer than the model's context, the memory does not fit, or the model computes no numbers.
    """
    found = [Score(0.0, True)] * len(pairs)
    alone = model.rope.depends_on_length  # the rotations of such a model follow from how long the whole is
    groups = questions(pairs, model.config.block_size, alone)
    if not groups:
        return found
    _check_ids(model, groups)
    batches = list(_batches(groups, 1 if alone else batch_size, model.transformer.wte.weight.device))
    reader = None
    if not alone:
        reader = Reader(model, max(map(_n_rows, batches)), max(question.length for question in groups))
    for batch in batches:
        answers = (reader or Reader(model, _n_rows(batch), batch[0].length)).read(batch)
        for (_, numbers), score in zip((answer for question in batch for answer in question.answers), answers, strict=True):
            if isnan(score.logprob):
                raise UserError(NO_NUMBERS)
            for i in numbers:
                found[i] = score
            advance(len(numbers))
    return found


def questions(pairs: Sequence[Pair], limit: int, alone: bool = False) -> list[Question]:
    """Return the pairs, those with nothing to score left out, by context; similar contexts follow each other.

    Args:
        pairs: Contexts and continuations.
        limit: The model's context: it reads all tokens but the last one.
        alone: Whether each pair is a question of its own.
    """
    by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > limit:
            raise UserError(f"A text to score has {len(continuation)} tokens, but the model's context is {limit} tokens. Shorten it.")
        if continuation:
            whole = (*context, *continuation)[-limit - 1 :]
            by_context[whole[: -len(continuation)]][tuple(continuation)].append(i)
    return [Question(context, lot) for context in sorted(by_context) for lot in _lots(list(by_context[context].items()), alone)]


def _lots(answers: list[tuple[tuple[int, ...], list[int]]], alone: bool) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Yield the continuations of a context in lots whose rows fit beside each other: few, or short ones."""
    lot, n_tokens, n_rows = [], 0, 0
    for answer in answers:
        n, takes_row = len(answer[0]), len(answer[0]) > 1
        if lot and (alone or n_tokens + n > READ or n_rows + takes_row > ROWS):
            yield lot
            lot, n_tokens, n_rows = [], 0, 0
        lot.append(answer)
        n_tokens, n_rows = n_tokens + n, n_rows + takes_row
    yield lot


def _batches(groups: list[Question], batch_size: int | None, device: torch.device) -> Iterator[list[Question]]:
    """Yield the questions that are read at a time."""
    waiting = iter(groups)
    if batch_size is not None:
        while batch := list(islice(waiting, batch_size)):
            yield batch
        return
    batch, longest, n_rows = [], 0, 0
    for question in waiting:
        longest, n_rows = max(longest, question.length), n_rows + question.n_rows
        if batch and longest * n_rows > AUTO.get(device.type, AUTO_ELSEWHERE):
            yield batch
            batch, longest, n_rows = [], question.length, question.n_rows
        batch.append(question)
    yield batch


def _n_rows(batch: list[Question]) -> int:
    return sum(question.n_rows for question in batch)


def _check_ids(model: GPT, groups: list[Question]) -> None:
    known = model.config.padded_vocab_size
    highest = max(max(*question.context, *(max(answer) for answer, _ in question.answers)) for question in groups)
    if highest >= known:
        raise UserError(f"A text has the token id {highest}, but the model knows {known} tokens. Use the tokenizer it was trained with.")


def windows(ids: Sequence[int], beginning: int, length: int, stride: int | None = None) -> Iterator[tuple[list[int], list[int]]]:
    """Yield pairs of context and continuation that ask for each token of a text once.

    Args:
        ids: The text.
        beginning: What stands before it.
        length: How many tokens the model reads at a time.
        stride: How many tokens each window but the first asks for. The smaller, the more context they have; by default all of `length`.
    """
    whole, end = [beginning, *ids], 0
    while end < len(ids):
        start, end = end, min(end + (stride or length if end else length), len(ids))
        yield whole[max(end - length, 0) : start + 1], whole[start + 1 : end + 1]


class Reader:
    """A model and a memory, of which row 0 goes on knowing the context that it read last.

    Args:
        model: The model.
        rows: How many rows the largest batch takes.
        length: How many tokens the longest row has.
    """

    def __init__(self, model: GPT, rows: int, length: int) -> None:
        self.model, self.cache = model, new_cache(model, rows, length)
        self.known: tuple[int, ...] = ()

    def read(self, batch: list[Question]) -> list[Score]:
        """Return the scores of all continuations of a batch, in order."""
        logits = self._read_contexts([question.read_first for question in batch])  # by row, (V,)
        flat = [(row, question, answer) for row, question in enumerate(batch) for answer, _ in question.answers]
        begun = {i: (row, answer[0]) for i, (row, question, answer) in enumerate(flat) if not question.is_alone}
        marks: list[list[tuple[float, bool]]] = [[] for _ in flat]
        if begun:
            behind = torch.stack([logits[row] for row, _ in begun.values()])
            for i, mark in zip(begun, _marks(behind, [token for _, token in begun.values()]), strict=True):
                marks[i].append(mark)
        placed = self._placed(flat)
        for call in _calls([(row, tokens) for row, (_, tokens, _) in placed.items()], SCORED):
            targets = [target for row, start, piece in call for target in placed[row][2][start : start + len(piece)]]
            new = iter(_marks(self._call(call, None), targets))
            for row, _, piece in call:
                marks[placed[row][0]] += islice(new, len(piece))
        return [Score(sum(logprob for logprob, _ in each), all(hit for _, hit in each)) for each in marks]

    def _read_contexts(self, contexts: list[tuple[int, ...]]) -> dict[int, Tensor]:
        """Let the rows 0, 1, ... know the contexts, and return the logits behind each that is not empty, (V,) by row."""
        cache, (first, *others) = self.cache, contexts
        shared = max(0, min(min(common_length(first, context), len(context) - 1) for context in contexts))  # each has something left
        n = cache.truncate(0, min(common_length(self.known, first), shared))
        if others and shared - n >= COPIED:
            self._feed([(0, first[n:shared])])
            n = shared
        elif others and n < COPIED:
            n = cache.truncate(0, 0)
        for row in range(1, len(contexts)):
            if n:
                cache.copy(0, row)
            else:
                cache.truncate(row, 0)
        self.known = first
        return self._feed([(row, context[n:]) for row, context in enumerate(contexts)])

    def _placed(self, flat: list[tuple[int, Question, tuple[int, ...]]]) -> dict[int, tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """Give each continuation that is read a row that knows its context; return its number, what is fed and what follows, by row."""
        placed, spare = {}, flat[-1][0] + 1
        for number, (row, question, answer) in enumerate(flat):
            if question.is_alone:
                placed[row] = number, (question.context[-1], *answer[:-1]), answer
            elif len(answer) > 1:
                place = row
                if row in placed:
                    place, spare = spare, spare + 1
                    self.cache.copy(row, place)
                placed[place] = number, answer[:-1], answer[1:]
        return dict(sorted(placed.items()))

    def _feed(self, fed: list[tuple[int, tuple[int, ...]]]) -> dict[int, Tensor]:
        """Let rows read on, and return the logits of the last token of each that has one, (V,) by row."""
        found: dict[int, Tensor] = {}
        for call in _calls(fed, READ):
            found |= zip((row for row, _, _ in call), self._call(call, "last"), strict=True)
        return found

    def _call(self, call: list[tuple[int, int, tuple[int, ...]]], select: str | None) -> Tensor:
        """Return the logits of all tokens of a call, or of those that `select` says, (n, V)."""
        rows, counts = [row for row, _, _ in call], [len(piece) for _, _, piece in call]
        side_by_side = rows == list(range(rows[0], rows[0] + len(rows))) and min(counts) == max(counts)
        packed = len(call) > 1 and not side_by_side
        idx = [[token for _, _, piece in call for token in piece]] if packed else [list(piece) for _, _, piece in call]
        span = self.cache.span(counts, rows, packed=packed)
        return self.model(upload(idx, self.cache.device), cache=span, select=select).flatten(0, -2)


def _calls(fed: list[tuple[int, tuple[int, ...]]], most: int) -> Iterator[list[tuple[int, int, tuple[int, ...]]]]:
    """Cut the tokens that rows are to read into calls of at most so many; yield row, offset and piece."""
    call, room = [], most
    for row, tokens in fed:
        start = 0
        while start < len(tokens):
            piece = tokens[start : start + room]
            call.append((row, start, piece))
            start, room = start + len(piece), room - len(piece)
            if room == 0:  # so a row has one piece in a call
                yield call
                call, room = [], most
    if call:
        yield call


def _marks(logits: Tensor, tokens: Sequence[int]) -> list[tuple[float, bool]]:
    """Return how likely tokens are behind logits (n, V), and whether each is the likeliest one."""
    targets = upload(list(tokens), logits.device)
    n = CACHED if logits.device.type == "cpu" else len(tokens)
    found = []
    for part, ids in zip(logits.split(n), targets.split(n), strict=True):
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        hits = part.max(-1).indices == ids  # argmax takes twice as long on a CPU
        found.append(torch.stack((F.cross_entropy(part, ids, reduction="none").neg(), hits)))
    logprobs, hits = torch.cat(found, dim=1).tolist()
    return [(logprob, hit > 0) for logprob, hit in zip(logprobs, hits, strict=True)]
