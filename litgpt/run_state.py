"""A step folder: everything a run needs to go on bit for bit, written at once or not at all.

`step-N/run_state/` holds one safetensors file for each process, and `state.json`. The files hold what is trained under the
model's own names, the optimizer's state as `optimizer/NAME/KEY` and the random generators as `generator/RANK/NAME`. A sharded
tensor is in several files, each with a slice; the files' metadata say where it begins.
"""

import inspect
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import FSDPModule
from torch.futures import Future
from torch.optim import Optimizer

from litgpt import names
from litgpt.errors import MissingFile, UserError, disk_error
from litgpt.files import begin_folder, cannot_write, is_file, put_in_place, read_json, sync
from litgpt.hardware import device_name, instruction_sets
from litgpt.optim import FirstNonFinite
from litgpt.weight_files import open_weights, step_files, step_slices

OPTIMIZER, GENERATOR = "optimizer/", "generator/"  # a parameter's name has no slash
SHARD = "shard-{:05d}.safetensors"
ANOTHER = "Resume from another step."


# Saving


def save_run_state(
    fabric: Fabric,
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    counters: dict[str, Any],
    side_files: Callable[[Path], None] | None = None,
    non_finite: FirstNonFinite | None = None,
) -> None:
    """Write `folder` (`step-N`): under its final name it is always complete. All ranks call this, and share the file system.

    Args:
        fabric: What the model was set up with.
        folder: Where to. A folder of that name is replaced.
        model: The wrapped or the bare model. If parts of it are frozen, only what is trained is saved.
        optimizer: Its optimizer.
        counters: Step, tokens and the like, as JSON values.
        side_files: Writes config, tokenizer and the like into the folder it is given. Called on one rank.
        non_finite: Asked first: a state that is spoilt is never saved.

    Raises:
        UserError: A step before had gradients that were not finite, or the disk is full or forbids writing. Nothing is left behind.
    """
    if non_finite is not None:
        non_finite.check()
    parameters = saved_parameters(model)
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    scalars: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{OPTIMIZER}{name}/{key}"] = value
    scaler = loss_scaler(fabric)
    state = {
        "counters": counters,
        "tensors": sorted(tensors),
        "optimizer": scalars,
        "groups": [_own_values(group, optimizer) for group in optimizer.param_groups],
        "scaler": None if scaler is None else scaler.state_dict(),
        "machine": _machine(fabric),
    }
    tensors |= {f"{GENERATOR}{fabric.global_rank}/{name}": state for name, state in generator_states().items()}
    writer = _StepWriter(folder, state, side_files)
    try:
        with _checkpoint_errors(folder, "written"):
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except BaseException:
        if fabric.is_global_zero and writer.begun:
            shutil.rmtree(writer.partial, ignore_errors=True)
        raise


class _StepWriter(StorageWriter):
    """Writes safetensors as torch's Hugging Face reader reads them, atomically, and without a copy of all tensors in memory.

    What torch calls on one rank only is done here, so an error on any rank is raised on all of them and nobody waits for ever.
    """

    def __init__(self, folder: Path, state: dict[str, Any], side_files: Callable[[Path], None] | None) -> None:
        self.folder, self.state, self.side_files = folder, state, side_files
        self.partial = folder.with_name(folder.name + names.PARTIAL)
        self.begun = False

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any path will do."""
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up before the plans are known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On one rank, before any rank writes: make the folder, and number the ranks."""
        begin_folder(self.folder)
        self.begun = True
        (self.partial / names.RUN_STATE).mkdir()
        return [replace(plan, storage_data=i) for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On each rank: write what falls to it."""
        path = self.partial / names.RUN_STATE / SHARD.format(plan.storage_data)
        tensors = {item.index.fqn: planner.resolve_data(item).cpu().contiguous() for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in plan.items}
        assert len(tensors) == len(plan.items), "two pieces of one tensor on one rank"
        save_file(tensors, path, metadata={"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"})
        sync(path)
        written: Future[list[WriteResult]] = Future()
        written.set_result([])  # the reader finds everything in the files' headers
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On one rank, after all ranks wrote: add the rest, and give the folder its name."""
        state = _state_of(self.partial)
        if self.side_files is not None:
            self.side_files(self.partial)
        state.write_text(json.dumps(self.state | {"shards": len(results)}, indent=1))
        sync(*(path for path in self.partial.rglob("*") if path.suffix != ".safetensors"), self.partial)
        put_in_place(self.partial, self.folder)  # of the same step of a run that was resumed before it


def replace_counters(folder: Path, counters: dict[str, Any]) -> None:
    """Let a step folder hold other counters, at once. One rank calls this.

    Args:
        folder: A `step-N` that `save_run_state` wrote.
        counters: As it takes them.

    Raises:
        UserError: The disk is full or forbids writing. The folder stays as it was.
    """
    path = _state_of(folder)
    partial = path.with_name(path.name + names.PARTIAL)
    try:
        partial.write_text(json.dumps(_read_state(folder) | {"counters": counters}, indent=1))
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error


@contextmanager
def _checkpoint_errors(folder: Path, done: str) -> Iterator[None]:
    """Raise the error of the rank that met one, as a sentence if it is the disk's or the user's.

    Torch's CheckpointException is no Exception but a BaseException.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
            yield
    except dcp.api.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if message := disk_error(cause):
            raise UserError(f"{folder} could not be {done}: {message}") from cause
        if isinstance(cause, SafetensorError):
            raise UserError(f"{folder} could not be {done}: {cause}") from cause
        raise cause from error


# Loading


def load_run_state(fabric: Fabric, folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Fill model, optimizer and generators in place from a step folder, whatever the number of ranks; return the counters.

    The optimizer's settings are those of this run's flags, not of the saved run. Warns where the machine is another one, for then
    the results' last bits can be others too.

    Args:
        fabric: What the model was set up with.
        folder: A `step-N` that `save_run_state` wrote.
        model: The wrapped or the bare model.
        optimizer: Its optimizer.

    Raises:
        MissingFile: The folder holds no run state.
        UserError: It is damaged, or is that of another model or precision.
    """
    state = _read_state(folder)
    _check_shards(folder, state)
    reader = HuggingFaceStorageReader(str(folder / names.RUN_STATE))
    parameters = saved_parameters(model)
    saved = reader.read_metadata().state_dict_metadata
    held = {name for name in saved if not name.startswith((OPTIMIZER, GENERATOR))}
    if different := sorted(held ^ parameters.keys()):
        count = f"{len(different)} trained weights, first in {different[0]!r}"
        raise UserError(f"{folder} and this run differ in {count}. Resume with the model and the flags of that run.")
    for name, parameter in parameters.items():  # torch would convert in silence
        if (dtype := saved[name].properties.dtype) != parameter.dtype:
            raise UserError(f"{folder} holds {name!r} in {dtype}, not {parameter.dtype}. Resume with the `--precision` of that run.")
        if saved[name].size != parameter.shape:
            raise UserError(f"{folder} holds {name!r} in the shape {list(saved[name].size)}, not {list(parameter.shape)}.")
    _check_optimizer(folder, state, saved, parameters, optimizer)
    tensors = _places(fabric, saved, parameters, optimizer)
    with _checkpoint_errors(folder, "read"):
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    states = {name: value for name, value in (tensors | state["optimizer"]).items() if name.startswith(OPTIMIZER)}
    for name, value in states.items():
        name, key = name.removeprefix(OPTIMIZER).rsplit("/", 1)
        optimizer.state[parameters[name]][key] = value
    for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(values)
    if (scaler := loss_scaler(fabric)) is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    try:
        restore_generators({name.rsplit("/", 1)[1]: value for name, value in tensors.items() if name.startswith(GENERATOR)})
    except (ValueError, TypeError, KeyError, RuntimeError):  # of Python, numpy or torch: the bytes are no state of theirs
        raise UserError(f"{folder} is damaged: it holds no state of the random generators. {ANOTHER}") from None
    _warn_of_differences(fabric, folder, state["machine"])
    return state["counters"]


def saved_counters(folder: Path) -> dict[str, Any]:
    """Return the counters of a step folder, as `load_run_state` does, and read no tensor.

    Raises:
        MissingFile: The folder holds no run state.
        UserError: It is damaged.
    """
    return _read_state(folder)["counters"]


def saved_precision(resumed: Path | None) -> str | None:
    """Return the precision of a step that is resumed, for the one that this machine would choose today may be another; None without it."""
    saved = None if resumed is None else saved_counters(resumed).get("precision")
    return saved if isinstance(saved, str) else None


def _state_of(folder: Path) -> Path:
    return folder / names.RUN_STATE / names.STATE


def _read_state(folder: Path) -> dict[str, Any]:
    path = _state_of(folder)
    if not is_file(path):
        raise MissingFile(f"{folder} holds no run state. Name a folder such as {names.STEP.format(100)} that a training command wrote.")
    state = read_json(path, way=ANOTHER)
    kinds = {"counters": dict, "tensors": list, "shards": int, "optimizer": dict, "groups": list, "scaler": dict | None, "machine": dict}
    for key, kind in kinds.items():
        if key not in state or not isinstance(state[key], kind):
            raise UserError(f"{path} is damaged: its {key!r} is missing or of the wrong type. {ANOTHER}")
    return state


def _check_shards(folder: Path, state: dict[str, Any]) -> None:
    """Refuse files that are damaged, do not say what they hold, or are fewer than were written."""
    files = step_files(folder)
    for file in files:
        with open_weights(file, way=ANOTHER) as opened:
            step_slices(opened, file)
    if len(files) != state["shards"]:
        raise UserError(f"{folder} is damaged: of {state['shards']} files with tensors it holds {len(files)}. {ANOTHER}")


def _check_optimizer(
    folder: Path, state: dict[str, Any], saved: dict[str, Any], parameters: dict[str, nn.Parameter], optimizer: Optimizer
) -> None:
    """Refuse a step that lacks what its optimizer had learned, or has it for other weights."""
    if lost := [name for name in map(str, state["tensors"]) if name not in saved]:
        raise UserError(f"{folder} is damaged: it lacks {len(lost)} tensors of the optimizer, first {lost[0]!r}. {ANOTHER}")
    for name in (name for name in (*saved, *state["optimizer"]) if name.startswith(OPTIMIZER)):
        if name.removeprefix(OPTIMIZER).rpartition("/")[0] not in parameters:
            raise UserError(f"{folder} is damaged: it holds {name!r}, which belongs to no trained weight. {ANOTHER}")
    if [type(values) for values in state["groups"]] != [dict] * len(optimizer.param_groups):
        raise UserError(f"{folder} holds {len(state['groups'])} groups of weights, not {len(optimizer.param_groups)}. {ANOTHER}")


def _places(fabric: Fabric, saved: dict[str, Any], parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the tensors to fill: the parameters, laid out as they are; their optimizer states alike; this rank's generators."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, described in saved.items():
        if name.startswith(OPTIMIZER):
            name_of_parameter, key = name.removeprefix(OPTIMIZER).rsplit("/", 1)
            parameter = parameters[name_of_parameter]
            on_cpu = key == "step" and not any(group_of[parameter].get(option) for option in ("fused", "capturable"))  # as torch wants it
            tensors[name] = _place_beside(parameter.detach(), described.size, described.properties.dtype, on_cpu)
        elif name.startswith(f"{GENERATOR}{fabric.global_rank}/"):
            tensors[name] = torch.empty(described.size, dtype=torch.uint8)
    return tensors


def _place_beside(parameter: Tensor, size: torch.Size, dtype: torch.dtype, on_cpu: bool) -> Tensor:
    """Return an empty tensor for what an optimizer remembers of a parameter, cut over ranks as that is if it has as many rows."""
    if on_cpu:
        return torch.empty(size, dtype=dtype)
    if size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    if len(size) == parameter.ndim >= 2 and size[:-1] == parameter.shape[:-1] and size[-1] <= parameter.shape[-1]:
        return torch.empty_like(parameter[..., : size[-1]], dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty(size, dtype=dtype, device=parameter.device)


def latest_step(out_dir: Path) -> Path | None:
    """Return the complete step folder that a run goes on from, or None: the one with the highest number.

    But if the run went back to an earlier one, that: `last` names it, and is younger than the steps of the way that was left.
    """
    pattern = names.STEP.replace("{:06d}", r"(\d+)")
    found = ((re.fullmatch(pattern, path.name), path) for path in out_dir.glob("*"))
    whole = [path for _, path in sorted((int(match[1]), path) for match, path in found if match and _state_of(path).is_file())]
    link = out_dir / names.LAST
    if link.is_symlink() and (named := out_dir / os.readlink(link)) in whole:
        later, went_back = whole[whole.index(named) + 1 :], link.lstat().st_mtime_ns
        return next((path for path in reversed(later) if _state_of(path).stat().st_mtime_ns >= went_back), named)
    return whole[-1] if whole else None


# What a state consists of


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters under the model's own names, each once, sharded where FSDP2 shards them."""
    model = getattr(model, "module", model)  # out of Fabric's wrapper, which has DDP's inside
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass without backward the root still shows its whole weights
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_scaler(fabric: Fabric) -> torch.amp.GradScaler | None:
    """Return what keeps fp16 gradients from vanishing, or None under every other precision."""
    return getattr(fabric.strategy.precision, "scaler", None)


def generator_states() -> dict[str, Tensor]:
    """Return the state of every random generator of this process, as uint8."""
    kind, keys, *rest = np.random.get_state()
    plain = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    states = {name: torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8) for name, value in plain.items()}
    states["torch"] = torch.get_rng_state()
    if (kind := _accelerator()) is not None:
        states[kind] = torch.get_device_module(kind).get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    """Undo `generator_states`; a rank that the saved run did not have keeps the seed it has."""
    if "python" in states:
        version, keys, gauss = json.loads(bytes(states["python"].tolist()))
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(json.loads(bytes(states["numpy"].tolist()))))
        torch.set_rng_state(states["torch"])
    if (kind := _accelerator()) in states:
        torch.get_device_module(kind).set_rng_state(states[kind])


def _accelerator() -> str | None:
    """Return the kind of device beside the CPU that this machine has, which draws from a generator of its own: cuda, mps, xpu."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None


def _own_values(group: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer counts in a group, which is not among its settings: those are the arguments of its class."""
    settings = inspect.signature(type(getattr(optimizer, "optimizer", optimizer))).parameters  # out of Fabric's wrapper
    return {key: value for key, value in group.items() if key not in ("params", "lr_ratio", *settings)}


def _machine(fabric: Fabric) -> dict[str, Any]:
    """Return what the last bits of a result depend on."""
    return {
        "device": device_name(fabric.device),
        "CPU instruction sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "processes": fabric.world_size,
        "torch": torch.__version__,
    }


def _warn_of_differences(fabric: Fabric, folder: Path, saved: dict[str, Any]) -> None:
    here = _machine(fabric)
    if different := [f"{key} {saved.get(key)!r}, here {value!r}" for key, value in here.items() if saved.get(key) != value]:
        if fabric.is_global_zero:
            warnings.warn(f"{folder} was saved elsewhere, so results can differ in their last bits: {'; '.join(different)}.", stacklevel=3)
