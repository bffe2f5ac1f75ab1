"""Chat templates that trl publishes, and tokenizers to which their markup is special."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import tokenizers
from vocabularies import write

MARKUP = re.compile(r"<\|[^|<>\s]+\|>|<｜[^<>\s]+｜>|<\|?/?[a-zA-Z_]+\|?>|\[/?[A-Za-z_]+\]")


def published() -> dict[str, str]:
    """Return all templates by their names, or none where trl is not installed."""
    found = [Path(spec.origin).with_name("chat_templates") for spec in [find_spec("trl")] if spec]
    return {path.stem: path.read_text() for folder in found for path in sorted(folder.glob("*.jinja"))}


PUBLISHED = published()


def tokenizer_with(folder: Path, texts: Iterable[str], more: Iterable[str] = ()) -> Path:
    """Write a tokenizer of bytes with a special token for every piece of markup in the texts and for some more, and return its folder."""
    write(folder, "byte_level", add_bos_token=False)
    processor = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = sorted({token for text in texts for token in MARKUP.findall(text)} | set(more))
    processor.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in found])
    processor.save(str(folder / "tokenizer.json"))
    return folder
