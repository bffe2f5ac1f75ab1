"""How single tokens are shown to clients, who see only text otherwise."""

from functools import lru_cache
from typing import NamedTuple

from litgpt.deploy.protocol import ContentLogprob, TopLogprob
from litgpt.generate.batch import TokenLogprob
from litgpt.tokenizer import BYTES, Tokenizer

_SAME = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level vocabularies spell as themselves
_OTHER = sorted(set(range(256)) - set(_SAME))  # the others are spelt by the characters from 256 on
BYTE_OF = {chr(byte): byte for byte in _SAME} | {chr(256 + i): byte for i, byte in enumerate(_OTHER)}
FALLBACK = {text: byte for byte, text in enumerate(BYTES)}
SPACE = "\u2581"  # how sentencepiece's vocabularies spell a space


class Spelling(NamedTuple):
    """A token's text, and its bytes, which may be less than a character."""

    text: str
    bytes: bytes

    @property
    def name(self) -> str:
        """The text, or what tells tokens apart that are no text, as OpenAI writes them."""
        return self.text if "\ufffd" not in self.text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes)


@lru_cache(maxsize=2**16)
def spelling(tokenizer: Tokenizer, token: int) -> Spelling:
    """Return how a token is shown: special ones by their names, and ids without a token as nothing."""
    written, text = tokenizer.text(token), tokenizer.decode([token])
    if written is None:
        return Spelling("", b"")
    if not tokenizer.is_text(token):
        return Spelling(written, written.encode())
    if written in FALLBACK and tokenizer.is_byte(token):
        return Spelling(text, bytes([FALLBACK[written]]))
    if all(character in BYTE_OF for character in written):
        own = bytes(BYTE_OF[character] for character in written)
        if own.decode(errors="replace") == text:
            return Spelling(text, own)
    if written.startswith(SPACE) and not text.startswith(" "):  # the first word of a text loses its space
        text = " " + text
    return Spelling(text, text.encode())


def content_logprob(tokenizer: Tokenizer, scored: TokenLogprob) -> ContentLogprob:
    """Return a token of an answer as the chat route shows it."""
    top = [TopLogprob(**_fields(tokenizer, token, logprob)) for token, logprob in scored.top]
    return ContentLogprob(**_fields(tokenizer, scored.token, scored.logprob), top_logprobs=top)


def _fields(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, object]:
    spelt = spelling(tokenizer, token)
    return {"token": spelt.text, "logprob": logprob, "bytes": list(spelt.bytes)}


def top_logprobs(tokenizer: Tokenizer, scored: TokenLogprob) -> dict[str, float]:
    """Return the likeliest tokens in the place of one, and that one too, by their names; of two alike the likelier counts."""
    top: dict[str, float] = {}
    for token, logprob in [*scored.top, (scored.token, scored.logprob)]:
        name = spelling(tokenizer, token).name
        top[name] = max(logprob, top.get(name, logprob))
    return top
