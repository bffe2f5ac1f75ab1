"""Answers as they are made: of many prompts at once, of one prompt, and as text."""

from collections.abc import Iterable, Iterator, Sequence

from litgpt.cache import Cache
from litgpt.errors import UserError
from litgpt.generate.batch import Answer, Batch
from litgpt.generate.memory import new_cache, room
from litgpt.generate.sampling import RowState
from litgpt.generate.stopping import StopMatcher
from litgpt.model import GPT
from litgpt.tokenizer import StreamDecoder, Tokenizer


def decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[RowState],
    cache: Cache,
    max_new_tokens: int,
    stop: Iterable[Sequence[int]] = (),
    include_stop: bool = False,
) -> Iterator[list[list[int]]]:
    """Yield, after every step, each row's new tokens that are safe to show.

    A row ends at a stop sequence, after `max_new_tokens`, or where its place in the cache is full; then it takes no more time.

    Args:
        model: The model.
        prompts: What the rows 0, 1, ... of the cache have not seen yet, at least one token each.
        rows: How each row is sampled.
        cache: The memory of the rows. It knows all tokens afterwards but the last one of each row.
        max_new_tokens: How many tokens to add to each row at most.
        stop: Token sequences that end a row.
        include_stop: Whether to show them.
    """
    stop, batch = [list(sequence) for sequence in stop], Batch(model, cache, max_tokens=max(cache.chunk, len(prompts)))
    answers = [Answer(list(prompt), row, max_new_tokens, stop) for prompt, row in zip(prompts, rows, strict=True)]
    for place, answer in enumerate(answers):
        batch.join(answer, place)
    numbers = {answer: i for i, answer in enumerate(answers)}
    while batch.running:
        shown: list[list[int]] = [[] for _ in answers]
        for answer, new in batch.step():
            if answer.finish == "error":
                raise UserError(answer.error)
            shown[numbers[answer]] = new + (answer.made[answer.n_shown :] if include_stop and answer.finish == "stop" else [])
        yield shown


def complete(
    model: GPT,
    prompt: Sequence[int],
    row: RowState,
    max_new_tokens: int,
    stop: Iterable[Sequence[int]] = (),
    include_stop: bool = False,
    cache: Cache | None = None,
) -> Iterator[list[int]]:
    """Yield the tokens that go on from one prompt, up to the model's context; see `decode`.

    Args:
        model: The model.
        prompt: Token ids.
        row: How to sample.
        max_new_tokens: How many tokens to generate at most.
        stop: Token sequences that end the answer.
        include_stop: Whether to yield them.
        cache: An empty memory of one row; by default one that just fits.

    Raises:
        UserError: The prompt is empty or too long. It is raised by the call, not by the first token.
    """
    n_new = room(len(prompt), max_new_tokens, model.config.block_size if cache is None else cache.length)
    cache = cache or new_cache(model, 1, len(prompt) + n_new)
    return (new for [new] in decode(model, [prompt], [row], cache, n_new, stop, include_stop))


def stream_text(
    tokenizer: Tokenizer, tokens: Iterable[Sequence[int]], stop_strings: Iterable[str] = (), behind: Sequence[int] = ()
) -> Iterator[str]:
    """Yield text as soon as it is certain: no half characters, nothing that may belong to a stop string.

    Args:
        tokenizer: The tokenizer.
        tokens: The new ids of each step.
        stop_strings: The text ends before the first of these.
        behind: The ids that the tokens go on from, if their text does so too: then the first word keeps its space.
    """
    decoder, matcher = StreamDecoder(tokenizer), StopMatcher(stop_strings)
    for token in behind:
        decoder.push(token)
    decoder.flush()
    for new in tokens:
        text = "".join(matcher.push("".join(map(decoder.push, new))))
        if text:
            yield text
        if matcher.stopped is not None:
            return
    text = "".join(matcher.push(decoder.flush()) + matcher.flush())
    if text:
        yield text
