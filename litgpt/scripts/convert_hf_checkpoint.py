"""Write LitGPT's own layout beside a checkpoint."""

from contextlib import suppress
from pathlib import Path

import torch
import yaml

from litgpt import names
from litgpt.checkpoint import DTYPES, load_model, refuse_adapter
from litgpt.errors import UserError, did_you_mean, disk_error
from litgpt.litgpt_layout import to_litgpt_names
from litgpt.scripts.download import find_checkpoint


def convert_hf_checkpoint(
    checkpoint_dir: Path, *, model_name: str | None = None, dtype: str | None = None, debug_mode: bool | None = False
) -> None:
    """Write `lit_model.pth` and `model_config.yaml`, LitGPT's layout, beside the Hugging Face files of a checkpoint directory.

    No command of ours needs these files: all of them read Hugging Face's. They serve programs that were written for LitGPT.

    Args:
        checkpoint_dir: Holds `config.json` and weights.
        model_name: Ignored, since the architecture is read from the checkpoint; accepted because LitGPT had it.
        dtype: The type of the written weights: bfloat16, float16 or float32. By default as they are.
        debug_mode: Print each weight's name, shape and type.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"`dtype` is one of {', '.join(DTYPES)}, but got {dtype!r}.{did_you_mean(dtype, DTYPES)}")
    if model_name is not None:
        print("--model_name is not needed: the architecture is read from the checkpoint.")
    folder = find_checkpoint(checkpoint_dir, needs_tokenizer=False)
    refuse_adapter(folder)
    model = load_model(folder, DTYPES.get(dtype))
    weights = dict(to_litgpt_names(model.state_dict().items(), model.config))
    if debug_mode:
        for name, tensor in weights.items():
            print(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
    described = yaml.safe_dump(model.config.to_litgpt(), sort_keys=False)
    partial = folder / (names.LIT_WEIGHTS + names.PARTIAL)
    try:
        with open(partial, "wb") as file:  # one of Python's, whose errors name the disk's
            torch.save(weights, file)
        partial.replace(folder / names.LIT_WEIGHTS)
        (folder / names.LIT_CONFIG).write_text(described)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink()
        message = next((text for cause in (error, error.__context__) if cause is not None and (text := disk_error(cause))), None)
        if message is None:
            raise
        raise UserError(f"{folder / names.LIT_WEIGHTS} could not be written: {message}") from error
    print(f"Saved {folder / names.LIT_WEIGHTS} and {names.LIT_CONFIG}.")
