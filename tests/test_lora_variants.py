"""rsLoRA, DoRA, LoRA+, `lora_targets` and dropout: PEFT is the oracle for values and gradients, there and back through files."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from oracle import pair
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_config

from litgpt import names
from litgpt.args import OptimizerArgs
from litgpt.checkpoint import load_lora, load_model, write_adapter, write_checkpoint
from litgpt.errors import UserError
from litgpt.finetune.loop import Base
from litgpt.finetune.lora import with_lora
from litgpt.lora import GPT as LoRAGPT
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import LoRA, LoRAExperts, LoRALinear, add_lora, merge_lora_weights
from litgpt.model import GPT
from litgpt.optim import make_optimizer
from litgpt.peft_format import adapter_to_peft
from litgpt.quantize import quantize_model

DENSE = ["llama", "gpt_neox", "phi3", "gpt2"]  # apart, fused by heads, fused MLPs, transposed
SMALL = dict(r=3, alpha=5, dropout=0.0)
ALL = dict(targets="all-linear")
VARIANTS = {
    "plain": LoRA(**SMALL, **ALL),
    "rslora": LoRA(**SMALL, **ALL, rslora=True),
    "dora": LoRA(**SMALL, **ALL, dora=True),
    "dora and rslora": LoRA(**SMALL, **ALL, dora=True, rslora=True),
    "dora of q and v": LoRA(**SMALL, dora=True),
}


def filled(model):
    """The same model with updates that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and name.endswith("B"):
                torch.nn.init.normal_(parameter, std=0.2)
            elif name.endswith("lora_magnitude"):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    return model.eval()


def wrapped(model, settings):
    add_lora(model, settings, seed=3)
    return filled(model)


def gradients(model, settings):
    """Our gradients by PEFT's names, and which numbers of PEFT's are trained here: no blocks of B beside the diagonal, say."""
    filled_with = {"gradients": lambda p: p.grad, "ones": torch.ones_like}
    made = []
    for new in filled_with.values():
        other = copy.deepcopy(model)
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            q.data = new(p) if "lora_" in name else torch.zeros_like(p)
        made.append(adapter_to_peft(other, settings)[0])
    return made[0], {name: tensor != 0 for name, tensor in made[1].items()}


# PEFT is the oracle


@pytest.mark.filterwarnings("error:Found missing adapter keys", "error:The following")
@pytest.mark.parametrize("model_type", DENSE + ["qwen3_moe"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients_are_those_of_peft_with_our_adapter(model_type, settings, tmp_path):
    if model_type == "qwen3_moe" and settings.dora and settings.mlp:
        pytest.skip("PEFT has no DoRA of experts")
    config = tiny_config(model_type)
    ours, theirs = pair(config)
    wrapped(ours, settings)
    write_adapter(tmp_path, ours, settings, "base")
    tuned = PeftModel.from_pretrained(theirs, str(tmp_path), is_trainable=True).eval()
    idx = torch.randint(config.vocab_size, (2, 11))
    torch.testing.assert_close(tuned(idx).logits, ours(idx), rtol=0, atol=2e-5)
    loss, targets = ours(idx[:, :-1], targets=idx[:, 1:]).nll / 20, idx[:, 1:].flatten()
    expected = F.cross_entropy(tuned(idx[:, :-1]).logits.flatten(0, 1), targets)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward()
    expected.backward()
    found, trained = gradients(ours, settings)
    adapted = {name.replace(".default.weight", "" if "vector" in name else ".weight"): p for name, p in tuned.named_parameters()}
    assert found.keys() == {name for name in adapted if "lora_" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient * trained[name], adapted[name].grad * trained[name], rtol=0, atol=1e-5)


def peft_adapter(config, folder, **settings):
    """An adapter that PEFT wrote beside a base, and PEFT's model of both."""
    _, theirs = pair(config)
    theirs.save_pretrained(folder / "base")
    tuned = get_peft_model(theirs, LoraConfig(**dict(r=3, lora_alpha=5, target_modules="all-linear") | settings))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    tuned.save_pretrained(folder / "adapter")
    return tuned.eval()


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*DENSE, "gemma2", "falcon", "qwen3_next"])
@pytest.mark.parametrize("rslora", [False, True], ids=["dora", "dora and rslora"])
def test_dora_that_peft_wrote_is_added_to_the_weights_as_peft_computes_it(model_type, rslora, tmp_path):
    config = tiny_config(model_type)
    targets = r".*attn.*proj.*" if config.n_expert else "all-linear"
    tuned = peft_adapter(config, tmp_path, use_dora=True, use_rslora=rslora, target_modules=targets)
    idx = torch.randint(config.vocab_size, (2, 11))
    model, _ = load_lora(tmp_path / "adapter", tmp_path / "base")
    torch.testing.assert_close(model(idx), tuned(idx).logits, rtol=0, atol=5e-5)
    model = load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    torch.testing.assert_close(model(idx), tuned(idx).logits, rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*DENSE, "qwen3_moe"])
def test_all_linear_adapts_what_peft_calls_so(model_type, tmp_path):
    config = tiny_config(model_type)
    tuned = peft_adapter(config, tmp_path)
    assert tuned.peft_config["default"].target_modules != "all-linear"
    model = GPT(config)
    add_lora(model, LoRA(**SMALL, **ALL))
    tensors, _ = adapter_to_peft(model, LoRA(**SMALL, **ALL))
    theirs = load_file(tmp_path / "adapter" / names.ADAPTER_WEIGHTS)
    ours, theirs = ({name.split(".lora_")[0] for name in some} for some in (tensors, theirs))
    if model_type == "qwen3_moe":  # PEFT also changes routers, and no MLP of the layer without experts
        ours = {name for name in ours if ".layers.0.mlp" not in name}
        theirs = {name for name in theirs if not name.endswith("mlp.gate")}
    assert ours == theirs


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_dropout_drops_what_peft_drops(dora):
    class Dropped(torch.nn.Module):
        def forward(self, x):
            return x * keep / 0.75

    linear, keep, x = torch.nn.Linear(8, 6).requires_grad_(False), torch.rand(5, 8) > 0.25, torch.randn(5, 8)
    theirs = get_peft_model(
        torch.nn.ModuleDict({"fc": copy.deepcopy(linear)}),
        LoraConfig(r=2, lora_alpha=3, target_modules=["fc"], use_dora=dora, lora_dropout=0.25),
    ).base_model.model["fc"]
    ours = LoRALinear(linear, r=2, alpha=3, dropout=0.25, dora=dora)
    ours.dropout = theirs.lora_dropout["default"] = Dropped()
    with torch.no_grad():
        ours.lora_A.copy_(theirs.lora_A["default"].weight)
        for B in (ours.lora_B, theirs.lora_B["default"].weight):
            B.copy_(torch.arange(12.0).view(6, 2) / 9)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A["default"].weight.grad, rtol=1e-5, atol=1e-5)
    if dora:
        torch.testing.assert_close(ours.lora_magnitude.grad, theirs.lora_magnitude_vector["default"].weight.grad, rtol=1e-5, atol=1e-5)


# What is written


@torch.no_grad()
@pytest.mark.parametrize("model_type, settings", [("phi3", "dora"), ("gpt_neox", "dora of q and v"), ("qwen3_moe", "rslora")])
def test_what_a_run_writes_at_its_end_is_the_merged_model_and_the_adapter(model_type, settings, tmp_path):
    config, settings = tiny_config(model_type), VARIANTS[settings]
    ours, theirs = pair(config)
    write_checkpoint(tmp_path / "base", ours.state_dict(), config)
    wrapped(ours, settings)
    weights = {name: parameter for name, parameter in ours.named_parameters() if "lora_" in name}
    with_lora(settings).write(tmp_path / "final", weights, Base(tmp_path / "base", config, torch.float32), lambda folder: None)
    idx = torch.randint(config.vocab_size, (2, 11))
    torch.testing.assert_close(load_model(tmp_path / "final")(idx), ours(idx), rtol=0, atol=2e-5)
    tuned = PeftModel.from_pretrained(theirs, str(tmp_path / "final" / "adapter")).eval()
    torch.testing.assert_close(tuned(idx).logits, ours(idx), rtol=0, atol=2e-5)
    again, _ = load_lora(tmp_path / "final" / "adapter", tmp_path / "base")
    torch.testing.assert_close(again(idx), ours(idx), rtol=0, atol=2e-5)
    described = json.loads((tmp_path / "final" / "adapter" / names.ADAPTER_CONFIG).read_text())
    assert (described["use_dora"], described["use_rslora"]) == (settings.dora, settings.rslora)


@torch.no_grad()
def test_merging_dora_leaves_rows_without_an_update_as_they_are_to_the_bit():
    model = GPT(tiny_config("gemma2"))
    layer = model.transformer.h[1].attn.qkv
    before, sizes = layer.weight.clone(), model.config.qkv_sizes
    wrapped(model, VARIANTS["dora of q and v"])
    merge_lora_weights(model)
    q, k, v = model.transformer.h[1].attn.qkv.weight.split(sizes)
    assert torch.equal(k, before.split(sizes)[1])
    assert not torch.allclose(q, before.split(sizes)[0]) and not torch.allclose(v, before.split(sizes)[2])


# DoRA


@torch.no_grad()
def test_dora_equals_the_formula_in_float64():
    linear = torch.nn.Linear(8, 12).double()
    layer = LoRALinear(linear, r=2, alpha=5, sizes=[6, 3, 3], enabled=[True, False, True], dora=True).double()
    torch.nn.init.normal_(layer.lora_B)
    torch.nn.init.uniform_(layer.lora_magnitude, 0.5, 2.0)
    weight, (A_q, A_v), (B_q, B_v) = linear.weight.clone(), layer.lora_A.split(2), layer.lora_B.split([6, 3])
    for rows, A, B, m in ((slice(6), A_q, B_q, layer.lora_magnitude[:6]), (slice(9, 12), A_v, B_v, layer.lora_magnitude[6:])):
        direction = weight[rows] + 5 / 2 * B @ A
        weight[rows] = m.unsqueeze(1) * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(4, 8).double()
    torch.testing.assert_close(layer(x), x @ weight.T + linear.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=0, atol=1e-5)  # added in fp32


@torch.no_grad()
def test_new_dora_changes_nothing_even_where_a_row_is_zero_or_weights_come_later():
    config = tiny_config("llama", tie_embeddings=False)
    plain = GPT(config).eval()
    plain.lm_head.weight[3] = 0
    idx = torch.randint(config.vocab_size, (2, 9))
    model = GPT(config).eval()
    add_lora(model, LoRA(**SMALL, **ALL, head=True, dora=True))
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(idx), plain(idx), rtol=0, atol=1e-6)


def test_dora_of_experts_is_refused_before_anything_is_wrapped():
    model = GPT(tiny_config("olmoe"))
    message = "`lora_dora` cannot be used where `lora_mlp` updates experts, since PEFT has no DoRA of them"
    with pytest.raises(UserError, match=f"{message}. Turn it off, or leave out `lora_targets`"):
        add_lora(model, VARIANTS["dora"])
    with pytest.raises(UserError, match="Turn it off, or turn `lora_mlp` off"):
        add_lora(model, LoRA(**SMALL, mlp=True, dora=True))
    assert not any(isinstance(layer, LoRALinear | LoRAExperts) for layer in model.modules())
    add_lora(model, VARIANTS["dora of q and v"])


@torch.no_grad()
def test_small_changes_of_lengths_are_not_lost_in_bf16():
    layer = LoRALinear(torch.nn.Linear(64, 16, bias=False).bfloat16(), r=2, alpha=4, dora=True)
    before = layer.lora_magnitude.clone()
    layer.lora_magnitude.mul_(1 + 1e-3)
    assert (layer.longer() - 1e-3).abs().max() < 1e-5  # a bf16 number next to 1 is 1 + 8e-3
    assert layer(torch.eye(64).bfloat16()).dtype == torch.bfloat16 and not torch.equal(before, layer.lora_magnitude)


# What is trained


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize(
    "settings",
    [
        LoRA(dropout=0.5),
        LoRA(dropout=0.0, **ALL),
        LoRA(dropout=0.5, projection=True, head=True, dora=True, rslora=True),
        LoRA(dropout=0.0, query=False, value=False, mlp=True, plus_ratio=4.0),
    ],
    ids=["q and v", "all", "dora", "lora+"],
)
def test_two_steps_move_every_parameter_that_is_trained_and_no_other(model_type, settings):
    model = GPT(tiny_config(model_type))
    method = with_lora(settings)
    method.prepare(model.train(), 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(OptimizerArgs(lr=0.01), model, method.lr_ratios)
    for _ in range(2):  # B is zero before the first one, so A has no gradient there
        idx = torch.randint(96, (8, 31))
        model(idx, targets=idx).nll.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
    assert trained == {name for name in before if "lora_" in name} != set()


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_lora_plus_gives_b_its_own_learning_rate_and_nothing_else(model_type):
    model = GPT(tiny_config(model_type))
    method = with_lora(LoRA(dropout=0.0, plus_ratio=16, **ALL))
    method.prepare(model, 1)
    names_of = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(OptimizerArgs(), model, method.lr_ratios).param_groups
    fast = {names_of[p] for group in groups if group.get("lr_ratio") == 16 for p in group["params"]}
    assert fast == {name for name in names_of.values() if "lora_" in name and name.endswith("B")} != set()
    assert not with_lora(LoRA()).lr_ratios


# Settings


@torch.no_grad()
def test_litgpts_constructor_knows_the_variants():
    fields = {key: value for key, value in vars(tiny_config("llama")).items() if key in LoRAConfig.__dataclass_fields__}
    model = LoRAGPT(LoRAConfig(**fields, lora_r=4, lora_targets="all-linear", lora_dora=True))
    wrapped_layers = [name for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    assert len(wrapped_layers) == 2 * 5 and "lm_head" not in wrapped_layers
    assert all(layer.lora_magnitude is not None for layer in model.modules() if isinstance(layer, LoRALinear))


def test_all_linear_turns_on_every_part_but_the_head_which_has_its_switch():
    chosen = LoRA(targets="all-linear")
    assert (chosen.query, chosen.key, chosen.value, chosen.projection, chosen.mlp, chosen.head) == (True,) * 5 + (False,)
    assert LoRA(targets="all-linear", head=True).head


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(targets="all"), "`lora_targets` is 'all-linear' or left out, but got 'all'"),
        (dict(targets="all-linear", query=False), "`lora_targets` all-linear contradicts `lora_query` false"),
        (dict(targets="all-linear", value=False), "contradicts `lora_value` false"),
        (dict(targets=True), "`lora_targets` is a text, but got True"),
        (dict(plus_ratio=0.0), "`lora_plus_ratio` multiplies a learning rate and is above 0, but got 0.0"),
        (dict(plus_ratio=float("nan")), "`lora_plus_ratio` is a number, but got nan"),
        (dict(plus_ratio="16"), "`lora_plus_ratio` is a number, but got '16'"),
        (dict(dora="yes"), "`lora_dora` is true or false, but got 'yes'"),
        (dict(r=True), "`lora_r` is an integer, but got True"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(UserError, match=message):
        LoRA(**wrong)


# Beside quantized weights


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.int8-training"])
@pytest.mark.parametrize("settings", ["rslora", "dora"])
def test_beside_quantized_weights_it_computes_what_it_does_beside_the_same_weights_in_full(kind, settings):
    config, settings = tiny_config("phi3", n_embd=64), VARIANTS[settings]
    model = GPT(config)
    quantize_model(model, kind)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "dequantize")}
    full = copy.deepcopy(model)
    for name, layer in layers.items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).requires_grad_(False)
        plain.weight.data, plain.bias = layer.dequantize(), layer.bias
        full.set_submodule(name, plain)
    idx = torch.randint(config.vocab_size, (2, 9))
    for some in (model, full):
        torch.manual_seed(0)
        wrapped(some, settings)(idx, targets=idx).nll.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == (3 if settings.dora else 2) * len(layers)
    for name, parameter in full.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="cannot be added to quantized weights. Load the base model without `quantize`"):
        merge_lora_weights(model)


def test_experts_that_are_quantized_are_not_merged_either():
    model = GPT(tiny_config("qwen3_moe"))
    quantize_model(model, "bnb.int8-training")
    add_lora(model, LoRA(dropout=0.0, query=False, value=False, mlp=True))
    with pytest.raises(UserError, match="cannot be added to quantized weights"):
        merge_lora_weights(model)
