"""Finetuning with LLaMA-Adapter: the model stays as it is, and prefixes that its later layers see are trained."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from litgpt import names
from litgpt.adapter import add_adapter
from litgpt.args import OptimizerArgs
from litgpt.files import atomic_folder
from litgpt.finetune.loop import Base, Extras, Method, finetune, write_side_files
from litgpt.quantize import Quantize

OPTIMIZER = OptimizerArgs(lr=1e-3)


def setup(
    checkpoint_dir: Path,
    *,
    quantize: Quantize | None = None,
    out_dir: Path = Path("out/finetune/adapter"),
    optimizer: OptimizerArgs = OPTIMIZER,
    **shared: Any,
) -> None:
    """Finetune a model with LLaMA-Adapter: train a prefix of ten keys and values in every layer but the first two, and nothing else.

    This trains fewer parameters than LoRA. What was trained cannot be merged into the model, so `final/` holds it alone and names the
    model; every command takes that folder in the place of a model.

    Args:
        checkpoint_dir: The model to start from: a folder, a name in `checkpoints/`, or an `ORG/NAME` that is downloaded from the hub.
            It has more than two layers, of plain attention.
        quantize: Hold the model's own weights in 4 bits (`nf4`, or `fp4`; `-dq` also packs their scales) or 8 meanwhile.
        out_dir: Where to write. `final/` becomes a folder with what was trained, `step-N/` holds what a run needs to go on after step N,
            and `logs/` the logged values. A folder that already holds a run is refused.
        optimizer: Which optimizer, and how fast.
    """
    finetune(replace(ADAPTER, **quantized(quantize)), checkpoint_dir, out_dir=out_dir, optimizer=optimizer, **shared)


def quantized(quantize: str | None) -> dict[str, Any]:
    """Return the fields of a `Method` whose frozen layers are held in fewer bits."""
    return dict(quantize=quantize, options={"quantize": quantize})


def write(folder: Path, weights: Mapping[str, Tensor], base: Base, extras: Extras) -> None:
    """Make a folder of what was trained, which names the base and has its config and tokenizer."""
    with atomic_folder(folder, overwrite=True) as partial:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, partial / names.OWN_ADAPTER, {"format": "pt"})
        (partial / names.OWN_ADAPTER_BASE).write_text(yaml.safe_dump({"checkpoint_dir": str(base.folder)}, allow_unicode=True))
        write_side_files(partial, base, extras)


ADAPTER = Method("Adapter", freezes=True, prepare=add_adapter, write=write)
