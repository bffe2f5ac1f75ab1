"""`LLM.load` of everything that holds a model."""

import os
import shutil

import pytest
import torch
import yaml
from gguf_files import write_gguf
from hub_server import HubServer
from speaking import make_checkpoint
from transformers import AutoModelForCausalLM

from litgpt.api import LLM
from litgpt.config import Config
from litgpt.model import GPT

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("load") / "model")


@pytest.fixture(scope="module")
def expected(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def loaded(model, **kwargs):
    llm = LLM.load(model, distribute=None, **kwargs)
    llm.distribute(precision="32-true")
    return llm


def as_litgpt(folder, target):
    """Write the model in LitGPT's layout, tokenizer included."""
    llm = loaded(folder)
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, target / name)
    torch.save(llm.model.state_dict(), target / "lit_model.pth")
    (target / "model_config.yaml").write_text(yaml.safe_dump(Config.from_checkpoint(folder).to_litgpt()))
    return target


def test_a_folder_of_hugging_faces_one_of_litgpts_and_a_name_below_checkpoints_are_one_model(folder, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "checkpoints/org/model")
    answers = set()
    for model in (folder, str(folder), as_litgpt(folder, tmp_path / "lit"), "org/model", "checkpoints/org/model"):
        llm = loaded(model)
        with torch.no_grad():
            torch.testing.assert_close(llm(IDS), expected, rtol=0, atol=1e-5)
        answers.add(llm.generate("Hello", temperature=0.0, max_new_tokens=12, top_k=None))
    assert len(answers) == 1


def test_a_name_on_the_hub_is_downloaded_once(folder, expected, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "hub" / "someone" / "something")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        llm = loaded("someone/something")
        n_requests = len(server.requests)
        again = loaded("someone/something")
        assert len(server.requests) == n_requests
    for each in (llm, again):
        with torch.no_grad():
            torch.testing.assert_close(each(IDS), expected, rtol=0, atol=1e-5)
    assert os.path.isdir("checkpoints/someone/something")


def test_a_gguf_file_is_a_model(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    llm = loaded(file)
    assert isinstance(llm.model, GPT)
    answer = llm.generate("The quick", max_new_tokens=8, temperature=0.0)
    llm.save(tmp_path / "saved")
    assert loaded(tmp_path / "saved").generate("The quick", max_new_tokens=8, temperature=0.0) == answer
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(llm(IDS), theirs, rtol=0, atol=1e-5)


def test_random_weights_differ_with_torchs_seed_and_have_the_shape_that_the_name_says(folder):
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(LLM.load("pythia-14m", init="random", tokenizer_dir=folder).state_dict()["lm_head.weight"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].shape == (Config.from_name("pythia-14m").padded_vocab_size, Config.from_name("pythia-14m").n_embd)


def test_a_loaded_model_is_ready_on_this_machines_device_in_its_fast_type(folder):
    llm = LLM.load(folder)
    assert not llm.model.training
    assert llm.preprocessor.device == next(llm.parameters()).device
    assert llm.generate("Hello", max_new_tokens=3) is not None
    assert LLM.load(folder, distribute=None).model is None
