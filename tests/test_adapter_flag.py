"""LoRA updates that a command is given beside a model, whatever model they name as their base."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from speaking import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt import LLM, cli, names
from litgpt.checkpoint import find_adapter, load_model
from litgpt.errors import MissingFile, UserError
from litgpt.generate.run import load
from litgpt.lora import LoRA, LoRALinear, add_lora
from litgpt.prompts import Alpaca, ChatTemplate

PROMPT = "What food do llamas eat?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("adapter") / "model")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """PEFT's own, trained beside a model that is nowhere."""
    made = tmp_path_factory.mktemp("adapter") / "peft"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(theirs, config).save_pretrained(made)
    described = json.loads((made / names.ADAPTER_CONFIG).read_text())
    (made / names.ADAPTER_CONFIG).write_text(json.dumps(described | dict(base_model_name_or_path="nobody/knows-it")))
    return made


def peft_answer(folder, adapter, n):
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    end = tokenizer.eos_token_id
    made = theirs.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=n, eos_token_id=end, pad_token_id=0)
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


def test_generate_answers_as_peft_does(folder, adapter, capsys):
    expected = peft_answer(folder, adapter, 20)
    flags = ["--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "20", "--precision", "32-true"]
    assert cli.main(["generate", str(folder), *flags, "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().out == f"{PROMPT}\n{expected}\n"
    assert cli.main(["generate", str(folder), *flags]) == 0
    assert capsys.readouterr().out != f"{PROMPT}\n{expected}\n"


def test_chat_answers_as_peft_does(folder, adapter, capsys, monkeypatch):
    said = iter([PROMPT, ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    flags = ["--temperature", "0", "--max_new_tokens", "20", "--precision", "32-true"]
    assert cli.main(["chat", str(folder), *flags, "--adapter", str(adapter)]) == 0
    assert f">> Reply: {peft_answer(folder, adapter, 20)}\n" in capsys.readouterr().out


def test_the_python_interface_takes_an_adapter_and_saves_the_merged_model(folder, adapter, tmp_path):
    llm = LLM.load(folder, adapter=adapter, distribute=None)
    llm.distribute(precision="32-true")
    assert llm.generate(PROMPT, temperature=0.0, max_new_tokens=20) == peft_answer(folder, adapter, 20)
    llm.save(tmp_path / "saved")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    idx = torch.randint(200, (1, 9))
    torch.testing.assert_close(merged(idx).logits, theirs(idx).logits, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="`adapter` is for a pretrained model"):
        LLM.load("SmolLM2-135M", init="random", tokenizer_dir=folder, adapter=adapter)


def test_litgpts_updates_and_the_folder_of_a_run_are_taken_too(folder, adapter, tmp_path):
    model = load_model(folder)
    add_lora(model, LoRA(r=2, alpha=4, dropout=0.0))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    torch.save({n: t for n, t in model.state_dict().items() if "lora_" in n}, tuned / names.LIT_LORA)
    options = dict(checkpoint_dir="nowhere", lora_r=2, lora_alpha=4, lora_dropout=0.0)
    (tuned / names.HYPERPARAMETERS).write_text(yaml.safe_dump(options))
    idx = torch.randint(200, (1, 9))
    torch.testing.assert_close(load_model(folder, adapter=find_adapter(tuned))(idx), model.eval()(idx), rtol=0, atol=1e-4)
    shutil.copytree(adapter, tmp_path / "final" / names.ADAPTER)
    assert find_adapter(tmp_path / "final") == tmp_path / "final" / names.ADAPTER


def test_merging_takes_adapters_of_peft_beside_the_base_that_is_named(folder, adapter, tmp_path, capsys):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert cli.main(["merge_lora", str(copy)]) == 2
    assert "nobody/knows-it" in capsys.readouterr().err
    assert cli.main(["merge_lora", str(copy), "--pretrained_checkpoint_dir", str(folder), "--max_shard_size", "30KB"]) == 0
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).merge_and_unload().state_dict()
    merged = {name: tensor for file in copy.glob("model-*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["nowhere", "not an adapter", "another size", "another layer"])
def test_an_adapter_that_does_not_fit_is_one_sentence(what, folder, adapter, tmp_path, capsys):
    given = {"nowhere": tmp_path / "nowhere", "not an adapter": folder}.get(what, adapter)
    model = folder
    if what == "another size":
        model = tmp_path / "wide"
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        config = theirs.config
        config.hidden_size, config.head_dim = 64, 16
        type(theirs)(config).save_pretrained(model)
    elif what == "another layer":
        model = tmp_path / "short"
        theirs = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=1)
        theirs.save_pretrained(model)
    for name in (names.TOKENIZER_JSON, names.TOKENIZER_CONFIG):
        if model != folder:
            shutil.copy(folder / name, model / name)
    capsys.readouterr()
    assert cli.main(["generate", str(model), "--adapter", str(given)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    said = {"nowhere": "There is no folder", "not an adapter": "holds no LoRA updates", "another size": "as if its shape were"}
    assert len(lines) == 1 and said.get(what, "does not have") in lines[0], lines
    if what == "nowhere":
        with pytest.raises(MissingFile):
            find_adapter(given)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A LoRA run in another prompt style than the base's."""
    place = tmp_path_factory.mktemp("run")
    (place / "data.json").write_text(json.dumps([dict(instruction=PROMPT, output=f"Grass {i}.") for i in range(4)]))
    words = f"--data JSON --data.json_path {place / 'data.json'} --data.val_split_fraction 0.25 --out_dir {place / 'out'}"
    limits = "--data.prompt_style alpaca "
    limits += "--train.max_steps 1 --train.save_interval 1 --train.global_batch_size 1 --eval.max_new_tokens 2"
    assert cli.main(["finetune", str(folder), *words.split(), *limits.split()]) == 0
    return place / "out"


@pytest.mark.parametrize("place", ["final", "final/adapter", "step-000001"])
def test_an_adapter_brings_the_prompt_style_it_was_trained_in(folder, run, place):
    assert isinstance(load(folder).style, ChatTemplate)
    for speaker in (load(run / place), load(folder, adapter=run / place)):
        assert isinstance(speaker.style, Alpaca)
    assert isinstance(LLM.load(folder, adapter=run / place, distribute=None).prompt_style, Alpaca)


@pytest.mark.parametrize("command", ["merge_lora", "convert_from_litgpt"])
def test_what_is_made_of_an_adapter_keeps_its_prompt_style(folder, run, command, tmp_path):
    shutil.copy(run / "final" / names.PROMPT_STYLE, tmp_path / "style")
    adapter = shutil.copytree(run / "final" / names.ADAPTER, tmp_path / "adapter")
    out = adapter if command == "merge_lora" else tmp_path / "out"
    assert cli.main([command, str(adapter), *([] if out == adapter else [str(out)])]) == 0
    assert (out / names.PROMPT_STYLE).read_text() == (tmp_path / "style").read_text()
    assert isinstance(load(out).style, Alpaca)


def test_a_chat_template_beside_an_adapter_counts_before_the_bases(folder, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert load(folder, adapter=copy).style.template == load(folder).style.template
    (copy / names.CHAT_TEMPLATE).write_text("{{ messages[0]['content'] }}!")
    assert load(folder, adapter=copy).style.apply("Hay") == "Hay!"


def test_the_chat_template_that_an_adapter_was_trained_in_may_lie_in_its_base(folder, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / names.PROMPT_STYLE).write_text("class_path: litgpt.prompts.ChatTemplate\n")
    assert load(folder, adapter=copy).style.apply("Hay") == load(folder).style.apply("Hay")
