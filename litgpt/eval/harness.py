"""A model of ours as lm-eval wants one. Its results are those of lm-eval's own class for transformers (HFLM)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from litgpt.cache import CHUNK
from litgpt.errors import UserError, optional
from litgpt.eval.score import Score, scores, windows
from litgpt.generate.batch import Answer, Batch
from litgpt.generate.memory import new_cache
from litgpt.generate.run import Speaker, note
from litgpt.generate.sampling import NO_NUMBERS, RowState
from litgpt.quantize import n_weights
from litgpt.tokenizer import StreamDecoder, Tokenizer

AUTO_ROWS = 8  # how many answers are generated at a time where the batch size is chosen for the device
MAX_NEW_TOKENS = 256  # where the task does not say
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval knows all four
WITHOUT_EFFECT = {"num_beams": 1, "do_sample": None}  # what tasks say beside it, and the value that it may have (None: any)


def lm_eval_module(name: str) -> ModuleType:
    """Return a module of lm-eval, or of a package that comes with it."""
    return optional(name, "all")


def as_lm(speaker: Speaker, batch_size: int | None) -> Any:
    """Return the model as an object of lm-eval's class `LM`, see `Harness`."""
    return type("LitGPT", (Harness, lm_eval_module("lm_eval.api.model").LM), {})(speaker, batch_size)


class Harness:
    """What lm-eval asks of a model: how likely texts are, and what goes on from them.

    Args:
        speaker: The model with its tokenizer and prompt style.
        batch_size: How many contexts are read, or answers generated, at a time; None chooses for the device.
    """

    def __init__(self, speaker: Speaker, batch_size: int | None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.style = speaker.model, speaker.tokenizer, speaker.style
        self.speaker, self.batch_size = speaker, batch_size
        self.max_length = speaker.model.config.block_size
        self.told: set[str] = set()

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests calls the tokenizer and the prompt style."""
        return f"{self.tokenizer.model_name}-{type(self.style).__name__}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say of the model."""
        dtype = str(next(self.model.parameters()).dtype)
        return {"model_num_parameters": n_weights(self.model), "model_dtype": dtype, "max_length": self.max_length}

    # Log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each request, a context and a continuation, the log-likelihood, and whether it is what greedy decoding says."""
        pairs = [self.encoded_pair(*request.args) for request in requests]
        return [tuple(score) for score in self._scores(pairs, "Log-likelihoods", disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each request's text, in windows as long as the context."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            for pair in windows(encoded(self.tokenizer, request.args[0]), beginning_of(self.tokenizer), self.max_length):
                pairs.append(pair)
                owners.append(i)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(pairs, "Rolling log-likelihoods", disable_tqdm), strict=True):
            sums[owner] += score.logprob
        return sums

    def _scores(self, pairs: list[tuple[list[int], list[int]]], title: str, quiet: bool) -> list[Score]:
        with lm_eval_module("tqdm").tqdm(total=len(pairs), desc=title, disable=quiet) as bar:
            return scores(self.model, pairs, self.batch_size, bar.update)

    def encoded_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of its continuation, which together are those of the whole text.

        Spaces at the end of the context belong to the continuation, and where there is no context BOS or EOS stands for it.
        """
        if context == "":
            ids, first = self.tokenizer.ids(continuation), beginning_of(self.tokenizer)
            return (ids[:1], ids[1:]) if ids[:1] == [first] else ([first], ids)
        bare = context.rstrip()
        given, whole = encoded(self.tokenizer, bare), encoded(self.tokenizer, context + continuation)
        return given or [beginning_of(self.tokenizer)], whole[len(given) :]

    # Generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return for each request, a context and how to go on from it, the text that follows, up to the first stop string."""
        writers = [self._writer(*request.args) for request in requests]
        with lm_eval_module("tqdm").tqdm(total=len(writers), desc="Answers", disable=disable_tqdm) as bar:
            alone = self.model.rope.depends_on_length  # the rotations of such a model follow from how much the memory holds
            for lot in [[writer] for writer in writers] if alone else [writers] if writers else []:
                self._write(lot, bar.update)
        return [writer.cut() for writer in writers]

    @torch.inference_mode()
    def _write(self, writers: list["Writer"], advance: Any) -> None:
        """Generate all answers; those whose prompts begin alike follow each other, so that they share it."""
        rows = min(self.batch_size or AUTO_ROWS, len(writers))
        length = max(len(writer.answer.prompt) + writer.answer.max_new_tokens for writer in writers)
        batch = Batch(self.model, new_cache(self.model, rows, length), max_tokens=CHUNK, keeps_prefixes=True)
        by_answer = {writer.answer: writer for writer in writers}
        waiting = sorted(writers, key=lambda writer: writer.answer.prompt, reverse=True)
        while waiting or batch.running:
            while waiting and batch.n_free:
                batch.join(waiting.pop().answer)
            for answer, new in batch.step():
                if answer.finish == "error":
                    raise UserError(NO_NUMBERS)
                stopped = by_answer[answer].push(new)
                if stopped and answer.finish is None:
                    batch.leave(answer)
                if stopped or answer.finish is not None:
                    advance(1)

    def _writer(self, context: str, settings: dict[str, Any]) -> "Writer":
        """Return the answer to a request, not begun yet."""
        check_generation(settings, "The task generates with")
        asked = lm_eval_module("lm_eval.models.utils").normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        n_new, until = asked.pop("max_gen_toks"), asked.pop("until")
        temperature = float(asked.pop("temperature", 1.0 if asked.get("do_sample") else 0.0))
        sampling = {name: asked.pop(name) for name in SAMPLING if name in asked}
        for name, value in asked.items():
            if name not in WITHOUT_EFFECT or WITHOUT_EFFECT[name] not in (None, value):
                way = "Choose another task, or say otherwise in `gen_kwargs`."
                raise UserError(f"The task generates with `{name}` {value!r}, which is not supported. {way}")
        if not 0 < n_new < self.max_length:
            raise UserError(
                f"The task generates {n_new} tokens, but the model's context is {self.max_length} tokens, prompts included. "
                "Set fewer with --gen_kwargs max_gen_toks=N."
            )
        ids = encoded(self.tokenizer, context)[n_new - self.max_length :] or [beginning_of(self.tokenizer)]
        stop = [[eos] for eos in self.tokenizer.eos_ids]
        answer = Answer(ids, RowState(temperature if asked.get("do_sample") else 0.0, **sampling), n_new, stop)
        strings = [string for string in (*until, self.tokenizer.eos_token) if string]
        return Writer(answer, strings, StreamDecoder(self.tokenizer))

    # Conversations

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation in the model's prompt style.

        Args:
            chat_history: Messages.
            add_generation_prompt: Whether an answer is to follow; else the last message is the beginning of one.
        """
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        opened = "" if add_generation_prompt else chat_history[-1]["content"]
        end = self.style.turn_end(self.tokenizer)
        try:
            return "".join(piece[0] for piece in self.style.pieces(messages, end)) + opened
        except UserError as error:
            without = [message for message in messages if message["role"] != "system"]
            if len(without) in (0, len(messages)):
                raise
            if str(error) not in self.told:
                note(f"The system text is left out, for the prompt style has none: {error}")
                self.told.add(str(error))
            return "".join(piece[0] for piece in self.style.pieces(without, end)) + opened

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return what the results say of the prompt style."""
        return getattr(self.style, "template", type(self.style).__name__) if chat_template else ""


def check_generation(settings: dict[str, Any], who: str) -> None:
    """Refuse settings of answers that are not of the kind that their names say.

    Args:
        settings: By name. What we do not know passes.
        who: Says where they come from, such as "The task generates with".

    Raises:
        UserError: A value is of another kind.
    """
    for name, value in settings.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "until":
            texts = value if isinstance(value, list) else [value]
            right, kind = all(text is None or isinstance(text, str) for text in texts), "a text. Put quotes around a number: until='3'"
        elif name == "do_sample":
            right, kind = value is None or isinstance(value, bool), "true or false"
        elif name == "top_k" or name in TOKEN_LIMITS:
            right, kind = value is None or is_number and isinstance(value, int), "a whole number"
        else:
            right, kind = is_number or name not in SAMPLING, "a number"
        if not right:
            raise UserError(f"{who} `{name}` {value!r}, but it is {kind}.")


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text, which begin with BOS if the tokenizer's files want that."""
    ids = tokenizer.ids(text)
    return tokenizer.begin(ids) if tokenizer.use_bos else ids


def beginning_of(tokenizer: Tokenizer) -> int:
    """Return what stands before a text without context: the BOS, or else EOS, that the tokenizer's own files name.

    Raises:
        UserError: There is neither.
    """
    named = tokenizer.special_tokens
    only_eos = "bos_token" not in named and "eos_token" in named and tokenizer.backend == "huggingface"
    for found in (None if only_eos else tokenizer.bos_id, tokenizer.eos_id):
        if found is not None:
            return found
    raise UserError(f"The tokenizer {tokenizer.model_name!r} has neither BOS nor EOS, so nothing can stand before a text. Name one.")


@dataclass(eq=False)
class Writer:
    """An answer, its text, and the strings before which it ends."""

    answer: Answer
    until: list[str]
    decoder: StreamDecoder
    text: str = field(init=False, default="")

    def push(self, tokens: list[int]) -> bool:
        """Add tokens to the text and return whether a stop string is in it now."""
        new = "".join(map(self.decoder.push, tokens))
        if self.answer.finish is not None:
            new += self.decoder.flush()
        tail = self.text[max(0, len(self.text) - max(map(len, self.until), default=0)) :] + new
        self.text += new
        return any(string in tail for string in self.until)

    def cut(self) -> str:
        """Return the text up to the first stop string."""
        return self.text[: min((at for string in self.until if (at := self.text.find(string)) >= 0), default=len(self.text))]
