"""Finetuning with LLaMA-Adapter V2: prefixes, scales and biases of all linear layers, and norms are trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt.adapter_v2 import add_adapter_v2
from litgpt.args import OptimizerArgs
from litgpt.finetune.adapter import OPTIMIZER, quantized, write
from litgpt.finetune.loop import Method, finetune
from litgpt.quantize import Quantize


def setup(
    checkpoint_dir: Path,
    *,
    quantize: Quantize | None = None,
    out_dir: Path = Path("out/finetune/adapter-v2"),
    optimizer: OptimizerArgs = OPTIMIZER,
    **shared: Any,
) -> None:
    """Finetune a model with LLaMA-Adapter V2: train a scale and a bias of every linear layer's outputs, the norms, and prefixes.

    Prefixes are ten keys and values in every layer of plain attention but the first two. What was trained cannot be merged into the model,
    so `final/` holds it alone and names the model; every command takes that folder in the place of a model.

    Args:
        checkpoint_dir: The model to start from: a folder, a name in `checkpoints/`, or an `ORG/NAME` that is downloaded from the hub.
        quantize: Hold the model's own weights in 4 bits (`nf4`, or `fp4`; `-dq` also packs their scales) or 8 meanwhile.
        out_dir: Where to write. `final/` becomes a folder with what was trained, `step-N/` holds what a run needs to go on after step N,
            and `logs/` the logged values. A folder that already holds a run is refused.
        optimizer: Which optimizer, and how fast.
    """
    finetune(replace(ADAPTER_V2, **quantized(quantize)), checkpoint_dir, out_dir=out_dir, optimizer=optimizer, **shared)


ADAPTER_V2 = Method("Adapter v2", freezes=True, prepare=add_adapter_v2, write=write)
