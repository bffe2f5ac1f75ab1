"""`evaluate` and `perplexity` of what was trained beside a model: the numbers are those of the model that holds it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import vocabularies
import yaml
from eval.test_evaluate import numbers, only_tasks_of_the_folder  # noqa: F401
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from safetensors.torch import save_file
from tasks import TEXTS
from tiny import tiny_config
from torch import nn

from litgpt import names
from litgpt.adapter_v2 import adapter_filter, add_adapter_v2
from litgpt.checkpoint import load_model, write_adapter, write_checkpoint
from litgpt.eval.evaluate import convert_and_evaluate
from litgpt.eval.harness import as_lm
from litgpt.eval.perplexity import main, perplexity
from litgpt.generate.run import Speaker
from litgpt.lora import LoRA, add_lora, lora_filter, merge_lora_weights
from litgpt.model import GPT
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer

NAMES = "both,write"
SETTINGS = LoRA(r=2, dropout=0.0, mlp=True, head=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("base")
    config = tiny_config("llama", n_layer=3, vocab_size=640, padded_vocab_size=640)  # Adapter's prefixes begin in the third layer
    tokenizer = vocabularies.write(place / "tokenizer", "byte_level")
    model = GPT(config)
    stir(model, lambda name, parameter: True)
    write_checkpoint(place / "model", model.state_dict(), config, source=tokenizer)
    return place / "model"


def stir(model: GPT, chosen) -> None:
    """Let parameters be far from what they begin as."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if chosen(name, parameter):
            nn.init.normal_(parameter.data, 1.0 if parameter.ndim == 1 else 0.0, 0.3)


def write_lora(base: Path, folder: Path) -> GPT:
    model = load_model(base)
    add_lora(model, SETTINGS)
    stir(model, lora_filter)
    write_adapter(folder, model, SETTINGS, str(base))
    merge_lora_weights(model)
    return model


def write_adapter_v2(base: Path, folder: Path) -> GPT:
    model = load_model(base)
    add_adapter_v2(model)
    stir(model, adapter_filter)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    trained = {name: parameter.data for name, parameter in model.named_parameters() if adapter_filter(name, parameter)}
    save_file(trained, folder / names.OWN_ADAPTER)
    (folder / names.OWN_ADAPTER_BASE).write_text(yaml.safe_dump({"checkpoint_dir": str(base)}))
    return model.eval()


@pytest.fixture(scope="module", params=[write_lora, write_adapter_v2], ids=["LoRA", "Adapter v2"])
def trained(request, base, tmp_path_factory) -> tuple[Path, Speaker]:
    """The folder of what was trained, and the model that holds it."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model = request.param(base, folder)
    return folder, Speaker(base, model, Tokenizer(base), Default())


def test_evaluate_measures_the_model_that_holds_what_was_trained(trained, base, tasks, tmp_path):
    folder, whole = trained
    manager = TaskManager(include_path=str(tasks))
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 1234)
    lm = as_lm(whole, 2)
    expected = simple_evaluate(lm, tasks=NAMES.split(","), task_manager=manager, log_samples=False, bootstrap_iters=0, **seeds)
    file = tmp_path / "results.json"
    for options in (dict(checkpoint_dir=folder), dict(checkpoint_dir=base, adapter=folder)):
        convert_and_evaluate(tasks=NAMES, include_path=tasks, dtype="float32", batch_size=2, save_filepath=file, **options)
        assert numbers(json.loads(file.read_text())) == pytest.approx(numbers(expected), rel=1e-5)


def test_perplexity_measures_the_model_that_holds_what_was_trained(trained, base, tmp_path):
    folder, whole = trained
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    file, found = tmp_path / "found.json", []
    for options in (dict(checkpoint_dir=folder), dict(checkpoint_dir=base, adapter=folder), dict(checkpoint_dir=base)):
        main(data=tmp_path / "texts.json", dtype="float32", save_filepath=file, **options)
        found.append(json.loads(file.read_text())["nll"])
    assert found[:2] == pytest.approx([perplexity(whole, TEXTS).nll] * 2, rel=1e-5)
    assert abs(found[0] - found[2]) > 10, "what was trained changes something"
