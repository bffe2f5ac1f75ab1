"""From tokens to text: what is shown, in whatever pieces it is made, never holds half a character or a part of a stop string."""

from itertools import accumulate, pairwise
from random import Random

import pytest

from litgpt.deploy.answering import Piece, TextStream, joined
from litgpt.deploy.spelling import spelling, top_logprobs
from litgpt.generate.batch import TokenLogprob
from litgpt.tokenizer import Tokenizer

TEXT = "Once upon 🙂🙃 a time, Grüße aus 你好世界! <|x|> the llama ate\n\nhay."


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer(checkpoint)


def cut(text: str, stops: list[str]) -> str:
    """The text up to the first stop string, which of those that end there is the longest."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


def streamed(tokenizer: Tokenizer, ids: list[int], stops: list[str], sizes: list[int], **options) -> tuple[list[Piece], TextStream]:
    stream = TextStream(tokenizer, stops, **options)
    ends = list(accumulate(sizes))
    pieces = [stream.push(ids[a:b], [TokenLogprob(i, -1.0, []) for i in ids[a:b]]) for a, b in pairwise([0, *ends])]
    return [*pieces, stream.finish()], stream


def sizes(total: int, random: Random) -> list[int]:
    found = []
    while sum(found) < total:
        found.append(min(random.choice((1, 1, 1, 2, 3, 7, 50)), total - sum(found)))
    return found


def cases() -> list[tuple[int, list[str]]]:
    random = Random(0)
    marks = [
        ["🙃"],
        ["世", "你好世"],
        ["üß"],
        ["llama", "llamas"],
        ["a"],
        ["\n\n"],
        ["zzz"],
        [],
        ["e\nq", "ate\n"],
        ["好世界! <"],
        ["<|x|>"],
    ]
    return [(random.randrange(10**6), mark) for mark in marks for _ in range(3)]


@pytest.mark.parametrize("seed, stops", cases(), ids=str)
def test_a_stop_string_never_leaks_however_tokens_and_updates_cut_it(tokenizer, seed, stops):
    random = Random(seed)
    ids = tokenizer.ids(TEXT) if seed % 3 else [token for character in TEXT for token in tokenizer.ids(character)]
    pieces, stream = streamed(tokenizer, ids, stops, sizes(len(ids), random))
    expected = cut(TEXT, stops)
    shown = list(accumulate(piece.text for piece in pieces))
    assert shown[-1] == expected
    assert all(expected.startswith(text) for text in shown)
    assert stream.is_stopped == (expected != TEXT)


@pytest.mark.parametrize("seed, stops", cases(), ids=str)
def test_the_tokens_told_are_those_whose_text_is_shown_and_the_same_in_any_pieces(tokenizer, seed, stops):
    random = Random(seed)
    ids = [random.randrange(3, tokenizer.vocab_size) for _ in range(60)] + tokenizer.ids(TEXT)
    pieces, stream = streamed(tokenizer, ids, stops, sizes(len(ids), random))
    alone, _ = streamed(tokenizer, ids, stops, [1] * len(ids))
    at_once, _ = streamed(tokenizer, ids, stops, [len(ids)])
    told = [scored for piece in pieces for scored in piece.tokens]
    assert told == [scored for piece in alone for scored in piece.tokens] == [scored for piece in at_once for scored in piece.tokens]
    text = "".join(piece.text for piece in pieces)
    assert [scored.token.token for scored in told] == ids[: len(told)]
    assert all(a.start <= b.start for a, b in pairwise(told))
    assert all(scored.start < len(text) for scored in told)
    if not stream.is_stopped:
        assert len(told) == len(ids) == stream.n_tokens
    else:
        assert len(told) <= stream.n_tokens


def test_tokens_behind_the_one_that_completes_a_stop_string_are_not_counted(tokenizer):
    ids = tokenizer.ids("hay and more")
    until = next(n for n in range(len(ids) + 1) if "hay" in tokenizer.decode(ids[:n]))
    _, stream = streamed(tokenizer, ids, ["hay"], [len(ids)])
    assert stream.n_tokens == until


def test_an_unfinished_character_is_shown_at_the_end_only(tokenizer):
    ids = tokenizer.ids("🙂")[:-1]
    stream = TextStream(tokenizer)
    assert stream.push(ids).text == ""
    assert stream.finish().text == tokenizer.decode(ids)


def test_special_tokens_are_shown_where_they_are_part_of_the_text(tokenizer):
    token = tokenizer.token_to_id("<|im_start|>")
    ids = [*tokenizer.ids("hay"), token, *tokenizer.ids("hay")]
    assert "".join(piece.text for piece in streamed(tokenizer, ids, [], [1] * len(ids))[0]) == "hayhay"
    pieces, _ = streamed(tokenizer, ids, [], [1] * len(ids), shown={token: "<|im_start|>"})
    assert "".join(piece.text for piece in pieces) == "hay<|im_start|>hay"


def test_two_pieces_together_are_their_texts_and_tokens():
    assert joined(Piece("a", [1]), Piece("b", [2])) == Piece("ab", [1, 2])


# How tokens are spelt


def test_the_bytes_of_all_tokens_together_are_the_text(tokenizer):
    ids = [token for character in TEXT for token in tokenizer.ids(character)]
    assert b"".join(spelling(tokenizer, token).bytes for token in ids).decode() == TEXT


def test_a_token_that_is_no_character_is_named_by_its_bytes(tokenizer):
    first, *_ = tokenizer.ids("🙂")
    assert spelling(tokenizer, first).bytes == "🙂".encode()[: len(spelling(tokenizer, first).bytes)]
    assert spelling(tokenizer, tokenizer.token_to_id("<|im_end|>")).text == "<|im_end|>"
    assert spelling(tokenizer, 10**6) == ("", b"")


def test_of_likely_tokens_with_the_same_name_the_likelier_one_counts(tokenizer):
    hay = tokenizer.ids("h")[0]
    found = top_logprobs(tokenizer, TokenLogprob(hay, -3.0, [(hay, -1.0), (10**6, -2.0), (10**6 + 1, -2.5)]))
    assert found == {"h": -1.0, "": -2.0}
