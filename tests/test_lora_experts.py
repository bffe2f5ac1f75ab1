"""LoRA on experts, and its form in PEFT: updates of single parameters."""

import json
import re

import pytest
import torch
from oracle import pair
from tiny import tiny_config

from litgpt.checkpoint import load_lora, load_model, write_adapter, write_checkpoint
from litgpt.errors import UserError
from litgpt.experts import Experts, sort_by_expert
from litgpt.families import FAMILIES
from litgpt.finetune.loop import Base
from litgpt.finetune.lora import write
from litgpt.lora import LoRA, LoRAExperts, LoRALinear, add_lora, merge_lora_weights
from litgpt.model import GPT
from litgpt.scripts.merge_lora import merge_lora

MLP = LoRA(r=3, alpha=5, dropout=0.0, query=False, value=False, mlp=True)
WITH_EXPERTS = [name for name, family in FAMILIES.items() if family.base.get("mlp_class_name") == "LLaMAMoE"]
EVERY_ROUTED = pytest.mark.parametrize("model_type", WITH_EXPERTS)


def fill(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"lora_(\w+_)?B", name):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def wrapped(model, settings=MLP):
    add_lora(model, settings, seed=3)
    return fill(model)


def tokens(*shape):
    return torch.randint(96, shape)


# The layer


def lone_layer(**changes):
    config = tiny_config("qwen3_moe", **changes)
    layer = LoRAExperts(Experts(config), r=3, alpha=5).double()
    for B in (layer.lora_up_B, layer.lora_down_B):
        torch.nn.init.normal_(B)
    return layer, config


def one_by_one(layer, x, indices, weights):
    """The same, token by token and expert by expert, from the formula."""
    up = layer.base.gate_up + 5 / 3 * layer.lora_up_B @ layer.lora_up_A
    down = layer.base.down + 5 / 3 * layer.lora_down_B @ layer.lora_down_A
    rows = []
    for token, chosen, shares in zip(x, indices.tolist(), weights):
        parts = []
        for e, share in zip(chosen, shares):
            gate, opened = (up[e] @ token).chunk(2)
            parts.append(share * (down[e] @ (torch.nn.functional.silu(gate) * opened)))
        rows.append(sum(parts))
    return torch.stack(rows)


def test_the_update_and_its_gradients_equal_the_formula():
    layer, config = lone_layer()
    x = torch.randn(9, config.n_embd, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(3)[:2] for _ in range(9)])  # of four experts one is idle
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    trained = [x, weights, layer.lora_up_A, layer.lora_up_B, layer.lora_down_A, layer.lora_down_B]
    y, expected = layer(x, indices, weights), one_by_one(layer, x, indices, weights)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, trained, g), torch.autograd.grad(expected, trained, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@torch.no_grad()
def test_merged_experts_are_plain_and_keep_their_type():
    layer, config = lone_layer(norm_topk_prob=True)
    x, indices = torch.randn(5, config.n_embd, dtype=torch.float64), torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [0, 2]])
    plain = layer.merged()
    assert type(plain) is Experts and plain.gate_up.dtype == torch.float64
    weights = torch.rand(5, 2, dtype=torch.float64)
    torch.testing.assert_close(plain(x, indices, weights), layer(x, indices, weights), rtol=0, atol=1e-5)  # added in fp32
    assert LoRAExperts(Experts(config).bfloat16(), 2, 1).merged().down.dtype == torch.bfloat16


@torch.no_grad()
def test_products_of_the_update_have_the_type_of_the_tokens_and_its_factors_stay_in_fp32():
    model = wrapped(GPT(tiny_config("qwen3_moe")).to(torch.bfloat16))
    layer = model.transformer.h[1].mlp.experts
    assert {parameter.dtype for name, parameter in layer.named_parameters() if name.startswith("lora_")} == {torch.float32}
    rows = sort_by_expert(torch.tensor([[0, 1], [2, 3]]), 4)
    assert layer.project_up(torch.randn(2, 32, dtype=torch.bfloat16), rows).dtype == torch.bfloat16
    assert model(tokens(1, 5)).dtype == torch.bfloat16


def test_no_tokens_are_no_trouble():
    layer, config = lone_layer()
    assert layer(torch.zeros(0, config.n_embd).double(), torch.zeros(0, 2).long(), torch.zeros(0, 2).double()).shape == (0, config.n_embd)


# In a model


@EVERY_ROUTED
def test_an_update_of_mlps_is_one_of_experts_and_of_what_stands_beside_them_but_not_of_routers(model_type):
    model = GPT(tiny_config(model_type))
    add_lora(model, MLP)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear | LoRAExperts)}
    for i, block in enumerate(model.transformer.h):
        names = {name.removeprefix(f"transformer.h.{i}.mlp.") for name in layers if name.startswith(f"transformer.h.{i}.")}
        if hasattr(block.mlp, "experts"):
            shared = {f"shared.{leaf}" for leaf in ("fc_1", "fc_2", "proj")} if block.mlp.shared is not None else set()
            assert names == {"experts"} | shared
        else:
            assert names == {"fc_1", "fc_2", "proj"}


@torch.no_grad()
def test_a_new_update_changes_nothing_and_its_start_depends_on_seed_and_name_alone():
    config = tiny_config("qwen3_moe")
    model, idx = GPT(config).eval(), tokens(2, 9)
    expected = model(idx)
    add_lora(model, MLP, seed=3)
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=1e-6)
    torch.manual_seed(99)
    other = GPT(config)
    add_lora(other, MLP, seed=3)
    ours, others = (m.transformer.h[1].mlp.experts.lora_down_A for m in (model, other))
    assert torch.equal(ours, others) and not torch.equal(ours, model.transformer.h[2].mlp.experts.lora_down_A)
    assert ours.abs().max() <= 1 / ours.size(2) ** 0.5


def test_a_step_moves_exactly_the_updates():
    model = wrapped(GPT(tiny_config("qwen2_moe"))).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.0)
    idx = tokens(4, 19)
    model(idx, targets=idx).nll.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name} != set()


def test_dropout_is_refused():
    model = GPT(tiny_config("olmoe"))
    message = "`lora_dropout` is 0 where `lora_mlp` updates experts, but got 0.05. Set it to 0, or turn `lora_mlp` off"
    with pytest.raises(UserError, match=message):
        add_lora(model, LoRA(mlp=True))
    with pytest.raises(UserError, match="Set it to 0, or leave out `lora_targets`"):
        add_lora(model, LoRA(targets="all-linear"))
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())
    add_lora(model, LoRA())  # attention alone may drop


@torch.no_grad()
def test_a_wrapped_model_takes_the_weights_of_a_plain_one():
    config = tiny_config("gpt_oss")
    plain, idx = GPT(config).eval(), tokens(1, 9)
    model = GPT(config).eval()
    add_lora(model, MLP)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("lora_" in name for name in missing.missing_keys)
    torch.testing.assert_close(model(idx), plain(idx), rtol=0, atol=1e-6)


# PEFT


def peft_model(theirs, *parameters, modules=(), **settings):
    """A transformers model wrapped by PEFT, with random updates."""
    from peft import LoraConfig, get_peft_model

    settings = dict(r=3, lora_alpha=5, target_modules=list(modules), target_parameters=list(parameters)) | settings
    return fill(get_peft_model(theirs, LoraConfig(**settings)))


@torch.no_grad()
@pytest.mark.filterwarnings("error:Found missing adapter keys", "error:The following")
@EVERY_ROUTED
def test_peft_loads_updates_of_mlps_alone_and_computes_the_same(model_type, tmp_path):
    from peft import PeftModel

    ours, theirs = pair(tiny_config(model_type))
    idx = tokens(2, 11)
    plain = theirs(idx).logits
    wrapped(ours)
    write_adapter(tmp_path, ours, MLP, "base")
    tuned = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    torch.testing.assert_close(tuned(idx).logits, ours(idx), rtol=0, atol=2e-5)
    assert (ours(idx) - plain).abs().max() > 1e-2


TARGETS = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "the first": ["mlp.experts.gate_up_proj"],
    "the second": ["experts.down_proj"],
    "one layer": ["model.layers.1.mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj"],
}


@torch.no_grad()
@EVERY_ROUTED
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_updates_of_parameters_that_peft_wrote_are_added_as_peft_adds_them(model_type, targets, tmp_path):
    _, theirs = pair(tiny_config(model_type))
    theirs.save_pretrained(tmp_path / "base")
    tuned = peft_model(theirs, *targets, modules=["o_proj"], alpha_pattern={"gate_up_proj": 9}, rank_pattern={"experts.down_proj": 2})
    tuned.save_pretrained(tmp_path / "adapter")
    model, _ = load_lora(tmp_path / "adapter", tmp_path / "base")
    idx = tokens(2, 11)
    torch.testing.assert_close(model(idx), tuned(idx).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type, router", [("mixtral", "gate"), ("qwen3_moe", "gate"), ("gpt_oss", "router")])
def test_updates_of_routers_and_of_a_linear_layers_parameter_are_added_too(model_type, router, tmp_path):
    _, theirs = pair(tiny_config(model_type))
    theirs.save_pretrained(tmp_path / "base")
    targets = [f"mlp.{router}.weight", "q_proj.weight", "mlp.experts.down_proj"]
    tuned = peft_model(theirs, *targets, use_rslora=True, alpha_pattern={"q_proj.weight": 11, r".*\.down_proj": 2})
    tuned.save_pretrained(tmp_path / "adapter")
    model, _ = load_lora(tmp_path / "adapter", tmp_path / "base")
    idx = tokens(2, 11)
    torch.testing.assert_close(model(idx), tuned(idx).logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_updates_that_peft_wrote_for_separate_experts_are_added(tmp_path):
    config = tiny_config("qwen3_moe")
    ours, theirs = pair(config)
    theirs.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    from safetensors.torch import save_file

    A, B = torch.randn(2, 24), torch.randn(32, 2)
    path = "base_model.model.model.layers.1.mlp.experts.3.down_proj"  # as transformers 4 has them in memory
    save_file({f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=4)))
    model, _ = load_lora(tmp_path / "adapter", tmp_path / "base")
    ours.transformer.h[1].mlp.experts.down[3] += 2 * B @ A
    torch.testing.assert_close(model.transformer.h[1].mlp.experts.down, ours.transformer.h[1].mlp.experts.down, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_peft_adapter_of_experts_is_merged_by_the_command(tmp_path, capsys):
    config = tiny_config("qwen3_moe")
    ours, theirs = pair(config)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, ours.state_dict(), config)
    tuned = peft_model(theirs, *TARGETS["both"])
    tuned.save_pretrained(adapter)
    merge_lora(adapter, base)
    idx = tokens(2, 11)
    torch.testing.assert_close(load_model(adapter)(idx), tuned(idx).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_what_a_run_writes_at_its_end_is_the_merged_model_and_the_adapter(model_type, tmp_path):
    from peft import PeftModel

    config = tiny_config(model_type)
    ours, theirs = pair(config)
    write_checkpoint(tmp_path / "base", ours.state_dict(), config)
    wrapped(ours)
    weights = {name: parameter for name, parameter in ours.named_parameters() if "lora_" in name}
    write(tmp_path / "final", weights, Base(tmp_path / "base", config, torch.float32), lambda folder: None, MLP)
    idx = tokens(2, 11)
    torch.testing.assert_close(load_model(tmp_path / "final")(idx), ours(idx), rtol=0, atol=2e-5)
    tuned = PeftModel.from_pretrained(theirs, str(tmp_path / "final" / "adapter")).eval()
    torch.testing.assert_close(tuned(idx).logits, ours(idx), rtol=0, atol=2e-5)
    merge_lora_weights(ours)
    assert ours.state_dict().keys() == GPT(config).state_dict().keys()


def test_factors_that_fit_no_experts_are_refused(tmp_path):
    from safetensors.torch import save_file

    _, theirs = pair(tiny_config("qwen3_moe"))
    theirs.save_pretrained(tmp_path / "base")
    described = dict(peft_type="LORA", r=2, lora_alpha=4, target_parameters=["experts.down_proj"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))

    def holds(**shapes):
        path = "base_model.model.model.layers.1.mlp.experts.lora_{}.weight"
        save_file({path.format(x): torch.ones(shape) for x, shape in shapes.items()}, tmp_path / "adapter_model.safetensors")

    holds(A=(7, 24), B=(32, 7))
    with pytest.raises(UserError, match=r"'model.layers.1.mlp.experts.down_proj'.*are not of 4 experts, but \(7, 24\)"):
        load_lora(tmp_path, tmp_path / "base")
    holds(A=(8, 9), B=(32, 8))
    with pytest.raises(UserError, match=r"as if its shape were \(4, 32, 9\), but in the base model its shape is \(4, 32, 24\)"):
        load_lora(tmp_path, tmp_path / "base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | dict(target_parameters="experts.down_proj")))
    with pytest.raises(UserError, match="`target_parameters` in the PEFT adapter's settings is a list of names"):
        load_lora(tmp_path, tmp_path / "base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | dict(target_parameters=[])))
    with pytest.raises(UserError, match="'model.layers.1.mlp.experts.weight', which the base model does not have"):
        load_lora(tmp_path, tmp_path / "base")
