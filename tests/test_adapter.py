"""Adapter and Adapter v2, what they compute and what they train, in every family."""

import pytest
import torch
from tiny import EVERY_FAMILY, facts, tiny_config
from torch import Tensor, nn
from torch.optim import AdamW

from litgpt import adapter, adapter_v2
from litgpt.attention import Segments
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.experts import Experts
from litgpt.families import FAMILIES, Family
from litgpt.launch import cast_parameters
from litgpt.model import GPT, HeadNorm, RMSNorm
from litgpt.quantize import quantize_model
from litgpt.recurrent import GatedRMSNorm

METHODS = {"adapter": adapter.add_adapter, "adapter_v2": adapter_v2.add_adapter_v2}
EVERY_METHOD = pytest.mark.parametrize("add", METHODS.values(), ids=METHODS)
REFUSED = ("lfm2", "deepseek_v3", "qwen3_next")  # by Adapter, for layers without plain attention
CASES = {f"{name}-{kind}": (family, add) for name, family in FAMILIES.items() for kind, add in METHODS.items()}
CASES = {name: case for name, case in CASES.items() if name not in [f"{refused}-adapter" for refused in REFUSED]}
EVERY_CASE = pytest.mark.parametrize(("family", "add"), CASES.values(), ids=CASES)
NORMS = (nn.LayerNorm, RMSNorm, HeadNorm, GatedRMSNorm)
IDS = torch.arange(3, 27).view(2, 12)


def deep(family: Family) -> Config:
    """A tiny config of a family with twice as many layers: the first two get no prefix."""
    n, fields = tiny_config(family).n_layer, family.base | facts(family).TINY
    by_layer = {name: value * 2 for name, value in fields.items() if isinstance(value, list) and len(value) == n}
    return tiny_config(family, n_layer=2 * n, **by_layer)


def adapted(config: Config, add) -> GPT:
    """A model whose new parameters are all random, in float64."""
    model = GPT(config)
    add(model)
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.requires_grad:
            parameter.data.normal_(std=0.3).add_("scale" in name)
    return model.double().eval()


def same(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())), check_dtype=False)


# What is computed


@EVERY_CASE
@torch.inference_mode()
def test_a_model_begins_as_what_it_was(family: Family, add):
    config = deep(family)
    model = GPT(config)
    before = model(IDS)
    add(model)
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)


@EVERY_FAMILY
@torch.inference_mode()
def test_queries_gather_from_a_prefix_what_the_formula_says(family: Family):
    config = deep(family)
    model, seen = adapted(config, adapter_v2.add_adapter_v2), {}
    layers = [block.attn for block in model.transformer.h if isinstance(block.attn, adapter.CausalSelfAttention)]
    assert len(layers) == sum(mixer == "attention" for mixer in config.mixers[2:])
    for attn in layers:
        attn.gathered = noting(attn, seen)
    model(IDS)
    for attn, (q, added) in seen.items():
        rows = attn.qkv(attn.adapter_wte.weight)  # (P, [all q | all k | all v])
        k, v = rows.split(config.qkv_sizes, dim=-1)[1:]
        if attn.norm_q is not None:
            k = attn.norm_k(k if attn.flat else k.view(10, -1, config.head_size)).reshape(k.shape)
        if config.clip_qkv is not None:
            k, v = k.clamp(-config.clip_qkv, config.clip_qkv), v.clamp(-config.clip_qkv, config.clip_qkv)
        for head in range(config.n_head):
            start = config.head_size * (head // (config.n_head // config.n_query_groups))
            scores = q[:, :, head] @ k[:, start : start + config.head_size].T * (attn.scale or config.head_size**-0.5)
            if attn.softcap is not None:
                scores = attn.softcap * (scores / attn.softcap).tanh()
            gathered = scores.softmax(-1) @ v[:, start : start + config.head_size]
            same(added[:, :, head], attn.gating_factor[0, 0, head] * gathered)
            assert added[:, :, head].abs().max() > 1e-6
    assert len(seen) == len(layers)


def noting(attn: adapter.CausalSelfAttention, seen: dict):
    """The method `gathered`, which notes the queries and what the prefix adds."""

    def gathered(q: Tensor, *more) -> Tensor:
        y, gates = type(attn).gathered(attn, q, *more), attn.gating_factor.data
        attn.gating_factor.data = torch.zeros_like(gates)
        seen[attn] = q, y - type(attn).gathered(attn, q, *more)
        attn.gating_factor.data = gates
        return y

    return gathered


@EVERY_FAMILY
@torch.inference_mode()
def test_scales_and_biases_equal_layers_that_have_them_in_their_weights(family: Family):
    model = adapted(deep(family), adapter_v2.add_adapter_v2)
    logits, n_layers = model(IDS), 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, adapter_v2.AdapterV2Linear):
            bias = layer.adapter_bias if layer.linear.bias is None else layer.linear.bias + layer.adapter_bias
            plain = type(layer.linear)(layer.in_features, layer.out_features, dtype=torch.float64)
            plain.weight.data, plain.bias.data = layer.adapter_scale[:, None] * layer.linear.weight, layer.adapter_scale * bias
        elif isinstance(layer, adapter_v2.AdapterV2Experts):
            plain = layer.base
            for leaf, part in (("gate_up", "up"), ("down", "down")):
                scale, bias = getattr(layer, f"adapter_{part}_scale"), getattr(layer, f"adapter_{part}_bias")
                own = getattr(plain, f"{leaf}_bias")
                setattr(plain, f"{leaf}_bias", nn.Parameter(scale * (bias if own is None else own + bias)))
                getattr(plain, leaf).data *= scale[:, :, None]
        else:
            continue
        model.set_submodule(name, plain)
        n_layers += 1
    assert n_layers and not any(isinstance(layer, adapter_v2.AdapterV2Linear | adapter_v2.AdapterV2Experts) for layer in model.modules())
    same(model(IDS), logits)


@EVERY_CASE
@torch.inference_mode()
def test_a_cache_segments_and_padding_change_nothing(family: Family, add):
    config = deep(family)
    model = adapted(config, add)
    full, tolerance = model(IDS), 1e-8 if "gated_delta" not in config.mixers else 1e-5  # whose sums are in fp32
    cache = model.new_cache(2, 12)
    steps = [model(IDS[:, start:end], cache=cache) for start, end in ((0, 6), (6, 7), (7, 8), (8, 12))]
    same(torch.cat(steps, 1), full, tolerance)
    lengths = [12, 5, 7]
    packed = torch.cat((IDS[0], IDS[1, :5], IDS[0, :7]))[None]
    for segments in (Segments(lengths), Segments(lengths).without_lengths()):
        parts = model(packed, segments=segments)[0].split(lengths)
        for part, alone in zip(parts, (full[0], full[1, :5], full[0, :7]), strict=True):
            same(part, alone, tolerance)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), IDS), 1)
    same(model(padded, positions=torch.arange(-3, 12).clamp(min=-1))[:, 3:], full, tolerance)
    counts, cache = [12, 4], model.new_cache(2, 12)
    parts = model(torch.cat((IDS[0], IDS[1, :4]))[None], cache=cache.span(counts, packed=True))[0].split(counts)
    same(parts[0], full[0], tolerance)
    same(parts[1], full[1, :4], tolerance)


# What is trained


@EVERY_CASE
def test_all_that_is_named_as_trained_moves_and_nothing_else(family: Family, add):
    config = deep(family)
    model = GPT(config)
    add(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(2):  # the gates are closed in the first
        idx = torch.randint(3, 96, (8, 24))
        model(idx[:, :-1], targets=idx[:, 1:]).nll.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained
    for i in range(config.n_layer):
        assert (f"transformer.h.{i}.attn.adapter_wte.weight" in trained) == (i >= 2 and config.mixers[i] == "attention")
    if add is adapter_v2.add_adapter_v2:
        norms = {id(parameter) for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()}
        assert norms <= {id(parameter) for name, parameter in model.named_parameters() if name in trained}
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        experts = [module for module in model.modules() if type(module) is Experts]
        scales = [name for name in trained if name.endswith(("adapter_scale", "up_scale"))]
        assert len(scales) == len(layers) + len(experts)
        n_norm_weights = len([name for name in trained if not adapter_v2.is_new(name)])
        assert n_norm_weights == len(norms)


def test_what_prefixes_begin_as_depends_on_the_seed_alone():
    def weights(seed: int) -> list[Tensor]:
        torch.rand(1)
        model = GPT(tiny_config("llama", n_layer=4))
        adapter.add_adapter(model, seed)
        return [block.attn.adapter_wte.weight for block in list(model.transformer.h)[2:]]

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(one, again, other, strict=True))
    assert not torch.equal(one[0], one[1])


@EVERY_METHOD
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_of_four_bits_are_adapted_too(family: str, add):
    model = GPT(tiny_config(family, n_layer=4))
    quantize_model(model, "bnb.nf4")
    before = model(IDS).detach()
    add(model)
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(IDS[:, :-1], targets=IDS[:, 1:]).nll)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@EVERY_CASE
def test_what_is_trained_in_fp32_computes_beside_a_model_in_16_bits(family: Family, add):
    model = GPT(deep(family))
    add(model)
    with torch.no_grad():
        expected = model(IDS[:, :-1], targets=IDS[:, 1:]).nll.item()
        cast_parameters(model, "bf16-true")
        assert model(IDS[:, :-1]).dtype == torch.bfloat16
    loss = model(IDS[:, :-1], targets=IDS[:, 1:]).nll  # of the same length, for each product in 16 bits is compiled when it is first seen
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.05)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_recomputed_blocks_have_the_same_gradients():
    torch.manual_seed(0)
    model = adapted(tiny_config("llama", n_layer=4), adapter_v2.add_adapter_v2)
    gradients = []
    for n_recomputed in (0, 4):
        model.n_recomputed = n_recomputed
        model.zero_grad()
        model(IDS[:, :-1], targets=IDS[:, 1:]).nll.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for one, other in zip(*gradients, strict=True):
        same(one, other)


# What is refused


@pytest.mark.parametrize(
    ("family", "n_layer", "why"),
    [
        ("llama", 2, "has 2 layers"),
        ("lfm2", None, "'short_conv'"),
        ("deepseek_v3", None, "'latent'"),
        ("qwen3_next", None, "'gated_delta'"),
    ],
)
def test_models_without_a_place_for_prefixes_are_refused_by_adapter_but_not_by_v2(family: str, n_layer: int | None, why: str):
    config = deep(FAMILIES[family]) if n_layer is None else tiny_config(family, n_layer=n_layer)
    for make in (lambda: adapter.add_adapter(GPT(config)), lambda: adapter.GPT(adapter.Config(**config.to_dict()))):
        with pytest.raises(UserError, match=f"{why}.*finetune_adapter_v2"):
            make()
    model = GPT(config)
    adapter_v2.add_adapter_v2(model)
    assert any(parameter.requires_grad for parameter in model.parameters())


# LitGPT's names


@pytest.mark.parametrize("module", [adapter, adapter_v2])
def test_the_classes_of_litgpts_make_the_same_model(module):
    config = module.Config(**tiny_config("llama", n_layer=5).to_dict() | dict(adapter_prompt_length=3, adapter_start_layer=3))
    model = module.GPT(config)
    plain = GPT(tiny_config("llama", n_layer=5))
    lost = model.load_state_dict(plain.state_dict(), strict=False)
    assert not lost.unexpected_keys
    assert all(module.adapter_filter(name, None) for name in lost.missing_keys)
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=0)
    mark = adapter.mark_only_adapter_as_trainable if module is adapter else adapter_v2.mark_only_adapter_v2_as_trainable
    mark(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in model.state_dict() if module.adapter_filter(name, None)}
    assert [name for name in trained if "adapter_wte" in name and "h.3" not in name] == ["transformer.h.4.attn.adapter_wte.weight"]
    assert model.transformer.h[3].attn.adapter_wte.weight.shape == (3, 32)
    assert isinstance(module.Block(config, 4).attn, module.CausalSelfAttention)
    assert module.GPT.from_name("pythia-14m", n_layer=3).transformer.h[2].attn.gating_factor.shape == (1, 1, 4, 1)
