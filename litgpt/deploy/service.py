"""What the server offers: one model with its adapters, how it samples by default, and its limits."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from litgpt.deploy.adapters import Adapters
from litgpt.deploy.engine import Engine
from litgpt.deploy.measures import Measures
from litgpt.deploy.protocol import ErrorAnswer, Problem, Sampling
from litgpt.errors import did_you_mean
from litgpt.generate.grammar import Grammar, compile_grammar
from litgpt.generate.run import Speaker
from litgpt.generate.sampling import RowState

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # OpenAI's words for errors, by status
TURN = 10.0  # seconds that what takes long waits for others


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: The HTTP status.
        message: One sentence for whoever sent it.
        param: The field that is wrong.
        code: A word for programs.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def answer(self) -> ErrorAnswer:
        """What is sent, in OpenAI's form."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return ErrorAnswer(error=Problem(message=self.message, type=kind, param=self.param, code=self.code))


@dataclass
class Limits:
    """What one request may ask for.

    Args:
        max_body: Bytes of its body.
        max_tokens: Tokens of an answer, however long the context is.
        max_choices: Answers to each prompt (`n`).
        max_prompts: Prompts, or texts to embed.
        max_turns: The assistant's messages: what precedes each is rendered and encoded for itself, which takes time with their square.
        max_stops: Stop strings.
        max_stop_length: Characters of a stop string.
        max_tools: Functions.
        max_schema: Characters of a JSON schema.
        max_scored: Probabilities of the tokens of prompts, those of the likeliest tokens beside them included.
        timeout: Seconds that it waits for an answer, or for the next of several, to begin; None for no end.
    """

    max_body: int = 4 * 2**20
    max_tokens: int = 2**17
    max_choices: int = 16
    max_prompts: int = 256
    max_turns: int = 256
    max_stops: int = 16
    max_stop_length: int = 256
    max_tools: int = 128
    max_schema: int = 2**16
    max_scored: int = 2**22
    timeout: float | None = 30.0


@dataclass
class Defaults:
    """How tokens are drawn where a request does not say it; `max_new_tokens` is that of the route `/predict` alone."""

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 50
    seed: int | None = None


@dataclass
class Service:
    """The model behind the routes.

    Args:
        speaker: The model, its tokenizer and its prompt style.
        engine: What runs it.
        name: What clients call the model.
        defaults: How tokens are drawn where a request does not say it.
        limits: What a request may ask for.
        adapters: LoRA updates that requests may choose by name.
        adapter_dir: The folder whose folders may be loaded as adapters while serving.
        api_path: The route of LitGPT's own protocol.
        stream: Whether that route streams.
        openai_spec: Whether LitGPT's own stays at `/predict`, and `api_path`, if it is another, is one more path of the chat route.
    """

    speaker: Speaker
    engine: Engine
    name: str
    defaults: Defaults = field(default_factory=Defaults)
    limits: Limits = field(default_factory=Limits)
    adapters: Adapters | None = None
    adapter_dir: Path | None = None
    api_path: str = "/predict"
    stream: bool = False
    openai_spec: bool = False
    embedding: Counter[str | None] = field(default_factory=Counter)  # requests for vectors under way, by adapter
    is_ready: bool = False  # set once it is warmed up, and taken back when it drains
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.measures = Measures(self.engine)
        self.stop_tokens = self.speaker.stop_tokens
        self.adapter_dir = self.adapter_dir and self.adapter_dir.absolute()  # as errors name what is in it
        self._turn = asyncio.Semaphore(1)
        self.loaded = {name: self.started for name in self.adapter_names}  # when

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that requests may name."""
        return [] if self.adapters is None else list(self.adapters.names)

    @property
    def vocab_size(self) -> int:
        """How many tokens the model's logits have."""
        return self.speaker.model.config.padded_vocab_size

    @property
    def is_alive(self) -> bool:
        """Whether the engine works, or will once it is started."""
        return self.engine.failure is None

    def note_loaded(self, name: str) -> None:
        """Remember when an adapter was loaded."""
        self.loaded[name] = int(time.time())

    def adapter(self, model: str | None) -> str | None:
        """Return the adapter that a request's `model` names, or None for the model alone.

        Raises:
            ApiError: There is none of that name.
        """
        if model is None or model == self.name:
            return None
        if model in (known := self.adapter_names):
            return model
        meant = did_you_mean(model[:100], [self.name, *known])
        raise ApiError(404, f"There is no model {model[:100]!a} here.{meant} /v1/models lists all.", "model", "model_not_found")

    def row(self, body: Sampling, choice: int = 0, grammar: Grammar | None = None) -> RowState:
        """Return how one answer is sampled: as the request says, else as the server was started with.

        Args:
            body: The request.
            choice: Which of several answers to a prompt; each one has a seed of its own.
            grammar: What the answer keeps to.
        """
        default = self.defaults
        seed = default.seed if body.seed is None else body.seed
        top_k = default.top_k if body.top_k is None else body.top_k
        return RowState(
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_k=top_k if top_k is not None and top_k > 0 else None,
            top_p=default.top_p if body.top_p is None else body.top_p,
            min_p=default.min_p if body.min_p is None else body.min_p,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=None if seed is None else seed + choice,
            grammar=grammar,
        )

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Let one request at a time do what takes seconds or much memory before its answer begins: the others need threads too.

        Raises:
            ApiError: Too many others wait.
        """
        try:
            async with asyncio.timeout(TURN):
                await self._turn.acquire()
        except TimeoutError:
            message = "Too many long texts, schemas or adapters are being read. Try again in a few seconds."
            raise ApiError(429, message, code="queue_full", retry_after=TURN) from None
        try:
            yield
        finally:
            self._turn.release()

    def grammar(self, schema: dict[str, Any] | None, lark: str | None) -> Grammar | None:
        """Return what an answer keeps to: a JSON schema, a grammar in Lark, or nothing.

        Raises:
            UserError: It cannot be used.
        """
        if schema is None and lark is None:
            return None
        return compile_grammar(self.speaker.tokenizer, self.vocab_size, schema=schema, lark=lark, stop=self.stop_tokens)

    @cached_property
    def longest_token(self) -> int:
        """How many characters the longest token has."""
        tokenizer = self.speaker.tokenizer
        return max(len(tokenizer.text(token) or "") for token in range(self.vocab_size))

    def check_size(self, n_characters: int, param: str) -> None:
        """Refuse a text that cannot fit, whatever its tokens are: to find these would take long.

        Raises:
            ApiError: It is too long.
        """
        most = self.engine.max_length
        if n_characters > most and n_characters > most * self.longest_token:
            message = f"The text has {n_characters} characters, more than any {most} tokens have, and no more tokens fit. Shorten it."
            raise ApiError(400, message, param, "context_length_exceeded")

    def stops(self, stop: str | list[str] | None) -> list[str]:
        """Return the stop strings of a request.

        Raises:
            ApiError: There are too many, or one is empty or too long.
        """
        stops = [stop] if isinstance(stop, str) else stop or []
        most, longest = self.limits.max_stops, self.limits.max_stop_length
        if len(stops) > most:
            raise ApiError(400, f"`stop` may have at most {most} texts, but has {len(stops)}.", "stop")
        if any(not 1 <= len(text) <= longest for text in stops):
            raise ApiError(400, f"Each text in `stop` must have 1 to {longest} characters.", "stop")
        return stops

    def n_new(self, n_prompt: int, wanted: int | None, param: str) -> int:
        """Return how many tokens an answer may have: as many as wanted, or as there is room for.

        Raises:
            ApiError: There is no room for any, or more are wanted than anybody may have.
        """
        if n_prompt == 0:
            raise ApiError(400, "The prompt has no tokens. Say something, for there is nothing to go on from.", param)
        if wanted is not None and wanted > self.limits.max_tokens:
            raise ApiError(400, f"At most {self.limits.max_tokens} tokens may be asked for, but got {wanted}.", "max_tokens")
        room = self.engine.max_length - n_prompt
        if room < (0 if wanted == 0 else 1):
            longest = self.engine.max_length
            message = f"The prompt has {n_prompt} tokens, but prompt and answer together may have {longest}. Shorten the prompt."
            raise ApiError(400, message, param, "context_length_exceeded")
        return min(self.limits.max_tokens if wanted is None else wanted, room)
