import json
from dataclasses import asdict

import pytest
import torch
import yaml
from oracle import pair
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from litgpt import lora, names
from litgpt.checkpoint import load_lora, write_adapter, write_checkpoint
from litgpt.errors import UserError
from litgpt.families import FAMILIES
from litgpt.lora import LoRA, LoRAExperts, LoRALinear, add_lora, mark_only_lora_as_trainable, merge_lora_weights
from litgpt.model import GPT
from litgpt.scripts.merge_lora import merge_lora

EVERYTHING = LoRA(r=2, alpha=6, dropout=0.0, query=True, key=True, value=True, projection=True, mlp=True, head=True)
QUERY_AND_VALUE = LoRA(r=3, alpha=4, dropout=0.0)
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def wrapped(model, settings=EVERYTHING, filled=True):
    add_lora(model, settings, seed=3)
    if filled:
        for name, parameter in model.named_parameters():
            if "lora_" in name and name.endswith("B"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
@pytest.mark.filterwarnings("error:Found missing adapter keys", "error:The following")
@EVERY_FAMILY
@pytest.mark.parametrize("settings", [EVERYTHING, QUERY_AND_VALUE], ids=["everything", "q and v"])
def test_peft_loads_our_adapter_and_computes_the_same(family, settings, tmp_path):
    from peft import PeftModel

    config = tiny_config(family)
    ours, theirs = pair(config)
    wrapped(ours, settings)
    write_adapter(tmp_path, ours, settings, "base")
    tuned = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    idx = torch.randint(config.vocab_size, (2, 11))
    torch.testing.assert_close(tuned(idx).logits, ours(idx), rtol=0, atol=2e-5)


@torch.no_grad()
@EVERY_FAMILY
def test_merged_equals_unmerged(family):
    config = tiny_config(family)
    model = wrapped(GPT(config))
    idx = torch.randint(config.vocab_size, (2, 11))
    expected = model(idx)
    merge_lora_weights(model)
    assert not any(isinstance(layer, LoRALinear | LoRAExperts) for layer in model.modules())
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=2e-5)
    assert model.state_dict().keys() == GPT(config).state_dict().keys()


@torch.no_grad()
def test_a_new_update_changes_nothing_and_its_start_depends_on_seed_and_name_alone():
    config = tiny_config(FAMILIES["llama"])
    model = GPT(config).eval()
    idx = torch.randint(config.vocab_size, (1, 9))
    expected = model(idx)
    wrapped(model, filled=False)
    assert torch.equal(model(idx), expected)
    torch.manual_seed(99)
    other = wrapped(GPT(config), QUERY_AND_VALUE, filled=False)
    again = wrapped(GPT(config), QUERY_AND_VALUE, filled=False)
    name = "transformer.h.1.attn.qkv.lora_A"
    assert torch.equal(other.get_parameter(name), again.get_parameter(name))


def test_a_step_moves_exactly_the_updates():
    config = tiny_config(FAMILIES["llama"])
    model = wrapped(GPT(config), QUERY_AND_VALUE).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.0)
    idx = torch.randint(config.vocab_size, (2, 9))
    model(idx, targets=idx).nll.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name} != set()


def test_updates_stay_in_fp32_beside_a_bf16_model():
    model = wrapped(GPT(tiny_config(FAMILIES["llama"])).to(torch.bfloat16))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert model(torch.randint(10, (1, 5))).dtype == torch.bfloat16


@torch.no_grad()
def test_an_update_of_a_tied_head_leaves_the_embedding_alone():
    config = tiny_config(FAMILIES["llama"], tie_embeddings=True)
    model = wrapped(GPT(config), LoRA(r=2, dropout=0.0, query=False, value=False, head=True))
    embedding = model.transformer.wte.weight.clone()
    idx = torch.randint(config.vocab_size, (1, 5))
    expected = model(idx)
    merge_lora_weights(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert model.config.tie_embeddings is False and config.tie_embeddings is True
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_update_equals_the_formula_in_float64():
    linear = torch.nn.Linear(8, 12, bias=False)
    layer = LoRALinear(linear, r=2, alpha=5, sizes=[6, 3, 3], enabled=[True, False, True])
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 8)
    A_q, A_v = layer.lora_A.double().split(2)
    B_q, B_v = layer.lora_B.double().split([6, 3])
    update = torch.cat((x.double() @ A_q.T @ B_q.T, torch.zeros(4, 3), x.double() @ A_v.T @ B_v.T), -1) * 5 / 2
    torch.testing.assert_close(layer(x).double(), x.double() @ linear.weight.double().T + update, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias, trained", [("none", 0), ("lora_only", 2), ("all", 12)])
def test_biases_are_trained_as_asked(bias, trained):
    model = wrapped(GPT(tiny_config(FAMILIES["gpt_neox"], n_layer=2)), QUERY_AND_VALUE)
    mark_only_lora_as_trainable(model, bias)
    assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")) >= trained
    assert (trained == 0) == (not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias")))


def test_wrong_settings_are_refused():
    for wrong in (dict(r=0), dict(dropout=1.0), dict(query=False, value=False)):
        with pytest.raises(UserError):
            LoRA(**wrong)


def test_litgpts_constructor_wraps_what_the_config_says():
    fields = {key: value for key, value in vars(tiny_config(FAMILIES["llama"])).items() if key in lora.Config.__dataclass_fields__}
    model = lora.GPT(lora.Config(**fields, lora_r=4, lora_query=True))
    names = {name for name in model.state_dict() if lora.lora_filter(name, None)}
    assert names and all(".attn.qkv." in name for name in names)


def test_merged_weights_keep_the_types_that_those_of_the_base_have_each(tmp_path):
    config = tiny_config(FAMILIES["llama"])
    model = wrapped(GPT(config).to(torch.bfloat16))
    plain = {name: tensor for name, tensor in GPT(config).state_dict().items() if name != "lm_head.weight" or not config.tie_embeddings}
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in plain.items()}
    write_checkpoint(tmp_path / "base", mixed, config)
    (tmp_path / "tuned").mkdir()
    torch.save({name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}, tmp_path / "tuned" / names.LIT_LORA)
    options = {"checkpoint_dir": str(tmp_path / "base")} | {f"lora_{name}": value for name, value in asdict(EVERYTHING).items()}
    (tmp_path / "tuned" / names.HYPERPARAMETERS).write_text(yaml.safe_dump(options))
    merge_lora(tmp_path / "tuned")
    base, merged = (load_file(tmp_path / folder / names.SAFETENSORS) for folder in ("base", "tuned"))
    assert {name: merged[name].dtype for name in base} == {name: tensor.dtype for name, tensor in base.items()}
    assert len({tensor.dtype for tensor in base.values()}) == 2


OTHER_NAMES = [
    (family.model_type, *pair)
    for family in FAMILIES.values()
    for pair in family.prefixes
    if not pair[1].endswith(("wte.", "wpe.", "ln_f."))
]
SOME = r".*(q_proj|query_key_value|dense|down_proj|c_attn|c_proj|lm_head)"


def peft_adapter(config, folder, targets):
    """A base model and an adapter that PEFT wrote, and the model of PEFT's that has both."""
    from peft import LoraConfig, get_peft_model

    _, theirs = pair(config)
    theirs.save_pretrained(folder / "base")
    tuned = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder / "adapter")
    return tuned.eval()


@torch.no_grad()
@EVERY_FAMILY
@pytest.mark.parametrize("targets", [SOME, "all-linear"], ids=["some", "all but the head"])
def test_adapters_that_peft_wrote_are_merged_as_peft_merges_them(family, targets, tmp_path):
    config = tiny_config(family)
    tuned = peft_adapter(config, tmp_path, targets)
    model, _ = load_lora(tmp_path / "adapter", tmp_path / "base")
    idx = torch.randint(config.vocab_size, (2, 11))
    torch.testing.assert_close(model(idx), tuned(idx).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type, theirs, usual", OTHER_NAMES)
def test_adapters_of_models_that_call_their_layers_otherwise_are_read_too(model_type, theirs, usual, tmp_path):
    config = tiny_config(model_type)
    tuned = peft_adapter(config, tmp_path, SOME)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    in_memory, other = (theirs, usual) if usual == "embed_out." else (usual, theirs)
    start, stored = "base_model.model.", load_file(file)
    renamed = {name.replace(start + in_memory, start + other): tensor.clone() for name, tensor in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, file)
    model, _ = load_lora(tmp_path / "adapter", tmp_path / "base")
    idx = torch.randint(config.vocab_size, (2, 11))
    torch.testing.assert_close(model(idx), tuned(idx).logits, rtol=0, atol=2e-5)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    config = tiny_config(FAMILIES["llama"])
    _, theirs = pair(config)
    theirs.save_pretrained(tmp_path / "base")
    save_file({f"base_model.model.nowhere.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=2)))
    with pytest.raises(UserError, match="nowhere"):
        load_lora(tmp_path, tmp_path / "base")
