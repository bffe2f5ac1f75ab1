"""LoRA's variants from the command to what a run leaves: steps that resume and merge, the merged model, and an adapter for PEFT."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from speaking import make_tokenizer
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from litgpt import cli, names
from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.model import GPT

VARIANTS = {
    "dora of q and v": ("phi3", dict(lora_dora=True, lora_rslora=True, lora_dropout=0.1)),
    "all-linear with experts": ("qwen2_moe", dict(lora_targets="all-linear", lora_dropout=0.0, lora_plus_ratio=4)),
}


@pytest.fixture
def command(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    vocab = make_tokenizer(tmp_path / "tokenizer", None)
    (tmp_path / "samples.json").write_text(json.dumps([{"instruction": f"Say {i}", "output": "yes " * (1 + i % 5)} for i in range(20)]))
    given = dict(data="JSON", out_dir=tmp_path / "out", precision="32-true", lora_r=2)
    given |= {"data.json_path": tmp_path / "samples.json", "data.val_split_fraction": 0.1, "optimizer.lr": 0.05}
    given |= {"train.global_batch_size": 4, "train.micro_batch_size": 2, "train.max_steps": 4, "train.save_interval": 2}
    given |= {"eval.interval": 100, "eval.max_new_tokens": "null", "eval.final_validation": False}

    def command(model_type=None, **more):
        if model_type is not None:
            config = tiny_config(model_type, vocab_size=vocab, padded_vocab_size=vocab, block_size=256)
            write_checkpoint(tmp_path / "base", GPT(config).state_dict(), config, source=tmp_path / "tokenizer")
        words = [word for name, value in (given | more).items() for word in (f"--{name}", str(value))]
        return cli.main(["finetune_lora", str(tmp_path / "base"), *words])

    return command


@pytest.mark.parametrize("model_type, options", VARIANTS.values(), ids=VARIANTS)
def test_a_run_leaves_what_merges_resumes_and_is_read_by_peft(model_type, options, command, tmp_path):
    assert command(model_type, **options) == 0
    out, idx = tmp_path / "out", torch.arange(3, 43).view(2, 20)
    tuned = load_model(out / "final")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = theirs(idx).logits
    adapted = PeftModel.from_pretrained(theirs, str(out / "final" / "adapter")).eval()
    torch.testing.assert_close(adapted(idx).logits, tuned(idx), rtol=0, atol=2e-5)
    assert (tuned(idx) - plain).abs().max() > 1e-3
    said = yaml.safe_load((out / "final" / names.HYPERPARAMETERS).read_text())
    assert {name: said[name] for name in options} == options
    assert command(**options, out_dir=tmp_path / "again", resume=out / "step-000002") == 0
    torch.testing.assert_close(load_model(tmp_path / "again" / "final").state_dict(), tuned.state_dict(), rtol=0, atol=0)
    assert cli.main(["merge_lora", str(out / "step-000004")]) == 0
    torch.testing.assert_close(load_model(out / "step-000004")(idx), tuned(idx), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lora_targets="all-linear", lora_query=False), "`lora_targets` all-linear contradicts `lora_query` false"),
        (dict(lora_plus_ratio=-1), "`lora_plus_ratio` multiplies a learning rate and is above 0, but got -1"),
    ],
)
def test_contradictions_are_refused_in_one_line(options, message, command, capsys):
    assert command("llama", **options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
