"""Any data set that `datasets` can load, from local files and from a stand-in for the hub."""

import gzip
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import datasets
import huggingface_hub
import pytest
import yaml
from hub_server import HubServer, _Handler

from litgpt.args import to_plain
from litgpt.data import HF, LIMA
from litgpt.data.hf import Table, load_rows
from litgpt.errors import UserError

QUESTIONS = [{"question": f"{i}?", "answer": str(i), "unused": i, "empty": "x" if i else None} for i in range(20)]
COLUMNS = {"instruction": "question", "output": "answer"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
CALLING = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "12"}, CHAT[1]]


@pytest.fixture
def cached(tmp_path: Path) -> dict[str, Path]:
    """The option that keeps what `datasets` writes in the test's own folder."""
    return {"download_dir": tmp_path / "cache"}


def ready(data: HF, tokenizer) -> HF:
    data.connect(tokenizer, batch_size=2, max_seq_length=300)
    data.prepare_data()
    data.setup()
    return data


def saved(rows: list[dict], path: Path) -> str:
    """Write rows as the name says, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.parquet", "a.jsonl.gz"])
def test_columns_of_a_file_become_parts_of_samples(tmp_path, tokenizer, cached, name):
    data = ready(HF(saved(QUESTIONS, tmp_path / name), columns=COLUMNS, val_split_fraction=0.2, **cached), tokenizer)
    assert (len(data.train_dataset), len(data.val_dataset)) == (16, 4)
    examples = [samples.example(i) for samples in (data.train_dataset, data.val_dataset) for i in range(len(samples))]
    assert sorted(int(answer) for _, answer in examples) == list(range(20))
    assert all(messages == [{"role": "user", "content": f"{answer}?"}] for messages, answer in examples)


def test_a_folder_has_parts_and_parts_of_those(tmp_path, tokenizer, cached):
    saved(QUESTIONS, tmp_path / "set" / "train.parquet")
    saved(QUESTIONS[:5], tmp_path / "set" / "test.parquet")
    data = HF(str(tmp_path / "set"), split="train[:10]", val_split="test", columns=COLUMNS, **cached)
    ready(data, tokenizer)
    assert (len(data.train_dataset), len(data.val_dataset)) == (10, 5)
    with pytest.raises(UserError, match="Unknown split .*dev.*train.*test"):
        HF(str(tmp_path / "set"), split="dev", columns=COLUMNS, **cached).prepare_data()


def test_what_save_to_disk_wrote_is_read(tmp_path, tokenizer):
    whole = datasets.Dataset.from_list(QUESTIONS)
    datasets.DatasetDict(train=whole, test=whole.select(range(3))).save_to_disk(tmp_path / "parts")
    whole.save_to_disk(tmp_path / "one")
    data = ready(HF(str(tmp_path / "parts"), val_split="test", columns=COLUMNS), tokenizer)
    assert (len(data.train_dataset), len(data.val_dataset)) == (20, 3)
    assert len(ready(HF(str(tmp_path / "one"), columns=COLUMNS, val_split_fraction=0.0), tokenizer).train_dataset) == 20
    for part, numbers in (("train[5:7]+test[:1]", [5, 6, 0]), ("train[-10%:]", [18, 19]), ("test", [0, 1, 2])):
        assert load_rows(str(tmp_path / "parts"), part)["unused"] == numbers
    with pytest.raises(UserError, match="cannot be read: Unrecognized"):
        load_rows(str(tmp_path / "parts"), "train[")
    with pytest.raises(UserError, match="has no part 'tests', but train, test. Did you mean 'test'?"):
        HF(str(tmp_path / "parts"), split="train[:2]+tests").prepare_data()


@pytest.mark.parametrize("kind", ["a.parquet", "folder"])
@pytest.mark.parametrize("option", ["name", "revision"])
def test_one_saved_table_has_no_configurations_and_no_versions(tmp_path, cached, kind, option):
    path = tmp_path / kind
    datasets.Dataset.from_list(QUESTIONS).save_to_disk(path) if kind == "folder" else saved(QUESTIONS, path)
    with pytest.raises(UserError, match=f"`{option}` 'x' has no meaning, for .*{kind} is a f.*Leave it out"):
        HF(str(path), columns=COLUMNS, **{option: "x"}, **cached).prepare_data()


@pytest.mark.parametrize(
    ("part", "val_part", "shared"),
    [
        ("train", "train", "train"),
        ("train+test", "test", "test"),
        ("train", "test + train[:10]", "train[:10]"),
        ("train[:10]+dev", "train[:10]", "train[:10]"),
    ],
)
def test_what_is_trained_on_is_not_validated_on(part, val_part, shared):
    with pytest.raises(UserError, match=f"share {re.escape(repr(shared))}, so it would be trained and validated on. Name another"):
        HF("x", split=part, val_split=val_part)
    HF("x", split="train[:90%]+dev", val_split="train[90%:]+test")


def test_messages_are_read_and_have_no_keys_that_only_other_messages_have(tmp_path, cached):
    file = saved([{"chat": CHAT}, {"chat": CALLING}], tmp_path / "a.parquet")
    train, _ = HF(file, columns={"messages": "chat"}, val_split_fraction=0.0, **cached).records()
    assert [record["messages"] for record in train] == [CHAT, CALLING]


def test_columns_with_the_usual_names_need_no_mapping(tmp_path, tokenizer, cached, caplog):
    rows = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    for number, row in enumerate(({"conversations": rows}, {"messages": CHAT}, {"instruction": "Hi", "input": "", "output": "Hello!"})):
        with caplog.at_level(logging.WARNING):
            data = ready(HF(saved([row] * 4, tmp_path / f"{number}.jsonl"), **cached), tokenizer)
        assert data.train_dataset.example(0) == ([{"role": "user", "content": "Hi"}], "Hello!")
        assert "validating on 0.05" in caplog.text and len(data.val_dataset) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"instruction": "qestion", "output": "answer"}}, "no column 'qestion'; there are .*Did you mean 'question'"),
        ({"columns": {"instrution": "question"}}, "names 'instrution'. Did you mean 'instruction'"),
        ({"columns": {"instruction": "question"}}, "record 1: The key `output` is missing"),
        ({"columns": {"instruction": "question", "output": "unused"}}, "record 1: `output` must be text, but is 0"),
        ({"columns": {"instruction": "question", "output": "empty"}}, "record 1: `output` must be text, but is None"),
        ({"val_split": "train", "val_split_fraction": 0.1}, "`val_split_fraction` has no meaning"),
    ],
)
def test_a_mistake_about_columns_and_parts_is_one_sentence(tmp_path, tokenizer, cached, options, message):
    file = saved(QUESTIONS, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        ready(HF(file, **{"val_split_fraction": 0.0} | options, **cached), tokenizer)


def test_without_the_usual_names_the_way_out_is_named(tmp_path, cached):
    with pytest.raises(UserError, match="Say which column holds what with `--data.columns`"):
        HF(saved([{"text": "a"}], tmp_path / "a.parquet"), **cached).prepare_data()


def test_a_file_that_is_none_is_one_sentence(tmp_path, cached):
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(UserError, match="The data set .*a.parquet cannot be read: .*") as caught:
        HF(str(tmp_path / "a.parquet"), **cached).prepare_data()
    assert "error occurred while generating" not in str(caught.value)
    (tmp_path / "a.csv").write_text("a,b\n007,None\n")  # which the reader of `datasets` takes for numbers and nothing
    with pytest.raises(UserError, match="a.csv is none of the files that data sets are read from: .json, .*Try `--data JSON`"):
        HF(str(tmp_path / "a.csv"), **cached).prepare_data()
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('code of the data set was run')")
    with pytest.raises(UserError, match="scripts are no longer supported.*refs/convert/parquet"):
        HF(str(tmp_path / "script"), **cached).prepare_data()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b"", "cannot be read: it has an empty file"),
        ("a.jsonl.gz", gzip.compress(b'{"instruction": "x", "output": "y"}')[:-12], "cannot be read: Compressed file ended"),
        ("a.jsonl.gz", gzip.compress(b'{"instruction": "x", "output": "y"}')[:10] + b"\xff" * 40, "cannot be read: Error -3 while decompr"),
    ],
    ids=["empty", "cut", "damaged"],
)
def test_a_file_that_is_not_whole_is_one_sentence(tmp_path, cached, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} {message}"):
        HF(str(tmp_path / name), **cached).prepare_data()


def test_an_empty_name_is_refused():
    with pytest.raises(UserError, match="`repo_id` is empty"):
        HF("")


def test_samples_stay_on_the_disk_until_they_are_asked_for():
    asked = []

    class Rows(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    table = Table(Rows({"n": i} for i in range(10)), "here", dict)
    train, val = table.split(0.2, seed=1)
    assert not asked and (len(train), len(val)) == (8, 2)
    assert sorted(record["n"] for part in (train, val) for record in part) == list(range(10))
    assert val[1].place == f"here, record {val[1]['n'] + 1}"
    with pytest.raises(UserError, match="^here: There is only 1 sample"):
        Table([{}], "here", dict).split(0.5, 1)


# The hub


class DataHandler(_Handler):
    """Serves folders as data sets, whose addresses are those of models with another beginning."""

    def _respond(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/?]+/?([^?]*)\?.*", self.path):
            self.hub.requests.append((self.command, self.path, None))
            folder, inner = self.hub.folder / match[1], unquote(match[2])
            found = sorted((folder / inner).iterdir()) if (folder / inner).is_dir() else []
            kinds = {True: "directory", False: "file"}
            rows = [{"type": kinds[f.is_dir()], "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": f.name} for f in found]
            self._json(rows) if found else self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            super()._respond()


def ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packages ask another hub, whose address they read when they were imported."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", url + "/datasets/{repo_id}/resolve/{revision}/{path}")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubServer]:
    """A hub with three data sets: `org/questions`, `org/scripted`, and `org/gated`, which wants the token `secret`."""
    for part, n in (("train", 8), ("test", 2)):
        saved(QUESTIONS[:n], tmp_path / "hub/org/questions/data" / f"{part}-00000-of-00001.parquet")
    saved([{"conversations": ["Hi", "Hello!"]}] * 4, tmp_path / "hub/org/gated/train.jsonl")
    (tmp_path / "hub/org/scripted").mkdir()
    (tmp_path / "hub/org/scripted/scripted.py").write_text("raise SystemExit('code of the data set was run')")
    for name in ("questions", "gated", "scripted"):
        (tmp_path / "hub/org" / name / "README.md").write_text("---\nlicense: mit\n---\n")
    hub = HubServer(tmp_path / "hub", tokens={"org/gated": "secret"})
    hub._server.RequestHandlerClass = type("Handler", (DataHandler,), {"hub": hub})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts to reach it
    ask(hub.url, monkeypatch)
    with hub:
        yield hub


def test_a_data_set_of_the_hub_is_downloaded_once(tokenizer, cached, hub):
    for _ in range(2):
        data = ready(HF("org/questions", val_split="test", columns=COLUMNS, **cached), tokenizer)
        assert (len(data.train_dataset), len(data.val_dataset)) == (8, 2)
    assert len(hub.downloads("train-00000-of-00001.parquet")) == 1


def test_without_the_hub_what_was_downloaded_is_enough(cached, hub, monkeypatch):
    data = HF("org/questions", val_split="test", columns=COLUMNS, **cached)
    data.prepare_data()
    ask("http://127.0.0.1:1", monkeypatch)  # where nobody answers
    assert len(data.records()[0]) == 8
    with pytest.raises(
        UserError, match="org/other cannot be fetched from the hub: .* Check the network, or download it elsewhere and name"
    ):
        load_rows("org/other", "train")
    with pytest.raises(UserError, match="org/lima cannot be fetched from the hub: .* Check the network"):
        LIMA(repo_id="org/lima").prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "org/none"}, "^There is no file or folder org/none, and no such data set on the hub that is open to all."),
        ({"repo_id": "../none"}, "^The data set ../none cannot be read|^There is no file or folder ../none"),
        ({"repo_id": "org/gated"}, "^org/gated is gated: .*https://huggingface.co/datasets/org/gated.*HF_TOKEN.*`--data.access_token`"),
        ({"repo_id": "org/questions", "split": "dev"}, 'Unknown split "dev". Should be one of .*train.*test'),
        ({"repo_id": "org/questions", "name": "large"}, "'large' not found. Available: .*default"),
        ({"repo_id": "org/scripted"}, "scripts are no longer supported.*refs/convert/parquet"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(cached, hub, options, message):
    with pytest.raises(UserError, match=message) as caught:
        HF(**options, columns=COLUMNS, **cached).prepare_data()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [None, "of somebody else"])
def test_lima_is_for_those_who_have_access(hub, token):
    with pytest.raises(UserError, match="^org/gated is gated: .*HF_TOKEN"):
        LIMA(repo_id="org/gated", access_token=token and token.replace(" ", "-")).prepare_data()
    train, val = LIMA(repo_id="org/gated", access_token="secret", val_split_fraction=0.25).records()
    assert (len(train), len(val)) == (3, 1) and train[0]["messages"] == CHAT


def test_a_token_works_and_is_not_written_down(cached, hub):
    data = HF("org/gated", access_token="secret", columns={"messages": "conversations"}, **cached)
    data.prepare_data()
    assert "secret" not in yaml.safe_dump(to_plain(data)) and "secret" not in repr(data)
    assert to_plain(LIMA(access_token="secret"))["init_args"]["access_token"] is None
