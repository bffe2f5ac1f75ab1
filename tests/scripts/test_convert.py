import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from oracle import pair
from peft import LoraConfig, get_peft_model
from tiny import facts, tiny_config
from transformers import AutoModelForCausalLM

from litgpt import cli, names
from litgpt.checkpoint import find_adapter, load_model, write_adapter, write_checkpoint
from litgpt.families import FAMILIES
from litgpt.hardware import PRODUCTS
from litgpt.lora import LoRA, LoRALinear, add_lora, merge_lora_weights
from litgpt.model import GPT
from litgpt.scripts.merge_lora import merge_lora


def checkpoint(path, family="llama", **changes):
    """A complete checkpoint directory that transformers wrote, with a tokenizer."""
    from tokenizers import Tokenizer, models

    config = tiny_config(family, **changes)
    ours, theirs = pair(config)
    theirs.save_pretrained(path)
    Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(dict(bos_token="<s>", eos_token="</s>")))
    return ours, theirs


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if facts(name).IN_LITGPT])
@torch.no_grad()
def test_a_checkpoint_goes_to_litgpts_layout_and_back_with_equal_weights(model_type, tmp_path):
    source, lit, back = tmp_path / tiny_config(model_type).name, tmp_path / "lit", tmp_path / "back"  # LitGPT looks at the name
    _, theirs = checkpoint(source, model_type)
    assert cli.main(["convert_to_litgpt", str(source)]) == 0
    lit.mkdir()
    for name in ("lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
        (source / name).rename(lit / name)
    fields = yaml.safe_load((lit / "model_config.yaml").read_text())
    assert fields["n_embd"] == 32 and "family" not in fields and "tie_embeddings" not in fields
    assert cli.main(["convert_from_litgpt", str(lit), str(back)]) == 0
    again = AutoModelForCausalLM.from_pretrained(back)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (back / "tokenizer.json").is_file()


def test_the_dtype_of_litgpts_weights_is_as_asked(tmp_path):
    checkpoint(tmp_path)
    assert cli.main(["convert_to_litgpt", str(tmp_path), "--dtype", "bfloat16"]) == 0
    assert {t.dtype for t in torch.load(tmp_path / "lit_model.pth", weights_only=True).values()} == {torch.bfloat16}


def test_wrong_arguments_are_one_line_and_exit_code_2(tmp_path, capsys):
    checkpoint(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    capsys.readouterr()
    for argv in (
        ["convert_to_litgpt", str(tmp_path / "source"), "--dtype", "float99"],
        ["convert_from_litgpt", str(tmp_path / "source"), str(tmp_path / "full")],
        ["convert_from_litgpt", str(tmp_path / "nowhere"), str(tmp_path / "out")],
        ["merge_lora", str(tmp_path / "nowhere")],
        ["merge_lora", str(tmp_path / "full")],
    ):
        assert cli.main(argv) == 2, argv
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


SETTINGS = LoRA(r=2, alpha=4, dropout=0.0, key=True, mlp=True)


def tuned(model):
    add_lora(model, SETTINGS)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
    options = dict(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_query=True, lora_key=True, lora_value=True, lora_mlp=True)
    return model.eval(), options


@torch.no_grad()
@pytest.mark.parametrize("moved", [False, True], ids=["base where it was", "base moved"])
def test_merging_litgpts_lora_files_makes_a_folder_that_transformers_loads(moved, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "run"
    model, _ = checkpoint(base)
    model, options = tuned(model)
    folder.mkdir()
    torch.save({"model": {n: t for n, t in model.state_dict().items() if "lora_" in n}}, folder / "lit_model.pth.lora")
    named = tmp_path / "was here" if moved else base
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(dict(checkpoint_dir=str(named), **options)))
    more = ["--pretrained_checkpoint_dir", str(base)] if moved else []
    if moved:
        assert cli.main(["merge_lora", str(folder)]) == 2, "the base is not where the run left it"
    assert cli.main(["merge_lora", str(folder), *more]) == 0
    idx = torch.randint(10, (1, 9))
    again = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(again(idx).logits, model(idx), rtol=0, atol=1e-4)
    assert (folder / "tokenizer.json").is_file()
    assert cli.main(["merge_lora", str(folder)]) == 0, "merged already"


@pytest.fixture
def adapted(tmp_path):
    """PEFT's model, whose adapter is in `tmp_path / "adapter"` and its base in `tmp_path / "base"`."""
    _, theirs = checkpoint(tmp_path / "base")
    model = get_peft_model(theirs, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model


@torch.no_grad()
def test_merging_a_peft_adapter_equals_peft_and_adds_it_once(adapted, tmp_path, capsys):
    base, folder, idx = tmp_path / "base", tmp_path / "adapter", torch.randint(10, (1, 9))
    command = ["merge_lora", str(folder), "--pretrained_checkpoint_dir", str(base)]
    assert cli.main([*command, "--precision", "32-true"]) == 0
    expected = adapted(idx).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(idx).logits, expected, rtol=0, atol=1e-5)
    assert find_adapter(folder) == folder / "adapter"
    torch.testing.assert_close(load_model(base, adapter=find_adapter(folder))(idx), expected, rtol=0, atol=1e-5)
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "merged already" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("n_moved", [0, 1, 4])
def test_merging_goes_on_where_it_was_killed(n_moved, adapted, tmp_path, monkeypatch):
    base, folder, idx = tmp_path / "base", tmp_path / "adapter", torch.randint(10, (1, 9))
    moves, move = iter(range(n_moved)), Path.replace

    def killed(path, target):
        next(moves)
        return move(path, target)

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(Path, "replace", killed)
        merge_lora(folder, base, max_shard_size="10KB")
    assert not list(folder.glob("model*")) or not (folder / names.ADAPTER_CONFIG).exists(), "it would be added twice"
    merge_lora(folder, base)
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and not list(folder.glob(".*"))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(idx).logits, adapted(idx).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(load_model(base, adapter=find_adapter(folder))(idx), adapted(idx).logits, rtol=0, atol=1e-5)


def test_a_folder_where_the_updates_would_move_to_is_not_overwritten(adapted, tmp_path, capsys):
    (tmp_path / "adapter" / "adapter").mkdir()
    assert cli.main(["merge_lora", str(tmp_path / "adapter"), "--pretrained_checkpoint_dir", str(tmp_path / "base")]) == 2
    assert f"{tmp_path}/adapter/adapter is in the way" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("precision", ["32-true", "16-true"])
@pytest.mark.parametrize("layout", ["litgpt", "peft"])
def test_the_sum_is_rounded_to_the_type_that_is_asked_for_alone(layout, precision, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "run"
    model, _ = checkpoint(tmp_path / "source")
    write_checkpoint(base, model.state_dict(), model.config, source=tmp_path / "source", dtype=torch.bfloat16)
    model, options = tuned(load_model(base, torch.float32))
    folder.mkdir()
    if layout == "peft":
        write_adapter(folder, model, SETTINGS, str(base))
    else:
        torch.save({n: t for n, t in model.state_dict().items() if "lora_" in n}, folder / "lit_model.pth.lora")
        (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(dict(checkpoint_dir=str(base), **options)))
    assert cli.main(["merge_lora", str(folder), "--precision", precision]) == 0
    merge_lora_weights(model)
    expected = {name: tensor.to(PRODUCTS[precision]) for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(dict(load_model(folder).state_dict()), expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_a_run_whose_head_was_tuned_is_merged_with_a_head_of_its_own(tmp_path):
    model, _ = checkpoint(tmp_path, tie_embeddings=True)
    add_lora(model, LoRA(r=2, dropout=0.0, head=True))
    torch.nn.init.normal_(model.lm_head.lora_B)
    idx = torch.randint(10, (1, 9))
    expected = model.eval()(idx)
    merge_lora_weights(model)
    write_checkpoint(tmp_path / "merged", model.state_dict(), model.config, source=tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(idx).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_peft_adapter_becomes_a_complete_folder(tmp_path):
    model, _ = checkpoint(tmp_path / "base")
    settings = LoRA(r=2, dropout=0.0)
    add_lora(model, settings)
    torch.nn.init.normal_(model.transformer.h[0].attn.qkv.lora_B)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, settings, str(tmp_path / "base"))
    assert cli.main(["convert_from_litgpt", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    idx = torch.randint(10, (1, 9))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(idx).logits, model.eval()(idx), rtol=0, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_model_that_no_family_expresses_is_not_exported(tmp_path, capsys):
    config = replace(tiny_config("llama"), norm_class_name="LayerNorm")
    write_checkpoint(tmp_path / "own", GPT(config).state_dict(), config)
    capsys.readouterr()
    assert cli.main(["convert_from_litgpt", str(tmp_path / "own"), str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_folder_may_be_written_into_the_one_that_one_stands_in(tmp_path, monkeypatch):
    checkpoint(tmp_path / "base")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["convert_from_litgpt", "../base", "."]) == 0
    assert (tmp_path / "here" / "config.json").is_file()


def test_merging_leaves_the_folders_beside_it_alone_and_takes_the_one_it_stands_in(tmp_path, monkeypatch):
    model, _ = checkpoint(tmp_path / "base")
    model, options = tuned(model)
    (tmp_path / "run.merged").mkdir()
    (tmp_path / "run.merged" / "precious").touch()
    (tmp_path / "run" / "merged").mkdir(parents=True)
    (tmp_path / "run" / "merged" / "precious").touch()
    torch.save({n: t for n, t in model.state_dict().items() if "lora_" in n}, tmp_path / "run" / "lit_model.pth.lora")
    (tmp_path / "run" / "hyperparameters.yaml").write_text(yaml.safe_dump(dict(checkpoint_dir=str(tmp_path / "base"), **options)))
    monkeypatch.chdir(tmp_path / "run")
    assert cli.main(["merge_lora", "."]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert (tmp_path / "run.merged" / "precious").exists() and (tmp_path / "run" / "merged" / "precious").exists()
    assert [path.name for path in (tmp_path / "run").glob("*merged*")] == ["merged"]


def test_a_disk_that_is_full_leaves_no_half_of_litgpts_weights(tmp_path, capsys):
    checkpoint(tmp_path / "base")
    (tmp_path / "base" / "lit_model.pth.tmp").symlink_to("/dev/full")  # every write to it finds no space
    capsys.readouterr()
    assert cli.main(["convert_to_litgpt", str(tmp_path / "base")]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not list((tmp_path / "base").glob("lit_model*"))


def test_a_damaged_tokenizer_is_named_where_it_lies(tmp_path, capsys):
    checkpoint(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{")
    capsys.readouterr()
    assert cli.main(["convert_from_litgpt", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'source' / 'tokenizer.json'} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_what_lora_made_is_merged_already(tmp_path, capsys):
    checkpoint(tmp_path)
    capsys.readouterr()
    assert cli.main(["merge_lora", str(tmp_path)]) == 2
    assert "holds no LoRA updates" in capsys.readouterr().err
    (tmp_path / "hyperparameters.yaml").write_text("lora_r: 8\n")
    assert cli.main(["merge_lora", str(tmp_path)]) == 0
    assert "merged already" in capsys.readouterr().out


def test_a_damaged_step_is_not_to_be_downloaded_again(tmp_path, capsys):
    (tmp_path / "run_state").mkdir()
    (tmp_path / "run_state" / "shard-00000.safetensors").write_bytes(b"x" * 20)
    (tmp_path / "run_state" / "state.json").write_text("{}")
    assert cli.main(["merge_lora", str(tmp_path)]) == 2
    sentence = capsys.readouterr().err
    assert "is damaged or cut off" in sentence and "Use another step." in sentence and "ownload" not in sentence
