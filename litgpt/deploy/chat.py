"""The route `/v1/chat/completions`: a conversation goes in, one or several answers come out, whole or piece by piece."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from litgpt.deploy.answering import Job, Part, Piece, Stream, TextStream, in_thread, joined, prepared, unless_gone
from litgpt.deploy.protocol import (
    Answered,
    AnyMessage,
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Content,
    Function,
    Generating,
    GivenCall,
    NamedChoice,
    ObjectFormat,
    SchemaFormat,
    ToolCall,
    ToolMessage,
    Usage,
)
from litgpt.deploy.service import ApiError, Service
from litgpt.deploy.spelling import content_logprob
from litgpt.deploy.tools import Call, CallFormat, CallReader, call_format, forcing_grammar, special_tokens, with_tools
from litgpt.generate.batch import Answer
from litgpt.prompts import PromptStyle, encode_prompt

DONE = b"data: [DONE]\n\n"
MANY_TURNS = 24  # of a conversation that takes long to be read


@dataclass
class Plan:
    """What a request comes to: the answers to ask the engine for, and how they are read."""

    answers: list[tuple[Answer, TextStream]]
    readers: list[CallReader | None]
    adapter: str | None
    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


async def answer_chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Return the answers to a conversation.

    Raises:
        ApiError: The request cannot be served.
    """
    has_grammar = isinstance(body.response_format, ObjectFormat | SchemaFormat) or body.tool_choice not in (None, "none", "auto")
    is_slow = has_grammar or n_turns(body.messages) > MANY_TURNS
    plan = await prepared(service, request, make_plan, service, body, is_slow=is_slow)
    job = Job(service, plan.answers, plan.adapter, request.scope)
    job.submit()
    if body.stream:
        return Stream(job, _lines(service, body, plan, job), "text/event-stream", event)
    return await unless_gone(request, _whole(service, body, plan, job))


def event(data: Answered | ApiError) -> bytes:
    """Return an answer, or an error, as an event of a stream."""
    return b"data: " + (data.answer if isinstance(data, ApiError) else data).json_bytes() + b"\n\n"


# What is asked


def make_plan(service: Service, body: ChatRequest) -> Plan:
    """Return what a request comes to.

    Raises:
        ApiError: A field is out of its range, or does not go with another.
        UserError: The model cannot be asked so.
    """
    adapter, n = service.adapter(body.model), body.n or 1
    _check(service, body)
    stops, tokenizer, style = service.stops(body.stop), service.speaker.tokenizer, service.speaker.style
    functions = [] if body.tool_choice == "none" else [tool.function for tool in body.tools or []]
    form, lark, schema = None, None, _schema(service, body)
    if functions:
        style = with_tools(style, functions)
        form = call_format(style)
        lark = _forced(service, body, form, functions)
    ids = prompt_ids(service, style, body.messages)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    n_new, shown = service.n_new(len(ids), wanted, "messages"), {} if form is None else special_tokens(tokenizer, form)
    plan = Plan([], [], adapter, body.model or service.name)
    for choice in range(n):
        row = service.row(body, choice, service.grammar(schema, lark))
        n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        answer = Answer(ids, row, n_new, service.stop_tokens, n_logprobs)
        plan.answers.append((answer, TextStream(tokenizer, stops, shown=shown)))
        names = [function.name for function in functions]
        plan.readers.append(None if form is None else CallReader(form, names, is_single=body.parallel_tool_calls is False))
    return plan


def _check(service: Service, body: ChatRequest) -> None:
    """Refuse what would have to be ignored, or is more than may be asked for."""
    limits = service.limits
    if (body.n or 1) > limits.max_choices:
        raise ApiError(400, f"`n` may be at most {limits.max_choices}, but got {body.n}.", "n")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    check_stream_options(body)
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "`max_tokens` is the older name of `max_completion_tokens`. Leave one of them out.", "max_tokens")
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    if len(tools) > limits.max_tools:
        raise ApiError(400, f"There may be at most {limits.max_tools} `tools`, but there are {len(tools)}.", "tools")
    if len(set(names)) < len(names):
        raise ApiError(400, "Two of the `tools` have the same name.", "tools")
    choice = body.tool_choice
    if not tools and choice not in (None, "none"):
        raise ApiError(400, "`tool_choice` needs `tools` to choose from.", "tool_choice")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise ApiError(400, f"`tool_choice` names {choice.function.name!r}, which is none of the `tools`.", "tool_choice")
    if tools and choice != "none" and isinstance(body.response_format, ObjectFormat | SchemaFormat):
        raise ApiError(400, "`tools` and a JSON `response_format` cannot be used together.", "response_format")
    if len(json.dumps([tool.function.parameters for tool in tools])) > limits.max_schema:
        raise ApiError(400, f"The schemas of all `tools` may have {limits.max_schema} characters together.", "tools")


def check_stream_options(body: Generating) -> None:
    """Refuse options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "`stream_options` needs `stream` to be true.", "stream_options")


def _schema(service: Service, body: ChatRequest) -> dict[str, Any] | None:
    """Return the schema that the answer keeps to, if there is one."""
    wanted = body.response_format
    if isinstance(wanted, ObjectFormat):
        return {"type": "object"}
    if not isinstance(wanted, SchemaFormat):
        return None
    if len(json.dumps(wanted.json_schema.schema_)) > service.limits.max_schema:
        raise ApiError(400, f"A JSON schema may have at most {service.limits.max_schema} characters.", "response_format")
    return wanted.json_schema.schema_


def _forced(service: Service, body: ChatRequest, form: CallFormat, functions: Sequence[Function]) -> str | None:
    """Return the grammar of a call, if there has to be one."""
    if isinstance(body.tool_choice, NamedChoice):
        functions = [function for function in functions if function.name == body.tool_choice.function.name]
    elif body.tool_choice != "required":
        return None
    return forcing_grammar(service.speaker.tokenizer, form, functions)


def n_turns(messages: Sequence[AnyMessage]) -> int:
    """Return how many of the messages are the assistant's."""
    return sum(message.role == "assistant" for message in messages)


def prompt_ids(service: Service, style: PromptStyle, messages: Sequence[AnyMessage]) -> list[int]:
    """Return the ids of a conversation.

    Raises:
        ApiError: It is too long.
        UserError: The style cannot write it.
    """
    said = [_text(message.content) for message in messages if message.role != "assistant"]  # of answers templates drop parts
    service.check_size(sum(map(len, said)), "messages")
    if (n := n_turns(messages)) > (most := service.limits.max_turns):
        raise ApiError(400, f"At most {most} messages may be the assistant's, but {n} are. Leave out old ones.", "messages")
    return encode_prompt(style, service.speaker.tokenizer, as_given(messages))


def as_given(messages: Sequence[AnyMessage]) -> list[dict[str, Any]]:
    """Return messages as prompt styles and chat templates take them: parts joined, and the arguments of calls as mappings."""
    given = []
    for message in messages:
        fields = {"role": "system" if message.role == "developer" else message.role, "content": _text(message.content)}
        if isinstance(message, AssistantMessage):
            fields |= {} if message.reasoning_content is None else {"reasoning_content": message.reasoning_content}
            if message.tool_calls:
                fields["tool_calls"] = [_as_given_call(call) for call in message.tool_calls]
        if isinstance(message, ToolMessage):
            fields["tool_call_id"] = message.tool_call_id
        given.append(fields | ({} if message.name is None else {"name": message.name}))
    return given


def _text(content: Content | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or [])


def _as_given_call(call: GivenCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    function = {"name": call.function.name, "arguments": arguments if isinstance(arguments, dict) else call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


# What is answered


def _read(plan: Plan, part: Part) -> tuple[Piece, list[Call], str | None]:
    """Return the text of a part, the calls in it, and why it ended if it has."""
    reader = plan.readers[part.index]
    if reader is None:
        return part.piece, [], part.finish
    piece = reader.push(part.piece)
    if part.finish is None:
        return piece, [], None
    rest, calls = reader.finish()
    return joined(piece, rest), calls, "tool_calls" if calls and part.finish == "stop" else part.finish


async def _whole(service: Service, body: ChatRequest, plan: Plan, job: Job) -> Response:
    """Return all answers at once."""
    answers: list[list[tuple[Piece, list[Call], str | None]]] = [[] for _ in plan.answers]
    with job:
        async for parts in job.parts():
            for part in parts:
                answers[part.index].append(_read(plan, part))
    return await in_thread(_completion, service, body, plan, answers, job.usage)


def _completion(
    service: Service, body: ChatRequest, plan: Plan, answers: list[list[tuple[Piece, list[Call], str | None]]], usage: Usage
) -> Response:
    """Return all answers; what is told of each token makes that take long."""
    choices = []
    for index, parts in enumerate(answers):
        pieces, called, finishes = zip(*parts, strict=True)
        piece, calls, finish = joined(*pieces), [call for calls in called for call in calls], finishes[-1]
        message = ChatMessage(role="assistant", content=piece.text or (None if calls else ""), refusal=None)
        if calls:
            message.tool_calls = [_tool_call(call) for call in calls]
        logprobs = _logprobs(service, body, piece)
        choices.append(ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish))
    head = dict(id=plan.id, object="chat.completion", created=plan.created, model=plan.model)
    return Response(ChatCompletion(**head, choices=choices, usage=usage).json_bytes(), media_type="application/json")


async def _lines(service: Service, body: ChatRequest, plan: Plan, job: Job) -> AsyncIterator[bytes]:
    """Yield the answers as events while they are made."""
    head = dict(id=plan.id, object="chat.completion.chunk", created=plan.created, model=plan.model)
    tells_usage = body.stream_options is not None and body.stream_options.include_usage
    none = {"usage": None} if tells_usage else {}
    begun: set[int] = set()

    def chunk(index: int, finish: str | None = None, logprobs: ChatLogprobs | None = None, **delta: Any) -> bytes:
        choice = ChatChunkChoice(index=index, delta=ChatMessage(**delta), logprobs=logprobs, finish_reason=finish)
        return event(ChatChunk(**head, choices=[choice], **none))

    async for parts in job.parts():
        lines = []
        for part in parts:
            piece, calls, finish = _read(plan, part)
            if part.index not in begun:
                begun.add(part.index)
                lines.append(chunk(part.index, role="assistant", content="", refusal=None))
            if piece.text or piece.tokens:
                lines.append(chunk(part.index, logprobs=_logprobs(service, body, piece), content=piece.text))
            lines += [chunk(part.index, tool_calls=[_tool_call(call, index=i)]) for i, call in enumerate(calls)]
            if finish is not None:
                lines.append(chunk(part.index, finish))
        if lines:
            yield b"".join(lines)
    yield (event(ChatChunk(**head, choices=[], usage=job.usage)) if tells_usage else b"") + DONE


def _logprobs(service: Service, body: ChatRequest, piece: Piece) -> ChatLogprobs | None:
    if not body.logprobs:
        return None
    return ChatLogprobs(content=[content_logprob(service.speaker.tokenizer, scored.token) for scored in piece.tokens], refusal=None)


def _tool_call(call: Call, **index: int) -> ToolCall:
    return ToolCall(**index, id=call.id, type="function", function=CalledFunction(name=call.name, arguments=call.arguments))
