"""How much is remembered while answering, and whether it fits."""

from collections.abc import Callable

import torch

from litgpt.cache import CHUNK, Cache
from litgpt.errors import UserError
from litgpt.hardware import GB, device_memory_gb
from litgpt.model import GPT

BUCKET = 256  # compiled attention reads a multiple of so many tokens, so that there are few graphs
FEWER = "Lower `max_new_tokens` or `batch_size`, or a fixed size of the memory if you set one."


def compile_blocks(model: GPT, backend: str | Callable = "inductor", dynamic: bool | None = False) -> None:
    """Compile each block in place, so that no parameter's name changes.

    Args:
        model: The model.
        backend: Of torch.compile.
        dynamic: Whether one compiled block serves all lengths. False suits decoding with a cache of `new_cache`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # all blocks share one code object
    for block in model.transformer.h:
        block.compile(backend=backend, dynamic=dynamic)


def new_cache(model: GPT, rows: int, length: int, rewind: int = 0, chunk: int = CHUNK) -> Cache:
    """Return an empty memory as `GPT.new_cache` does; for a compiled model one whose use does not compile anew for every length.

    Args:
        model: The model.
        rows: How many sequences fit.
        length: How many tokens fit in each.
        rewind: How many tokens can always be taken back.
        chunk: The most tokens that one call may add to a row.

    Raises:
        UserError: The device has not enough memory.
    """
    compiled = model.transformer.h[0]._compiled_call_impl is not None
    if compiled:
        length = min(-(-length // BUCKET) * BUCKET, model.config.block_size)
    sizes = dict(chunk=min(chunk, length), rewind=min(rewind, length))
    needed, taken, there = _memory_gb(model, rows, length, **sizes)
    if needed + taken > there:
        kind = model.transformer.wte.weight.device.type
        raise UserError(
            f"To remember {rows * length:,} tokens takes {needed:,.1f} GB, but this machine's {kind} has {there:.1f} GB, of "
            f"which the weights take {taken:.1f} GB. {FEWER}"
        )
    try:
        cache = model.new_cache(rows, length, **sizes)
    except torch.OutOfMemoryError:  # of a GPU, which may hold more than the weights
        raise UserError(f"The device has no memory left to remember {rows * length:,} tokens. {FEWER}") from None
    cache.bucket = BUCKET if compiled else 1
    return cache


def fitting_length(model: GPT, rows: int, length: int, rewind: int = 0, chunk: int = CHUNK) -> int:
    """Return how many tokens each row can remember in 6 tenths of the memory that the weights leave, at most `length`; see `new_cache`."""
    while length > BUCKET:
        needed, taken, there = _memory_gb(model, rows, length, chunk=min(chunk, length), rewind=min(rewind, length))
        if needed < 0.6 * (there - taken):
            break
        length //= 2
    return length


def _memory_gb(model: GPT, rows: int, length: int, chunk: int, rewind: int) -> tuple[float, float, float]:
    """Return what a memory takes, what the weights take, and what there is. The system would grant more, and stop the program later."""
    weight = model.transformer.wte.weight
    states = [block.new_state(rows, length, chunk, rewind, weight.dtype, torch.device("meta")) for block in model.transformer.h]
    needed = rows * sum(part.nbytes for state in states if state is not None for part in state.parts(0, length)) / GB
    taken = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))  # quantized weights are buffers
    return needed, taken / GB, device_memory_gb(weight.device)


def room(n_prompt: int, max_new_tokens: int, context: int) -> int:
    """Return how many tokens may be generated: as many as asked for, or as the context leaves.

    Raises:
        UserError: It leaves none, or none are asked for.
    """
    if max_new_tokens < 1:
        raise UserError(f"`max_new_tokens` must be at least 1, but got {max_new_tokens}.")
    if n_prompt == 0:
        raise UserError("The prompt has no tokens. Say something, for there is nothing to go on from.")
    if n_prompt >= context:
        needed = f"The prompt has {n_prompt} tokens, but the context is {context} tokens, of which an answer needs at least one."
        raise UserError(f"{needed} Shorten the prompt.")
    return min(max_new_tokens, context - n_prompt)
