"""Lightning's Trainer around an `LLM`: the example of `examples/`."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from speaking import make_checkpoint

from litgpt.api import LLM

EXAMPLE = Path(__file__).parents[1] / "examples" / "lightning_trainer.py"
PAIRS = [{"instruction": f"What does the {animal} eat?", "output": "Grass and hay."} for animal in ("llama", "fox", "owl", "hare") * 6]
QUIET = dict(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("lightning_trainer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("trainer") / "model")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(PAIRS))
    return tmp_path / "data.json"


@pytest.mark.filterwarnings("ignore")
def test_the_example_trains_answers_and_reads_its_checkpoint_again(example, folder, data, tmp_path):
    module = example.Finetuned(folder, lr=1e-3)
    assert module.llm.model is None
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="end")
    trainer = example.finetune(module, data, max_steps=2, callbacks=[saver], **QUIET)
    assert trainer.global_step == 2
    llm = module.llm
    before = LLM.load(folder, distribute=None)
    before.trainer_setup()
    assert not torch.equal(llm.model.lm_head.weight, before.model.lm_head.weight)
    assert trainer.callback_metrics["train_loss"] > 0
    llm.model.to(llm.preprocessor.device)
    answer = llm.generate("Hello", max_new_tokens=10, temperature=0.0)

    again = example.Finetuned(folder, tmp_path / "checkpoints" / "end.ckpt")
    again.setup("fit")
    assert all(torch.equal(tensor, llm.state_dict()[name]) for name, tensor in again.llm.state_dict().items())
    again.llm.distribute(precision="32-true")
    assert again.llm.generate("Hello", max_new_tokens=10, temperature=0.0) == answer
    llm.save(tmp_path / "saved")
    saved = LLM.load(tmp_path / "saved", distribute=None)
    saved.distribute(precision="32-true")
    assert saved.generate("Hello", max_new_tokens=10, temperature=0.0) == answer


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_itself_goes_on_from_its_checkpoint(example, folder, data, tmp_path):
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="end")
    first = example.Finetuned(folder, lr=1e-3)
    example.finetune(first, data, max_steps=1, callbacks=[saver], **QUIET)
    resumed = example.Finetuned(folder, lr=1e-3)
    resumed.setup("fit")
    trainer = Trainer(max_steps=1, accumulate_grad_batches=4, **QUIET)
    samples = example.JSON(data, val_split_fraction=0.1)
    samples.connect(resumed.llm.tokenizer, batch_size=2, max_seq_length=256)
    trainer.fit(resumed, samples, ckpt_path=tmp_path / "checkpoints" / "end.ckpt")
    assert all(torch.equal(tensor, first.llm.state_dict()[name]) for name, tensor in resumed.llm.state_dict().items())


def test_the_example_is_a_command(example, folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "Trainer", lambda **options: Trainer(**options, max_steps=1, **QUIET))
    example.main(str(folder), str(data))
    assert len(capsys.readouterr().out) > 1
    assert LLM.load("out/with-trainer", distribute=None).config.n_layer == 2
