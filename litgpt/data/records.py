"""What a sample may look like in a file, and the messages it stands for."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from litgpt.errors import UserError, did_you_mean
from litgpt.prompts import Message

FORMS = (  # what a record without messages calls what is asked and what is answered
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
INPUTS = ("input", "context")  # what it calls the text that the instruction is about
SYSTEMS = ("system", "system_prompt")  # what a record of either kind calls a system text that is not among its messages
CONVERSATIONS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # and what they usually call speaker and text
KEYS = {*CONVERSATIONS, *(key for form in FORMS for key in form)}
SPEAKERS = {  # other words for the roles
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
ROLES = {"system", "user", "assistant", "tool", *SPEAKERS}
CALL = "function_call"  # whose text is a call, or a list of them, in JSON


class Record(dict):
    """One sample as a file holds it, and `place`, which names that file and where in it."""

    place: str = ""


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """The messages of one record, checked; an `input` is a key of the user's message.

    Args:
        record: A mapping with one of the pairs of keys in `FORMS` and maybe an `input`; or with `messages` (`role`, `content`); or with
            `conversations` (`from`, `value`). Other keys do not matter.

    Raises:
        UserError: A key is missing, or a value is not text.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"A record must be a mapping with the keys `instruction` and `output`, or `messages`, but this is {shown(record)}.")
    if (key := _conversation_key(record)) is not None:
        return conversation_of(record, key)
    asked, answered = _form(record)
    for key in (asked, answered):
        if key not in record:
            raise UserError(f"The key `{key}` is missing. It has {_keys(record)}.{did_you_mean(key, map(str, record))}")
        if not isinstance(record[key], str):
            raise UserError(f"`{key}` must be text, but is {shown(record[key])}.")
    user: Message = {"role": "user", "content": record[asked]}
    if given := _only_text(record, INPUTS):
        user["input"] = given
    return _with_system(record, [user, {"role": "assistant", "content": record[answered]}])


def tools_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that a conversation may call, as OpenAI describes them: `{"type": "function", "function": {...}}`.

    Args:
        record: A mapping that has its messages, and maybe `tools`, a list or its JSON.

    Raises:
        UserError: These are no descriptions of functions.
    """
    if _conversation_key(record) is None or not record.get("tools"):
        return []
    tools = _parsed(record["tools"])
    if not isinstance(tools, list):
        raise UserError(f"`tools` must be a list of functions, but is {shown(tools)}.")
    described = []
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"Function {number} in `tools` must be a mapping with the key `name`, but is {shown(tool)}.")
        described.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return described


def conversation_of(record: Mapping[str, Any], key: str, role: str | None = None, content: str | None = None) -> list[Message]:
    """The messages of a conversation, checked, with the roles by their usual names.

    Args:
        record: The record.
        key: Where its messages are.
        role: What a message calls its speaker. By default `role` or `from`.
        content: What it calls its text. By default `content` or `value`.

    Raises:
        UserError: There are no messages, a key is missing, or a value is not text.
    """
    messages = _parsed(record.get(key))
    usual = CONVERSATIONS.get(key, CONVERSATIONS["messages"])
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        names = f"`{role or usual[0]}` and `{content or usual[1]}`"
        raise UserError(f"`{key}` must be a list of messages with the keys {names}, but is {shown(messages)}.")
    checked = []
    for number, message in enumerate(messages, start=1):
        known = (pair for pair in CONVERSATIONS.values() if isinstance(message, Mapping) and pair[0] in message)
        pair = next(known, usual)
        checked.append(_checked(message, f"message {number} in `{key}`", role or pair[0], content or pair[1]))
    if not any(message["role"] == "assistant" for message in checked):
        raise UserError(f"`{key}` has no message of the role `assistant`, so there is nothing to train on.")
    return _with_system(record, checked)


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row whose values have no keys that are null: tables give every message all the keys that any message has."""
    return {column: _filled(value) for column, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value for a sentence, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _conversation_key(record: Mapping[str, Any]) -> str | None:
    """Return where a record has its messages, or None if it is a question with an answer; tables leave empty what other rows have."""
    filled = {key for key, value in record.items() if value is not None}
    among = filled if filled & KEYS else record
    return next((key for key in CONVERSATIONS if key in among), None)


def _form(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a record calls its question and its answer; of a record that is not complete, what it comes nearest to."""
    complete = [form for form in FORMS if all(record.get(key) is not None for key in form)]
    rivals = [
        form for form in complete if complete[0] != FORMS[0] or form[0] == complete[0][0]
    ]  # what else is beside the first form is ignored
    if len({str(record[answered]) for _, answered in rivals}) > 1 or len({asked for asked, _ in rivals}) > 1:
        pairs = " or ".join(f"`{asked}` with `{answered}`" for asked, answered in rivals)
        raise UserError(f"It is not clear what is asked and answered: {pairs}. Leave one of the answers out.")
    begun = [form for form in FORMS if any(key in record for key in form)]
    return (complete or begun or FORMS)[0]


def _only_text(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the text under one of several names for the same, which may be missing."""
    found = {key: record[key] for key in keys if record.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, str):
            raise UserError(f"`{key}` must be text, but is {shown(value)}.")
    texts = {key: value for key, value in found.items() if value}
    if len(set(texts.values())) > 1:
        raise UserError(f"{' and '.join(f'`{key}`' for key in texts)} are different texts for the same place. Leave one of them out.")
    return next(iter(texts.values()), "")


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return messages that begin with the record's own system text, if it has one beside them."""
    text = _only_text(record, SYSTEMS)
    if text and messages[0]["role"] == "system" and messages[0]["content"] != text:
        raise UserError("The record has a system text beside its messages, which begin with another one. Leave one of them out.")
    if not text or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text}, *messages]


def _checked(message: Any, where: str, role: str, content: str) -> Message:
    """Return one message under the usual names, with text as its content and mappings as the arguments of its calls."""
    if not isinstance(message, Mapping) or not isinstance(message.get(role), str):
        raise UserError(f"`{role}` of {where} must be text, but is {_found(message, role)}.")
    rest = {name: value for name, value in message.items() if name not in (role, content)}
    text, calls = message.get(content), rest.pop("tool_calls", None)
    if message[role] == CALL:
        text, calls = None, _called(text, where)
    elif isinstance(text, list):
        text = "".join(_text_part(part, where, content) for part in text)
    if not isinstance(text, str) and not (text is None and calls):
        raise UserError(f"`{content}` of {where} must be text, but is {_found(message, content)}.")
    if calls:
        rest["tool_calls"] = [_checked_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    said_by = message[role].lower() if message[role].lower() in ROLES else message[role]  # some templates know more, which stay as they are
    return {"role": SPEAKERS.get(said_by, said_by), "content": text} | rest


def _found(message: Any, key: str) -> str:
    return shown(message[key]) if isinstance(message, Mapping) and key in message else f"missing in {shown(message)}"


def _text_part(part: Any, where: str, content: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise UserError(f"`{content}` of {where} has a part that is not text: {shown(part)}. Only text is trained on.")


def _called(text: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls that a text holds, in OpenAI's form."""
    calls = _parsed(text)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"The call of {where} must be JSON with the keys `name` and `arguments`, but is {shown(text)}.")
    return [{"type": "function", "function": call} for call in calls]


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call whose arguments are a mapping, as templates and the server take them, where they are JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"A call of {where} must be a mapping with `function`, which has a `name`, but is {shown(call)}.")
    arguments = _parsed(function.get("arguments") or {})
    if not isinstance(arguments, Mapping):
        raise UserError(f"The `arguments` of {function['name']!r} in {where} must be a mapping or its JSON, but are {shown(arguments)}.")
    return dict(call) | {"function": dict(function) | {"arguments": dict(arguments)}}


def _parsed(value: Any) -> Any:
    """Return what a text of JSON holds, and anything else as it is; tables have no other way to hold lists."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _keys(record: Mapping[str, Any]) -> str:
    return "the keys " + ", ".join(f"`{key}`" for key in record) if record else "no keys"
