"""The route for conversations."""

import json
import threading
import time

import httpx2 as httpx
import pytest
from deploy.oracle_answers import expected_logprobs, expected_text, expected_tokens
from deploy.serving import NAME, Served, serving

from litgpt.deploy.service import Defaults, Limits

HI = [{"role": "user", "content": "What do llamas eat?"}]
PATH = "/v1/chat/completions"


def ask(server: Served, messages=HI, **fields):
    answer = server.post(PATH, {"messages": messages, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(text: str) -> list[dict]:
    frames = text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame[6:]) for frame in frames]


def streamed(server: Served, messages=HI, **fields) -> list[dict]:
    answer = server.post(PATH, {"messages": messages, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def text_of(chunks: list[dict], index: int = 0) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def finishes(chunks: list[dict]) -> dict[int, str]:
    return {choice["index"]: choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]}


def refused(server: Served, fields: dict, status: int = 400) -> dict:
    answer = server.post(PATH, {"messages": HI, **fields})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


SAMPLED = {
    "as the server says": {},
    "greedy": {"temperature": 0},
    "top_k 1": {"top_k": 1},
    "hot": {"temperature": 2, "top_p": 0.9},
    "all tokens": {"top_k": 0, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5},
}


@pytest.mark.parametrize("fields", SAMPLED.values(), ids=SAMPLED)
def test_an_answer_is_what_the_model_alone_says(server, fields):
    ids = server.speaker.encode(HI)
    answer = ask(server, seed=7, max_tokens=24, **fields)
    sampling = fields | ({"top_k": None} if fields.get("top_k") == 0 else {})
    assert answer["choices"][0]["message"]["content"] == expected_text(server.speaker, ids, 24, seed=7, **sampling)


@pytest.mark.parametrize("fields", SAMPLED.values(), ids=SAMPLED)
def test_a_stream_is_the_whole_answer(server, fields):
    whole, chunks = ask(server, seed=8, max_tokens=24, **fields), streamed(server, seed=8, max_tokens=24, **fields)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert finishes(chunks)[0] == whole["choices"][0]["finish_reason"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_usage_counts_prompt_and_answer_in_both_forms(server):
    ids, made = server.speaker.encode(HI), expected_tokens(server.speaker, server.speaker.encode(HI), 20, seed=3)
    whole, chunks = ask(server, seed=3, max_tokens=20), streamed(server, seed=3, max_tokens=20, stream_options={"include_usage": True})
    ended = whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["prompt_tokens"] == len(ids)
    assert whole["usage"]["completion_tokens"] == len(made) + ended
    assert whole["usage"]["total_tokens"] == len(ids) + len(made) + ended
    assert chunks[-1]["choices"] == []
    assert {**chunks[-1]["usage"], "prompt_tokens_details": None} == {**whole["usage"], "prompt_tokens_details": None}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert "usage" not in streamed(server, max_tokens=2)[0]


def test_a_prompt_that_begins_as_an_earlier_one_is_partly_remembered(server):
    long = [{"role": "user", "content": "Once upon a time there was a llama. " * 6}]
    ask(server, long, max_tokens=1)
    again = ask(server, [*long, {"role": "assistant", "content": "Yes."}, *HI], max_tokens=1)
    assert 20 < again["usage"]["prompt_tokens_details"]["cached_tokens"] < again["usage"]["prompt_tokens"]


def test_an_answer_ends_for_its_length_or_where_the_model_ends_it(server):
    assert ask(server, max_tokens=3, temperature=0)["choices"][0]["finish_reason"] == "length"
    found = [ask(server, seed=seed, max_tokens=200, temperature=1.5, top_k=0)["choices"][0] for seed in range(6)]
    assert "stop" in {choice["finish_reason"] for choice in found}
    assert not any("<|im_end|>" in choice["message"]["content"] for choice in found)


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_end_the_answer_and_are_not_in_it(server, seed):
    full = ask(server, seed=seed, max_tokens=40)["choices"][0]["message"]["content"]
    stops = [full[10:13], full[12:14], "never"]
    expected = full[: min(full.find(stop) + len(stop) for stop in stops[:2])]
    expected = expected.removesuffix(next(stop for stop in stops if expected.endswith(stop)))
    whole, chunks = ask(server, seed=seed, max_tokens=40, stop=stops), streamed(server, seed=seed, max_tokens=40, stop=stops)
    assert whole["choices"][0]["message"]["content"] == text_of(chunks) == expected
    assert whole["choices"][0]["finish_reason"] == finishes(chunks)[0] == "stop"
    assert whole["usage"]["completion_tokens"] < 40
    assert server.idle()


def test_several_answers_have_seeds_of_their_own_and_keep_apart_in_a_stream(server):
    ids = server.speaker.encode(HI)
    whole, chunks = ask(server, n=3, seed=5, max_tokens=12), streamed(server, n=3, seed=5, max_tokens=12)
    for index in range(3):
        expected = expected_text(server.speaker, ids, 12, seed=5 + index)
        assert whole["choices"][index]["message"]["content"] == text_of(chunks, index) == expected
    assert whole["usage"]["prompt_tokens"] == len(ids)
    assert set(finishes(chunks)) == {0, 1, 2}


def test_more_answers_than_rows_are_all_given(server):
    assert len(ask(server, n=9, max_tokens=3)["choices"]) == 9


def test_logprobs_are_those_of_the_model_and_the_same_in_a_stream(server):
    ids = server.speaker.encode(HI)
    fields = dict(seed=2, max_tokens=15, logprobs=True, top_logprobs=3, temperature=0.5)
    made = expected_tokens(server.speaker, ids, 15, seed=2, temperature=0.5)
    content = ask(server, **fields)["choices"][0]["logprobs"]["content"]
    expected = expected_logprobs(server.speaker, [*ids, *made])[len(ids) - 1 :]
    assert [entry["logprob"] for entry in content] == pytest.approx(expected, abs=1e-4)
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["top_logprobs"][0]["logprob"] >= entry["logprob"] - 1e-6 for entry in content)
    raw = b"".join(bytes(entry["bytes"]) for entry in content)
    assert raw.decode(errors="replace") == ask(server, **fields)["choices"][0]["message"]["content"]
    chunks = streamed(server, **fields)
    told = [entry for chunk in chunks for choice in chunk["choices"] for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in told] == [entry["token"] for entry in content]


def test_without_logprobs_none_are_told(server):
    assert ask(server, max_tokens=2)["choices"][0]["logprobs"] is None


# Formats


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_keeps_to_a_json_schema(server, seed):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", "Bonn"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": schema, "strict": True}}
    whole, chunks = (call(server, seed=seed, response_format=wanted, temperature=1) for call in (ask, streamed))
    made = json.loads(whole["choices"][0]["message"]["content"])
    assert made["city"] in ("Köln", "Bonn") and 1 <= made["days"] <= 9
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert whole["choices"][0]["finish_reason"] == "stop"


def test_json_mode_gives_an_object(server):
    choice = ask(server, seed=1, response_format={"type": "json_object"}, temperature=0.3, max_tokens=150)["choices"][0]
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)


def test_text_is_a_format_too(server):
    assert ask(server, seed=1, max_tokens=5, response_format={"type": "text"})["choices"] == ask(server, seed=1, max_tokens=5)["choices"]


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "http://example.com/schema"}, {"type": "object", "properties": 3}, {"pattern": "(("}], ids=str
)
def test_a_schema_that_cannot_be_kept_is_refused(server, schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert "schema" in refused(server, {"response_format": wanted})["message"]


# Messages


def test_parts_of_a_message_are_one_text(server):
    parts = [{"type": "text", "text": "What do "}, {"type": "text", "text": "llamas eat?"}]
    whole = ask(server, [{"role": "user", "content": parts}], seed=4, max_tokens=8)
    assert whole["choices"] == ask(server, seed=4, max_tokens=8)["choices"]


def test_a_developer_speaks_as_the_system(server):
    texts = [
        ask(server, [{"role": role, "content": "Be brief."}, *HI], seed=4, max_tokens=8)["choices"] for role in ("system", "developer")
    ]
    assert texts[0] == texts[1]


def test_what_openais_client_sends_back_of_an_answer_is_taken(server):
    message = ask(server, max_tokens=3, seed=1)["choices"][0]["message"]
    again = {**message, "audio": None, "function_call": None, "annotations": [], "tool_calls": None}
    ask(server, [*HI, again, *HI], max_tokens=2)


WRONG = {
    "an unknown field": ({"wrong": 1}, "wrong"),
    "a known field of OpenAI's that is not supported": ({"prediction": {}}, "prediction"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages.0.user.content.0.type",
    ),
    "an unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0"),
    "no message": ({"messages": []}, "messages"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.user.content"),
    "a field within a message": ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.0.user.x"),
    "a bias": ({"logit_bias": {"1": 2}}, "logit_bias"),
    "storing": ({"store": True}, "store"),
    "a number as text": ({"temperature": "1"}, "temperature"),
    "a truth value as number": ({"n": True}, "n"),
    "a text as truth value": ({"stream": "yes"}, "stream"),
    "too hot": ({"temperature": 11}, "temperature"),
    "too cold": ({"temperature": -0.1}, "temperature"),
    "top_p": ({"top_p": 1.1}, "top_p"),
    "min_p": ({"min_p": -1}, "min_p"),
    "top_k": ({"top_k": -2}, "top_k"),
    "presence": ({"presence_penalty": 3}, "presence_penalty"),
    "repetition": ({"repetition_penalty": 0}, "repetition_penalty"),
    "seed": ({"seed": 2**64}, "seed"),
    "n": ({"n": 0}, "n"),
    "many answers": ({"n": 1000}, "n"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "many tokens": ({"max_tokens": 2**20}, "max_tokens"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    "likeliest tokens alone": ({"top_logprobs": 2}, "top_logprobs"),
    "many likeliest tokens": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "an empty stop": ({"stop": ""}, "stop"),
    "many stops": ({"stop": ["a"] * 17}, "stop"),
    "a long stop": ({"stop": "a" * 257}, "stop"),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "another format": ({"response_format": {"type": "xml"}}, "response_format"),
}


@pytest.mark.parametrize("fields, param", WRONG.values(), ids=WRONG)
def test_what_is_not_supported_is_refused_by_name(server, fields, param):
    error = refused(server, fields)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"messages": NaN}', b"\xff", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"[" * 5000, b"null"],
    ids=lambda body: str(body[:20]),
)
def test_what_is_no_json_object_is_refused(server, body):
    answer = server.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_messages_that_the_style_does_not_take_are_refused(server):
    error = refused(server, {"messages": [*HI, {"role": "assistant", "content": "Hay."}]})
    assert "nothing to answer" in error["message"]


def test_a_prompt_longer_than_the_context_is_refused_and_an_answer_is_cut_there(server):
    error = refused(server, {"messages": [{"role": "user", "content": "hay " * 300}]})
    assert error["code"] == "context_length_exceeded"
    answer = ask(server, max_tokens=5000, temperature=0)
    assert answer["usage"]["total_tokens"] <= server.service.engine.max_length


def test_an_unknown_model_is_not_found(server):
    assert refused(server, {"model": "gpt-5"}, 404)["code"] == "model_not_found"
    assert ask(server, model=NAME, max_tokens=1)["model"] == NAME


# One among many


def test_answers_to_many_at_once_are_those_to_each_alone(server):
    wanted = [dict(seed=seed, max_tokens=10 + seed, temperature=0.7 + seed / 10, stream=bool(seed % 2)) for seed in range(12)]
    ids, found = server.speaker.encode(HI), {}

    def one(i: int) -> None:
        answer = server.post(PATH, {"messages": HI, **wanted[i]})
        found[i] = text_of(events(answer.text)) if wanted[i]["stream"] else answer.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i, fields in enumerate(wanted):
        alone = expected_text(server.speaker, ids, fields["max_tokens"], seed=fields["seed"], temperature=fields["temperature"])
        assert found[i] == alone


def test_a_client_that_leaves_frees_its_place_at_once(checkpoint, monkeypatch):
    with serving(checkpoint, rows=1) as server:
        slowly(server, monkeypatch)
        fields = {"messages": HI, "n": 2, "temperature": 0, "max_tokens": 200}
        with pytest.raises(httpx.ReadTimeout):
            server.post(PATH, fields, timeout=0.3)
        assert server.idle(1.0)
        with server.client.stream("POST", server.url + PATH, json={**fields, "stream": True}) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
            assert server.service.engine.n_running
        assert server.idle(1.0)
        assert ask(server, max_tokens=1)


def test_a_full_queue_says_when_to_come_again(checkpoint, monkeypatch):
    with serving(checkpoint, rows=1, queue=1) as server:
        slowly(server, monkeypatch)
        threads = [threading.Thread(target=server.post, args=(PATH, {"messages": HI, "max_tokens": 60})) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        answer = server.post(PATH, {"messages": HI, "stream": True})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        [thread.join() for thread in threads]
        assert f"litgpt_prompt_tokens_total {2.0 * len(server.speaker.encode(HI))}\n" in server.get("/metrics").text, "what was refused"


def test_an_answer_that_does_not_begin_in_time_ends_with_an_error(checkpoint, monkeypatch):
    with serving(checkpoint, limits=Limits(timeout=0.3)) as server:
        monkeypatch.setattr(server.service.engine.batch, "step", lambda: time.sleep(0.02) or [])
        assert refused(server, {"max_tokens": 200, "temperature": 0}, 504)["code"] == "timeout"
        text = server.post(PATH, {"messages": HI, "max_tokens": 200, "temperature": 0, "stream": True}).text
        assert json.loads(text.strip().split("\n\n")[-1][6:])["error"]["code"] == "timeout"
        assert "[DONE]" not in text
        assert server.idle()


def test_many_answers_may_take_longer_than_one_may_wait(checkpoint, monkeypatch):
    with serving(checkpoint, rows=1, limits=Limits(timeout=0.6)) as server:
        slowly(server, monkeypatch)
        assert len(ask(server, n=4, temperature=0, max_tokens=12)["choices"]) == 4
        body = {"prompt": [[5] * 10] * 40, "echo": True, "logprobs": 0, "max_tokens": 0}
        assert server.post("/v1/completions", body).status_code == 200


def test_an_engine_that_broke_ends_streams_with_an_error_and_refuses_what_comes(checkpoint, monkeypatch):
    with serving(checkpoint) as server:
        assert server.get("/health").status_code == 200
        slowly(server, monkeypatch, breaks_after=5)
        text = server.post(PATH, {"messages": HI, "max_tokens": 100, "temperature": 0, "stream": True}).text
        assert json.loads(text.strip().split("\n\n")[-1][6:])["error"]["code"] == "engine_failed"
        assert refused(server, {}, 503)["code"] == "engine_failed"
        assert server.get("/health").status_code == server.get("/ready").status_code == 503


def slowly(server: Served, monkeypatch, breaks_after: int = 10**9) -> None:
    """Let each step take a while, and one of them break."""
    batch, steps = server.service.engine.batch, iter(range(breaks_after))
    step = batch.step

    def slow():
        time.sleep(0.02)
        if next(steps, None) is None:
            raise RuntimeError("broken on purpose")
        return step()

    monkeypatch.setattr(batch, "step", slow)


def test_defaults_are_the_servers_and_zero_is_a_value(checkpoint):
    with serving(checkpoint, defaults=Defaults(temperature=0.0, seed=1)) as server:
        ids = server.speaker.encode(HI)
        greedy = expected_text(server.speaker, ids, 12, temperature=0)
        assert ask(server, max_tokens=12)["choices"][0]["message"]["content"] == greedy
        drawn = ask(server, max_tokens=12, temperature=1.5)["choices"][0]["message"]["content"]
        assert drawn == expected_text(server.speaker, ids, 12, temperature=1.5, seed=1)


def test_a_schema_that_is_too_complex_to_go_on_with_hurts_nobody_else(server):
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": many}}
    assert refused(server, {"response_format": wanted, "max_tokens": 40})["code"] == "schema_too_complex"
    assert server.get("/health").status_code == 200
    assert ask(server, max_tokens=2)
