"""From a start to an end: what clients see of a server that is told to end, that breaks, and that is treated badly."""

import asyncio
import json
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from deploy.process import BREAK, KILL, TERM, Reader, Server, make_endless, served
from safetensors.torch import load_file, save_file

from litgpt.deploy import serve
from litgpt.deploy.safety import Exchange, Guard
from litgpt.deploy.serve import Life


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_endless(tmp_path_factory.mktemp("life") / "model")


@pytest.fixture(scope="module")
def shared(model, tmp_path_factory):
    """One server for all tests that leave it as it was."""
    with served(model, tmp_path_factory.mktemp("shared"), "--max_rows", 8) as server:
        yield server
        server.wait_until_idle()
        server.signal(TERM)
        assert server.exit_code() == 0


def readers(server: Server, n: int, **body) -> list[Reader]:
    """Clients whose answers have begun."""
    found = [Reader(server, **body) for _ in range(n)]
    for reader in found:
        assert reader.started.wait(20)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_refuses_new_ones(number, model, tmp_path):
    with served(model, tmp_path, "--max_rows", 4) as server:
        assert server.ask("/ready")[0] == 200
        running = readers(server, 6, max_tokens=600)  # two of them wait for a row
        server.signal(number)
        while server.ask("/ready")[0] == 200:
            pass
        assert server.ask("/health")[0] == 200
        status, body = server.ask("/v1/completions", {"prompt": "Once"})
        assert (status, body["error"]["code"]) == (503, "stopping")
        assert server.exit_code() == 0
        assert all(reader.wait().is_whole for reader in running), [(reader.status, reader.events[-2:]) for reader in running]
        assert [json.loads(reader.events[-2])["choices"][0]["finish_reason"] for reader in running] == ["length"] * 6
        assert "Traceback" not in server.errors


def test_a_request_of_many_answers_is_finished_too(model, tmp_path):
    with served(model, tmp_path, "--max_rows", 2) as server:
        several = Reader(server, n=8, max_tokens=200)
        assert several.started.wait(20)
        server.signal(TERM)
        assert server.exit_code() == 0 and several.wait().is_whole
        assert sum('"finish_reason":"length"' in event for event in several.events) == 8


def test_what_is_not_finished_within_the_grace_time_ends_with_an_error_frame(model, tmp_path):
    with served(model, tmp_path, "--grace", 0.2) as server:
        running = readers(server, 3)
        start = time.monotonic()
        server.signal(TERM)
        assert server.exit_code() == 0 and time.monotonic() - start < 8
        assert [reader.wait().problem for reader in running] == ["stopping"] * 3
        assert "Traceback" not in server.errors


def test_a_client_that_does_not_read_cannot_keep_the_server_up(model, tmp_path):
    with served(model, tmp_path, "--grace", 0.2) as server:
        client = stalled(server)
        server.signal(TERM)
        assert server.exit_code() == 0
        client.close()


def test_an_answer_that_is_not_made_by_the_engines_steps_is_waited_for_too(monkeypatch):
    monkeypatch.setattr(serve, "LAST_WORDS", 0.1)
    guard, exchange = Guard(None, key=None, max_body=10), Exchange({}, None, None)
    guard.active.add(exchange)
    life = Life(SimpleNamespace(engine=SimpleNamespace(n_running=0, n_waiting=0)), guard, None, grace=30)

    async def ending() -> None:
        draining = asyncio.create_task(life.drain())
        await asyncio.sleep(0.4)
        assert not draining.done()
        exchange.status = 200  # from here on it waits for its client alone
        await asyncio.wait_for(draining, 10)

    asyncio.run(ending())


def test_a_second_signal_ends_it_at_once(model, tmp_path):
    with served(model, tmp_path) as server:
        readers(server, 2)
        server.signal(TERM)
        while server.ask("/ready")[0] == 200:
            pass
        start = time.monotonic()
        server.signal(TERM)
        assert server.exit_code() == 128 + TERM and time.monotonic() - start < 5


def test_a_signal_before_it_is_ready_ends_it(model, tmp_path):
    server = Server(model, tmp_path)
    time.sleep(0.3)
    server.signal(TERM)
    assert server.exit_code() in (0, -TERM)


def test_an_engine_that_breaks_at_the_start_ends_the_server_with_exit_code_1(model, tmp_path):
    (tmp_path / BREAK).touch()
    server = Server(model, tmp_path)
    assert server.exit_code() == 1 and not server.output and "RuntimeError: broken on purpose" in server.errors


def test_a_model_that_computes_no_numbers_is_not_served(model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    server = Server(broken, tmp_path)
    assert server.exit_code() == 2 and not server.output and server.errors.count("\n") == 1


def test_kill_leaves_nothing_behind(model, tmp_path):
    with served(model, tmp_path) as server:
        readers(server, 2)
        port, children = server.port, server.state.children(recursive=True)
        server.signal(KILL)
        assert server.exit_code() == -KILL and not children
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
            again.listen()


def test_an_engine_that_breaks_ends_every_stream_and_turns_health_to_503(model, tmp_path):
    with served(model, tmp_path, "--max_rows", 2) as server:
        running = readers(server, 2)
        waiting = [Reader(server, stream=False) for _ in range(2)]
        while server.measure("litgpt_waiting") < 2:
            time.sleep(0.01)
        (server.folder / BREAK).touch()
        assert [reader.wait(10).problem for reader in running] == ["engine_failed"] * 2
        assert [reader.wait(10).status for reader in waiting] == [503] * 2
        assert [server.ask(path)[0] for path in ("/health", "/ready")] == [503] * 2
        assert server.ask("/v1/completions", {"prompt": "Once"})[0] == 503
        time.sleep(1)
        server.signal(TERM)
        assert server.exit_code() == 1
        assert server.errors.count("RuntimeError: broken on purpose") == 1


# Clients that behave badly


def stalled(server: Server) -> socket.socket:
    """A client that asks for a long stream and never reads it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    body = json.dumps({"prompt": "Once", "max_tokens": 4000, "temperature": 0, "stream": True})
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    client.sendall(f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


def half_open(server: Server, n: int) -> list[socket.socket]:
    """Clients that say nothing, or half of what they want."""
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(n)]
    for i, client in enumerate(clients):
        client.sendall([b"", b"GET /hea", b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"][i % 3])
    return clients


def first_token(server: Server) -> float:
    """Seconds until a new client sees its first token."""
    reader = Reader(server, max_tokens=5).wait()
    assert reader.is_whole
    return reader.first


def test_slow_readers_and_half_open_sockets_hurt_nobody(shared):
    clients = half_open(shared, 60) + [stalled(shared) for _ in range(4)]
    try:
        assert max(first_token(shared) for _ in range(5)) < 2
    finally:
        for client in clients:
            client.close()


def test_clients_that_give_up_free_their_places(shared):
    leaving = [Reader(shared, leave_after=0.5, prompt=f"Once {i}") for i in range(50)]
    for reader in leaving:
        reader.wait()
    assert first_token(shared) < 1.5
    shared.wait_until_idle()


def test_requests_that_are_broken_off_at_random_leave_nothing(shared):
    draw = Random(0)

    def leave(i: int) -> None:
        Reader(shared, leave_after=draw.random() * 0.1, max_tokens=draw.randint(1, 500), prompt="x" * draw.randint(1, 300)).wait()

    threads = [threading.Thread(target=lambda: [leave(i) for i in range(10)]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.wait_until_idle()
    assert shared.ask("/health")[0] == 200


def test_threads_and_handles_stay_as_they_are(shared):
    def used() -> tuple[int, int]:
        return shared.state.num_threads(), shared.state.num_fds()

    def work(n: int) -> None:
        for i in range(n):
            assert shared.ask("/v1/completions", {"prompt": f"Once {i}", "max_tokens": 2, "stream": i % 2 == 0})[0] == 200

    work(40)
    time.sleep(0.2)
    before = used()
    work(100)
    time.sleep(0.2)
    assert all(after <= earlier + 2 for after, earlier in zip(used(), before, strict=True))


def test_a_full_queue_answers_429_and_says_when_to_come_back(model, tmp_path):
    with served(model, tmp_path, "--max_rows", 1, "--max_queue", 1) as server:
        running = readers(server, 1, max_tokens=800)
        queued = Reader(server, max_tokens=1)
        while server.measure("litgpt_waiting") < 1:
            time.sleep(0.01)
        with server.connection() as client:
            client.request("POST", "/v1/completions", json.dumps({"prompt": "Once"}), {"Content-Type": "application/json"})
            answer = client.getresponse()
            assert answer.status == 429 and int(answer.headers["Retry-After"]) >= 1
        assert running[0].wait().is_whole and queued.wait().is_whole
