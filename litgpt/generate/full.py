"""The command `generate_full`, and what `generate_adapter` and `generate_adapter_v2` share with it: one answer of a finetuned model."""

from pathlib import Path
from time import perf_counter
from typing import Any

from litgpt import names
from litgpt.errors import MissingFile, UserError
from litgpt.files import is_file, is_folder
from litgpt.generate.answers import Options, new_reply, write
from litgpt.generate.base import PROMPT
from litgpt.generate.run import load, note

SEED = 1234


def main(checkpoint_dir: Path, prompt: str = PROMPT, *, finetuned_path: Path = Path("out/finetune/full/final"), **shared: Any) -> None:
    """Answer one prompt with a model that `finetune_full` trained.

    Prints the answer alone. `generate` does the same and more, given the finetuned folder as its model.

    Args:
        checkpoint_dir: The model that was finetuned. It is not read, for the finetuned folder is complete; LitGPT needs it.
        prompt: The text to answer. It is put into the prompt style that the model was trained with.
        finetuned_path: A folder that `finetune_full` wrote (`final` or a step), ours or LitGPT's, or its `lit_model.pth`.
    """
    answer(folder_of(finetuned_path, "finetuned_path", "finetune_full", names.LIT_WEIGHTS), None, prompt, **shared)


def answer(
    checkpoint_dir: Path,
    adapter: Path | None,
    prompt: str,
    *,
    input: str = "",
    sys_prompt: str | None = None,
    max_new_tokens: int = 100,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    quantize: str | None = None,
    precision: str | None = None,
) -> None:
    """Print a model's answer to one prompt while it is made.

    Args:
        checkpoint_dir: The model.
        adapter: The folder of what was trained beside it.
        prompt: The text to answer.
        input: What the prompt is about, for prompt styles that have a place for it; others write it below the prompt.
        sys_prompt: A system prompt, for prompt styles that have one. By default the style's own.
        max_new_tokens: The most tokens that the answer may have.
        top_k: Choose each token among the k likeliest ones only; null among all.
        top_p: Choose each token among the fewest likeliest ones whose probabilities reach this sum. 0 takes the likeliest, 1 leaves all.
        temperature: Above 1 the answer varies more, below 1 less; 0 always takes the likeliest token.
        quantize: Hold the weights in fewer bits: `bnb.nf4`, `bnb.fp4` (4 bits), both with `-dq` (their scales in fewer bits too), or
            `bnb.int8`.
        precision: The type of weights and computation: 32-true, bf16-true or 16-true. By default the one that is fast on this machine.
    """
    options = Options(max_new_tokens, temperature, top_k, top_p, seed=SEED)
    options.row()  # mistakes are told before the model is loaded
    start = perf_counter()
    speaker = load(checkpoint_dir, quantize=quantize, precision=precision, adapter=adapter)
    note(f"Loaded {adapter or speaker.folder} in {perf_counter() - start:.2f} seconds.")
    ids = speaker.encode([{"role": "user", "content": prompt, "input": input}], sys_prompt)
    reply = new_reply(speaker.model, speaker.tokenizer, ids, options, speaker.stop_tokens)
    start = perf_counter()
    try:
        for step in write(speaker.model, [reply], 1, reply.length):
            print(step.text, end="", flush=True)
    finally:
        print(flush=True)  # an error begins its own line
    seconds, n = perf_counter() - start, len(reply.answer.made)
    note(f"Time for inference: {seconds:.2f} seconds in total, {n / seconds:.2f} tokens/sec")


def folder_of(path: Path, flag: str, command: str, *files: str) -> Path:
    """Return the folder that a flag means: the path itself, or where it lies if it is one of these files.

    Raises:
        MissingFile: There is no such folder.
        UserError: It is another file.
    """
    if is_file(path):
        if path.name not in files:
            raise UserError(f"`{flag}` is a folder that {command} wrote, or {' or '.join(files)} in it, but got {str(path)!r}.")
        return path.parent
    if not is_folder(path):
        raise MissingFile(f"There is no folder {str(path)!r}. `{flag}` is one that {command} wrote, such as its `{names.FINAL}`.")
    return path
