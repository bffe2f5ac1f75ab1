"""AdamW whose two averages take half or a quarter of the memory."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

BLOCK = 256  # numbers of a row that share a scale, at most
SMALLEST = 1e-30  # of a scale, which divides
M_CODES, V_CODES = 127, 255


class CompactAdamW(Optimizer):
    """AdamW (arXiv:1711.05101), or Adam, which holds its averages in 16 or 8 bits and computes in fp32, a part of a weight at a time.

    An average moves by less in a step than two neighbouring numbers of so few bits differ, so rounding to the nearest would leave it
    where it is for ever: a large gradient would never be forgotten. Hence a number is rounded up as often as it lies nearer to the
    upper neighbour. When is not drawn but follows from the step and the column, spread evenly (`_thresholds`), so that the errors
    of successive steps cancel, ranks with equal gradients keep equal averages, and nothing has to be saved to go on bit for bit.

    Weights of one dimension are few, and their averages stay in fp32.

    Args:
        params: As every optimizer takes them.
        lr: The learning rate.
        betas: The decay rates of the averages of the gradient and of its square.
        eps: Added to the root of the latter.
        weight_decay: How strongly weights are pulled to zero.
        state: `bf16`, or `8bit` for codes with a scale for each 256 numbers of a row.
        decoupled: False adds the decay to the gradient instead, as Adam does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state: str = "bf16",
        decoupled: bool = True,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} are at least 0, betas {betas} between 0 and 1")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, state=state, decoupled=decoupled))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change the weights by their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, group)
        return loss

    def _change(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0} | (FORMATS[group["state"]][0](parameter) if parameter.ndim >= 2 else _new_fp32(parameter))
        state["step"] += 1
        tensors = {name: _rows(value) for name, value in state.items() if isinstance(value, Tensor)}
        weights, grads = _rows(parameter), _rows(parameter.grad, copy=True)
        if not weights.numel():  # of a rank that holds nothing of it
            return
        _, read, write = FORMATS[group["state"] if parameter.ndim >= 2 else "full"]
        thresholds = _thresholds(weights.size(1), state["step"], weights.device)
        n_rows = max(1, (2**17 if weights.device.type == "cpu" else 2**24) // weights.size(1))  # what a cache holds
        for start in range(0, len(weights), n_rows):
            part = {name: rows[start : start + n_rows] for name, rows in tensors.items()}
            m, v = read(part)
            _adamw(weights[start : start + n_rows], grads[start : start + n_rows], m, v, state["step"], group)
            write(part, m, v, thresholds)


def _adamw(weights: Tensor, grads: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]) -> None:
    """Change weights and averages in place. All but the weights and gradients are in fp32."""
    lr, (beta_1, beta_2) = float(group["lr"]), group["betas"]
    held, grads = weights, grads.to(m.dtype)
    weights = weights.to(m.dtype)
    if group["weight_decay"]:
        if group["decoupled"]:
            weights = weights.mul_(1 - lr * group["weight_decay"])
        else:
            grads = grads.add(weights, alpha=group["weight_decay"])
    m.lerp_(grads, 1 - beta_1)
    v.mul_(beta_2).addcmul_(grads, grads, value=1 - beta_2)
    root = v.sqrt().div_(math.sqrt(1 - beta_2**step)).add_(group["eps"])
    weights.addcdiv_(m, root, value=-lr / (1 - beta_1**step))
    if weights is not held:
        held.copy_(weights)


def _rows(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return what this rank holds of a tensor, as a matrix with the same memory; a copy where that is not possible and allowed."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local = local.detach()
    shape = (local.numel() // max(1, local.size(-1)), local.size(-1)) if local.ndim >= 2 else (1, local.numel())
    return local.reshape(shape) if copy else local.view(shape)


def _thresholds(n_columns: int, step: int, device: torch.device) -> Tensor:
    """Return for each column above which fraction a number is rounded up in a step.

    In the course of the steps they lie as evenly between 0 and 1 as numbers can: multiples of the golden ratio, less their integers.
    """
    columns = torch.arange(n_columns, dtype=torch.float64, device=device)
    return (columns * math.sqrt(2) + step * (math.sqrt(5) - 1) / 2).frac_().float()  # (columns,)


# How averages are held: what makes, reads and writes them


State = dict[str, Tensor]


def _new_fp32(parameter: Tensor) -> State:
    return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}


def _read_fp32(state: State) -> tuple[Tensor, Tensor]:
    return state["exp_avg"], state["exp_avg_sq"]


def _write_fp32(state: State, m: Tensor, v: Tensor, thresholds: Tensor) -> None:
    """They were changed in place."""


def _new_bf16(parameter: Tensor) -> State:
    return {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}


def _read_bf16(state: State) -> tuple[Tensor, Tensor]:
    return state["exp_avg"].float(), state["exp_avg_sq"].float()


def _write_bf16(state: State, m: Tensor, v: Tensor, thresholds: Tensor) -> None:
    """The upper half of an fp32 number is a bf16 number, so adding up to one unit to the lower half and dropping it rounds."""
    noise = (65536 * (1 - thresholds)).int().clamp_(max=65535)
    for name, value in (("exp_avg", m), ("exp_avg_sq", v)):
        bits = value.view(torch.int32)
        bits.add_(noise).bitwise_and_(-65536)
        state[name].copy_(value)


def _new_8bit(parameter: Tensor) -> State:
    """The scales have the layout of the weight too, on whatever ranks: as many rows, and a column for each block."""
    scales = parameter.detach()[..., ::BLOCK]
    return {
        "exp_avg": torch.zeros_like(parameter, dtype=torch.int8),
        "exp_avg_scale": torch.zeros_like(scales, dtype=torch.float32, memory_format=torch.contiguous_format),
        "root": torch.zeros_like(parameter, dtype=torch.uint8),
        "root_scale": torch.zeros_like(scales, dtype=torch.float32, memory_format=torch.contiguous_format),
    }


def _read_8bit(state: State) -> tuple[Tensor, Tensor]:
    m = _decoded(state["exp_avg"], state["exp_avg_scale"], M_CODES)
    return m, _decoded(state["root"], state["root_scale"], V_CODES).square_()


def _write_8bit(state: State, m: Tensor, v: Tensor, thresholds: Tensor) -> None:
    _encode(m, state["exp_avg"], state["exp_avg_scale"], thresholds, M_CODES)
    _encode(v.sqrt_(), state["root"], state["root_scale"], thresholds, V_CODES)


def _decoded(codes: Tensor, scales: Tensor, n_codes: int) -> Tensor:
    """Return what codes stand for: their square, with their sign, as a share of the largest number of their block."""
    numbers = codes.float()
    numbers.mul_(numbers if codes.dtype == torch.uint8 else numbers.abs())  # small numbers lie closer together, as they do in both averages
    width = _width(codes, scales)
    whole = numbers.size(1) // width * width
    numbers[:, :whole].view(len(codes), -1, width).mul_((scales / n_codes**2)[:, : whole // width, None])
    numbers[:, whole:].mul_((scales / n_codes**2)[:, whole // width :])
    return numbers


def _encode(numbers: Tensor, codes: Tensor, scales: Tensor, thresholds: Tensor, n_codes: int) -> None:
    """Undo `_decoded`, rounding in such a way that what is read again is right on average. The numbers are spoilt."""
    width, sizes = _width(codes, scales), numbers.abs()
    whole = sizes.size(1) // width * width
    blocks, rest = sizes[:, :whole].view(len(codes), -1, width), sizes[:, whole:]
    torch.amax(blocks, -1, out=scales[:, : whole // width])
    if rest.size(1):
        torch.amax(rest, -1, keepdim=True, out=scales[:, whole // width :])
    scales.clamp_(min=SMALLEST)
    blocks.mul_((n_codes**2 / scales)[:, : whole // width, None])
    rest.mul_((n_codes**2 / scales)[:, whole // width :])
    found = sizes.sqrt().floor_()
    sizes.addcmul_(found, found, value=-1)  # above the square below, of which the next is 2 found + 1 away
    found.add_(sizes.gt_(torch.addcmul(thresholds, thresholds, found, value=2))).clamp_(max=n_codes)
    if n_codes == V_CODES:
        torch.maximum(found, numbers.sign_().mul_(2), out=found)  # no smaller than the smallest average: the step is their quotient
    else:
        found.copysign_(numbers)
    codes.copy_(found)


def _width(codes: Tensor, scales: Tensor) -> int:
    """Return how many columns a block has: as even as they can be, all but the last alike."""
    return math.ceil(codes.size(1) / scales.size(1))


FORMATS = {
    "full": (_new_fp32, _read_fp32, _write_fp32),
    "bf16": (_new_bf16, _read_bf16, _write_bf16),
    "8bit": (_new_8bit, _read_8bit, _write_8bit),
}
