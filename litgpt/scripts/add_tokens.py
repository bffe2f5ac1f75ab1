"""Add tokens to the vocabulary of a model: to its tokenizer, and as rows of its embedding and head."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from litgpt import names
from litgpt.checkpoint import described_by, load_model, refuse_adapter, write_checkpoint
from litgpt.errors import UserError
from litgpt.files import read_json, read_text
from litgpt.scripts.download import find_checkpoint
from litgpt.tokenizer import Tokenizer
from litgpt.weight_files import MAX_SHARD_SIZE, shard_bytes

ROWS = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")  # the parameters that have a row for each token


def add_tokens(
    checkpoint_dir: Path,
    *,
    tokens: list[str] | None = None,
    tokens_file: Path | None = None,
    special: bool = False,
    padding_multiple: int = 1,
    out_dir: Path = Path("out/added-tokens"),
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Add tokens to a model's vocabulary, before it is finetuned on texts that use them.

    Writes a complete checkpoint folder. Embedding and head get a row for each new token, which is the mean of those of the old tokens, so
    that the model neither prefers nor avoids it at first; rows that no token had are used before the matrices grow. Train the model
    afterwards: with LoRA the new rows stay as they are, with `finetune_full` they learn too.

    Args:
        checkpoint_dir: The model: a folder, a name in `checkpoints/`, or an `ORG/NAME` that is downloaded from the hub.
        tokens: The new tokens, as a list such as `["<a>", "<b>"]`. They are recognised wherever they stand in a text.
        tokens_file: A text file with a new token in each line, besides or instead of `tokens`.
        special: Whether the tokens are special, which means that they are left out where an answer is turned into text.
        padding_multiple: If embedding and head grow, the number of their rows becomes a multiple of this. 64 makes some GPUs faster.
        out_dir: The folder to write. It must not exist, or be empty.
        max_shard_size: How large a file of weights may grow, such as 5GB, 500MB or 2GiB; a larger model is written into several files.
    """
    if padding_multiple < 1:
        raise UserError(f"`padding_multiple` is at least 1, but got {padding_multiple}.")
    n_bytes, new = shard_bytes(max_shard_size), [*(tokens or []), *(lines_of(tokens_file) if tokens_file is not None else [])]
    folder = find_checkpoint(checkpoint_dir)
    refuse_adapter(folder)
    described = described_by(folder)
    processor, n_old, ids = extended(described, new, special)
    model = load_model(folder)
    n_new, n_rows = max(ids.values()) + 1, model.config.padded_vocab_size
    if n_new > n_rows:
        n_rows = -(-n_new // padding_multiple) * padding_multiple
    config = replace(model.config, vocab_size=n_new, padded_vocab_size=n_rows)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not (config.tie_embeddings and name == "lm_head.weight")}
    weights |= {name: with_rows(weights[name], n_old, n_rows, ids.values()) for name in ROWS if name in weights}

    def write_tokenizer(target: Path) -> None:
        processor.save(str(target / names.TOKENIZER_JSON))
        list_tokens(target, ids, special)

    write_checkpoint(out_dir, weights, config, source=described, base=folder, extras=write_tokenizer, max_shard_bytes=n_bytes)
    grown = f"embedding and head have {n_rows} rows" + ("" if n_rows > model.config.padded_vocab_size else ", as before")
    print(f"Added {len(ids)} tokens with the ids {min(ids.values())} to {n_new - 1}; {grown}. Saved {out_dir}.")


def lines_of(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    return [line for line in read_text(file).splitlines() if line.strip()]


def extended(folder: Path, tokens: list[str], special: bool) -> tuple[FastTokenizer, int, dict[str, int]]:
    """Return a folder's tokenizer with the tokens added, how many ids it had, and the new ones.

    Args:
        folder: A checkpoint directory.
        tokens: The new tokens.
        special: Whether they are left out of decoded texts.

    Raises:
        UserError: There are no tokens, one is known already or named twice, or the tokenizer cannot be changed.
    """
    if not tokens:
        raise UserError('There are no tokens to add. Name them with --tokens \'["<a>", "<b>"]\', or --tokens_file FILE.')
    if Tokenizer(folder).backend != "huggingface":
        raise UserError(f"{folder} has only a {names.TOKENIZER_MODEL}, which cannot be changed. Add a {names.TOKENIZER_JSON} of the model.")
    processor = FastTokenizer.from_str(read_text(folder / names.TOKENIZER_JSON))
    n_old = max(processor.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    for i, token in enumerate(tokens):
        if not token.strip():
            raise UserError(f"A token is a text that is not blank, but got {token!r}.")
        if token in tokens[:i]:
            raise UserError(f"`tokens` names {token!r} twice. Leave one out.")
        if (known := processor.token_to_id(token)) is not None:
            raise UserError(f"The tokenizer has the token {token!r} already, with the id {known}. Leave it out.")
    processor.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens])
    return processor, n_old, {token: processor.token_to_id(token) for token in tokens}


def with_rows(rows: Tensor, n_old: int, n_rows: int, new: Iterable[int]) -> Tensor:
    """Return the rows of all tokens, those of new ones and of none being the mean of the old ones'.

    Args:
        rows: Of the model, (V, ...).
        n_old: How many of them belong to tokens.
        n_rows: How many there are to be.
        new: The ids of the new tokens.
    """
    mean = rows[:n_old].mean(0, dtype=torch.float32)
    made = torch.cat((rows, rows.new_empty((n_rows - len(rows), *rows.shape[1:]))))
    made[list(new)] = mean.to(rows.dtype)
    made[len(rows) :] = mean.to(rows.dtype)
    return made


def list_tokens(folder: Path, ids: dict[str, int], special: bool) -> None:
    """Name new tokens in the files beside `tokenizer.json` that list the old ones.

    Args:
        folder: The checkpoint directory.
        ids: The new tokens.
        special: Whether they are left out of decoded texts.
    """
    settings = read_json(folder / names.TOKENIZER_CONFIG)
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=special)
    if isinstance(settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] |= {str(i): {"content": token} | flags for token, i in ids.items()}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if special and isinstance(settings.get(key), list):
            settings[key] += list(ids)
    if settings:
        _write(folder / names.TOKENIZER_CONFIG, settings)
    if listed := read_json(folder / names.ADDED_TOKENS):
        _write(folder / names.ADDED_TOKENS, listed | ids)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
