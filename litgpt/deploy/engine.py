"""Continuous batching: one thread owns the model, and requests join and leave its batch at every step."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple, TypeVar

import torch

from litgpt.deploy.adapters import Adapters
from litgpt.errors import UserError
from litgpt.generate.batch import Answer, Batch, TokenLogprob, check_ids
from litgpt.generate.memory import fitting_length, new_cache, room
from litgpt.model import GPT

T = TypeVar("T")


class QueueFull(Exception):
    """As many requests wait as may; try again after `retry_after` seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"All places are taken. Try again in {retry_after:.0f} seconds.")
        self.retry_after = retry_after


class EngineStopping(Exception):
    """No new requests are taken: the server is about to end."""


class EngineFailed(Exception):
    """The engine broke; `Engine.failure` says why."""


class Update(NamedTuple):
    """What is new about an answer."""

    tokens: list[int]  # certain to be part of it, in order
    logprobs: list[TokenLogprob]  # of these tokens, if they were asked for
    finish: str | None  # with the last one: "stop", "length", "cancelled", "timeout" or "error"


@dataclass(eq=False)
class Ticket:
    """A request that was taken."""

    answer: Answer
    listener: Callable[[Update], None]
    deadline: float
    adapter: str | None
    joined: float = 0.0  # when its computation began
    ended: str | None = None  # "cancelled" while it still has to leave


class Engine:
    """Answers many requests with one model.

    Args:
        model: The model, on its device. From `start` on only the engine's thread may touch it.
        max_rows: How many requests are computed at the same time.
        max_length: The most tokens of a prompt and its answer together; by default the model's context, or less where memory is short.
        max_queue: How many further requests may wait.
        chunk: How many tokens of prompts one step may feed beside the rows that generate; by default 256 on a CPU, else 2,048.
        adapters: LoRA updates that requests may choose.

    Attributes:
        failure: What broke the engine, if something did.
        counters: Numbers that only grow, by name.
    """

    def __init__(
        self,
        model: GPT,
        *,
        max_rows: int = 16,
        max_length: int | None = None,
        max_queue: int = 64,
        chunk: int | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        context, device = model.config.block_size, model.transformer.wte.weight.device
        if max_rows < 1 or max_queue < 0:
            raise UserError(f"`max_rows` is at least 1 and `max_queue` at least 0, but got {max_rows} and {max_queue}.")
        if max_length is not None and not 1 < max_length <= context:
            raise UserError(f"`max_length` is from 2 to the model's context of {context} tokens, but got {max_length}.")
        chunk = chunk or (256 if device.type == "cpu" else 2048)
        rewind = chunk if all(mixer in ("attention", "latent") for mixer in model.config.mixers) else 0  # elsewhere it costs time
        sizes = dict(chunk=chunk, rewind=rewind)
        self.max_length = max_length or fitting_length(model, max_rows, context, **sizes)
        cache = new_cache(model, max_rows, self.max_length, **sizes)
        index = None if adapters is None else adapters.index
        self.batch = Batch(model, cache, max_tokens=max(chunk, max_rows), keeps_prefixes=True, adapters=index)
        self.model, self.adapters, self.max_rows, self.max_queue = model, adapters, max_rows, max_queue
        self.failure: BaseException | None = None
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[Ticket] = deque()
        self._running: dict[Answer, Ticket] = {}
        self._calls: deque[tuple[Callable[[], object], Future]] = deque()
        self._state = "new"  # then "running", "stopped"
        self._seconds_each = 1.0  # a running mean of how long a request is computed
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    @property
    def is_alive(self) -> bool:
        """Whether requests are being computed."""
        return self._thread.is_alive() and self.failure is None

    @property
    def n_running(self) -> int:
        """How many requests are computed now."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to take requests."""
        self._state = "running"
        self._thread.start()

    def submit(
        self, answer: Answer, listener: Callable[[Update], None], *, timeout: float | None = None, adapter: str | None = None
    ) -> Ticket:
        """Take a request.

        Args:
            answer: What to answer; what its `max_new_tokens` asks beyond `max_length` is cut.
            listener: Called in the engine's thread with all that is new; the last call has `finish` set. It must be quick.
            timeout: Seconds from now within which the answer must have begun; then it may take its time.
            adapter: Which LoRA updates to use.

        Raises:
            UserError: The prompt is empty or too long, a token or the adapter is unknown.
            QueueFull: Too many requests wait.
            EngineStopping: The server is about to end.
            EngineFailed: It cannot compute any more.
        """
        if answer.max_new_tokens != 0 or not answer.prompt:
            answer.max_new_tokens = room(len(answer.prompt), answer.max_new_tokens, self.max_length)
        elif len(answer.prompt) > self.max_length:
            raise UserError(f"The prompt has {len(answer.prompt)} tokens, but at most {self.max_length} fit. Shorten it.")
        check_ids(answer.prompt, self.model.config.padded_vocab_size)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.max_queue and (self._waiting or not self.batch.n_free):
                raise QueueFull(max(1.0, self._seconds_each * (len(self._waiting) + 1) / self.max_rows))
            if adapter is not None and (self.adapters is None or adapter not in self.adapters.names):
                raise UserError(f"There is no adapter {adapter!r}.")
            ticket = Ticket(answer, listener, monotonic() + (float("inf") if timeout is None else timeout), adapter)
            self._waiting.append(ticket)
            self.counters["requests"] += 1
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Let a request leave before the next step. One that has ended stays as it is."""
        with self._changed:
            ticket.ended = ticket.ended or "cancelled"
            self._changed.notify_all()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function in the engine's thread between two steps, and return what will hold its result."""
        future: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._calls.append((function, future))
            self._changed.notify_all()
        return future

    def unload(self, adapter: str) -> None:
        """Forget an adapter; to be used within `call`.

        Raises:
            UserError: There is none of that name, or requests use it.
        """
        with self._changed:
            n = sum(ticket.adapter == adapter for ticket in (*self._waiting, *self._running.values()))
            if n:
                raise UserError(f"The adapter {adapter!r} is in use ({n}). Unload it when its requests have ended.")
            if self.adapters is None or adapter not in self.adapters.names:
                raise UserError(f"There is no adapter {adapter!r}.")
            self.batch.forget(self.adapters.slot(adapter))
            self.adapters.unload(adapter)

    def stop(self) -> None:
        """End the thread; requests that are not finished end as cancelled."""
        with self._changed:
            self._state = "stopped"
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_open(self) -> None:
        if self.failure is not None:
            raise EngineFailed(f"The engine broke: {type(self.failure).__name__}.")
        if self._state != "running":
            raise EngineStopping("The server is starting." if self._state == "new" else "The server is about to end.")

    # In the engine's thread

    def _run(self) -> None:
        try:
            while self._take_in():
                self._make_call()
                if self._running:
                    self._step()
        except BaseException as error:  # whatever it is, nobody may wait for an answer that never comes
            self.failure = error
            self._end_all("error")
            if not isinstance(error, Exception):
                raise
        else:
            self._end_all("cancelled")

    def _take_in(self) -> bool:
        """Let requests that are due leave and waiting ones join; return whether to go on. Sleeps where there is nothing to do."""
        with self._changed:
            while True:
                self._let_go()
                while self._waiting and self.batch.n_free:
                    self._join(self._waiting.popleft())
                if self._state == "stopped":
                    return False
                if self._running or self._calls:
                    return True
                self._changed.wait()

    def _let_go(self) -> None:
        now = monotonic()
        late = lambda ticket: ticket.deadline <= now and not ticket.answer.made  # noqa: E731
        due = [ticket for ticket in (*self._waiting, *self._running.values()) if ticket.ended or late(ticket)]
        for ticket in due:
            if ticket.answer in self._running:
                self.batch.leave(ticket.answer)
                del self._running[ticket.answer]
            else:
                self._waiting.remove(ticket)
            self._tell(ticket, Update([], [], ticket.ended or "timeout"))

    def _join(self, ticket: Ticket) -> None:
        self._running[ticket.answer] = ticket  # before anything can break, so that whoever asked hears of it
        if ticket.adapter is not None:
            ticket.answer.slot = self.adapters.slot(ticket.adapter)
        self.batch.join(ticket.answer)
        ticket.joined = monotonic()
        self.counters["prompt_tokens"] += len(ticket.answer.prompt)
        self.counters["reused_tokens"] += ticket.answer.n_reused

    def _step(self) -> None:
        start = monotonic()
        for answer, tokens in self.batch.step():
            ticket = self._running[answer]
            logprobs = [] if answer.n_logprobs is None else answer.logprobs[answer.n_shown - len(tokens) : answer.n_shown]
            if answer.finish is not None:
                with self._changed:
                    del self._running[answer]
                    self._seconds_each += 0.1 * (monotonic() - ticket.joined - self._seconds_each)
            self.counters["generated_tokens"] += len(tokens)
            self._tell(ticket, Update(tokens, logprobs, answer.finish))
        self.counters["steps"] += 1
        self.counters["busy_seconds"] += monotonic() - start

    def _tell(self, ticket: Ticket, update: Update) -> None:
        if update.finish is not None:
            ticket.ended = update.finish
            self.counters[f"finished_{update.finish}"] += 1
        try:
            ticket.listener(update)
        except Exception:  # whoever asked is gone, such as a closed event loop: nobody else may notice
            ticket.ended = ticket.ended or "cancelled"

    def _make_call(self) -> None:
        with self._changed:
            if not self._calls:
                return
            function, future = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            with torch.inference_mode():
                future.set_result(function())
        except Exception as error:  # belongs to whoever called
            future.set_exception(error)

    def _end_all(self, finish: str) -> None:
        with self._changed:
            self._state = "stopped"
            tickets = (*self._waiting, *self._running.values())
            calls = list(self._calls)
            self._waiting.clear()
            self._running.clear()
            self._calls.clear()
        for ticket in tickets:
            self._tell(ticket, Update([], [], finish))
        why = EngineFailed("The engine broke.") if finish == "error" else EngineStopping("The server is about to end.")
        for _, future in calls:
            if future.set_running_or_notify_cancel():  # else nobody waits for it any more
                future.set_exception(why)


COUNTERS = (
    "requests",
    "prompt_tokens",
    "reused_tokens",
    "generated_tokens",
    "steps",
    "busy_seconds",
    *(f"finished_{finish}" for finish in ("stop", "length", "cancelled", "timeout", "error")),
)
