"""The official client: what it sends is understood, what it gets it understands, and a stream is the same as the whole."""

import asyncio
import json
import time

import openai
import pytest
from deploy.serving import NAME, serving
from deploy.test_tools import CALLS, TOOLS, template
from pydantic import BaseModel
from speaking import make_checkpoint

HI = [{"role": "user", "content": "Hi"}]
TALK = [{"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": "Hello!"}, *HI]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Grüße "}, {"type": "text", "text": "aus 你好 🙂"}]}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "big": {"type": "boolean"}},
    "required": ["name", "big"],
    "additionalProperties": False,
}
EXTRA = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of a model that can call functions."""
    text = template("between words, as Qwen")
    assert "between words, as Qwen" in CALLS
    with serving(make_checkpoint(tmp_path_factory.mktemp("client") / "tiny", context=1024, template=text)) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


CHATS = {
    **{f"temperature {value}": {"temperature": value} for value in (0, 0.0, 0.2, 1, 1.5, 2)},
    **{f"top_p {value}": {"top_p": value} for value in (0, 0.1, 0.9, 1)},
    **{f"seed {value}": {"seed": value} for value in (0, 1, -5, 2**40)},
    **{f"{value} tokens": {"max_tokens": value} for value in (1, 2, 17, 100)},
    **{f"{value} completion tokens": {"max_completion_tokens": value} for value in (1, 30)},
    **{f"presence {value}": {"presence_penalty": value} for value in (-2, 0, 1.5)},
    **{f"frequency {value}": {"frequency_penalty": value} for value in (-1, 2)},
    **{f"n {value}": {"n": value} for value in (1, 2, 5)},
    "a stop": {"stop": "a"},
    "stops": {"stop": ["e", " ", "qq"]},
    "a stop of two": {"stop": ["us"], "temperature": 0.3},
    "no stop": {"stop": None},
    "likeliest tokens": {"logprobs": True, "top_logprobs": 4},
    "probabilities": {"logprobs": True},
    "no probabilities": {"logprobs": False},
    "a conversation": {"messages": TALK},
    "parts": {"messages": PARTS},
    "a developer": {"messages": [{"role": "developer", "content": "x"}, *HI]},
    "a named user": {"messages": [{"role": "user", "content": "x", "name": "Ann"}]},
    "our own fields": {"extra_body": EXTRA},
    "all tokens": {"extra_body": {"top_k": 0}},
    "a user": {"user": "ann"},
    "metadata": {"metadata": {"a": "b"}},
    "not stored": {"store": False},
    "no bias": {"logit_bias": {}},
    "text": {"response_format": {"type": "text"}},
    "an object": {"response_format": {"type": "json_object"}, "max_tokens": 60},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
    "a loose schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}},
    "tools": {"tools": TOOLS},
    "tools, one at a time": {"tools": TOOLS, "parallel_tool_calls": False},
    "tools, not used": {"tools": TOOLS, "tool_choice": "none"},
    "tools, one is used": {"tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 200},
    "tools, this one is used": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}, "max_tokens": 200},
    "two answers with probabilities and a stop": {"n": 2, "logprobs": True, "stop": ["o", "i"]},
}
TEXTS = {
    **{f"temperature {value}": {"temperature": value} for value in (0, 0.5, 1.7)},
    **{f"top_p {value}": {"top_p": value} for value in (0, 0.5)},
    **{f"{value} tokens": {"max_tokens": value} for value in (1, 9, 64)},
    **{f"seed {value}": {"seed": value} for value in (3, 2**63 - 1)},
    **{f"{value} likeliest tokens": {"logprobs": value} for value in (0, 1, 5)},
    **{f"n {value}": {"n": value} for value in (2, 4)},
    "a default length": {"max_tokens": None},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 0.5},
    "a stop": {"stop": "e"},
    "stops": {"stop": ["e", "a", "\n"]},
    "an echo": {"echo": True},
    "an echo with probabilities": {"echo": True, "logprobs": 2},
    "only an echo": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "an echo of two": {"echo": True, "prompt": ["a", "bc"], "logprobs": 1, "stop": "e"},
    "ids": {"prompt": [5, 6, 7]},
    "lists of ids": {"prompt": [[5, 6, 7], [8]]},
    "three texts": {"prompt": ["Once", "upon", "a time"], "n": 2},
    "all writing systems": {"prompt": "日本語 naïve 😀"},
    "best of as many": {"n": 2, "best_of": 2},
    "our own fields": {"extra_body": EXTRA},
    "a user": {"user": "ann"},
    "no bias": {"logit_bias": {}},
}


def test_there_are_enough_cases():
    assert len(CHATS) + len(TEXTS) >= 80


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS)
def test_a_streamed_conversation_is_the_whole_one(client, fields):
    asked = {"model": NAME, "messages": HI, "seed": 11, "max_completion_tokens": 12, **fields}
    if "max_tokens" in fields:
        del asked["max_completion_tokens"]
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len(whole.choices) == fields.get("n", 1)
    for choice in whole.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.delta.content or "" for piece in pieces) == (choice.message.content or "")
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [choice.finish_reason]
        assert pieces[0].delta.role == choice.message.role == "assistant"
        calls = [call for piece in pieces for call in piece.delta.tool_calls or []]
        assert [call.function.arguments for call in calls] == [call.function.arguments for call in choice.message.tool_calls or []]
        told = [entry for piece in pieces if piece.logprobs for entry in piece.logprobs.content]
        expected = choice.logprobs.content if choice.logprobs else []
        assert [(entry.token, entry.bytes) for entry in told] == [(entry.token, entry.bytes) for entry in expected]
        assert [entry.logprob for entry in told] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)
    usage, expected = chunks[-1].usage, whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)


@pytest.mark.parametrize("fields", TEXTS.values(), ids=TEXTS)
def test_a_streamed_text_is_the_whole_one(client, fields):
    asked = {"model": NAME, "prompt": "Once upon", "seed": 11, "max_tokens": 12, **fields}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [choice.finish_reason]
        if choice.logprobs is not None:
            told = [token for piece in pieces for token in piece.logprobs.tokens]
            assert told == choice.logprobs.tokens
            starts = [start for piece in pieces for start in piece.logprobs.text_offset]
            assert starts == choice.logprobs.text_offset
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"model": "gpt-5"}, openai.NotFoundError),
        ({"temperature": 99}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError),
        ({"service_tier": "flex"}, openai.BadRequestError),
        ({"reasoning_effort": "high"}, openai.BadRequestError),
        ({"modalities": ["audio"]}, openai.BadRequestError),
        ({"functions": [{"name": "x"}]}, openai.BadRequestError),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(client, fields, error, stream):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": HI, **fields}, stream=stream)
    assert caught.value.body["message"]


def test_an_error_within_a_stream_is_the_clients_own(served, client, monkeypatch):
    batch = served.service.engine.batch
    monkeypatch.setattr(served.service.limits, "timeout", 0.2)
    monkeypatch.setattr(batch, "step", lambda: time.sleep(0.02) or [])
    with pytest.raises(openai.APIError, match="time"):
        list(client.chat.completions.create(model=NAME, messages=HI, stream=True, temperature=0, max_tokens=400))


def test_models_are_listed(client):
    assert [card.id for card in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "litgpt"


@pytest.mark.parametrize("given", ["a", ["a", "b c"], [5, 6], [[5, 6], [7]]], ids=str)
def test_vectors_are_read_in_either_form(client, given):
    plain = client.embeddings.create(model=NAME, input=given, encoding_format="float")
    coded = client.embeddings.create(model=NAME, input=given)  # the client asks for base64
    for one, other in zip(plain.data, coded.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)


def test_an_answer_is_parsed_into_a_class(client):
    class Llama(BaseModel):
        big: bool
        legs: int

    message = client.chat.completions.parse(model=NAME, messages=HI, response_format=Llama, seed=1, temperature=0.5).choices[0].message
    assert isinstance(message.parsed, Llama)


def test_the_clients_stream_of_events_ends_with_the_whole_answer(client):
    with client.chat.completions.stream(model=NAME, messages=HI, seed=2, stop=list('abcdefghij.,:"')) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == said


def test_a_call_and_its_result_go_on(client):
    forced = {"type": "function", "function": {"name": "weather"}}
    message = client.chat.completions.create(model=NAME, messages=HI, tools=TOOLS, tool_choice=forced, seed=1).choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments)["city"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    assert client.chat.completions.create(model=NAME, messages=[*HI, message, result], tools=TOOLS, max_tokens=3).choices


def test_many_asynchronous_requests_are_answered_as_each_alone(served, client):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as many:
            asked = [many.chat.completions.create(model=NAME, messages=HI, seed=i, max_tokens=8) for i in range(10)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    alone = [client.chat.completions.create(model=NAME, messages=HI, seed=i, max_tokens=8).choices[0].message.content for i in range(10)]
    assert asyncio.run(ask_all()) == alone
