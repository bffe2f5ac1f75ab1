"""Experts compute what transformers' blocks do, forwards and backwards, whichever way the tokens are spread."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from litgpt.experts import Experts, LLaMAMoE, kept_router_logits, load_balancing_loss, route, sort_by_expert

C, I, E, K = 32, 16, 8, 3
PLAIN = dict(
    n_embd=C,
    moe_intermediate_size=I,
    mlp_bias=False,
    n_expert=E,
    n_expert_per_token=K,
    n_expert_groups=None,
    n_topk_groups=None,
    n_topk_scores_per_group=None,
    routed_scaling_factor=1.0,
    norm_topk_prob=False,
    expert_scores="softmax",
    router_bias=False,
    expert_bias=False,
    swiglu_limit=None,
    n_shared_expert=None,
    shared_intermediate_size=None,
    shared_expert_gate=False,
)
GROUPS = dict(expert_scores="sigmoid", n_expert_groups=4, n_topk_groups=2, n_topk_scores_per_group=2)
GPT_OSS = dict(router_bias=True, expert_bias=True, swiglu_limit=0.5)


def described(**fields) -> SimpleNamespace:
    return SimpleNamespace(**PLAIN | fields)


class SharedMLP(nn.Module):
    """What the model's file gives the layer as its shared expert."""

    def __init__(self, config: SimpleNamespace, width: int) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = (nn.Linear(config.n_embd, width, bias=False) for _ in range(2))
        self.proj = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


@pytest.fixture(autouse=True)
def shared_class(monkeypatch):
    monkeypatch.setattr(LLaMAMoE, "shared_class", SharedMLP, raising=False)


# Parity: by the model type its block, what its config says, and what ours says

SIZES = dict(hidden_size=C, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K)
DEEPSEEK = dict(
    hidden_size=C, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2, n_shared_experts=2
)
SHARED = dict(n_shared_expert=2, shared_intermediate_size=2 * I)
BLOCKS = {
    "mixtral": (
        MixtralSparseMoeBlock,
        dict(hidden_size=C, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K),
        dict(norm_topk_prob=True),
    ),
    "qwen2_moe": (
        Qwen2MoeSparseMoeBlock,
        SIZES | dict(shared_expert_intermediate_size=24),
        dict(shared_intermediate_size=24, shared_expert_gate=True),
    ),
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, SIZES | dict(norm_topk_prob=True), dict(norm_topk_prob=True)),
    "olmoe": (OlmoeSparseMoeBlock, dict(hidden_size=C, intermediate_size=I, num_experts=E, num_experts_per_tok=K), {}),
    "deepseek_v3": (
        DeepseekV3MoE,
        DEEPSEEK | dict(norm_topk_prob=True, routed_scaling_factor=2.5),
        GROUPS | SHARED | dict(norm_topk_prob=True, routed_scaling_factor=2.5),
    ),
    "deepseek_v3, not normalised": (
        DeepseekV3MoE,
        DEEPSEEK | dict(norm_topk_prob=False, routed_scaling_factor=1.0),
        GROUPS | SHARED,
    ),
    "gpt_oss": (
        GptOssMLP,
        dict(hidden_size=C, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, swiglu_limit=0.5),
        GPT_OSS,
    ),
}
NAMES = {
    "router": "gate",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "e_score_correction_bias": "correction",
    "shared_expert": "shared",
    "shared_experts": "shared",
    "shared_expert_gate": "shared_gate",
    "gate_up_proj_bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
}
IN_SHARED = {"gate_proj": "fc_1", "up_proj": "fc_2", "down_proj": "proj"}


def as_ours(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A weight (or its gradient) of a transformers block under our name and in our layout."""
    parts = name.split(".")
    parts = [(IN_SHARED if "shared" in parts[0] and i else NAMES).get(part, part) for i, part in enumerate(parts)]
    if parts[-1] == "correction":
        parts = ["correction"]
    return ".".join(parts), tensor


def as_ours_from_gpt_oss(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    name, tensor = as_ours(name, tensor)
    if name in ("experts.gate_up", "experts.down"):
        tensor = tensor.mT
    if "gate_up" in name:  # gate and up take turns
        tensor = torch.cat((tensor[:, ::2], tensor[:, 1::2]), 1)
    return name, tensor


def pair(kind: str) -> tuple[LLaMAMoE, nn.Module, Callable[[str, Tensor], tuple[str, Tensor]]]:
    """Our layer, theirs with the same weights, and a function that gives theirs our names."""
    block_class, theirs, ours = BLOCKS[kind]
    config = AutoConfig.for_model(kind.split(",")[0], **theirs)
    config._experts_implementation = "eager"
    block = block_class(config).train()
    with torch.no_grad():
        for tensor in block.state_dict().values():
            nn.init.normal_(tensor, 0.0, 0.3)
    renamed = as_ours_from_gpt_oss if kind == "gpt_oss" else as_ours
    moe = LLaMAMoE(described(**ours))
    moe.load_state_dict(dict(renamed(name, tensor.clone()) for name, tensor in block.state_dict().items()))
    return moe, block, renamed


def output(block: nn.Module, x: Tensor) -> Tensor:
    y = block(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("shape", [(2, 20), (1, 1)], ids=["many tokens", "one token, most experts idle"])
def test_the_layer_computes_what_transformers_does(kind, shape):
    moe, block, renamed = pair(kind)
    x = torch.randn(*shape, C, requires_grad=True)
    their_x, grad = x.detach().clone().requires_grad_(), torch.randn(*shape, C)
    ours, theirs = moe(x), output(block, their_x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(x.grad, their_x.grad, atol=1e-5, rtol=1e-5)
    gradients = dict(renamed(name, parameter.grad) for name, parameter in block.named_parameters())
    assert gradients.keys() == dict(moe.named_parameters()).keys()
    for name, parameter in moe.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", BLOCKS)
def test_in_bfloat16_the_layer_is_no_further_from_the_truth_than_transformers(kind):
    moe, block, _ = pair(kind)
    x = torch.randn(1, 200, C).bfloat16()
    with torch.no_grad():
        for module in (moe, block):
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
        truth = copy.deepcopy(moe).double()(x.double())
        chosen = route(moe.gate(x[0].float()), moe.config, moe.correction)[0].sort().values
        same = chosen == route(moe.bfloat16().gate(x[0]), moe.config, moe.correction)[0].sort().values  # rounded scores may choose others
        same = same.all(1)
        ours, theirs = moe(x), output(block.bfloat16(), x)
    assert same.float().mean() > 0.8
    ours_off, theirs_off = ((y.double() - truth)[0, same].square().mean().sqrt() for y in (ours, theirs))
    assert ours_off <= theirs_off * 1.1


# The router


@pytest.mark.parametrize("kind", BLOCKS)
def test_ties_choose_the_experts_that_transformers_chooses(kind):
    logits = torch.randint(0, 3, (200, E)).float()  # many ties
    moe, block, _ = pair(kind)
    if moe.correction is not None:
        moe.correction.zero_()
        block.gate.e_score_correction_bias.zero_()
    router = block.router if kind == "gpt_oss" else block.gate
    router.weight.data, router.hidden_dim = torch.eye(E), E
    if kind == "gpt_oss":
        router.bias.data.zero_()
    _, their_weights, theirs = router(logits)
    indices, weights = route(logits, moe.config, moe.correction)
    assert torch.equal(indices, theirs)
    torch.testing.assert_close(weights, their_weights, atol=1e-6, rtol=1e-6)


def test_the_correction_chooses_but_does_not_weigh():
    logits, correction = torch.randn(50, E), torch.zeros(E)
    correction[5] = 100.0
    indices, weights = route(logits, described(expert_scores="sigmoid"), correction)
    assert (indices == 5).any(1).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, indices))


def test_sigmoid_scores_without_groups_compare_all_experts():
    logits = torch.randn(50, E)
    indices, _ = route(logits, described(expert_scores="sigmoid"))
    assert torch.equal(indices.sort().values, logits.topk(K).indices.sort().values)


def test_routing_weights_are_fp32_whatever_the_logits_are():
    assert route(torch.randn(4, E).bfloat16(), described())[1].dtype == torch.float32


def test_the_correction_stays_in_fp32_when_the_model_is_cast():
    moe = LLaMAMoE(described(**GROUPS))
    moe.correction.fill_(1.0009765)
    moe.bfloat16()
    assert moe.correction.dtype == torch.float32 and moe.gate.weight.dtype == torch.bfloat16
    assert torch.equal(moe.correction, torch.full((E,), 1.0009765))


# How tokens are spread


def one_by_one(layer: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The sum as its formula says it: token by token, expert by expert."""
    rows = []
    for token, chosen, shares in zip(x, indices.tolist(), weights):
        y = torch.zeros_like(token)
        for e, share in zip(chosen, shares):
            inner = layer.gate_up[e] @ token + (0 if layer.gate_up_bias is None else layer.gate_up_bias[e])
            gate, up = inner.chunk(2)
            if layer.limit is not None:
                gate, up = gate.clamp(max=layer.limit), up.clamp(-layer.limit, layer.limit)
                inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                inner = F.silu(gate) * up
            y = y + share * (layer.down[e] @ inner + (0 if layer.down_bias is None else layer.down_bias[e]))
        rows.append(y)
    return torch.stack(rows)


def anywhere(n_tokens: int, k: int = K) -> Tensor:
    """Random experts for each token."""
    return torch.stack([torch.randperm(E)[:k] for _ in range(n_tokens)])


SPREADS = {
    "all tokens on the same experts": torch.tensor([[2, 0, 7]]).expand(30, 3),
    "one token": torch.tensor([[7, 1, 4]]),
    "only the last experts are busy": torch.stack([torch.randperm(3) + 5 for _ in range(30)]),
    "one expert has one row": torch.cat((torch.tensor([[6, 0, 1]]), torch.tensor([[0, 1, 2]]).expand(9, 3))),
    "many tokens anywhere": anywhere(300),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("fields", [{}, GPT_OSS], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize("width", [16, 6], ids=["aligned", "odd sizes"])
def test_any_spread_of_tokens_gives_the_sum_of_its_experts(spread, fields, width):
    layer, indices = Experts(described(moe_intermediate_size=width, n_embd=width + 4, **fields)), SPREADS[spread]
    x, weights = torch.randn(len(indices), width + 4, requires_grad=True), torch.rand(indices.shape, requires_grad=True)
    inputs = [x, weights, *layer.parameters()]
    ours, expected = layer(x, indices, weights), one_by_one(layer, x, indices, weights)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, GPT_OSS], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 12, 400])
def test_half_precision_agrees_with_double_precision(fields, dtype, tolerance, n_tokens):
    layer = Experts(described(**fields)).to(dtype)
    x, indices, weights = (
        torch.randn(n_tokens, C).to(dtype),
        torch.stack([torch.randperm(E)[:K] for _ in range(n_tokens)]),
        torch.rand(n_tokens, K),
    )
    double = copy.deepcopy(layer).double()
    with torch.no_grad():
        ours, expected = layer(x, indices, weights), double(x.double(), indices, weights.double())
    assert ours.dtype == dtype
    assert (ours - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("fields", [{}, GPT_OSS], ids=["swiglu", "gpt-oss"])
def test_gradients_are_those_of_finite_differences(fields):
    layer = Experts(described(n_embd=4, moe_intermediate_size=3, n_expert=4, **fields)).double()
    indices = torch.tensor([[0, 2], [2, 0], [3, 2]])
    names, parameters = zip(*layer.named_parameters())

    def run(x: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (x, indices, weights))

    x, weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, weights, *parameters))


def test_no_tokens_give_no_rows():
    moe = LLaMAMoE(described(**GPT_OSS))
    y = moe(torch.randn(0, 5, C, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 5, C)


def test_idle_experts_get_no_gradient_and_frozen_ones_none():
    layer, x = Experts(described()), torch.randn(5, C, requires_grad=True)
    layer.down.requires_grad_(False)
    layer(x, torch.tensor([[1, 4]]).expand(5, 2), torch.rand(5, 2)).sum().backward()
    assert layer.down.grad is None
    assert [e for e in range(E) if layer.gate_up.grad[e].any()] == [1, 4]


def test_rows_are_sorted_and_every_pair_finds_its_row():
    indices = anywhere(40)
    rows = sort_by_expert(indices, E)
    assert torch.equal(rows.experts, rows.experts.sort().values)
    assert torch.equal(rows.experts[rows.places], indices)
    assert torch.equal(rows.tokens[rows.places], torch.arange(40).unsqueeze(1).expand(40, K))
    assert torch.equal(rows.ends.long(), torch.bincount(indices.flatten(), minlength=E).cumsum(0))


def test_only_busy_experts_are_read():
    layer = Experts(described())
    with torch.no_grad():
        for e in (0, 2, 3, 5, 6, 7):
            layer.gate_up[e], layer.down[e] = torch.nan, torch.nan
    y = layer(torch.randn(9, C), torch.tensor([[1, 4]]).expand(9, 2), torch.rand(9, 2))
    assert y.isfinite().all()


def test_rows_are_kept_once_for_the_backward_pass():
    layer, n, k = Experts(described()), 64, 4
    indices, weights = anywhere(n, k), torch.rand(n, k, requires_grad=True)
    x, kept = torch.randn(n, C, requires_grad=True), {}
    mine = {parameter.data_ptr() for parameter in layer.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in mine:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, indices, weights)
    assert sum(kept.values()) <= n * C + n * k * (3 * I + 1)  # x itself, gate and up, what goes down, the weights


def test_mixed_precision_computes_in_bf16_and_gives_fp32_gradients():
    moe = LLaMAMoE(described(**GPT_OSS))
    x = torch.randn(2, 30, C)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in moe.parameters()} == {torch.float32}


def test_deepseeks_router_computes_in_fp32_even_in_mixed_precision():
    moe, x = LLaMAMoE(described(**GROUPS)), torch.randn(5, C)
    with torch.autocast("cpu", torch.bfloat16):
        logits = moe.gate(x)
    torch.testing.assert_close(logits, x @ moe.gate.weight.t())


@pytest.mark.parametrize("fields", [{}, GPT_OSS], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_computes_the_same_in_one_graph(fields, dtype):
    moe = LLaMAMoE(described(**fields)).to(dtype)
    x = torch.randn(2, 40, C, dtype=dtype)
    compiled = torch.compile(copy.deepcopy(moe), backend="aot_eager", fullgraph=True)
    ours, expected = compiled(x), moe(x)
    torch.testing.assert_close(ours, expected)
    ours.sum().backward()
    expected.sum().backward()
    for (name, a), b in zip(moe.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


# Making


def test_new_experts_start_as_linear_layers_would():
    torch.manual_seed(0)
    layer = Experts(described(n_embd=64, moe_intermediate_size=48, expert_bias=True))
    for weight, bias in ((layer.gate_up, layer.gate_up_bias), (layer.down, layer.down_bias)):
        linear = nn.Linear(weight.size(2), weight.size(1))
        bound = weight.size(2) ** -0.5
        for ours, theirs in ((weight, linear.weight), (bias, linear.bias)):
            assert ours.abs().max() <= bound
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15)


def test_a_layer_made_without_memory_becomes_real():
    with torch.device("meta"):
        moe = LLaMAMoE(described(**GROUPS, **SHARED))
    assert all(tensor.is_meta for tensor in moe.state_dict().values())
    moe.to_empty(device="cpu")
    assert moe.correction.dtype == torch.float32 and not moe.correction.is_meta
    real = LLaMAMoE(described(**GROUPS, **SHARED))
    moe.load_state_dict(real.state_dict())
    x = torch.randn(2, 3, C)
    assert torch.equal(moe(x), real(x))


def test_parameters_have_the_names_of_the_contract():
    moe = LLaMAMoE(described(**GROUPS | GPT_OSS, shared_intermediate_size=24, shared_expert_gate=True))
    assert {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()} == {
        "gate.weight": (E, C),
        "gate.bias": (E,),
        "correction": (E,),
        "experts.gate_up": (E, 2 * I, C),
        "experts.down": (E, C, I),
        "experts.gate_up_bias": (E, 2 * I),
        "experts.down_bias": (E, C),
        "shared.fc_1.weight": (24, C),
        "shared.fc_2.weight": (24, C),
        "shared.proj.weight": (C, 24),
        "shared_gate.weight": (1, C),
    }


# The loss that balances


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "some padding"])
def test_the_balancing_loss_is_that_of_transformers(masked):
    logits = [torch.randn(2 * 15, E, requires_grad=True) for _ in range(3)]
    mask = (torch.arange(15) < torch.tensor([[9], [15]])).long() if masked else None
    ours, theirs = load_balancing_loss(logits, E, K, mask), load_balancing_loss_func(tuple(logits), E, K, mask)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b)


def test_the_balancing_loss_of_nothing_but_padding_is_zero():
    assert load_balancing_loss([torch.randn(4, E)], E, K, torch.zeros(2, 2)) == 0


@pytest.mark.parametrize("again", [False, True], ids=["kept", "activation checkpointing"])
def test_router_logits_are_kept_when_asked_for_and_carry_gradients(again):
    layers = nn.ModuleList(LLaMAMoE(described()) for _ in range(2))
    x = torch.randn(1, 10, C, requires_grad=True)
    with kept_router_logits(layers) as logits:
        y = x
        for layer in layers:
            y = y + (checkpoint(layer, y, use_reentrant=False) if again else layer(y))
    assert [tuple(layer.shape) for layer in logits] == [(10, E)] * 2
    (y.sum() + load_balancing_loss(logits, E, K)).backward()
    assert len(logits) == 2
    grads = [layer.gate.weight.grad.clone() for layer in layers]
    layers.zero_grad()
    y, plain = x, []
    for layer in layers:
        plain.append(layer.gate(y[0]))
        y = y + layer(y)
    (y.sum() + load_balancing_loss(plain, E, K)).backward()
    for layer, grad in zip(layers, grads):
        torch.testing.assert_close(layer.gate.weight.grad, grad)
    assert all(layer.kept_logits is None for layer in layers)
