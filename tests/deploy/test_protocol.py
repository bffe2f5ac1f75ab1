"""What clients may send, what they are told, and the routes around the answers."""

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from deploy.oracle_answers import expected_text
from deploy.serving import NAME, serving
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litgpt import names
from litgpt.deploy import completions, embeddings, protocol
from litgpt.deploy.app import make_app
from litgpt.deploy.protocol import ChatRequest, CompletionRequest, PredictRequest, Strict
from litgpt.generate.run import load

HI = [{"role": "user", "content": "Hi"}]
REQUESTS = [cls for cls in vars(protocol).values() if isinstance(cls, type) and issubclass(cls, Strict)]


# What may be sent


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", [1], {}], ids=str)
@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "n"])
def test_only_numbers_are_numbers(field, value):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": "a", field: value})


@pytest.mark.parametrize("value", [1, 0, "true", "no"], ids=str)
@pytest.mark.parametrize("field", ["stream", "echo"])
def test_only_truth_values_are_truth_values(field, value):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": "a", field: value})


@pytest.mark.parametrize("cls", REQUESTS, ids=lambda cls: cls.__name__)
def test_no_request_takes_a_field_that_it_does_not_have(cls):
    assert cls.model_config["extra"] == "forbid" and cls.model_config["strict"]
    with pytest.raises(ValidationError, match="surprise"):
        cls.model_validate({"surprise": 1})


@pytest.mark.parametrize("cls", [ChatRequest, CompletionRequest, PredictRequest], ids=lambda cls: cls.__name__)
def test_null_is_the_same_as_nothing(cls):
    needed = {"messages": HI} if cls is ChatRequest else {"prompt": "a"}
    optional = {name: None for name, field in cls.model_fields.items() if not field.is_required()}
    assert cls.model_validate(needed | optional) == cls.model_validate(needed)


@pytest.mark.parametrize("name", ["model", "path", "file", "url", "adapter", "folder"])
def test_no_request_has_a_field_for_a_path_or_address(name):
    taken = {field for cls in REQUESTS for field in cls.model_fields}
    assert name == "model" or name not in taken


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "..", ".hidden", "/etc", "a\\b", "", "a" * 97, "a\n", "a b", "\0"], ids=repr)
def test_the_name_of_an_adapter_is_no_path(name):
    with pytest.raises(ValidationError):
        protocol.AdapterRequest(name=name)


LARGE = {
    "truth values for ids": ("/v1/completions", {"prompt": [True] * 400_000}),
    "a text among ids": ("/v1/completions", {"prompt": [1] * 400_000 + ["a"]}),
    "empty messages": ("/v1/chat/completions", {"messages": [{}] * 400_000}),
    "numbers for parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 400_000}]}),
    "unknown fields": ("/v1/chat/completions", {"messages": HI, **{f"field {i}": 1 for i in range(250_000)}}),
    "unknown fields within": ("/v1/chat/completions", {"messages": [{"role": "user", **{f"field {i}": 1 for i in range(250_000)}}]}),
    "biases": ("/v1/chat/completions", {"messages": HI, "logit_bias": {str(i): "a" for i in range(250_000)}}),
    "labels": ("/v1/chat/completions", {"messages": HI, "metadata": {str(i): 1 for i in range(250_000)}}),
    "numbers for tools": ("/v1/chat/completions", {"messages": HI, "tools": [1] * 400_000}),
    "texts for ids": ("/detokenize", {"tokens": ["a"] * 400_000}),
}


@pytest.mark.parametrize("path, body", LARGE.values(), ids=LARGE)
def test_a_large_request_that_is_wrong_all_over_is_refused_as_fast_as_a_small_one(server, path, body):
    content = json.dumps(body).encode()
    start = time.process_time()
    assert server.post(path, content=content, headers={"content-type": "application/json"}).status_code == 400
    assert time.process_time() - start < 1.5  # complaining of every entry takes several times as long


# What the app says of itself


@pytest.fixture(scope="module")
def described(server) -> dict:
    return server.get("/openapi.json").json()


def test_every_route_documents_its_errors_and_no_other_than_are_sent(described):
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert {"200", "400", "401", "404", "405", "413", "429", "503"} <= set(operation["responses"]), (method, path)
            assert "422" not in operation["responses"]
    assert "HTTPValidationError" not in described["components"]["schemas"]


def test_every_schema_that_is_named_is_there(described):
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(described)))
    assert named <= set(described["components"]["schemas"])


def test_answers_are_as_documented(server):
    answers = [
        (protocol.ChatCompletion, "/v1/chat/completions", {"messages": HI, "max_tokens": 3, "logprobs": True}),
        (protocol.Completion, "/v1/completions", {"prompt": "a", "max_tokens": 3, "logprobs": 1, "echo": True}),
        (protocol.Embeddings, "/v1/embeddings", {"input": "a"}),
        (protocol.Prediction, "/predict", {"prompt": "a"}),
        (protocol.ErrorAnswer, "/predict", {}),
    ]
    for cls, path, body in answers:
        closed: type[BaseModel] = type(cls.__name__, (cls,), {"model_config": {"extra": "forbid"}})
        closed.model_validate(server.post(path, body).json())


# Routes around the answers


def test_models_are_listed_and_described(server):
    [card] = server.get("/v1/models").json()["data"]
    assert card == server.get(f"/v1/models/{NAME}").json()
    assert card["id"] == NAME and card["max_model_len"] == 256
    assert server.get("/v1/models/other").status_code == 404


def test_text_becomes_ids_and_ids_text(server):
    tokenizer = server.speaker.tokenizer
    made = server.post("/tokenize", {"prompt": "Grüße 🙂"}).json()
    assert made == {"tokens": tokenizer.encode("Grüße 🙂").tolist(), "count": len(made["tokens"]), "max_model_len": 256}
    assert server.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": "Grüße 🙂"}
    assert server.post("/tokenize", {"messages": HI}).json()["tokens"] == server.speaker.encode(HI)
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": "a", "messages": HI}, {"messages": []}, {"prompt": "a", "model": "x"}, {"messages": HI, "add_special_tokens": True}],
    ids=str,
)
def test_what_cannot_be_turned_into_ids_is_refused(server, body):
    assert server.post("/tokenize", body).status_code in (400, 404)


@pytest.mark.parametrize("tokens", [[-1], [303], [2**31], [1.5], ["a"], [True], 3], ids=str)
def test_what_are_no_ids_is_refused(server, tokens):
    assert server.post("/detokenize", {"tokens": tokens}).status_code == 400


def test_the_server_says_how_it_is(server):
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    server.service.is_ready = False
    try:
        answer = server.get("/ready")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert server.get("/health").status_code == 200
    finally:
        server.service.is_ready = True


def test_a_server_that_is_about_to_end_refuses_requests(checkpoint):
    with serving(checkpoint) as server:
        server.service.engine.stop()
        for path, body in (("/v1/chat/completions", {"messages": HI}), ("/predict", {"prompt": "a"}), ("/v1/embeddings", {"input": "a"})):
            answer = server.post(path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")


def test_what_was_done_is_counted(server):
    def numbers() -> dict[str, float]:
        lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = numbers()
    usage = server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 5, "temperature": 0}).json()["usage"]
    server.get("/made/up/by/a/client")
    after = numbers()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("litgpt_prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("litgpt_generated_tokens_total") == usage["completion_tokens"] == 5
    assert grown("litgpt_time_to_first_token_seconds_count") == 1
    assert grown("litgpt_inter_token_seconds_count") >= 1
    assert grown('litgpt_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert grown('litgpt_requests_total{route="other",status="404"}') == 1
    assert not any("made" in name for name in after)
    assert after["litgpt_running"] == after["litgpt_waiting"] == 0


@pytest.mark.parametrize("path", ["/", "/web/chat.js", "/web/chat.css"])
def test_the_page_loads_nothing_from_elsewhere(server, path):
    answer = server.get(path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", answer.text)


def test_all_files_of_the_page_are_served(server):
    for name in re.findall(r'(?:src|href)="(web/[\w.]+)"', server.get("/").text):
        assert server.get(f"/{name}").status_code == 200


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("PUT", "/predict", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/web/../app.py", 404),
    ],
)
def test_every_error_has_openais_form(server, method, path, status):
    answer = server.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert status != 405 or answer.headers["allow"]


def test_our_own_mistake_is_an_error_in_the_same_form(checkpoint, monkeypatch):
    with serving(checkpoint) as server:
        monkeypatch.setattr(server.service, "stops", None)
        answer = server.post("/v1/chat/completions", {"messages": HI}, headers={"connection": "close"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        monkeypatch.undo()
        assert server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 1}).status_code == 200


def test_the_app_can_be_made_twice(server):
    assert make_app(server.service).openapi() == make_app(server.service).openapi()


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_who_asks_for_the_head_alone_gets_it(server, path):
    answer = server.request("HEAD", path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == server.get(path).headers["content-type"]


# Adapters


@pytest.fixture(scope="module")
def adapter_dir(checkpoint, tmp_path_factory):
    """A folder of two adapters, and of one that is none."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(folder / name)
    tensors = load_file(folder / "first" / names.ADAPTER_WEIGHTS)
    described = shutil.copytree(folder / "first", folder / "deeper") / names.ADAPTER_WEIGHTS
    save_file({name.replace("layers.1.", "layers.9."): tensor for name, tensor in tensors.items()}, described)
    (folder / "empty").mkdir()
    (folder.parent / "outside").mkdir(exist_ok=True)
    return folder


def test_adapters_are_loaded_chosen_by_name_and_unloaded_while_serving(checkpoint, adapter_dir):
    merged = {name: load(checkpoint, precision="32-true", adapter=adapter_dir / name) for name in ("first", "second")}
    with serving(checkpoint, has_adapters=True, adapter_dir=adapter_dir) as server:
        body = {"messages": HI, "max_tokens": 12, "seed": 1}
        assert server.post("/v1/chat/completions", {**body, "model": "first"}).status_code == 404
        for name in merged:
            card = server.post("/v1/adapters", {"name": name}).json()
            assert (card["id"], card["parent"]) == (name, NAME)
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == [NAME, "first", "second"]
        found = {}

        def one(name: str) -> None:
            found[name] = server.post("/v1/chat/completions", {**body, "model": name}).json()["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=one, args=(name,)) for name in (NAME, "first", "second")]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for name, speaker in {NAME: load(checkpoint, precision="32-true"), **merged}.items():
            assert found[name] == expected_text(speaker, speaker.encode(HI), 12, seed=1)
        vectors = [server.post("/v1/embeddings", {"input": ["Hi", "hay"], "model": name}).json()["data"] for name in (NAME, "first")]
        assert vectors[0][1]["embedding"] != vectors[1][1]["embedding"]
        assert server.request("DELETE", "/v1/adapters/first").json() == {"id": "first", "object": "model", "deleted": True}
        assert server.post("/v1/chat/completions", {**body, "model": "first"}).status_code == 404
        assert server.post("/v1/adapters", {"name": "first"}).status_code == 200


@pytest.mark.parametrize("path, module, name", [("completions", completions, "make_plan"), ("embeddings", embeddings, "_read")])
def test_a_request_whose_adapter_is_unloaded_before_it_begins_is_told_so(checkpoint, adapter_dir, monkeypatch, path, module, name):
    with serving(checkpoint, has_adapters=True, adapter_dir=adapter_dir) as server:
        server.post("/v1/adapters", {"name": "first"})
        planned = getattr(module, name)

        def late(service, body):
            plan = planned(service, body)
            service.engine.call(lambda: service.engine.unload("first")).result()
            return plan

        monkeypatch.setattr(module, name, late)
        answer = server.post(f"/v1/{path}", {"prompt" if path == "completions" else "input": "hay", "model": "first"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_that_vectors_are_made_with_is_not_unloaded(checkpoint, adapter_dir, monkeypatch):
    with serving(checkpoint, has_adapters=True, adapter_dir=adapter_dir) as server:
        server.post("/v1/adapters", {"name": "first"})
        server.service.engine.call(lambda: None).result()
        begun, end, plain = threading.Event(), threading.Event(), embeddings.embeddings

        def slowly(*args, **options):
            begun.set()
            assert end.wait(30)
            return plain(*args, **options)

        monkeypatch.setattr(embeddings, "embeddings", slowly)
        found = []
        asking = threading.Thread(target=lambda: found.append(server.post("/v1/embeddings", {"input": "hay", "model": "first"})))
        asking.start()
        assert begun.wait(30)
        refused = server.request("DELETE", "/v1/adapters/first")
        end.set()
        asking.join()
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
        assert found[0].status_code == 200
        assert server.request("DELETE", "/v1/adapters/first").status_code == 200


def test_adapters_that_cannot_be_loaded_are_refused_without_a_word_of_the_disk(checkpoint, adapter_dir, monkeypatch):
    monkeypatch.chdir(adapter_dir.parent)
    with serving(checkpoint, has_adapters=True, adapter_dir=Path(adapter_dir.name)) as server:
        for name, status in (("none", 404), ("empty", 400), ("deeper", 400), ("../outside", 400), (NAME, 404)):
            answer = server.post("/v1/adapters", {"name": name})
            assert answer.status_code == status, (name, answer.text)
            assert not any(part in answer.text for part in (str(adapter_dir.parent), str(checkpoint), str(checkpoint.parent)))
        server.post("/v1/adapters", {"name": "first"})
        assert server.post("/v1/adapters", {"name": "first"}).status_code == 409
        assert server.request("DELETE", f"/v1/adapters/{NAME}").status_code == 400
        assert server.request("DELETE", "/v1/adapters/none").status_code == 404


def test_a_server_without_a_folder_of_adapters_loads_none(server):
    assert server.post("/v1/adapters", {"name": "x"}).status_code == 400
