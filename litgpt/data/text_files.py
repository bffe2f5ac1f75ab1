"""Pretraining on plain text files."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from litgpt.data.base import DataModule, highest_id
from litgpt.data.tokens import Encoded, TokenDataset, TokenStore, fitting_length, held_out_from, open_store, store_key
from litgpt.errors import MissingFile, UserError
from litgpt.files import cannot_read, check_readable, is_file, is_folder
from litgpt.tokenizer import Tokenizer

SUFFIX = ".txt"
STORES = ".tokens"  # the folder beside the texts
PIECE = 2**22  # bytes encoded at once: longer files are cut at the ends of lines
FEWEST = 4  # tokens: one to start from and one to predict, for training and for validation


@dataclass(eq=False)
class TextFiles(DataModule):
    """Plain text for pretraining: the `.txt` files of a folder, each a document.

    They are encoded once, into `.tokens` beside them, and again when a file or the tokenizer changes.
    """

    train_data_path: Path
    """The folder with the `.txt` files, or a single file of text. Folders inside it are not read."""
    val_data_path: Path | None = None
    """The same for validation. By default the end of the training texts is held out: about 5 %."""
    seed: int = 42
    """The seed of the loader's order."""
    num_workers: int = 4
    """How many processes encode large texts. The loaders (`train_dataloader`) use as many, the training scripts none."""

    def __post_init__(self) -> None:
        super().__init__()
        for name in ("train_data_path", "val_data_path"):
            if getattr(self, name) == "":  # which would be the current folder
                raise UserError(f"`{name}` is empty. Name the folder with the {SUFFIX} files.")
        self.collate_fn: Callable = torch.stack

    def prepare_data(self) -> None:
        """Encode the texts, unless that is done."""
        for files in self._files():
            self._store(files)

    def setup(self, stage: str = "") -> None:
        """Open the tokens and cut them into windows of `max_seq_length`; texts that are shorter than a few windows get shorter ones."""
        if self.max_seq_length < 1:
            raise UserError(f"Texts are cut into windows of `max_seq_length` tokens, but that is {self.max_seq_length}. Use 1024, say.")
        files = self._files()
        store = self._store(files[0])
        if len(files) > 1:
            self.train_dataset = self._windows(store, 0, len(store), self.train_data_path)
            val = self._store(files[1])
            self.val_dataset = self._windows(val, 0, len(val), self.val_data_path)
        else:
            cut = held_out_from(len(store), self.max_seq_length)
            self.train_dataset = self._windows(store, 0, cut, self.train_data_path)
            self.val_dataset = self._windows(store, cut, len(store), self.train_data_path)

    def _windows(self, store: TokenStore, start: int, end: int, path: Path) -> TokenDataset:
        if len(store) < FEWEST:
            n = f"{len(store)} token{'' if len(store) == 1 else 's'}"
            raise UserError(f"The texts in {path} have only {n}, but it takes at least {FEWEST}. Add text.")
        return TokenDataset(store, fitting_length(end - start, self.max_seq_length), start, end)

    def _files(self) -> list[list[Path]]:
        """The files to train on, and those to validate on if there are such."""
        train = text_files(Path(self.train_data_path))
        if self.val_data_path is None:
            return [train]
        val = text_files(Path(self.val_data_path))
        shared = {file.resolve() for file in train} & {file.resolve() for file in val}
        if shared:
            raise UserError(f"{min(shared)} is among the training texts and the validation texts. Move it, or leave `val_data_path` out.")
        return [train, val]

    def _store(self, files: list[Path]) -> TokenStore:
        if self.tokenizer is None:
            raise UserError("TextFiles needs a tokenizer to make tokens of the texts. Name a folder that has one with `--tokenizer_dir`.")
        pieces = [piece for file in files for piece in cut_up(file)]
        return open_store(
            files[0].parent / STORES,
            store_key(files, self.tokenizer, {"piece": PIECE}),
            pieces,
            partial(encode_piece, tokenizer=self.tokenizer),
            vocab_size=highest_id(self.tokenizer) + 1,
            num_workers=self.num_workers if sum(piece.end - piece.start for piece in pieces) > 2 * PIECE else 0,
        )


@dataclass(frozen=True)
class Piece:
    """A part of a file, in bytes."""

    path: Path
    start: int
    end: int
    is_first: bool
    is_last: bool


def text_files(path: Path) -> list[Path]:
    """The text files of a folder in the order of their names, or the one that `path` names.

    Raises:
        UserError: There are none, or they may not be read.
    """
    if is_file(path):
        return [path]
    if not is_folder(path):
        raise MissingFile(f"There is no folder {path} to read {SUFFIX} files from.")
    try:
        files = sorted(file for file in path.iterdir() if file.suffix == SUFFIX and file.is_file())
    except OSError as error:
        raise cannot_read(path, error) from None
    if not files:
        deeper = next(path.rglob(f"*{SUFFIX}"), None)
        hint = f" There is {deeper}, but folders inside are not read." if deeper else ""
        raise UserError(f"There are no {SUFFIX} files in {path}.{hint}")
    return files


def cut_up(path: Path) -> list[Piece]:
    """The pieces of a file that are encoded one by one: as long as `PIECE` allows, up to the end of a line where there is one."""
    check_readable(path)
    size = path.stat().st_size
    cuts = [0]
    if size > PIECE:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while size - cuts[-1] > PIECE:
                limit = cuts[-1] + PIECE
                cut = content.rfind(b"\n", cuts[-1], limit) + 1
                if cut == 0:  # no line ends here: cut before the character that the limit is in, unless the file is no text
                    inside = (place for place in range(limit, limit - 4, -1) if content[place] & 0b1100_0000 != 0b1000_0000)
                    cut = next(inside, limit)
                cuts.append(cut)
    ends = [*cuts[1:], size]
    return [Piece(path, start, end, start == 0, end == size) for start, end in zip(cuts, ends)]


def encode_piece(piece: Piece, tokenizer: Tokenizer) -> Encoded:
    """The ids of one piece, and where documents begin in them. BOS stands first if the tokenizer wants one, EOS last if there is one.

    Raises:
        UserError: The file cannot be read, or is not UTF-8.
    """
    try:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            content = file.read(piece.end - piece.start)
    except OSError as error:
        raise UserError(f"{piece.path} cannot be read: {error.strerror}.") from None
    try:
        text = content.decode("utf-8-sig" if piece.is_first else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{piece.path} is not UTF-8 text: byte {piece.start + error.start} cannot be decoded. Save it as UTF-8.") from None
    if piece.is_first:
        text = text.lstrip()
    if piece.is_last:
        text = text.rstrip()
    if not text and piece.is_first and piece.is_last:
        return [], []
    ids = tokenizer.ids(text) if piece.is_first else tokenizer.offsets(text, inside=True)[0]
    if piece.is_first and tokenizer.use_bos:
        ids = tokenizer.begin(ids)
    if piece.is_last and tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
        ids = [*ids, tokenizer.eos_id]
    return ids, [0] if piece.is_first else []
