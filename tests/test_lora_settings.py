"""What the settings of PEFT's adapters may say: what leaves A and B plain is computed as PEFT does, and all else is refused."""

import json
from dataclasses import MISSING, fields

import pytest
import torch
from oracle import their_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from litgpt import names
from litgpt.checkpoint import load_lora
from litgpt.errors import UserError
from litgpt.peft_format import HARMLESS, check_plain

CONFIG = tiny_config("llama", tie_embeddings=False)
SOME = ["q_proj", "down_proj"]
PLAIN = {
    "no start": dict(init_lora_weights=False),
    "gaussian": dict(init_lora_weights="gaussian"),
    "eva": dict(init_lora_weights="eva"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "lora_ga": dict(init_lora_weights="lora_ga"),
    "rslora": dict(use_rslora=True, lora_dropout=0.3),
    "transposed, which it is not": dict(fan_in_fan_out=True),
    "dora": dict(use_dora=True),
    "dora and rslora": dict(use_dora=True, use_rslora=True, target_modules="all-linear"),
    "one layer": dict(layers_to_transform=[1], layers_pattern="layers"),
    "all but one": dict(target_modules="all-linear", exclude_modules=["v_proj"]),
    "alternatives": dict(alpha_pattern={"k_proj|down_proj|q_proj": 11}),
    "patterns": dict(rank_pattern={"q_proj": 5}, alpha_pattern={r"layers\.1\..*down_proj": 3}),
}
CHANGES_THE_BASE = ("pissa", "pissa_niter_4", "olora")
NOT_PLAIN = dict(
    bias="all",
    lora_bias=True,
    use_qalora=True,
    layer_replication=[[0, 1], [0, 2]],
    alora_invocation_tokens=[5, 7],
    trainable_token_indices=[3],
    modules_to_save=["lm_head"],
    megatron_config={"tensor_model_parallel_size": 1},
    arrow_config={"top_k": 3},
    velora_config={"num_groups": 2},
    kasa_config={"beta": 1e-4},
    monteclora_config={"buffer_size": 150},
    use_bdlora={"nblocks": 2},
    ensure_weight_tying=True,
    enable_lora=[True, False, True],  # of PEFT's first versions
    a_later_versions=1,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    their_model(CONFIG).save_pretrained(folder)
    return folder


def read_by_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def written(base, folder, **settings):
    """An adapter that PEFT wrote, whose updates change the model."""
    model = get_peft_model(read_by_transformers(base), LoraConfig(**dict(r=4, lora_alpha=5, target_modules=SOME) | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def read_by_peft(base, folder):
    return PeftModel.from_pretrained(read_by_transformers(base), folder).eval()


def changed(folder, **settings):
    """The same adapter with other settings; those that are None are left out."""
    file = folder / names.ADAPTER_CONFIG
    said = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    return folder


def edited(folder, edit):
    """The same adapter with other tensors."""
    file = folder / names.ADAPTER_WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in edit(load_file(file)).items()}, file)
    return folder


def check_same(base, folder):
    model, _ = load_lora(folder, base)
    idx = torch.randint(CONFIG.vocab_size, (2, 11))
    expected = read_by_peft(base, folder)(idx).logits
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=2e-5)
    assert not torch.allclose(read_by_transformers(base)(idx).logits, expected, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_settings_that_leave_the_updates_plain_compute_what_peft_computes(base, settings, tmp_path):
    check_same(base, written(base, tmp_path, **settings))


@torch.no_grad()
@pytest.mark.parametrize("start", CHANGES_THE_BASE)
def test_starts_with_which_peft_changes_the_base_are_refused(base, start, tmp_path):
    written(base, tmp_path, init_lora_weights=start)
    layer = read_by_peft(base, tmp_path).base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.allclose(layer.base_layer.weight, read_by_transformers(base).model.layers[0].self_attn.q_proj.weight, atol=1e-2)
    with pytest.raises(UserError, match=f"sets PEFT's `init_lora_weights` to '{start}'"):
        load_lora(tmp_path, base)


@torch.no_grad()
def test_an_adapter_that_peft_converted_to_a_plain_one_is_read(base, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(read_by_transformers(base), LoraConfig(r=2, target_modules=SOME, init_lora_weights="olora"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "olora"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, _ = load_lora(tmp_path / "plain", base)
    idx = torch.randint(CONFIG.vocab_size, (2, 11))
    torch.testing.assert_close(ours(idx), model.eval()(idx).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("start", ["corda", "loftq", "mica", "PiSSA", "of_a_later_version", ["eva"]])
def test_starts_that_are_not_known_to_leave_the_base_alone_are_refused(base, start, tmp_path):
    changed(written(base, tmp_path), init_lora_weights=start)
    with pytest.raises(UserError, match="sets PEFT's `init_lora_weights` to "):
        load_lora(tmp_path, base)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_settings_that_may_mean_more_than_plain_updates_are_refused_by_name(base, name, tmp_path):
    changed(written(base, tmp_path), **{name: NOT_PLAIN[name]})
    with pytest.raises(UserError, match=f"sets PEFT's `{name}` to .* so it is not a plain LoRA adapter"):
        load_lora(tmp_path, base)


@pytest.mark.parametrize(
    "name", ["layer_replication", "alora_invocation_tokens", "lora_bias", "modules_to_save", "trainable_token_indices"]
)
def test_such_adapters_are_refused_as_peft_writes_them(base, name, tmp_path):
    written(base, tmp_path, **{name: NOT_PLAIN[name]}, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=f"sets PEFT's `{name}` to "):
        load_lora(tmp_path, base)


def test_lengths_of_rows_without_dora_and_dora_without_them_are_refused(base, tmp_path):
    written(base, tmp_path / "dora", use_dora=True)
    written(base, tmp_path / "plain")
    with pytest.raises(UserError, match="have `use_dora` False, but it holds a `lora_magnitude_vector` of 'model.layers.0"):
        load_lora(changed(tmp_path / "dora", use_dora=False), base)
    with pytest.raises(UserError, match="have `use_dora` True, but it holds no `lora_magnitude_vector` of 'model.layers.0"):
        load_lora(changed(tmp_path / "plain", use_dora=True), base)
    changed(tmp_path / "dora", use_dora=True)
    edited(tmp_path / "dora", lambda stored: {name: x[:3] if name.endswith("vector") else x for name, x in stored.items()})
    with pytest.raises(UserError, match=r"are torch.float32 \(4, 48\) and torch.float32 \(32, 4\) and torch.float32 \(3,\), which is no"):
        load_lora(tmp_path / "dora", base)


def test_every_setting_of_the_installed_peft_is_known_to_be_harmless_or_refused_when_it_is_set():
    for field in fields(LoraConfig):
        default = field.default if field.default is not MISSING else field.default_factory()
        assert field.name in HARMLESS | NOT_PLAIN.keys() | {"init_lora_weights"}, "decide what this one means"
        if field.name != "peft_type":
            check_plain(dict(peft_type="LORA") | {field.name: default}, "adapter")


@torch.no_grad()
def test_adapters_of_older_versions_say_less_and_are_read(base, tmp_path):
    first = dict(enable_lora=None, merge_weights=False, fan_in_fan_out=False, inference_mode=True, bias="none", modules_to_save=None)
    kept = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path="x", r=4, lora_alpha=5, target_modules=SOME)
    written(base, tmp_path, lora_dropout=0.1)
    (tmp_path / names.ADAPTER_CONFIG).write_text(json.dumps(kept | first | dict(lora_dropout=0.1)))
    model, _ = load_lora(tmp_path, base)
    idx = torch.randint(CONFIG.vocab_size, (2, 11))
    (tmp_path / names.ADAPTER_CONFIG).write_text(json.dumps(kept))
    torch.testing.assert_close(model(idx), read_by_peft(base, tmp_path)(idx).logits, rtol=0, atol=2e-5)
