"""The guard in front of the app, and connections that do not go on."""

import asyncio
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from statistics import median

import pytest
import uvicorn

from litgpt.deploy import safety
from litgpt.deploy.safety import HEADERS, OPEN, Connection, Guard

KEY = "correct-horse-battery"
BEARER = {"Authorization": f"Bearer {KEY}"}


async def echo(scope, receive, send):
    """An app that says what it was sent."""
    message = await receive()
    body = message["body"]
    scope["state"]["tokens"] = (3, len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": scope["method"].encode() + b" " + body})


class Answer:
    """What one request of a test was answered."""

    def __init__(self, messages: list[dict]) -> None:
        start, *rest = messages
        self.status, self.headers = start["status"], dict(start["headers"])
        self.body = b"".join(message.get("body", b"") for message in rest)

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]


def ask(guard, method="GET", path="/v1/models", headers=None, pieces=(), host="127.0.0.1:8000") -> Answer:
    """Send one request through the guard, its body in pieces."""
    given = {"Host": host, **(headers or {})}
    if pieces and "Content-Length" not in given:
        given["Transfer-Encoding"] = "chunked"
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "state": {}}
    scope["headers"] = [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages += [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]
    coming, sent = iter(messages), []

    async def receive():
        return next(coming)

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return Answer(sent)


def guarded(key=None, max_body=100, **more) -> Guard:
    return Guard(echo, key=key, max_body=max_body, **more)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/predict", "/metrics", "/docs", "/openapi.json", "/health/", "//health", "/nowhere", "*", ""]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "ODD"])
def test_every_route_without_the_key_answers_401(method, path):
    bearers = [{"Authorization": text} for text in ("Bearer wrong", KEY, f"Basic {KEY}")]
    for headers in ({}, {"X-Api-Key": KEY[:-1]}, *bearers):
        answer = ask(guarded(KEY), method, path, headers | JSON)
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert answer.headers[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize("path", sorted(OPEN | {"/page"}))
def test_only_health_and_the_page_itself_are_open_and_only_for_reading(path):
    guard = guarded(KEY, page=["/page"])
    assert ask(guard, "GET", path).status == 200
    assert ask(guard, "HEAD", path).status == 200
    assert ask(guard, "POST", path, JSON).status == 401


@pytest.mark.parametrize("headers", [BEARER, {"Authorization": f"bearer  {KEY} "}, {"X-Api-Key": KEY}, BEARER | {"X-Api-Key": "wrong"}])
def test_the_key_may_come_as_bearer_or_x_api_key(headers):
    assert ask(guarded(KEY), headers=headers).status == 200


def test_the_key_is_compared_in_constant_time(monkeypatch):
    compared, plain = [], safety.hmac.compare_digest
    monkeypatch.setattr(safety.hmac, "compare_digest", lambda *pair: compared.append(pair) or plain(*pair))
    ask(guarded(KEY), headers={"X-Api-Key": "x", "Authorization": f"Bearer {KEY}"})
    assert [len(one) == len(other) for one, other in compared] == [True, True]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "127.9.9.9:1"])
def test_without_a_key_the_server_answers_to_this_machines_names(host):
    assert ask(guarded(), host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["example.com", "localhost.example.com", "127.0.0.1.nip.io", "10.0.0.1:8000", "0.0.0.0", "", "[::2]", "[zz]", "[", "::1", "localhost:x"]
    + ["a@localhost", "localhost/x", "localhost localhost", "\u00b2", "[::1", "127.1", "2130706433", "localhost.", "user:pw@localhost:1"],
)
def test_without_a_key_no_other_name_reaches_the_app(host):
    answer = ask(guarded(), host=host)
    assert (answer.status, answer.code) == (403, "wrong_host")


@pytest.mark.parametrize(
    "origin, expected",
    [("http://localhost:8000", 200), ("http://evil.example", 403), ("null", 403), ("http://localhost:8001", 403), ("", 403)],
)
def test_without_a_key_pages_of_other_sites_are_kept_out(origin, expected):
    assert ask(guarded(), "POST", headers=JSON | {"Origin": origin}, host="localhost:8000").status == expected
    assert ask(guarded(KEY), "POST", headers=JSON | BEARER | {"Origin": origin}, host="elsewhere").status == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp"])
def test_a_form_of_another_page_cannot_post(kind):
    answer = ask(guarded(), "POST", headers={} if kind is None else {"Content-Type": kind})
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


def test_json_may_name_its_encoding():
    assert ask(guarded(), "POST", headers={"Content-Type": "application/JSON; charset=utf-8"}, pieces=[b"{}"]).body == b"POST {}"


@pytest.mark.parametrize("length", ["101", "9" * 19, "99999999999999999999999999", "-1", "1e3"])
def test_a_body_that_says_it_is_too_large_is_not_read(length):
    answer = ask(guarded(), "POST", headers=JSON | {"Content-Length": length}, pieces=[b"x" * 10])
    assert (answer.status, answer.code) == (413, "body_too_large")


def test_a_chunked_body_is_cut_off_where_it_becomes_too_large():
    assert ask(guarded(), "POST", headers=JSON, pieces=[b"x" * 50, b"y" * 50]).body == b"POST " + b"x" * 50 + b"y" * 50
    assert ask(guarded(), "POST", headers=JSON, pieces=[b"x" * 50, b"y" * 51]).status == 413
    assert ask(guarded(), "GET", pieces=[b"x" * 101]).status == 413


def test_a_client_without_the_key_cannot_make_the_server_read():
    assert ask(guarded(KEY), "POST", headers=JSON, pieces=[b"x" * 101]).status == 401


def test_many_headers_are_refused():
    answer = ask(guarded(), headers={f"X-{i}": "y" for i in range(100)})
    assert (answer.status, answer.code) == (431, "too_many_headers")


def test_answers_carry_headers_that_keep_browsers_careful():
    for answer in (ask(guarded()), ask(guarded(KEY))):
        assert HEADERS.items() <= answer.headers.items()


def test_the_log_tells_method_path_status_time_and_tokens_but_no_text(caplog):
    caplog.set_level(logging.INFO, "litgpt.serve")
    ask(guarded(KEY), "POST", "/v1/x\n2099 GET /forged", JSON | BEARER, [b'{"prompt": "secret"}'])
    ask(guarded(KEY), "POST", "/predict", JSON | {"X-Api-Key": "guess"})
    first, second = caplog.messages
    assert first.startswith("POST /v1/x%0A2099%20GET%20/forged 200 ") and first.endswith(" ms 3 + 20 tokens")
    assert second.startswith("POST /predict 401 ")
    assert not {"secret", "guess", KEY} & set(caplog.text.replace('"', " ").split())


def test_the_log_holds_prompts_where_they_are_asked_for(caplog):
    caplog.set_level(logging.INFO, "litgpt.serve")
    ask(guarded(log_prompts=True), "POST", headers=JSON, pieces=[b'{"prompt":\n "secret"}'])
    assert caplog.messages[1] == repr('{"prompt":\n "secret"}')


def test_a_server_that_ends_refuses_new_requests_but_tells_how_it_is():
    guard = guarded()
    guard.is_ending = True
    answer = ask(guard, "POST", "/predict", JSON)
    assert (answer.status, answer.code, answer.headers[b"retry-after"]) == (503, "stopping", b"1")
    assert [ask(guard, path=path).status for path in ("/health", "/ready", "/metrics", "/v1/models")] == [200, 200, 200, 503]
    assert not guard.active


def test_only_http_reaches_the_app():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guarded()({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# Connections


async def slow_speaker(scope, receive, send):
    """An app that goes on sending until nobody takes it, or waits until the client leaves."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    try:
        for _ in range(1000 if scope["path"] == "/flood" else 1):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
    finally:
        slow_speaker.ended.set()


@contextmanager
def serving(app, **settings) -> Iterator[int]:
    """Serve an app on a free port of the loopback address."""
    config = uvicorn.Config(app, port=0, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False, **settings)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def is_closed(client: socket.socket) -> bool:
    """Wait until the server ends the connection."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def status(port: int, path: str = "/health") -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as client:
        client.request("GET", path)
        return client.getresponse().status


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: "])
def test_a_connection_that_never_says_what_it_wants_is_ended(begun, monkeypatch):
    monkeypatch.setattr(safety, "HEADER_SECONDS", 0.3)
    with serving(guarded()) as port, closing(connected(port)) as client:
        client.sendall(begun)
        start = time.perf_counter()
        assert is_closed(client) and 0.1 < time.perf_counter() - start < 3


def test_a_header_that_comes_drop_by_drop_is_ended_in_time(monkeypatch):
    monkeypatch.setattr(safety, "HEADER_SECONDS", 0.5)
    with serving(guarded()) as port, closing(connected(port)) as client:
        start = time.perf_counter()
        with pytest.raises(OSError):
            for _ in range(100):
                client.sendall(b"X")
                time.sleep(0.05)
        assert time.perf_counter() - start < 3


def test_a_body_that_does_not_come_is_answered_408(monkeypatch):
    monkeypatch.setattr(safety, "BODY_SECONDS", 0.3)
    with serving(guarded()) as port, closing(connected(port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
        while client.recv(1000):
            pass


def test_headers_without_end_are_refused():
    with serving(guarded(), h11_max_incomplete_event_size=safety.MAX_HEADER_BYTES) as port, closing(connected(port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 2 * safety.MAX_HEADER_BYTES)
        assert client.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_does_not_read_is_ended_and_its_request_with_it(monkeypatch):
    monkeypatch.setattr(safety, "STALLED_SECONDS", 0.3)
    slow_speaker.ended = threading.Event()
    with serving(Guard(slow_speaker, key=None, max_body=10)) as port, closing(connected(port)) as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert slow_speaker.ended.wait(10)


def test_a_client_that_reads_late_gets_everything(monkeypatch):
    monkeypatch.setattr(safety, "STALLED_SECONDS", 2.0)
    slow_speaker.ended = threading.Event()
    with serving(Guard(slow_speaker, key=None, max_body=10)) as port, closing(connected(port)) as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        n = 0
        while n < 100_000_000:
            n += len(client.recv(1_000_000))
        assert not slow_speaker.ended.is_set()


def test_a_client_that_reads_slowly_gets_a_long_answer(monkeypatch):
    monkeypatch.setattr(safety, "STALLED_SECONDS", 0.2)
    monkeypatch.setattr(safety, "SLOWEST", 2**20)

    async def long(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"20000000")]})
        await send({"type": "http.response.body", "body": b"x" * 20_000_000})

    with serving(Guard(long, key=None, max_body=10)) as port, closing(connected(port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        n = 0
        while n < 20_000_000:
            n += (got := len(client.recv(1_000_000)))
            assert got, f"the server ended the connection behind {n} bytes"
            time.sleep(0.03)


def test_a_client_that_leaves_ends_its_request():
    slow_speaker.ended = threading.Event()
    with serving(Guard(slow_speaker, key=None, max_body=10)) as port:
        with closing(connected(port)) as client:
            client.sendall(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
            client.recv(10)
        assert slow_speaker.ended.wait(5)


def test_idle_connections_give_way_to_new_ones_and_busy_ones_do_not(monkeypatch):
    monkeypatch.setattr(safety, "MAX_CONNECTIONS", 5)
    slow_speaker.ended = threading.Event()

    async def app(scope, receive, send):
        await (slow_speaker if scope["path"] == "/wait" else echo)(scope, receive, send)

    with serving(Guard(app, key=None, max_body=10)) as port, closing(connected(port)) as busy:
        busy.sendall(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
        busy.recv(10)
        idle = [connected(port) for _ in range(20)]
        assert [status(port) for _ in range(3)] == [200] * 3
        assert not slow_speaker.ended.is_set()
        for client in idle:
            client.close()


def test_clients_without_the_key_cannot_keep_others_out_by_sending_slowly(monkeypatch):
    monkeypatch.setattr(safety, "MAX_CONNECTIONS", 5)
    with serving(guarded(KEY)) as port:
        slow = [connected(port) for _ in range(20)]
        for client in slow:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert [status(port) for _ in range(3)] == [200] * 3
        for client in slow:
            client.close()


def test_a_refused_body_that_does_not_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(safety, "HEADER_SECONDS", 0.3)
    with serving(guarded(KEY)) as port, closing(connected(port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{")
        assert client.recv(1000).startswith(b"HTTP/1.1 401 ")
        start = time.perf_counter()
        with pytest.raises(OSError):
            for _ in range(100):
                client.sendall(b"x")
                time.sleep(0.05)
        assert time.perf_counter() - start < 3


def test_a_refused_body_does_not_spoil_the_next_request():
    with serving(guarded(KEY)) as port, closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as client:
        client.request("POST", "/predict", b"x" * 50, JSON)
        answer = client.getresponse()
        assert (answer.status, len(answer.read()) > 0) == (401, True)
        client.request("POST", "/predict", b"x" * 50, JSON | BEARER)
        assert client.getresponse().read() == b"POST " + b"x" * 50


def test_half_open_sockets_do_not_slow_others():
    with serving(guarded()) as port:
        idle = [connected(port) for _ in range(100)]
        for client in idle[::2]:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: ")
        times = []
        for _ in range(10):
            start = time.perf_counter()
            assert status(port) == 200
            times.append(time.perf_counter() - start)
        assert median(times) < 0.5
        for client in idle:
            client.close()
