"""A Fabric from flags: which processes, which layout of the weights over them, which dtypes, which logger."""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.loggers import LitLogger, MLFlowLogger, WandbLogger
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from litgpt.args import LogArgs
from litgpt.config import Config
from litgpt.errors import UserError, did_you_mean, optional
from litgpt.hardware import compute_dtype, find_device, keep_freed_memory, parse_devices, training_fits
from litgpt.model import GPT

# Dtypes


@dataclass(frozen=True)
class Precision:
    """What one value of `--precision` means in training."""

    fabric: str  # what Fabric is told: never "bf16-true", which casts every parameter and every floating buffer
    frozen: torch.dtype
    trained: torch.dtype


MAX_CPU_PROCESSES = 8  # more than there are processors are of use only for trying things out
PRECISIONS = {
    "32-true": Precision("32-true", torch.float32, torch.float32),
    "bf16-mixed": Precision("bf16-mixed", torch.float32, torch.float32),
    "bf16-true": Precision("32-true", torch.bfloat16, torch.float32),
    "16-mixed": Precision("16-mixed", torch.float32, torch.float32),
    "16-true": Precision("16-mixed", torch.float16, torch.float32),  # gradients in fp16 need its scaler
}


def training_precision(precision: str | None, any_frozen: bool, accelerator: str = "auto") -> str:
    """Return the precision to train in, checked.

    Args:
        precision: A key of `PRECISIONS`. By default 32-true where products are fastest in fp32; else `bf16-true` if parts of
            the model are frozen (what is trained stays in fp32), and `bf16-mixed` if all of it is trained.
        any_frozen: Whether parts of the model are frozen, as with LoRA.
        accelerator: As `find_device` takes it.

    Raises:
        UserError: There is no such precision, or it does not run on this device.
    """
    if precision is None:
        if compute_dtype(accelerator) == torch.float32:
            return "32-true"
        return "bf16-true" if any_frozen else "bf16-mixed"
    if precision not in PRECISIONS:
        raise UserError(
            f"`precision` is one of {', '.join(PRECISIONS)} in training, but got {precision!r}.{did_you_mean(precision, PRECISIONS)}"
        )
    if PRECISIONS[precision].fabric == "16-mixed" and find_device(accelerator).type == "cpu":  # Fabric would put bf16 in its place
        raise UserError(f"`precision` {precision} runs on GPUs only. Use {precision.replace('16', 'bf16')} or 32-true.")
    if precision == "16-true" and not any_frozen:
        raise UserError("`precision` 16-true is for models that stay as they are: fp16 is too coarse for weights that learn. Use 16-mixed.")
    return precision


def cast_parameters(model: nn.Module, precision: str) -> None:
    """Give frozen and trained parameters the dtypes that the precision says; buffers (RoPE tables) keep theirs.

    Call it before `setup_module`. A model that is trained whole has no frozen parts to make small: asked for bf16-true, it holds
    all in bf16, the optimizer's averages included.
    """
    policy = PRECISIONS[precision]
    any_frozen = not all(parameter.requires_grad for parameter in model.parameters())
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(policy.trained if parameter.requires_grad and any_frozen else policy.frozen)


# Processes


def fits_each_device(
    config: Config, any_frozen: bool, precision: str, devices: int | str, num_nodes: int = 1, frozen_bytes: float | None = None
) -> bool:
    """Say whether each of several devices can hold a training whole; true for one, which has no choice.

    Args:
        config: Of the model.
        any_frozen: Whether the model itself is frozen; what is trained beside it hardly counts.
        precision: A key of `PRECISIONS`.
        devices: As `launch_fabric` takes it.
        num_nodes: How many machines.
        frozen_bytes: The size of a frozen parameter, where it is held in fewer bits than the precision says.
    """
    device, n_local = find_device(), parse_devices(devices)
    if n_local * num_nodes <= 1:
        return True
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in GPT(config).parameters())
    n_trained, n_frozen = (0, n_parameters) if any_frozen else (n_parameters, 0)
    size = PRECISIONS[precision].frozen.itemsize  # that of a model which is trained whole, too
    return training_fits(n_trained, n_frozen, device, frozen_bytes or size, size, n_sharing=n_local if device.type == "cpu" else 1)


def launch_fabric(
    devices: int | str = 1,
    num_nodes: int = 1,
    accelerator: str = "auto",
    strategy: str = "auto",
    precision: str = "32-true",
    tensor_parallel: int = 1,
    cpu_offload: bool = False,
    fits_one_device: bool = True,
    loggers: Logger | Sequence[Logger] = (),
) -> Fabric:
    """Return the launched Fabric that the flags describe.

    Args:
        devices: Processes on each machine, one for each device; "auto" takes all GPUs.
        num_nodes: How many machines.
        accelerator: As `find_device` takes it.
        strategy: `ddp`, `fsdp`, or `auto`: one process alone, else DDP if weights, gradients and optimizer fit one device.
        precision: A key of `PRECISIONS`; `cast_parameters` carries out the rest of it.
        tensor_parallel: How many processes hold one copy of a layer together.
        cpu_offload: Keep the sharded weights, gradients and optimizer in the CPU's memory. Needs `fsdp`.
        fits_one_device: What `fits_each_device` says.
        loggers: Where `fabric.log_dict` writes.

    Raises:
        UserError: The flags contradict each other or this machine.
    """
    device, n_local = find_device(accelerator), parse_devices(devices, accelerator)
    if num_nodes < 1:
        raise UserError(f"`num_nodes` is a positive number, but got {num_nodes}.")
    if device.type != "cpu" and n_local > torch.accelerator.device_count():
        raise UserError(f"`devices` is {n_local}, but this machine has {torch.accelerator.device_count()}.")
    if device.type == "cpu" and n_local > max(MAX_CPU_PROCESSES, os.cpu_count() or 1):
        raise UserError(f"`devices` is {n_local}, but this machine has no GPU and {os.cpu_count()} processors. Use 1 or auto.")
    world = n_local * num_nodes
    if tensor_parallel < 1 or world % tensor_parallel:
        raise UserError(f"`tensor_parallel` must divide the number of processes, but {tensor_parallel} does not divide {world}.")
    if strategy == "auto":
        strategy = "fsdp" if tensor_parallel > 1 or (world > 1 and not fits_one_device) else "ddp"
    if cpu_offload and strategy != "fsdp":
        raise UserError(f"`cpu_offload` is a part of `--strategy fsdp`, but the strategy is {strategy!r}.")
    if PRECISIONS[precision].fabric == "16-mixed" and strategy == "fsdp":
        raise UserError(f"`precision` {precision} does not run with FSDP. Use {precision.replace('16', 'bf16')}.")
    _check_started(n_local, num_nodes)
    if on_cpu := device.type == "cpu":
        keep_freed_memory()
    with _quiet(), _own_threads(n_local):
        fabric = Fabric(
            accelerator=device.type,
            devices=n_local,
            num_nodes=num_nodes,
            precision=PRECISIONS[precision].fabric,
            strategy=_strategy(strategy, world, tensor_parallel, cpu_offload, on_cpu),
            loggers=list(loggers) if isinstance(loggers, Sequence) else loggers,
        )
        fabric.launch()
    return fabric


def check_alone(option: str) -> None:
    """Raise a UserError if torchrun or SLURM's srun started several processes for what one does."""
    starter, n_started, _ = _started()
    if n_started > 1:
        raise UserError(f"`{option}` is for one process, but {starter} started {n_started}. Run the same command without {starter}.")


def _started() -> tuple[str, int, int]:
    """Return what started this process together with others, how many those are, and how many of them are here; or nothing, 0 and 0."""
    if dist.is_torchelastic_launched():
        return "torchrun", int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError("SLURM's `--ntasks` does not say how many processes each machine gets. Give it `--ntasks-per-node` instead.")
        n_started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # which only srun sets: a batch script itself is one process
        return "SLURM", n_started, max(1, n_started // int(os.environ.get("SLURM_STEP_NUM_NODES", "1")))
    return "", 0, 0


def _check_started(n_local: int, num_nodes: int) -> None:
    """Refuse other numbers than those of the processes that torchrun or SLURM's srun started: some would train alone, or wait for ever."""
    starter, n_started, n_here = _started()
    if not n_started:
        return
    if (n_here, n_started) != (n_local, n_local * num_nodes):
        raise UserError(
            f"`devices` is {n_local} and `num_nodes` {num_nodes}, but {starter} started {n_started} processes, {n_here} of them here. "
            f"Give `--devices {n_here} --num_nodes {n_started // n_here}`, or start as many as you mean."
        )
    if starter == "SLURM" and n_started > 1:  # for as many Lightning wants the job to be
        asked = int(os.environ.get("SLURM_NTASKS_PER_NODE", n_local)), int(os.environ.get("SLURM_NNODES", num_nodes))
        if asked != (n_local, num_nodes):
            raise UserError(
                f"`devices` is {n_local} and `num_nodes` {num_nodes}, but SLURM was asked for {asked[0]} processes on each of {asked[1]} "
                f"machines. Ask it for `--nodes {num_nodes} --ntasks-per-node {n_local}`."
            )


def _strategy(name: str, world: int, tensor_parallel: int, cpu_offload: bool, on_cpu: bool) -> Strategy | str:
    if name == "fsdp":
        offload = CPUOffloadPolicy(pin_memory=not on_cpu) if cpu_offload else OffloadPolicy()  # its default pins, which needs a GPU
        sizes = dict(
            data_parallel_size=world // tensor_parallel, tensor_parallel_size=tensor_parallel
        )  # "auto" makes all of them tensor parallel
        return ModelParallelStrategy(layout(offload), **sizes)
    if name != "ddp":
        raise UserError(f"`strategy` is auto, ddp or fsdp, but got {name!r}.{did_you_mean(name, ('auto', 'ddp', 'fsdp'))}")
    if world == 1:
        return "auto"
    parameters = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # its name before torch 2.13
    return DDPStrategy(gradient_as_bucket_view=True, **{buffers: False})


def layout(offload: OffloadPolicy) -> Callable[[nn.Module, DeviceMesh], nn.Module]:
    """Return how Fabric lays a model over its mesh: tensor parallel inside, FSDP2 around it, each block a group.

    Embedding and head are never wrapped on their own: they may be one matrix.
    """

    def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
        if tensor.size() > 1:
            parallelize_module(model, tensor, model.tensor_parallel_plan())
        if data.size() > 1 or tensor.size() == 1:
            for module in [*model.transformer.h, model]:  # quantized weights are buffers, which every process keeps whole
                fully_shard(module, mesh=data, offload_policy=offload)
        return model

    return parallelize


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Fabric from telling what it is about to do; its warnings are still heard."""
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]  # its rank_zero_info uses either
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _own_threads(n_local: int) -> Iterator[None]:
    """Keep torch's number of threads if one process has the machine to itself: another number can change a result's last bits."""
    if n_local > 1 or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


# Loggers


def choose_logger(name: str, out_dir: Path, run_name: str, log: LogArgs | None = None) -> Logger:
    """Return the logger that `--logger_name` asks for.

    Args:
        name: `csv` writes files below `out_dir/logs/csv`, `tensorboard` below `out_dir/logs/tensorboard`; wandb, mlflow and
            litlogger send the run where they are configured to.
        out_dir: The run's folder.
        run_name: What the run is called where neither `log` nor, for wandb, WANDB_RUN_NAME has a better name.
        log: Names and switches for the last three.

    Raises:
        UserError: There is no such logger, or its package is not installed.
    """
    if name not in LOGGERS:
        raise UserError(f"`logger_name` is one of {', '.join(LOGGERS)}, but got {name!r}.{did_you_mean(name, LOGGERS)}")
    return LOGGERS[name](out_dir, run_name, log or LogArgs())


def _csv(out_dir: Path, run_name: str, log: LogArgs) -> Logger:
    return CSVLogger(out_dir / "logs", name="csv", flush_logs_every_n_steps=1)


def _tensorboard(out_dir: Path, run_name: str, log: LogArgs) -> Logger:
    optional("tensorboard", "all")
    return TensorBoardLogger(out_dir / "logs", name="tensorboard")


def _wandb(out_dir: Path, run_name: str, log: LogArgs) -> Logger:
    optional("wandb", "wandb")
    name = log.run or os.environ.get("WANDB_RUN_NAME") or os.environ.get("WANDB_NAME") or run_name
    project = log.project or os.environ.get("WANDB_PROJECT") or "litgpt"
    given = _given(group=log.group or os.environ.get("WANDB_RUN_GROUP"), config=log.metadata, checkpoint_name=log.checkpoint_name)
    return WandbLogger(save_dir=out_dir, name=name, project=project, log_model=log.log_model, **given)


def _mlflow(out_dir: Path, run_name: str, log: LogArgs) -> Logger:
    optional("mlflow", "mlflow")
    return MLFlowLogger(experiment_name=log.project or run_name, log_model=log.log_model, **_given(run_name=log.run, tags=log.metadata))


def _litlogger(out_dir: Path, run_name: str, log: LogArgs) -> Logger:
    optional("litlogger", "litlogger")
    given = _given(teamspace=log.teamspace, metadata=log.metadata, checkpoint_name=log.checkpoint_name)
    return LitLogger(root_dir=out_dir, name=log.run or log.project or run_name, log_model=log.log_model, save_logs=log.save_logs, **given)


def upload(logger: Logger, folder: Path, log: LogArgs) -> None:
    """Send a checkpoint directory where the logger sends the run, if `log.log_model` says so; `csv` and `tensorboard` send nothing."""
    if not log.log_model:
        return
    if isinstance(logger, WandbLogger):
        artifact = optional("wandb", "wandb").Artifact(log.checkpoint_name or f"model-{logger.version}", type="model")
        artifact.add_dir(str(folder))
        logger.experiment.log_artifact(artifact)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifacts(logger.run_id, str(folder), log.checkpoint_name or folder.name)
    elif isinstance(logger, LitLogger):
        logger.log_model_artifact(str(folder))


def _given(**settings: Any) -> dict[str, Any]:
    """Return the settings that have a value, so that the others keep the logger's defaults and environment variables."""
    return {name: value for name, value in settings.items() if value is not None}


LOGGERS: dict[str, Callable[[Path, str, LogArgs], Logger]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "litlogger": _litlogger,
}
