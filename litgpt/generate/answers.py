"""Prompts in, texts out: answers of many prompts at a time, with every option of how they are made."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from time import perf_counter
from typing import Any, NamedTuple

from litgpt.cache import CHUNK, Cache
from litgpt.errors import UserError
from litgpt.files import kind_of
from litgpt.generate.batch import Answer, Batch, TokenLogprob
from litgpt.generate.grammar import Grammar, compile_grammar
from litgpt.generate.memory import new_cache, room
from litgpt.generate.sampling import RowState
from litgpt.generate.stopping import StopMatcher
from litgpt.model import GPT
from litgpt.tokenizer import StreamDecoder, Tokenizer

WHOLE, ANY = (Integral, "a whole number"), (Real, "a number")
NUMBERS = {  # what kind of number each option is
    "max_new_tokens": WHOLE,
    "temperature": ANY,
    "top_k": WHOLE,
    "top_p": ANY,
    "min_p": ANY,
    "repetition_penalty": ANY,
    "presence_penalty": ANY,
    "frequency_penalty": ANY,
    "seed": WHOLE,
    "logprobs": WHOLE,
}
MAYBE = ("top_k", "seed", "logprobs")  # those that may be None


class Generated(NamedTuple):
    """An answer and how it came about."""

    text: str
    tokens: list[int]  # without an end token; those that a stop string ended in are among them
    logprobs: list[TokenLogprob]  # of the tokens, if they were asked for
    finish: str  # "stop", or "length" where it was cut off


@dataclass(frozen=True)
class Options:
    """How an answer is made.

    Args:
        max_new_tokens: The most tokens that it may have.
        temperature: See `RowState` for this and the following ones.
        top_k: See there.
        top_p: See there.
        min_p: See there.
        repetition_penalty: See there.
        presence_penalty: See there.
        frequency_penalty: See there.
        seed: See there.
        stop: A text that ends it and is no part of it, or several.
        logprobs: Keep how likely each token was, and so many of the likeliest ones at its place; None keeps nothing.
        schema: A JSON schema; the text is JSON that obeys it, if `max_new_tokens` are enough. `{}` allows any JSON.

    Raises:
        UserError: A value is out of its range.
    """

    max_new_tokens: int = 50
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    logprobs: int | None = None
    schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, (kind, wanted) in NUMBERS.items():
            value = getattr(self, name)
            if (value is not None or name not in MAYBE) and (isinstance(value, bool) or not isinstance(value, kind)):
                raise UserError(f"`{name}` must be {wanted}, but is {repr(value) if isinstance(value, Real) else kind_of(value)}.")
        if not isinstance(self.stop, str | Sequence | None):
            raise UserError(f"`stop` is a text or a list of texts, but is {kind_of(self.stop)}.")
        if self.max_new_tokens < 1:
            raise UserError(f"`max_new_tokens` must be at least 1, but got {self.max_new_tokens}.")
        if self.logprobs is not None and self.logprobs < 0:
            raise UserError(f"`logprobs` counts the likeliest tokens to tell, so it is 0 or more, but got {self.logprobs}.")
        if wrong := [text for text in self.stops if not isinstance(text, str)]:
            raise UserError(f"`stop` is a text or a list of texts, but has {wrong[0]!r}.")
        if "" in self.stops:
            raise UserError("`stop` has an empty text, which every answer contains. Leave it out.")

    @property
    def stops(self) -> list[str]:
        """The texts that end it."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def row(self, grammar: Grammar | None = None) -> RowState:
        """Return the state of a row that is sampled so."""
        return RowState(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            grammar=grammar,
        )


class Reply:
    """An answer, and its text while it grows.

    Args:
        answer: What a batch makes.
        tokenizer: Says what its tokens mean.
        stop: The text ends before the first of these.
        behind: The ids that the answer goes on from, if its text does so too: then the first word keeps its space.
    """

    def __init__(self, answer: Answer, tokenizer: Tokenizer, stop: Sequence[str] = (), behind: Sequence[int] = ()) -> None:
        self.answer, self.text, self.started = answer, "", 0.0
        self.error: str | None = None  # why the answer broke off, in one sentence
        self._decoder, self._matcher = StreamDecoder(tokenizer), StopMatcher(stop)
        for token in behind:
            self._decoder.push(token)
        self._decoder.flush()

    @property
    def length(self) -> int:
        """How many tokens prompt and answer have at most."""
        return len(self.answer.prompt) + self.answer.max_new_tokens

    @property
    def result(self) -> Generated:
        """The finished answer."""
        answer = self.answer
        return Generated(self.text, answer.made[: answer.n_shown], answer.logprobs[: answer.n_shown], answer.finish or "length")

    def push(self, tokens: Sequence[int]) -> str:
        """Take new tokens and return the text that is certain now; a stop string finishes the answer."""
        text = self._matcher.push("".join(map(self._decoder.push, tokens)))
        if self.answer.finish is not None and self._matcher.stopped is None:
            text += self._matcher.push(self._decoder.flush())
            text += self._matcher.flush()
        if self._matcher.stopped is not None:
            self.answer.finish = "stop"
        new = "".join(text)
        self.text += new
        return new


class Progress(NamedTuple):
    """What a step added to a reply."""

    reply: Reply
    tokens: list[int]
    text: str


def new_reply(
    model: GPT,
    tokenizer: Tokenizer,
    ids: list[int],
    options: Options,
    stop_tokens: Sequence[Sequence[int]] = (),
    most: int | None = None,
    behind: Sequence[int] = (),
) -> Reply:
    """Return what `write` fills.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        ids: The prompt.
        options: How to answer.
        stop_tokens: Token sequences that end the answer.
        most: How many tokens prompt and answer may have; by default the model's context.
        behind: See `Reply`.

    Raises:
        UserError: The prompt is too long, or an option is out of its range.
    """
    n_new = room(len(ids), options.max_new_tokens, most or model.config.block_size)
    grammar = None
    if options.schema is not None:
        grammar = compile_grammar(tokenizer, model.config.padded_vocab_size, schema=options.schema, stop=stop_tokens)
    answer = Answer(ids, options.row(grammar), n_new, stop_tokens, options.logprobs)
    return Reply(answer, tokenizer, options.stops, behind)


def write(
    model: GPT, replies: Iterable[Reply], rows: int, length: int, cache: Cache | None = None, goes_on: bool = False
) -> Iterator[Progress]:
    """Fill replies, several at a time, and yield what each step adds; a reply whose answer has a `finish` is done.

    Args:
        model: The model.
        replies: What to fill; it is read only as rows become free.
        rows: How many at a time.
        length: The most tokens that one of them and its prompt have.
        cache: The memory; by default a new one.
        goes_on: Whether a reply that breaks off, and so has an `error`, leaves the others as they are, instead of being raised.

    Raises:
        UserError: The memory does not fit; or the model computes no numbers, or a grammar has become too ambiguous.
    """
    if model.rope.depends_on_length and cache is None:  # then an answer follows from its memory's length too: each gets its own
        return chain.from_iterable(_write(Batch(model, new_cache(model, 1, reply.length), CHUNK), [reply], goes_on) for reply in replies)
    batch = Batch(model, cache or new_cache(model, rows, length), max(CHUNK, rows), keeps_prefixes=rows > 1)
    return _write(batch, replies, goes_on)


def _write(batch: Batch, replies: Iterable[Reply], goes_on: bool) -> Iterator[Progress]:
    waiting, filling = iter(replies), {}
    more = True
    while more or filling:
        while more and batch.n_free:
            reply = next(waiting, None)
            if reply is None:
                more = False
            else:
                reply.started = perf_counter()
                batch.join(reply.answer)
                filling[reply.answer] = reply
        for answer, tokens in batch.step():
            reply, was_running = filling[answer], answer.finish is None
            if answer.finish == "error":
                reply.error = answer.error
                if not goes_on:
                    raise UserError(reply.error)
            text = reply.push(tokens)
            if answer.finish is not None:
                del filling[answer]
                answer.row.counts = answer.row.grammar = None  # as large as the vocabulary, and the caller may keep all replies
                if was_running:  # a stop string, of which the batch knows nothing
                    batch.leave(answer)
            yield Progress(reply, tokens, text)
