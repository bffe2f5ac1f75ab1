"""Requests that cost much: they are refused early, or wait for each other, and hurt nobody else."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from deploy.serving import serving
from deploy.test_chat_completions import HI

from litgpt.deploy import answering, completions, service
from litgpt.deploy.service import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
LONG = "hay " * 20_000


def together(*requests: Callable[[], object]) -> list:
    """What requests return that are sent at the same time."""
    found: list = [None] * len(requests)

    def run(i: int) -> None:
        found[i] = requests[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return found


@pytest.mark.parametrize(
    "path, body, param",
    [
        (TEXT, {"prompt": LONG}, "prompt"),
        (TEXT, {"prompt": ["a", LONG]}, "prompt"),
        ("/v1/embeddings", {"input": LONG}, "input"),
        ("/predict", {"prompt": LONG}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hay"}]}] * 4000}, "messages"),
    ],
    ids=["a text", "one of two", "a vector", "predict", "a message", "many messages"],
)
def test_a_text_that_cannot_fit_is_refused_before_its_tokens_are_sought(server, path, body, param, monkeypatch):
    monkeypatch.setattr(type(server.speaker.tokenizer), "ids", lambda *_: pytest.fail("looked for tokens"))
    error = server.post(path, body).json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert "characters" in error["message"]


def test_the_longest_text_that_fits_is_not_refused(server):
    tokenizer, most = server.speaker.tokenizer, server.service.engine.max_length
    longest = max(map(tokenizer.text, range(tokenizer.vocab_size)), key=len)
    assert server.post(TEXT, {"prompt": longest * (most - 1), "max_tokens": 1}).status_code == 200
    assert "characters" in server.post(TEXT, {"prompt": longest * most + "a"}).text


def test_what_takes_long_is_done_one_after_the_other_while_short_requests_go_on(checkpoint, monkeypatch):
    with serving(checkpoint) as server:
        begun, most, lock, original = threading.Event(), [], threading.Lock(), service.compile_grammar

        def slowly(*args, **options):
            with lock:
                most.append(1)
            begun.set()
            time.sleep(0.3)
            assert len(most) == 1
            most.clear()
            return original(*args, **options)

        monkeypatch.setattr(service, "compile_grammar", slowly)
        fields = {"messages": HI, "max_tokens": 1, "response_format": SCHEMA}

        def short() -> float:
            begun.wait(10)
            start = time.monotonic()
            assert server.post(TEXT, {"prompt": "hay", "max_tokens": 1}).status_code == 200
            return time.monotonic() - start

        *answers, waited = together(*[lambda: server.post(CHAT, fields).status_code] * 12, short)
        assert answers == [200] * 12
        assert waited < 2  # of 3.6


class Held:
    """Work of a request that goes on until the test lets it end."""

    def __init__(self) -> None:
        self.begun, self.end = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.begun.set()
        assert self.end.wait(30)


@pytest.fixture
def held() -> Iterator[Held]:
    found = Held()
    yield found
    found.end.set()


def test_who_waits_too_long_for_its_turn_is_told_when_to_come_again(checkpoint, monkeypatch, held):
    monkeypatch.setattr(service, "TURN", 0.05)
    with serving(checkpoint) as server:
        monkeypatch.setattr(server.service, "grammar", lambda *_: held.wait())
        fields = {"messages": HI, "max_tokens": 1, "response_format": SCHEMA}

        def others() -> list:
            assert held.begun.wait(30)
            refused = [server.post(CHAT, fields) for _ in range(3)]
            held.end.set()
            return refused

        first, refused = together(lambda: server.post(CHAT, fields), others)
        assert first.status_code == 200
        for answer in refused:
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        assert server.post(CHAT, fields).status_code == 200, "the turn was given back"


def test_requests_with_long_bodies_wait_for_each_other(checkpoint, monkeypatch, held):
    monkeypatch.setattr(answering, "LONG", 100)
    monkeypatch.setattr(service, "TURN", 0.05)
    long, short = {"prompt": "hay " * 30, "max_tokens": 1}, {"prompt": "hay", "max_tokens": 1}
    with serving(checkpoint) as server:
        original = completions.make_plan
        monkeypatch.setattr(completions, "make_plan", lambda made, body: (body.prompt == "hay" or held.wait(), original(made, body))[1])

        def others() -> list[int]:
            assert held.begun.wait(30)
            statuses = [server.post(TEXT, body).status_code for body in (long, short)]
            held.end.set()
            return statuses

        first, statuses = together(lambda: server.post(TEXT, long).status_code, others)
        assert (first, statuses) == (200, [429, 200])


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_conversations_of_many_turns_are_refused_and_of_some_wait_for_each_other(checkpoint, path, monkeypatch):
    turns = [*HI, {"role": "assistant", "content": ""}]
    with serving(checkpoint, limits=replace(Limits(), max_turns=30)) as server:
        assert server.post(path, {"messages": turns * 31 + HI}).json()["error"]["param"] == "messages"
        taken = []
        original = server.service.turn
        monkeypatch.setattr(server.service, "turn", lambda: (taken.append(1), original())[1])
        server.post(path, {"messages": turns * 30 + HI})
        assert taken
        taken.clear()
        server.post(path, {"messages": turns * 3 + HI})
        assert not taken


def test_so_many_probabilities_that_memory_would_be_short_are_refused(checkpoint):
    with serving(checkpoint, limits=replace(Limits(), max_scored=100)) as server:
        fields = {"prompt": [[5] * 10] * 2, "echo": True, "max_tokens": 1}
        for logprobs, n, status in ((4, 1, 200), (5, 1, 400), (1, 2, 200), (2, 2, 400)):
            answer = server.post(TEXT, {**fields, "logprobs": logprobs, "n": n})
            assert answer.status_code == status, answer.text
            assert status == 200 or answer.json()["error"]["param"] == "logprobs"
        assert server.post(TEXT, {**fields, "logprobs": 20, "echo": False}).status_code == 200
