"""Groups of options that several commands share, and how options become plain values and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal


@dataclass
class TrainArgs:
    """How to train: batch sizes, limits, schedule and intervals. A step is an optimizer step."""

    save_interval: int | None = 1000
    """How many steps lie between two saved checkpoints; null saves no steps."""
    log_interval: int = 1
    """How many steps lie between two log lines."""
    global_batch_size: int | None = 64
    """How many samples one step sees, over all devices. Where null is allowed (pretraining), it follows from the amount of data."""
    micro_batch_size: int = 4
    """How many samples one forward pass sees on each device. It changes memory and speed, never the result."""
    lr_warmup_steps: int | None = None
    """Over how many steps the learning rate rises to its peak. By default the smaller of 100 and a tenth of all steps."""
    lr_warmup_fraction: float | None = None
    """The same as a fraction of all steps, between 0 and 1. Give one of the two."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to `min_lr`."""
    epochs: int | None = None
    """How often to go through the data."""
    max_tokens: int | None = None
    """Stop after this many tokens, over all devices."""
    max_steps: int | None = None
    """Stop after this many steps."""
    max_time: float | None = None
    """Stop after this many seconds."""
    max_seq_length: int | None = None
    """Cut samples to this many tokens. By default the model's context."""
    tie_embeddings: bool | None = None
    """Share one matrix between the token embedding and the output head. By default as the model is."""
    max_norm: float | None = 1.0
    """Scale gradients so that their global norm is at most this; null leaves them as they are."""
    min_lr: float | None = None
    """The learning rate that the schedule ends at. By default a tenth of the peak."""
    packing: bool | Literal["global"] = True
    """Whether to lay the samples of a step end to end in rows, without padding and without attention across them: the result stays that
    of single samples. `global` fills rows from the whole data set first, so that a sample of `global_batch_size` is such a row."""
    activation_checkpointing: Literal["none", "full"] | float = "none"
    """Compute blocks again in the backward pass instead of keeping what they made: `none`, `full` (all of them, which takes a third more
    time), or the GB that one microbatch may take, for which only as many blocks as needed are computed again."""
    keep_last: int | None = None
    """How many saved steps to keep; older ones are deleted, but never one that `best` or `last` names. By default all are kept."""
    expert_balance: float | None = None
    """How much a loss counts that spreads tokens evenly over experts. By default 0.001 in pretraining a model that has some, else 0.
    It is computed for each microbatch, so it alone depends on `micro_batch_size`, `packing` and the number of devices."""


@dataclass
class EvalArgs:
    """When and how to validate while training."""

    interval: int = 600
    """How many steps lie between two validations."""
    max_new_tokens: int | None = None
    """How long the example answer may get, in tokens; null generates none."""
    max_iters: int = 100
    """How many microbatches a validation sees at most. The final one sees all."""
    initial_validation: bool = False
    """Whether to validate before the first step."""
    final_validation: bool = True
    """Whether to validate after the last step."""
    evaluate_example: Literal["first", "random"] | int = "first"
    """Which sample's instruction the example answer is generated for."""
    save_best: bool = False
    """Whether to save a step whenever its validation loss is the lowest so far. The link `best` names the best of the saved steps."""
    patience: int | None = None
    """Stop after so many validations in a row that did not lower the best loss. By default the run goes on to its other limits."""


@dataclass
class LogArgs:
    """Names and switches for loggers that send a run somewhere (wandb, mlflow, litlogger)."""

    project: str | None = None
    """The project's name."""
    run: str | None = None
    """The run's name."""
    group: str | None = None
    """The group that the run belongs to."""
    teamspace: str | None = None
    """The teamspace (litlogger)."""
    metadata: dict[str, Any] | None = None
    """More facts to store with the run (wandb, mlflow, litlogger)."""
    checkpoint_name: str | None = None
    """What the uploaded model is called (wandb, mlflow, litlogger)."""
    log_model: bool = False
    """Whether to upload `final` too."""
    save_logs: bool = True
    """Whether to upload the console's output too (litlogger)."""


@dataclass
class OptimizerArgs:
    """Which optimizer, and how fast."""

    name: str = "AdamW"
    """The name of a class in `torch.optim`, or an import path."""
    lr: float | None = 2e-4
    """The peak learning rate. Where null is allowed (pretraining), it follows from the size of the model."""
    weight_decay: float = 0.0
    """How strongly weights are pulled to zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The decay rates of the averages of the gradient and its square, for optimizers that have them."""
    state: Literal["full", "bf16", "8bit"] = "full"
    """How AdamW keeps its two averages: `full` as 32-bit numbers, `bf16` in half of that, `8bit` in a quarter."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Any further arguments of that class."""


def optimizer_fields(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `OptimizerArgs` that a recipe's or a flag's `optimizer` sets.

    Null sets none of them but `lr`, which may be null.

    Args:
        spec: A class name, a mapping with `class_path` and `init_args`, or a mapping of the fields themselves.
    """
    if isinstance(spec, str):
        return {"name": spec}
    given = {"name" if key == "class_path" else key: value for key, value in spec.items()}
    init_args = given.get("init_args")
    if isinstance(init_args, Mapping):
        ours = {name: value for name, value in init_args.items() if name in ("lr", "weight_decay", "betas")}
        given |= ours | {"init_args": {name: value for name, value in init_args.items() if name not in ours}}
    return {name: value for name, value in given.items() if value is not None or name == "lr"}


def to_plain(value: Any) -> Any:
    """Return the value in terms that YAML can write and `--config` can read.

    Groups of options become mappings, paths become text. Any other object becomes `class_path` and `init_args`, the latter
    from its attributes that are named like the arguments of its class.

    Args:
        value: The arguments of a command as a mapping, or any single value.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [to_plain(inner) for inner in value]
    if is_dataclass(value) and all(is_dataclass(base) for base in type(value).__mro__[:-1]):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Path) or type(value).__module__ == "torch":  # a dtype or a device
        return str(value)
    init_args = {name: to_plain(getattr(value, name)) for name in signature(type(value)).parameters if hasattr(value, name)}
    return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}"} | ({"init_args": init_args} if init_args else {})
