"""Layers that hold their weights in 4 or 8 bits, and make each anew when it is multiplied: QLoRA (arXiv:2305.14314), and inference."""

import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt.errors import UserError, did_you_mean, optional
from litgpt.experts import Experts, Rows
from litgpt.model import GPT

Quantize = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8", "bnb.int8-training"]  # what the flag takes
WHOLE = (".lm_head", ".mlp.gate", ".mlp.shared_gate", ".attn.in_proj_ba")  # small layers, of which a little error changes much
BLOCK = 64  # so many 4-bit numbers share a scale
CODED = 256  # so many scales share one of their own, if they are quantized too


class Kind(NamedTuple):
    """How numbers are held."""

    values: str
    """Which numbers there are: nf4's or fp4's 16, or whole ones from -127 to 127 times a scale for each row (int8)."""
    double: bool = False
    """Whether the scales are quantized too, which saves 0.4 bits a weight."""


KINDS = {
    "bnb.nf4": Kind("nf4"),
    "bnb.nf4-dq": Kind("nf4", double=True),
    "bnb.fp4": Kind("fp4"),
    "bnb.fp4-dq": Kind("fp4", double=True),
    "bnb.int8": Kind("int8"),
    "bnb.int8-training": Kind("int8"),  # LitGPT tells them apart, we do not
}


def check_quantize(quantize: str | None, device: torch.device | str = "cpu") -> None:
    """Refuse what cannot be done; better known before a model is read.

    Args:
        quantize: A key of `KINDS`, or None.
        device: Where the model is to be.

    Raises:
        UserError: There is no such kind, the package bitsandbytes is missing, or it does not run on this device.
    """
    if quantize is None:
        return
    if quantize not in KINDS:
        raise UserError(f"`quantize` is one of {', '.join(KINDS)}, but got {quantize!r}.{did_you_mean(str(quantize), KINDS)}")
    if KINDS[quantize].values == "int8":
        return
    import_bitsandbytes()
    try:
        Linear4bit(torch.ones(1, BLOCK, device=device), None, torch.float32, KINDS[quantize]).dequantize()
    except (RuntimeError, NotImplementedError) as error:  # of torch, which knows no such kernel, or of a library that is not there
        raise UserError(
            f"bitsandbytes does not run on this machine's {torch.device(device).type} ({str(error).splitlines()[0]:.200}). "
            "Use bnb.int8, which does without that package, or save memory with a 16-bit `precision`."
        ) from error


def bytes_per_weight(quantize: str | None) -> float | None:
    """Return how many bytes a quantized weight takes, its share of the scales included; None if nothing is quantized."""
    if quantize is None:
        return None
    kind = KINDS[quantize]
    return 1.0 if kind.values == "int8" else 0.5 + (1 / BLOCK + 4 / BLOCK / CODED if kind.double else 4 / BLOCK)


def import_bitsandbytes() -> Any:
    """Return the package, without its advice to install another one on some CPUs."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return optional("bitsandbytes", "all")
    finally:
        logger.setLevel(level)


def quantize_model(model: GPT, kind: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
    """Hold the weights of a model's linear layers and experts in fewer bits, and put the model on a device.

    Embedding, head, norms, biases and what chooses among experts keep their bits. One weight after the other is quantized and given
    back, so that never more than one of them is whole on the device. Wrap layers (`add_lora`) afterwards.

    Args:
        model: Is changed in place. It cannot be saved any more: no state dict has the quantized weights.
        kind: A key of `KINDS`.
        dtype: Of all other parameters, and of products of weights that are asked for in no other; by default as they are.
        device: Where to put the model; by default where it is.

    Raises:
        UserError: See `check_quantize`.
    """
    device = torch.device(device or model.transformer.wte.weight.device)
    check_quantize(kind, device)
    for name in [name for name, layer in model.named_modules() if is_quantizable(name, layer)]:
        model.set_submodule(name, quantized(model.get_submodule(name), KINDS[kind], dtype, device))
    model.to(device)
    for parameter in model.parameters():  # copies, or a file that the weights are mapped from would stay in memory for their sake
        parameter.data = parameter.data.to(dtype or parameter.dtype, copy=device.type == "cpu")


def is_quantizable(name: str, layer: nn.Module) -> bool:
    """Say whether a model's layer of this name is quantized."""
    is_plain = isinstance(layer, nn.Linear) or type(layer) is Experts  # not what LoRA or Adapter v2 put around experts
    return is_plain and not f".{name}".removesuffix(".linear").endswith(WHOLE)  # which may be inside of theirs


def is_quantized(model: nn.Module) -> bool:
    """Say whether weights of a model are held in fewer bits."""
    return any(isinstance(layer, QuantizedLinear) for layer in model.modules())


def n_weights(model: nn.Module) -> int:
    """Return how many parameters a model has, the quantized ones, which torch does not list, among them."""
    held = sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, QuantizedLinear))
    return held + sum(parameter.numel() for parameter in model.parameters())


def quantized(layer: nn.Linear | Experts, kind: Kind, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """Return a layer that computes nearly the same, see `quantize_model`."""
    if isinstance(layer, Experts):
        return QuantizedExperts(layer, kind, dtype, device)
    return quantized_linear(layer.weight, layer.bias, kind, dtype, device)


def quantized_linear(weight: Tensor, bias: Tensor | None, kind: Kind, dtype: torch.dtype | None, device: torch.device) -> "QuantizedLinear":
    """Return the layer of a weight (out, in) and perhaps a bias (out,), on a device."""
    layer_class = Linear8bit if kind.values == "int8" else Linear4bit
    return layer_class(weight.detach().to(device), bias, dtype or weight.dtype, kind)


# Layers


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds its weight in other numbers, and makes it anew for each product.

    What it holds are bytes in buffers: no cast, optimizer or FSDP2 touches them, and no state dict has them.

    Args:
        weight: (out, in), on the device.
        bias: (out,), or None.
        dtype: Of `weight`.
        kind: What it holds.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kind: Kind) -> None:
        nn.Module.__init__(self)
        (self.out_features, self.in_features), self.dtype, self.kind = weight.shape, dtype, kind
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        for name, tensor in self.held(weight).items():
            self.register_buffer(name, tensor.view(torch.uint8), persistent=False)

    def held(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what is kept of a weight, by the names of the buffers."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that the layer computes with, (out, in)."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """What `dequantize` returns, in the type of the model's other weights."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, bias, self) if torch.is_grad_enabled() else self.product(x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x times the weight, plus the bias."""
        return F.linear(x, self.dequantize(x.dtype), bias)


class _Product(torch.autograd.Function):
    """Makes the weight once more in the backward pass, rather than keeping it until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.layer.dequantize(grad.dtype) if needs_x else None
        return grad_x, grad.flatten(0, -2).sum(0) if needs_bias else None, None


class Linear4bit(QuantizedLinear):
    """Each weight is one of 16 numbers, two in a byte, times a scale that it shares with its neighbours."""

    def held(self, weight: Tensor) -> dict[str, Tensor]:
        wide = weight.float() if weight.dtype == torch.float64 else weight
        blocks = F.pad(wide.flatten(), (0, -wide.numel() % BLOCK)).view(-1, BLOCK)  # on CPUs blocks that end inside a row come out wrong
        quantize = import_bitsandbytes().functional.quantize_4bit
        numbers, state = quantize(blocks, blocksize=BLOCK, compress_statistics=self.kind.double, quant_type=self.kind.values)
        if not self.kind.double:
            return dict(numbers=numbers, scales=state.absmax)
        inner = state.state2
        return dict(numbers=numbers, coded=state.absmax, code=inner.code, scales=inner.absmax, mean=state.offset.view(1))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype, ops = dtype or self.dtype, torch.ops.bitsandbytes
        scales, n = self.scales.view(torch.float32), self.out_features * self.in_features
        if self.kind.double:
            code, mean = self.code.view(torch.float32), self.mean.view(torch.float32)
            scales = ops.dequantize_blockwise(self.coded, scales, code, CODED, torch.float32) + mean
        made = torch.float32 if dtype == torch.float64 else dtype
        weight = ops.dequantize_4bit(self.numbers, scales, BLOCK, self.kind.values, [len(scales), BLOCK], made)
        return weight.flatten()[:n].view(self.out_features, self.in_features).to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.in_features % BLOCK or x.dtype == torch.float64:
            return super().product(x, bias)
        how: dict[str, Tensor] = {}
        if self.kind.double:
            how = dict(absmax_8bit=self.coded, absmax_code=self.code.view(torch.float32), absmax_offset=self.mean.view(torch.float32)[0])
        shape, scales = [self.out_features, self.in_features], self.scales.view(torch.float32)
        return torch.ops.bitsandbytes.gemm_4bit(x, self.numbers, shape, scales, BLOCK, self.kind.values, bias=bias, **how)


class Linear8bit(QuantizedLinear):
    """Each weight is a whole number from -127 to 127, times a scale that its row has (arXiv:2208.07339, section 2.1)."""

    def held(self, weight: Tensor) -> dict[str, Tensor]:
        rows = weight.float()
        scales = rows.abs().amax(1, keepdim=True) / 127
        numbers = torch.where(scales > 0, rows / scales, 0.0).round().to(torch.int8)
        return dict(numbers=numbers, scales=scales)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.numbers.view(torch.int8).float().mul_(self.scales.view(torch.float32)).to(dtype or self.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float16:  # in which a row's sum of numbers up to 127 may not fit
            return super().product(x, bias)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.linear(x, self.numbers.view(torch.int8).to(x.dtype)).to(wide).mul_(self.scales.view(torch.float32).flatten())
        return (y if bias is None else y.add_(bias)).to(x.dtype)


class QuantizedExperts(Experts):
    """Frozen experts, each with two quantized layers in the place of its matrices.

    Args:
        experts: The plain ones.
        kind: What the layers hold.
        dtype: Of `gate_up` and `down`; by default as they are.
        device: Where to put the layers.
    """

    def __init__(self, experts: Experts, kind: Kind, dtype: torch.dtype | None, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.n_expert, self.limit = experts.n_expert, experts.limit
        self.ups, self.downs = (
            nn.ModuleList(quantized_linear(weight, None, kind, dtype, device) for weight in stack)
            for stack in (experts.gate_up, experts.down)
        )
        self.gate_up_bias, self.down_bias = experts.gate_up_bias, experts.down_bias

    @property
    def gate_up(self) -> Tensor:
        """The experts' first matrices, (E, 2 I, C), made anew."""
        return torch.stack([layer.weight for layer in self.ups])

    @property
    def down(self) -> Tensor:
        """Their second ones, (E, C, I), made anew."""
        return torch.stack([layer.weight for layer in self.downs])

    def project_up(self, x: Tensor, rows: Rows) -> Tensor:
        y = one_by_one(self.ups, x.index_select(0, rows.tokens), rows)
        return y if self.gate_up_bias is None else y + F.embedding(rows.experts, self.gate_up_bias.to(y.dtype))

    def project_down(self, x: Tensor, rows: Rows) -> Tensor:
        return one_by_one(self.downs, x, rows)


def one_by_one(layers: Sequence[nn.Module], x: Tensor, rows: Rows) -> Tensor:
    """Return the rows (S, in), each through its expert's layer, (S, out). Experts without rows are left alone."""
    counts = rows.ends.diff(prepend=rows.ends.new_zeros(1)).tolist()
    parts = zip(layers, x.split(counts), strict=True)
    return torch.cat([layer(part) for layer, part in parts if len(part)])
