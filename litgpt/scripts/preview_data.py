"""Shows what a data set teaches: which tokens are trained on, how long samples are, and what a step of them costs."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from itertools import groupby
from pathlib import Path

from lightning.fabric import Fabric
from rich.console import Console
from rich.text import Text

from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint import described_by
from litgpt.config import Config
from litgpt.data import Alpaca, DataModule
from litgpt.data.mix import MixedSamples
from litgpt.data.packing import PackedSamples, Sample
from litgpt.errors import UserError
from litgpt.hardware import compute_dtype, peak_flops
from litgpt.lora import LoRA, add_lora
from litgpt.loss import IGNORED
from litgpt.metrics import train_flops_per_token
from litgpt.model import GPT
from litgpt.run_inputs import check_ids, counted, prepared, sample_length
from litgpt.scripts.batches import Batches, batches_of
from litgpt.scripts.download import find_checkpoint
from litgpt.scripts.memory_plan import cast, in_words, measured_pass, without_numbers
from litgpt.tokenizer import Tokenizer
from litgpt.training import check_limits

TRAIN = TrainArgs(global_batch_size=16, micro_batch_size=1, epochs=5)  # as in finetuning
BARS, WIDTH = 8, 40  # of the histogram
SHARES = {"median": 0.5, "95% have at most": 0.95, "longest": 1.0}
MARKS, PLAIN_MARKS = ("⟦", "⟧"), ("[[", "]]")  # around what is trained on, where there are no colours


def preview_data(
    checkpoint_dir: Path,
    *,
    data: DataModule | None = None,
    train: TrainArgs = TRAIN,
    n_samples: int = 3,
    seed: int = 1337,
    access_token: str | None = None,
) -> None:
    """Show samples as a model will see them in finetuning, and count what they cost, without training anything.

    What is trained on is shown in green, or between ⟦ and ⟧ where there are no colours. Give the flags of the data as in `finetune`.
    Of the model, only its config and tokenizer are read.

    Args:
        checkpoint_dir: The model to be finetuned, whose tokenizer and prompt style are used: a folder, a name in `checkpoints/`, or an
            `ORG/NAME` that is downloaded from the hub.
        data: The samples, such as `JSON` with `--data.json_path FILE`. By default Alpaca, as in `finetune`.
        train: Batch sizes, the longest sample, and packing.
        n_samples: How many samples to show.
        seed: Of the order of the samples, as in `finetune`.
        access_token: A token of the Hugging Face hub, for models that are not open to everyone.
    """
    check_limits(train, EvalArgs())
    if n_samples < 0:
        raise UserError(f"`n_samples` is how many samples to show, but got {n_samples}.")
    if train.global_batch_size is None:
        raise UserError("`train.global_batch_size` is a number of samples, but got null.")
    folder = described_by(find_checkpoint(checkpoint_dir, access_token=access_token, needs_weights=False))
    tokenizer, config = Tokenizer(folder), Config.from_checkpoint(folder)
    samples, val_samples = read(data or Alpaca(), tokenizer, config, train)
    console = Console()
    coloured = console.color_system is not None and not console.no_color
    for index in range(min(n_samples, len(samples))):
        title = f"Sample {index + 1} of {len(samples):,}"
        print(rendered(shown(samples[index], tokenizer, title, None if coloured else marks(sys.stdout.encoding)), coloured), end="\n\n")
    for line in (*statistics(samples, val_samples), *histogram(lengths_of(samples)), *costs(samples, config, train, seed)):
        print(line)


def read(data: DataModule, tokenizer: Tokenizer, config: Config, train: TrainArgs) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Return the samples to train on and those to validate on.

    Raises:
        UserError: They have no answers.
    """
    data.ignore_index = IGNORED
    data.connect(tokenizer, train.micro_batch_size, sample_length(train, config))
    samples, val_samples = prepared(Fabric(accelerator="cpu", devices=1), data)
    if not len(samples) or not isinstance(samples[0], Mapping) or "labels" not in samples[0]:
        raise UserError(f"{type(data).__name__} has no answers to learn, so there is nothing to show. Use `--data JSON`, say.")
    check_ids(config, samples, val_samples)
    return samples, val_samples


# Samples


def marks(encoding: str | None) -> tuple[str, str]:
    """Return what to put around text that is trained on, in an encoding that can write it."""
    try:
        "".join(MARKS).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_MARKS
    return MARKS


def shown(sample: Sample, tokenizer: Tokenizer, title: str, marked: tuple[str, str] | None) -> Text:
    """Return a sample's text, in which the tokens that are trained on stand out: by colour, or between marks."""
    ids, trained = sample["input_ids"].tolist(), [False, *(sample["labels"][1:] != IGNORED).tolist()]  # nothing predicts the first token
    text = Text().append(f"{title}: {counted(len(ids), 'token')}, {sum(trained):,} of them trained on\n", style="bold")
    opened, closed = marked or ("", "")
    for is_trained, run in groupby(zip(pieces(ids, trained, tokenizer), trained, strict=True), key=lambda pair: pair[1]):
        piece = "".join(piece for piece, _ in run).replace("\x1b", "\\x1b")  # which would be a command to the terminal
        text.append(f"{opened}{piece}{closed}" if is_trained else piece, style="green" if is_trained else "dim")
    return text


def rendered(text: Text, coloured: bool) -> str:
    """Return a text with its colours, if it is to have some; rich itself would end the program where the output is closed."""
    console = Console(file=StringIO(), highlight=False, force_terminal=coloured, color_system="standard" if coloured else None)
    console.print(text, soft_wrap=True)
    return console.file.getvalue().rstrip("\n")


def pieces(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what each token adds to the text, special ones by their names.

    Several tokens may make one character: neighbours that are trained on alike are decoded together, and the last of them has their text.
    """
    before: list[int] = []  # the token before, for without one some tokenizers drop a space
    kinds = ((token in tokenizer.special_ids, is_trained) for token, is_trained in zip(ids, trained, strict=True))
    for (special, _), run in groupby(zip(ids, kinds, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in run]
        if special:
            yield from (tokenizer.text(token) or f"<{token}>" for token in tokens)
            before = []
        else:
            known = tokenizer.decode(before) if before else ""
            whole = tokenizer.decode(before + tokens)
            yield from [""] * (len(tokens) - 1)
            yield whole.removeprefix(known)
            before = tokens[-1:]


# Numbers


def lengths_of(samples: Sequence[Sample]) -> list[int]:
    """Return how many tokens each sample has."""
    return list(getattr(samples, "lengths", None) or (len(samples[i]["input_ids"]) for i in range(len(samples))))


def statistics(samples: Sequence[Sample], val_samples: Sequence[Sample]) -> Iterator[str]:
    """Yield lines about how many and how long samples are, and what was cut or left out."""
    lengths = sorted(lengths_of(samples))
    total = sum(lengths)
    places = (f"{name} {lengths[math.ceil(share * len(lengths)) - 1]:,}" for name, share in SHARES.items())
    yield f"{counted(len(lengths), 'sample')} to train on, {counted(len(val_samples), 'sample')} to validate on."
    yield f"Tokens of a sample: shortest {lengths[0]:,}, mean {total / len(lengths):,.1f}, {', '.join(places)}; {total:,} in all."
    if (n_targets := getattr(samples, "n_targets", None)) is not None:
        yield f"Trained on: {sum(n_targets):,} of them, {sum(n_targets) / total:.1%}."
    n_cut, n_dropped, n_lost = (getattr(samples, name, 0) for name in ("n_cut", "n_dropped", "n_lost"))
    where = " in all sources, drawn or not" if isinstance(samples, MixedSamples) else ""
    lost = f"{n_lost / (n_lost + getattr(samples, 'n_kept', total)):.1%} of all tokens are lost"
    yield f"Too long or without a target{where}: {counted(n_cut, 'sample')} cut, {counted(n_dropped, 'sample')} left out; {lost}."


def histogram(lengths: Sequence[int]) -> Iterator[str]:
    """Yield a bar for each range of lengths."""
    least = min(lengths)
    width = math.ceil((max(lengths) + 1 - least) / BARS)
    counts = [0] * ((max(lengths) - least) // width + 1)
    for length in lengths:
        counts[(length - least) // width] += 1
    for start, count in zip(range(least, max(lengths) + 1, width), counts, strict=True):
        bar = "#" * math.ceil(WIDTH * count / max(counts))
        yield f"{start:>8,} to {start + width - 1:>7,} tokens  {bar} {count:,}"


def costs(samples: Sequence[Sample], config: Config, train: TrainArgs, seed: int) -> Iterator[str]:
    """Yield lines about what a step computes, how much of it is padding with packing and without, and what its passes hold."""
    rows = PackedSamples(samples, train.max_seq_length)
    batches = {packing: batches_of(samples, replace(train, packing=packing), seed) for packing in (False, True)}
    chosen = batches_of(rows, train, seed) if train.packing == "global" else batches[bool(train.packing)]
    unit = "row" if train.packing == "global" else "sample"
    yield f"A step of {counted(train.global_batch_size, unit)} has {chosen.n_tokens:,.0f} tokens on average."
    for packing, found in batches.items():
        yield (
            f"  --train.packing {str(packing).lower():7} {found.n_microbatches:,.1f} forward passes of at most {found.largest:,} tokens, "
            f"{found.padding:.1%} of them padding."
        )
    capacity = train.max_seq_length or max(lengths_of(samples))
    share = sum(rows.lengths) / (len(rows) * capacity)
    size = f"{counted(len(rows), 'row')} of {capacity:,} tokens"
    yield f"  --train.packing global  {size} in all, {share:.1%} of which are filled; a row counts as a sample."
    yield from computed(samples, config, chosen)


def computed(samples: Sequence[Sample], config: Config, batches: Batches) -> Iterator[str]:
    """Yield lines about a step's operations, and what forward and backward pass hold, with LoRA and without."""
    dtype, lengths = compute_dtype(), lengths_of(samples)
    n_targets, peak = sum(getattr(samples, "n_targets", lengths)), peak_flops(dtype)
    length = sum(n * n for n in lengths) / sum(lengths)  # of the sample of a token
    for name, lora in (("all parameters", None), ("LoRA", LoRA())):
        with without_numbers():
            model = cast(GPT(config), dtype)
            if lora is not None:
                add_lora(model, lora)
            flops = train_flops_per_token(model, length, n_targets / sum(lengths)) * batches.n_tokens
            passes = measured_pass(model.train(), batches.rows, batches.length, batches.lengths)
        least = "" if peak is None else f", at least {flops / peak:,.1f} s here"
        plain, again = (in_words(held.activations + held.logits) for held in (passes.peak(), passes.peak(config.n_layer)))
        yield (
            f"Training {name} in {str(dtype).removeprefix('torch.')}: {flops / 1e12:,.3g} TFLOP a step{least}; the passes hold "
            f"{plain} at most, {again} with --train.activation_checkpointing full."
        )
