"""Write the weights of a checkpoint directory in another type."""

import json
import shutil
from pathlib import Path

from litgpt import names
from litgpt.checkpoint import DTYPES
from litgpt.errors import UserError, disk_error
from litgpt.experts import EXACT
from litgpt.families import FAMILIES
from litgpt.files import read_json
from litgpt.weight_files import hf_weight_files, read_plain, write_shards

KEPT = tuple(  # how the names of weights end that have to be exact
    name.rpartition("{}.")[2]
    for family in FAMILIES.values()
    for rule in family.weights
    for name in rule.theirs
    if any(ours.endswith(EXACT) for ours in rule.ours)
)


def cast_weights(folder: Path, dtype: str) -> None:
    """Replace the weight files of a folder by safetensors of another type, and say so in its `config.json`.

    The folder should be one that is still being made: an interruption while files are replaced leaves it incomplete.

    Args:
        folder: Holds Hugging Face's weights.
        dtype: bfloat16, float16 or float32.

    Raises:
        UserError: The disk is full, or an index names files that do not lie beside it. The folder is as it was.
    """
    replaced = [*hf_weight_files(folder), folder / names.SAFETENSORS_INDEX, folder / names.BIN_INDEX]
    written = folder / f"cast{names.PARTIAL}"
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir()
    stream = (
        (name, tensor.to(DTYPES[dtype]) if tensor.is_floating_point() and not name.endswith(KEPT) else tensor)
        for name, tensor in read_plain(folder)
    )
    try:
        write_shards(written, ((name, tensor.contiguous()) for name, tensor in stream))
    except Exception as error:
        shutil.rmtree(written)
        if message := disk_error(error):
            raise UserError(f"The weights could not be stored as {dtype}: {message}") from error
        raise
    for file in replaced:
        file.unlink(missing_ok=True)
    for file in written.iterdir():
        file.rename(folder / file.name)
    written.rmdir()
    described = read_json(folder / names.CONFIG) | {"torch_dtype": dtype, "dtype": dtype}
    described.pop("quantization_config", None)
    (folder / names.CONFIG).write_text(json.dumps(described, indent=2) + "\n")
