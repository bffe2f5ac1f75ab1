"""LitServe itself, in a process of its own, in front of our `LitAPI`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from speaking import make_checkpoint

from litgpt.deploy.litserve import LitGPTAPI, StreamingLitGPTAPI
from litgpt.errors import UserError
from litgpt.generate.answers import new_reply, write
from litgpt.generate.run import load

PROGRAM = """
import sys
import litserve
from litgpt.deploy.litserve import LitGPTAPI, StreamingLitGPTAPI
if __name__ == "__main__":
    folder, port = sys.argv[1:]
    apis = []
    for kind in (LitGPTAPI, StreamingLitGPTAPI):
        for size in (1, 4):
            more = dict(max_batch_size=size, batch_timeout=0.3 * (size > 1), api_path=f"/{kind.__name__}/{size}")
            apis.append(kind(folder, precision="32-true", temperature=0.0, max_new_tokens=12, **more))
    server = litserve.LitServer(apis, accelerator="cpu")
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
"""
PROMPTS = ["What do llamas eat?", "Grüße aus Köln", "Once", "a much longer prompt, to be in a batch with short ones"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("litserve") / "model")


@pytest.fixture(scope="module")
def expected(folder) -> list[str]:
    """What each prompt is answered when it is alone."""
    api = LitGPTAPI(folder, precision="32-true", temperature=0.0, max_new_tokens=12)
    speaker, answers = load(folder, precision="32-true"), []
    for prompt in PROMPTS:
        reply = new_reply(speaker.model, speaker.tokenizer, speaker.encode(prompt), api.options, speaker.stop_tokens)
        for _ in write(speaker.model, [reply], 1, reply.length):
            pass
        answers.append(reply.text)
    return answers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    """Where LitServe serves the checkpoint in four ways. No process of it is left behind."""
    port, program = free_port(), folder.parent / "program.py"
    program.write_text(PROGRAM)
    words = [sys.executable, str(program), str(folder), str(port)]
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        psutil.wait_procs(children, timeout=10)


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def post(url: str, body: object) -> tuple[int, str]:
    """Return status and text of an answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def post_all(url: str, bodies: list[object]) -> list[tuple[int, str]]:
    """The same of several requests at a time."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: post(url, body), bodies))


def joined(lines: str) -> str:
    """The text that lines of JSON hold."""
    return "".join(json.loads(line)["output"] for line in lines.splitlines())


@pytest.mark.parametrize("size", [1, 4])
def test_litserve_answers_what_the_model_says_alone(size, url, expected):
    route = f"{url}/LitGPTAPI/{size}"
    answers = post_all(route, [{"prompt": prompt} for prompt in PROMPTS])
    assert [json.loads(text) for _, text in answers] == [{"output": text} for text in expected]
    assert [post(route, body)[0] for body in ({}, {"prompt": ""}, {"prompt": 3}, [])] == [422] * 4


@pytest.mark.parametrize("size", [1, 4])
def test_a_prompt_that_is_too_long_leaves_the_others_of_its_batch_alone(size, url, expected):
    wrong, right = post_all(f"{url}/LitGPTAPI/{size}", [{"prompt": "llama " * 400}, {"prompt": PROMPTS[0]}])
    assert json.loads(right[1]) == {"output": expected[0]}
    assert wrong[0] == (400 if size == 1 else 200) and "Shorten the prompt" in wrong[1]


@pytest.mark.parametrize("size", [1, 4])
def test_litserve_streams_the_same_answer(size, url, expected):
    answers = post_all(f"{url}/StreamingLitGPTAPI/{size}", [{"prompt": prompt} for prompt in PROMPTS])
    assert [status for status, _ in answers] == [200] * len(PROMPTS)
    assert [joined(text) for _, text in answers] == expected
    assert max(len(text.splitlines()) for _, text in answers) > 3


@pytest.mark.parametrize("kind", ["LitGPTAPI", "StreamingLitGPTAPI"])
def test_a_field_that_would_be_ignored_is_refused_by_name(kind, url):
    status, text = post(f"{url}/{kind}/1", {"prompt": "Hi", "temperature": 0.0, "bogus": 1})
    assert status == 422 and [problem["loc"] for problem in json.loads(text)["detail"]] == [["body", "temperature"], ["body", "bogus"]]


def test_wrong_options_are_refused_before_a_worker_starts(folder):
    for wrong in ({"temperature": -1.0}, {"top_p": 2.0}, {"quantize": "bnb.nf3"}, {"stream": True}):
        with pytest.raises(UserError):
            LitGPTAPI(folder, **wrong)
    assert StreamingLitGPTAPI(folder).stream and not LitGPTAPI(folder).stream
