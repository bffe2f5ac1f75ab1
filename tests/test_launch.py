"""A Fabric from flags, and what it may not do: print, or change the number of threads. Dtypes and two ranks: test_training."""

import csv
import logging
import os
import sys
from pathlib import Path

import pytest
import torch

from litgpt import hardware, launch
from litgpt.args import LogArgs
from litgpt.config import Config
from litgpt.errors import UserError

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
        (dict(precision="16-mixed", strategy="fsdp"), "does not run with FSDP"),
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


def test_a_wrong_precision_is_one_sentence():
    with pytest.raises(UserError, match="Did you mean 'bf16-true'"):
        launch.training_precision("bf16true", any_frozen=True)
    with pytest.raises(UserError, match="GPUs only"):
        launch.training_precision("16-mixed", any_frozen=True, accelerator="cpu")


def test_casting_keeps_whole_numbers_and_buffers():
    model = torch.nn.Linear(2, 2)
    model.packed = torch.nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    model.register_buffer("table", torch.ones(2))
    model.weight.requires_grad_(False)
    launch.cast_parameters(model, "bf16-true")
    kinds = (model.weight.dtype, model.bias.dtype, model.packed.dtype, model.table.dtype)
    assert kinds == (torch.bfloat16, torch.float32, torch.uint8, torch.float32)


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
