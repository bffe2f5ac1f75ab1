"""The routes `/v1/completions`, texts that go on from prompts as they are, and `api_path`, LitGPT's own: prompt in, output out."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from litgpt.deploy.answering import Job, Part, Scored, Stream, TextStream, in_thread, joined, prepared, unless_gone
from litgpt.deploy.chat import DONE, check_stream_options, event
from litgpt.deploy.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Prediction,
    PredictRequest,
    Usage,
)
from litgpt.deploy.service import ApiError, Service
from litgpt.deploy.spelling import spelling, top_logprobs
from litgpt.errors import UserError
from litgpt.generate.batch import Answer, TokenLogprob, check_ids
from litgpt.tokenizer import Tokenizer

MAX_TOKENS = 16  # of an answer where nothing is said, as at OpenAI


@dataclass
class Plan:
    """What a request comes to: the answers to ask the engine for, and the text that is repeated before each."""

    answers: list[tuple[Answer, TextStream]]
    echoed: list[str]
    adapter: str | None
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def head(self) -> dict[str, Any]:
        """What all answers begin with."""
        return dict(id=self.id, object="text_completion", created=self.created, model=self.model)


async def answer_completion(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Return the texts that go on from prompts.

    Raises:
        ApiError: The request cannot be served.
    """
    plan = await prepared(service, request, make_plan, service, body)
    job = Job(service, plan.answers, plan.adapter, request.scope)
    job.submit()
    if body.stream:
        return Stream(job, _lines(service, body, plan, job), "text/event-stream", event)
    return await unless_gone(request, _whole(service, body, plan, job))


def make_plan(service: Service, body: CompletionRequest) -> Plan:
    """Return what a request comes to.

    Raises:
        ApiError: A field is out of its range, or does not go with another.
        UserError: A value cannot be used.
    """
    adapter, n = service.adapter(body.model), body.n or 1
    _check(service, body)
    tokenizer, stops = service.speaker.tokenizer, service.stops(body.stop)
    plan = Plan([], [], adapter, body.model or service.name)
    wanted = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    read = read_prompts(service, body.prompt, "prompt")
    n_scored = sum(len(ids) for ids, _ in read) * n * (1 + body.logprobs) if body.echo and body.logprobs is not None else 0
    if n_scored > service.limits.max_scored:
        raise ApiError(400, f"At most {service.limits.max_scored} probabilities may be asked for, but these are {n_scored}.", "logprobs")
    for ids, text in read:
        n_new = service.n_new(len(ids), wanted, "prompt")
        for choice in range(n):
            row = service.row(body, choice)
            scores = bool(body.echo) and body.logprobs is not None
            answer = Answer(ids, row, n_new, service.stop_tokens, body.logprobs, scores_prompt=scores)
            plan.answers.append((answer, TextStream(tokenizer, stops, behind=ids)))
            plan.echoed.append((tokenizer.decode(ids) if text is None else text) if body.echo else "")
    return plan


def _check(service: Service, body: CompletionRequest) -> None:
    """Refuse what would have to be ignored, or is more than may be asked for."""
    n = body.n or 1
    if n > service.limits.max_choices:
        raise ApiError(400, f"`n` may be at most {service.limits.max_choices}, but got {n}.", "n")
    if body.best_of not in (None, n):
        raise ApiError(400, "`best_of` other than `n` is not supported. Leave it out.", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "`max_tokens` 0 asks for nothing. It needs `echo` to be true.", "max_tokens")
    check_stream_options(body)


def read_prompts(service: Service, prompt: str | list[str] | list[int] | list[list[int]], param: str) -> list[tuple[list[int], str | None]]:
    """Return the ids of each text, and the text if it is given as one.

    Raises:
        ApiError: There are none or too many, one is too long, or has an id that is no token.
    """
    texts: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    most = service.limits.max_prompts
    if not 1 <= len(texts) <= most:
        raise ApiError(400, f"`{param}` must be 1 to {most} texts, but got {len(texts)}.", param)
    encode = service.speaker.tokenizer.encode
    for text in filter(lambda text: isinstance(text, str), texts):
        service.check_size(len(text), param)
    read = [(encode(text).tolist(), text) if isinstance(text, str) else (text, None) for text in texts]
    try:
        for ids, _ in read:
            check_ids(ids or [0], service.vocab_size)
    except UserError as error:
        raise ApiError(400, str(error), param) from None
    return read


async def _whole(service: Service, body: CompletionRequest, plan: Plan, job: Job) -> Response:
    """Return all texts at once."""
    answers: list[list[Part]] = [[] for _ in plan.answers]
    with job:
        async for parts in job.parts():
            for part in parts:
                answers[part.index].append(part)
    return await in_thread(_completion, service, body, plan, answers, job.usage)


def _completion(service: Service, body: CompletionRequest, plan: Plan, answers: list[list[Part]], usage: Usage) -> Response:
    """Return all texts; what is told of each token makes that take long."""
    choices = []
    for index, parts in enumerate(answers):
        piece, finish = joined(*[part.piece for part in parts]), parts[-1].finish
        echo = _echo(service, body, plan, index)
        made = [*_moved(piece.tokens, len(plan.echoed[index])), *_ending(plan, index)]
        logprobs = _logprobs(service, body, [*echo, *made])
        choices.append(CompletionChoice(index=index, text=plan.echoed[index] + piece.text, logprobs=logprobs, finish_reason=finish))
    return Response(Completion(**plan.head, choices=choices, usage=usage).json_bytes(), media_type="application/json")


async def _lines(service: Service, body: CompletionRequest, plan: Plan, job: Job) -> AsyncIterator[bytes]:
    """Yield the texts as events while they are made."""
    tells_usage = body.stream_options is not None and body.stream_options.include_usage
    none = {"usage": None} if tells_usage else {}
    begun: set[int] = set()

    def chunk(index: int, text: str, tokens: list[tuple[int, int, TokenLogprob | None]], finish: str | None) -> bytes:
        choice = CompletionChoice(index=index, text=text, logprobs=_logprobs(service, body, tokens), finish_reason=finish)
        return event(Completion(**plan.head, choices=[choice], **none))

    async for parts in job.parts():
        lines = []
        for index, piece, finish in parts:
            if index not in begun and body.echo:
                lines.append(chunk(index, plan.echoed[index], _echo(service, body, plan, index), None))
            begun.add(index)
            tokens = _moved(piece.tokens, len(plan.echoed[index])) + ([] if finish is None else _ending(plan, index))
            lines.append(chunk(index, piece.text, tokens, finish))
        yield b"".join(lines)
    yield (event(Completion(**plan.head, choices=[], usage=job.usage)) if tells_usage else b"") + DONE


def _echo(service: Service, body: CompletionRequest, plan: Plan, index: int) -> list[tuple[int, int, TokenLogprob | None]]:
    """Return the tokens of a prompt that is repeated: where their text begins, their ids, and how likely they were."""
    if not body.echo or body.logprobs is None:
        return []
    answer = plan.answers[index][0]
    return [
        (start, token, scored)
        for (start, token), scored in zip(_starts(service.speaker.tokenizer, answer.prompt), answer.prompt_logprobs, strict=True)
    ]


def _starts(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """Return where the text of each id begins, and the id."""
    stream = TextStream(tokenizer)
    pieces = stream.push(ids, [TokenLogprob(token, 0.0, []) for token in ids]), stream.finish()
    return [(scored.start, scored.token.token) for scored in joined(*pieces).tokens]


def _moved(tokens: list[Scored], by: int) -> list[tuple[int, int, TokenLogprob | None]]:
    return [(start + by, token.token, token) for start, token in tokens]


def _ending(plan: Plan, index: int) -> list[tuple[int, int, TokenLogprob | None]]:
    """Return the token that ended a text, which has no text itself: whoever scores a prompt counts on one new token behind it."""
    answer, stream = plan.answers[index]
    if answer.finish != "stop" or stream.is_stopped:
        return []
    end = len(plan.echoed[index]) + stream.n_characters
    return [(end, scored.token, scored) for scored in answer.logprobs[answer.n_shown :]]


def _logprobs(service: Service, body: CompletionRequest, tokens: list[tuple[int, int, TokenLogprob | None]]) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    tokenizer = service.speaker.tokenizer
    tops = [None if scored is None else top_logprobs(tokenizer, scored) for _, _, scored in tokens]
    return CompletionLogprobs(
        tokens=[spelling(tokenizer, token).name for _, token, _ in tokens],
        token_logprobs=[None if scored is None else scored.logprob for _, _, scored in tokens],
        top_logprobs=tops if body.logprobs else None,
        text_offset=[start for start, _, _ in tokens],
    )


# LitGPT's own protocol


async def answer_prediction(service: Service, body: PredictRequest, request: Request) -> Response:
    """Return the answer to a prompt in the model's prompt style, or a line of JSON for each piece of it if the server streams.

    Raises:
        ApiError: The request cannot be served.
    """
    job = Job(service, [await prepared(service, request, _plan_prediction, service, body)], None, request.scope)
    job.submit()
    if service.stream:
        return Stream(job, _json_lines(job), "application/x-ndjson", _json_line)
    return await unless_gone(request, _prediction(job))


def _plan_prediction(service: Service, body: PredictRequest) -> tuple[Answer, TextStream]:
    service.check_size(len(body.prompt), "prompt")
    ids = service.speaker.encode(body.prompt)
    wanted = service.defaults.max_new_tokens if body.max_new_tokens is None else body.max_new_tokens
    answer = Answer(ids, service.row(body), service.n_new(len(ids), wanted, "prompt"), service.stop_tokens)
    return answer, TextStream(service.speaker.tokenizer)


async def _prediction(job: Job) -> Response:
    with job:
        text = "".join([part.piece.text async for parts in job.parts() for part in parts])
    return Response(Prediction(output=text).json_bytes(), media_type="application/json")


async def _json_lines(job: Job) -> AsyncIterator[bytes]:
    async for parts in job.parts():
        if text := "".join(part.piece.text for part in parts):
            yield json.dumps({"output": text}, ensure_ascii=False).encode() + b"\n"


def _json_line(error: ApiError) -> bytes:
    return error.answer.json_bytes() + b"\n"
