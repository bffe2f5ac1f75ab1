"""`litgpt chat` with a real model, whose answers are shown as a script says: word by word, one with each token.

The script is a JSON file that maps prompts to answers; every other prompt is answered with "Fine."
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from litgpt.chat import base, conversation
from litgpt.cli import main
from litgpt.generate.run import Speaker

SECONDS = 0.01  # between two words


def chat(script: str, *words: str) -> int:
    """Be the command, and return its exit code."""
    answers = json.loads(Path(script).read_text())

    class Scripted(conversation.Conversation):
        """Knows what is to be shown."""

        def answer(self, prompt: str) -> Iterator[str]:
            """Yield a word for each step of the model."""

            def scripted(tokenizer: object, steps: Iterator[list[int]]) -> Iterator[str]:
                for word, _ in zip(re.findall(r"\s*\S+|\s+", answers.get(prompt, "Fine.")), steps, strict=False):
                    yield word
                    time.sleep(SECONDS)

            conversation.stream_text = scripted
            return super().answer(prompt)

    base.Conversation = Scripted
    Speaker.stop_tokens = property(lambda self: [])  # the script says when an answer ends
    return main(["chat", *words])


def chat_in_process(words: list[str], home: Path, streams: Sequence[str], environment: dict[str, str]) -> None:
    """Be the command in a folder, with files for standard input, output and errors: a terminal, or what a pipe has for a name."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(home)
    os.setsid()  # the terminal that is opened next is the one whose keys are signals
    for number, name in enumerate(streams):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
    sys.exit(chat(*words))
