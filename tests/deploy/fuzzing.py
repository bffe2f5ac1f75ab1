"""Requests that nobody would write: drawn from the app's own OpenAPI description, and good ones that were spoiled."""

import http.client
import json
import socket
from collections import Counter
from contextlib import closing
from functools import partial
from random import Random
from typing import Any

import schemathesis
from deploy.process import Server
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}
SCHEMA = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": TALK, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": TALK, "max_completion_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}),
    (
        "/v1/chat/completions",
        {"messages": TALK, "max_tokens": 3, "tools": [TOOL], "tool_choice": "auto", "logprobs": True, "top_logprobs": 2},
    ),
    ("/v1/chat/completions", {"messages": TALK, "response_format": {"type": "json_schema", "json_schema": SCHEMA}, "seed": 3, "n": 2}),
    (
        "/v1/completions",
        {"prompt": "Once", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop": ["a", "b"]},
    ),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2, "echo": True, "logprobs": 2, "n": 2, "best_of": 2, "stream": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.1}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("/tokenize", {"prompt": "Once"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/predict", {"prompt": "Once", "max_new_tokens": 2}),
    ("/v1/adapters", {"name": "x"}),
]
ODD: list[Any] = [None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 10**30, -(10**30), 2**31, 2**63, 2**64, float("nan"), float("inf")]
ODD += ["", "x", "0", "NaN", "\u0000", "🙂", "\ud800", "x" * 5000, "../../etc/passwd", "http://127.0.0.1/"]
ODD += ["{{ 7 * 7 }}", "{% for x in range(10**9) %}x{% endfor %}", {}, {"": None}, {"type": "text"}, {"$ref": "#"}]
ODD += [[], [None], [[]], [{}], [1, "a"], [1] * 300, {"a": [[[[[[]]]]]]}]
RAW = [b"", b"{", b"null", b"[]", b'"x"', b"\x00", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 5000, b'{"a":' * 3000, b"1" * 5000]
RAW += [b'{"prompt": "\\ud800"}', b'{"prompt": "a", "prompt": 3}', b'{"prompt": NaN}', b'{"prompt": "a"} trailing']
RAW += [b"--x\r\nContent-Disposition: form-data\r\n\r\n"]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW"]
PATHS = ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/x", "/v1/adapters/x", "/openapi.json", "/docs", "/predict?x=1"]
PATHS += ["/..%2f..%2fetc", "/web/../app.py", "/web/%2e%2e/app.py", "/v1/adapters/..%2f", "/v1//models", "/v1/models/" + "x" * 3000]
PATHS += ["/%00", "/\u00e9", "*"]
HOSTS = [b"localhost", b"localhost", b"127.0.0.1:1", b"evil.example", b"", b"[::1", b"a b"]
MORE = [b"", b"Content-Length: 0\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"X: \x80\r\n", b": x\r\n"]


def fuzz_schema(server: Server, n: int, seed: int = 0) -> Counter:
    """Send n requests of each kind that the app's description knows, right and wrong ones; return the statuses of the answers."""
    seen, url = Counter(), f"http://127.0.0.1:{server.port}"
    description = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in description.get_all_operations():
        operation = result.ok()
        modes = list(schemathesis.GenerationMode) if operation.body else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:
            _send_all(operation.as_strategy(generation_mode=mode), partial(_send, url, seen), n, seed)
    return seen


def _send_all(cases: Any, send: Any, n: int, seed: int) -> None:
    options = settings(max_examples=n, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    seeded(seed)(options(given(case=cases)(lambda case: send(case))))()


def _send(url: str, seen: Counter, case: Any) -> None:
    answer = case.call(base_url=url, timeout=60)
    seen[answer.status_code] += 1
    is_stream = "event-stream" in str(answer.headers.get("content-type"))  # described as text, not event by event
    case.validate_response(answer, checks=[check for check in CHECKS if not (is_stream and check is response_schema_conformance)])


def spoiled(body: Any, draw: Random) -> Any:
    """Return a copy of a request's body in which one value is odd, missing, or of a field that does not exist."""
    if isinstance(body, dict) and body and draw.random() < 0.85:
        name = draw.choice(list(body))
        kind = draw.random()
        if kind < 0.1:
            return {key: value for key, value in body.items() if key != name}
        if kind < 0.2:
            return body | {draw.choice(["model", "unknown", "seed", "logit_bias", "suffix", "dimensions", "user"]): draw.choice(ODD)}
        return body | {name: spoiled(body[name], draw)}
    if isinstance(body, list) and body and draw.random() < 0.7:
        at = draw.randrange(len(body))
        return [*body[:at], spoiled(body[at], draw), *body[at + 1 :]]
    return draw.choice(ODD)


def fuzz_bodies(server: Server, n: int, seed: int = 0) -> Counter:
    """Send n spoiled requests, some of them no JSON at all; return the statuses of the answers."""
    seen, draw = Counter(), Random(seed)
    for _ in range(n):
        path, body = draw.choice(GOOD)
        for _ in range(draw.randint(0, 2)):
            body = spoiled(body, draw) if isinstance(body, dict) else body
        content = draw.choice(RAW) if draw.random() < 0.1 else json.dumps(body).encode()
        status, text = ask(server, "POST", path, content)
        assert status < 500, (status, path, content[:2000], text)
        assert status < 400 or json.loads(text)["error"]["message"], text
        seen[status] += 1
    return seen


def fuzz_paths(server: Server, n: int, seed: int = 0) -> Counter:
    """Send n requests with odd methods, paths and headers; return the statuses of the answers."""
    seen, draw = Counter(), Random(seed)
    for _ in range(n):
        method, path = draw.choice(METHODS), draw.choice(PATHS)
        line = f"{method} {path} HTTP/1.{draw.randint(0, 1)}\r\n".encode()
        host, more, body = draw.choice(HOSTS), draw.choice(MORE), draw.choice([b"", b"0\r\n\r\n", b"zz"])
        status = send_raw(server, line + b"Host: " + host + b"\r\nConnection: close\r\n" + more + b"\r\n" + body)
        assert status is None or status < 500, (status, line, host, more)
        seen[status] += 1
    return seen


def ask(server: Server, method: str, path: str, content: bytes) -> tuple[int, str]:
    """Return status and text of an answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as client:
        client.request(method, path, content, {"Content-Type": "application/json"})
        answer = client.getresponse()
        return answer.status, answer.read().decode()


def send_raw(server: Server, content: bytes) -> int | None:
    """Send bytes and return the status of the answer, or None if the connection just ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)
        try:
            answer = client.recv(65536)
        except ConnectionResetError:
            return None
        return int(answer.split(b" ", 2)[1]) if answer else None
