"""Models with experts, whole: how unevenly they are used, and what happens at the edges of routing."""

import pytest
import torch
from oracle import our_model, pair, their_model
from tiny import tiny_config

from litgpt.families import FAMILIES
from litgpt.loss import IGNORED
from litgpt.model import GPT

WITH_BALANCE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"]  # those of transformers that have an `aux_loss`
EVERY_BALANCED = pytest.mark.parametrize("model_type", [name for name in WITH_BALANCE if name in FAMILIES])
WITH_EXPERTS = [name for name, family in FAMILIES.items() if family.base.get("mlp_class_name") == "LLaMAMoE"]
EVERY_ROUTED = pytest.mark.parametrize("model_type", WITH_EXPERTS)


def balanced_pair(model_type, **changes):
    ours, theirs = pair(tiny_config(model_type, **changes))
    ours.expert_balance = 1.0
    return ours, theirs


def routers(model, end):
    return [parameter for name, parameter in model.named_parameters() if name.endswith(end)]


# The balancing loss


@EVERY_BALANCED
@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded rows"])
def test_how_unevenly_experts_are_used_is_what_transformers_says(model_type, padded):
    ours, theirs = balanced_pair(model_type)
    idx = torch.randint(96, (3, 14))
    lengths = [14, 9, 1] if padded else [14] * 3
    mask = torch.arange(14) < torch.tensor(lengths).unsqueeze(1)
    expected = theirs(idx, attention_mask=mask.long(), output_router_logits=True).aux_loss
    positions = torch.where(mask, torch.arange(14), -1) if padded else None
    loss = ours(idx, positions=positions, targets=torch.where(mask, idx, IGNORED))
    torch.testing.assert_close(loss.aux, expected, rtol=1e-5, atol=1e-6)
    assert loss.n_targets == sum(lengths)


@EVERY_BALANCED
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_the_balancing_loss_pulls_the_routers_where_transformers_pulls_them(model_type, again):
    ours, theirs = balanced_pair(model_type)
    ours.n_recomputed = ours.config.n_layer if again else 0
    idx = torch.randint(96, (2, 11))
    theirs(idx, output_router_logits=True).aux_loss.backward()
    ours(idx, targets=idx).aux.backward()
    pulled, expected = routers(ours, ".mlp.gate.weight"), routers(theirs, (".mlp.gate.weight", ".mlp.router.weight"))
    assert len(pulled) == len(expected) > 0
    for our, their in zip(pulled, expected, strict=True):
        scale = their.grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(our.grad / scale, their.grad / scale, rtol=0, atol=1e-4)


@EVERY_BALANCED
@torch.no_grad()
def test_nobody_asks_for_the_balancing_loss_unless_told(model_type):
    ours, _ = balanced_pair(model_type)
    idx = torch.randint(96, (1, 5))
    asked = ours(idx, targets=idx)
    ours.expert_balance = 0.0
    plain = ours(idx, targets=idx)
    assert plain.aux == 0.0 and asked.aux > 0 and torch.equal(asked.nll, plain.nll)


def test_a_model_without_experts_has_no_balancing_loss():
    model = GPT(tiny_config("llama"))
    model.expert_balance = 1.0
    idx = torch.randint(96, (1, 5))
    assert model(idx, targets=idx).aux == 0.0


# The edges of routing


def twins(config):
    """A transformers model whose experts come in pairs that compute the same and that the router cannot tell apart."""
    theirs = their_model(config)
    for name, parameter in theirs.named_parameters():
        if ".mlp.experts." in name or name.endswith((".mlp.gate.weight", ".mlp.router.weight", ".mlp.router.bias")):
            parameter.data[1::2] = parameter.data[::2]
    return theirs


@EVERY_ROUTED
@torch.no_grad()
def test_between_equal_experts_ties_do_not_matter(model_type):
    config = tiny_config(model_type)
    theirs = twins(config)
    ours, idx = our_model(theirs, config), torch.randint(96, (2, 17))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=2e-5)


@EVERY_ROUTED
@torch.no_grad()
def test_a_router_that_is_all_ties_still_gives_each_token_its_experts(model_type):
    config = tiny_config(model_type)
    theirs = their_model(config)
    for name, parameter in theirs.named_parameters():
        if name.endswith((".mlp.gate.weight", ".mlp.router.weight", ".mlp.router.bias")):
            parameter.zero_()
        if ".mlp.experts." in name:
            parameter[1:] = parameter[:1]  # whichever are chosen, they compute the same
    ours, idx = our_model(theirs, config), torch.randint(96, (2, 17))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=2e-5)


@EVERY_ROUTED
def test_a_single_token_leaves_experts_idle_which_then_have_no_gradient(model_type):
    config = tiny_config(model_type, n_expert=8)
    ours, theirs = pair(config)
    idx = torch.randint(96, (1, 1))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=2e-5)
    ours(idx, targets=idx).nll.backward()
    stacks = routers(ours, ".mlp.experts.gate_up")
    assert stacks
    for stack in stacks:
        assert int((stack.grad.flatten(1).abs().amax(1) > 0).sum()) == config.n_expert_per_token
        assert stack.grad.isfinite().all()
