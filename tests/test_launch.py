"""A Fabric from flags, and what it may not do: print, or change the number of threads. Dtypes and two ranks: test_training."""

import csv
import inspect
import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from litgpt import hardware, launch, training
from litgpt.args import LogArgs
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.optim import FirstNonFinite
from litgpt.run_folder import run_folder

sys.path.insert(0, str(Path(__file__).parent))
import workers


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(devices=0), "`devices` is a positive number"),
        (dict(num_nodes=0), "`num_nodes`"),
        (dict(strategy="fdsp"), "Did you mean 'fsdp'"),
        ({"devices": 99}, "`devices` is 99"),
        (dict(devices=3, tensor_parallel=2), "2 does not divide 3"),
        (dict(cpu_offload=True), "a part of `--strategy fsdp`"),
        (dict(precision="16-mixed", strategy="fsdp"), "does not run with FSDP. Use bf16-mixed"),
        (dict(precision="16-true", strategy="fsdp"), "does not run with FSDP. Use bf16-true"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_sentence(flags, words):
    with pytest.raises(UserError, match=words):
        launch.launch_fabric(accelerator="cpu", **flags)


@pytest.mark.parametrize(
    ("flags", "memory_gb", "expected"),
    [  # one billion parameters
        (dict(), 1, True),  # a single device has no choice
        (dict(devices=2), 44, True),  # 16 GB each of 0.8 * 44 / 2
        (dict(devices=2), 36, False),
        (dict(num_nodes=2), 22, True),
        (dict(num_nodes=2), 18, False),
        (dict(num_nodes=2, any_frozen=True), 6, True),  # 4 GB
        (dict(num_nodes=2, any_frozen=True), 4, False),
        (dict(num_nodes=2, any_frozen=True, precision="bf16-true"), 4, True),
        (dict(num_nodes=2, precision="bf16-true"), 11, True),  # 8 GB
        (dict(num_nodes=2, any_frozen=True, frozen_bytes=0.5), 1, True),
        (dict(num_nodes=2, any_frozen=True, frozen_bytes=0.5), 0.6, False),
    ],
    ids=str,
)
def test_a_training_is_shared_out_if_weights_gradients_and_averages_do_not_fit(monkeypatch, flags, memory_gb, expected):
    monkeypatch.setattr(hardware, "device_memory_gb", lambda device: memory_gb)
    monkeypatch.setattr(launch, "find_device", lambda accelerator="auto": torch.device("cpu"))
    config = Config(n_layer=1, n_embd=1000, n_head=5, padded_vocab_size=500_000)  # most of them in embedding and head
    given = dict(any_frozen=False, precision="32-true", devices=1) | flags
    assert launch.fits_each_device(config, **given) is expected


def test_launching_prints_nothing_and_leaves_threads_loggers_and_environment_alone(capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    level = logging.getLogger("lightning.fabric").level
    torch.set_num_threads(1)
    launch.launch_fabric(accelerator="cpu", precision="bf16-mixed")
    assert torch.get_num_threads() == 1 and "OMP_NUM_THREADS" not in os.environ
    assert logging.getLogger("lightning.fabric").level == level
    assert capfd.readouterr() == ("", "")


def test_two_ranks_say_nothing_either(tmp_path):
    assert workers.run_ranks("said", 2, file=str(tmp_path / "said"), n_steps=1, save_every=1, out_dir=str(tmp_path)) == ["", ""]


@pytest.mark.parametrize(
    ("native", "frozen", "whole"), [(torch.bfloat16, "bf16-true", "bf16-mixed"), (torch.float32, "32-true", "32-true")]
)
def test_the_precision_by_default_follows_the_machine(monkeypatch, native, frozen, whole):
    monkeypatch.setattr(launch, "compute_dtype", lambda accelerator: native)
    assert launch.training_precision(None, any_frozen=True) == frozen
    assert launch.training_precision(None, any_frozen=False) == whole
    assert launch.training_precision("32-true", any_frozen=True) == "32-true"


@pytest.mark.parametrize("name", launch.PRECISIONS)
def test_every_precision_is_taken_where_a_gpu_is(monkeypatch, name):
    monkeypatch.setattr(launch, "find_device", lambda accelerator="auto": torch.device("cuda"))
    assert launch.training_precision(name, any_frozen=True) == name
    assert set(launch.PRECISIONS) == {"32-true", "16-true", "16-mixed", "bf16-true", "bf16-mixed"}


def test_a_wrong_precision_is_one_sentence(monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'bf16-true'"):
        launch.training_precision("bf16true", any_frozen=True)
    for name in ("16-mixed", "16-true"):
        with pytest.raises(UserError, match=f"{name} runs on GPUs only. Use b{name.replace('16', 'f16')} or 32-true"):
            launch.training_precision(name, any_frozen=True, accelerator="cpu")
    monkeypatch.setattr(launch, "find_device", lambda accelerator="auto": torch.device("cuda"))
    with pytest.raises(UserError, match="too coarse for weights that learn. Use 16-mixed"):
        launch.training_precision("16-true", any_frozen=False)


def test_fp16_holds_what_is_frozen_and_what_is_trained_stays_wide():
    model = workers.build("lora")
    launch.cast_parameters(model, "16-true")
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.float16)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 is for GPUs")
@pytest.mark.parametrize("precision", ["16-true", "16-mixed", "bf16-true", "bf16-mixed"])
def test_on_a_gpu_every_precision_learns_what_fp32_does(precision):
    def losses(precision: str) -> list[float]:
        fabric = launch.launch_fabric(accelerator="cuda", precision=precision)
        model = workers.build("lora")
        launch.cast_parameters(model, precision)
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2))
        found, flags = [], FirstNonFinite(fabric.device)
        for step in range(1, 11):
            batches = training.microbatches_of(workers.samples(16, seed=step), 8)
            found.append(training.forward_backward(fabric, model, batches, 100).item())
            training.take_step(fabric, model, optimizer, step, 1e-2, 1.0, flags)
        return found

    assert losses(precision) == pytest.approx(losses("32-true"), rel=0.05)


def test_casting_keeps_whole_numbers_and_buffers():
    model = torch.nn.Linear(2, 2)
    model.packed = torch.nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    model.register_buffer("table", torch.ones(2))
    model.weight.requires_grad_(False)
    launch.cast_parameters(model, "bf16-true")
    kinds = (model.weight.dtype, model.bias.dtype, model.packed.dtype, model.table.dtype)
    assert kinds == (torch.bfloat16, torch.float32, torch.uint8, torch.float32)


# Started by others

TORCHRUN = dict(TORCHELASTIC_RUN_ID="x", RANK=0, LOCAL_RANK=0, GROUP_RANK=0)
SLURM = dict(
    SLURM_JOB_NAME="train", SLURM_NTASKS=4, SLURM_NTASKS_PER_NODE=2, SLURM_NNODES=2, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NODEID=0
)


@pytest.mark.parametrize(
    ("started", "flags", "advice"),
    [
        (TORCHRUN | dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2), dict(), "torchrun started 2 processes.*--devices 2 --num_nodes 1"),
        (TORCHRUN | dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2), dict(devices=2, num_nodes=2), "--devices 2 --num_nodes 1"),
        (TORCHRUN | dict(WORLD_SIZE=4, LOCAL_WORLD_SIZE=2), dict(devices=4), "--devices 2 --num_nodes 2"),
        (TORCHRUN | dict(WORLD_SIZE=1, LOCAL_WORLD_SIZE=1), dict(devices=2), "--devices 1 --num_nodes 1"),
        (SLURM | dict(SLURM_STEP_NUM_TASKS=4, SLURM_STEP_NUM_NODES=2), dict(), "SLURM started 4 processes.*--devices 2 --num_nodes 2"),
        (SLURM, dict(devices=2, num_nodes=2), "SLURM started 1 processes"),  # the batch script itself, without srun
        (
            SLURM | dict(SLURM_STEP_NUM_TASKS=2),
            dict(devices=2),
            "for 2 processes on each of 2 machines.*`--nodes 1 --ntasks-per-node 2`",
        ),
        (dict(SLURM_NTASKS=2, SLURM_STEP_NUM_TASKS=2), dict(devices=2), "`--ntasks` does not say how many .* `--ntasks-per-node` instead"),
    ],
    ids=str,
)
def test_numbers_that_differ_from_what_was_started_are_refused_for_they_would_hang_or_train_alone(monkeypatch, started, flags, advice):
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=advice):
        launch.launch_fabric(accelerator="cpu", **flags)


@pytest.mark.parametrize("started", [TORCHRUN | dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2), SLURM | dict(SLURM_STEP_NUM_TASKS=2)], ids=str)
def test_what_one_process_does_is_refused_where_several_were_started(monkeypatch, started):
    launch.check_alone("dry_run")
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="^`dry_run` is for one process, but (torchrun|SLURM) started 2. Run the same command without"):
        launch.check_alone("dry_run")


def test_one_process_runs_under_torchrun_and_in_a_batch_script(monkeypatch):
    for started in (TORCHRUN | dict(WORLD_SIZE=1, LOCAL_WORLD_SIZE=1), SLURM):
        with monkeypatch.context() as patched:
            for name, value in started.items():
                patched.setenv(name, str(value))
            launch._check_started(n_local=1, num_nodes=1)


# Loggers


def logged(name: str, out_dir: Path) -> None:
    fabric = launch.launch_fabric(accelerator="cpu", loggers=launch.choose_logger(name, out_dir, "finetune-tiny"))
    fabric.log_dict({"loss": 2.5, "tokens": 7}, step=1)
    fabric.log_dict({"val_loss": 2.0}, step=1)
    fabric.log_dict({"loss": 1.5, "tokens": 14}, step=2)


def test_csv_rows_are_there_at_once(tmp_path):
    logged("csv", tmp_path)
    (file,) = (tmp_path / "logs" / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    assert [row["loss"] for row in rows if row["loss"]] == ["2.5", "1.5"]
    assert [row["val_loss"] for row in rows if row["val_loss"]] == ["2.0"]


def test_tensorboard_writes_events(tmp_path):
    logged("tensorboard", tmp_path)
    assert list((tmp_path / "logs" / "tensorboard").rglob("events.out.tfevents*"))


def test_a_wrong_or_missing_logger_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'tensorboard'"):
        launch.choose_logger("tensorbord", tmp_path, "run")
    for name in ("wandb", "mlflow", "litlogger"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(UserError, match=f"package '{name}'"):
            launch.choose_logger(name, tmp_path, "run", LogArgs(project="p"))


class Recorder:
    """Stands for a service's logger: what it was given, and what was sent to it."""

    version, run_id = "v7", "r1"

    def __init__(self, **given):
        self.given, self.sent = given, []
        self.experiment = self

    def __getattr__(self, name):
        return lambda *args: self.sent.append((name, *args))


LOG = dict(project="p", run="r", group="g", teamspace="t", metadata={"a": "b"}, checkpoint_name="c", log_model=True, save_logs=False)
GIVEN = {  # what each service gets of the fields that are set, and what if none is
    "wandb": (
        dict(save_dir=Path("out"), project="p", name="r", group="g", config={"a": "b"}, checkpoint_name="c", log_model=True),
        dict(save_dir=Path("out"), project="litgpt", name="finetune-tiny", log_model=False),
    ),
    "mlflow": (
        dict(experiment_name="p", run_name="r", tags={"a": "b"}, log_model=True),
        dict(experiment_name="finetune-tiny", log_model=False),
    ),
    "litlogger": (
        dict(root_dir=Path("out"), name="r", teamspace="t", metadata={"a": "b"}, checkpoint_name="c", log_model=True, save_logs=False),
        dict(root_dir=Path("out"), name="finetune-tiny", log_model=False, save_logs=True),
    ),
}
CLASSES = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger", "litlogger": "LitLogger"}


@pytest.fixture
def services(monkeypatch):
    """The services' loggers, without their packages."""
    for name in ("WANDB_RUN_NAME", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    artifact = type("Artifact", (Recorder,), {"__init__": lambda self, name, type: Recorder.__init__(self, name=name, type=type)})
    monkeypatch.setattr(launch, "optional", lambda module, extra: SimpleNamespace(Artifact=artifact))
    for name in CLASSES.values():
        monkeypatch.setattr(launch, name, type(name, (Recorder,), {}))


@pytest.mark.parametrize("name", GIVEN)
def test_every_field_of_the_log_options_reaches_its_service(services, name):
    every, none = GIVEN[name]
    assert launch.choose_logger(name, Path("out"), "finetune-tiny", LogArgs(**LOG)).given == every
    assert launch.choose_logger(name, Path("out"), "finetune-tiny", LogArgs()).given == none


def test_every_field_of_the_log_options_has_a_service():
    changed = {name for name, value in LOG.items() if value != getattr(LogArgs(), name)}
    assert changed == {field.name for field in fields(LogArgs)}
    given = repr([every for every, _ in GIVEN.values()])
    assert all(repr(value) in given for value in LOG.values())


def test_wandbs_environment_variables_name_run_group_and_project_unless_options_do(services, monkeypatch):
    for name, value in dict(WANDB_NAME="n0", WANDB_RUN_NAME="n", WANDB_RUN_GROUP="g0", WANDB_PROJECT="p0").items():
        monkeypatch.setenv(name, value)
    given = launch.choose_logger("wandb", Path("out"), "finetune-tiny").given
    assert (given["name"], given["group"], given["project"]) == ("n", "g0", "p0")
    given = launch.choose_logger("wandb", Path("out"), "finetune-tiny", LogArgs(**LOG)).given
    assert (given["name"], given["group"], given["project"]) == ("r", "g", "p")
    monkeypatch.delenv("WANDB_RUN_NAME")
    assert launch.choose_logger("wandb", Path("out"), "finetune-tiny").given["name"] == "n0"


def test_a_model_is_uploaded_if_the_options_say_so(services, tmp_path):
    folder = tmp_path / "final"
    for name in GIVEN:
        logger = launch.choose_logger(name, tmp_path, "finetune-tiny", LogArgs(**LOG))
        launch.upload(logger, folder, LogArgs())
        assert not logger.sent
        launch.upload(logger, folder, LogArgs(log_model=True))
        ((method, *sent),) = logger.sent
        if name == "wandb":
            (artifact,) = sent
            assert (artifact.given, artifact.sent) == (dict(name="model-v7", type="model"), [("add_dir", str(folder))])
        else:
            expected = {"mlflow": ("log_artifacts", "r1", str(folder), "final"), "litlogger": ("log_model_artifact", str(folder))}
            assert (method, *sent) == expected[name]
    launch.upload(launch.choose_logger("csv", tmp_path, "finetune-tiny"), folder, LogArgs(log_model=True))


def test_the_services_loggers_take_what_we_give_them():
    known = {name: inspect.signature(getattr(launch, name).__init__).parameters for name in CLASSES.values()}
    for name, (every, _) in GIVEN.items():
        own = known[CLASSES[name]]
        assert not set(every) - set(own) - ({"group", "config"} if "kwargs" in own else set())  # wandb's own function gets these two
    assert hasattr(launch.LitLogger, "log_model_artifact") and hasattr(launch.MLFlowLogger, "run_id")


def test_runs_are_written_below_the_artifacts_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", str(tmp_path))
    assert run_folder(Path("out/x")) == tmp_path / "out/x"
    logged("csv", run_folder(Path("out/x")))
    assert list((tmp_path / "out" / "x" / "logs").rglob("metrics.csv"))
    assert run_folder(tmp_path / "y") == tmp_path / "y"
