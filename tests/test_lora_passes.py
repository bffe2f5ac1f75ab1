"""The forward and backward passes of LoRA layers: fast ones equal plain ones, in every type and under every wrapper."""

import copy

import pytest
import torch
from tiny import tiny_config

from litgpt.lora import Dropout, LoRA, LoRALinear, add_lora
from litgpt.model import GPT, Linear

SHAPES = {
    "one block": dict(),
    "q and v": dict(sizes=[8, 4, 4], enabled=[True, False, True]),
    "k": dict(sizes=[8, 4, 4], enabled=[False, True, False]),
    "all": dict(sizes=[8, 4, 4], enabled=[True, True, True]),
}


def layer_of(dtype=torch.float32, bias=True, n=12, out=16, **settings):
    linear = Linear(n, out, bias=bias).to(dtype).requires_grad_(False)
    layer = LoRALinear(linear, r=2, alpha=5, **settings)
    torch.nn.init.normal_(layer.lora_B, std=0.3)
    return layer.train()


def results(layer, x, g):
    """Output and gradients of a layer."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def plain(layer):
    """The same layer, computed by autograd from the formula."""
    layer = copy.deepcopy(layer)
    layer._may_be_fused = lambda x: False
    return layer


class Dropped(torch.nn.Module):
    """The same inputs are dropped each time."""

    def forward(self, x):
        generator = torch.Generator().manual_seed(1)
        return x * (torch.rand(x.shape, generator=generator) > 0.3)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("drops", [True, False], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_those_of_autograd(shape, drops, bias):
    layer = layer_of(bias=bias, **shape)
    if drops:
        layer.dropout = Dropped()
    x, g = torch.randn(2, 5, 12), torch.randn(2, 5, 16)
    assert layer._may_be_fused(x) and not plain(layer)._may_be_fused(x)
    for ours, expected in zip(results(layer, x, g), results(plain(layer), x, g), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_an_input_that_needs_no_gradient_gets_none_and_rows_may_lie_apart():
    layer, x, g = layer_of(), torch.randn(12, 5).T, torch.randn(16, 5).T
    layer(x).backward(g)
    found = [layer.lora_A.grad, layer.lora_B.grad]
    layer.zero_grad()
    plain_layer = plain(layer)
    plain_layer(x).backward(g)
    torch.testing.assert_close(found, [plain_layer.lora_A.grad, plain_layer.lora_B.grad])
    assert x.grad is None


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_in_bf16_errors_are_those_of_rounding_and_gradients_of_the_update_come_in_fp32(dora):
    layer = layer_of(torch.bfloat16, n=96, out=64, dora=dora, bias=False)
    exact = plain(layer).double()
    x, g = torch.randn(3, 50, 96).bfloat16(), torch.randn(3, 50, 64).bfloat16()
    found, expected = results(layer, x, g), results(exact, x.double(), g.double())
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 2 + [torch.float32] * (3 if dora else 2)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 0.006 * theirs.norm()


def test_biases_that_are_trained_too_get_their_gradients():
    layer = layer_of()
    layer.linear.bias.requires_grad_()
    results(layer, torch.randn(3, 12), torch.ones(3, 16))
    torch.testing.assert_close(layer.linear.bias.grad, torch.full((16,), 3.0))


# Dropout


@pytest.mark.parametrize("p", [0.05, 0.5, 0.99999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_a_share_scales_the_rest_and_gives_gradients_to_what_it_kept(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(7, 9, 331, dtype=dtype, requires_grad=True)
    y = Dropout(p).train()(x)
    kept = y != 0
    share = kept.float().mean().item()
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    y.backward(torch.full_like(y, 3))
    torch.testing.assert_close(x.grad, y.detach() * 3)


def test_dropout_is_drawn_from_the_global_generator_and_every_place_by_itself():
    drop = Dropout(0.5).train()
    x = torch.ones(4000, 8)
    torch.manual_seed(1)
    first, second = drop(x), drop(x)
    torch.manual_seed(1)
    assert torch.equal(first, drop(x)) and not torch.equal(first, second)
    kept = (first != 0).float()
    assert (torch.corrcoef(kept.T) - torch.eye(8)).abs().max() < 0.1 and (kept.mean(0) - 0.5).abs().max() < 0.05
    assert drop.eval()(x) is x and Dropout(0.0).train()(x) is x


# In a model


def gradients(model, idx, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    model(idx, targets=idx).nll.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tuned(settings, dtype=torch.float32):
    torch.manual_seed(3)
    model = GPT(tiny_config("llama")).to(dtype)
    add_lora(model, settings)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train(), torch.randint(96, (2, 13))


VARIANTS = {
    "dropout": LoRA(r=2, dropout=0.3, targets="all-linear", head=True),
    "dora": LoRA(r=2, dropout=0.3, projection=True, dora=True),
}
EVERY_VARIANT = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


@EVERY_VARIANT
def test_blocks_that_are_computed_again_drop_the_same_inputs(settings):
    model, idx = tuned(settings)
    expected = gradients(model, idx)
    model.n_recomputed = 2
    for name, gradient in gradients(model, idx).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6)


@EVERY_VARIANT
def test_compiled_blocks_have_the_same_gradients(settings):
    model, idx = tuned(LoRA(**vars(settings) | dict(dropout=0.0)))
    expected = gradients(model, idx)
    model.transformer.h[1].compile(backend="aot_eager", fullgraph=True)  # which passes its own gradients and those of its input on
    for name, gradient in gradients(model, idx).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


@EVERY_VARIANT
def test_under_autocast_products_are_in_bf16_and_gradients_near_those_in_fp32(settings):
    model, idx = tuned(LoRA(**vars(settings) | dict(dropout=0.0)))
    expected = gradients(model, idx)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, idx)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32 and (gradient - expected[name]).norm() < 0.1 * expected[name].norm()


def test_activations_that_are_kept_for_an_update_are_its_input_and_no_copy_in_fp32():
    layer, kept = layer_of(torch.bfloat16, n=64, out=64), []
    x = torch.randn(100, 64).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.numel() >= 100 * 64]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()
