"""The chat template of a checkpoint, as a prompt style."""

import json
import re
from pathlib import Path
from typing import Any

from litgpt import names
from litgpt.errors import UserError, did_you_mean
from litgpt.files import AGAIN
from litgpt.prompts.sandbox import TooMuch, render
from litgpt.prompts.style import ROLES, TEMPLATE_NEEDED, Message, Piece, PromptStyle, as_messages, user_text
from litgpt.tokenizer import Tokenizer, named_tokens, read_json

QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}  # what a template is asked to write
CALLED, GIVEN, RETURNED = "function_to_find", "argument_to_find", "outcome to find"
KNOWN_ROLES = (*ROLES, "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of a message's thoughts, the usual one first


class ChatTemplate(PromptStyle):
    """The Jinja template that comes with a checkpoint. It writes the BOS token itself, if there is to be one."""

    adds_bos = False

    def __init__(self, template: str, special_tokens: dict[str, str] | None = None, variables: dict[str, Any] | None = None) -> None:
        """Take a template's text.

        Args:
            template: The text.
            special_tokens: What it may use of the tokenizer, as in `{"bos_token": "<s>"}`.
            variables: What else it may use, as in `{"enable_thinking": False}`. Only these are saved with a checkpoint.
        """
        self.template = template
        self.special_tokens = special_tokens or {}
        self.variables = variables or {}
        self.init_args = {"variables": variables} if variables else {}
        self._found: dict[Any, Any] = {}  # what was found out about the template, by having it write something

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: str | Path, variables: dict[str, Any] | None = None) -> "ChatTemplate":
        """Return the template of a folder.

        Raises:
            UserError: The folder has none.
        """
        template = read_chat_template(checkpoint_dir)
        if template is None:
            raise UserError(f"There is no chat template in {str(checkpoint_dir)!r}. Name another prompt style.")
        return cls(template, named_tokens(Path(checkpoint_dir)), variables)

    def render(self, messages: list[Message], generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of messages, and the parts that the template marks as the assistant's.

        Args:
            messages: The conversation.
            generation_prompt: Whether to write what an answer begins with.
        """
        written = [_as_given(message) for message in messages]
        defaults = {"tools": None, "documents": None}
        given = {"messages": written, "add_generation_prompt": generation_prompt}
        return render(self.template, **(defaults | self.special_tokens | self.variables | given))

    def pieces(self, messages: list[Message], end: str | None = None) -> list[Piece]:
        """Return the text of a conversation in pieces. What ends an answer is the template's business."""
        messages = as_messages(messages)
        opened = messages[-1]["role"] != "assistant"
        text, marked = self.render(messages, opened)
        turns = self._turns(messages, text)
        if turns is None:
            return [Piece(text)] if opened else self.samples(messages)[-1]
        return _cut(text, turns, marked)

    def samples(self, messages: list[Message], end: str | None = None) -> list[list[Piece]]:
        """Return the conversation in pieces; one for each answer where the template changes earlier turns."""
        messages = as_messages(messages)
        if not _answers(messages):
            raise UserError("No answer follows what the user says, so there is nothing to train on. Leave such conversations out.")
        text, marked = self.render(messages, False)
        if (turns := self._turns(messages, text)) is not None:
            return [_cut(text, turns, marked) if messages[-1]["role"] == "assistant" else self.pieces(messages)]
        samples = []
        for index in _answers(messages):
            prompt = self.pieces(messages[:index])
            given = "".join(piece.text for piece in prompt)
            text, marked = self.render(messages[: index + 1], False)
            if not text.startswith(given):
                text, marked = _thought_through(given, text, marked, messages[index], index)
            samples.append([*prompt, *_answer(text, len(given), len(text), marked)])
        return samples

    def _turns(self, messages: list[Message], text: str) -> list[tuple[int, int]] | None:
        """Return from where to where each answer goes, or None if what is served for one is not how the text begins."""
        turns = []
        for index in _answers(messages):
            before, _ = self.render(messages[:index], True)
            after = text if index == len(messages) - 1 else self.render(messages[: index + 1], False)[0]
            if not text.startswith(after):  # Phi 3's writes EOS behind the last turn alone
                after = after.removesuffix(self.special_tokens.get("eos_token", ""))
            if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
                return None
            turns.append((len(before), len(after)))
        return turns

    def turn_end(self, tokenizer: Tokenizer) -> str:
        """Return the special token that the template writes behind an answer, or nothing.

        Raises:
            TooMuch: The template takes too long or too much space.
        """
        if "ending" not in self._found:
            _, answered, ending = (self._written([QUESTION, ANSWER]) or "").rpartition(ANSWER["content"])
            self._found["ending"] = ending.strip() if answered else ""
        ids = tokenizer.ids(self._found["ending"])
        return tokenizer.text(ids[0]) if ids and ids[0] in tokenizer.special_ids else ""

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """Return EOS and the special token that the template writes behind an answer."""
        sequences = [[i] for i in tokenizer.eos_ids]
        end = self.turn_end(tokenizer)
        if end and (ids := [tokenizer.token_to_id(end)]) not in sequences:
            sequences.append(ids)
        return tuple(sequences)

    def with_tools(self, tools: list[dict[str, Any]]) -> "ChatTemplate":
        """Return the template as it also tells the model of functions that it may call.

        Args:
            tools: Their descriptions: `{"type": "function", "function": {"name": ..., ...}}`.

        Raises:
            UserError: The template does not mention them.
        """
        told = ChatTemplate(self.template, self.special_tokens, self.variables | {"tools": tools})
        told._found = self._found
        if "tools" not in self._found:
            self._found["tools"] = told.render([QUESTION], True) != self.render([QUESTION], True)
        if not self._found["tools"]:
            raise UserError(f"The chat template does not tell the model of `tools`. {TEMPLATE_NEEDED}")
        return told

    def suited(self, messages: list[Message]) -> list[Message]:
        """Return messages in the form in which the template writes all of them: texts alone or in parts, arguments as mappings or JSON.

        Args:
            messages: A conversation, in which assistants may call functions.

        Raises:
            UserError: The template would leave out a part of them.
        """
        for index, message in enumerate(messages):
            role = message["role"]
            if role not in KNOWN_ROLES and role not in self.template:  # many templates write any word there
                known = ", ".join(KNOWN_ROLES)
                raise UserError(f"Message {index} has the role {role!r}, but there are {known}.{did_you_mean(role, KNOWN_ROLES)}")
            if not self._writes_role(role):
                raise UserError(f"Message {index} is from {role!r}, which the chat template leaves out. {TEMPLATE_NEEDED}")
        messages = [_in_parts(message) for message in messages] if self._reads_parts() else messages
        if not any(message.get("tool_calls") for message in messages):
            return messages
        if (form := self._form_of_arguments()) is None:
            raise UserError(f"The chat template does not write calls of functions. {TEMPLATE_NEEDED}")
        return messages if form is dict else [_with_arguments_as_json(message) for message in messages]

    def _writes_role(self, role: str) -> bool:
        """Say whether what is said in a role is written; where the template refuses to, its own words are better than ours."""
        if role in ("user", "assistant"):
            return True
        key = (role, "tools" in self.variables)
        if key not in self._found:
            message = {"role": role, "content": RETURNED}
            messages = [message, QUESTION, ANSWER]
            if role == "tool":
                call = _call(self._form_of_arguments() or dict)
                messages = [QUESTION, call, message | {"name": CALLED, "tool_call_id": call["tool_calls"][0]["id"]}]
            text = self._written(messages)
            self._found[key] = text is None or RETURNED in text
        return self._found[key]

    def _form_of_arguments(self) -> type | None:
        """Return whether a call's arguments have to be a `dict` or its JSON, a `str`; None if calls are not written at all."""
        key = ("calls", "tools" in self.variables)
        if key not in self._found:
            texts = {form: self._written([QUESTION, _call(form)]) for form in (dict, str)}
            written = [form for form, text in texts.items() if text is not None and CALLED in text and GIVEN in text]
            refused = all(text is None for text in texts.values())  # it wants another conversation, and says so then
            self._found[key] = dict if refused else (written or [None])[0]
        return self._found[key]

    def _reads_parts(self) -> bool:
        """Say whether a text is only written if it is a part of a list, as in `[{"type": "text", "text": ...}]`."""
        if "parts" not in self._found:
            texts = [self._tried(messages) for messages in ([QUESTION, ANSWER], [_in_parts(QUESTION), _in_parts(ANSWER)])]
            alone, in_parts = (text is not None and ANSWER["content"] in text for text in texts)
            self._found["parts"] = in_parts and not alone
        return self._found["parts"]

    def _written(self, messages: list[Message]) -> str | None:
        """Return the text of messages whose contents are texts, or None where the template refuses them."""
        return self._tried([_in_parts(message) for message in messages] if self._reads_parts() else messages)

    def _tried(self, messages: list[Message]) -> str | None:
        """Return the text of messages as they are, or None where the template refuses them."""
        try:
            return self.render(messages, False)[0]
        except TooMuch:
            raise
        except UserError:
            return None


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _call(form: type) -> Message:
    """Return a message that calls a function with arguments as a mapping or as JSON."""
    arguments = {GIVEN: 1} if form is dict else json.dumps({GIVEN: 1})
    call = {"type": "function", "id": "call00000", "function": {"name": CALLED, "arguments": arguments}}  # Mistral wants 9 characters
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _with_arguments_as_json(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = [call | {"function": call["function"] | {"arguments": text}} for call, text in zip(message["tool_calls"], texts)]
    return message | {"tool_calls": calls}


def _cut(text: str, turns: list[tuple[int, int]], marked: list[tuple[int, int]]) -> list[Piece]:
    """Return a text in pieces: its answers and what is between them."""
    pieces, position = [], 0
    for start, stop in turns:
        pieces += [Piece(text[position:start]), *_answer(text, start, stop, marked)]
        position = stop
    return [piece for piece in (*pieces, Piece(text[position:])) if piece.text or piece.answers]


def _as_given(message: Message) -> Message:
    """Return a message as transformers gives it to a template: without empty keys, and with thoughts under the names that are read."""
    given = {key: value for key, value in message.items() if value is not None}
    if given.get("input") and isinstance(given.get("content"), str):
        given = {key: value for key, value in given.items() if key != "input"} | {"content": user_text(given)}
    thought = next((given[name] for name in THOUGHTS if name in given), None)
    return given if thought is None else {"thinking": thought} | given | {"reasoning_content": thought}


def _answers(messages: list[Message]) -> list[int]:
    """Return which messages answer somebody; a greeting before the first question does not."""
    first = next((index for index, message in enumerate(messages) if message["role"] in ("user", "tool")), len(messages))
    return [index for index, message in enumerate(messages) if message["role"] == "assistant" and index > first]


def _answer(text: str, start: int, stop: int, marked: list[tuple[int, int]]) -> list[Piece]:
    """Return an answer in pieces: all of it is trained on, unless the template marks parts."""
    parts = [(max(first, start), min(last, stop)) for first, last in marked if last > start and first < stop]
    if not marked:
        parts = [(start, stop)]
    pieces, position = [], start
    for first, last in parts:
        pieces += [Piece(text[position:first]), Piece(text[first:last], trained=True)]
        position = last
    pieces = [piece for piece in (*pieces, Piece(text[position:stop])) if piece.text]
    return [piece._replace(answers=index == 0) for index, piece in enumerate(pieces or [Piece("")])]


def _thought_through(
    given: str, text: str, marked: list[tuple[int, int]], message: Message, index: int
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text and marks of a finished turn as they go on from a prompt that opens a thought, which is closed before the answer.

    Args:
        given: The prompt, which ends inside of a thought.
        text: The finished conversation, which has no thought there, or an empty one.
        marked: Its marks.
        message: What the assistant says; its thought is used where the template leaves it out.
        index: Which message it is.
    """
    opened = re.search(r"<think>\s*$", given)
    content = message.get("content")
    if opened is None or not text.startswith(given[: opened.start()]):  # it is opened in other words
        begins = text.rfind(content.strip()) if isinstance(content, str) and content.strip() else -1
        if begins < 0:
            raise UserError(f"The chat template does not write message {index} as given, so it cannot be trained on.")
        shift = len(given) - begins
        return given + text[begins:], [(max(first + shift, len(given)), last + shift) for first, last in marked]
    own = re.compile(r"<think>(.*?)</think>", re.DOTALL).match(text, opened.start())
    begins = own.end() if own else opened.start()
    begins += len(text[begins:]) - len(text[begins:].lstrip("\n"))
    within = re.match(r"\s*(?:<think>)?(.*?)</think>", content, re.DOTALL) if isinstance(content, str) else None
    beside = next((message[name] for name in THOUGHTS if isinstance(message.get(name), str)), "")
    thought = own[1] if own and own[1].strip() else within[1] if within else beside
    start = given + thought.strip() + "\n</think>\n\n"
    shift = len(start) - begins
    moved = [(len(given) if first <= begins else first + shift, last + shift) for first, last in marked if last > begins]
    return start + text[begins:], moved


def read_chat_template(checkpoint_dir: str | Path) -> str | None:
    """Return the chat template of a folder, or None if it has none: a file of its own, else a key of the tokenizer's config.

    Raises:
        UserError: A file is damaged, or there are several templates and none of them is the default.
    """
    folder = Path(checkpoint_dir)
    try:
        if (folder / names.CHAT_TEMPLATE).is_file():
            return (folder / names.CHAT_TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(folder / names.CHAT_TEMPLATE)!r} is not readable text ({error}). Download the file again.") from None
    found = read_json(folder / names.TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(named := found, dict):
        if "default" not in named and len(named) != 1:
            raise UserError(f"{str(folder)!r} has the chat templates {', '.join(map(str, named))}, but none is called 'default'.")
        found = named.get("default", next(iter(named.values())))
    if not isinstance(found, str | None):
        raise UserError(f"{folder / names.TOKENIZER_CONFIG} is damaged: its `chat_template` is {found!r:.40}, not a text. {AGAIN}")
    return found
