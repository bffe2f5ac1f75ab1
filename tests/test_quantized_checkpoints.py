"""Checkpoints whose weights are quantized, as DeepSeek, Mistral AI and OpenAI publish them."""

import json

import pytest
import torch
from oracle import their_model
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from litgpt.checkpoint import load_model, write_adapter, write_checkpoint
from litgpt.lora import LoRA, LoRALinear, add_lora, merge_lora_weights
from litgpt.scripts.cast import cast_weights

BLOCK = 4
FP8 = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
PER_TENSOR = dict(quant_method="fp8", weight_block_size=None, activation_scheme="static", modules_to_not_convert=["lm_head"])
MXFP4 = dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"])


def in_blocks(name, weight):
    """FP8 values and one scale for each square block."""
    blocks = weight.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).flatten(0, 1).flatten(1)
    return {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def as_a_whole(name, weight):
    """FP8 values and one scale, beside one of the activations."""
    scale = weight.float().abs().max() / 448
    return {
        name: (weight.float() / scale).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": scale,
        name.replace("weight", "activation_scale"): torch.tensor(1.0),
    }


def in_fours(name, weight):
    """Random 4-bit values, with a power of two for each 32 of them."""
    experts, inputs, outputs = weight.shape
    blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(119, 124, blocks.shape[:3], dtype=torch.uint8)}


def is_projection(name):
    return name.endswith("_proj.weight")


CASES = {
    "deepseek_v3": (FP8, in_blocks, is_projection, {}),
    "ministral3": (PER_TENSOR, as_a_whole, is_projection, {}),
    "gpt_oss": (MXFP4, in_fours, lambda name: name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"), dict(n_embd=32)),
}


def quantized_folder(model_type, folder):
    settings, quantize, chosen, changes = CASES[model_type]
    changes = changes | (dict(intermediate_size=32, moe_intermediate_size=32) if model_type == "gpt_oss" else {})
    their_model(tiny_config(model_type, **changes), torch.bfloat16).save_pretrained(folder)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        weights |= quantize(name, tensor) if chosen(name) else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | dict(quantization_config=settings)))
    return folder


def their_reading(folder):
    """What transformers makes of it, which can turn the weights into plain ones itself."""
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"]["dequantize"] = True
    (folder / "config.json").write_text(json.dumps(described))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").float().eval()


@pytest.mark.parametrize("model_type", CASES)
@torch.no_grad()
def test_quantized_weights_are_read_as_transformers_reads_them(model_type, tmp_path):
    folder = quantized_folder(model_type, tmp_path)
    idx = torch.randint(96, (2, 21))
    torch.testing.assert_close(load_model(folder, torch.float32)(idx), their_reading(folder)(idx).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", CASES)
@torch.no_grad()
def test_what_is_exported_is_plain_and_says_so(model_type, tmp_path):
    folder = quantized_folder(model_type, tmp_path / "quantized")
    model = load_model(folder)
    write_checkpoint(tmp_path / "plain", model.state_dict(), model.config, source=folder)
    described = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in described and described["model_type"] == model_type
    again, idx = load_model(tmp_path / "plain"), torch.randint(96, (1, 9))
    assert torch.equal(again(idx), model(idx))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(model.float()(idx), theirs(idx).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", CASES)
@torch.no_grad()
def test_weights_that_are_cast_are_plain_from_then_on(model_type, tmp_path):
    folder, idx = quantized_folder(model_type, tmp_path), torch.randint(96, (1, 9))
    expected = load_model(folder, torch.float32)(idx)
    cast_weights(folder, "float32")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    torch.testing.assert_close(load_model(folder)(idx), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_adapter_is_added_to_the_plain_weights_of_a_quantized_base(tmp_path):
    folder, idx = quantized_folder("ministral3", tmp_path / "base"), torch.randint(96, (1, 9))
    model, settings = load_model(folder, torch.float32), LoRA(r=2, dropout=0.0)
    add_lora(model, settings)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
    write_adapter(tmp_path / "adapter", model, settings, str(folder))
    merge_lora_weights(model)
    torch.testing.assert_close(load_model(tmp_path / "adapter", torch.float32)(idx), model(idx), rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_chooses_experts_is_never_rounded(tmp_path):
    theirs = their_model(tiny_config("deepseek_v3"))
    for name, buffer in theirs.named_buffers():
        if "correction" in name:
            torch.nn.init.normal_(buffer)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    name = next(name for name in stored if name.endswith("e_score_correction_bias"))
    model = load_model(tmp_path / "theirs", torch.bfloat16)
    assert torch.equal(model.transformer.h[1].mlp.correction, stored[name])
    write_checkpoint(tmp_path / "ours", model.state_dict(), model.config, dtype=torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "ours" / "model.safetensors")[name], stored[name])
    cast_weights(tmp_path / "theirs", "bfloat16")
    cast = load_file(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(cast[name], stored[name]) and cast["model.norm.weight"].dtype == torch.bfloat16
