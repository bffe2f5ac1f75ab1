"""Runs that are killed, stopped and resumed; which steps they keep, what they say of a loss that is no number, and what they leave.

What a killed run leaves on the disk is copied in the middle of a whole one: the same files, for less time. Processes that really are
killed: test_finetune, and by the hundred tests/stress.
"""

import importlib
import json
import math
import os
import pkgutil
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import speaking
import torch
from deploy.browser import chromium
from finetune.run_and_kill import at_call, run_on_ranks
from lightning.fabric.plugins.precision import Precision
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

import litgpt.finetune
import litgpt.run
from litgpt import names
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.checkpoint import load_model, read_hyperparameters
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune import full, loop, lora
from litgpt.metrics import Journal
from litgpt.run import VOTE_EVERY
from litgpt.run_state import latest_step, saved_counters
from litgpt.training import StopRequest, steps

TRAIN = dict(global_batch_size=4, micro_batch_size=2, max_steps=5, save_interval=None)
EVAL = dict(interval=1000, max_new_tokens=None, final_validation=False)
N_TRAINED = 18  # of 20 samples
COLUMNS = ("step", "epoch", "loss", "grad_norm", "learning_rate", "total_tokens", "val_loss")  # what is the same in every run
METHODS = [
    module
    for found in pkgutil.iter_modules(litgpt.finetune.__path__)
    if hasattr(module := importlib.import_module(f"litgpt.finetune.{found.name}"), "setup")
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:  # three layers, for Adapter begins with the third
        patch.setattr(speaking, "LlamaConfig", lambda **settings: LlamaConfig(**settings | dict(num_hidden_layers=3)))
        return speaking.make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def run(base: Path, samples: Path, tmp_path: Path) -> Callable[..., Path]:
    """Finetunes the tiny model, with LoRA if no other method is named; returns the run's folder."""

    def run(out_dir: str = "out", train: dict = {}, eval: dict = {}, method: Any = lora, **options: Any) -> Path:  # noqa: B006
        method.setup(base, **arguments(samples, tmp_path / out_dir, train, eval) | options)
        return tmp_path / out_dir

    return run


def arguments(samples: Path, out_dir: Path, train: dict, eval: dict) -> dict[str, Any]:
    return dict(
        out_dir=out_dir,
        precision="32-true",
        data=JSON(json_path=samples, val_split_fraction=0.1),
        train=TrainArgs(**TRAIN | train),
        eval=EvalArgs(**EVAL | eval),
        optimizer=OptimizerArgs(lr=1e-2),
    )


@pytest.fixture(scope="module")
def one_step(base: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step, which tests copy."""
    out_dir = tmp_path_factory.mktemp("one") / "out"
    lora.setup(base, **arguments(samples, out_dir, dict(max_steps=1, save_interval=1), {}))
    return out_dir


@pytest.fixture
def done(one_step: Path, tmp_path: Path) -> Path:
    """The folder of a run whose one step is done."""
    return shutil.copytree(one_step, tmp_path / "out", symlinks=True)


@pytest.fixture
def val_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the validations to come find these losses."""

    def found(*losses: float) -> None:
        given = iter(losses)
        monkeypatch.setattr(litgpt.run, "validate", lambda *args: next(given))

    return found


def saved_steps(out_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in out_dir.glob("step-*") if (path / names.RUN_STATE / names.STATE).is_file())


def link(out_dir: Path, name: str) -> int:
    """The step that a link names."""
    target = os.readlink(out_dir / name)
    assert "/" not in target, "the run's folder may be moved"
    return int(target.removeprefix("step-"))


def logged(out_dir: Path) -> list[dict[str, Any]]:
    """What the run's journal says of steps and validations."""
    rows = Journal(out_dir / "logs" / "metrics.jsonl").rows()
    return [{column: row[column] for column in COLUMNS if column in row} for row in rows if {"loss", "val_loss"} & row.keys()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_result(one: Path, other: Path) -> None:
    ours, theirs = weights(one / "final"), weights(other / "final")
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert logged(one) == logged(other)


# What a run goes on from


@pytest.mark.parametrize(
    "change",
    [
        {"step": None},
        {"step": "2"},
        {"total_tokens": None},
        {"training_seconds": "x"},
        {"validations": [1]},
        {"validations": {"median": 1.0}},
        {"validations": {"best": "x"}},
        {"validations": {"lowest": "x"}},
    ],
    ids=str,
)
def test_a_step_whose_counters_are_damaged_is_refused_in_one_sentence(run, done: Path, change: dict):
    state = done / names.STEP.format(1) / names.RUN_STATE / names.STATE
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"counters": content["counters"] | change}))
    with pytest.raises(UserError, match="is damaged: its counters lack .* Resume from another step"):
        run(resume=True)


@pytest.mark.parametrize(
    ("options", "said"), [(dict(lora_r=4), "lora_r 8, not 4"), (dict(lora_plus_ratio=2.0), "lora_plus_ratio None, not 2.0")]
)
def test_an_option_that_changes_what_is_trained_is_named_rather_than_a_tensor(run, done: Path, options: dict, said: str):
    with pytest.raises(UserError, match=said):
        run(resume=True, **options)


def test_packing_is_named_where_it_changes_the_samples_of_a_resumed_run(run, done: Path):
    with pytest.raises(UserError, match="changed: train.packing true -> global"):
        run(train=dict(packing="global"), resume=True)


def test_a_file_in_the_place_of_the_logs_is_one_sentence(run, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "logs").touch()
    with pytest.raises(UserError, match="there is a file of this name"):
        run()


def test_a_mistake_that_the_first_rank_finds_ends_the_others_without_a_traceback(base: Path, samples: Path, tmp_path: Path):
    options = arguments(samples, tmp_path / "out", {}, {})
    codes = run_on_ranks("litgpt.finetune.lora", 2, base, **options | dict(data=JSON(json_path=tmp_path / "nowhere.json")))
    assert codes == [1, 2], "the first has the error, which the command line turns into a sentence and the code that the other has"


# Links, and which steps are kept


def test_as_many_steps_are_kept_as_asked_for_and_the_last_has_a_link(run):
    out_dir = run(train=dict(save_interval=1, keep_last=2))
    assert saved_steps(out_dir) == [4, 5] and link(out_dir, "last") == 5 and not (out_dir / "best").is_symlink()
    assert {path.name for path in out_dir.iterdir()} >= {"final", "last", "logs"} and not list(out_dir.glob("*.tmp"))


def test_the_step_with_the_lowest_validation_loss_has_a_link_and_is_never_deleted(run, val_losses):
    val_losses(3.0, 1.0, 2.0, 1.0, math.nan)
    out_dir = run(train=dict(save_interval=1, keep_last=1), eval=dict(interval=1))
    assert saved_steps(out_dir) == [2, 5] and link(out_dir, "best") == 2 and link(out_dir, "last") == 5


def test_only_a_step_whose_own_validation_was_the_lowest_is_called_the_best(run, val_losses):
    val_losses(1.0)
    out_dir = run(train=dict(save_interval=3, max_steps=6), eval=dict(interval=4))
    assert saved_steps(out_dir) == [3, 6] and not (out_dir / "best").exists()


def test_a_step_is_saved_whenever_it_is_the_best_so_far(run, val_losses):
    val_losses(3.0, 1.0, 2.0, 0.5, 0.7)
    out_dir = run(eval=dict(interval=1, save_best=True))
    assert saved_steps(out_dir) == [1, 2, 4] and link(out_dir, "best") == 4 == link(out_dir, "last")


def test_every_reader_takes_a_link_for_the_step_it_names(run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out_dir, ids = run(train=dict(save_interval=2, max_steps=4)), torch.arange(3, 23)[None]
    with torch.inference_mode():
        assert torch.equal(load_model(out_dir / "last")(ids), load_model(out_dir / "step-000004")(ids))
    capsys.readouterr()
    run(train=dict(save_interval=2), resume=out_dir / "last")
    assert f"Going on after step 4, from {out_dir / 'step-000004'}" in capsys.readouterr().out
    assert saved_steps(out_dir) == [2, 4] and [row["step"] for row in logged(out_dir)] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="`overwrite` would delete .*step-000004, but this run reads"):
        lora.setup(base, out_dir=out_dir, overwrite=True, data=JSON(out_dir / "last" / "config.json"), train=TrainArgs(**TRAIN))
    with pytest.raises(UserError, match="holds the updates of a model, not a model. Merge them first: litgpt merge_lora"):
        lora.setup(out_dir / "last", out_dir=tmp_path / "on", data=JSON(base), train=TrainArgs(**TRAIN))


def test_starting_over_removes_links_and_takes_no_link_for_a_run(run, tmp_path: Path):
    out_dir = run(train=dict(save_interval=1))
    run(train=dict(max_steps=1), overwrite=True)
    assert not list(out_dir.glob("step-*")) and not (out_dir / "last").is_symlink() and [row["step"] for row in logged(out_dir)] == [1]
    shutil.rmtree(out_dir / "final")
    (out_dir / "last").symlink_to("step-000009")  # whose step the user deleted
    assert (run(train=dict(max_steps=1)) / "final").is_dir() and not (out_dir / "last").is_symlink()


def test_what_is_not_a_step_of_this_run_is_never_deleted(run, tmp_path: Path):
    out_dir = run(train=dict(save_interval=1, max_steps=3))
    other = shutil.copytree(out_dir / "step-000002", out_dir / "step-000000") / names.RUN_STATE / names.STATE
    other.write_text(other.read_text().replace('"seed": 1337', '"seed": 7'))
    shutil.rmtree(out_dir / "step-000001")
    (out_dir / "step-000001").mkdir()
    (out_dir / "step-000001" / "precious").touch()
    (out_dir / "step-000002" / names.RUN_STATE / names.STATE).write_text("damaged")
    run(train=dict(save_interval=1, keep_last=1), resume=True)
    assert sorted(path.name for path in out_dir.glob("step-*")) == ["step-000000", "step-000001", "step-000002", "step-000005"]


def test_links_that_a_killed_run_did_not_set_are_set_when_it_goes_on(run, val_losses):
    val_losses(1.0, 2.0, 3.0)
    out_dir = run(train=dict(save_interval=1, max_steps=3), eval=dict(interval=1))
    (out_dir / "best").unlink()
    (out_dir / "last").unlink()
    (out_dir / "last.tmp").symlink_to("step-000002")
    run(train=dict(max_steps=3), resume=True)
    assert link(out_dir, "last") == 3 and link(out_dir, "best") == 1 and not (out_dir / "last.tmp").is_symlink()


def test_a_run_that_went_back_goes_on_on_its_new_way(run, val_losses, monkeypatch: pytest.MonkeyPatch):
    settings = dict(train=dict(save_interval=2, max_steps=4), eval=dict(interval=4))
    val_losses(1.0, 2.0)
    out_dir = run(**settings)
    assert link(out_dir, "best") == 4
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "forward_backward", at_call(1, loop.forward_backward, lambda: exec("raise KeyboardInterrupt")))
        run(**settings, resume=out_dir / "step-000002")
    assert link(out_dir, "last") == 2 and not (out_dir / "best").is_symlink(), "what was best is of the way that was left"
    losses = [row["loss"] for row in logged(out_dir) if "loss" in row]
    run(**settings, resume="auto")
    assert [row["step"] for row in logged(out_dir) if "loss" in row] == [1, 2, 3, 4] and len(losses) == 2
    assert link(out_dir, "last") == 4 == link(out_dir, "best") and saved_counters(out_dir / "best")["validations"]["best"] == [4, 2.0]


def test_a_disk_without_links_is_told_once_and_does_no_harm(run, val_losses, monkeypatch, capsys: pytest.CaptureFixture):
    def no_links(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    val_losses(1.0, 2.0, 3.0, 4.0, 5.0)
    out_dir = run(train=dict(save_interval=1, keep_last=2), eval=dict(interval=1))
    assert saved_steps(out_dir) == [1, 4, 5] and capsys.readouterr().out.count("No link") == 1


# When the loss no longer falls


def test_a_run_ends_when_the_loss_has_not_fallen_for_as_long_as_allowed(run, val_losses, capsys: pytest.CaptureFixture):
    val_losses(3.0, 1.0, 1.0, 2.0, 0.0)
    out_dir = run(eval=dict(interval=1, patience=2))
    assert [row["step"] for row in logged(out_dir) if "loss" in row] == [1, 2, 3, 4] and (out_dir / "final").is_dir()
    assert "Stopping after step 4: the validation loss did not fall in the last 2 validations" in capsys.readouterr().out


def test_a_run_that_had_ended_by_itself_learns_nothing_more_when_it_is_resumed(run, val_losses):
    for i, limits in enumerate((dict(eval=dict(interval=1, patience=2)), dict(train=dict(max_tokens=1)))):
        val_losses(1.0, 2.0, 3.0, 4.0)
        limits["train"] = limits.get("train", {}) | dict(save_interval=1)
        out_dir = run(f"out{i}", **limits)
        ended, before = saved_steps(out_dir)[-1], weights(out_dir / "final")
        shutil.rmtree(out_dir / "final")
        run(f"out{i}", **limits, resume=True)
        assert saved_steps(out_dir)[-1] == ended < 5
        assert all(torch.equal(weight, before[name]) for name, weight in weights(out_dir / "final").items())


def test_what_was_best_is_remembered_when_a_run_goes_on(run, val_losses, monkeypatch: pytest.MonkeyPatch):
    val_losses(1.0, 2.0, 2.0)
    settings = dict(train=dict(save_interval=1), eval=dict(interval=1, patience=3))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "forward_backward", at_call(2, loop.forward_backward, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        run(**settings)
    val_losses(2.0, 2.0, 2.0)
    out_dir = run(**settings, resume=True)
    assert link(out_dir, "best") == 1 and saved_steps(out_dir)[-1] == 4


# What is not finite


def named_samples(step: int) -> str:
    drawn = next(islice(steps(N_TRAINED, TRAIN["global_batch_size"], seed=1337), step - 1, None))
    return ", ".join(map(str, sorted(drawn.indices)))


def test_a_gradient_that_is_not_finite_is_named_with_its_step_layer_and_samples(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spoiled: list[torch.nn.Module] = []
    spoil = lambda: spoiled[0].mlp.proj.weight.grad[3].fill_(math.inf)  # noqa: E731
    monkeypatch.setattr(loop, "cast_parameters", lambda model, precision: spoiled.append(model.transformer.h[1]))
    monkeypatch.setattr(loop, "forward_backward", at_call(3, loop.forward_backward, spoil))
    where = f"on the samples {named_samples(3)} "
    with pytest.raises(UserError, match=rf"gradients of step 3 were not finite, first that of 'transformer.h.1.mlp.proj.weight', {where}"):
        run(method=full, train=dict(save_interval=1, log_interval=100))
    assert saved_steps(tmp_path / "out") == [1, 2]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(run, tmp_path: Path, monkeypatch, scaled: bool):
    if scaled:  # the scaler of fp16's gradients passes over such steps; one that is turned off stands for it, for fp16 is for GPUs
        monkeypatch.setattr(Precision, "scaler", torch.amp.GradScaler("cpu", enabled=False), raising=False)
    calls, forward_backward = iter(range(1, 100)), loop.forward_backward
    spoiled = lambda *args: forward_backward(*args) * (math.nan if next(calls) == 2 else 1)  # noqa: E731
    monkeypatch.setattr(loop, "forward_backward", spoiled)
    with pytest.raises(UserError, match=rf"The loss of step 2 was not finite, on the samples {named_samples(2)} "):
        run(train=dict(save_interval=4, log_interval=100))
    assert saved_steps(tmp_path / "out") == []


def test_weights_that_are_not_finite_are_in_no_step(run, tmp_path: Path):
    with pytest.raises(UserError, match="After step 1 the weight 'transformer.* is no longer finite"):
        run(method=full, train=dict(save_interval=1, lr_warmup_steps=0), optimizer=OptimizerArgs(lr=1e39))
    assert saved_steps(tmp_path / "out") == []


# Signals


class AtItem:
    """Passes items on and does something before one of them; counts them."""

    def __init__(self, n: int, act: Callable[[], Any]) -> None:
        self.n, self.act, self.seen = n, act, 0

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.seen += 1
            if self.seen == self.n:
                self.act()
            yield item


@pytest.mark.parametrize("train", [dict(max_steps=5), dict(max_steps=2)], ids=["within the run", "in the last validation"])
def test_a_signal_during_a_validation_waits_for_a_few_microbatches_only_and_costs_nothing(run, monkeypatch, tmp_path: Path, train: dict):
    settings = dict(train=dict(micro_batch_size=1, packing=False) | train, eval=dict(interval=2, final_validation=True))
    reference = run("reference", **settings)
    feeding, made = AtItem(1, lambda: os.kill(os.getpid(), signal.SIGTERM)), litgpt.run.validation_microbatches
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(litgpt.run, "validation_microbatches", lambda *args: feeding(m for _ in range(50) for m in made(*args)))
        run(**settings)
    assert stopped.value.code == 128 + signal.SIGTERM and feeding.seen <= 1 + VOTE_EVERY
    assert saved_steps(tmp_path / "out") == [2] and not (tmp_path / "out" / "final").exists()
    assert_same_result(run(**settings, resume="auto"), reference)


def test_a_validation_that_is_done_over_saves_no_weights_again(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    settings, made = dict(train=dict(max_steps=3), eval=dict(interval=2)), litgpt.run.validation_microbatches
    asked = AtItem(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(litgpt.run, "validation_microbatches", lambda *args: asked(m for _ in range(9) for m in made(*args)))
        run(**settings)
    step = tmp_path / "out" / "step-000002"
    before = {path: path.stat().st_ino for path in step.rglob("*") if path.is_file()}
    assert saved_counters(step)["validations"]["owed"] and not (tmp_path / "out" / "best").is_symlink()
    run(**settings, resume=True)
    assert [path.name for path, number in before.items() if path.stat().st_ino != number] == [names.STATE], "no moment without a step"
    known = saved_counters(step)["validations"]
    assert not known["owed"] and known["best"] == [2, known["lowest"]] and link(tmp_path / "out", "best") == 2


@pytest.mark.parametrize("interval", [2, 1000], ids=["within the run", "at its end"])
def test_a_signal_while_an_example_is_written_waits_for_a_few_tokens_only(run, monkeypatch, tmp_path: Path, interval: int):
    settings = dict(train=dict(max_steps=3), eval=dict(interval=interval, max_new_tokens=20, final_validation=True))
    stopped_at = min(interval, 3)
    reference = run("reference", **settings)
    asked, complete = AtItem(2, lambda: os.kill(os.getpid(), signal.SIGINT)), loop.complete

    def long_answer(*args: Any) -> Iterator[Any]:  # but the one before training
        answer = list(complete(*args))
        return asked(iter(answer * 50)) if logged(tmp_path / "out") else iter(answer)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(loop, "complete", long_answer)
        run(**settings)
    assert stopped.value.code == 128 + signal.SIGINT and asked.seen <= 2 + VOTE_EVERY
    assert saved_steps(tmp_path / "out") == [stopped_at]
    assert_same_result(run(**settings, resume=True), reference)
    told = [
        [(row["step"], row["answer"]) for row in Journal(tmp_path / name / "logs" / "metrics.jsonl").rows() if "answer" in row]
        for name in ("out", "reference")
    ]
    assert told[0] == told[1] and stopped_at in [step for step, _ in told[0]], "the answer that was broken off is told in the next life"


class Signals(JSON):
    """Samples to validate on, of which the second rank's ask it to stop."""

    def setup(self, stage: str = "") -> None:
        super().setup(stage)
        self.val_dataset = _Signalling(self.val_dataset)


class _Signalling:
    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if os.environ.get("LOCAL_RANK") == "1" and isinstance(signal.getsignal(signal.SIGTERM), StopRequest):
            os.kill(os.getpid(), signal.SIGTERM)
        return self.samples[index]


def test_a_signal_to_one_rank_during_a_validation_stops_all_at_that_step(base: Path, samples: Path, tmp_path: Path):
    options = arguments(samples, tmp_path, dict(micro_batch_size=1, packing=False), dict(interval=2))
    options["data"] = Signals(json_path=samples, val_split_fraction=0.5)
    assert run_on_ranks("litgpt.finetune.lora", 2, base, **options) == [128 + signal.SIGTERM] * 2
    assert saved_steps(tmp_path) == [2] and latest_step(tmp_path).samefile(tmp_path / "last")


# Kill and go on


@pytest.mark.parametrize("method", METHODS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_run_that_is_killed_within_a_step_goes_on_bit_for_bit(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: Any):
    settings = dict(save_interval=2), dict(interval=2, final_validation=True, save_best=True, patience=9)
    killed = lambda: shutil.copytree(tmp_path / "reference", tmp_path / "out", symlinks=True)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", at_call(4, loop.forward_backward, killed))
        reference = run("reference", *settings, method=method)
    assert saved_steps(tmp_path / "out") == [2]
    seconds = [saved_counters(tmp_path / "out" / "last")["training_seconds"]]
    out_dir = run("out", *settings, method=method, resume="auto")
    assert [row["step"] for row in logged(out_dir) if "loss" in row] == [1, 2, 3, 4, 5], "each step is logged once"
    assert logged(out_dir) == logged(reference)
    for path in sorted((reference / "final").rglob("*.safetensors")):
        ours, theirs = load_file(out_dir / path.relative_to(reference)), load_file(path)
        assert ours.keys() == theirs.keys() and not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert [link(out_dir, name) for name in ("last", "best")] == [link(reference, name) for name in ("last", "best")]
    seconds.append(saved_counters(out_dir / "last")["training_seconds"])
    assert 0 < seconds[0] < seconds[1], "the time of both lives counts"


def test_runs_of_two_ranks_go_on_bit_for_bit_and_change_the_number_of_ranks_between_two_steps(
    run, base: Path, samples: Path, tmp_path: Path
):
    settings = dict(method=full, optimizer=OptimizerArgs(lr=1e-3, state="8bit"))
    train = dict(save_interval=3, lr_schedule="constant")
    reference = run("reference", train, **settings)

    def on_two(name: str, max_steps: int, resume: bool) -> Path:
        made = arguments(samples, tmp_path / name, train | dict(max_steps=max_steps), {})
        made |= dict(optimizer=settings["optimizer"], resume=resume)
        assert run_on_ranks("litgpt.finetune.full", 2, base, fits=False, **made) == [0, 0]
        return tmp_path / name

    down = on_two("down", 3, False)
    again = shutil.copytree(down, tmp_path / "again", symlinks=True)
    run("down", train, **settings, resume=True)
    up = shutil.copytree(reference, tmp_path / "up", symlinks=True)  # as after three steps
    shutil.rmtree(up / "final")
    on_two("up", 5, True)
    for out_dir in (down, up):
        assert [row["step"] for row in logged(out_dir)] == [1, 2, 3, 4, 5]
        for one, other in zip(logged(out_dir), logged(reference), strict=True):
            assert one["total_tokens"] == other["total_tokens"], "they saw the same samples"
            assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-3)
    on_two("again", 5, True)
    assert_same_result(again, on_two("whole", 5, False))


def test_a_result_that_two_ranks_cannot_write_costs_no_training(base: Path, samples: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "final.tmp").write_text("in the way")
    options = arguments(samples, tmp_path / "out", dict(max_steps=2), {})
    assert run_on_ranks("litgpt.finetune.lora", 2, base, **options) == [1, 2]
    assert saved_steps(tmp_path / "out") == [2] and link(tmp_path / "out", "last") == 2


def test_without_a_precision_a_resumed_run_keeps_its_own(run, monkeypatch: pytest.MonkeyPatch):
    run(train=dict(max_steps=2, save_interval=2))
    monkeypatch.setitem(loop.training_precision.__globals__, "compute_dtype", lambda accelerator: torch.bfloat16)
    resumed = run(train=dict(max_steps=4, save_interval=2), resume=True, precision=None)
    assert saved_counters(resumed / "last")["step"] == 4 and saved_counters(resumed / "last")["precision"] == "32-true"
    assert read_hyperparameters(resumed / "final")["precision"] == "32-true", "a recipe repeats its run on another machine too"


def test_a_limit_that_the_resumed_step_is_past_is_refused_and_costs_nothing(run):
    out = run(train=dict(max_steps=3, save_interval=3))
    before = {path: path.read_bytes() for path in (out / "final").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="past the end of the run, which its limits set after step 2. Raise the limit"):
        run(train=dict(max_steps=2), resume=True)
    assert before == {path: path.read_bytes() for path in (out / "final").rglob("*") if path.is_file()}
    run(train=dict(max_steps=3), resume=True)
    run(train=dict(max_steps=None, max_tokens=1), resume=True)  # which says of no step for certain that it is the last


# What it leaves


def test_the_report_opens_without_a_network_and_shows_curves_settings_and_answers(run):
    with chromium() as browser:
        report = run(eval=dict(interval=2, max_new_tokens=5, final_validation=True)) / names.REPORT
        context = browser.new_context(offline=True)
        page, complaints, requests = context.new_page(), [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        points = page.evaluate("[...document.querySelectorAll('polyline')].map((line) => line.points.length)")
        assert points == [5, 3, 5, 5, 5, 5], "losses, validation losses after steps 2, 4 and 5, then one line a chart"
        answers = page.locator("article").inner_text()
        assert all(words in answers for words in ("Say ", "Before training", "After step 5"))
        page.locator("summary").click()
        settings = page.locator("details").inner_text()
        assert all(f"{name}\t{value}" in settings for name, value in {"train.max_steps": 5, "lora_r": 8, "seed": 1337}.items())
        assert (complaints, requests) == ([], [report.as_uri()])
