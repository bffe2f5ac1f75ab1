"""Answers without a text: a batch that is stepped until all have finished."""

from collections.abc import Iterable, Iterator

from litgpt.errors import UserError
from litgpt.generate.batch import Answer, Batch
from litgpt.generate.memory import new_cache
from litgpt.model import GPT


def answer_all(model: GPT, answers: Iterable[Answer], rows: int, length: int, max_tokens: int = 2048) -> Iterator[Answer]:
    """Yield answers as they are finished, at most `rows` of them at a time, with at most `length` tokens each."""
    batch, waiting = Batch(model, new_cache(model, rows, length), max(max_tokens, rows)), list(answers)
    while waiting or batch.running:
        while waiting and batch.n_free:
            batch.join(waiting.pop(0))
        for answer, _ in batch.step():
            if answer.finish == "error":
                raise UserError(answer.error)
            if answer.finish is not None:
                yield answer
