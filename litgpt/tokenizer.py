"""One interface to `tokenizer.json` and `tokenizer.model`: text to ids, ids to text, and text while it is being generated."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from litgpt import names
from litgpt.errors import MissingFile, UserError, optional
from litgpt.files import AGAIN, is_file, is_folder, kind_of, read_bytes, read_json, read_text

Offsets = list[tuple[int, int]]  # for each token the characters it stands for, from and up to

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # how vocabularies with byte fallback spell a single byte
BROKEN = "\ufffd"  # what the bytes of an unfinished character decode to
MAX_ID = 2**31  # far above the number of any token, and still a number that the packages take
CALLED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))  # by every tokenizer
HELD = 16  # unfinished tokens after which the decoder looks for a part that can be shown


class Tokenizer:
    """Turns text into token ids and back, by the tokenizer files of a checkpoint folder.

    Attributes:
        bos_id: The token that begins a text, if there is one.
        eos_id: The token that ends a text, if there is one.
        eos_ids: All tokens that end a generation, `eos_id` first; `generation_config.json` may name several.
        use_bos: Whether a text begins with `bos_id` by default.
        special_tokens: What the files call their special tokens: `{"bos_token": "<s>", ...}`.
        special_ids: The tokens that `decode` leaves out.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        """Read the tokenizer of a folder; `tokenizer.json` wins over `tokenizer.model`.

        Args:
            checkpoint_dir: The folder.

        Raises:
            MissingFile: There is no such folder, or no tokenizer in it.
            UserError: A file is damaged.
        """
        folder = Path(checkpoint_dir)
        if not is_folder(folder):
            raise MissingFile(f"There is no folder {str(folder)!r} to read a tokenizer from.")
        self.checkpoint_dir = folder
        self.model_name = folder.resolve().name
        settings = read_json(folder / names.TOKENIZER_CONFIG)
        self.special_tokens = named_tokens(folder)
        if is_file(folder / names.TOKENIZER_JSON):
            self.backend = "huggingface"
            self._model: _HuggingFace | _SentencePiece = _HuggingFace(folder / names.TOKENIZER_JSON)
        elif is_file(folder / names.TOKENIZER_MODEL):
            self.backend = "sentencepiece"
            self._model = _SentencePiece(folder / names.TOKENIZER_MODEL, settings)
        else:
            raise MissingFile(f"There is no tokenizer in {str(folder)!r}: it needs a {names.TOKENIZER_JSON} or a {names.TOKENIZER_MODEL}.")
        self._find_ends(folder)
        self._model.make_special([*self.special_tokens.values(), *_listed_tokens(settings, folder), self.eos_token])
        self.special_ids = self._model.special_ids
        self._byte_ids = {i for i in map(self._model.find, BYTES) if i is not None}
        self.use_bos = self.bos_id is not None and self._adds_bos(settings)

    def _find_ends(self, folder: Path) -> None:
        """Look up where texts begin and end: as the tokenizer names it, else by the ids of the model's own files."""
        own, config = folder / names.GENERATION_CONFIG, folder / names.CONFIG
        generation, described = read_json(own, repair=True), read_json(config, repair=True)
        text_config = described.get("text_config") or {}
        if not isinstance(text_config, dict):
            raise UserError(f"{config} is damaged: its `text_config` is {kind_of(text_config)}, not a mapping. {AGAIN}")
        described = described | text_config
        begins, ends = (
            [i for i in one or other if self._model.text(i) is not None]
            for key in ("bos_token_id", "eos_token_id")
            for one, other in [(_id_list(generation, key, own), _id_list(described, key, config))]  # both are checked
        )
        named = {key: self._model.find(self.special_tokens.get(key, "")) for key in ("bos_token", "eos_token")}
        own_bos, own_eos = self._model.own_ends
        self.bos_id = next((i for i in (named["bos_token"], own_bos, *begins) if i is not None), None)
        ends = [i for i in (named["eos_token"], own_eos, *ends) if i is not None]
        self.eos_id = ends[0] if ends else None
        self.eos_ids = tuple(dict.fromkeys(ends))

    def _adds_bos(self, settings: Mapping[str, Any]) -> bool:
        """Whether the tokenizer's own files want texts to begin with the BOS token."""
        if isinstance(settings.get("add_bos_token"), bool):
            return settings["add_bos_token"]
        added = self._model.adds_first(self.bos_id)
        return settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast") if added is None else added

    @property
    def bos_token(self) -> str | None:
        """The text of the BOS token."""
        return None if self.bos_id is None else self._model.text(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        """The text of the EOS token."""
        return None if self.eos_id is None else self._model.text(self.eos_id)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, without those that were added to the vocabulary later."""
        return self._model.vocab_size

    def as_json(self) -> str | None:
        """Return the whole tokenizer as the text of a `tokenizer.json`, or None if it is a sentencepiece model."""
        return self._model.processor.to_str() if isinstance(self._model, _HuggingFace) else None

    def find_token(self, token: str) -> int | None:
        """Return the id of one token, spelt as in the vocabulary, or None if there is none."""
        return self._model.find(token)

    def token_to_id(self, token: str) -> int:
        """Return the id of one token, spelt as in the vocabulary.

        Raises:
            UserError: There is no such token.
        """
        found = self.find_token(token)
        if found is None:
            raise UserError(f"The tokenizer {self.model_name!r} has no token {token!r}.")
        return found

    def text(self, token_id: int) -> str | None:
        """Return how the vocabulary spells an id, or None if there is no such id."""
        return self._model.text(token_id)

    def ids(self, string: str) -> list[int]:
        """Return the ids of a text, nothing added; special tokens that are written in it are recognised."""
        return self._model.encode(string)[0]

    def offsets(self, string: str, inside: bool = False) -> tuple[list[int], Offsets]:
        """Return the ids of a text and the characters that each one stands for.

        Args:
            string: The text.
            inside: Whether other text stands before it, so that no space is put in front as some tokenizers do.
        """
        if not inside or not string:
            return self._model.encode(string)
        before = self.ids("\n")  # no vocabulary joins it to what follows, except to another one
        ids, spans = self._model.encode("\n" + string)
        if ids[: len(before)] != before:
            return self._model.encode(string)
        return ids[len(before) :], [(max(start - 1, 0), max(end - 1, 0)) for start, end in spans[len(before) :]]

    def encode(
        self, string: str, device: torch.device | None = None, bos: bool | None = None, eos: bool = False, max_length: int = -1
    ) -> Tensor:
        """Return the ids of a text as a tensor of shape (T,).

        Args:
            string: The text. Special tokens in it stay, wherever they stand.
            device: Where the tensor goes.
            bos: Whether it begins with the BOS token; by default as the tokenizer's files say. There is never a second one.
            eos: Whether to append the EOS token.
            max_length: Cut the result to this many tokens; -1 leaves it whole.

        Raises:
            UserError: A BOS or EOS token was asked for and there is none.
        """
        ids = self.ids(string)
        if bos if bos is not None else self.use_bos:
            ids = self.begin(ids)
        if eos:
            if self.eos_id is None:
                raise UserError(f"The tokenizer {self.model_name!r} has no EOS token to append.")
            ids = [*ids, self.eos_id]
        if max_length > 0:
            ids = ids[:max_length]
        return torch.tensor(ids, dtype=torch.int, device=device)

    def begin(self, ids: list[int]) -> list[int]:
        """Return the ids with the BOS token in front, unless they begin with it.

        Raises:
            UserError: There is no BOS token.
        """
        if self.bos_id is None:
            raise UserError(f"The tokenizer {self.model_name!r} has no BOS token to begin with.")
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, tensor: Tensor | list[int]) -> str:
        """Return the text of some ids; special tokens and ids outside the vocabulary are left out."""
        ids = tensor.tolist() if isinstance(tensor, Tensor) else tensor
        return self._model.decode([i for i in (ids if isinstance(ids, list) else [ids]) if self.is_text(i)])

    def is_text(self, token_id: int) -> bool:
        """Whether an id takes part in decoding: it is in the vocabulary, and not a special token."""
        return token_id not in self.special_ids and self._model.text(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether an id is a single byte of a character that has no token of its own."""
        return token_id in self._byte_ids

    def decode_stream(self, tokens: Iterable[Tensor | int], device: torch.device | None = None) -> Iterator[str]:
        """Yield the text of tokens while they come in. All pieces together are what `decode` returns.

        Args:
            tokens: The ids, as ints or as tensors that hold any number of them.
            device: Has no effect.
        """
        stream = StreamDecoder(self)
        for token in tokens:
            for token_id in token.flatten().tolist() if isinstance(token, Tensor) else [token]:
                if text := stream.push(token_id):
                    yield text
        if text := stream.flush():
            yield text


class StreamDecoder:
    """Decodes tokens one by one. All pieces together are what `Tokenizer.decode` returns for all tokens.

    Text is held back while it may still change: in the middle of a character's bytes, and through a run of byte tokens,
    which decode together. A token is decoded behind the tokens before it, for the first one of a text may lose its space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # shown already; what follows is decoded behind it
        self._anchor: list[int] = []  # the newest shown tokens that have text even when decoded alone
        self._pending: list[int] = []
        self._n_shown = 0  # characters of `_before`

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is certain now, which may be empty."""
        if not self._tokenizer.is_text(token_id):
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._tokenizer.decode(self._before + self._pending)
        if not text.endswith(BROKEN):
            return self._show(text, self._pending, [])
        if len(self._pending) < HELD:
            return ""
        for cut in range(len(self._pending) - 1, max(len(self._pending) - 5, 0), -1):  # a character has at most four bytes
            head, tail = self._pending[:cut], self._pending[cut:]
            shown = self._tokenizer.decode(self._before + head)
            if shown + self._tokenizer.decode(tail) == text:
                return self._show(shown, head, tail)
        return ""

    def flush(self) -> str:
        """Return the text that was held back, at the end of the tokens."""
        return self._show(self._tokenizer.decode(self._before + self._pending), self._pending, [])

    def _show(self, text: str, tokens: list[int], rest: list[int]) -> str:
        """Return the new part of a text that ends with some tokens, and go on behind them."""
        new = text[self._n_shown :]
        if new:
            if self._tokenizer.decode(tokens):
                self._before = self._anchor = tokens
            else:  # a lone space: as the first token it would vanish
                self._before = self._anchor + tokens
            self._n_shown = len(self._tokenizer.decode(self._before))
            self._pending = rest
        return new


class _HuggingFace:
    """A `tokenizer.json`, through the package `tokenizers`."""

    own_ends = (None, None)  # the file itself does not say which tokens begin and end a text

    def __init__(self, path: Path) -> None:
        text = read_text(path)
        try:
            self.processor = FastTokenizer.from_str(text)
        except Exception as error:  # the package raises this very class
            raise UserError(f"{path} is damaged ({str(error)[:100]}). Delete it and download it again.") from None
        self.processor.no_truncation()
        self.processor.no_padding()
        self.vocab_size = self.processor.get_vocab_size(with_added_tokens=False)
        self.find = self.processor.token_to_id

    def make_special(self, tokens: Iterable[str | None]) -> None:
        """Let tokens of the vocabulary be recognised in texts, as transformers does with those that the config names."""
        known = {added.content for added in self.processor.get_added_tokens_decoder().values() if added.special}
        new = [token for token in dict.fromkeys(tokens) if token and token not in known and self.find(token) is not None]
        self.processor.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
        self.special_ids = {i for i, added in self.processor.get_added_tokens_decoder().items() if added.special}

    def adds_first(self, token_id: int | None) -> bool | None:
        """Whether the post-processor puts a token in front; None if there is no post-processor."""
        if self.processor.post_processor is None:
            return None
        plain, processed = (self.processor.encode("a", add_special_tokens=add).ids for add in (False, True))
        return processed[:1] == [token_id] and processed != plain

    def text(self, token_id: int) -> str | None:
        return self.processor.id_to_token(token_id) if 0 <= token_id < MAX_ID else None

    def encode(self, string: str) -> tuple[list[int], Offsets]:
        try:
            encoding = self.processor.encode(string, add_special_tokens=False)
        except TypeError:  # raised for surrogates, which stand for bytes that are no UTF-8
            at = next(i for i, character in enumerate(string) if "\ud800" <= character <= "\udfff")
            around = string[max(0, at - 20) : at + 20]
            raise UserError(f"{around!r} holds {string[at]!r}, half of a character, which is no text. Write it in UTF-8.") from None
        except Exception as error:  # the package raises this very class
            if type(error) is not Exception:
                raise
            raise UserError(f"The tokenizer cannot encode {string[:40]!r} ({error}). Download its files again.") from None
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)


class _SentencePiece:
    """A `tokenizer.model`, through the package `sentencepiece`, which itself recognises no special tokens in a text."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        package, content = optional("sentencepiece", "all"), read_bytes(path)
        try:
            self.processor = package.SentencePieceProcessor(model_proto=content or b"\0")  # the package takes nothing for no argument
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is damaged ({str(error)[:100]}). Delete it and download it again.") from None
        self.vocab_size = self.processor.vocab_size()
        self.own_ends = tuple(i if i >= 0 else None for i in (self.processor.bos_id(), self.processor.eos_id()))
        decoder = _added_tokens(settings, path.with_name(names.TOKENIZER_CONFIG))
        self.added = _added_ids(path.with_name(names.ADDED_TOKENS))
        self.added |= {_content(token): i for i, token in decoder.items() if i >= self.vocab_size}
        self.added_text = {i: token for token, i in self.added.items()}
        self.special_ids = {i for i in range(self.vocab_size) if self.processor.is_control(i)}
        self.special_ids |= {i for i, token in decoder.items() if isinstance(token, dict) and token.get("special")}
        self.make_special([])

    def make_special(self, tokens: Iterable[str | None]) -> None:
        """Let tokens be recognised in texts and left out of decoded ones."""
        self.special_ids |= {i for i in (self.find(token) for token in tokens if token) if i is not None}
        recognised = sorted({*self.added, *map(self.text, self.special_ids)} - {None}, key=len, reverse=True)
        self.split = re.compile("|".join(map(re.escape, recognised)) or "(?!)")

    def adds_first(self, token_id: int | None) -> bool | None:
        return None

    def find(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        found = self.processor.piece_to_id(token)
        return found if found >= 0 and self.processor.id_to_piece(found) == token else None

    def text(self, token_id: int) -> str | None:
        return self.processor.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else self.added_text.get(token_id)

    def encode(self, string: str) -> tuple[list[int], Offsets]:
        ids, spans, start = [], [], 0
        for special in [*self.split.finditer(string), None]:
            end = special.start() if special else len(string)
            found, places = self._encode_plain(string[start:end])
            ids += found
            spans += [(start + first, start + last) for first, last in places]
            if special:
                ids.append(self.find(special.group()))
                spans.append(special.span())
                start = special.end()
        return ids, spans

    def _encode_plain(self, string: str) -> tuple[list[int], Offsets]:
        """Encode a text without special tokens; its pieces stand side by side in the normalized text."""
        normalized, origin = self.processor.normalize(string, with_offsets=True)
        ids, spans, position, n_bytes = self.processor.encode(string), [], 0, 0
        for i, piece in zip(ids, self.processor.encode(string, out_type=str)):
            start = position
            if self.processor.is_byte(i):
                n_bytes = (n_bytes + 1) % len(normalized[start].encode())
                position += n_bytes == 0
                spans.append((origin[start], origin[start + 1]))
            else:
                position += len(piece)
                spans.append((origin[start], origin[position]))
        return ids, spans

    def decode(self, ids: list[int]) -> str:
        text, run = "", []
        for i in ids:
            if i < self.vocab_size:
                run.append(i)
            else:
                text, run = text + self.processor.decode(run) + self.added_text[i], []
        return text + self.processor.decode(run)


def named_tokens(folder: Path) -> dict[str, str]:
    """Return what a folder calls its special tokens, as in `{"bos_token": "<s>"}`; chat templates use these names."""
    found = {}
    for name in (names.SPECIAL_TOKENS_MAP, names.TOKENIZER_CONFIG):
        for key, value in read_json(folder / name).items():
            if key in CALLED and value is not None and _content(value) is None:
                raise UserError(f"{folder / name} is damaged: its `{key}` is {value!r:.40}, not the text of a token. {AGAIN}")
            if key.endswith("_token") and (content := _content(value)) is not None:
                found[key] = content
    return found


def _content(token: Any) -> str | None:
    """Return the text of a token that is written as a string or as `{"content": ...}`."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _listed_tokens(settings: Mapping[str, Any], folder: Path) -> list[str | None]:
    """Return the further special tokens that a `tokenizer_config.json` lists."""
    found: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or []
        if not isinstance(listed, list | dict):
            where = folder / names.TOKENIZER_CONFIG
            raise UserError(f"{where} is damaged: its `{key}` is {listed!r:.40}, not a list of tokens. {AGAIN}")
        found += listed.values() if isinstance(listed, dict) else listed
    return [_content(token) for token in found]


def _id_list(settings: Mapping[str, Any], key: str, file: Path) -> list[int]:
    """Return ids that a file gives as a number or a list of numbers."""
    ids = settings.get(key)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for i in ids:
        if type(i) is not int or not -1 <= i < MAX_ID:  # -1 stands for no token
            raise UserError(f"{file} is damaged: its `{key}` holds {i!r:.40}, which is no number of a token. {AGAIN}")
    return ids


def _added_ids(file: Path) -> dict[str, int]:
    """Return the tokens that an `added_tokens.json` adds to a vocabulary."""
    for token, i in (found := read_json(file)).items():
        if type(i) is not int or not 0 <= i < MAX_ID:
            raise UserError(f"{file} is damaged: it gives {token!r} the number {i!r:.40}. {AGAIN}")
    return found


def _added_tokens(settings: Mapping[str, Any], file: Path) -> dict[int, Any]:
    """Return the tokens by number that a `tokenizer_config.json` adds to a vocabulary."""
    decoder = settings.get("added_tokens_decoder") or {}
    if isinstance(decoder, dict) and all(i.isdecimal() and len(i) < 11 and _content(token) is not None for i, token in decoder.items()):
        return {int(i): token for i, token in decoder.items()}
    raise UserError(f"{file} is damaged: its `added_tokens_decoder` does not map numbers to tokens. {AGAIN}")
