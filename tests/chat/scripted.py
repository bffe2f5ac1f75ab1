"""Runs `litgpt chat` with a real model, whose answers are shown as a script says: word by word, one with each token.

Usage: python scripted.py SCRIPT CHECKPOINT [FLAG ...]
SCRIPT is a JSON file that maps prompts to answers; every other prompt is answered with "Fine."
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from litgpt.chat import base, conversation
from litgpt.cli import main
from litgpt.generate.run import Speaker

SECONDS = 0.01  # between two words
ANSWERS = json.loads(Path(sys.argv[1]).read_text())


class Scripted(conversation.Conversation):
    """Knows what is to be shown."""

    def answer(self, prompt: str) -> Iterator[str]:
        """Yield a word for each step of the model."""

        def words(tokenizer: object, steps: Iterator[list[int]]) -> Iterator[str]:
            for word, _ in zip(re.findall(r"\s*\S+|\s+", ANSWERS.get(prompt, "Fine.")), steps, strict=False):
                yield word
                time.sleep(SECONDS)

        conversation.stream_text = words
        return super().answer(prompt)


base.Conversation = Scripted
Speaker.stop_tokens = property(lambda self: [])  # the script says when an answer ends
sys.exit(main(["chat", *sys.argv[2:]]))
