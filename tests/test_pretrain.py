import csv
import json
import math
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.run_and_kill import run_and_kill
from safetensors.torch import load_file
from speaking import make_checkpoint, make_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from litgpt import cli, config, pretrain
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.checkpoint import load_model
from litgpt.config import Config
from litgpt.data import JSON, TextFiles
from litgpt.errors import UserError
from litgpt.files import read_yaml
from litgpt.generate import run as speaking

WORDS = "the llama eats grass and hay while a small dog sleeps under old trees near rivers".split()
TINY = dict(block_size=64, n_layer=2, n_embd=32, n_head=4, intermediate_size=64)
COMMAND = (
    "pretrain EleutherAI/pythia-160m --tokenizer_dir EleutherAI/pythia-160m --data TextFiles "
    "--data.train_data_path custom_texts/ --out_dir out/custom-model"
)
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of a language that has 16 words."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    (folder / "text.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(2500)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), context=64)


@pytest.fixture
def tiny_pythia(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pythia's smaller sister, under its name."""
    small = config.name_to_config["pythia-160m"] | TINY | dict(padded_vocab_size=320)
    monkeypatch.setitem(config.name_to_config, "pythia-160m", small)


@pytest.fixture
def run(base: Path, texts: Path, tmp_path: Path):
    """Pretrains a tiny model on the texts; returns the run's folder."""

    def run(out_dir: str = "out", train: dict = {}, **options: Any) -> Path:  # noqa: B006
        if "initial_checkpoint_dir" in options:
            options = {"model_config": None} | options  # the checkpoint's architecture is kept
        name = options.pop("name", "pythia-14m")
        pretrain.setup(name, **arguments(base, texts, tmp_path / out_dir, train) | options)
        return tmp_path / out_dir

    return run


def arguments(base: Path, texts: Path, out_dir: Path, train: dict) -> dict[str, Any]:
    return dict(
        model_config=Config(name="tiny", **TINY, padded_vocab_size=320),
        tokenizer_dir=base,
        out_dir=out_dir,
        precision="32-true",
        data=TextFiles(train_data_path=texts, num_workers=0),
        train=TrainArgs(**dict(global_batch_size=4, max_steps=12) | train),
        eval=EvalArgs(interval=1000, final_validation=False),
        optimizer=OptimizerArgs(lr=3e-3, weight_decay=0.1),
        devices=1,
        logger_name="csv",
    )


def logged(out_dir: Path, column: str, version: int = 0) -> dict[int, float]:
    """The values of one column of the log, by step."""
    with open(out_dir / "logs" / "csv" / f"version_{version}" / "metrics.csv") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_loads_in_transformers(final: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(IDS).logits, load_model(final)(IDS), rtol=0, atol=2e-5)


# The README's commands


def test_the_commands_of_the_readme_run_as_written_and_learn(
    tiny_pythia: None, base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "custom_texts").symlink_to(texts)
    make_tokenizer(tmp_path / "checkpoints" / "EleutherAI" / "pythia-160m", template=None)
    assert cli.main([*COMMAND.split(), "--train.max_tokens", "20_000", "--train.log_interval", "100"]) == 0
    final = tmp_path / "out" / "custom-model" / "final"
    first = last_validation(capsys.readouterr().out)
    assert first < 0.5 * math.log(300)
    assert_loads_in_transformers(final)
    assert speaking.load(final).tokenizer.vocab_size == 300
    assert next((tmp_path / "out" / "custom-model" / "logs" / "tensorboard").rglob("events*"), None)

    (tmp_path / "checkpoints" / "EleutherAI" / "pythia-160m").rename(tmp_path / "tokenizer")
    final.rename(tmp_path / "checkpoints" / "EleutherAI" / "pythia-160m")
    words = [*COMMAND.split(), "--initial_checkpoint_dir", "EleutherAI/pythia-160m", "--train.max_tokens", "8_000"]
    assert cli.main([*words, "--eval.initial_validation", "true", "--train.log_interval", "100", "--overwrite", "true"]) == 0
    out = capsys.readouterr().out
    assert f"step 0 | val loss {first:.3f}" in out
    assert last_validation(out) < first
    assert_loads_in_transformers(final)


def last_validation(out: str) -> float:
    return float(out.rpartition("val loss ")[2].split()[0])


# What a run begins and ends with


def test_a_new_model_has_the_deviations_of_gpt_neox_and_depends_on_the_seed_alone():
    made = Config(name="tiny", n_layer=3, n_embd=256, n_head=4, padded_vocab_size=512, block_size=64)
    torch.manual_seed(1)
    first = pretrain.new_model(made, seed=7).state_dict()
    torch.manual_seed(2)
    again, other = (pretrain.new_model(made, seed=seed).state_dict() for seed in (7, 8))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.ndim == 2:
            assert not torch.equal(weight, other[name])
            std = 1 / (3 * math.sqrt(256)) if name.endswith("proj.weight") else math.sqrt(2 / (5 * 256))
            assert weight.std().item() == pytest.approx(std, rel=0.02), name
        elif name.endswith("bias"):
            assert not weight.any()
        else:
            assert torch.equal(weight, torch.ones_like(weight)), name
    assert not torch.equal(first["transformer.h.0.mlp.proj.weight"], first["transformer.h.1.mlp.proj.weight"])


def test_a_head_can_be_tied(run):
    final = run(train=dict(tie_embeddings=True, max_steps=2)) / "final"
    assert Config.from_checkpoint(final).tie_embeddings and json.loads((final / "config.json").read_text())["tie_word_embeddings"]
    assert_loads_in_transformers(final)


def test_training_on_keeps_architecture_dtype_and_prompt_style(run, base: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "start")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "start" / file).write_bytes((base / file).read_bytes())
    (tmp_path / "start" / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    final = run(initial_checkpoint_dir=tmp_path / "start", tokenizer_dir=None, train=dict(max_steps=2)) / "final"
    assert Config.from_checkpoint(final).family == "llama"
    assert {tensor.dtype for tensor in weights(final).values()} == {torch.bfloat16}
    assert (final / "prompt_style.yaml").read_text() == "class_path: litgpt.prompts.Alpaca\n"


def test_a_step_is_a_checkpoint_directory_and_options_are_a_recipe(run, tmp_path: Path):
    out_dir = run(train=dict(max_steps=2, save_interval=2))
    step, final = (load_model(out_dir / name).state_dict() for name in ("step-000002", "final"))
    assert step.keys() == final.keys() and all(torch.equal(step[name], final[name]) for name in step)
    assert cli.main(["pretrain", "--config", str(out_dir / "final" / "hyperparameters.yaml"), "--out_dir", str(tmp_path / "again")]) == 0
    assert logged(out_dir, "loss") == logged(tmp_path / "again", "loss")


@pytest.mark.parametrize("named_again", [True, False])
def test_a_continued_run_is_resumed_as_it_began(run, base: Path, named_again: bool):
    settings = dict(train=dict(max_steps=4, save_interval=2), optimizer=OptimizerArgs(lr=None))
    out_dir = run(initial_checkpoint_dir=base, **settings)
    rates, whole = logged(out_dir, "learning_rate"), weights(out_dir / "final")
    for name in ("final", "step-000004"):
        shutil.rmtree(out_dir / name)
    run(**dict(initial_checkpoint_dir=base) if named_again else dict(model_config=None), resume=True, **settings)
    assert logged(out_dir, "learning_rate", version=1) == {step: rates[step] for step in (3, 4)}
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(out_dir / "final").items())


# The loop


def test_a_killed_run_goes_on_bit_for_bit(run, base: Path, texts: Path, tmp_path: Path):
    train, at = dict(save_interval=3, max_steps=13), random.Random(5).randrange(5, 13)
    reference, killed = run("reference", train), tmp_path / "killed"
    assert run_and_kill("litgpt.pretrain", at, "tiny", **arguments(base, texts, killed, train)) == -signal.SIGKILL
    last = (at - 1) // 3 * 3
    assert max(path.name for path in killed.iterdir()) == f"step-{last:06d}"
    run("killed", train, resume=True)
    expected = logged(reference, "loss")
    assert logged(killed, "loss", version=1) == {step: loss for step, loss in expected.items() if step > last}
    for name, weight in weights(reference / "final").items():
        assert torch.equal(weight, weights(killed / "final")[name]), name


def test_the_data_is_gone_through_again_until_the_limit(run):
    out_dir = run(train=dict(global_batch_size=32, max_steps=None, max_tokens=30_000))
    epochs, tokens = logged(out_dir, "epoch"), logged(out_dir, "total_tokens")
    assert max(epochs.values()) > 1
    *earlier, last = tokens.values()
    assert last >= 30_000 and all(n < 30_000 for n in earlier)


def test_a_batch_that_was_chosen_stays_when_the_run_goes_on_to_another_limit(run, monkeypatch):
    monkeypatch.setattr(pretrain, "N_STEPS", 4)
    open_ones = dict(global_batch_size=None, max_steps=2, save_interval=2)
    out_dir = run(train=open_ones | dict(epochs=1))
    chosen = read_yaml(out_dir / "step-000002" / "hyperparameters.yaml")["train"]["global_batch_size"]
    run(train=open_ones | dict(epochs=4, max_steps=3), resume=True)
    assert read_yaml(out_dir / "final" / "hyperparameters.yaml")["train"]["global_batch_size"] == chosen > 1


@pytest.mark.parametrize(
    ("train", "n_samples", "length", "expected"),
    [
        (dict(max_tokens=10_000_000), 1_000, 2048, 8),  # the README's: 611 steps
        (dict(max_tokens=3 * 10**12), 10**9, 2048, 512),
        (dict(max_tokens=20_000), 1_000, 64, 1),
        (dict(), 5_000, 2048, 8),
        (dict(epochs=4), 5_000, 2048, 32),
        (dict(global_batch_size=3), 5_000, 2048, 3),
    ],
)
def test_the_batch_leaves_enough_steps(train: dict, n_samples: int, length: int, expected: int):
    open_ones = dict(global_batch_size=None)
    chosen = pretrain.with_batch_size(TrainArgs(**open_ones | train), n_samples, length, n_shares=1)
    assert chosen.global_batch_size == expected
    assert chosen.epochs == (train.get("epochs") if "max_tokens" in train else train.get("epochs", 1))


# Options


def test_the_names_are_listed(capsys: pytest.CaptureFixture):
    assert cli.main(["pretrain", "list"]) == 0
    assert "EleutherAI/pythia-160m" in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model_config=None, name="pythia-14n"), "Did you mean"),
        (dict(model_config=Config(name="x", **TINY, padded_vocab_size=320, family="llama")), "`family` is 'llama', which cannot express"),
        (dict(resume="auto", overwrite=True), "Give one"),
        (dict(model_config=Config(name="two"), initial_checkpoint_dir=Path("anything")), "Give one of them"),
        (dict(data=None), "--data TextFiles"),
        (dict(eval=EvalArgs(max_new_tokens=10)), "max_new_tokens"),
        (dict(model_config=Config(name="few", **TINY, vocab_size=100, padded_vocab_size=100)), "The tokenizer in"),
        (dict(tokenizer_dir=None), "--tokenizer_dir"),
        (dict(train=dict(max_seq_length=65)), "context is 64"),
        (dict(tokenizer_dir="no/such"), "no/such"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_and_leave_no_folder(run, options: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_added_tokens_count_among_those_that_the_model_has_to_know(run, tmp_path: Path):
    make_tokenizer(tmp_path / "larger", template=None)
    tokenizer = Tokenizer.from_file(str(tmp_path / "larger" / "tokenizer.json"))
    tokenizer.add_tokens([f"<more-{i}>" for i in range(30)])
    tokenizer.save(str(tmp_path / "larger" / "tokenizer.json"))
    with pytest.raises(UserError, match="knows 330 tokens, but the model tiny only 320"):
        run(tokenizer_dir=tmp_path / "larger")


def test_a_continued_run_is_resumed_with_its_own_initial_weights_only(run, base: Path, tmp_path: Path):
    train = dict(max_steps=2, save_interval=1)
    run(initial_checkpoint_dir=base, train=train)
    with pytest.raises(UserError, match="fingerprint of the initial weights"):
        run(initial_checkpoint_dir=make_checkpoint(tmp_path / "other", context=64, seed=1), train=train, resume=True)


def test_an_unknown_name_is_refused_with_the_nearest_one(texts: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["pretrain", "pythia-160", "--data", "TextFiles", "--data.train_data_path", str(texts)]) == 2
    assert "Did you mean 'pythia-160m'?" in capsys.readouterr().err


def test_instructions_are_refused(run, tmp_path: Path):
    (tmp_path / "samples.json").write_text(json.dumps([{"instruction": "Say yes", "output": "yes"}] * 4))
    with pytest.raises(UserError, match="litgpt finetune"):
        run(data=JSON(json_path=tmp_path / "samples.json", val_split_fraction=0.5))


def test_a_name_beside_an_initial_checkpoint_has_to_be_known_and_its_architecture_does_not_count(
    run, base: Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(UserError, match="'x' is not a known model name"):
        run(initial_checkpoint_dir=base, name="x")
    run("known", initial_checkpoint_dir=base, name="pythia-14m", train=dict(max_steps=1))
    assert f"The architecture is that of the model in {base}, which is not the one called 'pythia-14m'." in capsys.readouterr().err
    run("own", initial_checkpoint_dir=base, name=base.name, train=dict(max_steps=1))
    assert "architecture" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "name"), [(dict(parallel_residual=True), "parallel_residual"), (dict(norm_class_name="LayerNorm"), "norm_class_name")]
)
def test_a_family_that_cannot_express_the_config_is_refused_and_none_is_said(
    run, tmp_path: Path, changes: dict, name: str, capsys: pytest.CaptureFixture
):
    of_llama = dict(norm_class_name="RMSNorm", bias=False, mlp_class_name="LLaMAMLP", rotary_percentage=1.0, parallel_residual=False)
    sizes = dict(name="tiny", **TINY, padded_vocab_size=320)
    with pytest.raises(UserError, match=f"`family` is 'llama', which cannot express that `{name}` is"):
        run(model_config=Config(**sizes, **of_llama | changes, family="llama"))
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    final = run(model_config=Config(**sizes, **of_llama | changes), train=dict(max_steps=1)) / "final"
    said = capsys.readouterr().out.splitlines()
    assert "only this library will be able to use it" in said[1]
    assert json.loads((final / "config.json").read_text())["model_type"] == "litgpt"
    run("fits", model_config=Config(**sizes, **of_llama, family="llama"), train=dict(max_steps=1))
    assert "only this library" not in capsys.readouterr().out


def test_a_vocabulary_smaller_than_the_tokenizers_is_raised_to_it(run, tmp_path: Path, capsys: pytest.CaptureFixture):
    final = run(model_config=Config(name="tiny", **TINY, vocab_size=10, padded_vocab_size=320), train=dict(max_steps=1)) / "final"
    assert "`vocab_size` is raised from 10 to 300" in capsys.readouterr().out
    assert_loads_in_transformers(final)


def test_the_initial_checkpoint_the_tokenizer_and_the_texts_are_not_deleted(run, base: Path, texts: Path, tmp_path: Path):
    run(train=dict(max_steps=1))
    (final := tmp_path / "out" / "final").joinpath("text.txt").write_bytes((texts / "text.txt").read_bytes())
    before = sorted(path.name for path in final.iterdir())
    reading = [
        dict(initial_checkpoint_dir=final, tokenizer_dir=None),
        dict(tokenizer_dir=final),
        dict(data=TextFiles(final, num_workers=0)),
        dict(data=TextFiles(texts, val_data_path=final / "text.txt", num_workers=0)),
    ]
    for options in reading:
        with pytest.raises(UserError, match="`overwrite` would delete .*final, but this run reads"):
            run(overwrite=True, **options)
    assert sorted(path.name for path in final.iterdir()) == before
    run(overwrite=True, train=dict(max_steps=1))
    assert not (final / "text.txt").exists()


@pytest.mark.parametrize(
    "words", [["--data.train_data_path", ""], ["--data", '{"class_path": "TextFiles", "init_args": {"train_data_path": ""}}']]
)
def test_an_empty_path_is_not_the_current_folder(words: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("not to be read " * 100)
    data = [] if "--data" in words else ["--data", "TextFiles"]
    assert cli.main(["pretrain", "pythia-14m", *data, *words]) == 2
    assert "train_data_path` is empty" in capsys.readouterr().err
    with pytest.raises(UserError, match="`train_data_path` is empty"):
        TextFiles("")


def test_a_resumed_run_says_what_other_samples_it_would_see(run):
    train = dict(max_steps=2, save_interval=1)
    run(train=train)
    with pytest.raises(UserError, match=r"\(changed: train.max_seq_length null -> 32\). Resume with the model"):
        run(train=train | dict(max_seq_length=32), resume=True)


def test_experts_are_balanced_unless_told_otherwise(run, tmp_path: Path):
    of_mixtral = dict(norm_class_name="RMSNorm", bias=False, mlp_class_name="LLaMAMoE", rotary_percentage=1.0, parallel_residual=False)
    of_mixtral |= dict(n_expert=4, n_expert_per_token=2, norm_topk_prob=True)
    tiny = Config(name="tiny", **TINY, padded_vocab_size=320, **of_mixtral, family="mixtral")
    found = {}
    for balance in (None, 0.001, 0.0):
        out_dir = run(str(balance), model_config=tiny, train=dict(max_steps=3, expert_balance=balance))
        found[balance] = weights(out_dir / "final")
    assert Config.from_checkpoint(out_dir / "final").family == "mixtral"
    same = {name for name, tensor in found[None].items() if torch.equal(tensor, found[0.001][name])}
    differs = {name for name, tensor in found[None].items() if not torch.equal(tensor, found[0.0][name])}
    assert same == set(found[None]) and any("gate" in name for name in differs)
    with pytest.raises(UserError, match="`train.expert_balance` is a number of at least 0, but got -1"):
        run(model_config=tiny, train=dict(expert_balance=-1.0))


def test_blocks_that_are_computed_again_change_nothing_and_the_run_leaves_a_report(run):
    kept, again = (run(how, train=dict(max_steps=2, activation_checkpointing=how)) for how in ("none", "full"))
    assert logged(kept, "loss") == logged(again, "loss")
    assert "<svg" in (again / "report.html").read_text()


@pytest.mark.parametrize("option", [dict(packing="global"), dict(activation_checkpointing=2.0)])
def test_options_that_only_finetuning_has_are_refused(run, option):
    with pytest.raises(UserError, match=next(iter(option))):
        run(train=option)
