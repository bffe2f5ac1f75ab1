"""What begins with a `/` in a chat: one table of commands."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from litgpt.chat.conversation import Conversation
from litgpt.chat.terminal import SUBMIT, process_prompt
from litgpt.errors import UserError, did_you_mean

COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)


@dataclass
class Chat:
    """A conversation and how it is shown."""

    conversation: Conversation
    markdown: bool = False

    def say(self, prompt: str) -> None:
        """Print the answer to a prompt."""
        process_prompt(prompt, self.conversation, self.markdown)


def obey(chat: Chat, text: str) -> bool:
    """Do what a command says; return whether the text is one.

    Args:
        chat: The chat.
        text: What was typed.
    """
    command = COMMAND.fullmatch(text.strip())
    if command is None:
        return False
    if command[1] not in COMMANDS:
        print(f"There is no command {command[1]}.{did_you_mean(command[1], COMMANDS)} /help shows all.")
        return True
    try:
        COMMANDS[command[1]][1](chat, command[2] or "")
    except UserError as error:
        print(error)
    return True


# What was said


def _clear(chat: Chat, _: str) -> None:
    chat.conversation.clear()
    print("The conversation starts anew.")


def _system(chat: Chat, text: str) -> None:
    chat.conversation.sys_prompt = text or None
    print("The system prompt is set." if text else "The system prompt is the prompt style's own again.")


def _undo(chat: Chat, _: str) -> None:
    print("There is no turn to forget." if chat.conversation.undo() is None else "The newest turn is forgotten.")


def _regenerate(chat: Chat, _: str) -> None:
    before = chat.conversation.messages
    prompt = chat.conversation.undo()
    if prompt is None:
        raise UserError("There is no answer yet to make again.")
    without = chat.conversation.messages
    chat.say(prompt)
    if chat.conversation.messages == without:  # nothing was said in its place
        chat.conversation.messages = before


# Files


def _save(chat: Chat, name: str) -> None:
    if not name:
        raise UserError("Say where to, like /save chat.json.")
    if not chat.conversation.messages:
        raise UserError("Nothing was said yet that could be saved.")
    try:
        chat.conversation.save(Path(name).expanduser())
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # a home folder that is not known is a RuntimeError
        raise UserError(f"{name} could not be written: {str(getattr(error, 'strerror', None) or error).rstrip('.')}.") from None
    print(f"Saved {len(chat.conversation.messages)} messages to {name}.")


def _load(chat: Chat, name: str) -> None:
    if not name:
        raise UserError("Say which file, like /load chat.json.")
    try:
        file = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name} could not be read: {str(error).rstrip('.')}.") from None
    chat.conversation.load(file)
    print(f"The conversation goes on from the {len(chat.conversation.messages)} messages in {name}.")


# Settings


def _number(text: str) -> int | float | None:
    if text in ("null", "none", "None"):
        return None
    return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else float(text)


SETTINGS = {  # of the conversation's row: the kinds of number that each may be
    "temperature": (int, float),
    "top_k": (int, type(None)),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "seed": (int,),
    "max_new_tokens": (int,),
}


def _set(chat: Chat, text: str) -> None:
    name, _, value = text.replace("=", " ").partition(" ")
    if name and name not in SETTINGS:
        raise UserError(f"There is no setting {name!r}.{did_you_mean(name, SETTINGS)} /set shows all.")
    if value.strip():
        _change(chat.conversation, name, value.strip())
    for shown in [name] if name else SETTINGS:
        now = _setting(chat.conversation, shown)
        print(f"{shown:20}{'null' if now is None else now}")


def _change(conversation: Conversation, name: str, text: str) -> None:
    try:
        value = _number(text)
    except ValueError:
        value = text
    if not isinstance(value, SETTINGS[name]):
        kind = "a number" if float in SETTINGS[name] else "a whole number"
        raise UserError(f"`{name}` is {kind}, but got {text!r}. Say for example /set {name} {_setting(conversation, name) or 1}.")
    if name != "max_new_tokens":
        conversation.set_sampling(name, value)
    elif value < 1:
        raise UserError(f"`max_new_tokens` must be at least 1, but got {value}.")
    else:
        conversation.max_new_tokens = value


def _setting(conversation: Conversation, name: str) -> int | float | None:
    return getattr(conversation if name == "max_new_tokens" else conversation.row, name)


def _stats(chat: Chat, _: str) -> None:
    conversation, turn = chat.conversation, chat.conversation.turn
    print(f"{'turns':20}{len(conversation.messages) // 2}")
    if turn is None or turn.seconds == 0:  # stopped before it began
        return
    n_prompt, n = len(turn.answer.prompt), turn.n_tokens
    print(f"{'context':20}{n_prompt + n} of {conversation.context} tokens")
    print(f"{'newest prompt':20}{n_prompt} tokens, of which {turn.answer.n_reused} were remembered")
    print(f"{'newest answer':20}{n} tokens, the first after {turn.first_seconds:.2f} sec, {n / turn.seconds:.2f} tokens/sec")


def _help(*_: object) -> None:
    for name, (text, _) in COMMANDS.items():
        print(f"{name:20}{text}")
    print(f"{'!quit, !exit':20}End the chat, as an empty line, Ctrl-C or Ctrl-D does.")
    print(f"{SUBMIT:20}With --multiline true: send the lines.")
    print('A line that ends in \\ goes on in the next one, and """ stands around several lines.')


COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None]]] = {
    "/clear": ("Forget the conversation.", _clear),
    "/undo": ("Forget the newest turn.", _undo),
    "/regenerate": ("Answer the newest prompt again.", _regenerate),
    "/system": ("Followed by a text: use it as the system prompt from now on.", _system),
    "/set": ("Followed by a name and a value: change a setting; alone: show all.", _set),
    "/stats": ("Show how much was said, and how fast.", _stats),
    "/save": ("Followed by a file name: write the conversation there as JSON.", _save),
    "/load": ("Followed by a file name: go on from a conversation that was saved.", _load),
    "/help": ("Show this.", _help),
}
