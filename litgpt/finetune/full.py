"""Full finetuning: all parameters are trained."""

from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt.args import EvalArgs, OptimizerArgs
from litgpt.checkpoint import write_checkpoint
from litgpt.finetune.loop import Base, Extras, Method, finetune
from litgpt.model import GPT

EVAL = EvalArgs(interval=600, max_new_tokens=100, max_iters=100)
OPTIMIZER = OptimizerArgs(lr=2e-5)


def setup(
    checkpoint_dir: Path,
    *,
    out_dir: Path = Path("out/finetune/full"),
    eval: EvalArgs = EVAL,
    optimizer: OptimizerArgs = OPTIMIZER,
    **shared: Any,
) -> None:
    """Finetune all parameters of a model.

    This takes weights, gradients and two averages for each parameter: 16 bytes in all. LoRA takes a fraction of it.

    Args:
        checkpoint_dir: The model to start from: a folder, a name in `checkpoints/`, or an `ORG/NAME` that is downloaded from the hub.
        out_dir: Where to write. `final/` becomes a complete Hugging Face folder, `step-N/` holds what a run needs to go on after
            step N, and `logs/` the logged values. A folder that already holds a run is refused.
        eval: When and how to validate.
        optimizer: Which optimizer, and how fast.
    """
    finetune(FULL, checkpoint_dir, out_dir=out_dir, eval=eval, optimizer=optimizer, **shared)


def prepare(model: GPT, seed: int) -> None:
    """Train everything."""
    model.requires_grad_(True)


def write(folder: Path, weights: dict[str, Tensor], base: Base, extras: Extras) -> None:
    """Make a Hugging Face folder of the trained weights, in the dtype of those it began with."""
    write_checkpoint(folder, weights, base.config, source=base.folder, dtype=base.dtype, extras=extras, overwrite=True)


FULL = Method("all parameters", freezes=False, prepare=prepare, write=write)
