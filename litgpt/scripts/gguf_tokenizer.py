"""Tokenizers as GGUF files describe them: read from their metadata, and written into it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from litgpt import names
from litgpt.errors import UserError, optional
from litgpt.files import is_file, read_bytes
from litgpt.scripts.gguf_header import Metadata
from litgpt.tokenizer import BYTES
from litgpt.tokenizer import Tokenizer as OurTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
SPECIAL_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}  # ours: theirs
SPACE = "▁"  # how SentencePiece's vocabularies spell a space
PROBES = (  # both ways to describe a tokenizer have to give the same ids of these
    "Hello world, what's 12345 + 3.14? I'LL say we've done it!",
    "  leading,  double and trailing spaces  ",
    "a\n\n\nb\t\tc   12\n 7\r\n",
    "def f(x):\n    return x**2  # 100% {[<>]}",
    "Ünïcödé naïve — 日本語 テスト Привет 🤖👩‍👩‍👧 नमस्ते",
)

LLAMA_3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words before byte pairs are merged, for some values of `tokenizer.ggml.pre`."""

    called: tuple[str, ...]
    words: str | None = None  # a regular expression; None is that of GPT-2
    single_digits: bool = False  # cut out every digit first
    whole_words: bool = False  # a word that is a token needs no merges (`ignore_merges`)
    add_bos: bool = False  # where the metadata does not say

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return it as one of the package `tokenizers`."""
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.single_digits else []
        words = [pre_tokenizers.Split(Regex(self.words), "isolated")] if self.words else []
        return pre_tokenizers.Sequence([*digits, *words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.words is None)])


PRE_TOKENIZERS = [
    PreTokenizer(("gpt-2", "olmo", "phi-2", "mpt", "jais", "trillion")),
    PreTokenizer(("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"), single_digits=True),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), LLAMA_3_WORDS, whole_words=True, add_bos=True),
    PreTokenizer(("dbrx", "smaug-bpe"), LLAMA_3_WORDS),
    PreTokenizer(("qwen2", "deepseek-r1-qwen", "megrez"), LLAMA_3_WORDS.replace("{1,3}", "")),
    PreTokenizer(("tekken",), TEKKEN_WORDS, whole_words=True, add_bos=True),
]


# Reading


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata says of the tokens."""

    metadata: Metadata
    kind: str
    tokens: list[str]
    types: list[int]

    @classmethod
    def read(cls, metadata: Metadata) -> "Vocabulary":
        """Return it, without the rows of the embedding at the end that stand for no token."""
        kind, tokens = metadata.text("tokenizer.ggml.model"), metadata.texts("tokenizer.ggml.tokens")
        if kind not in TOKENIZERS:
            raise UserError(f"{metadata.path} has a tokenizer of the kind {kind!r}, but these are read: {', '.join(TOKENIZERS)}.")
        types = metadata.numbers("tokenizer.ggml.token_type")
        types = [NORMAL] * len(tokens) if types is None else types
        if not tokens or len(set(tokens)) != len(tokens) or len(types) != len(tokens):
            raise UserError(
                f"The tokenizer in {metadata.path} is damaged: it has {len(set(tokens))} different tokens of {len(tokens)}, "
                f"{len(types)} with a type."
            )
        length = len(tokens)
        while length > 1 and types[length - 1] == UNUSED:
            length -= 1
        return cls(metadata, kind, tokens[:length], types[:length])

    @property
    def ids(self) -> dict[str, int]:
        """Return the ids by token."""
        return {token: id for id, token in enumerate(self.tokens)}

    def special_id(self, key: str) -> int | None:
        """Return the id that an entry gives, or None where it gives none of a token."""
        entry = self.metadata.entries.get(f"tokenizer.ggml.{key}")
        if entry is None:
            return None
        value = self.metadata.number(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def special_ids(self) -> dict[str, int]:
        """Return the ids of the special tokens under the names that they have in `config.json`."""
        found = {ours: self.special_id(theirs) for ours, theirs in SPECIAL_IDS.items()}
        return {name: id for name, id in found.items() if id is not None}

    def added_ends(self) -> dict[str, int]:
        """Return the ids of the tokens that are put around every text: maybe "bos", maybe "eos"."""
        pre = self.metadata.text("tokenizer.ggml.pre")
        default = self.kind == "llama" or any(pre in row.called and row.add_bos for row in PRE_TOKENIZERS)
        wanted = {
            "bos": self.metadata.flag("tokenizer.ggml.add_bos_token", default),
            "eos": self.metadata.flag("tokenizer.ggml.add_eos_token", False),
        }
        ids = self.special_ids()
        return {side: ids[f"{side}_token_id"] for side, add in wanted.items() if add and f"{side}_token_id" in ids}


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Return the tokenizer that the metadata of a GGUF file describes.

    Raises:
        UserError: It is damaged, or of a kind that is not supported.
    """
    tokens = vocabulary.tokens
    tokenizer = TOKENIZERS[vocabulary.kind](vocabulary)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=of_type != USER_DEFINED, normalized=False)
            for token, of_type in zip(tokens, vocabulary.types)
            if of_type in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]
    )
    ends = {side: tokens[id] for side, id in vocabulary.added_ends().items() if tokens[id]}
    if ends:
        template = [*([ends["bos"]] if "bos" in ends else []), "$A", *([ends["eos"]] if "eos" in ends else [])]
        second = [piece.replace("$A", "$B") + ":1" for piece in template]
        pairs = [(token, tokens.index(token)) for token in set(ends.values())]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=template + second, special_tokens=pairs)
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """Byte pairs over bytes, as in GPT-2."""
    metadata, ids = vocabulary.metadata, vocabulary.ids
    pre_tokenizer = _pre_tokenizer(metadata)
    parts = ((merge[:1], *merge[1:].partition(" ")) for merge in metadata.texts("tokenizer.ggml.merges"))  # the first may be a space
    merges = [(first + left, right) for first, left, _, right in parts]
    known = [pair for pair in merges if pair[0] in ids and pair[1] in ids and "".join(pair) in ids]
    if len(known) != len(merges):
        raise UserError(f"The tokenizer in {metadata.path} is damaged: {len(merges) - len(known)} of its merges are of no tokens.")
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre_tokenizer.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    called = metadata.text("tokenizer.ggml.pre")
    found = next((pre_tokenizer for pre_tokenizer in PRE_TOKENIZERS if called in pre_tokenizer.called), None)
    if found is None:
        known = ", ".join(name for pre_tokenizer in PRE_TOKENIZERS for name in pre_tokenizer.called)
        raise UserError(f"{metadata.path} cuts text into words by the rule {called!r}, which is not known. Known are: {known}.")
    return found


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's byte pairs, as in Llama 2: two neighbours may merge if the result is a token, and the highest score goes first."""
    metadata, ids = vocabulary.metadata, vocabulary.ids
    scores = metadata.numbers("tokenizer.ggml.scores") or []
    if len(scores) < len(ids):
        raise UserError(f"The tokenizer in {metadata.path} is damaged: it has {len(scores)} scores for {len(ids)} tokens.")
    pieces = {token for token, of_type in zip(vocabulary.tokens, vocabulary.types) if of_type == NORMAL}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(pieces, key=lambda token: (-scores[ids[token]], ids[token]))
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    unknown = next((token for token, of_type in zip(vocabulary.tokens, vocabulary.types) if of_type == UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE)] if space else []), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if space else [])])
    return tokenizer


TOKENIZERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def tokenizer_config(vocabulary: Vocabulary, context: int) -> dict[str, Any]:
    """Return what `tokenizer_config.json` says.

    Args:
        vocabulary: The tokens.
        context: The longest text, in tokens.
    """
    tokens, ends = vocabulary.tokens, vocabulary.added_ends()
    values: dict[str, Any] = {name.removesuffix("_id"): tokens[id] for name, id in vocabulary.special_ids().items()}
    if (unknown := vocabulary.special_id("unknown_token_id")) is not None:
        values["unk_token"] = tokens[unknown]
    values |= {"add_bos_token": "bos" in ends, "add_eos_token": "eos" in ends, "clean_up_tokenization_spaces": False}
    values |= {"model_max_length": context, "tokenizer_class": "PreTrainedTokenizerFast"}
    template = vocabulary.metadata.text("tokenizer.chat_template")
    return values | ({"chat_template": template} if template else {})


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return how generation begins and ends; a chat model may end a turn with a token of its own."""
    ids = vocabulary.special_ids()
    ends = dict.fromkeys(id for id in (ids.get("eos_token_id"), vocabulary.special_id("eot_token_id")) if id is not None)
    if ends:
        ids["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends))
    return ids


# Writing


def tokenizer_entries(folder: Path, n_rows: int) -> dict[str, Any]:
    """Return the entries of a GGUF file that describe the tokenizer of a folder.

    Args:
        folder: The folder.
        n_rows: How many rows the embedding has, each of which gets a token.

    Raises:
        UserError: llama.cpp has no tokenizer that gives the same ids.
    """
    ours = OurTokenizer(folder)
    entries = _json_entries(folder, ours) if is_file(folder / names.TOKENIZER_JSON) else _model_entries(folder, ours)
    n_tokens = len(entries["tokenizer.ggml.tokens"])
    padding = range(n_tokens, n_rows)
    fill = {"tokens": [f"[PAD{i}]" for i in padding], "token_type": [UNUSED for _ in padding], "scores": [-1000.0 for _ in padding]}
    for key, more in fill.items():
        if (values := entries.get(f"tokenizer.ggml.{key}")) is not None:
            entries[f"tokenizer.ggml.{key}"] = [*values, *more][:n_rows]
    kept = set(entries["tokenizer.ggml.tokens"])
    if n_rows < n_tokens and "tokenizer.ggml.merges" in entries:  # some tokenizers have more tokens than the model
        parts = ((merge, *merge.split(" ")) for merge in entries["tokenizer.ggml.merges"])
        entries["tokenizer.ggml.merges"] = [merge for merge, left, right in parts if left + right in kept]
    ids = {"bos": ours.bos_id, "eos": ours.eos_id, "unknown": ours.find_token(ours.special_tokens.get("unk_token", ""))}
    ids |= {"padding": ours.find_token(ours.special_tokens.get("pad_token", ""))}
    entries |= {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None and id < n_rows}
    entries |= {"tokenizer.ggml.add_bos_token": ours.use_bos, "tokenizer.ggml.add_eos_token": _adds_eos(folder, ours)}
    _verify(folder, ours, entries)
    return entries


def _json_entries(folder: Path, ours: OurTokenizer) -> dict[str, Any]:
    """Return the entries for a `tokenizer.json`."""
    tokenizer = Tokenizer.from_file(str(folder / names.TOKENIZER_JSON))
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"The tokenizer in {folder} is a {model['type']} model, but GGUF files are written of byte pairs (BPE) only.")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token["content"]: token["special"] for token in described["added_tokens"]}
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    is_bytes = not model["byte_fallback"]
    tokens, types = _listed(vocabulary, added, ours, model.get("unk_token"), is_bytes)
    entries = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if is_bytes:
        return entries | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_name(tokenizer, model["ignore_merges"], folder),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        }
    rank = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    space = "".join(tokenizer.encode("a", add_special_tokens=False).tokens).startswith(SPACE)
    return entries | _sentencepiece_entries(scores, space)


def _listed(
    vocabulary: dict[str, int], added: dict[str, bool], ours: OurTokenizer, unknown: str | None, is_bytes: bool
) -> tuple[list[str], list[int]]:
    """Return tokens and their types, in the order of their ids."""
    by_id = {id: token for token, id in vocabulary.items()}
    tokens, types = [], []
    for id in range(max(by_id) + 1):
        token = by_id.get(id)
        if token is None:
            token, of_type = f"[PAD{id}]", UNUSED
        elif token == unknown:
            of_type = UNKNOWN
        elif added.get(token) or id in ours.special_ids:
            of_type = CONTROL
        elif token in added:
            of_type = USER_DEFINED
            token = token if is_bytes else token.replace(SPACE, " ")
        else:
            of_type = BYTE if not is_bytes and token in _BYTES else NORMAL
        tokens.append(token)
        types.append(of_type)
    return tokens, types


_BYTES = frozenset(BYTES)


def _sentencepiece_entries(scores: list[float], space: bool) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": space,
    }


def _model_entries(folder: Path, ours: OurTokenizer) -> dict[str, Any]:
    """Return the entries for a `tokenizer.model`."""
    content = read_bytes(folder / names.TOKENIZER_MODEL)
    model = optional("sentencepiece", "all").SentencePieceProcessor(model_proto=content)
    n_pieces = model.get_piece_size()
    vocabulary = {model.id_to_piece(id): id for id in range(n_pieces)}
    id = n_pieces
    while (token := ours.text(id)) is not None:  # what was added behind it
        vocabulary[token] = id
        id += 1
    added = {token: i in ours.special_ids for token, i in vocabulary.items() if i >= n_pieces}
    added |= {model.id_to_piece(i): False for i, of_type in enumerate(_piece_types(content)) if of_type == USER_DEFINED}
    tokens, types = _listed(vocabulary, added, ours, model.id_to_piece(model.unk_id()) if model.unk_id() >= 0 else None, False)
    scores = [model.get_score(i) if i < n_pieces else -1000.0 for i in range(len(tokens))]
    entries = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return entries | _sentencepiece_entries(scores, "".join(model.encode("a", out_type=str)).startswith(SPACE))


def _piece_types(content: bytes) -> list[int]:
    """Return the types of the pieces of a `tokenizer.model`, which the package does not tell; the numbers are those of GGUF."""
    pieces = (piece for number, piece in _proto_fields(content) if number == 1)
    return [next((of_type for number, of_type in _proto_fields(piece) if number == 3), NORMAL) for piece in pieces]


def _proto_fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protocol buffer that is known to be sound."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = content[position]
            value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
            if byte < 128:
                return value

    while position < len(content):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        position += length
        yield number, content[position - length : position]


def _pre_name(tokenizer: Tokenizer, whole_words: bool, folder: Path) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text into words."""
    if tokenizer.pre_tokenizer is not None:
        cut = [_pieces(tokenizer.pre_tokenizer, text) for text in PROBES]
        for row in sorted(PRE_TOKENIZERS, key=lambda row: row.whole_words != whole_words):
            if [_pieces(row.build(), text) for text in PROBES] == cut:
                return row.called[0]
    known = ", ".join(row.called[0] for row in PRE_TOKENIZERS)
    raise UserError(f"The tokenizer in {folder} cuts text into words in a way that llama.cpp has no name for here. Known are: {known}.")


def _pieces(pre_tokenizer: pre_tokenizers.PreTokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    return pre_tokenizer.pre_tokenize_str(text)


def _adds_eos(folder: Path, ours: OurTokenizer) -> bool:
    """Say whether the tokenizer's own post-processor puts EOS behind a text."""
    if ours.eos_id is None or not is_file(folder / names.TOKENIZER_JSON):
        return False
    return Tokenizer.from_file(str(folder / names.TOKENIZER_JSON)).encode("a").ids[-1:] == [ours.eos_id]


def _verify(folder: Path, ours: OurTokenizer, entries: dict[str, Any]) -> None:
    """Refuse what would give other ids than the tokenizer of the folder."""
    read = build_tokenizer(Vocabulary.read(Metadata(folder, as_read(entries))))
    for text in PROBES:
        if read.encode(text, add_special_tokens=False).ids != ours.ids(text):
            raise UserError(
                f"llama.cpp has no tokenizer that cuts {text[:20]!r} as the one in {folder} does, so the model would see other tokens."
            )


def as_read(entries: dict[str, Any]) -> dict[str, Any]:
    """Return entries as they come out of a file, where lists of numbers are arrays."""
    is_numbers = {key: isinstance(value, list) and not (value and isinstance(value[0], str)) for key, value in entries.items()}
    return {key: np.asarray(value) if is_numbers[key] else value for key, value in entries.items()}
