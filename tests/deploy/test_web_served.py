"""The chat page as the command `serve` gives it: a browser, the real server, a tiny model."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.browser import Reader, chromium
from deploy.process import TERM, served
from speaking import make_checkpoint

KEY = "correct-horse"
FLAGS = ["--accelerator", "cpu", "--temperature", "0", "--max_length", "32768"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("web") / "tiny-llama", context=2**15)


@pytest.fixture(scope="module")
def address(browser, folder, tmp_path_factory) -> Iterator[str]:
    with served(folder, tmp_path_factory.mktemp("served"), "--api_key", KEY, *FLAGS) as server:
        yield server.output.split()[-1]


@pytest.fixture
def reader(browser, address) -> Iterator[Reader]:
    """A reader who has given the key."""
    reader = Reader(browser, address, waits=False)
    reader.page.fill("#key-dialog input", KEY)
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_selector("#model option", state="attached")
    yield reader
    assert reader.complaints == []
    reader.context.close()


def post(address: str, path: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(address + path, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


def set_field(reader: Reader, name: str, value: str) -> None:
    reader.page.click("#open-settings")
    reader.page.fill(f"#settings [name={name}]", value)
    reader.page.click("#settings .filled")


def kept(reader: Reader) -> dict:
    """Return the conversation as the page keeps it."""
    return json.loads(reader.page.evaluate("Object.entries(localStorage).find(([key]) => key.startsWith('litgpt.conversation.'))[1]"))


def n_running(reader: Reader) -> float:
    """Return how many answers the server is working on."""
    code = "key => fetch('metrics', { headers: { Authorization: `Bearer ${key}` } }).then((answer) => answer.text())"
    lines = [line for line in reader.page.evaluate(code, KEY).splitlines() if not line.startswith("#")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if "running" in line)


def test_the_page_shows_what_the_server_answers(reader, address):
    assert reader.page.locator("#model option").all_inner_texts() == ["tiny-llama"]
    set_field(reader, "max_tokens", "24")
    reader.ask("What food do llamas eat?")
    reader.ask("And in Köln? 🙂")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in kept(reader)["messages"]]
    for n_turns in (1, 3):
        body = {"model": "tiny-llama", "messages": turns[:n_turns], "max_tokens": 24}
        expected = post(address, "/v1/chat/completions", body)
        assert turns[n_turns]["content"] == expected["choices"][0]["message"]["content"]
        assert kept(reader)["messages"][n_turns]["tokens"] == expected["usage"]["completion_tokens"]


def test_stopping_in_the_page_ends_the_work_of_the_server(reader):
    set_field(reader, "max_tokens", "30000")
    reader.ask("Once upon a time", waits=False)
    reader.until("document.querySelector('.answer')?.innerText.length > 20")
    assert n_running(reader) == 1
    reader.page.keyboard.press("Escape")
    reader.wait()
    assert reader.note() == "You stopped this answer."
    reader.page.wait_for_timeout(300)
    assert n_running(reader) == 0


def test_what_the_server_refuses_is_shown_in_its_words(reader):
    reader.ask("llama " * 40000)
    assert reader.note().startswith("The server refused this (400). ")
    assert "token" in reader.note()


def test_a_wrong_key_is_asked_for_again(browser, address):
    reader = Reader(browser, address, waits=False)
    reader.page.fill("#key-dialog input", "wrong")
    reader.page.keyboard.press("Enter")
    reader.until("document.getElementById('key-reason').innerText === 'The server does not accept this API key.'")
    reader.context.close()


def test_a_server_that_ends_says_so_in_the_page(browser, folder, tmp_path):
    with served(folder, tmp_path, "--grace", "0", *FLAGS) as server:
        reader = Reader(browser, server.output.split()[-1])
        set_field(reader, "max_tokens", "30000")
        reader.ask("Once upon a time", waits=False)
        reader.until("document.querySelector('.answer')?.innerText.length > 20")
        server.signal(TERM)
        reader.wait()
        assert reader.answers()[0]
        assert reader.note().startswith(("The server broke off: ", "The connection broke off"))
        assert server.exit_code(20) == 0
        reader.page.click("text=Try again")
        reader.page.wait_for_selector("#toast >> text=The server cannot be reached.")
        assert reader.answers()[0]
        assert reader.questions() == ["Once upon a time"]
        reader.context.close()
