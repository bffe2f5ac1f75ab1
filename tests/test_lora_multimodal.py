"""LoRA updates of a multimodal model, of which only the text is trained here: PEFT's adapters are of the whole model."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_multimodal_export import EVERY_KIND, KINDS, SEEN, source_of
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from litgpt import cli, names
from litgpt.checkpoint import load_lora, load_model, write_adapter
from litgpt.errors import UserError
from litgpt.lora import LoRA, LoRALinear, add_lora, merge_lora_weights
from litgpt.peft_format import within_whole

EVERYTHING = LoRA(r=2, alpha=6, dropout=0.0, query=True, key=True, value=True, projection=True, mlp=True, head=True)
KEY = LoRA(r=3, alpha=4, dropout=0.0, query=False, key=True, value=False)
TEXT = r"model\.language_model\..*(q_proj|down_proj)"
EYES = r".*(q_proj|down_proj)"


def tuned(folder, settings):
    """Our model of a folder with updates that change it."""
    model = load_model(folder)
    add_lora(model, settings)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


def whole(kind, folder):
    return KINDS[kind][1].from_pretrained(folder, attn_implementation="eager")


def peft_adapter(kind, source, folder, targets, eyes_learn=False):
    """PEFT's model with an adapter that is written into a folder, whose updates of what is not text are zero unless `eyes_learn`."""
    model = get_peft_model(whole(kind, source), LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name and (eyes_learn or not any(part in name for part in SEEN)):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
@pytest.mark.filterwarnings("error:Found missing adapter keys", "error:The following")
@EVERY_KIND
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", [EVERYTHING, KEY], ids=["everything", "keys"])
def test_peft_loads_our_adapter_beside_the_whole_model_and_computes_the_same(kind, tied, settings, tmp_path):
    source = source_of(kind, tmp_path / "source", tie_embeddings=tied)
    ours = tuned(source, settings)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", ours, settings, str(source))
    theirs = PeftModel.from_pretrained(whole(kind, source), str(tmp_path / "adapter")).eval()
    idx = torch.randint(80, (2, 11))
    torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=0, atol=2e-5)
    adapted = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert adapted and not any(part in name for name in adapted for part in SEEN)
    again, base = load_lora(tmp_path / "adapter")
    torch.testing.assert_close(again(idx), ours(idx), rtol=0, atol=2e-5)
    assert base == source


@torch.no_grad()
def test_peft_loads_our_adapter_beside_what_transformers_makes_of_the_base_itself(tmp_path):
    source = source_of("gemma3", tmp_path / "source")
    ours = tuned(source, KEY)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", ours, KEY, str(source))
    theirs = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    idx = torch.randint(80, (2, 11))
    expected = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()(idx).logits
    torch.testing.assert_close(ours(idx), expected, rtol=0, atol=2e-5)


def test_experts_of_a_part_keep_their_parameters_and_layers_are_named_by_patterns():
    config = tiny_config("gemma3_text")
    modules = ("model.layers.0.q_proj", "model.layers.11.q_proj", "model.layers.0.mlp.experts", "lm_head")
    tensors = {f"base_model.model.{module}.lora_A.weight": torch.zeros(1) for module in modules}
    renamed, settings = within_whole(tensors, dict(target_modules=["q_proj", "lm_head"], target_parameters=["experts.up"]), config)
    assert settings["target_modules"] == r"lm_head|model\.language_model\.layers\.\d+\.q_proj"
    assert settings["target_parameters"] == ["experts.up"]
    assert "base_model.model.model.language_model.layers.0.mlp.experts.lora_A.weight" in renamed


@torch.no_grad()
@EVERY_KIND
@pytest.mark.parametrize("targets", [TEXT, EYES, "all-linear"], ids=["text", "eyes too", "all linear"])
def test_adapters_that_peft_wrote_of_the_whole_model_are_read(kind, targets, tmp_path, capsys):
    source = source_of(kind, tmp_path / "source")
    theirs = peft_adapter(kind, source, tmp_path / "adapter", targets)
    model, _ = load_lora(tmp_path / "adapter", source)
    idx = torch.randint(80, (2, 11))
    torch.testing.assert_close(model(idx), theirs(idx).logits, rtol=0, atol=2e-5)
    assert "updates of other parts" not in capsys.readouterr().err


@torch.no_grad()
@EVERY_KIND
def test_what_an_adapter_taught_the_eyes_is_named_when_it_is_read_and_never_lost_when_it_is_merged(kind, tmp_path, capsys):
    source = source_of(kind, tmp_path / "source")
    theirs = peft_adapter(kind, source, tmp_path / "adapter", "all-linear", eyes_learn=True)
    model, _ = load_lora(tmp_path / "adapter", source)
    idx = torch.randint(80, (2, 11))
    torch.testing.assert_close(model(idx), theirs(idx).logits, rtol=0, atol=2e-5)
    assert "updates of other parts, first model." in capsys.readouterr().err
    before = set(tmp_path.rglob("*"))
    assert cli.main(["merge_lora", str(tmp_path / "adapter"), "--pretrained_checkpoint_dir", str(source)]) == 2
    assert "Merge it with PEFT." in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


@torch.no_grad()
@EVERY_KIND
def test_a_merged_adapter_of_peft_is_the_whole_model_that_peft_merges(kind, tmp_path):
    source = source_of(kind, tmp_path / "source")
    theirs = peft_adapter(kind, source, tmp_path / "adapter", EYES).merge_and_unload()
    assert cli.main(["merge_lora", str(tmp_path / "adapter"), "--pretrained_checkpoint_dir", str(source)]) == 0
    ours, expected = whole(kind, tmp_path / "adapter").state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_adapters_by_the_names_of_the_text_model_alone_are_still_read(tmp_path):
    source = source_of("gemma3", tmp_path / "source")
    model = tuned(source, KEY)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, KEY, "nowhere")
    assert all(".layers." in name and "language_model" not in name for name in load_file(tmp_path / "adapter" / names.ADAPTER_WEIGHTS))
    assert json.loads((tmp_path / "adapter" / names.ADAPTER_CONFIG).read_text())["target_modules"] == ["k_proj"]
    again, _ = load_lora(tmp_path / "adapter", source)
    merge_lora_weights(model)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="is not there"):
        load_lora(tmp_path / "adapter")


def test_beside_a_base_that_transformers_does_not_read_an_adapter_is_of_the_text_model_that_its_export_is(tmp_path):
    source = source_of("gemma3", tmp_path / "source")
    model = tuned(source, KEY)
    (source / names.SAFETENSORS).unlink()  # as in LitGPT's layout, where only config.json says what the model was
    write_adapter(tmp_path / "adapter", model, KEY, str(source))
    assert json.loads((tmp_path / "adapter" / names.ADAPTER_CONFIG).read_text())["target_modules"] == ["k_proj"]
