"""Recurrent mixers against transformers' and against the recurrence written out token by token."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import Lfm2Config, Qwen3NextConfig
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from litgpt.attention import Context
from litgpt.recurrent import CHUNK, GatedDelta, ShortConvolution, by_sequence, gated_delta_rule, unit

WIDTH = 32
DELTA = dict(n_key_heads=2, n_value_heads=6, key_head_size=8, value_head_size=12, kernel_size=4)


def with_random_weights(module: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in module.named_parameters():
        if name == "A_log":
            parameter.data.uniform_(-3, 1)
        else:
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and name == "norm.weight" else 0.0, 0.4)
    return module.eval()


def delta_pair() -> tuple[GatedDelta, torch.nn.Module]:
    theirs = Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=DELTA["n_key_heads"],
        linear_num_value_heads=DELTA["n_value_heads"],
        linear_key_head_dim=DELTA["key_head_size"],
        linear_value_head_dim=DELTA["value_head_size"],
        linear_conv_kernel_dim=DELTA["kernel_size"],
        rms_norm_eps=1e-5,
    )
    theirs = with_random_weights(Qwen3NextGatedDeltaNet(theirs, 0))
    ours = GatedDelta(SimpleNamespace(n_embd=WIDTH, norm_eps=1e-5, gated_delta=DELTA), 0)
    ours.load_state_dict({name.replace("conv1d", "conv"): tensor for name, tensor in theirs.state_dict().items()})
    return ours, theirs


def conv_pair(bias: bool) -> tuple[ShortConvolution, torch.nn.Module]:
    layers = ["conv", "full_attention"]
    theirs = Lfm2Config(hidden_size=WIDTH, conv_L_cache=3, conv_bias=bias, num_hidden_layers=2, layer_types=layers)
    theirs = with_random_weights(Lfm2ShortConv(theirs, 0))
    ours = ShortConvolution(SimpleNamespace(n_embd=WIDTH, short_conv=dict(kernel_size=3, bias=bias)), 0)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


PAIRS = {"gated_delta": delta_pair, "short_conv": lambda: conv_pair(False), "short_conv with bias": lambda: conv_pair(True)}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("T", [1, 2, CHUNK, 2 * CHUNK + 7])
def test_a_mixer_and_its_gradients_equal_those_of_transformers(pair, T):
    ours, theirs = pair()
    x = torch.randn(2, T, WIDTH)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = ours(inputs[0], Context({}, {})), theirs(inputs[1])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4 * float(results[1].detach().abs().max()))
    weights = torch.randn_like(results[0])
    for result in results:
        (result * weights).sum().backward()
    named = dict(ours.named_parameters())
    grads = [(inputs[0].grad, inputs[1].grad)]
    grads += [(named[name.replace("conv1d", "conv")].grad, parameter.grad) for name, parameter in theirs.named_parameters()]
    for mine, expected in grads:
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_padding_anywhere_changes_no_token(pair):
    ours, x = pair()[0], torch.randn(3, 80, WIDTH)
    tokens = torch.rand(3, 80) < 0.8
    tokens[1, :70] = False  # padding first
    tokens[2, 5:] = False  # padding last
    y = ours(x, Context({}, {}, tokens=tokens))
    for row in range(3):
        alone = ours(x[row : row + 1, tokens[row]], Context({}, {}))
        torch.testing.assert_close(y[row : row + 1, tokens[row]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("known", ["lengths", "ids", "both"])
def test_segments_do_not_see_each_other(pair, known):
    ours, lengths = pair()[0], [1, 2, 63, 70, 1, 1, 64, 5, 130]
    x = torch.randn(1, sum(lengths), WIDTH)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    pieces = [(slice(end - n, end), Context({}, {})) for n, end in zip(lengths, ends)]
    context = Context({}, {}, ids=None if known == "lengths" else ids, pieces=None if known == "ids" else pieces)
    alone = torch.cat([ours(part, Context({}, {})) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(ours(x, context), alone, rtol=1e-4, atol=1e-5)


def token_by_token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The rule as the paper states it, in fp64: what each token reads, and the matrices after each."""
    q, k = (x.double().repeat_interleave(v.size(3), dim=2) for x in (q, k))
    v, decay, rate, matrix = (x.double() for x in (v.flatten(2, 3), decay.flatten(2), rate.flatten(2), matrix))
    ys, matrices = [], [matrix]
    for t in range(q.size(1)):
        matrix = matrix * decay[:, t, :, None, None].exp()
        missing = v[:, t] - torch.einsum("bhkv,bhk->bhv", matrix, k[:, t])
        matrix = matrix + torch.einsum("bhk,bhv,bh->bhkv", k[:, t], missing, rate[:, t])
        ys.append(torch.einsum("bhkv,bhk->bhv", matrix, q[:, t]) * q.size(-1) ** -0.5)
        matrices.append(matrix)
    return torch.stack(ys, dim=1), matrices


def rule_inputs(T: int, sharpest: float = 3.0, same_keys: bool = False) -> list[Tensor]:
    q, k = unit(torch.randn(2, T, 2, 8)), unit(torch.randn(2, 1 if same_keys else T, 2, 8)).expand(2, T, 2, 8)
    decay, rate = -torch.rand(2, T, 2, 3) * sharpest, torch.rand(2, T, 2, 3)
    return [q, k, torch.randn(2, T, 2, 3, 12), decay, rate.fill_(1.0) if same_keys else rate, torch.randn(2, 6, 8, 12)]


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize(
    "kind", [dict(), dict(sharpest=0.0), dict(sharpest=200.0), dict(sharpest=0.0, same_keys=True)], ids=lambda kind: str(kind)
)
def test_the_chunked_rule_equals_the_recurrence(T, kind):
    inputs = rule_inputs(T, **kind)
    y, matrix = gated_delta_rule(*inputs)
    expected, matrices = token_by_token(*inputs)
    torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(matrix, matrices[-1].float(), rtol=1e-4, atol=1e-4)


def test_the_returned_matrix_knows_just_the_folded_tokens():
    inputs = rule_inputs(150)
    for numbers in ([0, 150], [1, 64], [63, 65], [128, 140]):
        folded = torch.arange(150) < torch.tensor(numbers)[:, None]
        y, matrix = gated_delta_rule(*inputs, folded=folded)
        expected, matrices = token_by_token(*inputs)
        torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-4)
        for row, n in enumerate(numbers):
            torch.testing.assert_close(matrix[row], matrices[n][row].float(), rtol=1e-4, atol=1e-4)


def test_the_rule_keeps_fp32_under_autocast():
    inputs = rule_inputs(70)
    plain = gated_delta_rule(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(gated_delta_rule(*inputs), plain):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, expected)


@torch.no_grad()
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_mixer_in_bf16_is_close_to_itself_in_fp32(pair):
    ours, x = pair()[0], torch.randn(2, 100, WIDTH)
    expected = ours(x, Context({}, {}))
    y = ours.bfloat16()(x.bfloat16(), Context({}, {}))
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < 0.03


def test_a_slice_of_the_heads_is_a_smaller_mixer():
    whole = delta_pair()[0]
    x, parts = torch.randn(2, 20, WIDTH), []
    for head in range(2):  # key heads, with three value heads each
        part = GatedDelta(SimpleNamespace(n_embd=WIDTH, norm_eps=1e-5, gated_delta=DELTA), 0)
        part.load_state_dict(whole.state_dict())
        keys, values = slice(head * 8, head * 8 + 8), slice(head * 36, head * 36 + 36)
        rows = torch.cat([torch.arange(16)[keys], 16 + torch.arange(16)[keys], 32 + torch.arange(72)[values]])
        for name in ("in_proj_qkvz", "in_proj_ba"):
            getattr(part, name).weight = torch.nn.Parameter(getattr(whole, name).weight.chunk(2)[head])
        part.conv.weight = torch.nn.Parameter(whole.conv.weight[rows])
        part.dt_bias, part.A_log = (torch.nn.Parameter(p.chunk(2)[head]) for p in (whole.dt_bias, whole.A_log))
        part.out_proj.weight = torch.nn.Parameter(whole.out_proj.weight[:, values])
        assert part.new_state(1, 9, 9, 0, torch.float32, torch.device("cpu")).matrix.shape == (1, 3, 8, 12)
        parts.append(part(x, Context({}, {})))
    torch.testing.assert_close(parts[0] + parts[1], whole(x, Context({}, {})), rtol=1e-4, atol=1e-5)


def test_sequences_are_seen_with_their_padding_last():
    tokens, seen = torch.tensor([[False, True, False, True]]), []
    x = torch.arange(4.0).view(1, 4, 1)

    def mix(inputs: Tensor, context: Context, state: None) -> Tensor:
        seen.append(inputs.flatten().tolist())
        return inputs * 10

    y = by_sequence(mix, x, Context({}, {}, tokens=tokens), None)
    assert seen == [[1.0, 3.0, 0.0, 2.0]] and y.flatten().tolist() == [0.0, 10.0, 20.0, 30.0]
