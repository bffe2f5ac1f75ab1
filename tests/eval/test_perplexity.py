"""The command `perplexity` against transformers in float64."""

import json
from functools import cache
from math import exp, log
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tasks import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt.cli import run
from litgpt.errors import MissingFile, UserError
from litgpt.eval.evaluate import load_speaker
from litgpt.eval.perplexity import main, perplexity, read_texts

KINDS = [("llama", "added"), ("llama", "named"), ("gemma2", "added"), ("qwen3", "none")]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids="-".join)


@cache
def speaker(folder, dtype=torch.float32):
    return load_speaker(folder, dtype, torch.device("cpu"))


@cache
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


@torch.inference_mode()
def expected_nll(folder, texts, length, stride):
    """Each token's, one window for each: the one that the rule gives it, written in another way than the code's."""
    model, tokenizer, total = theirs(folder), AutoTokenizer.from_pretrained(folder), 0.0
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in texts:
        ids = [first, *tokenizer.encode(text, add_special_tokens=False)]
        for at in range(1, len(ids)):
            end = length if at <= length else min(length + -(-(at - length) // stride) * stride, len(ids) - 1)
            seen = ids[max(end - length, 0) : at]
            total -= model(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[ids[at]].item()
    return total


@EVERY_KIND
@pytest.mark.parametrize("length, stride", [(128, None), (32, None), (32, 10)])
def test_the_perplexity_is_that_of_transformers_in_float64(checkpoint, kind, length, stride):
    folder, texts = checkpoint(*kind), [*TEXTS[:1], TEXTS[1][:300], *TEXTS[2:]]
    expected = expected_nll(folder, texts, length, stride or length)
    for dtype, near in ((torch.float32, 1e-5), (torch.float64, 1e-7)):  # angles are in fp32 in both
        for batch_size in (1, 3, None):
            found = perplexity(speaker(folder, dtype), texts, length, stride, batch_size)
            assert found.nll == pytest.approx(expected, rel=near)


def test_the_measures_follow_from_each_other(checkpoint):
    texts = ["Llamas eat  grass,\nhay and leaves!", "über"]
    found = perplexity(speaker(checkpoint()), texts)
    assert (found.n_texts, found.n_words, found.n_bytes) == (2, 7, 34 + 5)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    assert found.n_tokens == sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    measures = found.measures
    assert measures["token_perplexity"] == pytest.approx(exp(found.nll / found.n_tokens))
    assert measures["word_perplexity"] == pytest.approx(exp(found.nll / 7))
    assert measures["byte_perplexity"] == pytest.approx(exp(found.nll / 39))
    assert measures["bits_per_byte"] == pytest.approx(log(measures["byte_perplexity"], 2))


def test_a_text_that_begins_with_bos_has_no_second_one(checkpoint):
    plain, marked = (perplexity(speaker(checkpoint()), [text]) for text in ("Llamas eat grass", "<s>Llamas eat grass"))
    assert (plain.n_tokens, plain.nll) == (marked.n_tokens, pytest.approx(marked.nll))


def test_a_perplexity_beyond_all_numbers_is_infinite(checkpoint):
    model = speaker.__wrapped__(checkpoint())
    model.model.lm_head.weight.data *= 1e6
    assert perplexity(model, ["Llamas eat grass, hay and leaves!"]).measures["token_perplexity"] == float("inf")


# Texts


@pytest.fixture
def files(tmp_path) -> Path:
    """The same two texts in every kind of file, each in a folder of its own."""
    records = [{"text": "one\n", "n": 1}, {"text": "zwei 🙂", "n": 2}]
    for name in ("txt", "json", "jsonl", "parquet", "mixed"):
        (tmp_path / name).mkdir()
    (tmp_path / "txt" / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "txt" / "b.txt").write_text(records[1]["text"])
    (tmp_path / "txt" / "c.md").write_text("not read")
    (tmp_path / "json" / "all.json").write_text(json.dumps(records))
    (tmp_path / "jsonl" / "all.jsonl").write_text("\n".join(map(json.dumps, [*records, {"text": " \n"}])))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "parquet" / "all.parquet")
    (tmp_path / "mixed" / "a.txt").write_text("one\n")
    (tmp_path / "mixed" / "b.json").write_text(json.dumps(["zwei 🙂"]))
    return tmp_path


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "parquet", "mixed"])
def test_texts_are_read_from_every_kind_of_file(files, kind):
    assert read_texts(files / kind) == ["one\n", "zwei 🙂"]


def test_a_single_file_of_any_other_name_is_one_text(files):
    assert read_texts(files / "txt" / "c.md") == ["not read"]


@pytest.mark.parametrize(
    "write, said",
    [
        (lambda folder: None, "There are no .txt, .json, .jsonl, .parquet files in"),
        (lambda folder: (folder / "a.txt").write_text(" \n"), "has no texts"),
        (lambda folder: (folder / "a.txt").write_bytes(b"\xff\xfe"), "not text in UTF-8"),
        (lambda folder: (folder / "a.jsonl").write_text('{"body": "x"}'), "line 1: there is no text called 'text'"),
        (lambda folder: (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": 3}'), "line 2: there is no text"),
        (lambda folder: (folder / "a.jsonl").write_text("{"), "not valid JSON in line 1"),
        (lambda folder: (folder / "a.parquet").write_text("x"), "cannot be read as Parquet"),
    ],
)
def test_texts_that_cannot_be_read_are_named(tmp_path, write, said):
    write(tmp_path)
    with pytest.raises(UserError, match=said):
        read_texts(tmp_path)


# The command


def test_the_command_prints_and_writes_what_was_measured(checkpoint, files, capsys):
    file = files / "out" / "found.json"
    run(main, "perplexity", f"{checkpoint()} --data {files / 'jsonl'} --dtype float32 --save_filepath {file}".split())
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines()[:-1])
    written = json.loads(file.read_text())
    assert written == perplexity(speaker(checkpoint()), ["one\n", "zwei 🙂"]).measures
    assert printed.keys() == written.keys()
    assert float(printed["bits_per_byte"]) == pytest.approx(written["bits_per_byte"], abs=1e-4)
    assert printed["n_bytes"] == "13"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"data": None}, "Name the texts with --data"),
        ({"data": Path("nowhere")}, "There is no file or folder nowhere"),
        ({"max_seq_length": 129}, "from 1 to the model's context of 128 tokens, but got 129"),
        ({"max_seq_length": 0}, "but got 0"),
        ({"max_seq_length": 10, "stride": 11}, "`stride` is from 1 to the 10 tokens"),
        ({"batch_size": -1}, "`batch_size`"),
        ({"text_key": "body"}, "no text called 'body'"),
        ({"save_filepath": Path("/proc/nowhere/x.json")}, "--save_filepath"),
    ],
)
def test_a_mistake_is_one_sentence(checkpoint, files, options, said):
    with pytest.raises(UserError, match=said):
        main(checkpoint(), **{"data": files / "jsonl"} | options)


def test_a_missing_checkpoint_is_named(files):
    with pytest.raises(MissingFile, match="no-such-model"):
        main(Path("no-such-model"), data=files / "txt")
