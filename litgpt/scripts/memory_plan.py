"""How much memory a model takes: its weights, what it remembers of a text, and training it by one method or another.

The model itself is asked, not a formula: it is made and run with tensors that have shapes and no numbers.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt import names
from litgpt.attention import Segments
from litgpt.cache import CHUNK, State
from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean
from litgpt.experts import Experts
from litgpt.hardware import GB, find_device
from litgpt.lora import LoRA, add_lora
from litgpt.model import GPT

MOST_ROWS = 1024  # with more the estimate itself takes minutes
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "bitsandbytes::gemm_4bit"}
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
            activations=activation_bytes(model.train(), batch_size, context, config.n_layer if checkpointing else 0),
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


def in_words(n_bytes: float) -> str:
    """Return a number of bytes for people: `1.23 GB`, `12.3 MB`."""
    return f"{n_bytes / GB:,.2f} GB" if n_bytes >= GB / 10 else f"{n_bytes / 1e6:,.1f} MB"


# Weights and cache


def cast(model: GPT, dtype: torch.dtype, trained: torch.dtype | None = None) -> GPT:
    """Return a model made `without_numbers` with parameters of a type; `Module.to` cannot do that with such ones.

    Args:
        model: Is changed in place.
        dtype: Of its parameters.
        trained: Of those that are trained, if it is another one.
    """
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            wanted = trained if trained is not None and old.requires_grad else dtype
            module.register_parameter(name, nn.Parameter(old.detach().to(wanted), requires_grad=old.requires_grad))
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


@dataclass(frozen=True)
class Held:
    """What a part of a pass holds beside what there was before it, in bytes; negative where it frees more than it makes."""

    most: int
    after: int


@dataclass(frozen=True)
class Peak:
    """What a microbatch takes beside weights and optimizer at its fullest moment, in bytes."""

    gradients: int
    activations: int
    logits: int
    """What the head and the loss take; nothing if the fullest moment is another one."""

    @property
    def total(self) -> int:
        """All of it together."""
        return self.gradients + self.activations + self.logits


@dataclass(frozen=True)
class Pass:
    """What the parts of a microbatch's forward and backward pass hold, beside gradients that are there already."""

    embedding: Held
    forward: list[Held]  # of each block
    head: Held  # the final norm and the loss, and back
    backward: list[Held]  # of each block, in the order of the model
    rest: Held  # the embedding's backward pass
    stream: int  # a block's output
    gradients: list[int]  # those of the embedding, of each block, and of the norm and the head
    n_products: int = 0  # how many different ones of matrices in 16 bits there are

    def peak(self, n_recomputed: int = 0, accumulates: bool = True) -> Peak:
        """Return what there is at the fullest moment.

        Args:
            n_recomputed: So many blocks, the first ones, keep their output alone and are computed again in their backward pass.
            accumulates: Whether the gradients of another microbatch are there; else they are made on the way.
        """
        n_blocks, made = len(self.forward), sum(self.gradients) if accumulates else 0
        moments, level = [Peak(made, self.embedding.most, 0)], self.embedding.after
        for i, block in enumerate(self.forward):
            moments.append(Peak(made, level + block.most, 0))
            level += min(block.after, self.stream) if i < n_recomputed else block.after
        made = made if accumulates else self.gradients[-1]
        moments.append(Peak(made, level, self.head.most))
        level += self.head.after
        for i in reversed(range(n_blocks)):
            made += 0 if accumulates else self.gradients[i + 1]
            if i < n_recomputed:
                moments.append(Peak(made, level + self.forward[i].most, 0))
                level += self.forward[i].after - min(self.forward[i].after, self.stream)
            moments.append(Peak(made, level + self.backward[i].most, 0))
            level += self.backward[i].after
        moments.append(Peak(sum(self.gradients), level + self.rest.most, 0))
        return max(moments, key=lambda moment: moment.total)


def measured_pass(model: GPT, rows: int, length: int, lengths: list[int] | None = None, autocast: torch.dtype | None = None) -> Pass:
    """Return what the passes of a microbatch take.

    Args:
        model: Made `without_numbers`, and with its updates, if only these are trained. Blocks that are like others are lost.
        rows: How many samples there are.
        length: How many tokens each has.
        lengths: Of the samples that are laid end to end, where there is one row.
        autocast: In what products are computed, if not in the weights' own type.
    """
    blocks, like = model.transformer.h, repeated_blocks(model)
    gradients, embedding = _gradient_bytes(model), model.transformer.wte.weight
    for i in like:
        blocks[i] = _PassedOver()
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    idx, stream = torch.zeros(rows, length, dtype=torch.long), rows * length * model.config.n_embd * embedding.element_size()
    graded: list[bool] = []  # whether what comes in has a gradient
    segments = None if lengths is None else Segments(lengths)
    with LiveBytes() as live:

        def begin(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            live.mark()
            graded.append(inputs[0].requires_grad)
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _: live.mark())

        for i, part in enumerate((*blocks, model.transformer.ln_f)):
            if i not in like:
                part.register_forward_pre_hook(begin)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            nll = model(idx, targets=idx, segments=segments).nll
        nll.backward()
        live.mark()
    found = _by_part(live.parts, graded, [like.get(i, i) for i in range(len(blocks))], stream, gradients)
    return replace(found, n_products=len(live.products))


def _by_part(parts: list[Held], graded: list[bool], like: list[int], stream: int, gradients: list[int]) -> Pass:
    """Return which part is which: embedding, blocks, head, and the blocks again, from the last one to the first that has a gradient."""
    seen = sorted(set(like))  # the blocks that were computed
    forward = dict(zip(seen, parts[1:], strict=False))
    back = parts[len(seen) + 2 :]
    backward = dict.fromkeys(seen, Held(0, 0)) | dict(zip(reversed(seen), back, strict=False))
    rest = back[-1] if graded[0] else Held(0, 0)
    return Pass(parts[0], [forward[i] for i in like], parts[len(seen) + 1], [backward[i] for i in like], rest, stream, gradients)


def _gradient_bytes(model: GPT) -> list[int]:
    """Return the sizes of the gradients of the embedding, of each block, and of the norm and the head; a shared matrix is the head's."""
    last = [*model.transformer.ln_f.parameters(), *model.lm_head.parameters()]
    blocks = [list(block.parameters()) for block in model.transformer.h]
    known = {id(parameter) for part in (last, *blocks) for parameter in part}
    first = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [sum(parameter.nbytes for parameter in part if parameter.requires_grad) for part in (first, *blocks, last)]


def blocks_to_recompute(measured: Pass, budget: float, accumulates: bool = True) -> int:
    """Return how few blocks have to be computed again, for the activations of a microbatch to fit into so many bytes.

    Raises:
        UserError: They do not fit, even if all are.
    """
    peaks = [measured.peak(n, accumulates) for n in range(len(measured.forward) + 1)]
    sizes = [peak.activations + peak.logits for peak in peaks]
    if (fitting := next((n for n, size in enumerate(sizes) if size <= budget), None)) is None:
        least = f"{math.ceil(min(sizes) / GB * 1000) / 1000:.3f}"
        raise UserError(
            f"`train.activation_checkpointing` leaves a microbatch {budget / GB:g} GB, but it takes {least} GB even if all blocks are "
            f"computed again. Give it {least}, or lower `train.micro_batch_size` or `train.max_seq_length`."
        )
    return fitting


def activation_bytes(model: GPT, rows: int, length: int, n_recomputed: int = 0) -> int:
    """Return the most bytes that a microbatch takes beside weights and their gradients, which are there from the one before.

    Args:
        model: Made `without_numbers`, and with its updates, if only these are trained. Blocks that are like others are lost.
        rows: How many samples there are.
        length: How many tokens each has.
        n_recomputed: So many blocks keep their input alone, and are computed again in their backward pass.
    """
    peak = measured_pass(model, rows, length).peak(n_recomputed)
    return peak.activations + peak.logits


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
        self.now = self.most = self.before = 0
        self.known: dict[int, weakref.ref] = {}
        self.parts: list[Held] = []
        self.products: set[tuple] = set()  # the different ones in 16 bits

    def mark(self) -> None:
        """End a part, and note what it held."""
        self.parts.append(Held(self.most - self.before, self.now - self.before))
        self.most = self.before = self.now

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = self._made(func, args, kwargs or {})
        if func.name() in PRODUCTS and made.dtype.itemsize == 2:
            self.products.add((func, *((tensor.shape, tensor.stride()) for tensor in args[:3] if isinstance(tensor, Tensor))))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return made

    def _made(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # where experts' rows end
            return 0
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
    with FakeTensorMode(allow_non_fake_inputs=True), _AsComputed():
        yield


class _AsComputed(TorchFunctionMode):
    """Gives some functions the results that they have with numbers; without any, torch takes another way or refuses."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._is_fused(*args[:3]):
            return _FusedAttention.apply(*args[:3], args[3] if len(args) > 3 else kwargs.get("attn_mask"))
        if func is Tensor.split and isinstance(args[1], list) and not any(args[1]):  # by that, for quantized experts
            return [args[0], *(args[0][:0] for _ in args[1][1:])]
        if func is Tensor.nonzero:  # which tokens have a target: all
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.long)
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
