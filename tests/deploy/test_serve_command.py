"""The command `serve`: its flags, what it refuses, and who may ask what it serves."""

import inspect
import json
import re
import socket
from argparse import SUPPRESS
from pathlib import Path

import pytest
import torch
from deploy.process import TERM, served
from peft import LoraConfig, get_peft_model
from speaking import make_checkpoint
from transformers import AutoModelForCausalLM

from litgpt import cli
from litgpt.deploy.app import WEB, router
from litgpt.deploy.serve import KEY_VARIABLE, find_key, listening, run_server, url
from litgpt.errors import MissingFile, UserError

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


# What is refused, before any model is loaded

NOWHERE = Path("no/such/model")
WRONG = {
    "quantize": ("bnb.nf3", "`quantize` is one of bnb.nf4"),
    "devices": (2, "`devices` above 1 is not supported yet"),
    "generate_strategy": ("sequential", "not supported yet"),
    "accelerator": ("tpu", "`accelerator` is one of"),
    "temperature": (-1.0, "`temperature` must be 0 or more"),
    "top_k": (0, "`top_k` counts"),
    "top_p": (1.5, "`top_p` is a probability"),
    "min_p": (-0.1, "`min_p`"),
    "max_new_tokens": (0, "`max_new_tokens` must be at least 1, up to 131072"),
    "port": (70000, "from 0 to 65535"),
    "host": ("0.0.0.0", "requests need a key"),
    "api_key": ("", "is empty, which is no key"),
    "api_key_file": (Path("no/such/key"), "no/such/key"),
    "adapter_dir": (Path("no/such/adapters"), "no/such/adapters"),
    "timeout": (float("nan"), "`timeout` is a number of seconds"),
    "grace": (float("nan"), "`grace` is a number of seconds"),
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_value_is_refused_before_the_model_is_looked_for(flag):
    value, expected = WRONG[flag]
    with pytest.raises(UserError, match=re.escape(expected)):
        run_server(NOWHERE, **{"port": 0, flag: value})


@pytest.mark.parametrize("path", ["predict", "", "/", "/../x", "/a/./b", "/a b", "/{x}", "/a?b", "/%20", "//", "/a/"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(UserError, match="`api_path` is a path"):
        run_server(NOWHERE, port=0, api_path=path)


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/completions", "/v1/chat/completions", "/web/chat.js", "/tokenize"])
def test_another_routes_path_is_refused(path):
    with pytest.raises(UserError, match="another route's path"):
        run_server(NOWHERE, port=0, api_path=path)


def test_the_model_is_looked_for_where_every_command_does():
    with pytest.raises(MissingFile, match="no/such/model"):
        run_server(NOWHERE, port=0)


def test_two_keys_are_refused(tmp_path):
    with pytest.raises(UserError, match="Leave one out"):
        find_key("a", tmp_path / "key")


@pytest.mark.parametrize("content", ["", "\n", "two words", "Schlüssel", "one\ntwo", "a\x00b"])
def test_a_file_without_a_key_is_refused_without_showing_it(content, tmp_path):
    (tmp_path / "key").write_text(content)
    with pytest.raises(UserError) as caught:
        find_key(None, tmp_path / "key")
    assert str(tmp_path / "key") in str(caught.value) and (not content.strip() or content not in str(caught.value))


def test_a_folder_as_key_file_is_refused(tmp_path):
    with pytest.raises(UserError):
        find_key(None, tmp_path)


def test_the_key_is_found_in_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert find_key(None, tmp_path / "key") == find_key(KEY, None) == KEY and find_key(None, None) is None
    monkeypatch.setenv(KEY_VARIABLE, "from-the-environment")
    assert find_key(None, None) == "from-the-environment" and find_key(KEY, None) == KEY
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(UserError, match=KEY_VARIABLE):
        find_key(None, None)


# The address


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_only_this_machine_may_ask_without_a_key(host):
    with pytest.raises(UserError, match="need a key"), listening(host, 0, has_key=False):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "::1"])
def test_this_machines_own_addresses_need_no_key(host):
    with listening(host, 0, has_key=False) as listener:
        assert re.fullmatch(rf"http://\[?{host}\]?:\d+", url(host, listener))


def test_a_key_lets_the_server_listen_on_all_addresses():
    with listening("0.0.0.0", 0, has_key=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} is in use"), listening("127.0.0.1", port, has_key=False):
            pass


@pytest.mark.parametrize("host, expected", [("192.0.2.1", "not an address of this machine"), ("no host", "no address or name")])
def test_an_address_of_another_machine_is_refused(host, expected):
    with pytest.raises(UserError, match=expected), listening(host, 0, has_key=True):
        pass


# The command line


def test_flags_are_read_as_the_command_line_gives_them():
    parser = cli.make_parser(run_server, "serve")
    words = ["model", "--adapters", '{"a": "x/y", "b": "z"}', "--timeout", "0", "--top_k", "null", "--stream", "true", "--max_rows", "2"]
    found = parser.instantiate(parser.parse_args(words))
    assert found["adapters"] == {"a": Path("x/y"), "b": Path("z")}
    assert (found["timeout"], found["top_k"], found["stream"], found["max_rows"]) == (0, None, True, 2)


def test_every_flag_is_explained():
    parser = cli.make_parser(run_server, "serve")
    explained = {action.dest for action in parser._actions if action.help and action.help != SUPPRESS}
    assert explained >= inspect.signature(run_server).parameters.keys()
    assert "Prints one line as soon as it answers" in " ".join(parser.format_help().split())


# A server with a key


@pytest.fixture(scope="module")
def guarded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "key").write_text(KEY + "\n")
    with served(model, folder, "--api_key_file", folder / "key", "--seed", 1, "--max_new_tokens", 7, "--api_path", "/ask") as server:
        yield server
        server.signal(TERM)
        assert server.exit_code() == 0
        assert KEY not in server.output + server.errors


def test_one_line_says_where_it_serves(guarded):
    assert re.fullmatch(r"Serving tiny on http://127\.0\.0\.1:\d+\n", guarded.output)


OPEN = {"/health", "/ready"}
PAGE = {"/"} | {f"/web/{file.name}" for file in WEB.iterdir() if file.suffix in (".js", ".css")}
ROUTES = {route.path for route in router.routes} | {"/ask", "/docs", "/redoc", "/openapi.json", "/nowhere", "/predict"}
ROUTES |= {"/web/", "/web/index.html", "/web/../app.py", "/health/", "/Health"}


def test_every_route_without_the_key_answers_401(guarded):
    for path in ROUTES - OPEN - PAGE:
        for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": "wrong"}):
                status, _ = guarded.ask(path, {} if method == "POST" else None, method, **headers)
                assert status == 401, (method, path)


def test_health_and_the_page_are_open(guarded):
    assert [guarded.ask(path)[0] for path in sorted(OPEN | PAGE)] == [200] * len(OPEN | PAGE)


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"X-Api-Key": KEY}])
def test_the_key_opens_the_rest(guarded, headers):
    assert guarded.ask("/v1/models", **headers)[1]["data"][0]["id"] == "tiny"
    assert guarded.ask("/openapi.json", **headers)[0] == 200
    assert guarded.ask("/nowhere", **headers)[0] == 404


def test_the_servers_sampling_holds_for_its_own_route(guarded):
    headers = {"X-Api-Key": KEY}
    first, second = (guarded.ask("/ask", {"prompt": "Once"}, **headers) for _ in range(2))
    assert first == second and first[0] == 200
    assert guarded.ask("/ask", {"prompt": "Once", "seed": 2}, **headers) != first
    assert guarded.ask("/predict", {"prompt": "Once"}, **headers)[0] == 404
    assert re.search(r"^[-0-9]+ [0-9:,]+ POST /ask 200 \d+ ms \d+ \+ 7 tokens$", guarded.errors, re.MULTILINE)
    assert "Once" not in guarded.errors


def refusal(capsys, *words: object) -> str:
    """The one line with which the command refuses to serve."""
    capsys.readouterr()
    assert cli.main(["serve", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("litgpt: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("grace", ["-1", "-0.5"])
def test_a_negative_grace_is_one_line_with_exit_code_2(grace, capsys):
    assert f"`grace` is a number of seconds, 0 or more, but got {grace}." in refusal(capsys, NOWHERE, "--port", 0, "--grace", grace)


@pytest.mark.parametrize("flags", [["--grace", "0"], ["--timeout", "-1"]])
def test_no_grace_and_no_timeout_are_taken(flags, capsys):
    assert str(NOWHERE) in refusal(capsys, NOWHERE, "--port", 0, *flags)


def test_a_port_in_use_is_one_line_with_exit_code_2(guarded, model, capsys):
    assert f"Port {guarded.port} is in use. Choose another by `--port`; 0 takes" in refusal(capsys, model, "--port", guarded.port)


def test_a_memory_that_cannot_be_is_one_line_with_exit_code_2(model, capsys):
    assert "`max_length` is from 2 to" in refusal(capsys, model, "--port", 0, "--max_length", 100_000)


# Adapters


def make_adapter(model: Path, folder: Path) -> Path:
    """Write a PEFT adapter whose updates are random, and large enough to change what is said."""
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    lora.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shelf(model, tmp_path_factory) -> Path:
    """A folder of adapters."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("first", "second"):
        make_adapter(model, folder / name)
    return folder


def test_adapters_are_given_at_the_start_or_loaded_from_their_folder(model, shelf, tmp_path):
    flags = ["--adapters", json.dumps({"mine": str(shelf / "first")}), "--adapter_dir", shelf, "--model_name", "base", "--temperature", 0]
    with served(model, tmp_path, *flags) as server:
        assert [card["id"] for card in server.ask("/v1/models")[1]["data"]] == ["base", "mine"]
        assert server.ask("/v1/adapters", {"name": "second"})[0] == 200
        texts = {}
        for name in ("base", "mine", "second"):
            status, answer = server.ask("/v1/completions", {"model": name, "prompt": "Once", "max_tokens": 20})
            assert status == 200 and answer["model"] == name
            texts[name] = answer["choices"][0]["text"]
        assert len(set(texts.values())) == 3
        server.signal(TERM)
        assert server.exit_code() == 0


@pytest.mark.parametrize(
    "adapters, expected", [({"base": "first"}, "cannot have the model's own name"), ({"a": "none"}, "none"), ({"a b": "first"}, "name")]
)
def test_adapters_that_cannot_be_are_refused_in_one_line(adapters, expected, model, shelf, capsys):
    folders = json.dumps({name: str(shelf / folder) for name, folder in adapters.items()})
    assert expected in refusal(capsys, model, "--port", 0, "--adapters", folders, "--model_name", "base")
