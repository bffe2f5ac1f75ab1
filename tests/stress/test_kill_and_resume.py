"""Runs killed at random moments, and killed again while they go on. By hand: `STRESS_POINTS=30 pytest -s -m stress tests/stress`."""

import csv
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune.run_and_kill import run_and_kill_after
from safetensors.torch import load_file
from speaking import make_checkpoint

from litgpt import pretrain
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import JSON, TextFiles
from litgpt.finetune import full, lora
from litgpt.metrics import Journal
from litgpt.run_state import latest_step

N_POINTS = int(os.environ.get("STRESS_POINTS", 30))  # kills of each kind of run
SEED = int(os.environ.get("STRESS_SEED", 0))
N_STEPS = 24
SAVED = dict(save_interval=2, keep_last=2, max_steps=N_STEPS, global_batch_size=4, micro_batch_size=2)


def finetuning(folder: Path) -> tuple[Any, list, dict]:
    """Function, arguments and options of a LoRA run."""
    base, file = make_checkpoint(folder / "base"), folder / "samples.json"
    file.write_text(json.dumps([{"instruction": f"Say {i}", "output": "yes " * (1 + i % 5)} for i in range(20)]))
    eval = EvalArgs(interval=5, max_new_tokens=None)
    return lora, [base], dict(data=JSON(json_path=file, val_split_fraction=0.1), train=TrainArgs(**SAVED), eval=eval)


def in_few_bits(folder: Path) -> tuple[Any, list, dict]:
    """The same of a run that trains everything, remembers in 8 bits and saves the best too."""
    _, args, options = finetuning(folder)
    eval = EvalArgs(interval=5, max_new_tokens=None, save_best=True)
    return full, args, options | dict(eval=eval, optimizer=OptimizerArgs(lr=1e-3, state="8bit"))


def pretraining(folder: Path) -> tuple[Any, list, dict]:
    """The same of a pretraining run."""
    base, draw = make_checkpoint(folder / "base", context=64), random.Random(0)
    (folder / "texts").mkdir()
    (folder / "texts" / "text.txt").write_text(" ".join(draw.choice(["the", "llama", "eats", "grass", "hay"]) for _ in range(2500)))
    tiny = Config(name="tiny", block_size=64, n_layer=2, n_embd=32, n_head=4, intermediate_size=64, padded_vocab_size=320)
    data = TextFiles(train_data_path=folder / "texts", num_workers=0)
    settings = dict(data=data, train=TrainArgs(**SAVED), eval=EvalArgs(interval=5), devices=1, logger_name="csv")
    return pretrain, ["tiny"], settings | dict(model_config=tiny, tokenizer_dir=base)


def results(out_dir: Path) -> dict[str, bytes]:
    """All weights that a run ended with, as bytes."""
    files = sorted((out_dir / "final").rglob("*.safetensors"))
    return {f"{file.name}/{name}": tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()}


def log_files(out_dir: Path) -> set[Path]:
    """One file for each process that logged."""
    return set((out_dir / "logs" / "csv").rglob("metrics.csv"))


def logged(files: set[Path]) -> dict[tuple[str, str], str]:
    """What files say of steps, but for times: (step, column) -> value."""
    found = {}
    columns = ("loss", "grad_norm", "learning_rate", "total_tokens", "val_loss")
    for path in files:
        with open(path) as file:
            for row in csv.DictReader(file):
                found |= {(row["step"], column): row[column] for column in columns if row.get(column)}
    return found


def journal(out_dir: Path) -> list[tuple]:
    """What the run's own log says of steps and validations, which is kept over all its lives, but for times."""
    rows = Journal(out_dir / "logs" / "metrics.jsonl").rows()
    columns = ("step", "loss", "grad_norm", "learning_rate", "total_tokens", "val_loss")
    return [found for row in rows if any((found := tuple(map(row.get, columns)))[1:])]


def place_of(out_dir: Path) -> str:
    """Where in its life the run was killed, as its folder shows."""
    names = [path.name for path in out_dir.iterdir()]
    if any(name.startswith("final") and name.endswith(".tmp") for name in names):
        return "while the result was written"
    if any(name.endswith(".tmp") for name in names):
        return "while a step was saved"
    if "final" in names:
        return "after the result was written"
    return "between two saves" if latest_step(out_dir) else "before the first save"


@pytest.mark.stress
@pytest.mark.parametrize("kind", [finetuning, in_few_bits, pretraining], ids=["finetune_lora", "finetune_full", "pretrain"])
def test_a_run_that_is_killed_at_any_moment_goes_on_bit_for_bit(kind: Callable, tmp_path: Path):
    module, args, options = kind(tmp_path)
    options = dict(optimizer=OptimizerArgs(lr=1e-2)) | options | dict(precision="32-true", resume="auto")
    module.setup(*args, out_dir=tmp_path / "reference", **options)
    expected, log = results(tmp_path / "reference"), logged(log_files(tmp_path / "reference"))
    story = journal(tmp_path / "reference")
    assert [row[0] for row in story if row[1] is not None] == list(range(1, N_STEPS + 1))
    durations = []
    for name in ("first", "second", "third"):  # the first warms up
        code, seconds = run_and_kill_after(60, module.__name__, tmp_path / name, *args, **options)
        assert code == 0 and results(tmp_path / name) == expected
        durations.append(seconds)
    draw, places, killed, n_runs = random.Random(SEED), Counter(), tmp_path / "killed", 0
    while places.total() < N_POINTS:
        n_before = places.total()
        for _ in range(draw.choice((1, 1, 2, 3))):  # kills before it may end
            code, _ = run_and_kill_after(draw.uniform(0, min(durations)), module.__name__, killed, *args, **options)
            assert code in (0, -signal.SIGKILL)
            if code == 0:  # it was faster
                break
            places[place_of(killed)] += 1
        before = log_files(killed)
        n_runs += places.total() > n_before
        module.setup(*args, out_dir=killed, **options)
        assert results(killed) == expected, places
        assert logged(log_files(killed) - before).items() <= log.items() and not list(killed.glob("*.tmp")), places
        assert journal(killed) == story, "each step is told once, whatever was killed"
        shutil.rmtree(killed)
    lasting = f"{n_runs} runs of {min(durations):.2f} s"
    print(f"\n{module.__name__}: {places.total()} kills in {lasting}, all ended bit for bit alike. {dict(places)}")
