"""The command `evaluate`."""

import json
import os
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from litgpt.cli import run
from litgpt.errors import MissingFile, UserError
from litgpt.eval import evaluate
from litgpt.eval.evaluate import convert_and_evaluate
from litgpt.hardware import compute_dtype

EVERYTHING = "both,read_on,write"


@pytest.fixture(autouse=True)
def only_tasks_of_the_folder(monkeypatch):
    """Leave lm-eval's own tasks out of its index, which takes seconds to make."""
    init = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **kwargs: init(self, **kwargs | {"include_defaults": False}))


@pytest.fixture
def measured(checkpoint, tasks, tmp_path):
    """Evaluates the plain checkpoint, and returns what was written."""

    def evaluated(names: str, **kwargs) -> dict:
        file = tmp_path / "out" / "results.json"
        given = dict(tasks=names, include_path=tasks, out_dir=file.parent, dtype="float32") | kwargs
        convert_and_evaluate(checkpoint(), **given)
        return json.loads(file.read_text())

    return evaluated


def numbers(results):
    """What was measured, without errors, which are drawn, and without the names beside it."""
    return {
        (task, name): value
        for task, values in results["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }


def theirs(folder, tasks, names=EVERYTHING, **kwargs):
    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, attn_implementation="eager", logits_cache=False)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 1234)
    manager = TaskManager(include_path=str(tasks))
    return simple_evaluate(lm, tasks=names.split(","), task_manager=manager, log_samples=False, bootstrap_iters=0, **seeds | kwargs)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_fewshot": 2}, {"limit": 3}, {"limit": 0.5}, {"apply_chat_template": True, "num_fewshot": 1}],
    ids=["as the tasks say", "few-shot", "the first ones", "a part", "in the chat template"],
)
def test_results_are_those_of_transformers(measured, checkpoint, tasks, options):
    expected, found = theirs(checkpoint(), tasks, **options), measured(EVERYTHING, batch_size=4, **options)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-4)
    assert {"both", "choose", "choose_again", "read_on", "write"} <= found["results"].keys()
    assert found["n-samples"] == expected["n-samples"]
    assert found["n-shot"] == expected["n-shot"]
    assert found["groups"].keys() == {"both"}


def test_results_do_not_depend_on_the_batch_size(measured):
    expected = numbers(measured(EVERYTHING, batch_size=1))
    for batch_size in (5, "auto"):
        assert numbers(measured(EVERYTHING, batch_size=batch_size)) == pytest.approx(expected, rel=1e-5)


def test_the_seed_is_that_of_every_generator(measured):
    asked = measured("choose", seed=3, limit=1)["config"]
    assert {asked[name] for name in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")} == {3}


def test_the_command_prints_tables_and_writes_results_into_the_checkpoint_and_nothing_else(checkpoint, tasks, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint().iterdir():
        (folder / file.name).symlink_to(file)
    before = {file.name for file in folder.iterdir()}
    words = [
        str(folder),
        "--tasks",
        "both",
        "--include_path",
        str(tasks),
        "--batch_size",
        "2",
        "--force_conversion",
        "true",
        "--limit",
        "2",
    ]
    run(convert_and_evaluate, "evaluate", words)
    out = capsys.readouterr().out
    assert "| - choose" in out and "|Groups|" in out and f"Saved the results to {folder / 'evaluate' / 'results.json'}" in out
    assert {file.name for file in folder.iterdir()} == before | {"evaluate"}
    assert os.listdir(folder / "evaluate") == ["results.json"]
    results = json.loads((folder / "evaluate" / "results.json").read_text())
    assert results["config"]["model"] == "LitGPT"
    assert results["config"]["model_args"] == {"pretrained": str(folder)}
    assert results["config"]["model_dtype"] == str(compute_dtype())


def test_a_file_of_ones_own_holds_the_results(measured, tmp_path):
    with pytest.raises(FileNotFoundError):
        measured("choose", save_filepath=tmp_path / "deep" / "mine.json", limit=1)
    assert "choose" in json.loads((tmp_path / "deep" / "mine.json").read_text())["results"]
    assert not (tmp_path / "out").exists()


def test_answers_are_written_as_the_command_says(measured):
    assert measured("write", gen_kwargs="max_gen_toks=3,until=x", limit=1)["config"]["gen_kwargs"] == {"max_gen_toks": 3, "until": "x"}


def test_a_task_may_be_a_file(measured, tasks):
    assert "choose" in measured(str(tasks / "choose.yaml"), include_path=None)["results"]


@pytest.mark.parametrize(
    "text, needed",
    [
        ("task: mine\nprocess_docs: !function utils.process\n", []),
        ("# a group\n'group': mine\ntask: [hellaswag]\n", [True]),
        ('{"group": "mine", "task": ["hellaswag"]}', [True]),
        ("include: another.yaml\ntask: mine\n", [True]),
        ("- task: mine\n", [True]),
        ("task: [mine\n", [True]),
    ],
    ids=["a task", "a group", "a group in JSON", "a part", "a list", "no YAML"],
)
def test_lm_evals_own_tasks_are_only_read_if_a_name_or_a_file_may_mean_one(tmp_path, tasks, monkeypatch, text, needed):
    asked = []
    monkeypatch.setattr(TaskManager, "__init__", lambda self, include_path, include_defaults=True: asked.append(include_defaults))
    monkeypatch.setattr(TaskManager, "task_index", {"choose": None})
    (tmp_path / "mine.yaml").write_text(text)
    evaluate.find_tasks([str(tmp_path / "mine.yaml")], None)
    evaluate.find_tasks([str(tmp_path / "mine.yaml"), "choose"], None)
    assert [read for read in asked if read] == [*needed, True]


def test_a_star_stands_for_several_tasks(measured):
    assert {"choose", "choose_again"} <= measured("choose*", limit=1)["results"].keys()


@pytest.mark.parametrize("arguments", [{"checkpoint_dir": Path("list")}, {"checkpoint_dir": Path("no-such-model"), "tasks": None}])
def test_the_tasks_are_listed_without_a_checkpoint(tasks, arguments, capsys):
    convert_and_evaluate(**arguments, include_path=tasks)
    lines = capsys.readouterr().out.splitlines()
    assert {"both", "choose", "read_on"} <= set(lines)
    assert "--tasks" in lines[-1]


# Mistakes


@pytest.mark.parametrize(
    "options, said",
    [
        ({"batch_size": 0}, "`batch_size` is a positive number, or auto, but got 0"),
        ({"batch_size": "many"}, "but got 'many'"),
        ({"batch_size": True}, "but got True"),
        ({"limit": 0.0}, "`limit` is a number of questions"),
        ({"limit": float("nan")}, "`limit`"),
        ({"num_fewshot": -1}, "`num_fewshot` is 0 or more"),
        ({"dtype": "float31"}, "Did you mean 'float32'"),
        ({"device": "tpu"}, "`accelerator` is one of"),
        ({"device": "cpu:1"}, "There is no device 'cpu:1'"),
        ({"model": "hf"}, "`model` is one of litgpt, local-completions"),
        ({"model_args": "base_url=http://localhost"}, "`model_args` describes a server"),
        ({"model": "local-completions"}, "Say where the server is"),
        ({"model": "local-completions", "model_args": "base_url=http://127.0.0.1:9/v1/completions"}, "No server answers"),
        ({"model": "local-completions", "model_args": "nonsense"}, "`model_args` is written as key=value"),
        ({"gen_kwargs": "nonsense"}, "`gen_kwargs` is written as key=value"),
        ({"tasks": "chose"}, "There is no task 'chose'. Did you mean 'choose'"),
        ({"tasks": "choose,, read_onn"}, "'read_on'"),
        ({"tasks": "*nothing*"}, "There is no task"),
        ({"tasks": " , "}, "names no task"),
        ({"include_path": Path("nowhere")}, "There is no folder nowhere"),
        ({"adapter": Path("nowhere")}, "nowhere"),
        ({"gen_kwargs": "max_gen_toks=500", "tasks": "write"}, "generates 500 tokens, but the model's context is 128"),
        ({"gen_kwargs": "max_gen_toks=x"}, "`gen_kwargs` says `max_gen_toks` 'x', but it is a whole number"),
        ({"gen_kwargs": "max_gen_toks=4.5"}, "`max_gen_toks` 4.5, but it is a whole number"),
        ({"gen_kwargs": "max_new_tokens=true"}, "`max_new_tokens` True"),
        ({"gen_kwargs": "temperature=hot,do_sample=true"}, "`temperature` 'hot', but it is a number"),
        ({"gen_kwargs": "top_p=none,do_sample=true"}, "`top_p` None, but it is a number"),
        ({"gen_kwargs": "do_sample=maybe"}, "`do_sample` 'maybe', but it is true or false"),
        ({"gen_kwargs": "until=3"}, "`until` 3, but it is a text. Put quotes around a number"),
        ({"num_fewshot": 100}, "The task choose has 3 solved examples, but 100 are to stand before each question. Set at most"),
        ({"num_fewshot": 4, "tasks": "both"}, "The task choose(_again)? has 3 solved examples, but 4"),
        ({"tasks": "nofile.yaml"}, "There is no file 'nofile.yaml' for `tasks`"),
        ({"tasks": "nowhere/nofile.yml"}, "There is no file 'nowhere/nofile.yml'"),
    ],
)
def test_a_mistake_is_one_sentence(measured, options, said):
    names = options.pop("tasks", "choose")
    with pytest.raises(UserError, match=said.replace("*", r"\*")):
        measured(names, **options)


class Refusing(BaseHTTPRequestHandler):
    """A server that answers nothing."""

    def do_POST(self):
        self.send_error(503)

    do_GET = do_POST

    def log_message(self, *args):
        pass


def test_a_server_that_fails_is_named(measured):
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v1/completions"
        with pytest.raises(UserError, match=f"The server at {address} failed"):
            measured("choose", limit=1, model="local-completions", model_args=f"base_url={address},max_retries=1")
        server.shutdown()


def test_a_missing_checkpoint_is_named(tasks):
    with pytest.raises(MissingFile, match="no-such-model"):
        convert_and_evaluate(Path("no-such-model"), tasks="choose", include_path=tasks)


def test_data_that_is_not_there_is_named(tasks, tmp_path, measured):
    (tmp_path / "mine").mkdir()
    text = (tasks / "choose.yaml").read_text().replace(str(tasks), "/nowhere").replace("task: choose", "task: far_away")
    (tmp_path / "mine" / "far_away.yaml").write_text(text)
    with pytest.raises(UserError, match="A file that far_away needs is not there: .*nowhere.*Correct the path"):
        measured("far_away", include_path=tmp_path / "mine")
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_data_of_the_hub_is_missed_in_one_sentence_without_a_network(tasks, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the tries to reach it
    (tmp_path / "mine").mkdir()
    text = "task: far_away\ndataset_path: org/no-such-data\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: x\n"
    (tmp_path / "mine" / "far_away.yaml").write_text(text)
    with pytest.raises(UserError, match="The data of far_away could not be loaded"):
        measured("far_away", include_path=tmp_path / "mine")


def test_a_file_of_the_folder_that_is_no_yaml_is_named_where_a_task_is_missed(measured, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text("task: a\ndoc_to_text: !function utils.text\n")
    (tmp_path / "mine" / "b.yml").write_text("task: [b\n")
    with pytest.raises(UserError, match="There is no task 'b'.*mine/b.yml is no YAML, so its tasks are unknown: .*Correct the file."):
        measured("b", include_path=tmp_path / "mine")


@pytest.mark.parametrize("number", [1, 2])
def test_a_question_of_the_examples_own_split_is_no_example_for_itself(measured, tasks, tmp_path, number):
    """Nor for a question like it: lm-eval takes all that are like it out."""
    rows = (tasks / "solved.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:1] * number + rows[1:]) + "\n")
    text = (tasks / "choose.yaml").read_text().replace(str(tasks / "questions.jsonl"), str(tmp_path / "few.jsonl"))
    (tmp_path / "mine.yaml").write_text(text.replace("fewshot_split: train", "fewshot_split: test"))
    assert measured(str(tmp_path / "mine.yaml"), num_fewshot=2)["n-shot"] == {"choose": 2}
    with pytest.raises(UserError, match="has 2 solved examples, but 3"):
        measured(str(tmp_path / "mine.yaml"), num_fewshot=3)


@pytest.mark.parametrize(
    "right, wrong, said",
    [
        ("test_split: test", "test_split: [test", "A task file of .*mine.yaml is no YAML: .*line "),
        ("{{question}}", "{{wrong}}", "A template in the task file of .*mine.yaml is wrong: 'wrong' is undefined"),
        ("{{question}}", "{{question", "A template in the task file of .*mine.yaml is wrong: "),
        ("{{answer}}", "{{wrong}}", "'wrong' is undefined"),
        ("{{choices}}", "{{wrong}}", "'wrong' is undefined"),
        ("questions.jsonl", "question.jsonl", "A file that .*mine.yaml needs is not there: .*question.jsonl.*Correct the path"),
        ("task: choose", "task: choose\ninclude: part.yaml", "A file that .*mine.yaml needs is not there: .*part.yaml"),
    ],
    ids=["no YAML", "a question", "no template", "an answer", "choices", "data", "a part"],
)
def test_a_task_file_that_is_wrong_is_said_to_be_so(measured, tasks, tmp_path, right, wrong, said):
    text = (tasks / "choose.yaml").read_text()
    assert right in text
    (tmp_path / "mine.yaml").write_text(text.replace(right, wrong))
    with pytest.raises(UserError, match=said) as caught:
        measured(str(tmp_path / "mine.yaml"), include_path=None)
    assert "network" not in str(caught.value) and "\n" not in str(caught.value)


def test_git_says_nothing_where_there_is_no_repository(measured, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert measured("choose", limit=1)["git_hash"] is None
    assert "git" not in capfd.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_anything_is_loaded(checkpoint, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_speaker", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    for place in (dict(out_dir=tmp_path / "file"), dict(save_filepath=tmp_path), dict(out_dir=Path("/proc/nowhere"))):
        with pytest.raises(UserError, match="--out_dir"):
            convert_and_evaluate(checkpoint(), tasks="choose", include_path=tasks, **place)


def test_a_package_that_is_missing_is_named(checkpoint, monkeypatch):
    monkeypatch.setitem(evaluate.lm_eval_module.__globals__, "optional", lambda name, extra: pytest.fail(f"{name} {extra}"))
    with pytest.raises(pytest.fail.Exception, match="lm_eval.tasks all"):
        convert_and_evaluate(checkpoint(), tasks="choose")


def test_the_device_and_type_are_those_that_are_named():
    assert evaluate.find_named_device("cpu") == torch.device("cpu")
    assert evaluate.find_dtype("float16") == torch.float16
    assert evaluate.find_dtype(None) == evaluate.find_dtype("auto") == compute_dtype()
