"""What is asked of the hub, and what happens when it does not answer as hoped."""

import errno
import json
import re

import pytest
from hub_server import HubServer, commit

from litgpt import hub
from litgpt.errors import UserError
from litgpt.files import indexed_files
from litgpt.hub import NotOnHub, find_repository
from litgpt.weight_files import hf_weight_files

WEIGHTS = bytes(range(256)) * 2000  # half a megabyte


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with the repositories org/open and, behind a gate, org/gated; nobody waits between attempts."""
    monkeypatch.setattr(hub, "PAUSES", (0, 0))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("open", "gated"):
        (tmp_path / "hub" / "org" / name).mkdir(parents=True)
        (tmp_path / "hub" / "org" / name / "model.safetensors").write_bytes(WEIGHTS)
        (tmp_path / "hub" / "org" / name / "config.json").write_text("{}")
    with HubServer(tmp_path / "hub", tokens={"org/gated": "good"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_look_up_says_what_a_repository_holds(server, tmp_path):
    (tmp_path / "hub" / "org" / "open" / "original").mkdir()
    (tmp_path / "hub" / "org" / "open" / "original" / "consolidated.00.pth").write_bytes(b"x")
    repository = find_repository("org/open")
    assert repository.sizes == {"model.safetensors": len(WEIGHTS), "config.json": 2}
    assert repository.revision == commit("org/open")


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "training_args.bin"], ["model.safetensors"]),
        (
            ["a-1.safetensors", "a-2.safetensors", "pytorch_model.bin", "consolidated.safetensors", "model.safetensors.index.json"],
            ["model.safetensors.index.json", "a-1.safetensors", "a-2.safetensors"],
        ),
        (["pytorch_model.bin", "training_args.bin", "optimizer.bin"], ["pytorch_model.bin"]),
        (["b-1.bin", "b-2.bin", "pytorch_model.bin.index.json"], ["pytorch_model.bin.index.json", "b-1.bin", "b-2.bin"]),
        (["weights.safetensors", "adapter_model.safetensors", "x.bin"], ["weights.safetensors"]),
    ],
)
def test_one_set_of_weights_is_chosen_and_safetensors_go_first(server, tmp_path, files, chosen):
    folder = tmp_path / "hub" / "org" / "many"
    folder.mkdir()
    for name in files:
        shards = [file for file in files if file.startswith("a-" if "safetensors" in name else "b-")]
        (folder / name).write_text('{"weight_map": {' + ", ".join(f'"w{file}": "{file}"' for file in shards) + "}}")
    assert find_repository("org/many").weight_files(tmp_path / "out") == chosen


def test_a_repository_without_weights_is_refused(server, tmp_path):
    (tmp_path / "hub" / "org" / "open" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="org/open on the hub holds no weights that can be read"):
        find_repository("org/open").weight_files(tmp_path / "out")


@pytest.mark.parametrize("index", ["not json", "[]", '{"weight_map": ["w"]}', '{"weight_map": {"w": "../../secret.safetensors"}}'])
def test_a_bad_index_of_weights_is_refused(server, tmp_path, index):
    (tmp_path / "hub" / "org" / "open" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="model.safetensors.index.json"):
        find_repository("org/open").weight_files(tmp_path / "out")
    with pytest.raises(UserError, match="model.safetensors.index.json"):
        hf_weight_files(tmp_path / "hub" / "org" / "open")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/secret.bin", "a/b.bin", "..", ".", "", 1, None, ["a.bin"]])
def test_an_entry_of_an_index_that_is_no_bare_file_name_is_refused_by_both_readers(tmp_path, name):
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = tmp_path / file
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        for read in (lambda index=index: indexed_files(index), lambda index=index: hf_weight_files(index.parent)):
            with pytest.raises(UserError, match=re.escape(f"{index} names {name!r}, but may only name files that lie beside it")):
                read()
        index.unlink()


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(server, tmp_path):
    server.cut_after = 100_000
    file = find_repository("org/open").fetch("model.safetensors", tmp_path / "out")
    assert file.read_bytes() == WEIGHTS
    assert server.downloads("model.safetensors") == [None, *(f"bytes={n}00000-" for n in range(1, 6))]


def test_the_next_run_goes_on_where_the_last_one_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PAUSES", ())
    repository, server.cut_after, append = find_repository("org/open"), 100_000, hub.Repository._append

    def stop_at_second(self, *arguments):
        if len(server.downloads("model.safetensors")) == 2:
            raise KeyboardInterrupt
        append(self, *arguments)

    monkeypatch.setattr(hub.Repository, "_append", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        repository.fetch("model.safetensors", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(hub.Repository, "_append", append)
    server.cut_after = None
    assert find_repository("org/open").fetch("model.safetensors", tmp_path / "out").read_bytes() == WEIGHTS
    assert server.downloads("model.safetensors") == [None, "bytes=100000-", "bytes=200000-"]
    find_repository("org/open").fetch("model.safetensors", tmp_path / "out")
    assert len(server.downloads("model.safetensors")) == 3, "a complete file is not downloaded again"


def test_a_server_that_gives_only_whole_files_starts_anew(server, tmp_path):
    server.cut_after, server.cuts, server.ranges = 100_000, 1, False
    assert find_repository("org/open").fetch("model.safetensors", tmp_path / "out").read_bytes() == WEIGHTS


def test_parts_of_another_version_are_not_used(server, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / hub.COMMIT).write_text("an older one")
    (out / "model.safetensors.tmp").write_bytes(b"old" * 1000)
    (out / "config.json").write_text("old")
    assert find_repository("org/open").fetch("model.safetensors", out).read_bytes() == WEIGHTS
    assert not (out / "config.json").exists()


def test_a_busy_hub_is_asked_again(server, tmp_path):
    server.failures = 2
    assert find_repository("org/open").fetch("model.safetensors", tmp_path / "out").read_bytes() == WEIGHTS
    server.failures = 10
    with pytest.raises(UserError, match="the hub answered with status 503. Run the same command again"):
        find_repository("org/open").fetch("config.json", tmp_path / "out")


def test_a_connection_that_always_breaks_ends_in_one_sentence(server, tmp_path):
    server.cut_after = 0
    with pytest.raises(UserError, match="The download of model.safetensors from org/open failed: the connection broke") as error:
        find_repository("org/open").fetch("model.safetensors", tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert not isinstance(error.value, NotOnHub), "it is there, only the way is broken"


def test_a_missing_repository_is_named(server):
    with pytest.raises(NotOnHub, match="There is no 'org/missing' on the hub, or it is private and needs an access token"):
        find_repository("org/missing")
    with pytest.raises(NotOnHub, match="this token has no rights"):
        find_repository("org/missing", "good")
    with pytest.raises(NotOnHub, match="There is no 'org/a--b' on the hub"):
        find_repository("org/a--b")


def test_a_gate_says_how_to_get_through_it(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="huggingface.co/org/gated, make a token .* HF_TOKEN or pass it as --access_token"):
        find_repository("org/gated").fetch("config.json", tmp_path / "out")
    with pytest.raises(UserError, match="this access token has no rights to it. Ask for access on https://huggingface.co/org/gated"):
        find_repository("org/gated", "bad").fetch("config.json", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing came, so nothing is left"
    assert find_repository("org/gated", "good").fetch("config.json", tmp_path / "out").read_text() == "{}"
    monkeypatch.setenv("HF_TOKEN", "good")
    assert find_repository("org/gated").fetch("config.json", tmp_path / "more").read_text() == "{}"


def test_a_token_that_the_hub_does_not_know_is_named(server):
    with pytest.raises(UserError, match="The hub refused the access token"):
        find_repository("org/open", "refused")


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotOnHub, match="Looking for org/open on the hub failed: the connection broke or was refused") as error:
        find_repository("org/open")
    assert len(str(error.value).splitlines()) == 1


def test_a_full_disk_is_one_sentence_and_keeps_what_is_there(server, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub.Repository, "_append", full)
    with pytest.raises(UserError, match="model.safetensors from org/open failed: the disk is full"):
        find_repository("org/open").fetch("model.safetensors", tmp_path / "out")


def test_a_download_larger_than_the_disk_is_refused_before_it_begins(tmp_path):
    hub.check_space(tmp_path / "new" / "folder", 1000)
    with pytest.raises(UserError, match=r"needs 1000000\.0 GB, but the disk of"):
        hub.check_space(tmp_path / "new" / "folder", 10**15)


def test_progress_is_flat_lines_where_nobody_watches(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "SECONDS_BETWEEN_LINES", -1)
    find_repository("org/open").fetch("model.safetensors", tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "model.safetensors: 512 kB"
    assert lines[-2] == "model.safetensors: 512 kB of 512 kB (100%)"
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_progress_is_a_bar_on_a_terminal(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    find_repository("org/open").fetch("model.safetensors", tmp_path / "out")
    shown = capsys.readouterr().err
    assert "━" in shown and "\x1b" in shown


@pytest.mark.parametrize("token", ["hf_schlüssel", "hf_a b", "hf_a\n", "\u200bhf_abc"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_repeated(server, monkeypatch, token):
    with pytest.raises(UserError, match="The access token holds characters that no token has") as error:
        find_repository("org/open", token)
    assert token not in str(error.value) and not server.requests
    monkeypatch.setenv("HF_TOKEN", "hf_schlüssel")
    with pytest.raises(UserError, match="Copy it again into HF_TOKEN"):
        find_repository("org/open")


def test_a_folder_that_no_download_made_is_not_emptied_for_one(server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(UserError, match="out is in the way"):
        find_repository("org/open").fetch("config.json", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_saved_token_that_may_not_be_read_is_one_sentence(server, monkeypatch):
    def unreadable():
        raise PermissionError(errno.EACCES, "Permission denied", "token")

    monkeypatch.setattr(hub, "get_token", unreadable)
    with pytest.raises(UserError, match="was saved on this machine cannot be read .*Permission denied.* HF_TOKEN"):
        find_repository("org/open")
    assert find_repository("org/open", "hf_mine").id == "org/open"
