"""How much memory a model takes: its weights, what it remembers of a text, and training it by one method or another.

The model itself is asked, not a formula: it is made and run with tensors that have shapes and no numbers.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt import names
from litgpt.cache import CHUNK, State
from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean
from litgpt.experts import Experts
from litgpt.hardware import find_device
from litgpt.lora import LoRA, add_lora
from litgpt.model import GPT

MOST_ROWS = 1024  # with more the estimate itself takes minutes
MOST_TOKENS = 2048  # of a training sample, where nobody says how long they are


@dataclass(frozen=True)
class MemoryEstimate:
    """What a model takes. All sizes are in bytes."""

    n_parameters: int
    """All parameters; a head that is the embedding's matrix counts once."""
    n_active: int
    """Those that a token is multiplied by: of experts only as many as a token goes to."""
    n_trained: int
    weights: int
    kv_cache: int = 0
    """What the model remembers of its context: keys and values, latents, recurrent states."""
    kv_per_token: int = 0
    """By how much that grows with a token, as long as no sliding window is full."""
    gradients: int = 0
    optimizer: int = 0
    """AdamW's two averages of each gradient."""
    activations: int = 0
    """The most that a forward and a backward pass hold beside all that."""

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.kv_cache + self.gradients + self.optimizer + self.activations


def estimate_model_memory(
    config: Config | str,
    dtype: str | torch.dtype = "float32",
    training: bool = False,
    *,
    context: int | None = None,
    batch_size: int = 1,
    lora: LoRA | None = None,
    checkpointing: bool = False,
) -> MemoryEstimate:
    """Return how much memory a model takes to generate, or to be trained. Nothing of that size is allocated.

    What Python, torch and its libraries take themselves, some 0.5 GB, is not counted.

    Args:
        config: The architecture, or its known name.
        dtype: Of the weights, activations and cache: float32, float16 or bfloat16. What is trained beside frozen weights is in fp32.
        training: Whether the model is trained, by AdamW, instead of generating.
        context: How many tokens a row has; by default the model's whole context, in training at most 2,048.
        batch_size: How many rows there are; in training, of a microbatch.
        lora: The model stays as it is and updates of these sizes are trained; by default all parameters are.
        checkpointing: Whether blocks are computed again in the backward pass.

    Raises:
        UserError: An argument is out of its range, or the name is not known.
    """
    config = Config.from_name(config) if isinstance(config, str) else config
    wanted = checked_dtype(dtype)
    context = checked_context(context, config, training)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= MOST_ROWS:
        raise UserError(f"`batch_size` is how many rows are computed at once, from 1 to {MOST_ROWS:,}, but got {batch_size!r}.")
    with without_numbers():
        model = cast(GPT(config), wanted)
        sizes = dict(n_parameters=_count(model), n_active=_count(model) - _n_idle(model))
        if not training:
            kv = [kv_bytes(model, batch_size, length) for length in (context, min(2, context), 1)]
            return MemoryEstimate(n_trained=0, weights=_nbytes(model), kv_cache=kv[0], kv_per_token=(kv[1] - kv[2]) // batch_size, **sizes)
        if lora is not None:
            add_lora(model, lora)
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        return MemoryEstimate(
            n_trained=_count(model, trained=True),
            weights=_nbytes(model),
            gradients=trained,
            optimizer=2 * trained,
            activations=activation_bytes(model.train(), batch_size, context, checkpointing),
            **sizes,
        )


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the type that a `dtype` names.

    Raises:
        UserError: It is none that weights are held in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in names.DTYPES:
        raise UserError(f"`dtype` is one of {', '.join(names.DTYPES)}, but got {name!r}.{did_you_mean(name, names.DTYPES)}")
    return getattr(torch, name)


def checked_context(context: int | None, config: Config, training: bool) -> int:
    """Return how many tokens a row has.

    Raises:
        UserError: There are more than the model's context, or none.
    """
    if context is None:
        return min(config.block_size, MOST_TOKENS) if training else config.block_size
    if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= config.block_size:
        raise UserError(f"`context` is from 1 to the model's {config.block_size:,} tokens, but got {context!r}.")
    return context


# Weights and cache


def cast(model: GPT, dtype: torch.dtype) -> GPT:
    """Return a model made `without_numbers` with parameters of a type; `Module.to` cannot do that with such ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.detach().to(dtype)))
    model.tie()
    return model


def _count(model: GPT, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)


def _nbytes(model: GPT) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _n_idle(model: GPT) -> int:
    """Return how many parameters are of experts that a token does not go to."""
    n_all = sum(parameter.numel() for module in model.modules() if isinstance(module, Experts) for parameter in module.parameters())
    return n_all - n_all * model.config.n_expert_per_token // max(1, model.config.n_expert)


def kv_bytes(model: GPT, rows: int, length: int) -> int:
    """Return how much a model's memory of so many rows and tokens takes.

    Args:
        model: Its own weights' type is that of the memory.
        rows: How many sequences fit.
        length: How many tokens fit in each.
    """
    weight, chunk = model.transformer.wte.weight, min(CHUNK, length)  # a sliding window's memory holds a chunk beside the window
    return sum(_state_bytes(block.new_state(rows, length, chunk, 0, weight.dtype, torch.device("meta"))) for block in model.transformer.h)


def _state_bytes(state: State | None) -> int:
    """Return the size of a layer's tensors; keys that are their own values count once."""
    tensors = {id(value): value for value in vars(state).values() if isinstance(value, Tensor)} if state is not None else {}
    return sum(tensor.nbytes for tensor in tensors.values())


# Training


def activation_bytes(model: GPT, rows: int, length: int, checkpointing: bool = False) -> int:
    """Return the most bytes that a microbatch takes beside weights and their gradients, which are there from the one before.

    Args:
        model: Made `without_numbers`, and with its updates, if only these are trained. Blocks that are like others are lost.
        rows: How many samples there are.
        length: How many tokens each has.
        checkpointing: Whether a block keeps its input alone, and is computed again in its backward pass.
    """
    blocks, like = model.transformer.h, repeated_blocks(model)
    for i in like:
        blocks[i] = _PassedOver()
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    idx, marks = torch.zeros(rows, length, dtype=torch.long), []
    with LiveBytes() as live:
        for part in (*blocks, model.transformer.ln_f):
            part.register_forward_pre_hook(lambda *_: marks.append(live.now))
        model(idx, targets=idx).nll.backward()
    kept = [after - before for before, after in zip(marks[:-1], marks[1:], strict=False)]  # of each block, its backward pass aside
    passing = live.most - sum(kept[i] for i in range(len(kept)) if i not in like)  # what there was beside what blocks keep
    kept = [kept[like.get(i, i)] for i in range(len(kept))]
    stream = rows * length * model.config.n_embd * model.transformer.wte.weight.element_size()
    return passing + (stream * len(kept) + max(kept) if checkpointing else sum(kept))


def repeated_blocks(model: GPT) -> dict[int, int]:
    """Return the blocks that keep as much as an earlier one, and which: a model has few kinds of them.

    The first two of a kind are not among them, for the first of all also keeps what it shares with the others.
    """
    kinds: dict[tuple, list[int]] = {}
    for i, block in enumerate(model.transformer.h):
        sizes = tuple((name, parameter.shape, parameter.requires_grad) for name, parameter in block.named_parameters())
        settings = tuple((name, repr(value)) for name, value in vars(block.attn).items() if not name.startswith("_"))
        kinds.setdefault((sizes, settings), []).append(i)
    return {i: alike[1] for alike in kinds.values() for i in alike[2:]}


class _PassedOver(nn.Module):
    """Stands for a block that is like another one."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made meanwhile: those that are there `now`, and the `most` that there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = self._made(func, args, kwargs or {})
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return made

    def _made(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:  # which knows the shape of its result only in bf16
            return func(*args, **kwargs)
        a, b, ends = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
        return a.new_empty(a.size(0), b.size(-1)) if b.dim() == 3 else a.new_empty(ends.numel(), a.size(0), b.size(1))

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: weakref.ref) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Let tensors that are made meanwhile have shapes and types, but no numbers: they take no memory, and products no time."""
    with FakeTensorMode(), _AsComputed():
        yield


class _AsComputed(TorchFunctionMode):
    """Gives two functions the results that they have with numbers; without any, torch takes another way or refuses."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._is_fused(*args[:3]):
            return _FusedAttention.apply(*args[:3], args[3] if len(args) > 3 else kwargs.get("attn_mask"))
        if func is Tensor.tolist:  # where experts' rows end
            return [0] * args[0].numel()
        return func(*args, **kwargs)

    @staticmethod
    def _is_fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
        return q.size(-1) == v.size(-1) or find_device().type != "cpu"  # torch has none for values of another width on a CPU


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused attention keeps: no scores, but one number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        (B, H, T, _), E = q.shape, v.size(-1)
        y = q.new_empty(B, T, H, E).transpose(1, 2)
        added = mask.to(q.dtype) if mask is not None else None  # it is added to the scores
        ctx.save_for_backward(q, k, v, y, q.new_empty(B, H, T, dtype=torch.float32), added)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
