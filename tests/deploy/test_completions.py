"""The routes for texts that go on, for vectors, and LitGPT's own."""

import base64
import json
import math
import struct
import time

import pytest
from deploy.oracle_answers import expected_logprobs, expected_text, expected_tokens
from deploy.serving import Served, serving
from deploy.test_chat_completions import events

from litgpt.deploy import embeddings
from litgpt.deploy.app import CHAT, PREDICT
from litgpt.deploy.service import Limits

PATH = "/v1/completions"
PROMPT = "Once upon a time"


def ask(server: Served, prompt=PROMPT, **fields):
    answer = server.post(PATH, {"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(server: Served, prompt=PROMPT, **fields) -> list[dict]:
    return events(server.post(PATH, {"prompt": prompt, "stream": True, **fields}).text)


def choices_of(chunks: list[dict], index: int = 0) -> list[dict]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def ids_of(server: Served, text: str = PROMPT) -> list[int]:
    return server.speaker.tokenizer.encode(text).tolist()


def test_a_text_goes_on_as_the_model_alone_says(server):
    ids = ids_of(server)
    whole = ask(server, seed=1, max_tokens=20)
    assert whole["choices"][0]["text"] == expected_text(server.speaker, ids, 20, seed=1, goes_on=True)
    assert "".join(choice["text"] for choice in choices_of(streamed(server, seed=1, max_tokens=20))) == whole["choices"][0]["text"]


def test_an_answer_has_sixteen_tokens_where_nothing_is_said(server):
    assert ask(server, temperature=0)["usage"]["completion_tokens"] == 16


def test_prompts_may_be_texts_or_ids_one_or_many(server):
    ids, other = ids_of(server), ids_of(server, "Grass and hay.")
    alone = [ask(server, prompt, temperature=0, max_tokens=6)["choices"][0]["text"] for prompt in (PROMPT, "Grass and hay.")]
    assert ask(server, ids, temperature=0, max_tokens=6)["choices"][0]["text"] == alone[0]
    for prompts in ([PROMPT, "Grass and hay."], [ids, other]):
        both = ask(server, prompts, temperature=0, max_tokens=6)
        assert [choice["text"] for choice in both["choices"]] == alone
        assert [choice["index"] for choice in both["choices"]] == [0, 1]
        assert both["usage"]["prompt_tokens"] == len(ids) + len(other)


def test_several_answers_to_several_prompts_come_in_order(server):
    whole = ask(server, [PROMPT, "hay"], n=2, best_of=2, seed=9, max_tokens=5)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    expected = [
        expected_text(server.speaker, ids_of(server, prompt), 5, seed=9 + i, goes_on=True) for prompt in (PROMPT, "hay") for i in (0, 1)
    ]
    assert [choice["text"] for choice in whole["choices"]] == expected


def test_more_prompts_than_the_queue_holds_are_all_answered(checkpoint):
    with serving(checkpoint, rows=2, queue=1) as server:
        whole = ask(server, [f"{i} llamas" for i in range(12)], max_tokens=3)
        assert len(whole["choices"]) == 12


@pytest.mark.parametrize("prompt", [PROMPT, "Grüße 🙂 世", " spaces  "], ids=str)
def test_an_echo_comes_before_the_answer_with_the_probability_of_each_token(server, prompt):
    ids = ids_of(server, prompt)
    made = expected_tokens(server.speaker, ids, 5, seed=3)
    choice = ask(server, prompt, echo=True, logprobs=2, max_tokens=5, seed=3)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == prompt + expected_text(server.speaker, ids, 5, seed=3, goes_on=True)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected_logprobs(server.speaker, [*ids, *made]), abs=1e-4)
    assert all(own in top.values() for own, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True))
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(ids) + len(made)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        near = choice["text"][start : start + len(token) + 8]  # tokens that make one character together begin where it does
        assert token.startswith("bytes:") or token in near


def test_an_echo_is_streamed_first_and_all_pieces_are_the_whole(server):
    fields = dict(echo=True, logprobs=1, max_tokens=9, seed=4, n=2)
    whole, chunks = ask(server, **fields), streamed(server, **fields)
    for index in range(2):
        pieces, choice = choices_of(chunks, index), whole["choices"][index]
        assert pieces[0]["text"] == PROMPT
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        told = {key: [value for piece in pieces for value in piece["logprobs"][key]] for key in choice["logprobs"]}
        assert told["tokens"] == choice["logprobs"]["tokens"]
        assert told["text_offset"] == choice["logprobs"]["text_offset"]
        assert told["token_logprobs"] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
        for top, expected in zip(told["top_logprobs"], choice["logprobs"]["top_logprobs"], strict=True):
            assert top == (expected and pytest.approx(expected, abs=1e-5))
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]


def test_a_prompt_can_be_scored_without_an_answer(server):
    ids = ids_of(server)
    choice = ask(server, ids, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert choice["text"] == PROMPT
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected_logprobs(server.speaker, ids), abs=1e-4)
    assert choice["logprobs"]["top_logprobs"] is None
    assert choice["finish_reason"] == "length"


def test_a_scored_prompt_may_fill_the_context(server):
    ids = [5] * server.service.engine.max_length
    assert len(ask(server, ids, echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert server.post(PATH, {"prompt": ids, "max_tokens": 1}).json()["error"]["code"] == "context_length_exceeded"


def test_the_token_that_ends_a_text_is_scored_behind_it_streamed_too(checkpoint):
    with serving(checkpoint) as server:
        end = server.speaker.tokenizer.token_to_id("<|im_end|>")
        server.service.stop_tokens = [[token] for token in range(3, 300, 2)] + [[end]]
        fields = dict(echo=True, logprobs=1, seed=2, max_tokens=50)
        choice, pieces = ask(server, **fields)["choices"][0], choices_of(streamed(server, **fields))
        told = {key: [value for piece in pieces for value in piece["logprobs"][key]] for key in ("tokens", "text_offset")}
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])
        assert (told["tokens"], told["text_offset"]) == (choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"])
        made = expected_tokens(server.speaker, ids_of(server), 50, seed=2)
        until = next(i for i, token in enumerate(made) if [token] in server.service.stop_tokens)
        assert len(told["tokens"]) == len(ids_of(server)) + until + 1


def test_stop_strings_end_a_text(server):
    full = ask(server, seed=6, max_tokens=30)["choices"][0]["text"]
    stopped = ask(server, seed=6, max_tokens=30, stop=full[8:10])["choices"][0]
    assert stopped["text"] == full[: full.find(full[8:10])]
    assert stopped["finish_reason"] == "stop"


WRONG = {
    "best_of": ({"best_of": 2}, "best_of"),
    "suffix": ({"suffix": "x"}, "suffix"),
    "no tokens without echo": ({"max_tokens": 0}, "max_tokens"),
    "many likeliest tokens": ({"logprobs": 21}, "logprobs"),
    "likeliest tokens as truth value": ({"logprobs": True}, "logprobs"),
    "no prompt": ({"prompt": []}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "an empty list of ids": ({"prompt": [[]]}, "prompt"),
    "many prompts": ({"prompt": ["a"] * 300}, "prompt"),
    "chat's field": ({"max_completion_tokens": 3}, "max_completion_tokens"),
    "options without a stream": ({"stream_options": {}}, "stream_options"),
}


@pytest.mark.parametrize("fields, param", WRONG.values(), ids=WRONG)
def test_what_is_not_supported_is_refused_by_name(server, fields, param):
    answer = server.post(PATH, {"prompt": PROMPT, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("prompt", [[2**31 - 1], [1, 303], [[1], [9999]], [-1], [1, "a"], ["a", 1], [True], 7, None, {"a": 1}], ids=str)
def test_a_prompt_of_unknown_tokens_or_mixed_kinds_is_refused(server, prompt):
    assert server.post(PATH, {"prompt": prompt}).status_code == 400
    assert server.post("/v1/embeddings", {"input": prompt}).status_code == 400


# Vectors


def vectors(server: Served, given, **fields) -> list[list[float]]:
    answer = server.post("/v1/embeddings", {"input": given, **fields})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


def test_a_vector_is_the_mean_of_what_the_model_computes_with_length_one(server):
    [vector] = vectors(server, PROMPT)
    hidden = server.speaker.model(server.speaker.tokenizer.encode(PROMPT).long()[None], output="hidden")[0].mean(0)
    assert vector == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-5)
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)


def test_vectors_do_not_depend_on_the_form_or_the_neighbours(server):
    texts = [PROMPT, "hay", "Grüße aus Köln " * 10]
    alone = [vectors(server, text)[0] for text in texts]
    for given in (texts, [ids_of(server, text) for text in texts]):
        for vector, expected in zip(vectors(server, given), alone, strict=True):
            assert vector == pytest.approx(expected, abs=1e-5)
    assert vectors(server, ids_of(server))[0] == pytest.approx(alone[0], abs=1e-5)


def test_vectors_come_as_base64_too(server):
    [coded], [plain] = vectors(server, PROMPT, encoding_format="base64"), vectors(server, PROMPT, encoding_format="float")
    raw = base64.b64decode(coded)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(plain, abs=1e-7)


def test_vectors_are_made_while_answers_are(server):
    usage = server.post("/v1/embeddings", {"input": ["hay"] * 40}).json()["usage"]
    assert usage == {"prompt_tokens": 40 * len(ids_of(server, "hay")), "total_tokens": 40 * len(ids_of(server, "hay"))}


def test_many_vectors_may_take_longer_than_one_may(checkpoint, monkeypatch):
    plain = embeddings.embeddings
    monkeypatch.setattr(embeddings, "PACKED", 1)
    monkeypatch.setattr(embeddings, "embeddings", lambda *args, **options: (time.sleep(0.1), plain(*args, **options))[1])
    with serving(checkpoint, limits=Limits(timeout=0.5)) as server:
        assert len(vectors(server, ["hay"] * 8)) == 8
        monkeypatch.setattr(embeddings, "embeddings", lambda *_, **__: time.sleep(1))
        assert server.post("/v1/embeddings", {"input": "hay"}).json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("fields", [{"dimensions": 3}, {"encoding_format": "int8"}, {"input": []}, {"input": "hay " * 500}], ids=str)
def test_vectors_that_cannot_be_made_are_refused(server, fields):
    assert server.post("/v1/embeddings", {"input": PROMPT, **fields}).status_code == 400


def test_an_answer_ends_where_the_context_does(server):
    length = server.service.engine.max_length
    answer = ask(server, ids_of(server, "hay " * 300)[: length - 3], max_tokens=Limits.max_tokens, temperature=0)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == length
    assert server.post(PATH, {"prompt": PROMPT, "max_tokens": Limits.max_tokens + 1}).status_code == 400


# LitGPT's own protocol


def test_predict_answers_in_the_models_style(server):
    answer = server.post("/predict", {"prompt": "Hi", "seed": 3})
    assert answer.json() == {"output": expected_text(server.speaker, server.speaker.encode("Hi"), 50, seed=3)}


@pytest.mark.parametrize("body", [{}, {"prompt": 3}, {"prompt": "a", "messages": []}, {"prompt": "a", "max_new_tokens": 0}], ids=str)
def test_predict_refuses_what_it_does_not_know(server, body):
    assert server.post("/predict", body).status_code == 400


def test_predict_streams_lines_of_json_if_the_server_does(checkpoint):
    with serving(checkpoint, stream=True, api_path="/mine") as server:
        answer = server.post("/mine", {"prompt": "Hi", "seed": 3, "max_new_tokens": 20})
        pieces = [json.loads(line) for line in answer.text.splitlines()]
        assert all(set(piece) == {"output"} for piece in pieces)
        expected = expected_text(server.speaker, server.speaker.encode("Hi"), 20, seed=3)
        assert "".join(piece["output"] for piece in pieces) == expected
        assert len(pieces) > 1
        assert server.post("/predict", {"prompt": "Hi"}).status_code == 404


@pytest.mark.parametrize("path", ["/my/chat", "/predict", CHAT])
def test_the_path_may_be_one_more_of_the_chat_route_and_nothing_is_lost(path, checkpoint):
    with serving(checkpoint, openai_spec=True, api_path=path) as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "seed": 1}
        one, other = (server.post(where, body).json()["choices"] for where in (CHAT if path == PREDICT else path, CHAT))
        assert one == other
        predicted = server.post(PREDICT, {"prompt": "Hi", "seed": 3, "max_new_tokens": 5})
        assert predicted.json() == {"output": expected_text(server.speaker, server.speaker.encode("Hi"), 5, seed=3)}
        described = server.get("/openapi.json").json()["paths"]
        assert {CHAT, PREDICT, PATH, path} <= described.keys()
        ids = [operation["operationId"] for operations in described.values() for operation in operations.values()]
        assert len(ids) == len(set(ids))
