"""What an answer must be: computed without engine and server, one prompt at a time."""

from collections.abc import Sequence
from typing import Any

import torch

from litgpt.generate.decode import complete, stream_text
from litgpt.generate.run import Speaker
from litgpt.generate.sampling import RowState

DRAWN = dict(temperature=0.8, top_k=50)  # how the server draws where nothing is said


def expected_tokens(speaker: Speaker, ids: Sequence[int], n_new: int, **sampling: Any) -> list[int]:
    """The new tokens behind a prompt, without what ends the answer."""
    row = RowState(**(DRAWN | sampling))
    return [token for new in complete(speaker.model, ids, row, n_new, speaker.stop_tokens) for token in new]


def expected_text(
    speaker: Speaker, ids: Sequence[int], n_new: int, stops: Sequence[str] = (), goes_on: bool = False, **sampling: Any
) -> str:
    """The text of an answer."""
    tokens = expected_tokens(speaker, ids, n_new, **sampling)
    return "".join(stream_text(speaker.tokenizer, [[token] for token in tokens], stops, behind=ids if goes_on else ()))


@torch.inference_mode()
def expected_logprobs(speaker: Speaker, ids: Sequence[int]) -> list[float]:
    """How likely each token but the first is, by one pass over all of them."""
    logs = speaker.model(torch.tensor([list(ids)])).log_softmax(-1)[0]
    return [logs[i, token].item() for i, token in enumerate(ids[1:])]
