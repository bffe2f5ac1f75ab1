"""What a prompt style is: how messages are written as text, and which parts of it are trained on."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, NamedTuple

from litgpt.errors import UserError, did_you_mean
from litgpt.families import FAMILIES
from litgpt.tokenizer import Tokenizer

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": str}; "input" may hold what an instruction is about

ROLES = ("system", "user", "assistant")
TEMPLATE_NEEDED = "Use a checkpoint whose chat template can, or leave such samples out."

prompt_styles: dict[str, type["PromptStyle"]] = {}  # by name; a class puts itself here: `class Mine(PromptStyle, name="mine")`


def nearest_styles(name: str, known: Iterable[str]) -> str:
    """Return sentences that say which styles are called almost so, and where all names are.

    Args:
        name: What the user typed.
        known: What would have been right.
    """
    near = get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    meant = f"Did you mean {' or '.join(map(repr, near))}? " if near else "There are 'alpaca', 'chatml' and others. "
    return meant + "tutorials/prepare_dataset.md lists all."


class Piece(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    trained: bool = False
    answers: bool | None = None
    """Whether a served prompt ends where this piece begins. By default: it is trained on and the piece before is not."""


class PromptStyle:
    """How messages are written for a model. The attributes describe the layout; `{}` stands for a text.

    A style of your own overrides `apply` (for one turn, as in LitGPT), `pieces`, or just the attributes.
    """

    begin = ""  # opens every conversation
    system = "{}\n\n"  # the system text, before the first user's text or inside of it
    system_inside = True  # whether it stands inside the first user turn
    user = "{}"  # from the user's text to where the answer begins
    end: str | None = None  # the token that ends an answer; None: the tokenizer's EOS
    between = ""  # stands between that and the next user turn
    default_system: str | None = None  # where the messages have none
    stops: tuple[str | tuple[str, ...], ...] = ()  # tokens, or sequences of tokens, that end an answer beside `end` and EOS
    adds_bos = True  # whether the tokenizer may put a BOS in front, if it is one that does

    init_args: Mapping[str, Any] = {}  # what the style was made with, which is saved with a checkpoint

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        """Enter the class in `prompt_styles`, if it has a name."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            prompt_styles[name] = cls
        if "__init__" in cls.__dict__:
            cls.__init__ = _remembering(cls.__init__)

    def apply(self, prompt: str | list[Message], *, sys_prompt: str | None = None, **kwargs: Any) -> str:
        """Return the text that is given to the model.

        Args:
            prompt: What the user says, or a list of messages.
            sys_prompt: The system text; by default the style's own.
            **kwargs: More about the sample; `input` is what the instruction is about.
        """
        messages = as_messages(prompt, sys_prompt)
        messages[-1] = {key: value for key, value in kwargs.items() if value is not None} | messages[-1]
        render = self.pieces if type(self).apply is PromptStyle.apply else self._layout  # an `apply` of a subclass that calls this one
        return "".join(piece[0] for piece in render(messages))

    def pieces(self, messages: list[Message], end: str | None = None) -> list[Piece]:
        """Return the text of a conversation in pieces: what the assistant says and how it ends are trained on.

        Where the last message is not the assistant's, the last piece ends where the assistant's answer begins.

        Args:
            messages: The conversation.
            end: What ends an answer; by default the style's own token.

        Raises:
            UserError: A role is unknown or out of order.
        """
        if type(self).apply is PromptStyle.apply:
            return self._layout(messages, end)
        return self._layout(messages, end, lambda message, system, first: self.apply(**_arguments(message), sys_prompt=system))

    def turn(self, message: Message, system: str | None, first: bool) -> str:
        """Return the text from a user's message to where the answer begins.

        Args:
            message: What the user says.
            system: The system text, in the first turn.
            first: Whether it is the first turn.
        """
        placed = self.system.replace("{}", system, 1) if system else ""
        if self.system_inside:
            return self.user.replace("{}", placed + user_text(message), 1)
        return placed + self.user.replace("{}", user_text(message), 1)

    def _layout(self, messages: list[Message], end: str | None = None, turn: Callable[..., str] | None = None) -> list[Piece]:
        """Return the pieces of a conversation by the attributes, or by a function that writes one user turn."""
        system, turns = _checked(messages)
        if turn is None:
            turn, before = self.turn, self.begin
            system = self.default_system if system is None else system
        else:
            before = ""
        pieces = []
        for index, message in enumerate(turns):
            if message["role"] == "user":
                pieces.append(Piece(before + turn(message, None if index else system, index == 0)))
            else:
                pieces.append(Piece(message["content"] + ((self.end or "") if end is None else end), trained=True))
                before = self.between
        return pieces

    def samples(self, messages: list[Message], end: str | None = None) -> list[list[Piece]]:
        """Return the conversation as it is trained on: once, or once for each answer, each time up to that answer."""
        return [self.pieces(messages, end)]

    def with_tools(self, tools: list[dict[str, Any]]) -> "PromptStyle":
        """Return the style as it also tells the model of functions that it may call.

        Args:
            tools: Their descriptions: `{"type": "function", "function": {"name": ..., ...}}`.

        Raises:
            UserError: The style has no place for them.
        """
        raise UserError(f"{type(self).__name__} cannot tell the model of `tools`. {TEMPLATE_NEEDED}")

    def suited(self, messages: list[Message]) -> list[Message]:
        """Return messages in the form in which this style writes all of them.

        Args:
            messages: A conversation, in which assistants may call functions.

        Raises:
            UserError: The style would leave out a part of them.
        """
        if (caller := next((index for index, message in enumerate(messages) if message.get("tool_calls")), None)) is not None:
            raise UserError(f"Message {caller} calls a function, which {type(self).__name__} cannot write. {TEMPLATE_NEEDED}")
        return messages

    def turn_end(self, tokenizer: Tokenizer) -> str:
        """Return what ends an answer: the style's token if the tokenizer has it, else EOS."""
        if self.end and tokenizer.find_token(self.end) is not None:
            return self.end
        return tokenizer.eos_token or ""

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """Return the sequences of ids that end an answer; those that the tokenizer cannot write are left out."""
        sequences = [[i] for i in tokenizer.eos_ids]
        for stop in (self.end, *self.stops) if self.end else self.stops:
            ids = [_one_id(tokenizer, token) for token in ((stop,) if isinstance(stop, str) else stop)]
            if None not in ids and ids not in sequences:
                sequences.append(ids)
        return tuple(sequences)

    @classmethod
    def from_name(cls, name: str) -> "PromptStyle":
        """Return the style with a name of `prompt_styles`.

        Raises:
            UserError: There is no such name.
        """
        if name not in prompt_styles:
            raise UserError(f"{name!r:.80} is not a prompt style. {nearest_styles(name, prompt_styles)}")
        return prompt_styles[name]()

    @classmethod
    def from_config(cls, config: Any) -> "PromptStyle":
        """Return the style of a known checkpoint, by the exact name on the hub in its config, else `Default`."""
        return prompt_styles[known_style(config) or "default"]()


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that keeps its arguments as `init_args`."""

    @wraps(init)
    def remembering(self: PromptStyle, *args: Any, **kwargs: Any) -> None:
        if "init_args" not in vars(self):  # not called by a subclass
            bound = inspect.signature(init).bind(self, *args, **kwargs)
            rest = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
            named = dict(list(bound.arguments.items())[1:])
            self.init_args = named | named.pop(rest, {})
        init(self, *args, **kwargs)

    return remembering


def known_style(config: Any) -> str | None:
    """Return the name of the style that is registered for the exact name on the hub in a config."""
    hub = getattr(config, "hf_config", None) or {}
    published = (checkpoint for family in FAMILIES.values() for checkpoint in family.published())
    return next((known.prompt for known in published if (known.org, known.hub_name) == (hub.get("org"), hub.get("name"))), None)


def as_messages(prompt: str | list[Message], sys_prompt: str | None = None) -> list[Message]:
    """Return a prompt as a list of messages.

    Args:
        prompt: What the user says, or messages already.
        sys_prompt: The system text, if the messages have none.

    Raises:
        UserError: These are no messages, or there are two system texts.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not prompt:
        raise UserError(f"A prompt is a text or a list of at least one message, but got {prompt!r}.")
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping) or "role" not in message:
            raise UserError(f'Message {index} is {message!r}, but a message looks like {{"role": "user", "content": "..."}}.')
    messages = [dict(message) for message in prompt]
    if sys_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise UserError("There is a system message and `sys_prompt` too. Leave one of them out.")
    return [{"role": "system", "content": sys_prompt}, *messages]


def _checked(messages: list[Message]) -> tuple[str | None, list[Message]]:
    """Return the system text and the other messages, in which user and assistant take turns."""
    for index, message in enumerate(as_messages(messages)):
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise UserError(f"Message {index} has the role {role!r}, but there are {', '.join(ROLES)}.{did_you_mean(str(role), ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"Message {index} ({role}) needs a text as its content, but has {content!r}.")
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = messages[system is not None :]
    for index, message in enumerate(turns):
        expected = ROLES[1 + index % 2]
        if message["role"] != expected:
            at = index + (system is not None)
            raise UserError(
                f"Message {at} is from {message['role']!r}, but should be from {expected!r}: a system message may only come first, "
                "then user and assistant take turns."
            )
    if not turns:
        raise UserError("There is only a system message. Add what the user says.")
    return system, turns


def user_text(message: Message) -> str:
    """Return what a user says, with the input that an instruction may have."""
    return "\n\n".join(filter(None, (message["content"], message.get("input")))) or message["content"]


def _arguments(message: Message) -> dict[str, Any]:
    """Return a user's message as arguments of `apply`."""
    return {key: value for key, value in message.items() if key not in ("role", "content", "sys_prompt")} | {"prompt": message["content"]}


def _one_id(tokenizer: Tokenizer, token: str) -> int | None:
    """Return the id of a token that is spelt as in the vocabulary or as in a text."""
    found = tokenizer.find_token(token)
    if found is None and len(ids := tokenizer.ids(token)) == 1 and tokenizer.decode(ids) == token:
        return ids[0]
    return found
