"""Read and write the files that weights lie in: safetensors in one or many files, `.bin` and `.pth`, and the slices of a run's steps."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litgpt import names
from litgpt.dequantize import dequantized
from litgpt.errors import MissingFile, UserError
from litgpt.files import check_readable, indexed_files, is_file, read_json

MAX_SHARD_SIZE = "5GB"
NO_WEIGHTS = ("training_args.bin", names.ADAPTER_WEIGHTS, names.OWN_ADAPTER)  # which lie beside weights and are none
UNITS = {"": 1, "B": 1} | {f"{letter}{end}": base**i for i, letter in enumerate("KMGT", 1) for end, base in (("B", 1000), ("IB", 1024))}
TYPES = {  # what safetensors call them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLOATS = {name: dtype for dtype, name in TYPES.items() if dtype.is_floating_point}


# Reading


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the largest part of a folder's weights; FP8 counts as bfloat16, which it becomes when it is read."""
    sizes: dict[torch.dtype, int] = {}
    for _, dtype, size in read_headers(folder):
        if dtype is not None:
            dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
            sizes[dtype] = sizes.get(dtype, 0) + size
    return max(sizes, key=sizes.__getitem__) if sizes else torch.float32


def read_headers(folder: Path) -> Iterator[tuple[str, torch.dtype | None, int]]:
    """Yield name, floating-point type (None of other numbers) and size of a folder's weights, without reading them."""
    for file in plain_files(folder) or step_files(folder):
        if file.suffix != ".safetensors":  # torch maps the tensors into memory, which reads nothing
            yield from ((name, tensor.dtype if tensor.is_floating_point() else None, tensor.numel()) for name, tensor in read_file(file))
            continue
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                if "/" not in name:  # what the optimizer and the generators of a step remember has one
                    part = opened.get_slice(name)
                    yield name, FLOATS.get(part.get_dtype()), math.prod(part.get_shape())


def read_raw(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder under the names they are stored by."""
    files = plain_files(folder)
    yield from read_files(files) if files else read_step(step_files(folder))


def read_plain(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's weights under the names they are stored by; what is quantized is made plain."""
    return dequantized(read_files(hf_weight_files(folder)), read_json(folder / names.CONFIG).get("quantization_config"))


def plain_files(folder: Path) -> list[Path]:
    """Return the files that hold whole weights, Hugging Face's or LitGPT's, if there are any."""
    return hf_weight_files(folder) or list(filter(is_file, [folder / names.LIT_WEIGHTS]))


def step_files(folder: Path) -> list[Path]:
    """Return the files of a step of a run, one for each rank that wrote it.

    Raises:
        MissingFile: The folder is no such step.
    """
    files = sorted((folder / names.RUN_STATE).glob("*.safetensors"))
    if not files or not is_file(folder / names.RUN_STATE / names.STATE):
        raise MissingFile(f"{folder} holds no weights: neither *.safetensors nor *.bin nor {names.LIT_WEIGHTS}.")
    return files


def hf_weight_files(folder: Path) -> list[Path]:
    """Return the files that hold Hugging Face's weights: safetensors, else `.bin`, else none."""
    for index, single, pattern in (
        (names.SAFETENSORS_INDEX, names.SAFETENSORS, "*.safetensors"),
        (names.BIN_INDEX, names.BIN, "*.bin"),
    ):
        if is_file(folder / index):
            files = [folder / name for name in indexed_files(folder / index)]
            if missing := [file.name for file in files if not is_file(file)]:
                raise MissingFile(f"{folder / index} names {missing[0]!r}, which is not there. Download the checkpoint again.")
            return files
        found = sorted(path for path in folder.glob(pattern) if path.name not in NO_WEIGHTS)
        if found:
            return [folder / single] if is_file(folder / single) else found
    return []


def read_files(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of several files, none of which may hold a weight of another's."""
    seen: dict[str, Path] = {}
    for file in files:
        for name, tensor in read_file(file):
            if name in seen:
                raise UserError(
                    f"{file} and {seen[name].name} both hold the weight {name!r}. Delete the one that is not of this checkpoint."
                )
            seen[name] = file
            yield name, tensor


def read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix != ".safetensors":
        yield from unwrapped(file).items()
        return
    with open_weights(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            tensor = opened.get_tensor(name)
            _check_plain(tensor, name, file)
            yield name, tensor


def _check_plain(tensor: Tensor, name: str, file: Path) -> None:
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        what = "complex numbers" if tensor.is_complex() else "a sparse or quantized tensor"
        raise UserError(f"{file} stores the weight {name!r} as {what}, which no model has. Store it as a dense tensor of real numbers.")


def read_step(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a step of a run. Ranks that had shared them out wrote slices, which are put together."""
    slices: dict[str, list[tuple[Path, list[int], list[int]]]] = {}
    for file in files:
        with open_weights(file) as opened:
            for name, (offsets, shape) in step_slices(opened, file).items():
                if "/" not in name:  # what the optimizer and the generators remember has one
                    slices.setdefault(name, []).append((file, offsets, shape))
    for name, parts in slices.items():
        ends = [[offset + size for offset, size in zip(offsets, shape, strict=True)] for _, offsets, shape in parts]
        whole = [max(sizes) for sizes in zip(*ends, strict=False)]
        if math.prod(whole) != sum(math.prod(shape) for _, _, shape in parts):
            raise UserError(f"{parts[0][0].parent} lacks a part of the weight {name!r}. Use another step.")
        tensors = []
        for file, _, _ in parts:
            with open_weights(file) as opened:
                tensors.append(opened.get_tensor(name))
        made = tensors[0] if len(parts) == 1 else tensors[0].new_empty(whole)
        for (_, offsets, _), end, tensor in zip(parts, ends, tensors, strict=True) if len(parts) > 1 else ():
            made[tuple(slice(a, b) for a, b in zip(offsets, end, strict=True))] = tensor
        yield name, made


def step_slices(opened: Any, file: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Return where in its whole each tensor of a step's file begins, and the shape of what is there of it.

    Args:
        opened: The file, opened by `open_weights`.
        file: Its name.

    Raises:
        UserError: It does not say so.
    """
    try:
        places = json.loads((opened.metadata() or {})["DCP_SHARDING_INFO"])
        found = {name: (places[name]["saved_offsets"], opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        whole = all(
            len(offsets) == len(shape) and all(type(offset) is int and offset >= 0 for offset in offsets)
            for offsets, shape in found.values()
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{file} is damaged: it does not say which parts of the tensors it holds. Use another step.")
    return found


@contextmanager
def open_weights(file: Path, way: str | None = None) -> Iterator[Any]:
    """Open a safetensors file.

    Args:
        file: The file.
        way: The way out if it is damaged; by default to download it again, or to use another step of a run.

    Raises:
        MissingFile: There is no such file.
        UserError: It is damaged, or may not be read.
    """
    way = way or ("Use another step." if file.parent.name == names.RUN_STATE else "Delete it and download it again.")
    check_readable(file)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut off ({error}). {way}") from None


def load_pickle(file: Path) -> Any:
    """Read a file of `torch.save`, which may hold tensors and plain values only."""
    check_readable(file)
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # the format of torch before 1.6
    except Exception as error:  # torch raises almost anything for a file that is damaged
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{file} holds more than tensors, and reading it could run any code. Only plain weights are read.") from None
        raise UserError(f"{file} is damaged or no file of torch.save ({type(error).__name__}). Download or write it again.") from None


def unwrapped(file: Path) -> dict[str, Tensor]:
    """Return the weights that a file of `torch.save` holds: plain, under "model", or with the prefix of a compiled model."""
    loaded = load_pickle(file)
    weights = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(weights, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in weights.items()):
        raise UserError(f"{file} must hold a dictionary of names and tensors, plain or under 'model', but does not. Write it again.")
    for name, tensor in weights.items():
        _check_plain(tensor, name, file)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}


# Writing


def shard_bytes(size: int | str) -> int:
    """Return how many bytes `5GB`, `500MB`, `2GiB` or a plain number stands for.

    Raises:
        UserError: It is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    n_bytes = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS and len(match[1]) < 20 else 0
    if n_bytes < 1:
        raise UserError(f"`max_shard_size` is a size such as 5GB, 500MB or 2GiB, or a number of bytes, but got {size!r:.40}.")
    return n_bytes


def write_shards(
    folder: Path,
    stream: Iterable[tuple[str, Tensor]],
    max_bytes: int | None = None,
    plan: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write tensors as `model.safetensors`, or as several files and their index where that would grow too large.

    Args:
        folder: Where to.
        stream: Names and tensors.
        max_bytes: How many bytes of tensors a file may hold, if it holds more than one of them; by default 5 GB.
        plan: The names and tensors of `stream` on the meta device, where they take no memory. With it no more than one tensor is held at a
            time, and without it those of one file.
    """
    max_bytes, stream = max_bytes or shard_bytes(MAX_SHARD_SIZE), iter(stream)
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(stream if plan is None else plan, max_bytes):
        _write_file(folder / f"shard-{len(shards)}", shard, shard if plan is None else islice(stream, len(shard)))
        shards.append([name for name, _ in shard])
        total += sum(tensor.nbytes for _, tensor in shard)
        shard.clear()  # or it would be held until the next one is complete
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / names.SAFETENSORS)
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (folder / f"shard-{i}").rename(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: files[i] for i, held in enumerate(shards) for name in held}}
    (folder / names.SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2))


def _shards(stream: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the tensors of one file after the other."""
    shard: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in stream:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += tensor.nbytes
    yield shard


def _write_file(file: Path, described: list[tuple[str, Tensor]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor, see https://huggingface.co/docs/safetensors; the package wants to have all of them.

    Args:
        file: The file.
        described: Names and tensors, of which only shapes and types count.
        tensors: The same in the same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(described, key=lambda pair: -pair[1].element_size()):  # so that each begins at a multiple of its size
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            start, end = header[name]["data_offsets"]
            assert tensor.nbytes == end - start and TYPES[tensor.dtype] == header[name]["dtype"], name
            opened.seek(8 + len(text) + start)
            opened.write(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
