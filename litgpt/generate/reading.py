"""What a model makes of texts that are there already: how likely they are, and vectors that stand for them."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.attention import Segments
from litgpt.cache import upload
from litgpt.errors import UserError
from litgpt.loss import IGNORED
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

PACKED = 2048  # how many tokens one call of the model sees, unless a single sequence is longer
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {  # (T, C) to (C,)
    "mean": lambda hidden: hidden.float().mean(0),
    "last": lambda hidden: hidden[-1].float(),
}


@torch.inference_mode()
def embeddings(model: GPT, sequences: Sequence[Sequence[int]], pooling: str = "mean", normalized: bool = False) -> Tensor:
    """Return a vector for each sequence, made from what the last norm yields, (N, C) in fp32 on the model's device.

    Args:
        model: The model.
        sequences: Token ids, at least one in each; all lengths may be mixed, and none depends on its neighbours.
        pooling: "mean" of all tokens, or the "last" token's.
        normalized: Whether to divide each vector by its length.

    Raises:
        UserError: There is no such pooling, or a sequence is empty or longer than the context.
    """
    if pooling not in POOLINGS:
        raise UserError(f"`pooling` is {' or '.join(map(repr, POOLINGS))}, but got {pooling!r}.")
    check_lengths(model, sequences)
    device = model.transformer.wte.weight.device
    vectors = torch.empty(len(sequences), model.config.n_embd, device=device)
    for chosen in packs([len(sequence) for sequence in sequences]):
        tokens, segments = packed([sequences[i] for i in chosen], device)
        hidden = model(tokens, segments=segments, output="hidden")[0]  # (N, C)
        for i, part in zip(chosen, hidden.split([len(sequences[i]) for i in chosen]), strict=True):
            vectors[i] = POOLINGS[pooling](part)
    return F.normalize(vectors, dim=-1) if normalized else vectors


@torch.inference_mode()
def token_logprobs(model: GPT, sequences: Sequence[Sequence[int]], n_given: Sequence[int]) -> list[list[float]]:
    """Return the natural logarithm of the probability of each token of each sequence, behind those that are given.

    Args:
        model: The model.
        sequences: Token ids.
        n_given: How many tokens at the start of each sequence are not asked for. Nothing foretells the first token, so at least one.

    Raises:
        UserError: A sequence is empty or longer than the context.
    """
    check_lengths(model, sequences)
    device = model.transformer.wte.weight.device
    found: list[list[float]] = [[] for _ in sequences]
    for chosen in packs([len(sequence) for sequence in sequences]):
        parts = [sequences[i] for i in chosen]
        targets = [target for part, i in zip(parts, chosen, strict=True) for target in _targets(part, n_given[i])]
        tokens, segments = packed(parts, device)
        nll = model(tokens, segments=segments, targets=upload([targets], device), output="token_nll")[0].tolist()
        starts = accumulate(map(len, parts), initial=0)
        for i, part, start in zip(chosen, parts, starts, strict=False):
            found[i] = [-value for value in nll[start + n_given[i] - 1 : start + len(part) - 1]]
    return found


def check_lengths(model: GPT, sequences: Sequence[Sequence[int]]) -> None:
    """Refuse sequences that the model cannot read.

    Raises:
        UserError: One is empty, longer than the context, or has a token that the model does not know.
    """
    context, known = model.config.block_size, model.config.padded_vocab_size
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise UserError(f"Text {i} has no tokens. Leave it out.")
        if len(sequence) > context:
            raise UserError(f"Text {i} has {len(sequence)} tokens, but the context is {context} tokens. Shorten it, or cut it into parts.")
        if (highest := max(sequence)) >= known:
            raise UserError(f"Text {i} has the token id {highest}, but the model knows {known}. Use the tokenizer it was trained with.")


def continuation_ids(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a text and of what goes on from it, which together are the ids of the whole wherever that can be.

    A space at the end of the text belongs to the next word, as vocabularies have it.
    """
    spaces = len(context) - len(context.rstrip(" "))
    if 0 < spaces < len(context):
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    given = tokenizer.encode(context).tolist()
    whole = tokenizer.encode(context + continuation).tolist()
    if whole[: len(given)] == given:
        return given, whole[len(given) :]
    return given, tokenizer.offsets(continuation, inside=True)[0]


def packs(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of the sequences that one call takes, the longest first."""
    pack: list[int] = []
    n_tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if pack and n_tokens + lengths[i] > PACKED:
            yield pack
            pack, n_tokens = [], 0
        pack.append(i)
        n_tokens += lengths[i]
    if pack:
        yield pack


def packed(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Segments]:
    """Return all sequences in one line, (1, N), and where each one stands."""
    tokens = upload([[token for sequence in sequences for token in sequence]], device)
    return tokens, Segments([len(sequence) for sequence in sequences], device)


def _targets(sequence: Sequence[int], n_given: int) -> list[int]:
    return [IGNORED] * (n_given - 1) + list(sequence[n_given:]) + [IGNORED]
