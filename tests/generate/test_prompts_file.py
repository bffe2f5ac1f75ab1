"""`litgpt generate --prompts`, and what the command can do with one prompt beside answering it."""

import io
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest
from forked import fork, run_litgpt
from safetensors.torch import load_file, save_file
from speaking import exact_llm, make_checkpoint
from tokenizers import Tokenizer as FastTokenizer

from litgpt.cli import main as cli

LINES = [
    {"prompt": "Hello", "id": "first", "seed": 3},
    {"prompt": "What food do llamas eat? " * 4},
    {"messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Grüße aus Köln"}], "id": {"any": ["value"]}},
    {"prompt": "a", "temperature": 0.0, "max_new_tokens": 30},
    {"prompt": "Once upon a time", "top_k": 5, "top_p": 0.9, "min_p": 0.01, "sys_prompt": "Speak."},
    {"prompt": "Hi", "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 8},
    {"prompt": "Hello", "id": None},
    {"prompt": "你好", "stop": ["a", "e"], "logprobs": 2},
    {"prompt": "Hi", "max_new_tokens": 1},
]
FLAGS = ["--precision", "32-true", "--max_new_tokens", "20", "--temperature", "1.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("prompts") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return exact_llm(folder)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(lines, name="prompts.jsonl"):
    with open(name, "w", encoding="utf-8") as file:
        file.write("".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines))
    return name


def run(folder, *flags, code=0):
    assert cli(["generate", str(folder), *FLAGS, *map(str, flags)]) == code


def records(name="out.jsonl"):
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def by_index(found):
    return {record["index"]: record for record in found}


def alone(llm, line, **changes):
    options = dict(max_new_tokens=20, temperature=1.2, top_k=50, seed=1234) | {k: v for k, v in line.items() if k not in ("id", "messages")}
    return llm.generate(**options | ({"prompt": line["messages"]} if "messages" in line else {}) | dict(return_details=True) | changes)


# Answers


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_line_gets_the_answer_that_it_gets_alone_whatever_the_order_and_the_batch(folder, llm, batch_size):
    order = random.Random(batch_size).sample(range(len(LINES)), len(LINES))
    write([LINES[i] for i in order])
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--batch_size", batch_size)
    found = by_index(records())
    assert sorted(found) == list(range(len(LINES)))
    for index, i in enumerate(order):
        expected, record = alone(llm, LINES[i]), found[index]
        assert (record["text"], record["finish"]) == (expected.text, expected.finish)


def test_a_record_has_the_prompt_its_id_and_how_the_answer_ended(folder, llm, capsys):
    write(LINES)
    run(folder, "--prompts", "prompts.jsonl")
    out, err = capsys.readouterr()
    found = by_index(map(json.loads, out.splitlines()))
    assert found[0]["id"] == "first" and found[2]["id"] == {"any": ["value"]} and "id" not in found[1] and "id" not in found[6]
    assert found[0]["prompt"] == "Hello" and found[2]["messages"] == LINES[2]["messages"]
    assert (found[0]["seed"], found[1]["seed"]) == (3, 1234)
    assert (found[8]["n_tokens"], found[8]["finish"]) == (1, "length")
    assert found[1]["n_prompt_tokens"] > 30
    assert "9 of 9 answers" in err and "tokens/sec" in err
    expected = alone(llm, LINES[7])
    assert [token["id"] for token in found[7]["logprobs"]] == expected.tokens
    assert [token["logprob"] for token in found[7]["logprobs"]] == pytest.approx([token.logprob for token in expected.logprobs], abs=1e-4)
    assert all(len(token["top"]) == 2 for token in found[7]["logprobs"])
    assert "logprobs" not in found[0]


def test_samples_of_a_prompt_have_the_seeds_that_follow(folder, llm):
    write(LINES[:2])
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--num_samples", 3)
    found = {(record["index"], record.get("sample", 0)): record["text"] for record in records()}
    assert found == {(i, sample): alone(llm, LINES[i], seed=seed + sample).text for i, seed in ((0, 3), (1, 1234)) for sample in range(3)}


@pytest.mark.parametrize("name", ["prompts.json", "prompts.txt", "prompts.jsonl"])
def test_prompts_are_read_from_lists_and_from_plain_lines_too(folder, llm, name):
    texts = ["Hello", " What food?", '{"a": 1}']
    with open(name, "w") as file:
        file.write(json.dumps(texts) if name.endswith("json") else "\n\n".join(texts) + "\n" if name.endswith("txt") else "")
        if name.endswith("jsonl"):
            file.write("\ufeff" + "\n".join(map(json.dumps, texts)))
    run(folder, "--prompts", name, "--out", "deep/er/out.jsonl")
    found = by_index(records("deep/er/out.jsonl"))
    assert [found[i]["text"] for i in range(3)] == [alone(llm, {"prompt": text}).text for text in texts]


def test_prompts_are_read_from_standard_input(folder, llm, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in LINES[:3])))
    run(folder, "--prompts", "-")
    found = by_index([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [found[i]["text"] for i in range(3)] == [alone(llm, line).text for line in LINES[:3]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    run(folder, "--prompts", "-", code=2)
    assert "Standard input is empty" in capsys.readouterr().err


# Going on


def test_a_run_goes_on_where_it_was_stopped_and_drops_what_was_torn(folder):
    write(LINES)
    flags = ["--prompts", "prompts.jsonl", "--out", "out.jsonl"]
    run(folder, *flags)
    whole = sorted(map(json.dumps, records()))
    with open("out.jsonl", "rb") as file:
        content = file.read()
    lines = content.splitlines(keepends=True)
    for left in (b"", lines[0][:5], lines[0], b"".join(lines[:4]) + lines[4][:-1], b"".join(lines[:4]) + lines[4][:-9], content):
        with open("out.jsonl", "wb") as file:
            file.write(left)
        run(folder, *flags)
        with open("out.jsonl", "rb") as file:
            again = file.read()
        assert sorted(map(json.dumps, records())) == whole
        n_whole = left.rfind(b"\n") + 1
        assert again[:n_whole] == left[:n_whole]
    assert not os.path.exists("out.jsonl.partial")


def test_a_killed_run_loses_no_whole_line(folder):
    write([{"prompt": f"Hello {i}", "max_new_tokens": 60} for i in range(60)])
    flags = ["--prompts", "prompts.jsonl", "--out", "out.jsonl", "--batch_size", "2"]
    process = fork(run_litgpt, ["generate", str(folder), *FLAGS, *flags], os.devnull, os.devnull)
    while process.is_alive() and (not os.path.exists("out.jsonl") or os.path.getsize("out.jsonl") < 3000):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with open("out.jsonl", "rb") as file:
        left = file.read()
    assert 0 < left.count(b"\n") < 60
    run(folder, *flags)
    with open("out.jsonl", "rb") as file:
        assert file.read().startswith(left[: left.rfind(b"\n") + 1])
    assert sorted(by_index(records())) == list(range(60)) and len(records()) == 60


@pytest.mark.parametrize(
    ("flags", "lines"),
    [(["--seed", "7"], LINES[:2]), ([], LINES[1:3]), ([], LINES[:1]), (["--sys_prompt", "Rhyme."], LINES[:2])],
    ids=["another seed", "other prompts", "fewer prompts", "a system prompt"],
)
def test_answers_that_were_made_otherwise_are_not_mixed_with_new_ones(folder, capsys, flags, lines):
    write(LINES[:2])
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl")
    before = records()
    write(lines)
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", *flags, code=2)
    assert "Choose another `out`" in capsys.readouterr().err.splitlines()[-1]
    assert records() == before


def test_more_prompts_and_more_samples_go_on_with_a_finished_run(folder):
    for n, flags in ((2, []), (4, []), (4, ["--num_samples", "2"])):
        write(LINES[:n])
        run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", *flags)
    assert sorted((record["index"], record.get("sample", 0)) for record in records()) == [(i, j) for i in range(4) for j in range(2)]


def test_a_file_of_something_else_is_left_as_it_is(folder, capsys):
    write(LINES[:2])
    negative = '{"index": -1, "key": "x"}\n'
    for content in ("my notes\n", "my notes", '{"text": "x"}\n', '{"text": "x"}', "[]\n", "\n", "\0\0\0", negative):
        with open("out.jsonl", "w") as file:
            file.write(content)
        run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", code=2)
        assert "holds something else than answers in line 1" in capsys.readouterr().err
        with open("out.jsonl") as file:
            assert file.read() == content


def test_prompts_are_not_overwritten_by_their_answers(folder):
    with open("prompts.jsonl", "w") as file:
        file.write('{"prompt": "Hello"}')
    run(folder, "--prompts", "prompts.jsonl", "--out", "prompts.jsonl", code=2)
    with open("prompts.jsonl") as file:
        assert file.read() == '{"prompt": "Hello"}'


def test_an_answer_whose_line_break_is_gone_is_kept(folder):
    write(LINES[:2])
    flags = ["--prompts", "prompts.jsonl", "--out", "out.jsonl"]
    run(folder, *flags)
    before = records()
    with open("out.jsonl", "rb+") as file:
        file.truncate(os.path.getsize("out.jsonl") - 1)
    run(folder, *flags)
    assert records() == before
    with open("out.jsonl", "rb+") as file:
        file.truncate(os.path.getsize("out.jsonl") - 1)
    run(folder, *flags, "--seed", "7", code=2)
    assert records() == before


def test_a_link_to_the_answers_stays_one(folder):
    write(LINES[:1])
    os.mkdir("kept")
    os.symlink("kept/real.jsonl", "out.jsonl")
    with open("kept/real.jsonl", "w") as file:
        file.write('{"index": 0, "pro')
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl")
    assert os.path.islink("out.jsonl") and records("kept/real.jsonl") == records() and len(records()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk here")
def test_a_full_disk_is_one_sentence(folder, capsys):
    write(LINES[:1])
    run(folder, "--prompts", "prompts.jsonl", "--out", "/dev/full", code=2)
    err = capsys.readouterr().err
    assert "/dev/full could not be written: the disk is full" in err and "Traceback" not in err


# Mistakes


WRONG = [
    ("not json", "not valid JSON"),
    ("[1, 2]", "A prompt looks like"),
    ({"text": "Hello"}, "one of `prompt` and `messages`, but has neither"),
    ({"prompt": "a", "messages": []}, "but has both"),
    ({"prompt": 5}, "`prompt` must be text, but is a number"),
    ({"prompt": "a", "temprature": 1}, "no option 'temprature'. Did you mean 'temperature'?"),
    ({"prompt": "a", "temperature": "hot"}, "`temperature` must be a number, but is text"),
    ({"prompt": "a", "temperature": -1}, "`temperature` must be 0 or more"),
    ({"prompt": "a", "temperature": float("nan")}, "not valid JSON: NaN is no number"),
    ({"prompt": "a", "id": float("-inf")}, "not valid JSON: -Infinity is no number"),
    ({"prompt": "a", "presence_penalty": 10**400}, "`presence_penalty` is a number, from"),
    ({"prompt": "a", "seed": True}, "`seed` must be a whole number"),
    ({"prompt": "a", "seed": 1.5}, "`seed` must be a whole number, but is 1.5"),
    ({"prompt": "a", "stop": [1]}, "`stop` is a text or a list of texts, but has 1"),
    ({"prompt": "a", "max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
    ({"prompt": "a", "schema": {"type": "llama"}}, "schema"),
    ({"prompt": "llama " * 300}, "context is 256 tokens"),
    ({"messages": []}, "at least one message"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to answer"),
    ({"messages": [{"role": "user"}]}, "Message 0 needs a text as its `content`, but has None"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "Message 0 needs a text as its `content`"),
    ({"messages": [{"role": 1, "content": "a"}]}, "Message 0 needs a text as its `role`, but has 1"),
    ('{"prompt": "\\ud800"}', "half of a character, which is no text"),
]


def test_an_error_of_one_line_is_recorded_and_stops_no_other(folder, llm, capsys):
    lines = [LINES[0], *(line for line, _ in WRONG), LINES[1]]
    write(lines)
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--batch_size", 2, code=2)
    err = capsys.readouterr().err
    assert f"{len(WRONG)} of {len(lines)} prompts could not be answered" in err.splitlines()[-1] and "Line 2: This is not valid JSON" in err
    found = by_index(records())
    assert len(records()) == len(lines)
    for i, (_, said) in enumerate(WRONG, start=1):
        assert said in found[i]["error"]
    assert [found[0]["text"], found[len(lines) - 1]["text"]] == [alone(llm, LINES[0]).text, alone(llm, LINES[1]).text]
    write([LINES[0], *([LINES[2]] * len(WRONG)), LINES[1]])
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl")
    assert not [record for record in records() if "error" in record] and len(records()) == len(lines)


def test_an_answer_that_breaks_off_is_recorded_and_stops_no_other(folder, llm, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    [token] = llm.tokenizer.ids("Q")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    lines = [{"prompt": "Hello"}, {"prompt": "Q"}, {"prompt": "Hi"}, {"prompt": "Again"}]
    write(lines)
    run(broken, "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--batch_size", 2, "--temperature", 0, code=2)
    assert (
        "1 of 4 prompts could not be answered, and have an `error` instead. Line 2: The model computes no numbers"
        in capsys.readouterr().err
    )
    found = by_index(records())
    assert "text" not in found[1] and "computes no numbers" in found[1]["error"]
    assert [found[i]["text"] for i in (0, 2, 3)] == [alone(llm, lines[i], temperature=0.0).text for i in (0, 2, 3)]


def test_a_prompt_with_a_token_that_the_model_does_not_know_stops_no_other(folder, llm, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = FastTokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save(str(other / "tokenizer.json"))
    write([{"prompt": "<new>"}, {"prompt": "Hello"}])
    run(other, "--prompts", "prompts.jsonl", "--out", "out.jsonl", code=2)
    found = by_index(records())
    assert f"token id {len(llm.model.transformer.wte.weight)}, but the model knows" in found[0]["error"]
    assert found[1]["text"] == alone(llm, {"prompt": "Hello"}).text


def test_a_line_that_was_mended_is_tried_again(folder):
    write([LINES[0], {"prompt": "a", "seed": "x"}])
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", code=2)
    assert "error" in by_index(records())[1]
    write([LINES[0], {"prompt": "a", "seed": 1}])
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl")
    assert len(records()) == 2 and "text" in by_index(records())[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompts", "no.jsonl"], "There is no file no.jsonl"),
        (["--prompts", "prompts.csv"], "prompts.csv ends in '.csv'"),
        (["--prompts", "empty.jsonl"], "empty.jsonl is empty"),
        (["--prompts", "latin.txt"], "not text in UTF-8"),
        (["--prompts", "broken.json"], "broken.json is not valid JSON: line 1, column 2"),
        (["--prompts", "mapping.json"], "must hold a list of prompts, but holds a mapping"),
        (["--prompts", "ok.txt", "--prompt", "Hi"], "a `prompt` and a file of `prompts`"),
        (["--out", "x.jsonl"], "`out` is where"),
        (["--prompts", "ok.txt", "--batch_size", "0"], "`batch_size` must be at least 1"),
        (["--prompts", "ok.txt", "--out", "folder"], "folder is a folder"),
        (["--max_new_tokens", "0"], "`max_new_tokens` must be at least 1"),
        (["--min_p", "2"], "`min_p`"),
        (["--logprobs", "-1"], "`logprobs`"),
        (["--schema", "no.json"], "There is no file no.json"),
        (["--schema", "broken.json"], "broken.json is damaged"),
        (["--stop", ""], "`stop` has an empty text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_the_whole_run_is_one_line_and_exit_code_2(folder, capsys, flags, said):
    for name, content in (("empty.jsonl", "\n"), ("broken.json", "{"), ("mapping.json", "{}"), ("ok.txt", "Hi"), ("prompts.csv", "a")):
        with open(name, "w") as file:
            file.write(content)
    with open("latin.txt", "wb") as file:
        file.write("Grüße".encode("latin-1"))
    os.mkdir("folder")
    run(folder, *flags, code=2)
    out, err = capsys.readouterr()
    assert out == "" and said in err.splitlines()[-1] and "Traceback" not in err


# One prompt


def test_a_prompt_is_read_from_standard_input(folder, llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Two\nlines\n"))
    run(folder, "--prompt", "-")
    assert capsys.readouterr().out == f"Two\nlines\n{alone(llm, {'prompt': 'Two' + chr(10) + 'lines'}).text}\n"


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_samples_are_printed_in_order_and_do_not_depend_on_the_batch(folder, llm, capsys, batch_size):
    run(folder, "--prompt", "Hello", "--num_samples", "5", "--batch_size", batch_size)
    out, err = capsys.readouterr()
    assert out == "".join(f"Hello\n{alone(llm, {'prompt': 'Hello'}, seed=1234 + i).text}\n" for i in range(5))
    assert [line.split(":")[0] for line in err.splitlines()[1:]] == [f"Time for inference {i}" for i in range(1, 6)]


def test_options_of_sampling_and_stop_texts_reach_the_answer(folder, llm, capsys):
    options = dict(min_p=0.05, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run(folder, "--prompt", "Hello", *flags)
    whole = alone(llm, {"prompt": "Hello"}, **options).text
    assert capsys.readouterr().out == f"Hello\n{whole}\n"
    run(folder, "--prompt", "Hello", *flags, "--stop", whole[5:7])
    assert capsys.readouterr().out == f"Hello\n{whole[: whole.index(whole[5:7])]}\n"
    run(folder, "--prompt", "Hello", *flags, "--stop", json.dumps([whole[9:11], whole[5:7]]))
    assert capsys.readouterr().out == f"Hello\n{whole[: min(whole.index(whole[5:7]), whole.index(whole[9:11]))]}\n"


def test_logprobs_of_one_prompt_are_told_beside_the_answer(folder, llm, capsys):
    run(folder, "--prompt", "Hello", "--logprobs", "2")
    out, err = capsys.readouterr()
    expected = alone(llm, {"prompt": "Hello"}, logprobs=2)
    assert out == f"Hello\n{expected.text}\n"
    lines = err.splitlines()[2:]
    assert len(lines) == len(expected.tokens)
    first = expected.logprobs[0]
    assert lines[0].startswith(f"{llm.tokenizer.text(first.token)!r} {first.logprob:.4f}  {llm.tokenizer.text(first.top[0][0])!r}")


def test_an_answer_with_a_schema_is_json(folder, capsys):
    with open("schema.json", "w") as file:
        json.dump({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}, file)
    run(folder, "--prompt", "Hello", "--schema", "schema.json", "--max_new_tokens", "100", "--temperature", "1.5")
    assert isinstance(json.loads(capsys.readouterr().out.partition("\n")[2])["n"], int)
    write([{"prompt": "a"}, {"prompt": "b", "schema": {"enum": ["x", "yz"]}}])
    run(folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--schema", "schema.json", "--max_new_tokens", "100")
    found = by_index(records())
    assert isinstance(json.loads(found[0]["text"])["n"], int) and json.loads(found[1]["text"]) in ("x", "yz")
