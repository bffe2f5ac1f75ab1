import csv
import errno
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finetune.run_and_kill import at_call, run_and_kill, run_on_ranks
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from peft import PeftModel
from safetensors.torch import load_file
from speaking import make_checkpoint
from tensorboard.summary.writer.record_writer import RecordWriter
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from litgpt import cli
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.checkpoint import load_model
from litgpt.config import Config
from litgpt.data import JSON, TextFiles
from litgpt.errors import MissingFile, UserError
from litgpt.finetune import full, loop, lora
from litgpt.metrics import Meter
from litgpt.run_folder import held
from litgpt.run_inputs import check_ids, fingerprint

METHODS = {"lora": lora, "full": full}
TRAIN = dict(global_batch_size=4, micro_batch_size=2, epochs=2)
EVAL = dict(interval=1000, max_new_tokens=None, final_validation=False)
N_TRAINED = 18  # of 20 samples
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base: Path, samples: Path, tmp_path: Path):
    """Finetunes the tiny model; returns the run's folder."""

    def run(method: str = "lora", out_dir: str = "out", train: dict = {}, eval: dict = {}, lr: float = 1e-2, **options: Any) -> Path:  # noqa: B006
        options = arguments(samples, tmp_path / out_dir, train, eval, lr) | options
        METHODS[method].setup(options.pop("checkpoint_dir", base), **options)
        return tmp_path / out_dir

    return run


def arguments(samples: Path, out_dir: Path, train: dict, eval: dict, lr: float) -> dict[str, Any]:
    return dict(
        out_dir=out_dir,
        precision="32-true",
        data=JSON(json_path=samples, val_split_fraction=0.1),
        train=TrainArgs(**TRAIN | train),
        eval=EvalArgs(**EVAL | eval),
        optimizer=OptimizerArgs(lr=lr),
    )


def logged(out_dir: Path, column: str, version: int = 0) -> dict[int, float]:
    """The values of one column of the log, by step."""
    with open(out_dir / "logs" / "csv" / f"version_{version}" / "metrics.csv") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits_of(folder: Path) -> Tensor:
    with torch.inference_mode():
        return load_model(folder)(IDS)


def theirs(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# What is trained


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, {"q_proj", "v_proj"}),
        (dict(lora_query=False, lora_value=False, lora_key=True, lora_projection=True), {"k_proj", "o_proj"}),
        (dict(lora_query=False, lora_value=False, lora_mlp=True, lora_head=True), {"gate_proj", "up_proj", "down_proj", "lm_head"}),
    ],
)
def test_one_step_of_lora_moves_exactly_what_the_flags_choose(run, base: Path, flags: dict, parts: set[str]):
    out_dir = run(train=dict(max_steps=1, save_interval=1), **flags)
    before, after = weights(base), weights(out_dir / "final")
    assert before.keys() == after.keys()
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == parts
    saved = load_file(out_dir / "step-000001" / "run_state" / "shard-00000.safetensors")
    assert all("lora_" in name for name in saved if not name.startswith("generator/"))


def test_one_step_of_full_finetuning_moves_every_weight(run, base: Path):
    before, after = weights(base), weights(run("full", train=dict(max_steps=1)) / "final")
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_result_loads_in_transformers(run, method: str):
    out_dir = run(method, train=dict(epochs=8), eval=dict(final_validation=True))
    losses = list(logged(out_dir, "loss").values())
    assert losses[-1] < 0.5 * losses[0]
    model = theirs(out_dir / "final")
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(out_dir / "final"), model(IDS).logits, rtol=0, atol=2e-5)
    assert (out_dir / "final" / "prompt_style.yaml").is_file() and (out_dir / "final" / "tokenizer.json").is_file()


def test_peft_loads_the_adapter_with_equal_logits(run, base: Path):
    final = run(lora_mlp=True, lora_key=True) / "final"
    adapted = PeftModel.from_pretrained(theirs(base), final / "adapter").eval()
    with torch.inference_mode():
        logits = adapted(IDS).logits
        torch.testing.assert_close(logits, logits_of(final), rtol=0, atol=5e-5)
        assert not torch.allclose(logits, logits_of(base), atol=0.1)


def test_the_result_has_the_dtype_of_the_base(run, base: Path, tmp_path: Path):
    theirs(base).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bf16" / file).write_bytes((base / file).read_bytes())
    for method in METHODS:
        final = run(method, method, train=dict(max_steps=1), checkpoint_dir=tmp_path / "bf16", precision=None) / "final"
        assert {tensor.dtype for tensor in weights(final).values()} == {torch.bfloat16}
        assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_a_checkpoint_directory(run, method: str):
    out_dir = run(method, train=dict(max_steps=3, save_interval=3))
    torch.testing.assert_close(logits_of(out_dir / "step-000003"), logits_of(out_dir / "final"), rtol=0, atol=1e-5)


# The loop


def test_how_a_batch_is_cut_up_changes_nothing(run):
    runs = {size: run(out_dir=str(size), train=dict(micro_batch_size=size), lora_dropout=0.0) for size in (1, 2, 4)}
    for size in (2, 4):
        losses = [torch.tensor(list(logged(runs[i], "loss").values())) for i in (1, size)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(logits_of(runs[1] / "final"), logits_of(runs[size] / "final"), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fits", [True, False])
def test_two_ranks_learn_the_same_as_one_whether_each_can_hold_all_or_not(
    run, base: Path, samples: Path, tmp_path: Path, method: str, fits: bool
):
    train, eval = dict(epochs=1, save_interval=3), dict(interval=2, max_new_tokens=3)
    more = dict(lora_dropout=0.0) if method == "lora" else {}
    alone = run(method, out_dir="alone", train=train, eval=eval, lr=1e-3, **more)
    both = tmp_path / "both"
    options = arguments(samples, both, train, eval, 1e-3) | more
    assert run_on_ranks(METHODS[method].__name__, 2, base, fits=fits, **options) == [0, 0]
    first, second = (load_file(file).keys() for file in sorted((both / "step-000003" / "run_state").glob("*.safetensors")))
    assert bool(first & second) is not fits, "what is in both files is shared out"
    for column in ("loss", "grad_norm", "val_loss", "total_tokens"):
        one, two = (logged(folder, column) for folder in (alone, both))
        assert one.keys() == two.keys() and list(two.values()) == pytest.approx(list(one.values()), rel=1e-4), column
    torch.testing.assert_close(logits_of(both / "final"), logits_of(alone / "final"), rtol=0, atol=1e-3)


def test_the_first_loss_and_the_validation_loss_are_means_over_the_answers_tokens(run, base: Path, samples: Path):
    kept = []
    data = JSON(json_path=samples, val_split_fraction=0.1)
    train, eval = dict(global_batch_size=N_TRAINED, max_steps=1), dict(initial_validation=True)
    out_dir = run(train=train, eval=eval, data=data, lora_dropout=0.0)
    model = theirs(base)
    for dataset in (data.train_dataset, data.val_dataset):
        nll, n = 0.0, 0
        for sample in dataset:
            with torch.inference_mode():
                logits = model(sample["input_ids"].unsqueeze(0)).logits[0, :-1]
            targets = sample["labels"][1:]
            nll += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            n += int((targets != -100).sum())
        kept.append(nll / n)
    assert logged(out_dir, "loss")[1] == pytest.approx(kept[0], rel=1e-5)
    assert logged(out_dir, "val_loss")[0] == pytest.approx(kept[1], rel=1e-5)
    assert logged(out_dir, "val_ppl")[0] == pytest.approx(math.exp(kept[1]), rel=1e-4)


def test_showing_examples_leaves_the_training_as_it_is(run, capsys: pytest.CaptureFixture):
    quiet = run(out_dir="quiet")  # with dropout
    capsys.readouterr()
    shown = run(out_dir="shown", eval=dict(interval=2, max_new_tokens=4, evaluate_example="random", initial_validation=True))
    assert capsys.readouterr().out.count(">>>") == 6  # before training, and after steps 2, 4, 6, 8 and 10
    assert logged(quiet, "loss") == logged(shown, "loss")


def test_clipping_is_on_and_null_turns_it_off(run, base: Path):
    moved = {}
    for max_norm in (1e-3, None):
        final = run("full", str(max_norm), dict(max_steps=1, max_norm=max_norm), optimizer=OptimizerArgs("SGD", lr=1.0)) / "final"
        moved[max_norm] = sum((after - weights(base)[name]).square().sum() for name, after in weights(final).items()).sqrt().item()
    norm = logged(final.parent, "grad_norm")[1]
    assert TrainArgs().max_norm == loop.TRAIN.max_norm == 1.0
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2) and moved[None] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize(
    ("train", "n_steps"),
    [
        (dict(epochs=3), 15),  # 18 samples: four steps of 4 and one of 2
        (dict(epochs=3, max_steps=7), 7),
        (dict(epochs=None, max_steps=2), 2),
        (dict(epochs=None, max_tokens=1), 1),
    ],
)
def test_a_run_ends_at_its_first_limit(run, train: dict, n_steps: int):
    out_dir = run(train=train)
    assert max(logged(out_dir, "loss")) == n_steps
    assert (out_dir / "final" / "model.safetensors").is_file()


def test_a_run_ends_when_its_time_is_over(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Meter, "elapsed", lambda self: self.step)
    out_dir = run(train=dict(max_time=3.0))
    assert max(logged(out_dir, "loss")) == 3
    assert (out_dir / "final" / "model.safetensors").is_file()


def test_a_run_stops_after_as_many_tokens_as_asked_for(run):
    tokens = logged(run(train=dict(epochs=None, max_tokens=400)), "total_tokens")
    *earlier, last = tokens.values()
    assert last >= 400 and all(n < 400 for n in earlier)


def test_gradients_that_are_not_finite_stop_the_run_and_nothing_bad_is_saved(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def spoil():
        spoiled[0].weight.grad.fill_(float("nan"))

    spoiled: list[torch.nn.Module] = []
    monkeypatch.setattr(loop, "cast_parameters", lambda model, precision: spoiled.append(model.lm_head))
    monkeypatch.setattr(loop, "forward_backward", at_call(3, loop.forward_backward, spoil))
    with pytest.raises(UserError, match="step 3"):
        run("full", train=dict(save_interval=1, log_interval=100))
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "logs") == ["last", "step-000001", "step-000002"]


# Resuming


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(run, base: Path, samples: Path, tmp_path: Path, method: str):
    train, at = dict(epochs=3, save_interval=3), random.Random(method).randrange(5, 15)
    reference = run(method, "reference", train, dict(interval=4))
    killed = tmp_path / "killed"
    module = METHODS[method].__name__
    assert run_and_kill(module, at, base, **arguments(samples, killed, train, dict(interval=4), 1e-2)) == -signal.SIGKILL
    last = (at - 1) // 3 * 3
    assert max(path.name for path in killed.iterdir()) == f"step-{last:06d}"

    run(method, "killed", train, dict(interval=4), resume=True)
    for column in ("loss", "grad_norm", "learning_rate", "total_tokens", "val_loss"):
        expected = logged(reference, column)
        assert logged(killed, column, version=1) == {step: value for step, value in expected.items() if step > last}
    for name, weight in weights(reference / "final").items():
        assert torch.equal(weight, weights(killed / "final")[name]), name


def test_a_signal_saves_the_step_and_the_run_can_go_on(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reference = run(out_dir="reference")
    monkeypatch.setattr(loop, "forward_backward", at_call(3, loop.forward_backward, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + signal.SIGTERM
    (saved,) = (tmp_path / "out").glob("step-*")
    assert saved.name == "step-000003" and (tmp_path / "out" / "last").resolve() == saved.resolve()
    run(resume="auto")
    assert weights(tmp_path / "out" / "final").keys() == weights(reference / "final").keys()
    for name, weight in weights(reference / "final").items():
        assert torch.equal(weight, weights(tmp_path / "out" / "final")[name]), name


def test_a_folder_that_holds_a_run_is_left_alone_unless_told_otherwise(run, tmp_path: Path):
    short = dict(max_steps=2, save_interval=1)
    out_dir = run(train=short)
    (out_dir / "final_notes").mkdir()
    with pytest.raises(UserError, match="already holds a run"):
        run(train=short)
    with pytest.raises(UserError, match="global_batch_size"):
        run(train=short | dict(global_batch_size=2), resume=True)
    (out_dir / "final" / "mine").touch()
    run(train=dict(max_steps=1), overwrite=True)
    assert sorted(path.name for path in out_dir.iterdir()) == ["final", "final_notes", "logs", "report.html"]
    assert not (out_dir / "final" / "mine").exists()
    with pytest.raises(MissingFile, match="no step"):
        run(train=short, resume=True)
    run(out_dir="other", train=short, resume="auto")
    run(out_dir="third", train=dict(max_steps=3), resume=tmp_path / "other" / "step-000001")
    assert list(logged(tmp_path / "third", "loss")) == [2, 3]


# Options


def test_the_command_of_the_readme_runs_as_written(base: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "some").mkdir(parents=True)
    (tmp_path / "checkpoints" / "some" / "model").symlink_to(base)
    command = f"finetune some/model --data JSON --data.json_path {samples} --data.val_split_fraction 0.1 --out_dir out/custom-model"
    assert cli.main([*command.split(), "--train.epochs", "1", "--precision", "32-true", "--optimizer.lr", "1e-2"]) == 0
    first = tmp_path / "out" / "custom-model"
    assert cli.main(["finetune_lora", "--config", str(first / "final" / "hyperparameters.yaml"), "--out_dir", "again"]) == 0
    assert logged(first, "loss") == logged(tmp_path / "again", "loss")
    assert cli.main([*command.split(), "--train.epochs", "1"]) == 2


def test_defaults_suit_the_method():
    assert loop.OPTIMIZER.lr == 2e-4 and full.OPTIMIZER.lr == 2e-5
    assert (loop.TRAIN.epochs, loop.TRAIN.global_batch_size, loop.TRAIN.micro_batch_size) == (5, 16, 1)
    assert (loop.EVAL.interval, full.EVAL.interval, full.EVAL.max_new_tokens) == (100, 600, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(quantize="bnb.nf3"), "`quantize` is one of bnb.nf4"),
        (dict(profile=0), "`profile`"),
        (dict(lora_query=False, lora_value=False), "Turn one on"),
        (dict(lora_r=10**14), "`lora_r` is 100000000000000, but the update of no layer it is for can have a rank above 32"),
        (dict(lora_alpha=0), "`lora_alpha` scales the update and is a number above 0, but got 0"),
        (dict(lora_alpha=-1), "`lora_alpha`"),
        (dict(resume=True, overwrite=True), "Give one"),
        (dict(resume="auto", overwrite=True), "Give one"),
        (dict(train=dict(max_seq_length=10_000)), "context is 256"),
        (dict(train=dict(micro_batch_size=0)), "micro_batch_size"),
        (dict(train=dict(tie_embeddings=True)), "tie_embeddings"),
        (dict(eval=dict(interval=1, max_new_tokens=1, evaluate_example=99)), "evaluate_example"),
        (dict(devices=0), "devices"),
        (dict(precision="bf16-ture"), "bf16-true"),
        (dict(checkpoint_dir="no/such/model"), "no/such/model"),
        (dict(lr=0.0), "lr"),
        (dict(lr=math.nan), "lr"),
        (dict(train=dict(max_time=math.inf)), "max_time"),
        (dict(optimizer=OptimizerArgs("LBFGS")), "several times in a step"),
        (dict(optimizer=OptimizerArgs("..AdamW")), "or an import path"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_and_leave_no_folder(run, options: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def with_more_tokens(folder: Path, *tokens: str) -> Path:
    """Let the tokenizer know more tokens than the model."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("part", ["train", "val"])
def test_tokens_that_the_model_does_not_know_are_refused_before_training(run, tmp_path: Path, part: str):
    larger = with_more_tokens(make_checkpoint(tmp_path / "larger"), "<more>")
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        record = {"instruction": "Say", "output": "yes <more>" if name == part else "yes"}
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([record] * 4))
    with pytest.raises(UserError, match="hold the token id 300, but the model knows 300 tokens"):
        run(checkpoint_dir=larger, data=JSON(tmp_path / "data"))
    assert not (tmp_path / "out" / "logs").exists()
    (tmp_path / "data" / f"{part}.json").write_text(json.dumps([{"instruction": "Say", "output": "yes"}] * 4))
    run(checkpoint_dir=larger, data=JSON(tmp_path / "data"), train=dict(max_steps=1))  # what is never used does no harm


def test_tokens_of_a_data_set_of_ones_own_are_looked_at_too(base: Path):
    ids = torch.tensor([1, 2, 300])
    with pytest.raises(UserError, match="token id 300"):
        check_ids(Config.from_checkpoint(base), [{"input_ids": ids, "labels": ids}] * 3, [])
    with pytest.raises(UserError, match="token id 300"):
        check_ids(Config.from_checkpoint(base), [ids[:2]], [ids])
    check_ids(Config.from_checkpoint(base), [ids[:2]], [])


def test_overwriting_never_deletes_what_the_run_reads(run, base: Path, samples: Path, tmp_path: Path):
    out_dir = run(train=dict(max_steps=1, save_interval=1))
    shutil.copytree(base, out_dir / "step-000002")
    shutil.copy(samples, out_dir / "step-000002" / "samples.json")
    (out_dir / "step-000002" / "hyperparameters.yaml").touch()
    (tmp_path / "link").symlink_to(out_dir / "final")
    ours = arguments(samples, tmp_path / "beside", dict(max_steps=1, save_interval=1), {}, 1e-2)
    lora.setup(out_dir / "final", **ours)  # its steps are read with the base that they name
    before = sorted(path for path in out_dir.rglob("*"))
    reading = [
        dict(checkpoint_dir=out_dir / "final"),
        dict(checkpoint_dir=tmp_path / "link"),
        dict(data=JSON(json_path=out_dir / "step-000002" / "samples.json", val_split_fraction=0.1)),
    ]
    for options in reading:
        with pytest.raises(UserError, match="`overwrite` would delete .*, but this run reads"):
            run(overwrite=True, **options)
    for step in (tmp_path / "beside" / "step-000001", out_dir / "step-000001"):
        with pytest.raises(UserError, match="holds the updates of a model, not a model. Merge them first: litgpt merge_lora"):
            run(overwrite=True, checkpoint_dir=step)
    assert sorted(path for path in out_dir.rglob("*")) == before
    run(train=dict(max_steps=1, save_interval=None), overwrite=True)
    assert sorted(path.name for path in out_dir.iterdir()) == ["final", "logs", "report.html"]


@pytest.mark.parametrize("name", ["step-000009", "final", "best", "step-000009.tmp"])
def test_a_folder_that_no_run_wrote_is_not_deleted(run, tmp_path: Path, name: str):
    (mine := tmp_path / "out" / name).mkdir(parents=True)
    (mine / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{name} is in the way, but not of a run"):
        run(train=dict(max_steps=1), overwrite=True)
    assert (mine / "precious.txt").read_text() == "mine"
    mine.rename(tmp_path / "elsewhere")
    mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is in the way, but not of a run"):
        run(train=dict(max_steps=1), overwrite=True)
    mine.unlink()
    mine.mkdir()  # nobody misses it
    run(train=dict(max_steps=1), overwrite=True)
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_a_base_that_is_not_finite_is_named_as_the_cause(run, base: Path, tmp_path: Path):
    model = theirs(shutil.copytree(base, tmp_path / "spoilt"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
    model.save_pretrained(tmp_path / "spoilt")
    for method in METHODS:
        with pytest.raises(UserError, match="'transformer.h.1.mlp.proj.weight' of the model in .*spoilt has numbers that are not finite"):
            run(method, checkpoint_dir=tmp_path / "spoilt")
    assert not (tmp_path / "out").exists()


def test_options_that_a_resumed_run_changes_are_said(run, capsys: pytest.CaptureFixture):
    run(train=dict(max_steps=2, save_interval=1))
    capsys.readouterr()
    run(train=dict(max_steps=2, save_interval=1), resume=True)
    assert "changed" not in capsys.readouterr().out
    optimizer = OptimizerArgs(lr=1e-4, betas=(0.8, 0.9), init_args={"eps": 1e-6})
    run(train=dict(max_steps=3, save_interval=2, max_norm=None, lr_schedule="linear"), resume=True, optimizer=optimizer)
    said = next(line for line in capsys.readouterr().out.splitlines() if "changed" in line)
    optimizers = "optimizer.lr 0.01 -> 0.0001, optimizer.betas [0.9, 0.95] -> [0.8, 0.9], "
    others = (
        "train.lr_schedule cosine -> linear, train.max_steps 2 -> 3, train.max_norm 1.0 -> null, optimizer.init_args.eps null -> 1.0e-06."
    )
    assert said == f"Resuming with changed {optimizers}{others}"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(mask_prompt=False), r"\(changed: data.init_args.mask_prompt null -> false\)"),
        (dict(prompt_style="alpaca"), r"\(changed: data.init_args.prompt_style null -> alpaca\)"),
        ({}, r"\(the data's files or the tokenizer changed\)"),
    ],
)
def test_a_resumed_run_with_other_samples_is_told_what_may_have_changed(run, samples: Path, tmp_path: Path, options: dict, why: str):
    file = shutil.copy(samples, tmp_path / "mine.json")
    data = dict(json_path=file, val_split_fraction=0.1)
    run(train=dict(max_steps=2, save_interval=1), data=JSON(**data))
    if not options:
        Path(file).write_text(Path(file).read_text().replace("yes", "no"))
    with pytest.raises(
        UserError, match=rf"digest of the samples '[0-9a-f]+', not '[0-9a-f]+' {why}. Resume with the model, data and flags"
    ):
        run(train=dict(max_steps=2), resume=True, data=JSON(**data, **options))


def test_what_is_said_counts_one_as_one_and_can_be_pasted(run, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "one.json").write_text(json.dumps([{"instruction": "Say", "output": "yes"}]))
    final = run(out_dir="x y", data=JSON(tmp_path / "one.json", val_split_fraction=0.0), train=dict(max_steps=1)) / "final"
    out = capsys.readouterr().out
    assert ", 1 sample.\n" in out and f"litgpt chat '{final}'\n" in out


def test_a_run_that_is_refused_when_it_is_resumed_leaves_no_folder(run, tmp_path: Path):
    run(out_dir="other", train=dict(max_steps=2, save_interval=1))
    with pytest.raises(UserError, match="seed"):
        run(train=dict(max_steps=2), resume=tmp_path / "other" / "step-000001", seed=3)
    assert not (tmp_path / "out").exists()


def test_texts_are_refused(run, tmp_path: Path):
    (tmp_path / "text.txt").write_text("A text has no answers. " * 100)
    with pytest.raises(UserError, match="litgpt pretrain"):
        run(data=TextFiles(train_data_path=tmp_path / "text.txt", num_workers=0))


def test_a_run_is_resumed_with_its_own_settings_only(run, base: Path, samples: Path):
    train = dict(max_steps=2, save_interval=1)
    run(train=train)
    for other in (
        dict(lora_alpha=99),
        dict(seed=1),
        dict(optimizer=OptimizerArgs(name="RMSprop")),
        dict(data=JSON(samples, val_split_fraction=0.2, seed=7)),
    ):
        with pytest.raises(UserError, match="Resume with the model, data and flags of that run"):
            run(train=dict(max_steps=3, save_interval=1), resume=True, **other)


def test_a_run_is_resumed_with_its_own_base_only_wherever_that_lies(run, base: Path, tmp_path: Path):
    train = dict(max_steps=2, save_interval=1)
    run(train=train)
    with pytest.raises(UserError, match="fingerprint of the base model '[0-9a-f]+', not '[0-9a-f]+'"):
        run(train=dict(max_steps=3), resume=True, checkpoint_dir=make_checkpoint(tmp_path / "other", seed=1))
    shutil.copytree(base, tmp_path / "moved")
    run(train=dict(max_steps=3), resume=True, checkpoint_dir=tmp_path / "moved")


@pytest.mark.parametrize("changed", ["transformer.wte.weight", "transformer.h.1.mlp.proj.weight", "transformer.ln_f.weight"])
def test_a_fingerprint_tells_models_apart(base: Path, changed: str):
    one, two = load_model(base), load_model(base)
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two.get_parameter(changed).mul_(1.01)
    assert fingerprint(one) != fingerprint(two) != fingerprint(one.bfloat16())


def test_the_stored_options_repeat_a_run_and_neither_resume_nor_delete_one(run, tmp_path: Path):
    train = dict(max_steps=2, save_interval=1)
    run(train=train)
    options = yaml.safe_load((run(train=train, resume=True) / "final" / "hyperparameters.yaml").read_text())
    assert not {"resume", "overwrite", "access_token"} & options.keys() and options["train"]["max_steps"] == 2


def test_no_training_is_lost_if_the_result_cannot_be_written(run, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "final.tmp").write_text("in the way")
    with pytest.raises(UserError, match="in the way"):
        run(train=dict(max_steps=2))
    assert "--resume true" in capsys.readouterr().out
    (tmp_path / "out" / "final.tmp").unlink()
    assert (run(train=dict(max_steps=2), resume=True) / "final" / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_written_into_and_an_adapter_are_refused(run, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for out_dir in ("file", "file/below"):
        with pytest.raises(UserError, match="`out_dir` is a folder"):
            run(out_dir=out_dir)
    adapter = run(train=dict(max_steps=1)) / "final" / "adapter"
    with pytest.raises(UserError, match="litgpt merge_lora"):
        run(out_dir="again", checkpoint_dir=adapter)


def test_a_folder_of_a_disk_that_is_only_read_is_refused(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as the system says there, to root too
    with pytest.raises(UserError, match="writing is not allowed in .*out. Choose another"):
        run()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("logger_name", ["csv", "tensorboard"])
def test_a_disk_that_fills_with_logs_is_one_sentence_and_what_was_saved_can_go_on(
    run, base: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, logger_name: str
):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reference, out_dir = run(out_dir="reference"), tmp_path / "out"
    with monkeypatch.context() as patch:
        if logger_name == "csv":
            save = at_call(8, _ExperimentWriter.save, full)
            patch.setattr(_ExperimentWriter, "save", lambda writer: save(writer))
        else:
            write = at_call(50, RecordWriter.write, full)  # in a thread of its own; each value is a record
            patch.setattr(RecordWriter, "write", lambda writer, data: write(writer, data))
        options = arguments(samples, out_dir, dict(save_interval=2), {}, 1e-2)
        with pytest.raises(UserError, match="logs could not be written: the disk is full.*go on from .*step-0.*--resume true"):
            lora.setup(base, logger_name=logger_name, **options)
    assert "Traceback" not in capfd.readouterr().err
    run(train=dict(save_interval=2), resume=True)
    for name, weight in weights(reference / "final").items():
        assert torch.equal(weight, weights(out_dir / "final")[name]), name


def test_an_error_of_ours_while_logging_is_not_called_the_disks(run, monkeypatch: pytest.MonkeyPatch):
    def wrong(*args: Any, **kwargs: Any) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(_ExperimentWriter, "save", wrong)
    with pytest.raises(ValueError, match="^ours$"):
        run()


def test_an_output_that_nobody_reads_does_not_stop_a_run(base: Path, samples: Path, tmp_path: Path):
    out_dir, reads_and_writes = tmp_path / "out", os.pipe()
    command = f"finetune {base} --data JSON --data.json_path {samples} --data.val_split_fraction 0.1 --precision 32-true --train.epochs 1"
    os.close(reads_and_writes[0])
    words = [sys.executable, "-m", "litgpt", *command.split(), "--out_dir", str(out_dir)]
    done = subprocess.run(words, stdout=reads_and_writes[1], stderr=subprocess.PIPE, text=True)
    os.close(reads_and_writes[1])
    assert done.returncode == 0, done.stderr
    assert "Nothing more is shown" in done.stderr and "Traceback" not in done.stderr
    assert (out_dir / "final" / "model.safetensors").is_file()


def test_a_signal_is_answered_at_once(run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.setattr(loop, "forward_backward", at_call(2, loop.forward_backward, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + signal.SIGINT
    out, err = capfd.readouterr()
    assert err.count("Stopping after this step ...") == 1 and "Stopped after step" in out


def test_another_runs_step_does_not_replace_a_run(run, tmp_path: Path):
    train = dict(max_steps=2, save_interval=1)
    run(out_dir="a", train=train)
    run(out_dir="b", train=train)
    with pytest.raises(UserError, match="already holds a run"):
        run(out_dir="a", train=train, resume=tmp_path / "b" / "step-000001")


def test_a_folder_that_another_run_writes_into_is_refused(run, tmp_path: Path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    with open(tmp_path / "out" / "logs" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another run is writing"):
            run(train=dict(max_steps=1))
    assert (run(train=dict(max_steps=1)) / "final").is_dir()


def test_a_run_that_still_lives_is_not_to_be_deleted_or_gone_on_with(run):
    out_dir = run(train=dict(max_steps=1))
    with held(out_dir), pytest.raises(UserError, match="^Another run is writing into"):
        run(train=dict(max_steps=1))
    with pytest.raises(UserError, match="already holds a run"):
        run(train=dict(max_steps=1))


def test_weights_that_are_not_finite_are_not_written(run, tmp_path: Path):
    with pytest.raises(UserError, match="no longer finite"):
        run("full", train=dict(max_steps=1, lr_warmup_steps=0, save_interval=None), eval=dict(final_validation=False), lr=1e39)
    assert not (tmp_path / "out" / "final").exists()
