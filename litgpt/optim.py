"""Optimizers by name, the learning rate of a step, and gradient clipping over any layout of the parameters."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from litgpt.adamw import FORMATS, CompactAdamW
from litgpt.args import OptimizerArgs, TrainArgs
from litgpt.errors import UserError, did_you_mean

NO_RATIOS: Mapping[str, float] = MappingProxyType({})

# Optimizers


def make_optimizer(args: OptimizerArgs, model: nn.Module, lr_ratios: Mapping[str, float] = NO_RATIOS) -> Optimizer:
    """Return the optimizer that `args` name, over the trained parameters of a model.

    Weights decay only if they have two dimensions or more: norms and biases keep their size. Make it after Fabric has
    set up the model, for FSDP2 puts other parameters in the place of the model's.

    Args:
        args: Which class, its arguments, and in how many bits it keeps what it remembers.
        model: Of which frozen parameters are left out.
        lr_ratios: By what the learning rate is multiplied, for parameters whose name contains a key; the last such key counts.

    Raises:
        UserError: There is no such class, it cannot train here, does not take such an argument or value, or nothing is to be trained.
    """
    ratios = {parameter: _ratio(name, lr_ratios) for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = list(ratios)
    if not trained:
        raise UserError("Nothing is to be trained: all parameters are frozen.")
    kind, forced = _in_few_bits(_optimizer_class(args.name), args.state)
    taken = inspect.signature(kind).parameters
    known = [name for name in taken if name not in ("params", *forced)]
    if unknown := [name for name in args.init_args if name not in known]:
        hint = did_you_mean(unknown[0], known) or f" It takes {', '.join(known)}."
        which = f"{args.name} with `optimizer.state` {args.state}" if forced else kind.__name__
        raise UserError(f"`optimizer.init_args` names {unknown[0]!r}, which {which} does not take.{hint}")
    wanted: dict[str, Any] = {"lr": args.lr, "weight_decay": args.weight_decay, "betas": tuple(args.betas)}
    if "fused" in taken and _can_be_fused(trained) and not args.init_args.get("foreach"):
        wanted["fused"] = True  # one pass over the memory instead of ten
    settings = {name: value for name, value in wanted.items() if name in taken} | args.init_args | forced
    _check_settings(settings, trained[0].device)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter in sorted(trained, key=lambda parameter: parameter.ndim < 2):
        decays, ratio = parameter.ndim >= 2, ratios[parameter]
        no_decay = {"weight_decay": 0.0} if "weight_decay" in taken and not decays else {}
        groups.setdefault((decays, ratio), {"params": [], "lr_ratio": ratio} | no_decay)["params"].append(parameter)
    try:
        return kind(list(groups.values()), **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"The optimizer {kind.__name__} refuses its arguments: {error}") from error


def _ratio(name: str, lr_ratios: Mapping[str, float]) -> float:
    return next((ratio for part, ratio in reversed(lr_ratios.items()) if part in name), 1.0)


def _in_few_bits(kind: type[Optimizer], state: str) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return a class, and arguments for it, that trains as another does and remembers in fewer bits."""
    if state not in FORMATS:
        raise UserError(f"`optimizer.state` is one of {', '.join(FORMATS)}, but got {state!r}.{did_you_mean(state, FORMATS)}")
    if state == "full":
        return kind, {}
    if kind not in (AdamW, Adam):
        raise UserError(f"`optimizer.state` {state} is for AdamW and Adam, but the optimizer is {kind.__name__}. Use full.")
    return CompactAdamW, {"state": state, "decoupled": kind is AdamW}


def _can_be_fused(parameters: Sequence[nn.Parameter]) -> bool:
    on_known_devices = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return on_known_devices and len({type(parameter.data) for parameter in parameters}) == 1


def _check_settings(settings: Mapping[str, Any], device: torch.device) -> None:
    """Raise a UserError for arguments that torch takes, and that fail in the first step or spoil the weights."""
    for name, value in settings.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"The optimizer's `{name}` is a finite number, but got {number}.")
    if settings.get("differentiable"):
        raise UserError("`optimizer.init_args` sets `differentiable`, but nothing differentiates a training's steps. Leave it out.")
    if settings.get("capturable") and device.type == "cpu":
        raise UserError("`optimizer.init_args` sets `capturable`, which is for GPUs, but this run is on the CPU. Leave it out.")


def _optimizer_class(name: str) -> type[Optimizer]:
    """Return a class of `torch.optim`, or of the import path that `name` is, if it can train models here."""
    kind = _named_class(name)
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"The optimizer {kind.__name__} computes the loss several times in a step, but training does once. Use AdamW, say.")
    if issubclass(kind, torch.optim.SparseAdam):
        raise UserError(f"The optimizer {kind.__name__} wants sparse gradients, but those of our models are dense. Use Adam or AdamW.")
    return kind


def _named_class(name: str) -> type[Optimizer]:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"`optimizer` is the name of a class in torch.optim, as AdamW, or an import path, but got {name!r}.")
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and key != "Optimizer"
    }
    module, _, short = name.rpartition(".")
    if module in ("", "torch.optim"):
        if short not in known:
            raise UserError(f"`optimizer` names {short!r}, which torch.optim does not have.{did_you_mean(short, known)}")
        return known[short]
    try:
        found = getattr(import_module(module), short, None)
    except ImportError as error:
        raise UserError(f"`optimizer` names {name!r}, which cannot be imported: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        raise UserError(
            f"`optimizer` names {name!r}, which is no class of optimizers. Name one of torch.optim, as AdamW, or an import path."
        )
    return found


# The learning rate


def check_schedule(train: TrainArgs, lr: float | None) -> None:
    """Raise a UserError if the options of the schedule contradict each other or lie outside their range."""
    if lr is None or not 0 < lr < math.inf:
        raise UserError(f"`optimizer.lr` is a positive number, but got {lr}.")
    if train.lr_warmup_steps is not None and train.lr_warmup_fraction is not None:
        raise UserError("`train.lr_warmup_steps` and `train.lr_warmup_fraction` say the same in two ways. Give one of them.")
    if train.lr_warmup_fraction is not None and not 0 <= train.lr_warmup_fraction <= 1:
        raise UserError(f"`train.lr_warmup_fraction` is a share of all steps, between 0 and 1, but got {train.lr_warmup_fraction}.")
    if train.lr_warmup_steps is not None and train.lr_warmup_steps < 0:
        raise UserError(f"`train.lr_warmup_steps` is a number of steps, but got {train.lr_warmup_steps}. Use 0 to start at the peak.")
    if train.min_lr is not None and not 0 <= train.min_lr <= lr and (train.lr_schedule != "constant" or math.isnan(train.min_lr)):
        raise UserError(
            f"`train.min_lr` lies between 0 and the peak `optimizer.lr` {lr}, but got {train.min_lr}. Leave it out for a tenth of the peak."
        )


def warmup_steps(train: TrainArgs, max_steps: int | None) -> int:
    """Return over how many steps the learning rate rises.

    Args:
        train: Its options; by default the smaller of 100 and a tenth of all steps.
        max_steps: All steps, or None if the run has no planned end.
    """
    if train.lr_warmup_fraction is not None:
        if max_steps is None:
            raise UserError("`train.lr_warmup_fraction` is a share of all steps, but nothing says how many. Set `train.lr_warmup_steps`.")
        return math.ceil(train.lr_warmup_fraction * max_steps)
    if train.lr_warmup_steps is None:
        return 100 if max_steps is None else min(100, max_steps // 10)
    if max_steps is not None and train.lr_warmup_steps >= max_steps:
        if max_steps > 1:
            warnings.warn(
                f"The learning rate rises in all {max_steps} steps, since `train.lr_warmup_steps` is {train.lr_warmup_steps}.", stacklevel=2
            )
        return max_steps
    return train.lr_warmup_steps


def learning_rate(
    step: int, peak: float, max_steps: int | None, warmup: int = 0, kind: str = "cosine", min_lr: float | None = None
) -> float:
    """Return the learning rate of a step: it rises in a line to `peak` at step `warmup`, then falls to `min_lr` at the last step.

    It depends on nothing but its arguments, so there is no scheduler whose state would have to be saved.

    Args:
        step: The first one is 1.
        peak: The highest rate.
        max_steps: The last step; later ones keep its rate. None for a run without a planned end, whose rate stays at the peak.
        warmup: See `warmup_steps`.
        kind: "cosine" (arXiv:1608.03983, one half wave), "linear" or "constant".
        min_lr: The rate at the end; by default a tenth of the peak.
    """
    warmup = max(warmup, 1)  # so that without a warm-up step 1 has the peak
    if step < warmup:
        return peak * step / warmup
    if kind == "constant" or max_steps is None:
        return peak
    end = peak / 10 if min_lr is None else min_lr
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
    return end + (peak - end) * left


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Let the next step of the optimizer have this learning rate, times the ratio of each group."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_ratio", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# Gradients


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None, non_finite: "FirstNonFinite | None" = None, step: int = 0) -> Tensor:
    """Scale the gradients so that their global norm is at most `max_norm`; return the norm before that, without waiting for the device.

    Each rank adds the squares of what it holds, divided by the number of ranks that hold the same piece; one sum over all ranks
    is then the global square, whether a parameter is replicated, sharded over the data ranks, over the tensor ranks, or over both.

    Args:
        model: The model after its backward passes.
        max_norm: None leaves the gradients as they are.
        non_finite: Notes a norm that is not finite, and of which parameter.
        step: The number of the step, for that note.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grads = [parameter.grad for parameter in parameters]
    if not grads:
        return torch.zeros(())
    pieces = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    # float32: the norm of a bf16 gradient in bf16 has three digits
    norms = torch._foreach_norm(pieces, 2, dtype=torch.promote_types(pieces[0].dtype, torch.float32))
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square()
    sharded = [grad for grad in grads if isinstance(grad, DTensor)]
    if sharded:
        shares = torch.tensor([1 / _n_holders(grad) for grad in grads], dtype=squares.dtype)
        # with CPU offload the gradients lie on the CPU, but NCCL sums on the GPU
        total = (squares * shares.to(squares.device)).sum().to(sharded[0].device_mesh.device_type)
        dist.all_reduce(total)
    else:
        total = squares.sum()  # one process, or DDP, whose ranks hold equal gradients
    norm = total.sqrt()
    if non_finite is not None:
        non_finite.update(norm, step, squares, model, parameters)
    if max_norm is not None:
        torch._foreach_mul_(pieces, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(pieces[0].device))
    return norm


def _n_holders(grad: Tensor) -> int:
    """Return how many ranks hold the same piece of this gradient."""
    n_pieces = 1
    if isinstance(grad, DTensor):
        for size, placement in zip(grad.device_mesh.shape, grad.placements, strict=True):
            assert not placement.is_partial(), "a gradient that is not summed yet"
            n_pieces *= size if not placement.is_replicate() else 1
    return dist.get_world_size() // n_pieces


class FirstNonFinite:
    """The first step whose loss or gradients were not finite, and where. It stays on the device; only asking for it waits.

    All of it is one number: the step, and below it 0 for the loss, or how far from the model's end the parameter is. The smallest
    number over steps and ranks is then what the backward pass met first.

    Args:
        device: Where the norms are.
    """

    NONE, PLACES = 2**62, 2**24

    def __init__(self, device: torch.device | str) -> None:
        self.value = torch.full((), self.NONE, dtype=torch.int64, device=device)
        self.samples_of: Callable[[int], str] | None = None  # names the samples of a step
        self.model: nn.Module | None = None
        self.parameters: Sequence[nn.Parameter] = ()

    def update(
        self,
        grad_norm: Tensor,
        step: int,
        squares: Tensor | None = None,
        model: nn.Module | None = None,
        parameters: Sequence[nn.Parameter] = (),
    ) -> None:
        """Note a step (from 1), its gradient norm, and the squared norm of what this rank holds of each parameter's gradient."""
        self.model, self.parameters = model, parameters
        place: Tensor | int = self.PLACES - 1  # nowhere on this rank
        if squares is not None:
            last = ((~torch.isfinite(squares)) * torch.arange(1, len(squares) + 1, device=squares.device)).amax().to(self.value.device)
            place = torch.where(last > 0, 1 + len(squares) - last, place)
        self._note(~torch.isfinite(grad_norm), step * self.PLACES + place)

    def update_loss(self, loss: Tensor, step: int) -> None:
        """Note a step and what this rank found of its loss."""
        self._note(~torch.isfinite(loss), step * self.PLACES)

    def _note(self, bad: Tensor, number: Tensor | int) -> None:
        self.value.copy_(torch.where(bad.to(self.value.device), torch.clamp(self.value, max=number), self.value))

    def step(self) -> int | None:
        """Return the first such step, or None."""
        value = int(self.value.item())
        return value // self.PLACES if value < self.NONE else None

    def check(self) -> None:
        """Raise a UserError that names step, layer and samples, if there was such a step. All ranks must call this."""
        if dist.is_initialized():
            dist.all_reduce(self.value, dist.ReduceOp.MIN)
        if (step := self.step()) is None:
            return
        what = "loss of step {} was" if self.value % self.PLACES == 0 else "gradients of step {} were"
        samples = f", on {self.samples_of(step)}" if self.samples_of is not None else ""
        raise UserError(
            f"The {what.format(step)} not finite{self._first()}{samples}, so training stopped there "
            "and nothing was saved since. Lower `optimizer.lr`, or raise `train.lr_warmup_steps`, and resume from the last saved step."
        )

    def _first(self) -> str:
        """Return where the backward pass met it first: in the last of those layers, for it begins at the model's end."""
        place = len(self.parameters) - int(self.value.item() % self.PLACES)
        if self.model is None or not 0 <= place < len(self.parameters):
            return ""
        names = {parameter: name for name, parameter in getattr(self.model, "module", self.model).named_parameters()}
        return f", first that of {names[self.parameters[place]]!r}"
