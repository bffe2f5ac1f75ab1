"""Many prompts from a file, and their answers to a file, with which a run that was stopped goes on."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from litgpt.errors import MissingFile, UserError, did_you_mean
from litgpt.files import cannot_write, is_file, is_folder, kind_of, read_bytes, read_text
from litgpt.generate.answers import NUMBERS, Options, Reply, new_reply, write
from litgpt.generate.batch import TokenLogprob, check_ids
from litgpt.generate.memory import room
from litgpt.generate.run import Speaker, note
from litgpt.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".json", ".txt")
PROMPTS = ("prompt", "messages")  # a line has one of them
TYPES = {"prompt": str, "messages": list, "sys_prompt": str, "schema": dict}  # of what `Options` does not check
OPTIONS = ("sys_prompt", *NUMBERS, "stop", "schema")  # what a line may say for itself
BEGINNING = b'{"index": '  # of each answer's line
PAUSE = 10.0  # seconds between two reports


@dataclass
class Line:
    """One prompt of a file.

    Args:
        index: Which one it is, from 0.
        place: Where it stands, for messages.
        said: What stands there, or None if that cannot be read.
        error: Why it cannot be answered.
    """

    index: int
    place: str
    said: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """The text or the messages."""
        assert self.said is not None
        return self.said["messages"] if "messages" in self.said else self.said["prompt"]


class Task(NamedTuple):
    """One answer to make."""

    line: Line
    sample: int
    ids: list[int]
    options: Options


# Reading


def read_lines(path: Path) -> list[Line]:
    """Return the prompts of a file. One that is wrong has an `error`, and the others are answered all the same.

    Args:
        path: A `.jsonl`, `.json` or `.txt` file, or `-` for lines of JSON from standard input.

    Raises:
        UserError: The file cannot be read as what its name says, or has no prompts.
    """
    is_piped = str(path) == "-"
    text, suffix, source = (sys.stdin.read(), ".jsonl", "Standard input") if is_piped else (_text_of(path), path.suffix, str(path))
    lines = _read(text, suffix, source)
    if not lines:
        raise UserError(f"{source} is empty: it has no prompts.")
    return lines


def _text_of(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} ends in {path.suffix!r}, but prompts are read from {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} files.")
    if not is_file(path):
        raise MissingFile(f"There is no file {path}. `prompts` names a file; a single text is `prompt`.")
    return read_text(path, "Save it as UTF-8 text.").removeprefix("\ufeff")


def _read(text: str, suffix: str, source: str) -> list[Line]:
    if suffix == ".json":
        records, error = _loaded(text)
        if error is not None:
            raise UserError(f"{source} is not valid JSON: {error}. If each line is a prompt, name it `.jsonl`.")
        if not isinstance(records, list):
            raise UserError(f"{source} must hold a list of prompts, but holds {kind_of(records)}. Put the prompts in [ ].")
        return [_line(i, f"Prompt {i + 1}", record) for i, record in enumerate(records)]
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]  # JSON may hold U+2028
    read = _loaded if suffix == ".jsonl" else lambda line: (line.removesuffix("\r"), None)
    return [_line(i, f"Line {number}", *read(line)) for i, (number, line) in enumerate(numbered)]


def _loaded(text: str) -> tuple[Any, str | None]:
    """Return what a JSON text says, and why if it says nothing."""
    try:
        return json.loads(text, parse_constant=_no_number), None
    except json.JSONDecodeError as error:
        return None, f"line {error.lineno}, column {error.colno}: {error.msg}"
    except OverflowError as error:
        return None, str(error)
    except RecursionError:
        return None, "its values are nested too deep"
    except ValueError:
        return None, "a number in it has thousands of digits"


def _no_number(name: str) -> float:
    raise OverflowError(f"{name} is no number in JSON")


def _line(index: int, place: str, record: Any, error: str | None = None) -> Line:
    if error is not None:
        return Line(index, place, error=f"This is not valid JSON: {error}.")
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        return Line(index, place, error=f'A prompt looks like {{"prompt": "..."}}, but this is {kind_of(record)}.')
    record = {name: value for name, value in record.items() if value is not None or name == "top_k"}  # null means left out
    return Line(index, place, record, _wrong(record))


def _wrong(record: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a line, if anything."""
    given = [name for name in PROMPTS if name in record]
    if len(given) != 1:
        return f"It needs one of `prompt` and `messages`, but has {'both' if given else 'neither'}."
    for name, value in record.items():
        if name not in ("id", *PROMPTS, *OPTIONS):
            hint = did_you_mean(name, [*PROMPTS, *OPTIONS]) or " What the answer is to be known by goes into `id`."
            return f"There is no option {name!r}.{hint}"
        kind = TYPES.get(name)
        if kind is not None and not isinstance(value, kind):
            return f"`{name}` must be {kind_of(kind())}, but is {kind_of(value)}."
    return None


# Answering


def answer_lines(
    speaker: Speaker,
    lines: Sequence[Line],
    results: "Results",
    options: Options,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    batch_size: int = 8,
) -> None:
    """Answer prompts and write a record for each answer as it is finished, but for those that are there already.

    Args:
        speaker: Who answers.
        lines: What to answer.
        results: Where to.
        options: How to answer, where a line does not say otherwise.
        sys_prompt: The same.
        num_samples: How many answers to give to each.
        batch_size: How many answers at a time.

    Raises:
        UserError: A prompt could not be answered, which is said after all others have been; or there are other answers already.
    """
    wrong: list[tuple[Line, str]] = []
    tasks: list[Task] = []
    for line in lines:
        try:
            tasks += _tasks(speaker, line, options, sys_prompt, num_samples)
        except UserError as error:
            wrong.append((line, str(error)))
    keys = {(task.line.index, task.sample): results.key(task, sys_prompt) for task in tasks}
    results.check(keys)
    todo = [task for task in tasks if (task.line.index, task.sample) not in results.keys]
    if len(todo) < len(tasks):
        note(f"{results.path} has {len(tasks) - len(todo)} of {len(tasks)} answers already.")
    with results:
        for line, error in wrong:
            results.write(_said(line) | {"error": error})
        wrong += _write_answers(speaker, todo, keys, results, batch_size)
    if wrong:
        line, error = wrong[0]
        n = len({line.index for line, _ in wrong})
        raise UserError(f"{n} of {len(lines)} prompts could not be answered, and have an `error` instead. {line.place}: {error}")


def _tasks(speaker: Speaker, line: Line, options: Options, sys_prompt: str | None, num_samples: int) -> list[Task]:
    """Return the answers to make to one line.

    Raises:
        UserError: It is wrong, too long, or has tokens that the model does not know.
    """
    if line.error is not None:
        raise UserError(line.error)
    assert line.said is not None
    own = {name: value for name, value in line.said.items() if name in OPTIONS}
    ids = speaker.encode(line.prompt, own.pop("sys_prompt", sys_prompt))
    options = replace(options, **own)
    options.row()  # checks
    room(len(ids), options.max_new_tokens, speaker.model.config.block_size)
    check_ids(ids, speaker.model.config.padded_vocab_size)
    return [Task(line, i, ids, replace(options, seed=(options.seed or 0) + i)) for i in range(num_samples)]


def _write_answers(
    speaker: Speaker, tasks: list[Task], keys: Mapping[tuple[int, int], str], results: "Results", batch_size: int
) -> list[tuple[Line, str]]:
    """Make the answers and write their records; return the lines that could not be answered, and why."""
    wrong, begun = [], {}

    def refuse(line: Line, error: str) -> None:
        wrong.append((line, error))
        results.write(_said(line) | {"error": error})

    def replies() -> Iterator[Reply]:
        for task in tasks:
            try:
                reply = new_reply(speaker.model, speaker.tokenizer, task.ids, task.options, speaker.stop_tokens)
            except UserError as error:
                refuse(task.line, str(error))
                continue
            begun[reply] = task
            yield reply

    if not tasks:
        return []
    length = min(max(len(task.ids) + task.options.max_new_tokens for task in tasks), speaker.model.config.block_size)
    start = told = perf_counter()
    n_done = n_tokens = 0
    for step in write(speaker.model, replies(), min(batch_size, len(tasks)), length, goes_on=True):
        if step.reply.answer.finish is not None:
            task = begun.pop(step.reply)
            if step.reply.error is not None:
                refuse(task.line, step.reply.error)
            else:
                key = keys[task.line.index, task.sample]
                results.write(record_of(task, step.reply, speaker.tokenizer) | {"seed": task.options.seed, "key": key})
            n_done, n_tokens = n_done + 1, n_tokens + len(step.reply.answer.made)
            if perf_counter() - told > PAUSE or n_done == len(tasks):
                told = perf_counter()
                note(f"{n_done} of {len(tasks)} answers, {n_tokens / (told - start):.2f} tokens/sec")
    return wrong


def record_of(task: Task, reply: Reply, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what is written about an answer."""
    made = reply.result
    record = _said(task.line) | ({"sample": task.sample} if task.sample else {})
    record |= {"text": made.text, "finish": made.finish, "n_prompt_tokens": len(task.ids), "n_tokens": len(reply.answer.made)}
    if task.options.logprobs is not None:
        record["logprobs"] = [_token(tokenizer, token) for token in made.logprobs]
    return record


def _token(tokenizer: Tokenizer, token: TokenLogprob) -> dict[str, Any]:
    top = [{"id": other, "token": tokenizer.text(other), "logprob": logprob} for other, logprob in token.top]
    return {"id": token.token, "token": tokenizer.text(token.token), "logprob": token.logprob, "top": top}


def _said(line: Line) -> dict[str, Any]:
    said = line.said or {}
    return {"index": line.index} | {name: said[name] for name in ("id", *PROMPTS) if name in said}


def _numbered(record: Mapping[str, Any]) -> bool:
    return all(isinstance(number, int) and number >= 0 for number in (record.get("index"), record.get("sample", 0)))


# The file of answers


@dataclass
class Results:
    """Records that are written, each a whole line, beside those that an earlier run wrote.

    What that run broke off, and lines with an error, are taken out: they are tried again.

    Args:
        path: The file; None is standard output.
        made_by: The model and all else that every answer depends on.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """

    path: Path | None = None
    made_by: Sequence[str] = ()
    keys: dict[tuple[int, int], str] = field(init=False, default_factory=dict)  # of the answers that are there, by line and sample
    file: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.path is not None and is_folder(self.path):
            raise UserError(f"{self.path} is a folder, but `out` names a file. Name one in it.")
        self._there = read_bytes(self.path) if self.path is not None and is_file(self.path) else b""
        kept = []
        *lines, last = self._there.split(b"\n")
        for number, line in enumerate([*lines, last] if last else lines, start=1):
            record, _ = _loaded(line.decode("utf-8", "replace"))
            if record is None and number > len(lines) and line.startswith(BEGINNING[: len(line)]):
                break  # what a run that was killed broke off
            if not isinstance(record, dict) or not ({"key", "error"} & record.keys()) or not _numbered(record):
                raise UserError(f"{self.path} holds something else than answers in line {number}. Choose another `out`.")
            if "error" not in record:
                self.keys[record["index"], record.get("sample", 0)] = record["key"]
                kept.append(line + b"\n")
        self._kept = b"".join(kept)

    def key(self, task: Task, sys_prompt: str | None) -> str:
        """Return a text that follows from all that an answer depends on."""
        depends_on = [*self.made_by, sys_prompt, task.line.said, asdict(task.options)]
        return sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]

    def check(self, keys: Mapping[tuple[int, int], str]) -> None:
        """Refuse to mix answers.

        Args:
            keys: Of the answers to make, by line and sample.

        Raises:
            UserError: One that is there is not the one to make.
        """
        for (index, sample), key in self.keys.items():
            if keys.get((index, sample)) != key:
                raise UserError(
                    f"{self.path} has an answer to prompt {index + 1}, sample {sample + 1}, that was not made from these prompts "
                    "with these options and this model. Choose another `out`, or delete that file."
                )

    def __enter__(self) -> "Results":
        """Open the file."""
        if self.path is None:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._kept != self._there:
                file = self.path.resolve()  # a link stays one
                partial = file.with_name(file.name + ".partial")
                partial.write_bytes(self._kept)
                os.replace(partial, file)
            self.file = self.path.open("ab")
        except OSError as error:
            raise cannot_write(self.path, error) from None
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        if self.file is None:
            return
        try:
            self.file.close()
        except OSError as problem:  # what a full disk refused is tried again
            raise cannot_write(self.path, problem) from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        text = json.dumps(record, ensure_ascii=False) + "\n"
        if self.path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        try:
            self.file.write(text.encode("utf-8", "backslashreplace"))  # half a character becomes JSON's way to write it
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from None
