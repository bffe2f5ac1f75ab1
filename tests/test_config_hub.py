"""Every recipe in `config_hub/finetune`: short, for a model we know, and a dry run of it passes on that architecture with two layers."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from speaking import make_tokenizer

from litgpt import cli
from litgpt.checkpoint import write_config
from litgpt.config import Config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "config_hub" / "finetune").glob("*/*.yaml"))
COMMANDS = {"full": "finetune_full", "lora": "finetune_lora", "qlora": "finetune"}
MODELS = """falcon-7b gemma-2b gemma-7b gemma2-2b gemma2-9b llama-2-7b llama-3-8b llama-3.1-8b llama-3.2-1B llama-3.2-3B mistral-7b
mistral-7b-v0.2 phi-2 phi-3 stablelm-base-alpha-3b tiny-llama""".split()  # whose recipes' addresses are known to users of LitGPT


def name_of(recipe: Path) -> str:
    return f"{recipe.parent.name}/{recipe.stem}"


def test_there_are_recipes_for_the_models_that_litgpt_has_some_for():
    there = {recipe.parent.name for recipe in RECIPES}
    assert set(MODELS) <= there
    for model in there:
        assert {"lora", "qlora"} <= {recipe.stem for recipe in RECIPES if recipe.parent.name == model}


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_is_short_and_begins_with_what_it_does(recipe: Path):
    lines = recipe.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 25
    assert yaml.safe_load(recipe.read_text())["out_dir"] == f"out/finetune/{recipe.stem}-{recipe.parent.name}"


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set on the disk in the place of the hub's."""
    file = tmp_path_factory.mktemp("alpaca") / "train.jsonl"
    records = [{"instruction": f"Say {i}", "input": "", "output": "yes " * (1 + i % 5), "text": ""} for i in range(6)]
    file.write_text("\n".join(map(json.dumps, records)))
    return file.parent


@pytest.mark.filterwarnings("ignore:The learning rate rises in all")  # there are few samples here
@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_dry_run_of_a_recipe_passes(recipe: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    config = Config.from_name(yaml.safe_load(recipe.read_text())["checkpoint_dir"], n_layer=2)
    make_tokenizer(tmp_path / "base")
    write_config(tmp_path / "base", config, None, torch.bfloat16)
    words = ["--config", recipe, "--checkpoint_dir", tmp_path / "base", "--out_dir", tmp_path / "out", "--dry_run", "true"]
    assert cli.main([COMMANDS[recipe.stem], *map(str, words), "--data.repo_id", str(instructions)]) == 0
    said = capsys.readouterr().out
    assert "optimizer" in said and "steps" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("older", [True, False], ids=["of 2024, with the optimizer under train", "with optimizer.init_args"])
def test_recipes_as_litgpt_writes_them_load_unchanged(older: bool, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_tokenizer(tmp_path / "base")
    write_config(tmp_path / "base", Config.from_name("Llama-3.2-1B", n_layer=2), None, torch.bfloat16)
    of_data = dict(mask_prompt=False, val_split_fraction=0.05, prompt_style="alpaca", ignore_index=-100, seed=42, num_workers=4)
    limits = dict(max_tokens=None, max_steps=None, max_norm=None, tie_embeddings=None, min_lr=6e-5, epochs=2, max_seq_length=64)
    of_adamw = dict(lr=3e-4, weight_decay=0.02, betas=[0.8, 0.95])
    now = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": of_adamw}}
    then = dict(learning_rate=3e-4, weight_decay=0.02, beta1=0.8, beta2=0.95)
    recipe = {
        "checkpoint_dir": str(tmp_path / "base"),
        **dict(out_dir=str(tmp_path / "out"), precision="bf16-true", quantize="bnb.nf4", lora_r=8, lora_head=False, logger_name="csv"),
        "data": {"class_path": "litgpt.data.Alpaca2k", "init_args": of_data | {"download_dir": "data/alpaca2k"}},
        "train": dict(save_interval=200, global_batch_size=8, micro_batch_size=2, lr_warmup_steps=1) | limits | (then if older else {}),
        **({} if older else now),
    }
    (file := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["finetune", "--config", str(file), "--print_config"]) == 0
    read = yaml.safe_load(capsys.readouterr().out)
    assert {key: read["optimizer"][key] for key in of_adamw} == of_adamw
    assert cli.main(["finetune", "--data.repo_id", str(instructions), "--config", str(file), "--dry_run", "true"]) == 0
    assert "steps" in capsys.readouterr().out
