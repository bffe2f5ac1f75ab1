"""A model's prompt style as other programs want it: a Jinja template for llama.cpp, a `Modelfile` for Ollama."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from litgpt.errors import UserError
from litgpt.prompts.style import Message, PromptStyle
from litgpt.prompts.template import ChatTemplate
from litgpt.tokenizer import Tokenizer

SYSTEM, USERS, ANSWER = "<[sys]>", ("<[user 1]>", "<[user 2]>"), "<[answer]>"  # texts that no style writes itself


@dataclass(frozen=True)
class Turns:
    """What stands around the texts of a conversation, where that is the same in every turn."""

    before_system: str
    after_system: str
    """Up to the user's text."""
    before_user: str
    """Where the turn has no system text."""
    after_user: str
    """Up to where the answer begins."""
    after_answer: str
    system: str | None
    """The system text where the conversation has none."""

    def render(self, messages: list[Message]) -> str:
        """Return the text of a conversation that ends with the user."""
        text, system = "", self.system
        for message in messages:
            if message["role"] == "system":
                system = message["content"]
            elif message["role"] == "user":
                text += self.before_system + system + self.after_system if system else self.before_user
                text, system = text + message["content"] + self.after_user, None
            else:
                text += message["content"] + self.after_answer
        return text

    @property
    def jinja(self) -> str:
        """The chat template that writes the same."""
        before, after, plain, end, last = (
            json.dumps(part, ensure_ascii=False)
            for part in (self.before_system, self.after_system, self.before_user, self.after_user, self.after_answer)
        )
        return (
            "{%- set ns = namespace(system=" + json.dumps(self.system or "", ensure_ascii=False) + ") -%}"
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] -%}"
            "{%- elif message['role'] == 'user' -%}"
            "{%- if ns.system -%}{{- " + before + " + ns.system + " + after + " -}}{%- else -%}{{- " + plain + " -}}{%- endif -%}"
            "{%- set ns.system = '' -%}{{- message['content'] + " + end + " -}}"
            "{%- else -%}{{- message['content'] + " + last + " -}}{%- endif -%}"
            "{%- endfor -%}"
        )

    @property
    def ollama(self) -> str:
        """Ollama's template of one turn, which it repeats; it leaves out what follows the last answer."""
        opened = self.before_user
        if self.before_system or self.after_system:
            with_system = f"{self.before_system}{{{{ .System }}}}{self.after_system}"
            opened = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{self.before_user}{{{{ end }}}}"
        return f"{opened}{{{{ .Prompt }}}}{self.after_user}{{{{ .Response }}}}{self.after_answer}"


def find_turns(style: PromptStyle, tokenizer: Tokenizer) -> Turns | None:
    """Return what a style writes around texts, or None where that is not the same in every turn.

    Args:
        style: The style.
        tokenizer: Whose BOS is left out, if the tokenizer puts it in front by itself.
    """
    system, (first, second) = {"role": "system", "content": SYSTEM}, ({"role": "user", "content": text} for text in USERS)
    later = [first, {"role": "assistant", "content": ANSWER}, second]
    bos = tokenizer.bos_token if tokenizer.use_bos else None
    one, two = (_text(style, messages, bos, tokenizer) for messages in ([first], later))
    with_system = _text(style, [system, first], bos, tokenizer)
    if one is None or two is None or USERS[0] not in one or ANSWER not in two:
        return None
    opened, after_user = one.split(USERS[0], 1)
    between = two.split(ANSWER, 1)[1].split(USERS[1], 1)[0]
    before_user = opened if between.endswith(opened) else between.removeprefix(style.turn_end(tokenizer)).lstrip("\n")
    before_system, after_system, default = "", before_user, None
    if with_system is not None and SYSTEM in with_system:
        before_system, rest = with_system.split(SYSTEM, 1)
        after_system = rest.split(USERS[0], 1)[0]
        if opened != before_user:  # the first turn has a system text of the style's own
            default = opened.removeprefix(before_system).removesuffix(after_system) or None
    turns = Turns(before_system, after_system, before_user, after_user, between.removesuffix(before_user), default)
    known = [[first], later] if with_system is None else [[first], later, [system, first], [system, *later]]
    for messages in known:
        if turns.render(messages) != _text(style, messages, bos, tokenizer):
            return None
    return turns


def _text(style: PromptStyle, messages: list[Message], bos: str | None, tokenizer: Tokenizer) -> str | None:
    """Return what a style makes of a conversation, or None where it refuses it, as some do system texts."""
    try:
        pieces = style.pieces(messages) if isinstance(style, ChatTemplate) else style.pieces(messages, style.turn_end(tokenizer))
    except UserError:
        return None
    text = "".join(piece.text for piece in pieces)
    return text.removeprefix(bos) if bos else text


def modelfile(name: str, turns: Turns | None, stops: Iterable[str]) -> str:
    """Return a `Modelfile`, which tells Ollama how to use a GGUF file.

    Args:
        name: The file, beside which it lies.
        turns: How the model's conversations are written, where that can be said.
        stops: What ends an answer.
    """
    lines = [f"FROM ./{name}"]
    if turns is not None and '"""' not in turns.ollama + (turns.system or "") and "{{" not in _literals(turns):
        lines.append(f'TEMPLATE """{turns.ollama}"""')
        if turns.system:
            lines.append(f"SYSTEM {_quoted(turns.system)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops) if '"""' not in stop]
    return "\n".join(lines) + "\n"


def _literals(turns: Turns) -> str:
    return "".join((turns.before_system, turns.after_system, turns.before_user, turns.after_user, turns.after_answer))


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def stop_texts(style: PromptStyle, tokenizer: Tokenizer) -> list[str]:
    """Return the texts that end an answer."""
    sequences = style.stop_tokens(tokenizer)
    texts = (
        tokenizer.text(ids[0]) if len(ids) == 1 and ids[0] in tokenizer.special_ids else tokenizer.decode(ids) for ids in sequences if ids
    )
    return [text for text in texts if text]
