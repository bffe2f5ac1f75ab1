"""What was said, and the model's memory of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from litgpt.cache import CHUNK
from litgpt.data.base import messages_of
from litgpt.errors import UserError
from litgpt.files import read_text
from litgpt.generate.batch import Answer, Batch
from litgpt.generate.decode import stream_text
from litgpt.generate.memory import new_cache, room
from litgpt.generate.run import Speaker, note
from litgpt.generate.sampling import NO_NUMBERS, RowState

FIRST_LENGTH = 4096  # tokens that the memory holds at first; it doubles up to the model's context


@dataclass
class Turn:
    """What the newest answer is, and took."""

    answer: Answer
    first_seconds: float = 0.0  # to the first token
    seconds: float = 0.0

    @property
    def n_tokens(self) -> int:
        """How many tokens were made, without those that end an answer."""
        return self.answer.n_shown


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
        self.turn: Turn | None = None
        self.stopped_at = float("-inf")  # when Ctrl-C last stopped an answer
        self.is_broken = False  # whether something interrupted a step, so that nobody knows what the memory holds
        self.batch = self._new_batch(min(FIRST_LENGTH, self.context))

    def answer(self, prompt: str) -> Iterator[str]:
        """Yield the answer as it is made. What was made until then is remembered, even if nobody waits for the end."""
        began, said, is_done, self.turn = perf_counter(), "", False, None
        ids, n_new, messages = self._fit([*self.messages, {"role": "user", "content": prompt}])
        self._make_room(len(ids) + n_new)
        answer = Answer(ids, self.row, n_new, self.speaker.stop_tokens)
        self.turn = turn = Turn(answer)
        self.is_broken = True  # until it is known to be whole, wherever an interrupt breaks off what follows
        try:
            for text in stream_text(self.speaker.tokenizer, self._steps(answer, turn, began)):
                said += text
                yield text
            is_done = True
        finally:
            turn.seconds = perf_counter() - began
            if is_done or said:
                self.messages = [*messages, {"role": "assistant", "content": said}]
            else:
                self.messages = messages[:-1]
            if answer in self.batch.running:
                self.batch.leave(answer)
            if not is_done and not self.batch.cache.rewinds_freely:
                self.batch.forget()  # a step that was broken off may have overwritten what rewinding needs
            self.is_broken = False

    def _steps(self, answer: Answer, turn: Turn, began: float) -> Iterator[list[int]]:
        """Yield the tokens of an answer that can be shown."""
        self.batch.join(answer)
        while answer.finish is None:
            for _, new in self.batch.step():
                if answer.finish == "error":
                    raise UserError(NO_NUMBERS)
                turn.first_seconds = turn.first_seconds or perf_counter() - began
                yield new

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int, list[dict[str, str]]]:
        """Return the ids, the room for the answer and the messages, less the oldest ones where the context is too short."""
        wanted, n_dropped = min(self.max_new_tokens, self.context // 4), 0
        ids = self.speaker.encode(messages, self.sys_prompt)
        while len(ids) + wanted > self.context and len(messages) > 1:
            messages, n_dropped = messages[2:], n_dropped + 1
            ids = self.speaker.encode(messages, self.sys_prompt)
        n_new = room(len(ids), self.max_new_tokens, self.context)
        if n_dropped:
            note(f"The model's context of {self.context} tokens is full: it forgets the oldest {n_dropped} turn(s).")
        return ids, n_new, messages

    def _new_batch(self, length: int) -> Batch:
        cache = new_cache(self.speaker.model, 1, length, rewind=CHUNK, chunk=CHUNK)
        return Batch(self.speaker.model, cache, CHUNK, keeps_prefixes=True)

    def _make_room(self, length: int) -> None:
        """Take a larger memory if this one is too small.

        It is fed anew only where what this one knows does not lie in order, or was turned by angles that follow from its size.
        """
        old = self.batch
        if self.is_broken:
            self.batch = old = Batch(old.model, old.cache, CHUNK, keeps_prefixes=True)
            self.is_broken = False
        if length > old.cache.length:
            self.batch = self._new_batch(min(max(length, 2 * old.cache.length), self.context))
            if old.cache.rewinds_freely and self.batch.cache.rewinds_freely and not old.model.rope.depends_on_length:
                self.batch.cache.restore(0, old.cache.snapshot(0))
                self.batch.kept = old.kept

    def undo(self) -> str | None:
        """Forget the newest turn, and return what the user said in it, or None if there is none."""
        if not self.messages:
            return None
        *self.messages, prompt, _ = self.messages
        return prompt["content"]

    def clear(self) -> None:
        """Forget what was said."""
        self.messages = []

    def set_sampling(self, name: str, value: float | None) -> None:
        """Sample in another way from now on; a new `seed` also begins its draws anew.

        Args:
            name: A field of `RowState`.
            value: Its value.

        Raises:
            UserError: The value is out of its range.
        """
        row = replace(self.row, **{name: value})
        if name != "seed":
            row.generator = self.row.generator
        self.row = row

    def save(self, file: Path) -> None:
        """Write what was said as JSON that finetuning can read: a list of one record with `messages`."""
        system = [] if self.sys_prompt is None else [{"role": "system", "content": self.sys_prompt}]
        file.write_text(json.dumps([{"messages": system + self.messages}], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(self, file: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            UserError: The file holds something else.
        """
        messages = read_conversation(file)
        self.sys_prompt = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        self.messages = messages


def read_conversation(file: Path) -> list[dict[str, str]]:
    """Return the messages in a JSON file: one record, or a list of one, whose user and assistant take turns.

    Raises:
        UserError: The file holds something else.
    """
    text = read_text(file)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not valid JSON. Choose a file that /save wrote.") from None
    record = records[0] if isinstance(records, list) and len(records) == 1 else records
    if not isinstance(record, dict):
        raise UserError(f"{file} does not hold one conversation. Choose a file that /save wrote.")
    try:
        messages = messages_of({"messages": record.get("messages")})
    except UserError as error:
        raise UserError(f"{file} holds no conversation: {error}") from None
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise UserError(f"In {file} user and assistant do not take turns up to an answer, so the chat cannot go on from it.")
    return messages
