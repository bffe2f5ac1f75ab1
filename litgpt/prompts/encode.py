"""From messages to token ids: what a model is given, and what it is trained on."""

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Literal

from litgpt.errors import UserError
from litgpt.prompts.style import Message, Piece, PromptStyle, as_messages
from litgpt.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last", "all"]


def encode_prompt(style: PromptStyle, tokenizer: Tokenizer, messages: list[Message], *, sys_prompt: str | None = None) -> list[int]:
    """Return the ids that a model answers to. They begin with at most one BOS and end where the answer begins.

    Args:
        style: How the messages are written.
        tokenizer: The tokenizer.
        messages: The conversation; the last message is not the assistant's.
        sys_prompt: The system text, if the messages have none.

    Raises:
        UserError: The messages are not such a conversation.
    """
    messages = as_messages(messages, sys_prompt)
    if messages[-1]["role"] == "assistant":
        raise UserError("The last message is the assistant's, so there is nothing to answer. End with what the user says.")
    return _encode(style, tokenizer, _pieces(style.pieces(messages, style.turn_end(tokenizer))))[0]


def encode_training(
    style: PromptStyle, tokenizer: Tokenizer, messages: list[Message], *, train_on: TrainOn = "assistant"
) -> list[tuple[list[int], list[bool]]]:
    """Return the samples that a conversation is trained on: their ids, and which of them are targets.

    In each sample the ids before an answer are those that `encode_prompt` returns for the messages before it. Where a chat template
    changes earlier turns, each answer is a sample of its own, in which earlier ones are no targets.

    Args:
        style: How the messages are written.
        tokenizer: The tokenizer.
        messages: The conversation; what follows the last answer is left out.
        train_on: Whether the targets are the answers and the tokens that end them (`assistant`), the `last` answer alone, or `all` tokens
            (of several samples only the last has those, or prompts would be learned several times).

    Raises:
        UserError: The messages are not a conversation with an answer.
    """
    messages = as_messages(messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise UserError("A conversation to train on needs a message from 'assistant'.")
    if train_on == "last" and messages[-1].get("weight") == 0:
        raise UserError(
            "The last answer has the `weight` 0, but is the one that `train_on` 'last' trains on. Leave out the key, or end the "
            "conversation before that answer."
        )
    if train_on != "last" and any(message["role"] == "assistant" and message.get("weight") == 0 for message in messages):
        raise UserError(
            "An answer has the `weight` 0, but every answer is trained on. If only the last one of each conversation is to be, "
            "say so with `train_on` 'last'; else leave out the key, or end the conversation before that answer."
        )
    encoded = []
    samples = style.samples(messages, style.turn_end(tokenizer))
    for pieces in samples[-1:] if train_on == "last" else samples:
        pieces = _pieces(pieces)
        if (len(samples) > 1 or train_on == "last") and (answers := _answers(pieces)):  # earlier answers have samples of their own, or none
            pieces = [piece._replace(trained=piece.trained and i >= answers[-1]) for i, piece in enumerate(pieces)]
        encoded.append(_ended(style, tokenizer, *_encode(style, tokenizer, pieces)))
    if train_on == "all":
        ids, _ = encoded[-1]
        encoded[-1] = ids, [True] * len(ids)
    return encoded


def _pieces(pieces: Iterable[Iterable]) -> list[Piece]:
    return [Piece(*piece) for piece in pieces]  # a style may return pairs


def _answers(pieces: list[Piece]) -> list[int]:
    """Return at which pieces the text of a served prompt ends."""
    follows = (piece.trained and not before.trained if piece.answers is None else piece.answers for before, piece in pairwise(pieces))
    return [index for index, answers in enumerate(follows, start=1) if answers]


def _encode(style: PromptStyle, tokenizer: Tokenizer, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """Return the ids of pieces, and whether the piece of each id's last character is trained on.

    The text is encoded as a whole, unless the ids up to an answer would then differ from those of the prompt alone: there the rest is
    encoded on its own. So the ids of a prompt are always a prefix of those of the conversation that goes on from it.
    """
    text = "".join(piece.text for piece in pieces)
    ends = list(accumulate(len(piece.text) for piece in pieces))
    answers = [start for start in (ends[index - 1] for index in _answers(pieces)) if start]  # where prompts end
    ids, last_characters = [], []
    done, called_from = 0, 0  # ids that are settled, and where the text of the newest call begins
    for previous, end in zip([0, *answers], [*answers, len(text)]):
        new, spans = tokenizer.offsets(text[called_from:end], inside=called_from > 0)
        if new[: len(ids) - done] != ids[done:]:
            done, called_from = len(ids), previous
            new, spans = tokenizer.offsets(text[called_from:end], inside=True)
        known = len(ids) - done  # byte tokens may claim characters of their neighbours, but none on the other side of a prompt's end
        ids[done:] = new
        last_characters += [min(max(called_from + stop - 1, previous), end - 1) for _, stop in spans[known:]]
        settled = next((i for i in range(len(new) - 1, 0, -1) if new[i] in tokenizer.special_ids), 0)
        done, called_from = done + settled, called_from + (spans[settled][0] if settled else 0)  # no text before it is encoded with it
    trained = [pieces[min(bisect_right(ends, last), len(pieces) - 1)].trained for last in last_characters]
    if style.adds_bos and tokenizer.use_bos:
        begun = tokenizer.begin(ids)
        return begun, [False] * (len(begun) - len(ids)) + trained
    return ids, trained


def _ended(style: PromptStyle, tokenizer: Tokenizer, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
    """Return ids and targets such that each answer is trained on up to the token that ends it, and no further.

    Some templates leave that token out of what they mark, some write white space after it, before which a model stops, and some write
    nothing behind the last answer: an EOS is added there.
    """
    trained = list(trained)
    for run in range(len(ids), 0, -1):
        if not trained[run - 1] or (run < len(ids) and trained[run]):
            continue  # not the last token of an answer
        if run < len(ids) and ids[run] in tokenizer.special_ids and ids[run - 1] not in tokenizer.special_ids:
            trained[run] = [ids[run]] in style.stop_tokens(tokenizer)
        last = run
        while last and trained[last - 1] and ids[last - 1] not in tokenizer.special_ids and not tokenizer.decode([ids[last - 1]]).strip():
            last -= 1
        if last and ids[last - 1] in tokenizer.special_ids:
            trained[last:run] = [False] * (run - last)
    if trained and trained[-1] and ids[-1] not in tokenizer.special_ids and tokenizer.eos_id is not None:
        if not any(ids[-len(stop) :] == stop for stop in style.stop_tokens(tokenizer)):
            return [*ids, tokenizer.eos_id], [*trained, True]
    return ids, trained
