"""Layers in 4 and 8 bits. The oracle is a plain model whose weights are those that the quantized layers compute with."""

import copy
import json
import sys
import weakref
from inspect import signature
from typing import get_args

import bitsandbytes
import pytest
import quantized_ranks
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from speaking import make_checkpoint
from tiny import EVERY_FAMILY, tiny_config
from torch import nn

from litgpt import LLM, quantize
from litgpt.adapter import add_adapter
from litgpt.adapter_v2 import add_adapter_v2
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.checkpoint import load_model, write_adapter
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.deploy.adapters import Adapters
from litgpt.errors import UserError
from litgpt.eval import perplexity
from litgpt.experts import Experts
from litgpt.finetune import adapter as finetune_adapter
from litgpt.finetune import adapter_v2 as finetune_adapter_v2
from litgpt.finetune import loop
from litgpt.finetune import lora as finetune_lora
from litgpt.generate import base as generate
from litgpt.generate.decode import complete
from litgpt.generate.run import load
from litgpt.generate.sampling import RowState
from litgpt.lora import LoRA, add_lora, merge_lora_weights
from litgpt.model import GPT
from litgpt.quantize import (
    KINDS,
    QuantizedExperts,
    QuantizedLinear,
    bytes_per_weight,
    is_quantized,
    n_weights,
    quantize_model,
    quantized_linear,
)

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
SHAPES = [(48, 64), (17, 48), (7, 5), (32, 192)]  # whole blocks in a row, blocks across rows, a last one that is not full
CPU = torch.device("cpu")
EVERYTHING = LoRA(r=2, alpha=6, dropout=0.0, query=True, key=True, value=True, projection=True, mlp=True, head=True)


def layer_of(shape, kind, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    return weight, quantized_linear(weight, torch.randn(shape[0], dtype=dtype) if bias else None, KINDS[kind], None, CPU)


def wide_config(**overrides):
    sizes = dict(n_layer=2, n_embd=64, n_head=4, intermediate_size=128, block_size=64, vocab_size=96, padded_vocab_size=96)
    return Config(**dict(sizes, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", bias=False, rotary_percentage=1.0) | overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base"))


def quantized_pair(config, kind="bnb.nf4"):
    """A quantized model, and a plain one with the weights that it computes with."""
    torch.manual_seed(2)
    model = GPT(config).eval()
    plain = copy.deepcopy(model)
    quantize_model(model, kind)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and ".ups." not in name and ".downs." not in name:
            plain.get_submodule(name).weight.data.copy_(layer.dequantize())
        elif isinstance(layer, QuantizedExperts):
            plain.get_submodule(name).gate_up.data.copy_(layer.gate_up)
            plain.get_submodule(name).down.data.copy_(layer.down)
    return model, plain


# One layer


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "int8" not in kind])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_in_4_bits_is_the_nearest_of_16_values_times_the_largest_of_its_64_neighbours(shape, kind):
    weight, layer = layer_of(shape, kind)
    values = bitsandbytes.functional.get_4bit_type(KINDS[kind].values, device="cpu").double()
    blocks = F.pad(weight.double().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = values[(blocks / scales).unsqueeze(-1).sub(values).abs().argmin(-1)] * scales
    expected = nearest.flatten()[: weight.numel()].view(shape)
    error = 0.02 if kind.endswith("-dq") else 1e-6  # of the scales, which are quantized too
    torch.testing.assert_close(layer.dequantize(torch.float64), expected, rtol=error, atol=1e-7)


def test_a_weight_in_8_bits_is_what_bitsandbytes_makes_of_it():
    weight, layer = layer_of((16, 48), "bnb.int8")
    numbers, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.clone())
    torch.testing.assert_close(layer.dequantize(), numbers * scales.unsqueeze(1) / 127, rtol=1e-6, atol=1e-7)
    zero = quantized_linear(torch.zeros(2, 64), None, KINDS["bnb.int8"], None, CPU)
    assert not zero.dequantize().any()


@EVERY_KIND
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_layer_computes_with_its_dequantized_weight_forward_and_backward(shape, kind, bias):
    _, layer = layer_of(shape, kind, bias)
    x = torch.randn(3, 4, shape[1], requires_grad=True)
    grad = torch.randn(3, 4, shape[0])
    layer(x).backward(grad)
    wide = x.detach().double().requires_grad_()
    expected = F.linear(wide, layer.dequantize(torch.float64), layer.bias.double() if bias else None)
    expected.backward(grad.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[0, :1]).double(), expected[0, :1], rtol=1e-5, atol=1e-5)


@EVERY_KIND
def test_under_autocast_and_in_16_bits_a_layer_multiplies_in_16_bits(kind):
    _, layer = layer_of((48, 64), kind, bias=True)
    x = torch.randn(5, 64)
    expected = F.linear(x.double(), layer.dequantize(torch.float64), layer.bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x.requires_grad_())
    for y in (cast, layer(x.bfloat16())):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.2)


@EVERY_KIND
def test_a_cast_of_the_model_leaves_what_a_layer_holds_as_it_is(kind):
    _, layer = layer_of((48, 64), kind)
    before = layer.dequantize()
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.dequantize(), before)
    assert torch.equal(copy.deepcopy(layer).dequantize(), before)
    assert not layer.state_dict()


# A model


@EVERY_FAMILY
@pytest.mark.parametrize("kind", ["bnb.nf4-dq", "bnb.int8"])
def test_a_model_computes_with_its_dequantized_weights_and_keeps_the_rest(family, kind):
    torch.manual_seed(3)
    model, plain = quantized_pair(tiny_config(family), kind)
    idx = torch.randint(96, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), plain(idx), rtol=0, atol=1e-5)
    kept = dict(model.named_parameters())
    assert {"transformer.wte.weight"} <= kept.keys()
    for name, parameter in kept.items():
        assert torch.equal(parameter, plain.get_parameter(name))
    routers = {name for name, _ in plain.named_parameters() if name.endswith(("mlp.gate.weight", "norm_1.weight"))}
    assert routers <= kept.keys()
    small = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    assert all(name.endswith(("mlp.gate", "mlp.shared_gate", "in_proj_ba")) for name in small)
    assert not any(type(layer) is Experts for layer in model.modules())
    assert n_weights(model) == sum(parameter.numel() for parameter in plain.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "lfm2", "qwen3_next"])  # all mixers
def test_a_quantized_model_generates_what_its_dequantized_weights_do(family):
    model, plain = quantized_pair(tiny_config(family))
    prompt = list(range(5, 12))
    answers = [[token for new in complete(each, prompt, RowState(temperature=0), 8, []) for token in new] for each in (model, plain)]
    assert answers[0] == answers[1]


def test_a_tied_head_stays_tied_and_other_parameters_get_the_type():
    model = GPT(wide_config(tie_embeddings=True))
    quantize_model(model, "bnb.nf4", torch.bfloat16)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.transformer.h[0].attn.qkv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "most"), [("bnb.nf4", 0.3), ("bnb.nf4-dq", 0.28), ("bnb.int8", 0.52)])
def test_a_wide_model_takes_a_small_part_of_its_memory_and_as_much_as_is_foretold(kind, most):
    model = GPT(wide_config(n_layer=4, n_embd=256, intermediate_size=1024)).bfloat16()
    before = sum(parameter.nbytes for parameter in model.transformer.h.parameters())
    quantize_model(model, kind)
    after = sum(tensor.nbytes for tensor in [*model.transformer.h.parameters(), *model.transformer.h.buffers()])
    assert after < most * before
    assert after == pytest.approx(before / 2 * bytes_per_weight(kind), rel=0.02)


def test_each_weight_is_given_back_before_the_next_is_quantized(monkeypatch):
    model = GPT(wide_config(n_layer=4))
    alive = [weakref.ref(layer) for name, layer in model.named_modules() if quantize.is_quantizable(name, layer)]
    counts = []

    def counting(*arguments):
        counts.append(sum(layer() is not None for layer in alive))
        return quantized_linear(*arguments)

    monkeypatch.setattr(quantize, "quantized_linear", counting)
    quantize_model(model, "bnb.nf4")
    assert counts == list(range(len(alive), 0, -1))


def test_no_weight_that_is_left_keeps_the_file_in_memory_that_the_model_was_mapped_from(folder):
    model = load_model(folder)
    mapped = [parameter.untyped_storage() for parameter in model.parameters()]  # held, so that nothing else gets their place
    quantize_model(model, "bnb.int8")
    left = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not left & {storage.data_ptr() for storage in mapped}


@torch.no_grad()
@pytest.mark.parametrize("add", [lambda model: add_lora(model, EVERYTHING), add_adapter_v2], ids=["lora", "adapter v2"])
def test_layers_and_experts_can_be_quantized_inside_of_what_is_trained_beside_them(add):
    found, config = [], tiny_config("mixtral")
    for is_first in (True, False):
        torch.manual_seed(0)
        model = GPT(config).eval()
        for change in [add, lambda model: quantize_model(model, "bnb.int8")][:: -1 if is_first else 1]:
            change(model)
        assert sum(isinstance(layer, QuantizedExperts) for layer in model.modules()) == sum(config.expert_indices or [1] * config.n_layer)
        found.append(model(torch.arange(12)[None]))
    assert torch.equal(*found)


def test_a_quantized_model_on_the_meta_device_has_the_sizes_of_a_real_one():
    sizes = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = GPT(wide_config())
        quantize_model(model, "bnb.nf4-dq")
        sizes.append(sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]))
    assert sizes[0] == sizes[1]


# LoRA over it


def with_lora(model):
    add_lora(model, EVERYTHING, seed=3)


@pytest.mark.parametrize(
    ("family", "add"),
    [(family, with_lora) for family in ("llama", "mixtral", "gpt_oss", "deepseek_v3")]
    + [("llama", add_adapter), ("gpt_oss", add_adapter_v2), ("deepseek_v3", add_adapter_v2)],
)
@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.int8-training"])
def test_what_is_trained_beside_quantized_layers_has_the_gradients_that_it_has_beside_dequantized_ones(family, add, kind):
    pair = quantized_pair(tiny_config(family, n_layer=3), kind)
    torch.manual_seed(5)
    idx = torch.randint(96, (2, 12))
    gradients = []
    for model in pair:
        add(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
        loss = model(idx, targets=idx)
        (loss.nll / loss.n_targets).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_qlora_learns_and_changes_nothing_but_its_updates():
    model, _ = quantized_pair(wide_config())
    add_lora(model, EVERYTHING, seed=3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    torch.manual_seed(4)
    idx, optimizer = torch.randint(96, (2, 16)), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(idx, targets=idx.roll(-1, 1))
        losses.append(loss.nll.item())
        loss.nll.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if not torch.equal(tensor, state[name])}
    assert moved == trained and all("lora_" in name for name in trained)


def test_a_block_computed_again_in_the_backward_pass_gives_the_same_gradients():
    gradients = []
    for n_recomputed in (0, 2):
        model, _ = quantized_pair(wide_config())
        add_lora(model, EVERYTHING, seed=3)
        model.n_recomputed = n_recomputed
        idx = torch.arange(24).view(2, 12)
        model(idx, targets=idx).nll.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_two_processes_learn_what_one_does_and_each_holds_all_quantized_weights():
    alone = quantized_ranks.train("bnb.nf4-dq")
    assert alone["losses"][-1] < alone["losses"][0]
    layouts = [dict(strategy="ddp"), dict(strategy="fsdp"), dict(strategy="fsdp", offload=True)]
    for rank in quantized_ranks.train_on_ranks(2, *(dict(kind="bnb.nf4-dq", **layout) for layout in layouts)):
        for found in rank:
            assert found["held"] == alone["held"]
            assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
            for name, values in alone["updates"].items():
                torch.testing.assert_close(torch.tensor(found["updates"][name]), torch.tensor(values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_in_bf16_qlora_learns_as_in_fp32(precision):
    losses = [quantized_ranks.train("bnb.nf4", precision=each)["losses"] for each in ("32-true", precision)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_run_trains_beside_quantized_weights_and_adds_its_updates_to_the_full_ones(folder, tmp_path, monkeypatch):
    quantized_layers = []

    def watched(model, kind, *arguments):
        quantize_model(model, kind, *arguments)
        quantized_layers.extend((kind, name) for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear))

    monkeypatch.setattr(loop, "quantize_model", watched)
    (tmp_path / "samples.json").write_text(json.dumps([{"instruction": f"Say {i}", "output": "yes " * (1 + i % 5)} for i in range(10)]))
    finetune_lora.setup(
        folder,
        quantize="bnb.nf4",
        lora_mlp=True,
        lora_dropout=0.0,
        out_dir=tmp_path / "out",
        precision="32-true",
        data=JSON(json_path=tmp_path / "samples.json", val_split_fraction=0.1),
        train=TrainArgs(global_batch_size=3, micro_batch_size=3, max_steps=3, save_interval=3),
        eval=EvalArgs(max_new_tokens=4, initial_validation=False, final_validation=True),
        optimizer=OptimizerArgs(lr=1e-2),
    )
    assert ("bnb.nf4", "transformer.h.0.attn.qkv") in quantized_layers
    updates = load_file(tmp_path / "out" / "step-000003" / "run_state" / "shard-00000.safetensors")
    model, final = load_model(folder), load_model(tmp_path / "out" / "final")
    add_lora(model, LoRA(mlp=True, dropout=0.0))
    model.load_state_dict({name: tensor for name, tensor in updates.items() if "/" not in name}, strict=False)
    merge_lora_weights(model)
    weights = model.state_dict()
    assert final.state_dict().keys() == weights.keys()
    for name, weight in final.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert not torch.equal(final.transformer.h[0].mlp.fc_1.weight, load_model(folder).transformer.h[0].mlp.fc_1.weight)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_updates_are_not_merged_into_quantized_weights(family):
    model, _ = quantized_pair(tiny_config(family))
    add_lora(model, EVERYTHING, seed=3)
    with pytest.raises(UserError, match="cannot be added to quantized weights"):
        merge_lora_weights(model)


# Several adapters beside it


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_rows_of_a_batch_have_their_own_adapters_beside_quantized_weights(family, tmp_path):
    model, plain = quantized_pair(tiny_config(family))
    settings = LoRA(r=2, alpha=6, dropout=0.0, key=True, projection=True)
    updates = copy.deepcopy(plain)
    add_lora(updates, settings, seed=3)
    for name, parameter in updates.named_parameters():
        if "lora_" in name and name.endswith("B"):
            nn.init.normal_(parameter, std=0.2)
    write_adapter(tmp_path, updates, settings, "base")
    adapters = Adapters(model, tmp_path)
    adapters.load("one", tmp_path)
    idx = torch.randint(96, (2, 7))
    adapters.index.set([0] * 7 + [adapters.slot("one")] * 7)
    found = model(idx)
    torch.testing.assert_close(found[0], plain(idx)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], updates(idx)[1], rtol=0, atol=2e-5)


# Commands and Python


@EVERY_KIND
def test_a_loaded_model_is_the_one_that_was_quantized(folder, kind):
    speaker, plain = load(folder, quantize=kind, precision="32-true"), load(folder, precision="32-true")
    quantize_model(plain.model, kind)
    idx = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(speaker.model(idx), plain.model(idx))


def test_an_adapter_is_added_before_the_weights_are_quantized(folder, tmp_path):
    model, settings = load_model(folder), LoRA(r=2, dropout=0.0)
    add_lora(model, settings)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.2)
    write_adapter(tmp_path, model, settings, str(folder))
    merged = load_model(folder, adapter=tmp_path)
    quantize_model(merged, "bnb.nf4")
    idx = torch.arange(12).unsqueeze(0)
    found = load(folder, adapter=tmp_path, quantize="bnb.nf4", precision="32-true").model
    with torch.no_grad():
        assert torch.equal(found(idx), merged(idx))


def test_the_python_interface_quantizes_on_loading_and_in_memory(folder, tmp_path):
    loaded, in_memory = LLM.load(folder, quantize="bnb.nf4"), LLM.load(folder, distribute=None)
    in_memory.trainer_setup()
    in_memory.distribute(quantize="bnb.nf4", precision="32-true")
    loaded.distribute(precision="32-true")
    options = dict(max_new_tokens=6, temperature=0.0)
    assert is_quantized(loaded.model) and is_quantized(in_memory.model)
    assert in_memory.generate("What food do llamas eat?", **options)
    with pytest.raises(UserError, match="quantized already"):
        loaded.distribute(quantize="bnb.nf4")
    with pytest.raises(UserError, match="Load it without `quantize`"):
        loaded.save(tmp_path / "saved")
    with pytest.raises(UserError, match="Give it to"):
        LLM.load(folder, distribute=None, quantize="bnb.nf4")
    random = LLM.load("pythia-14m", init="random", tokenizer_dir=folder, quantize="bnb.int8")
    assert is_quantized(random.model)


def test_generate_answers_with_a_quantized_model(folder, capsys):
    generate.main(folder, "Hi", quantize="bnb.nf4", max_new_tokens=4)
    assert "tokens/sec" in capsys.readouterr().err


def test_perplexity_is_measured_with_the_quantized_model(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("What food do llamas eat? Grass and hay.")
    arguments = dict(data=tmp_path / "text.txt", dtype="float32", save_filepath=tmp_path / "found.json")
    found = []
    for kind in ("bnb.nf4", None):
        perplexity.main(folder, quantize=kind, **arguments)
        found.append(json.loads((tmp_path / "found.json").read_text())["nll"])
    expected = perplexity.perplexity(load(folder, quantize="bnb.nf4", precision="32-true"), ["What food do llamas eat? Grass and hay."])
    assert found[0] == pytest.approx(expected.nll, rel=1e-6) and found[0] != pytest.approx(found[1], rel=1e-3)


def test_blocks_of_a_quantized_model_are_compiled_whole():
    found, idx = [], torch.arange(24).view(2, 12)
    for compile in (False, True):
        model, _ = quantized_pair(wide_config(n_layer=1), "bnb.nf4-dq")
        add_lora(model, EVERYTHING, seed=3)
        if compile:
            model.transformer.h[0].compile(backend="aot_eager", fullgraph=True)
        model(idx, targets=idx).nll.backward()
        with torch.no_grad():
            found.append([model(idx), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_every_command_takes_every_kind_for_bnb_int8_is_the_same_in_training():
    assert get_args(quantize.Quantize) == tuple(KINDS)
    for command in (finetune_lora.setup, finetune_adapter.setup, finetune_adapter_v2.setup, generate.main):
        assert signature(command).parameters["quantize"].annotation == quantize.Quantize | None


def test_unknown_kinds_and_a_missing_package_are_one_sentence(folder, monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'bnb.nf4'"):
        load(folder, quantize="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs the package 'bitsandbytes'"):
        load(folder, quantize="bnb.nf4")
    assert load(folder, quantize="bnb.int8").model


def test_a_device_without_the_kernels_is_one_sentence(folder, monkeypatch):
    def missing(*arguments, **options):
        raise NotImplementedError("Could not run 'bitsandbytes::quantize_4bit'")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", missing)
    with pytest.raises(UserError, match="does not run on this machine's cpu.*Use bnb.int8"):
        load(folder, quantize="bnb.nf4")
