"""What generate, chat and `LLM` share: a checkpoint made ready to answer."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from litgpt.checkpoint import described_by, find_adapter, has_updates, load_model
from litgpt.errors import UserError
from litgpt.files import kind_of
from litgpt.generate.memory import compile_blocks
from litgpt.hardware import compute_dtype, find_device, products_dtype
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, encode_prompt, find_prompt_style, with_own_style
from litgpt.quantize import check_quantize, quantize_model
from litgpt.scripts.download import find_checkpoint
from litgpt.tokenizer import Tokenizer


@dataclass
class Speaker:
    """A model, its tokenizer, and the prompt style it was trained with."""

    folder: Path
    model: GPT
    tokenizer: Tokenizer
    style: PromptStyle

    @property
    def stop_tokens(self) -> list[list[int]]:
        """Token sequences that end an answer."""
        return stop_tokens(self.style, self.tokenizer)

    def encode(self, prompt: str | Sequence[Mapping[str, str]], sys_prompt: str | None = None) -> list[int]:
        """Return the ids of a prompt or of a list of messages, in the model's prompt style."""
        return prompt_ids(self.style, self.tokenizer, prompt, sys_prompt)


def load(
    checkpoint_dir: str | Path,
    *,
    quantize: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    access_token: str | None = None,
    adapter: Path | None = None,
    accelerator: str = "auto",
) -> Speaker:
    """Return a checkpoint made ready to answer on a device of this machine.

    Args:
        checkpoint_dir: A folder, or a name, see DESIGN "Checkpoint arguments".
        quantize: In how few bits to hold the weights, see `litgpt.quantize`.
        precision: The type of weights and products; by default the one that is fast here.
        compile: Whether to compile the model's blocks.
        access_token: For a model that has to be downloaded.
        adapter: A folder of LoRA updates, or of what Adapter trained, to add to the model.
        accelerator: Which device, see `hardware.find_device`.
    """
    dtype = compute_dtype(accelerator) if precision is None else products_dtype(precision)
    device, updates = find_device(accelerator), find_adapter(adapter)
    check_quantize(quantize, device)
    folder = find_checkpoint(checkpoint_dir, access_token=access_token)
    tokenizer = Tokenizer(described_by(folder))
    model = load_weights(folder, dtype, device, updates, quantize)
    if compile:
        compile_blocks(model)
    style = find_prompt_style(with_own_style(updates, folder), tokenizer, config=model.config)
    return Speaker(folder, model, tokenizer, style)


def load_weights(
    folder: Path, dtype: torch.dtype, device: torch.device | str, adapter: Path | None = None, quantize: str | None = None
) -> GPT:
    """Return the model of a folder on a device.

    Args:
        folder: See `load_model`.
        dtype: Of weights and products.
        device: Where to put the model.
        adapter: A folder of LoRA updates, which are added to the weights before those are quantized, or of what Adapter trained.
        quantize: In how few bits to hold the weights.

    Raises:
        UserError: A file is damaged, or what is to be added to a model is to be added to updates.
    """
    if adapter is not None and has_updates(folder):
        way = "Name that model instead; merge_lora makes one of a model and LoRA updates."
        raise UserError(f"{folder} holds what was trained beside a model, to which nothing else can be added, such as {adapter}. {way}")
    if quantize is None:
        return load_model(folder, dtype=dtype, device=device, adapter=adapter)
    quantized = partial(quantize_model, kind=quantize, dtype=dtype, device=device)
    return load_model(folder, adapter=adapter, prepare=quantized)  # whole on the CPU, where what is only mapped from disk takes no memory


def prompt_ids(
    style: PromptStyle, tokenizer: Tokenizer, prompt: str | Sequence[Mapping[str, str]], sys_prompt: str | None = None
) -> list[int]:
    """Return the ids of a prompt, or of messages that all are text: a chat template would write anything else in its own way.

    Raises:
        UserError: The messages are not a conversation that can be answered.
    """
    if not isinstance(sys_prompt, str | None):
        raise UserError(f"`sys_prompt` must be text, but is {kind_of(sys_prompt)}.")
    for i, message in enumerate(prompt if isinstance(prompt, Sequence) and not isinstance(prompt, str) else ()):
        if not isinstance(message, Mapping):
            continue  # which is told below
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(f"Message {i} needs a text as its `{key}`, but has {message.get(key)!r}.")
    return encode_prompt(style, tokenizer, prompt, sys_prompt=sys_prompt)


def stop_tokens(style: PromptStyle, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token sequences that end an answer: all end tokens of the tokenizer, and those of the style."""
    found = [[eos] for eos in tokenizer.eos_ids] + [list(sequence) for sequence in style.stop_tokens(tokenizer)]
    return [sequence for i, sequence in enumerate(found) if sequence and sequence not in found[:i]]


def note(text: str) -> None:
    """Tell the person at the terminal something that is no part of the answer."""
    print(text, file=sys.stderr, flush=True)
