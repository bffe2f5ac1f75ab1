"""From the engine's tokens to text that clients may see: no half characters, no stop string, and an end for whoever goes away."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic, perf_counter
from typing import Any, NamedTuple, Self, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from litgpt.deploy.engine import EngineFailed, EngineStopping, QueueFull, Ticket, Update
from litgpt.deploy.protocol import PromptDetails, Usage
from litgpt.deploy.service import ApiError, Service
from litgpt.errors import UserError
from litgpt.generate.batch import Answer, TokenLogprob
from litgpt.generate.stopping import StopMatcher
from litgpt.tokenizer import StreamDecoder, Tokenizer

T = TypeVar("T")

BEHIND = 16  # tokens of a prompt that the first word is decoded behind
RETRY = 0.05  # seconds until a request that is under way asks the full queue again
LONG = 2**16  # bytes of a request that takes long to be read
GONE = 499  # what the log says where nobody waits for the answer
ENDS = {  # why an answer ended that is not whole
    "timeout": (504, "The answer did not begin in time. Try again later, or start the server with a longer `--timeout`.", "timeout"),
    "cancelled": (503, "The server is about to end.", "stopping"),
    "error": (503, "The engine broke. Start the server again.", "engine_failed"),
    "no numbers": (500, "The model computes no numbers here: its weights are damaged, or too coarse.", "no_numbers"),
    "too complex": (400, "The schema, or the schemas of the tools, are too complex to keep to.", "schema_too_complex"),
}


class Scored(NamedTuple):
    """A token, how likely it was, and where its text begins."""

    start: int
    token: TokenLogprob


class Piece(NamedTuple):
    """A part of an answer: its text, and the tokens that it is made of if they are to be told."""

    text: str
    tokens: list[Scored]


class TextStream:
    """Turns the tokens of one answer into text that is certain, and stops at stop strings.

    Args:
        tokenizer: The tokenizer.
        stops: The text ends before the first of these.
        behind: The tokens that the answer goes on from, if its text does so too: then the first word keeps its space.
        shown: Special tokens that are part of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Iterable[str] = (), behind: Sequence[int] = (), shown: Mapping[int, str] | None = None
    ) -> None:
        self.decoder, self.matcher, self.shown = StreamDecoder(tokenizer), StopMatcher(stops), shown or {}
        for token in behind[-BEHIND:]:
            self.decoder.push(token)
        self.decoder.flush()
        self.n_tokens = 0  # up to the one that completed a stop string
        self._n_decoded = self._n_shown = 0  # characters
        self._without_text: list[TokenLogprob] = []
        self._unshown: deque[tuple[int, list[Scored]]] = deque()  # tokens, and where the text that they make together ends

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.matcher.stopped is not None

    @property
    def n_characters(self) -> int:
        """How long the text is that was returned so far."""
        return self._n_shown

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> Piece:
        """Take tokens and return what is certain now."""
        text = ""
        for i, token in enumerate(tokens):
            if self.is_stopped:
                break
            self.n_tokens += 1
            self._without_text += logprobs[i : i + 1]
            new = self.decoder.flush() + self.shown[token] if token in self.shown else self.decoder.push(token)
            text += self._match(new)
        return self._piece(text)

    def finish(self) -> Piece:
        """Return what was held back, when no more tokens come."""
        text = self._match(self.decoder.flush())
        if not self.is_stopped:
            held = "".join(self.matcher.flush())
            self._n_shown += len(held)
            text += held
            self._unshown.append((self._n_shown, [Scored(self._n_decoded, token) for token in self._without_text]))
        return self._piece(text, is_last=True)

    def _match(self, new: str) -> str:
        if not new:
            return ""
        start, self._n_decoded = self._n_decoded, self._n_decoded + len(new)
        self._unshown.append((self._n_decoded, [Scored(start, token) for token in self._without_text]))
        self._without_text = []
        text = "".join(self.matcher.push(new))
        self._n_shown += len(text)
        return text

    def _piece(self, text: str, is_last: bool = False) -> Piece:
        tokens: list[Scored] = []
        while self._unshown and self._unshown[0][0] <= self._n_shown:
            tokens += self._unshown.popleft()[1]
        if is_last:  # of a token that begins before a stop string and ends in it, the text's part was shown
            tokens += [scored for _, group in self._unshown for scored in group if scored.start < self._n_shown]
        return Piece(text, tokens)


class Part(NamedTuple):
    """What is new about one of a request's answers; `finish` comes with the last one."""

    index: int
    piece: Piece
    finish: str | None


class Job:
    """The answers that one request waits for. Used as a context: whatever happens, nothing goes on behind it.

    Args:
        service: Whose engine is asked.
        answers: What to ask, and what makes text of each.
        adapter: Which LoRA updates to use.
        scope: The request's, where it is noted how many tokens it took.
    """

    def __init__(self, service: Service, answers: Sequence[tuple[Answer, TextStream]], adapter: str | None, scope: Scope) -> None:
        self.service, self.adapter, self.scope = service, adapter, scope
        self.answers = [answer for answer, _ in answers]
        self.streams = [stream for _, stream in answers]
        self._waiting = deque(range(len(self.answers)))
        self._tickets: dict[int, Ticket] = {}
        self._news: asyncio.Queue[tuple[int, float, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._last = [perf_counter()] * len(self.answers)  # when each one's newest token came
        self._timeout = float("inf") if service.limits.timeout is None else service.limits.timeout
        self._deadline = monotonic() + self._timeout
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if len(self._waiting) == len(self.answers):  # it was refused, and took nothing
            return
        for ticket in self._tickets.values():
            self.service.engine.cancel(ticket)
        self._tickets.clear()
        self._waiting.clear()
        self.scope.setdefault("state", {})["tokens"] = (self.n_prompt, self.n_made)
        measures = self.service.measures
        measures.prompt_tokens.inc(self.n_prompt)
        measures.generated_tokens.inc(self.n_made)
        measures.reused_tokens.inc(self.n_reused)

    def submit(self) -> None:
        """Hand answers to the engine, as many as it computes at a time: a request with many does not fill the queue.

        Raises:
            ApiError: The engine does not take any; then those before are taken back.
        """
        while self._waiting and len(self._tickets) < self.service.engine.max_rows:
            try:
                if not self._submit_next():
                    return
            except ApiError:
                self.__exit__()
                raise

    def _submit_next(self) -> bool:
        """Hand over one answer; return whether there was room for it."""
        index = self._waiting[0]
        try:
            with engine_errors():
                ticket = self.service.engine.submit(
                    self.answers[index],
                    self._listener(index),
                    timeout=max(self._deadline - monotonic(), 0.001),
                    adapter=self.adapter,
                )
        except QueueFull as error:
            if len(self._waiting) < len(self.answers):
                return False
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from None
        except UserError as error:
            self.service.adapter(self.adapter)  # was it unloaded meanwhile?
            raise ApiError(400, str(error)) from None
        self._tickets[index] = ticket
        self._waiting.popleft()
        return True

    def _listener(self, index: int) -> Callable[[Update], None]:
        def listen(update: Update) -> None:  # runs in the engine's thread
            self._loop.call_soon_threadsafe(self._news.put_nowait, (index, perf_counter(), update))

        return listen

    async def parts(self) -> AsyncIterator[list[Part]]:
        """Yield what is new as it is made, several updates at once if they have come meanwhile.

        Raises:
            ApiError: An answer cannot be finished.
        """
        while self._tickets or self._waiting:
            if not self._tickets:  # others were faster to fill the queue
                await asyncio.sleep(RETRY)
                self.submit()
                if not self._tickets and monotonic() > self._deadline:
                    raise ApiError(*ENDS["timeout"][:2], code="timeout")
                continue
            news = [await self._news.get()]
            while not self._news.empty():
                news.append(self._news.get_nowait())
            parts = self._merged(news)
            self._wait_anew()
            if parts:
                yield parts
            self.submit()

    def _wait_anew(self) -> None:
        """Let answers that have not begun wait as long again, since others of the request go on."""
        self._deadline = monotonic() + self._timeout
        for ticket in self._tickets.values():
            ticket.deadline = self._deadline

    def _merged(self, news: list[tuple[int, float, Update]]) -> list[Part]:
        """Return what updates tell, one part for each answer that has something new."""
        merged: dict[int, Part] = {}
        for index, at, update in news:
            if index not in self._tickets:  # a stop string has ended it already
                continue
            stream = self.streams[index]
            self._time(index, at, len(update.tokens))
            piece, finish, grammar = stream.push(update.tokens, update.logprobs), update.finish, self.answers[index].row.grammar
            if finish is not None and grammar is not None and grammar.error:
                finish = "too complex"
            if finish in ENDS and not stream.is_stopped:
                status, message, code = ENDS["no numbers" if finish == "error" and self.service.engine.failure is None else finish]
                raise ApiError(status, message, code=code)
            if stream.is_stopped or finish is not None:
                piece, finish = joined(piece, stream.finish()), finish if not stream.is_stopped else "stop"
                self.service.engine.cancel(self._tickets.pop(index))
            if index in merged:
                piece = joined(merged[index].piece, piece)
            if piece.text or piece.tokens or finish is not None:
                merged[index] = Part(index, piece, finish)
        return list(merged.values())

    def _time(self, index: int, at: float, n: int) -> None:
        if n == 0:
            return
        measures, waited = self.service.measures, at - self._last[index]
        if self.streams[index].n_tokens == 0:
            measures.first_token.observe(waited)
        else:
            measures.next_token.observe(waited / n)
        self._last[index] = at

    # What it took

    @property
    def usage(self) -> Usage:
        """The tokens, as clients are told."""
        return Usage(
            prompt_tokens=self.n_prompt,
            completion_tokens=self.n_made,
            total_tokens=self.n_prompt + self.n_made,
            prompt_tokens_details=PromptDetails(cached_tokens=self.n_reused),
        )

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompts, of each once however many answers it has."""
        return sum(len(answer.prompt) for answer in self._prompts)

    @property
    def n_reused(self) -> int:
        """How many of these the server remembered."""
        return sum(answer.n_reused for answer in self._prompts)

    @property
    def _prompts(self) -> list[Answer]:
        return list({id(answer.prompt): answer for answer in reversed(self.answers)}.values())

    @property
    def n_made(self) -> int:
        """Tokens of the answers, each up to what ended it."""
        return sum(
            stream.n_tokens if stream.is_stopped or answer.finish is None else len(answer.made)
            for answer, stream in zip(self.answers, self.streams, strict=True)
        )


def joined(*pieces: Piece) -> Piece:
    """Return pieces that follow each other as one."""
    return Piece("".join(piece.text for piece in pieces), [scored for piece in pieces for scored in piece.tokens])


@contextmanager
def engine_errors() -> Iterator[None]:
    """Tell clients why the engine takes nothing any more."""
    try:
        yield
    except EngineStopping as error:
        raise ApiError(503, str(error), code="stopping", retry_after=1) from None
    except EngineFailed as error:
        raise ApiError(503, str(error), code="engine_failed") from None


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Return what a function returns that takes its time: the event loop goes on meanwhile.

    Raises:
        ApiError: The function raised it, or a `UserError`.
    """
    try:
        return await asyncio.to_thread(function, *args)
    except UserError as error:
        raise ApiError(400, str(error)) from None


async def prepared(service: Service, request: Request, function: Callable[..., T], *args: object, is_slow: bool = False) -> T:
    """Return what a function makes of a request, in a thread; where it takes long, only when no other request does.

    Raises:
        ApiError: The function raised it, or a `UserError`, or too many others wait.
    """
    if not is_slow and len(await request.body()) <= LONG:
        return await in_thread(function, *args)
    async with service.turn():
        return await in_thread(function, *args)


async def unless_gone(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """Return the response that a coroutine makes; where the client goes away first, end it and return one that nobody reads."""
    making, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
        return making.result() if making.done() else Response(status_code=GONE)
    finally:
        making.cancel()
        leaving.cancel()
        await asyncio.wait((making, leaving))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """A response that is written while it is made. It ends at once when the client goes away.

    Args:
        job: What it is made of.
        lines: Makes the pieces.
        media_type: What they are.
        failure: Makes a piece of an error, which ends the stream.
    """

    def __init__(self, job: Job, lines: AsyncIterator[bytes], media_type: str, failure: Callable[[ApiError], bytes]) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.job, self.lines, self.failure = job, lines, failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write it."""
        with self.job:
            writing, leaving = asyncio.ensure_future(self._write(send)), asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
                if writing.done():
                    writing.result()
            finally:
                writing.cancel()
                leaving.cancel()
                await asyncio.wait((writing, leaving))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for line in self.lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": self.failure(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
