"""Turn quantized weights of published checkpoints into plain ones, tensor by tensor as they are read."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from litgpt.config import refuse_quantization
from litgpt.errors import UserError

AGAIN = "Download the checkpoint again."
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1, by its four bits


def dequantized(stream: Iterable[tuple[str, Tensor]], quantization_config: dict[str, Any] | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a checkpoint as plain floating-point tensors, under the names that the rules know.

    Args:
        stream: Names and tensors as they are stored.
        quantization_config: What `config.json` says about how they are stored; None if nothing.

    Raises:
        UserError: They are stored in a way that cannot be read, or a tensor lacks its scales.
    """
    refuse_quantization(quantization_config)
    if quantization_config is None:
        yield from stream
        return
    method = quantization_config["quant_method"]
    yield from _fp8(stream, _block_size(quantization_config)) if method == "fp8" else _mxfp4(stream)


def _block_size(quantization_config: dict[str, Any]) -> tuple[int, int] | None:
    size = quantization_config.get("weight_block_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise UserError(f"`weight_block_size` is two whole numbers above 0 or null in config.json, but got {size!r}.")
    return size[0], size[1]


def _fp8(stream: Iterable[tuple[str, Tensor]], block: tuple[int, int] | None) -> Iterator[tuple[str, Tensor]]:
    """FP8 values with a scale for each block (DeepSeek-V3, arXiv:2412.19437 section 3.3) or for the whole tensor."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stream:
        weight = name.removesuffix("_scale_inv")
        if weight == name and tensor.element_size() > 1:
            if not name.endswith("_scale"):  # of activations, which are not quantized here
                yield name, tensor
            continue
        parts = waiting.setdefault(weight, {})
        parts["weight" if weight == name else "scale"] = tensor
        if len(parts) == 2:
            del waiting[weight]
            yield weight, _unscaled(weight, parts["weight"], parts["scale"], block)
    for name, parts in waiting.items():
        raise UserError(f"Of the quantized weight {name!r} only the {next(iter(parts))} is there. {AGAIN}")


def _unscaled(name: str, weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    if scale.numel() == 1:
        return (weight.float() * scale.float()).bfloat16()
    expected = block and tuple(-(-size // side) for size, side in zip(weight.shape[-2:], block, strict=True))
    if tuple(scale.shape[-2:]) != expected or scale.shape[:-2] != weight.shape[:-2]:
        raise UserError(f"The scales of {name!r} have the shape {tuple(scale.shape)}, but its blocks make it {expected}. {AGAIN}")
    scale = scale.float()  # some files hold powers of two in eight bits
    for dim, side in zip((-2, -1), block, strict=True):
        scale = scale.repeat_interleave(side, dim).narrow(dim, 0, weight.size(dim))
    return (weight.float() * scale).bfloat16()


def _mxfp4(stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pairs of 4-bit values in bytes, with a power of two for each 32 of them (OCP Microscaling Formats 1.0)."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stream:
        stem, _, part = name.rpartition("_")
        if part not in ("blocks", "scales"):
            yield name, tensor
            continue
        parts = waiting.setdefault(stem, {})
        parts[part] = tensor
        if len(parts) == 2:
            del waiting[stem]
            yield stem, _unpacked(stem, parts["blocks"], parts["scales"])
    for name, parts in waiting.items():
        raise UserError(f"Of the quantized weight {name!r} only the {next(iter(parts))} are there. {AGAIN}")


def _unpacked(name: str, blocks: Tensor, scales: Tensor) -> Tensor:
    """Return (E, in, out) of blocks (E, out, in / 32, 16) and scales (E, out, in / 32)."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.ndim != 4 or blocks.shape[:-1] != scales.shape:
        raise UserError(f"The blocks and scales of {name!r} are {tuple(blocks.shape)} and {tuple(scales.shape)}, which do not fit. {AGAIN}")
    values = torch.tensor(FP4, dtype=torch.bfloat16, device=blocks.device)
    made = blocks.new_empty((*blocks.shape[:2], blocks.size(2), 2 * blocks.size(3)), dtype=torch.bfloat16)
    for expert, (packed, exponents) in enumerate(zip(blocks, scales, strict=True)):  # one at a time, as indices take 8 bytes each
        pairs = torch.stack((values[(packed & 15).int()], values[(packed >> 4).int()]), dim=-1).flatten(-2)  # (out, in / 32, 32)
        made[expert] = torch.ldexp(pairs, exponents.int().unsqueeze(-1) - 127)
    return made.flatten(2).transpose(1, 2)
