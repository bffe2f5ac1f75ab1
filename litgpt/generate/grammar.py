"""Answers that keep to a grammar: a JSON schema, a regular expression, or a Lark grammar, through the package llguidance."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from litgpt.errors import UserError, optional
from litgpt.tokenizer import Tokenizer

WHITE_SPACE = r"[ ]?|\n[ ]{0,16}"  # what may stand between the parts of JSON: a weak model would go on with it for ever


class Grammar:
    """What one answer may say, and how far it has come.

    Args:
        matcher: A parser of llguidance in its first state.
        vocab_size: How many tokens the model's logits have.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self.vocab_size = matcher, vocab_size
        self._bits = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32)

    def allowed(self) -> Tensor:
        """Return which tokens may come next, (V,)."""
        optional("llguidance.torch", "all").fill_next_token_bitmask(self._matcher, self._bits)
        shifts = torch.arange(8, dtype=torch.uint8)
        bits = self._bits.view(torch.uint8).flatten()[:, None].bitwise_right_shift(shifts).bitwise_and_(1)  # (V / 8, 8), low bits first
        return bits.flatten()[: self.vocab_size].bool()

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        if not self._matcher.consume_token(token):
            raise AssertionError(f"The grammar does not allow the token {token}: {self._matcher.get_error()}")

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()


def compile_grammar(
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    schema: dict[str, Any] | bool | None = None,
    regex: str | None = None,
    lark: str | None = None,
    stop: Sequence[Sequence[int]] = (),
) -> Grammar:
    """Return a grammar for one answer; give one of `schema`, `regex` and `lark`.

    Args:
        tokenizer: The model's.
        vocab_size: How many tokens the model's logits have.
        schema: A JSON schema; `{}` allows any JSON.
        regex: A regular expression that the whole answer matches.
        lark: A grammar in llguidance's dialect of Lark.
        stop: Token sequences that end the model's answers; single ones may follow where the grammar is satisfied.

    Raises:
        UserError: The grammar is damaged, or uses what is not supported.
    """
    ends = (*tokenizer.eos_ids, *(sequence[0] for sequence in stop if len(sequence) == 1))
    package, vocabulary = optional("llguidance", "all"), _vocabulary(tokenizer, vocab_size, tuple(dict.fromkeys(ends)))
    matchers = package.LLMatcher
    if schema is not None:
        if not isinstance(schema, dict | bool):
            raise UserError(f"A JSON schema is a mapping, but got {schema!r:.60}.")
        what, spaces = "JSON schema", {"whitespace_flexible": True, "whitespace_pattern": WHITE_SPACE}
        try:
            text = matchers.grammar_from_json_schema(json.dumps(schema), overrides=spaces)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"The JSON schema cannot be used: {_first_line(error)}") from None
    elif regex is not None:
        what, text = "regular expression", matchers.grammar_from_regex(regex)
    else:
        what, text = "grammar", matchers.grammar_from_lark(lark)
    matcher = matchers(vocabulary, text, log_level=0)
    if matcher.is_error():
        raise UserError(f"The {what} cannot be used: {_first_line(matcher.get_error())}")
    return Grammar(matcher, vocab_size)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> Any:
    package = optional("llguidance", "all")
    text = tokenizer.as_json()
    given: Any = package.TokenizerWrapper(_Pieces(tokenizer, vocab_size, ends)) if text is None else text
    try:
        return package.LLTokenizer(given, n_vocab=vocab_size, eos_token=list(ends) or None)
    except ValueError as error:
        raise UserError(f"Answers of this model cannot be kept to a grammar: {_first_line(error)}") from None


class _Pieces:
    """A sentencepiece vocabulary as llguidance wants it: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self.encode = tokenizer.ids
        self.eos_token_id, self.bos_token_id = ends[0] if ends else vocab_size - 1, tokenizer.bos_id
        texts = [tokenizer.text(i) for i in range(vocab_size)]
        self.special_token_ids = [i for i, text in enumerate(texts) if text is None or i in tokenizer.special_ids]
        self.tokens = [_bytes_of(text or f"<unused {i}>", tokenizer.is_byte(i)) for i, text in enumerate(texts)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _bytes_of(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("\u2581", " ").encode()


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]
