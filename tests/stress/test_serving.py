"""A server under load for long, and treated badly. By hand: `pytest -s -m stress tests/stress/test_serving.py`."""

import json
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from deploy.process import TERM, Reader, Server, make_endless, served
from deploy.test_life import first_token, half_open, stalled

pytestmark = pytest.mark.stress
SEED = int(os.environ.get("STRESS_SEED", 0))
N_ENDS = int(os.environ.get("STRESS_ENDS", 20))
N_REQUESTS = int(os.environ.get("STRESS_REQUESTS", 5040))
N_CANCELS = int(os.environ.get("STRESS_CANCELS", 2000))
MOST_THREADS = 2 + min(32, (os.cpu_count() or 1) + 4)  # the event loop's, the engine's, and asyncio's workers
N_FUZZED = int(os.environ.get("STRESS_FUZZED", 10_000))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_endless(tmp_path_factory.mktemp("stress") / "model")


class Used(NamedTuple):
    """What a server holds."""

    megabytes: float
    threads: int
    handles: int
    children: int


def used(server: Server) -> Used:
    """What the server holds when nothing runs."""
    server.wait_until_idle()
    deadline = time.monotonic() + 5
    while server.state.num_fds() > server.idle_handles and time.monotonic() < deadline:  # connections close a little later
        time.sleep(0.05)
    state = server.state
    return Used(state.memory_info().rss / 2**20, state.num_threads(), state.num_fds(), len(state.children(recursive=True)))


def test_sigterm_under_load_leaves_no_orphan(model, tmp_path):
    draw, ends = random.Random(SEED), Counter()
    for i in range(N_ENDS):
        grace = draw.choice([0.1, 1, 20])
        with served(model, tmp_path / str(i), "--max_rows", 4, "--grace", grace) as server:
            clients = [Reader(server, max_tokens=draw.randint(1, 1500), stream=draw.random() < 0.7) for _ in range(draw.randint(1, 12))]
            clients += [Reader(server, leave_after=draw.random()) for _ in range(3)]
            bad = [stalled(server), *half_open(server, 6)]
            time.sleep(draw.random() * 2)
            family = [server.state, *server.state.children(recursive=True)]
            server.signal(TERM)
            start = time.monotonic()
            assert server.exit_code(grace + 15) == 0, server.errors
            seconds = time.monotonic() - start
            assert not psutil.wait_procs(family, timeout=1)[1], "a process is left"
            assert "Traceback" not in server.errors, server.errors
            for client in clients:
                client.wait()
                ends[_end(client)] += 1
            for client in bad:
                client.close()
        print(f"end {i + 1}: grace {grace:g} s, ended in {seconds:.1f} s", flush=True)
    print(f"{N_ENDS} ends, {dict(ends)}")
    assert not ends["cut off"]


def _end(client: Reader) -> str:
    """How a client's request ended."""
    if client.is_whole or client.status == 200 and not client.body["stream"]:
        return "whole"
    if client.problem is not None or client.status == 503:
        return "told of the end"
    return "left by itself" if client.leave_after is not None else "not connected any more" if client.status == 0 else "cut off"


def ask_something(server: Server, draw: random.Random) -> int:
    """Send one request of any kind and return its status."""
    prompt = "Once upon " * draw.randint(1, 20) + str(draw.randrange(100))  # few words: the tokenizer remembers up to 10,000
    talk = [{"role": "user", "content": prompt}]
    kind, n = draw.randrange(10), draw.randint(1, 8)
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}
    bodies = [
        ("/v1/completions", {"prompt": prompt, "max_tokens": n}),
        ("/v1/completions", {"prompt": prompt, "max_tokens": n, "stream": True, "logprobs": 2}),
        ("/v1/completions", {"prompt": [prompt, "b"], "max_tokens": n, "n": 2, "stop": ["a"]}),
        ("/v1/chat/completions", {"messages": talk, "max_tokens": n}),
        ("/v1/chat/completions", {"messages": talk, "max_tokens": n, "stream": True}),
        ("/v1/chat/completions", {"messages": talk, "response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 20}),
        ("/v1/embeddings", {"input": [prompt, "b"]}),
        ("/tokenize", {"prompt": prompt}),
        ("/predict", {"prompt": prompt}),
        ("/v1/completions", {"prompt": prompt, "wrong": 1}),
    ]
    return server.ask(*bodies[kind])[0]


def test_memory_threads_and_handles_stay_flat(model, tmp_path):
    with served(model, tmp_path, "--max_rows", 8) as server:
        server.idle_handles = server.state.num_fds() + 1
        draws, statuses, history = [random.Random(SEED + i) for i in range(8)], Counter(), []

        def work(draw: random.Random, n: int) -> Counter:
            return Counter(ask_something(server, draw) for _ in range(n))

        for _ in range(10):
            with ThreadPoolExecutor(len(draws)) as pool:
                for counts in pool.map(work, draws, [N_REQUESTS // 10 // len(draws)] * len(draws)):
                    statuses += counts
            history.append(used(server))
            print(f"{sum(statuses.values()):5} requests: {history[-1]}", flush=True)
        print(dict(statuses))
        assert set(statuses) == {200, 400}
        warm, last = history[2], history[-1]  # the allocator's and the interpreter's pools fill at first
        assert last.megabytes - warm.megabytes < 0.05 * warm.megabytes
        assert last.threads <= MOST_THREADS and last.handles <= warm.handles + 1 and last.children == 0


def test_requests_broken_off_at_random_leave_nothing_allocated(model, tmp_path):
    with served(model, tmp_path, "--max_rows", 8) as server:
        server.idle_handles = server.state.num_fds() + 1
        before = used(server)

        def leave(seed: int) -> None:
            draw = random.Random(seed)
            prompt = "x" * draw.randint(1, 500)
            Reader(server, draw.random() * 0.3, prompt=prompt, max_tokens=draw.randint(1, 800), stream=draw.random() < 0.7).wait()

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(leave, range(SEED, SEED + N_CANCELS)))
        after = used(server)
        print(before, after, f"cancelled: {server.measure('litgpt_engine_finished_cancelled_total'):.0f}", sep="\n")
        assert server.measure("litgpt_running") == server.measure("litgpt_waiting") == 0
        assert after.threads <= MOST_THREADS and after.handles <= before.handles + 1
        assert first_token(server) < 1


def test_clients_that_give_up_free_their_places(model, tmp_path):
    with served(model, tmp_path, "--max_rows", 8) as server:
        for i in range(5):
            leaving = [Reader(server, leave_after=0.5, prompt=f"Once {i} {j}", stream=j % 2 == 0) for j in range(50)]
            for reader in leaving:
                reader.wait()
            seconds = first_token(server)
            print(f"the next first token came after {seconds:.3f} s", flush=True)
            assert seconds < 1
            server.wait_until_idle()


def test_slow_readers_and_half_open_sockets_hurt_nobody(model, tmp_path):
    with served(model, tmp_path, "--max_rows", 8) as server:
        server.idle_handles = server.state.num_fds() + 1
        before = used(server)
        bad = half_open(server, 300) + [stalled(server) for _ in range(6)]  # of 8 rows
        seconds = [first_token(server) for _ in range(20)]
        print(f"first tokens: {sorted(seconds)[len(seconds) // 2]:.3f} s in the middle, {max(seconds):.3f} s at most")
        assert max(seconds) < 2
        start = time.monotonic()
        while server.state.num_fds() > before.handles + 1 and time.monotonic() - start < 120:
            time.sleep(0.5)
        print(f"{time.monotonic() - start:.0f} s later none of them is left:", before, used(server), sep="\n")
        assert server.state.num_fds() <= before.handles + 1
        for client in bad:
            client.close()


def test_fuzzed_requests_never_break_the_server(model, tmp_path):
    fuzzing = pytest.importorskip("deploy.fuzzing")
    with served(model, tmp_path, "--max_length", 64, "--max_rows", 8) as server:
        seen = fuzzing.fuzz_schema(server, N_FUZZED // 50, SEED)
        print(f"drawn from the description: {sum(seen.values())}, {json.dumps(seen)}", flush=True)
        spoiled = fuzzing.fuzz_bodies(server, N_FUZZED // 2, SEED)
        print(f"spoiled: {sum(spoiled.values())}, {json.dumps(spoiled)}", flush=True)
        n_left = max(N_FUZZED - sum(seen.values()) - sum(spoiled.values()), N_FUZZED // 10)
        paths = fuzzing.fuzz_paths(server, n_left, SEED)
        print(f"odd paths and headers: {sum(paths.values())}, {dict(paths)}", flush=True)
        assert server.ask("/health")[0] == 200
        server.signal(TERM)
        assert server.exit_code() == 0 and "Traceback" not in server.errors
