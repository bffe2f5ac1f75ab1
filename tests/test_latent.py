"""Latent attention against transformers', and its forms against each other."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from litgpt import model as model_module
from litgpt.attention import Context, Segments, new_context
from litgpt.cache import Cache, Latents
from litgpt.config import Config
from litgpt.model import LatentAttention, latent_scale
from litgpt.rope import Rope

WIDTH = 32
SIZES = dict(q_lora_rank=20, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=10)
YARN = dict(factor=4.0, original_max_seq_len=16, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
NAMES = dict(q_proj="q", q_a_proj="q_a", q_a_layernorm="q_a_norm", q_b_proj="q_b", o_proj="proj") | dict(
    kv_a_proj_with_mqa="kv_a", kv_a_layernorm="kv_a_norm", kv_b_proj="kv_b"
)
KINDS = {
    "interleaved": dict(rope_interleave=True),
    "halves": dict(rope_interleave=False),
    "one query matrix": dict(rope_interleave=True, latent_attention=SIZES | dict(q_lora_rank=None)),
    "biases": dict(rope_interleave=True, attn_bias=True, attn_proj_bias=True),
    "yarn": dict(rope_interleave=True, rope_adjustments=YARN),
}


def tiny(**fields) -> Config:
    sizes = dict(n_layer=1, n_embd=WIDTH, n_head=4, block_size=64, vocab_size=96, padded_vocab_size=96)
    return Config(**dict(name="tiny", latent_attention=SIZES, attn_bias=False, attn_proj_bias=False) | sizes | fields)


def ours_of(config: Config) -> LatentAttention:
    layer = LatentAttention(config, 0).eval()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return layer


def theirs_of(config: Config, ours: LatentAttention) -> tuple[nn.Module, nn.Module]:
    rope = dict(rope_type="default", rope_theta=10000.0)
    if config.rope_adjustments:
        known = {name: value for name, value in YARN.items() if name != "original_max_seq_len"}
        rope |= known | dict(rope_type="yarn", original_max_position_embeddings=YARN["original_max_seq_len"])
    described = DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rope_parameters=rope,
        rope_interleave=config.rope_interleave,
        attention_bias=config.attn_bias,
        attn_implementation="eager",
        **config.latent_attention,
    )
    theirs, weights = DeepseekV3Attention(described, 0).eval(), ours.state_dict()
    theirs.load_state_dict({name: weights[NAMES[name.split(".")[0]] + "." + name.split(".")[1]] for name in theirs.state_dict()})
    return theirs, DeepseekV3RotaryEmbedding(described)


def context_of(config: Config, T: int, cache: Cache | None = None, segments: Segments | None = None, rows: int = 2) -> Context:
    span, idx = None if cache is None else cache.span([T] * rows), torch.zeros(rows, T, dtype=torch.long)
    return new_context(idx, None, segments, span, set(config.windows), Rope(config), torch.float32)


def new_cache(layer: LatentAttention, rows: int, length: int, dtype: torch.dtype = torch.float32) -> Cache:
    device = torch.device("cpu")
    return Cache([layer.new_state(rows, length, length, 0, dtype, device)], rows, length, length, 0, device)


def cached(layer: LatentAttention, config: Config, x: Tensor, counts: list[int]) -> Tensor:
    """What the layer makes of x in calls of so many tokens."""
    cache, ys = new_cache(layer, len(x), x.size(1)), []
    for part in x.split(counts, dim=1):
        context = context_of(config, part.size(1), cache, rows=len(x))
        ys.append(layer(part, context, cache.states[0]))
        context.span.commit()
    return torch.cat(ys, dim=1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_layer_and_its_gradients_equal_those_of_transformers(kind):
    config, T = tiny(**kind), 40
    ours = ours_of(config)
    theirs, rotary = theirs_of(config, ours)
    x, weights = torch.randn(2, T, WIDTH), torch.randn(2, T, WIDTH)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    mask = torch.full((T, T), float("-inf")).triu(1).expand(2, 1, T, T)
    results = ours(inputs[0], context_of(config, T)), theirs(inputs[1], rotary(x, torch.arange(T)[None]), mask)[0]
    for result in results:
        (result * weights).sum().backward()
    named = dict(ours.named_parameters())
    pairs = [results, (inputs[0].grad, inputs[1].grad)]
    for name, parameter in theirs.named_parameters():
        module, part = name.split(".")
        pairs.append((named[f"{NAMES[module]}.{part}"].grad, parameter.grad))
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


class Wrapped(nn.Linear):
    """A layer of which only the call may be used."""


def test_the_scale_has_the_square_of_yarns_factor_only_where_mscale_all_dim_is_given():
    assert latent_scale(16, None) == latent_scale(16, dict(YARN, mscale_all_dim=None)) == 0.25
    assert latent_scale(16, YARN) == pytest.approx(0.25 * (0.1 * 1.3862943611 + 1) ** 2)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("counts", [[1] * 24, [24], [10, 1, 1, 12], [3, 20, 1]], ids=str)
@pytest.mark.parametrize("form", ["chosen", "absorbed", "expanded"])
def test_cached_calls_equal_the_whole(kind, counts, form, monkeypatch):
    config = tiny(**kind)
    layer, x = ours_of(config), torch.randn(2, 24, WIDTH)
    whole = layer(x, context_of(config, 24))
    if form == "absorbed":
        monkeypatch.setattr(layer, "_absorbs", lambda x, span: True)
    elif form == "expanded":
        layer.kv_b.__class__ = Wrapped
    torch.testing.assert_close(cached(layer, config, x, counts), whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_step_leaves_the_latents_as_they_are_and_a_prefill_expands_them(monkeypatch):
    config = tiny(latent_attention=SIZES | dict(kv_lora_rank=64))
    layer, x, widths = ours_of(config), torch.randn(2, 20, WIDTH), []

    def attend(q: Tensor, *rest) -> Tensor:
        widths.append(q.size(-1))
        return real(q, *rest)

    real = model_module.attend
    monkeypatch.setattr(model_module, "attend", attend)
    cached(layer, config, x, [18, 1, 1])
    assert widths == [10, 68, 68]


@torch.inference_mode()
def test_a_cache_holds_one_latent_and_one_key_a_token():
    state = new_cache(ours_of(tiny()), 3, 50).states[0]
    assert isinstance(state, Latents) and state.values is state.keys
    assert state.keys.shape == (3, 1, 51, SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"])
    assert [part.shape for part in state.parts(1, 7)] == [(1, 7, 20)]


def test_segments_do_not_see_each_other():
    config, lengths = tiny(), [1, 12, 5]
    layer, x = ours_of(config), torch.randn(1, 18, WIDTH)
    alone = torch.cat([layer(part, context_of(config, part.size(1), rows=1)) for part in x.split(lengths, dim=1)], dim=1)
    for segments in (Segments(lengths), Segments(lengths).without_lengths()):
        packed = layer(x, context_of(config, 18, segments=segments, rows=1))
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_slice_of_the_heads_is_a_smaller_layer():
    config = tiny()
    whole, x, parts = ours_of(config), torch.randn(2, 20, WIDTH), []
    for half in range(2):
        part = LatentAttention(config, 0)
        part.load_state_dict(whole.state_dict())
        for name in ("q_b", "kv_b"):
            getattr(part, name).weight = nn.Parameter(getattr(whole, name).weight.chunk(2)[half])
        part.proj.weight = nn.Parameter(whole.proj.weight.chunk(2, dim=1)[half])
        parts.append(cached(part, config, x, [16, 1, 1, 1, 1]))
    torch.testing.assert_close(parts[0] + parts[1], whole(x, context_of(config, 20)), rtol=1e-4, atol=1e-5)
