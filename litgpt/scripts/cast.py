"""Write the weights of a checkpoint directory in another type."""

import json
from pathlib import Path

from litgpt import names
from litgpt.checkpoint import DTYPES, hf_weight_files, read_json, read_raw, write_shards


def cast_weights(folder: Path, dtype: str) -> None:
    """Replace the weight files of a folder by safetensors of another type, and say so in its `config.json`.

    The folder should be one that is still being made: an interruption leaves it incomplete.

    Args:
        folder: Holds Hugging Face's weights, one of whose files at least is in memory at a time.
        dtype: bfloat16, float16 or float32.
    """
    stale = [*hf_weight_files(folder), folder / names.SAFETENSORS_INDEX, folder / names.BIN_INDEX]
    written = folder / f"cast{names.PARTIAL}"
    written.mkdir()
    stream = ((name, tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor) for name, tensor in read_raw(folder))
    write_shards(written, ((name, tensor.contiguous()) for name, tensor in stream))
    for file in stale:
        file.unlink(missing_ok=True)
    for file in written.iterdir():
        file.rename(folder / file.name)
    written.rmdir()
    described = read_json(folder / names.CONFIG) | {"torch_dtype": dtype, "dtype": dtype}
    (folder / names.CONFIG).write_text(json.dumps(described, indent=2) + "\n")
