"""lm-eval asks our own server, and finds what it finds in process."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from deploy.serving import Served, serving
from eval.test_evaluate import EVERYTHING, numbers, only_tasks_of_the_folder  # noqa: F401
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from litgpt.errors import UserError
from litgpt.eval.evaluate import convert_and_evaluate, server_args
from litgpt.eval.harness import as_lm
from litgpt.tokenizer import Tokenizer

CONTEXT = 1024  # all texts are shorter: lm-eval gives a server's model one token less than there is


@pytest.fixture(scope="module")
def wide(checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """Makes a checkpoint in whose context all texts have room, and whose likeliest token often, or never, is EOS."""
    folder = tmp_path_factory.mktemp("wide")

    def make(bos: str, ends_often: bool = True) -> Path:
        copy = folder / f"{bos}-{ends_often}"
        if not copy.exists():
            copy.mkdir()
            for file in checkpoint("llama", bos).iterdir():
                (copy / file.name).write_bytes(file.read_bytes())
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
            weights = load_file(copy / "model.safetensors")
            tokenizer, head = Tokenizer(copy), weights["lm_head.weight"]
            head[tokenizer.eos_id] *= 6 if ends_often else 0
            head[tokenizer.token_to_id("<|im_end|>")] *= 0  # which ends a server's answers, but not those that lm-eval reads in process
            save_file(weights, copy / "model.safetensors", {"format": "pt"})
        return copy

    return make


@pytest.fixture(scope="module", params=["added", "named", "none"])
def server(wide, request):
    folder = wide(request.param)
    with serving(folder, name=folder.name) as served:
        yield served


def evaluated(server: Served, tasks: Path, out: Path, names: str = EVERYTHING, **options) -> dict:
    """What the command measures."""
    given = dict(tasks=names, include_path=tasks, save_filepath=out / "results.json", dtype="float32", batch_size=3)
    convert_and_evaluate(server.speaker.folder, **given | options)
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def expected(server, tasks, tmp_path, measured_before: dict[Path, dict]) -> dict:
    """What is measured in process, once for each checkpoint."""
    folder = server.speaker.folder
    if folder not in measured_before:
        measured_before[folder] = numbers(evaluated(server, tasks, tmp_path))
    return measured_before[folder]


@pytest.fixture(scope="module")
def measured_before() -> dict[Path, dict]:
    return {}


def address(server: Served, path: str = "/v1/completions") -> str:
    return f"base_url={server.url}{path}"


@pytest.mark.parametrize("more", ["", ",num_concurrent=3", ",tokenized_requests=False"], ids=["one by one", "at once", "as texts"])
def test_the_command_measures_the_same_as_in_process(server, tasks, tmp_path, expected, more):
    found = numbers(evaluated(server, tasks, tmp_path, model="local-completions", model_args=address(server) + more))
    assert found == pytest.approx(expected, rel=1e-4)
    assert any(math.isfinite(value) for value in expected.values())
    assert server.idle()


def test_the_token_that_ends_a_text_is_among_the_scored_ones(server):
    """lm-eval leaves out the last one, which it takes for the one new token that it asks for."""
    tokenizer = server.speaker.tokenizer
    ends = 0
    for first in range(20, 60):
        body = {"prompt": [first, first + 1], "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0}
        choice = server.post("/v1/completions", body).json()["choices"][0]
        assert [len(choice["logprobs"][key]) for key in choice["logprobs"]] == [3] * 4
        ends += choice["finish_reason"] == "stop"
        assert choice["finish_reason"] == "length" or choice["logprobs"]["tokens"][-1] == tokenizer.text(tokenizer.eos_id)
    assert 0 < ends < 40


def test_lm_eval_alone_finds_the_same(server, tasks, expected):
    folder = server.speaker.folder
    described = (
        f"model={folder.name},tokenizer={folder},add_bos_token={server.speaker.tokenizer.use_bos},max_length={CONTEXT},{address(server)}"
    )
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 1234)
    manager = TaskManager(include_path=str(tasks))
    found = simple_evaluate(
        "local-completions", described, tasks=EVERYTHING.split(","), task_manager=manager, log_samples=False, bootstrap_iters=0, **seeds
    )
    assert numbers(found) == pytest.approx(expected, rel=1e-4)


def test_a_server_of_another_model_is_named(server, tasks, tmp_path):
    with pytest.raises(UserError, match="The server at .* failed"):
        evaluated(server, tasks, tmp_path, "choose", model="local-completions", model_args=f"model=other,max_retries=1,{address(server)}")


def answers(model, tasks: Path, **options) -> list[list[str]]:
    """The texts that a model writes for a task."""
    manager = TaskManager(include_path=str(tasks))
    found = simple_evaluate(model, tasks=["write"], task_manager=manager, log_samples=True, bootstrap_iters=0, **options)
    return [sample["resps"][0] for sample in sorted(found["samples"]["write"], key=lambda sample: sample["doc_id"])]


@pytest.mark.parametrize("bos", ["added", "named", "none"])
def test_answers_are_the_same_texts_as_in_process(wide, tasks, bos):
    with serving(wide(bos, False), name=bos) as server:
        described = server_args(server.speaker.folder, f"model={bos},{address(server)}")
        ours, theirs = answers(as_lm(server.speaker, 2), tasks), answers("local-completions", tasks, model_args=described)
    assert ours == theirs
    assert len(set(map(tuple, ours))) > 2
