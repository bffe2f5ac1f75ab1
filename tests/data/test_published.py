"""The published data sets, each read from files of its own layout, and the recipes that name them."""

import json
from pathlib import Path

import pytest
import yaml

from litgpt import data as data_sets
from litgpt import prompts
from litgpt.data import FLAN, LIMA, Alpaca, Alpaca2k, AlpacaGPT4, Deita, Dolly, LongForm, flan, longform
from litgpt.data.base import SFTModule
from litgpt.errors import UserError

CHAT = [{"role": role, "content": text} for role, text in [("user", "1?"), ("assistant", "Yes."), ("user", "2?"), ("assistant", "No.")]]


def write_json(path: Path, rows: list) -> Path:
    """Write a list, or JSON lines if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def numbered(n: int, **texts: str) -> list[dict[str, str]]:
    return [{key: text.format(i) for key, text in texts.items()} for i in range(n)]


def ready(data: SFTModule, tokenizer) -> SFTModule:
    data.connect(tokenizer, batch_size=2, max_seq_length=300)
    data.prepare_data()
    data.setup()
    return data


def source(tmp_path: Path, kind: type) -> SFTModule:
    """A small data set of the kind, in the layout of the published one."""
    folder, kept = tmp_path / "source", {"download_dir": tmp_path / "kept"}
    if kind in (Alpaca, AlpacaGPT4):
        rows = numbered(10, instruction="Say {}.", input="", output="{}")
        return kind(file_url=write_json(folder / "a.json", rows).as_uri(), val_split_fraction=0.2, **kept)
    if kind is Dolly:
        rows = numbered(10, instruction="Say {}.", context="As text.", response="{}", category="qa")
        return Dolly(file_url=write_json(folder / "d.jsonl", rows).as_uri(), val_split_fraction=0.2, **kept)
    if kind is Alpaca2k:
        write_json(folder / "train.jsonl", numbered(10, instruction="Say {}.", input="", output="{}", text="all of it"))
        return Alpaca2k(repo_id=str(folder), val_split_fraction=0.2, **kept)
    if kind is Deita:
        for part, n in (("train_sft", 8), ("test_sft", 2)):
            write_json(folder / "data" / f"{part}.jsonl", [{"prompt": "1?", "messages": CHAT}] * n)
        parts = [{"split": part, "path": f"data/{part}*"} for part in ("train_sft", "test_sft")]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [{'config_name': 'default', 'data_files': parts}]})}---\n")
        return Deita(repo_id=str(folder), **kept)
    if kind is LIMA:
        write_json(folder / "train.jsonl", [{"conversations": [message["content"] for message in CHAT], "source": "x"}] * 10)
        return LIMA(repo_id=str(folder), val_split_fraction=0.2)
    if kind is FLAN:
        for name in ("cola", "rte"):
            for part, n in (("train", 4), ("test", 1)):
                file = folder / part / f"{name}_10templates_{part}.jsonl"
                write_json(file, numbered(n, inputs=f"{name} {{}}?", targets="{}", task=name))
        return FLAN(url=folder.as_uri(), subsets="cola_10templates, rte", **kept)
    for part, n in (("train", 8), ("val", 2)):
        write_json(folder / f"{part}.json", numbered(n, input="Write {}.", output="{}", source="x"))
    return LongForm(**kept)


KINDS = [Alpaca, Alpaca2k, AlpacaGPT4, Deita, Dolly, FLAN, LIMA, LongForm]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def data(request, tmp_path, monkeypatch) -> SFTModule:
    monkeypatch.setattr(longform, "URL", (tmp_path / "source").as_uri())
    return source(tmp_path, request.param)


def test_a_data_set_is_split_and_shows_what_it_asks_and_wants_again_and_again(data, tokenizer):
    ready(data, tokenizer)
    assert (len(data.train_dataset), len(data.val_dataset)) == (8, 2)
    for samples in (data.train_dataset, data.val_dataset):
        for _ in range(2):  # the first look changes nothing
            messages, answer = samples.example(0)
            assert messages[0]["role"] == "user" and messages[0]["content"] and answer
            labels = samples[0]["labels"]
            assert tokenizer.decode(labels[labels != -100]).startswith(answer)


def test_the_same_samples_are_held_out_every_time(data, tokenizer):
    first = [data.val_dataset.messages(i) for data in [ready(data, tokenizer)] for i in range(2)]
    assert [data.val_dataset.messages(i) for data in [ready(data, tokenizer)] for i in range(2)] == first


def test_a_file_is_downloaded_once_into_its_folder(tmp_path, tokenizer):
    data = ready(source(tmp_path, Alpaca), tokenizer)
    (tmp_path / "source" / "a.json").unlink()
    ready(data, tokenizer)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [".lock", "alpaca_data_cleaned_archive.json"]


def test_dollys_context_is_the_input(tmp_path, tokenizer):
    messages, answer = ready(source(tmp_path, Dolly), tokenizer).train_dataset.example(0)
    assert (messages, answer) == ([{"role": "user", "content": "Say 0.", "input": "As text."}], "0")


@pytest.mark.parametrize("kind", [Deita, LIMA])
@pytest.mark.parametrize("whole", [False, True])
def test_of_a_conversation_the_first_answer_is_learnt_or_all_of_them(tmp_path, tokenizer, kind, whole):
    data = source(tmp_path, kind)
    data.include_multiturn_conversations = whole
    data.prompt_style = "chatml"
    assert ready(data, tokenizer).train_dataset.messages(0) == (CHAT if whole else CHAT[:2])
    labels = data.train_dataset[0]["labels"]
    learnt = tokenizer.decode(labels[labels != -100])
    assert "Yes." in learnt and ("No." in learnt) == whole and "?" not in learnt


def test_the_prompt_styles_of_flan_and_longform_are_their_own(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(longform, "URL", (tmp_path / "source").as_uri())
    for kind, style in ((FLAN, prompts.FLAN), (LongForm, prompts.Longform)):
        assert type(ready(source(tmp_path, kind), tokenizer).train_dataset.prompt_style) is style


def test_flan_refuses_a_task_that_it_does_not_have():
    assert len(flan.SUBSETS) == len(set(flan.SUBSETS)) == 66
    with pytest.raises(UserError, match="'colla_10templates'|'colla' is none. Did you mean 'cola'"):
        FLAN(subsets="rte,colla_10templates")
    with pytest.raises(UserError, match="'' is none. There are aeslc, "):
        FLAN(subsets="rte,")


def test_a_token_is_not_among_the_arguments_that_a_run_writes_down():
    assert "secret" not in str(vars(LIMA(access_token="secret"))["access_token"]) and "secret" not in repr(LIMA(access_token="secret"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_data_set_is_known_by_its_name(kind):
    assert getattr(data_sets, kind.__name__) is kind and kind.__name__ in data_sets.__all__
