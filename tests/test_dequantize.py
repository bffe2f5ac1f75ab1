import pytest
import torch
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from litgpt.dequantize import dequantized
from litgpt.errors import UserError

FP8 = dict(quant_method="fp8", weight_block_size=[4, 8], activation_scheme="dynamic")
MXFP4 = dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])


def fp8_weight(rows, columns):
    return torch.randn(rows, columns).to(torch.float8_e4m3fn), torch.rand(-(-rows // 4), -(-columns // 8)) + 0.1


@pytest.mark.parametrize("rows, columns", [(8, 16), (9, 17), (3, 5)])
@pytest.mark.parametrize("scales_first", [False, True])
def test_fp8_blocks_are_what_transformers_makes_of_them(rows, columns, scales_first):
    weight, scale = fp8_weight(rows, columns)
    stream = [("a.weight", weight), ("a.weight_scale_inv", scale), ("norm.weight", torch.ones(3))]
    ours = dict(dequantized(stream[:2][:: -1 if scales_first else 1] + stream[2:], FP8))
    assert ours.keys() == {"a.weight", "norm.weight"} and ours["a.weight"].dtype == torch.bfloat16
    whole = torch.tensor([[float(weight[i, j]) * float(scale[i // 4, j // 8]) for j in range(columns)] for i in range(rows)])
    assert torch.equal(ours["a.weight"], whole.bfloat16())
    if rows % 4 == columns % 8 == 0:
        assert torch.equal(ours["a.weight"], _dequantize_fp8_weight(weight, scale, (4, 8), torch.float32).bfloat16())


@pytest.mark.parametrize("block", [[4, 8], None], ids=["blocks", "one scale"])
def test_scales_may_be_powers_of_two_in_eight_bits(block):
    weight = fp8_weight(8, 16)[0]
    powers = torch.tensor([[0.5, 2.0], [1.0, 0.125]] if block else 0.25)
    stored = powers.to(torch.float8_e8m0fnu)
    expected, got = (
        dict(dequantized([("a.weight", weight), ("a.weight_scale_inv", scale)], FP8 | dict(weight_block_size=block)))
        for scale in (powers, stored)
    )
    assert torch.equal(got["a.weight"], expected["a.weight"])


def test_one_scale_may_serve_a_whole_tensor_and_those_of_activations_are_dropped():
    weight, _ = fp8_weight(4, 4)
    stream = [("a.weight", weight), ("a.weight_scale_inv", torch.tensor(0.5)), ("a.activation_scale", torch.tensor(3.0))]
    ours = dict(dequantized(stream, FP8 | dict(weight_block_size=None)))
    assert ours.keys() == {"a.weight"} and torch.equal(ours["a.weight"], (weight.float() / 2).bfloat16())


def test_mxfp4_experts_are_what_transformers_makes_of_them():
    blocks = torch.randint(256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 134, (3, 10, 2), dtype=torch.uint8)
    stream = [("e.gate_up_proj_blocks", blocks), ("e.gate_up_proj_bias", torch.ones(3, 10)), ("e.gate_up_proj_scales", scales)]
    ours = dict(dequantized(stream, MXFP4))
    assert ours.keys() == {"e.gate_up_proj", "e.gate_up_proj_bias"}
    assert torch.equal(ours["e.gate_up_proj"], convert_moe_packed_tensors(blocks, scales))
    assert ours["e.gate_up_proj"].shape == (3, 64, 10)


def test_other_quantizations_are_refused_and_plain_weights_pass():
    weights = [("a", torch.ones(1))]
    assert list(dequantized(weights, None)) == weights
    with pytest.raises(UserError, match="'gptq'"):
        list(dequantized(weights, {"quant_method": "gptq", "bits": 4}))


@pytest.mark.parametrize(
    "stream, settings, sentence",
    [
        ([("a.weight", fp8_weight(4, 8)[0])], FP8, "Of the quantized weight 'a.weight' only the weight is there"),
        ([("a.weight", fp8_weight(4, 8)[0]), ("a.weight_scale_inv", torch.ones(2, 2))], FP8, r"have the shape \(2, 2\)"),
        ([], FP8 | dict(weight_block_size=[0, 1]), "`weight_block_size` is two whole numbers"),
        ([], FP8 | dict(weight_block_size=128), "`weight_block_size` is two whole numbers"),
        ([("e_blocks", torch.zeros(1, 2, 3, 16, dtype=torch.uint8))], MXFP4, "only the blocks are there"),
        (
            [("e_blocks", torch.zeros(1, 2, 3, 16, dtype=torch.uint8)), ("e_scales", torch.zeros(1, 2, 4, dtype=torch.uint8))],
            MXFP4,
            "do not fit",
        ),
    ],
)
def test_damaged_quantized_weights_are_one_sentence(stream, settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        list(dequantized(stream, settings))
    assert "\n" not in str(error.value)
