"""Finetuning with LoRA: the model stays as it is, and small updates beside its layers are trained."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from litgpt import names
from litgpt.checkpoint import adapter_writer, load_model, write_checkpoint
from litgpt.files import is_file
from litgpt.finetune.loop import Base, Extras, Method, finetune
from litgpt.lora import LoRA, add_lora, lora_filter, merge_lora_weights
from litgpt.model import GPT
from litgpt.quantize import Quantize

FASTER = ("lora_B", "lora_up_B", "lora_down_B")  # what LoRA+ gives a learning rate of its own: B of linear layers, and of experts


def setup(
    checkpoint_dir: Path,
    *,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    lora_targets: Literal["all-linear"] | None = None,
    lora_rslora: bool = False,
    lora_dora: bool = False,
    lora_plus_ratio: float | None = None,
    quantize: Quantize | None = None,
    out_dir: Path = Path("out/finetune/lora"),
    **shared: Any,
) -> None:
    """Finetune a model with LoRA: train small low-rank updates beside its linear layers, and leave its own weights as they are.

    `final/` holds the model with the updates added, which every command and transformers can load, and `final/adapter/` the updates
    alone, for PEFT.

    Args:
        checkpoint_dir: The model to start from: a folder, a name in `checkpoints/`, or an `ORG/NAME` that is downloaded from the hub.
        lora_r: The rank of the updates. A higher one can learn more, and takes more memory.
        lora_alpha: The updates are scaled by this number divided by the rank, or by its root (`lora_rslora`).
        lora_dropout: How likely an input of an update is dropped while training. It has to be 0 where experts are updated.
        lora_query: Whether the queries of the attention get an update.
        lora_key: Whether its keys do.
        lora_value: Whether its values do.
        lora_projection: Whether its output does.
        lora_mlp: Whether the MLPs do; in a model with experts, those, but not what chooses among them.
        lora_head: Whether the output head does.
        lora_targets: `all-linear` turns all of these on but the head's: every linear layer gets an update, and all experts.
            `--lora_key false`, `--lora_projection false` and `--lora_mlp false` beside it change nothing: use the switches alone instead.
        lora_rslora: Divide `lora_alpha` by the root of the rank, so that updates of high ranks are not scaled down (rsLoRA).
        lora_dora: Also learn how long each row of an updated weight is, apart from its direction (DoRA). It takes more time, and learns
            more at low ranks. Not where experts are updated.
        lora_plus_ratio: How many times faster the second factor of an update learns than the first one (LoRA+), 16, say. By default
            both have the same learning rate.
        quantize: Hold the model's own weights in 4 bits (`nf4`, or `fp4`; `-dq` also packs their scales) or 8 while the updates are
            trained. What is written at the end is in full precision.
        out_dir: Where to write. `final/` becomes a complete Hugging Face folder, `step-N/` holds what a run needs to go on after
            step N, and `logs/` the logged values. A folder that already holds a run is refused.
    """
    lora = LoRA(
        lora_r,
        lora_alpha,
        lora_dropout,
        lora_query,
        lora_key,
        lora_value,
        lora_projection,
        lora_mlp,
        lora_head,
        lora_targets,
        lora_rslora,
        lora_dora,
        lora_plus_ratio,
    )
    finetune(with_lora(lora, quantize), checkpoint_dir, out_dir=out_dir, **shared)


def with_lora(lora: LoRA, quantize: str | None = None) -> Method:
    """Return the method that trains updates of these layers and sizes, beside weights that may be quantized."""
    return Method(
        "LoRA",
        freezes=True,
        prepare=partial(prepare, lora=lora),
        write=partial(write, lora=lora),
        options={f"lora_{name}": value for name, value in asdict(lora).items()} | {"quantize": quantize},
        quantize=quantize,
        lr_ratios={} if lora.plus_ratio is None else dict.fromkeys(FASTER, float(lora.plus_ratio)),
    )


def prepare(model: GPT, seed: int, lora: LoRA) -> None:
    """Freeze the model and put updates beside its layers."""
    add_lora(model, lora, seed)


def write(folder: Path, weights: Mapping[str, Tensor], base: Base, extras: Extras, lora: LoRA) -> None:
    """Make a Hugging Face folder of the base with the updates added, in the base's own dtype, and a PEFT adapter inside it."""
    model = load_model(base.folder)  # the one that was trained may hold its frozen weights in fewer bits
    add_lora(model, lora)
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and not any(lora_filter(name, None) for name in left.missing_keys)
    write_adapter = adapter_writer(model, lora, str(base.folder))
    merge_lora_weights(model)

    def with_adapter(final: Path) -> None:
        extras(final)
        write_adapter(final / names.ADAPTER)
        if is_file(final / names.PROMPT_STYLE):  # the base may be used with another one
            shutil.copyfile(final / names.PROMPT_STYLE, final / names.ADAPTER / names.PROMPT_STYLE)

    write_checkpoint(folder, model.state_dict(), model.config, source=base.folder, extras=with_adapter, overwrite=True)
