"""Finetuning with updates of experts, from the command to what it leaves."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from speaking import make_tokenizer
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from litgpt import cli
from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.model import GPT


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    vocab = make_tokenizer(tmp_path / "tokenizer", None)
    config = tiny_config("qwen2_moe", vocab_size=vocab, padded_vocab_size=vocab, block_size=256)
    write_checkpoint(tmp_path / "base", GPT(config).state_dict(), config, source=tmp_path / "tokenizer")
    return tmp_path / "base"


@pytest.fixture
def command(base: Path, tmp_path: Path):
    (tmp_path / "samples.json").write_text(json.dumps([{"instruction": f"Say {i}", "output": "yes " * (1 + i % 5)} for i in range(20)]))
    given = dict(data="JSON", out_dir=tmp_path / "out", precision="32-true", lora_mlp=True, lora_r=2)
    given |= {"data.json_path": tmp_path / "samples.json", "data.val_split_fraction": 0.1, "optimizer.lr": 0.05}
    given |= {"train.global_batch_size": 4, "train.micro_batch_size": 2, "train.max_steps": 4, "train.save_interval": 2}
    given |= {"eval.interval": 100, "eval.max_new_tokens": "null", "eval.final_validation": False}

    def command(**more: object) -> int:
        words = [word for name, value in (given | more).items() for word in (f"--{name}", str(value))]
        return cli.main(["finetune_lora", str(base), *words])

    return command


def test_a_run_leaves_the_merged_model_an_adapter_for_peft_and_steps_that_merge_and_resume(command, base: Path, tmp_path: Path, capsys):
    assert command(lora_dropout=0.0) == 0
    out, idx = tmp_path / "out", torch.arange(3, 43).view(2, 20)
    tuned = load_model(out / "final")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = theirs(idx).logits
    adapted = PeftModel.from_pretrained(theirs, str(out / "final" / "adapter")).eval()
    torch.testing.assert_close(adapted(idx).logits, tuned(idx), rtol=0, atol=2e-5)
    assert (tuned(idx) - plain).abs().max() > 1e-3
    assert cli.main(["merge_lora", str(out / "step-000004")]) == 0
    torch.testing.assert_close(load_model(out / "step-000004")(idx), tuned(idx), rtol=0, atol=1e-6)
    assert command(lora_dropout=0.0, out_dir=tmp_path / "again", resume=out / "step-000002") == 0
    torch.testing.assert_close(load_model(tmp_path / "again" / "final")(idx), tuned(idx), rtol=0, atol=1e-6)


def test_dropout_is_refused_in_one_line(command, capsys):
    assert command() == 2
    error = capsys.readouterr().err.strip()
    assert "`lora_dropout` is 0 where `lora_mlp` updates experts, but got 0.05" in error and "\n" not in error
