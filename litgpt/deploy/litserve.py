"""The model as a `LitAPI`, for people who deploy with LitServe. `litgpt serve` does not need it: it has an engine of its own.

    import litserve
    from litgpt.deploy.litserve import LitGPTAPI

    if __name__ == "__main__":
        litserve.LitServer(LitGPTAPI("checkpoints/org/name", max_batch_size=8, batch_timeout=0.05)).run(host="127.0.0.1")

LitServe waits until a batch is whole and begins the next one when all of it is answered. Its workers read requests only then,
so a client that leaves is answered to the end, and a request of a batch cannot fail alone: it gets `{"error": ...}`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from litserve import LitAPI
from pydantic import Field

from litgpt.deploy.protocol import Strict
from litgpt.errors import UserError
from litgpt.generate.answers import Options, Reply, new_reply, write
from litgpt.generate.run import load
from litgpt.quantize import check_quantize


class Prompt(Strict):
    """What a client sends, and nothing else: how tokens are drawn is set when the server starts."""

    prompt: str = Field(min_length=1)


class LitGPTAPI(LitAPI):
    """Answers `{"prompt": ...}` with `{"output": ...}`, one prompt or a batch at a time.

    Args:
        checkpoint_dir: The model, as every command takes it.
        precision: The type of weights and products; by default the one that is fast here.
        quantize: In how few bits to hold the weights, as every command takes it.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
        adapter: A folder of LoRA updates, or of what Adapter trained, to add to the model.
        temperature: Above 1 the answers vary more, below 1 less; 0 always takes the likeliest token.
        top_k: Choose each token among the k likeliest ones only; None among all.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum.
        max_new_tokens: The most tokens that an answer may have.
        seed: Every answer's; None draws one for each.
        litserve: What `LitAPI` takes, such as `max_batch_size`, `batch_timeout` and `api_path`.

    Raises:
        UserError: An option is out of its range.
    """

    streams = False

    def __init__(
        self,
        checkpoint_dir: str | Path,
        *,
        precision: str | None = None,
        quantize: str | None = None,
        access_token: str | None = None,
        adapter: Path | None = None,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float = 1.0,
        max_new_tokens: int = 50,
        seed: int | None = None,
        **litserve: Any,
    ) -> None:
        check_quantize(quantize)
        super().__init__(**{"stream": self.streams} | litserve)
        if self.stream != self.streams:
            raise UserError("`stream` follows from the class: LitGPTAPI answers at once, StreamingLitGPTAPI piece by piece.")
        how = dict(quantize=quantize, precision=precision, adapter=adapter)
        self.source = dict(checkpoint_dir=checkpoint_dir, access_token=access_token) | how
        self.options = Options(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        self.options.row()  # refuses what is out of range here, not in a worker

    def setup(self, device: str) -> None:
        """Load the model; LitServe calls this once in each worker."""
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        self.speaker = load(**self.source)
        self.speaker.model.to(device)

    def decode_request(self, request: Prompt) -> Reply | UserError:
        """Return an empty reply to a prompt, or why there can be none."""
        speaker = self.speaker
        try:
            return new_reply(speaker.model, speaker.tokenizer, speaker.encode(request.prompt), self.options, speaker.stop_tokens)
        except UserError as error:
            if self.max_batch_size == 1:
                raise HTTPException(400, str(error)) from None
            return error

    def batch(self, inputs: list[Reply | UserError]) -> list[Reply | UserError]:
        """Return them as they are."""
        return inputs

    def predict(self, x: Any) -> Any:
        """Return the answer to a request, or to each of a batch: its text, or the error."""
        replies = [x] if isinstance(x, Reply) else x
        for _ in self.steps(replies):
            pass
        answers = [reply.text if isinstance(reply, Reply) else reply for reply in replies]
        return answers[0] if isinstance(x, Reply) else answers

    def encode_response(self, output: str | UserError) -> dict[str, str]:
        """Return what the client gets."""
        return {"error": str(output)} if isinstance(output, UserError) else {"output": output}

    def steps(self, replies: Iterable[Reply | UserError]) -> Iterator[tuple[Reply, str]]:
        """Fill the replies together, and yield each piece of text that becomes certain."""
        todo = [reply for reply in replies if isinstance(reply, Reply)]
        if todo:
            for progress in write(self.speaker.model, todo, len(todo), max(reply.length for reply in todo)):
                yield progress.reply, progress.text


class StreamingLitGPTAPI(LitGPTAPI):
    """The same, piece by piece: lines of JSON, `{"output": piece}`."""

    streams = True

    def predict(self, x: Any) -> Iterator[Any]:
        """Yield the pieces of a request's answer, or for a batch lists with a piece for each, which may be empty."""
        if isinstance(x, Reply):
            yield from (text for _, text in self.steps([x]))
            return
        yield [reply if isinstance(reply, UserError) else "" for reply in x]
        for reply, text in self.steps(x):
            yield [text if other is reply else "" for other in x]

    def encode_response(self, output: Iterable[Any]) -> Any:  # LitServe would make a schema of an Iterator
        """Yield what the clients get for each piece."""
        encoded = super().encode_response
        for pieces in output:
            yield [encoded(piece) for piece in pieces] if isinstance(pieces, list) else encoded(pieces)

    def format_encoded_response(self, data: dict[str, str]) -> str:
        """Return a line of JSON, or nothing for a piece without text."""
        return "" if data == {"output": ""} else super().format_encoded_response(data)
