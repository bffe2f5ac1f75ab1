"""What the command line accepts, and what it says to what it does not."""

import importlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from litgpt import __main__, cli, recipes
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs, optimizer_fields, to_plain
from litgpt.data import JSON, Alpaca, DataModule
from litgpt.errors import UserError

PYTHON = [sys.executable, "-m", "litgpt"]


@dataclass
class Shape:
    """What a model is made of."""

    n_layer: int = 16
    """How many layers."""
    mixers: list[str] | None = None
    """The kind of each layer."""

    def __post_init__(self) -> None:
        if self.n_layer == 0:
            raise UserError("A model has layers.")
        if self.n_layer < 0:
            raise ValueError("a bug")


def train_model(
    method: str,
    checkpoint_dir: Path,
    *,
    out_dir: Path = Path("out"),
    precision: Literal["bf16-true", "bf16-mixed", "32-true"] | None = None,
    devices: int | Literal["auto"] = 1,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    model_config: Shape | None = None,
    train: TrainArgs = TrainArgs(global_batch_size=16, epochs=5),  # noqa: B008
    eval: EvalArgs = EvalArgs(interval=100),  # noqa: B008
    optimizer: OptimizerArgs = OptimizerArgs(lr=2e-4, weight_decay=0.1),  # noqa: B008
    logger_name: Literal["csv", "tensorboard"] = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Train.

    Args:
        method: What to train.
        checkpoint_dir: Where the model is.
        out_dir: Where results go.
        precision: The number format.
        devices: How many devices.
        resume: Where to go on.
        data: What to train on.
        model_config: What the model is made of.
        seed: The seed of it all.
        access_token: The key.
    """
    return {name: value for name, value in locals().items() if name != "fields"} | fields


def finetune(
    checkpoint_dir: Path,
    *,
    lora_alpha: int = 16,
    lora_key: bool = False,
    quantize: Literal["bnb.nf4"] | None = None,
    num_nodes: int = 1,
    **shared: Any,
) -> dict[str, Any]:
    """Finetune a model.

    Args:
        checkpoint_dir: The model to start from.
        lora_alpha: How strong the update is.
        lora_key: Whether the keys are trained.
    """
    return train_model("lora", checkpoint_dir, **{"lora_alpha": lora_alpha, "lora_key": lora_key}, **shared)


def answer(checkpoint_dir: Path, *, prompt: str = "What?", sys_prompt: str | None = None, top_k: int | None = 50) -> dict[str, Any]:
    """Answer."""
    return locals()


def run(*words: str) -> dict[str, Any]:
    return cli.run(finetune, "finetune", list(words))


def mistake(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        run(*words)
    message = str(caught.value)
    assert "\n" not in message and "<class" not in message and "Namespace" not in message
    return message


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


# Flags


def test_parameters_without_default_are_positional_and_all_others_are_flags():
    got = run("some/model", "--lora_alpha", "3", "--lora_key", "true", "--seed=1_000", "--train.max_tokens", "10_000_000")
    assert got["checkpoint_dir"] == Path("some/model") and got["method"] == "lora"
    assert (got["lora_alpha"], got["lora_key"], got["seed"], got["train"].max_tokens) == (3, True, 1000, 10_000_000)
    assert (got["train"].global_batch_size, got["eval"].interval, got["optimizer"].lr) == (16, 100, 2e-4)  # the command's own defaults


def test_unique_prefixes_are_spelled_out():
    got = run("m", "--lora_al", "3", "--train.ep", "2", "--optim.lr", "1e-3", "--prec", "32-true", "--optimizer.init.momentum", "0.5")
    assert (got["lora_alpha"], got["train"].epochs, got["precision"]) == (3, 2, "32-true")
    assert got["optimizer"] == OptimizerArgs(lr=1e-3, weight_decay=0.1, init_args={"momentum": 0.5})


def test_an_ambiguous_prefix_names_the_candidates():
    assert mistake("m", "--lora", "3") == "`--lora` is short for several options: `--lora_alpha`, `--lora_key`."
    assert "`--train.max_steps`, `--train.max_time`" in mistake("m", "--train.max", "3")


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        ("train.max_norm", "null", None),
        ("train.max_norm", "-1e-3", -1e-3),
        ("train.max_norm", "5e-1", 0.5),
        ("devices", "auto", "auto"),
        ("devices", "1", 1),
        ("devices", "-1", -1),
        ("resume", "true", True),
        ("resume", "auto", "auto"),
        ("resume", "out/step-000010", Path("out/step-000010")),
        ("access_token", "123", "123"),
        ("train.tie_embeddings", "True", True),
    ],
)
def test_a_value_gets_the_type_of_its_option(flag, value, expected):
    got = run("m", f"--{flag}", value)
    for part in flag.split("."):
        got = got[part] if isinstance(got, dict) else getattr(got, part)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("text", ["- a: b", "{x}", "[1", "1e3", "yes", "two\nlines", "-5 degrees", "a=b", "--dashes", ""])
def test_a_prompt_is_taken_as_it_is(text):
    assert cli.run(answer, "generate", ["m", f"--prompt={text}"])["prompt"] == text
    assert cli.run(answer, "generate", ["m", f"--sys_prompt={text}"])["sys_prompt"] == text


def test_words_after_two_dashes_are_positional():
    assert run("--seed", "1", "--", "--odd-name")["checkpoint_dir"] == Path("--odd-name")


def test_a_positional_argument_may_also_be_given_as_a_flag():
    assert run("--checkpoint_dir", "m")["checkpoint_dir"] == Path("m")


def test_a_group_of_options_may_be_a_mapping_or_a_file_and_single_flags_override_it(recipe):
    file = recipe("epochs: 3\nmin_lr: 6e-5\n")
    for words in [("--train", file), ("--train", '{"epochs": 3, "min_lr": 6e-5}')]:
        got = run("m", "--train.log_interval", "7", *words)["train"]
        assert got == TrainArgs(global_batch_size=16, epochs=3, min_lr=6e-5, log_interval=7)
    assert run("m", "--train", file, "--train", '{"epochs": 4}')["train"].epochs == 4


def test_help_shows_every_flag_with_its_text(capsys):
    assert run("-h") is None
    text = " ".join(capsys.readouterr().out.split())
    for part in [
        "--lora_alpha LORA_ALPHA How strong the update is. (type: int, default: 16)",
        "--seed SEED The seed of it all. (type: int, default: 1337)",
        "--train.epochs EPOCHS How often to go through the data. (type: int | null, default: 5)",
        "Literal['bf16-true', 'bf16-mixed', '32-true']",
        "checkpoint_dir The model to start from. (required, type: Path)",
        "--optimizer.lr LR The peak learning rate.",
        "litgpt.data.JSON",
    ]:
        assert part in text, part
    for name in (
        cli.Options(cli.make_parser(finetune, "finetune"), "finetune").names
        - {f"train.{old}" for old in recipes.OLDER_NAMES}
        - {"optimizer.class_path"}
    ):
        assert name in text, name


# Recipes


def test_flags_and_positionals_override_a_recipe_whatever_their_order(recipe):
    file = recipe("checkpoint_dir: theirs\nseed: 9\nlora_alpha: 4\ntrain:\n  epochs: 2\n")
    for words in [
        ("mine", "--seed", "1", "--train.epochs", "8", "--config", file),
        ("--config", file, "mine", "--seed", "1", "--train.epochs", "8"),
        ("--seed=1", f"--conf={file}", "--train.epochs=8", "--checkpoint_dir", "mine"),
    ]:
        got = run(*words)
        assert (str(got["checkpoint_dir"]), got["seed"], got["lora_alpha"], got["train"].epochs) == ("mine", 1, 4, 8)
    assert str(run("--config", file)["checkpoint_dir"]) == "theirs"


def test_later_recipes_override_earlier_ones(recipe):
    first = recipe("checkpoint_dir: m\nseed: 1\ntrain: {epochs: 2, log_interval: 3}\n", "first.yaml")
    second = recipe("train: {epochs: 4}\n", "second.yaml")
    got = run("--config", first, "--config", second)
    assert (got["seed"], got["train"].epochs, got["train"].log_interval) == (1, 4, 3)


def test_a_recipe_may_stand_above_the_command_under_its_name(recipe, monkeypatch, capsys):
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "finetune", (f"{__name__}:finetune", ""))
    monkeypatch.setattr(cli, "import_module", lambda name: sys.modules[name] if name != __name__ else _module(seen))
    file = recipe("finetune:\n  checkpoint_dir: m\n  seed: 9\n")
    assert cli.main(["--config", file, "finetune", "--lora_alpha", "2"]) == 0
    assert cli.main([f"--conf={file}"]) == 0
    assert [(str(got["checkpoint_dir"]), got["seed"], got["lora_alpha"]) for got in seen] == [("m", 9, 2), ("m", 9, 16)]
    assert cli.main(["--config", recipe("seed: 9\n"), "finetune", "m"]) == 2
    assert "holds the names of commands, not 'seed'" in capsys.readouterr().err


def _module(seen: list) -> Any:
    class Module:
        @staticmethod
        def finetune(checkpoint_dir: Path, *, lora_alpha: int = 16, seed: int = 1) -> None:
            seen.append(locals())

    return Module


def test_a_recipe_may_come_from_an_address():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/recipe.yaml" else 404)
            self.end_headers()
            self.wfile.write(b"seed: 77\n")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert run("m", "--config", f"{address}/recipe.yaml")["seed"] == 77
        assert "404" in mistake("m", "--config", f"{address}/other.yaml")
    finally:
        server.shutdown()
        server.server_close()
    assert "cannot be read" in mistake("m", "--config", f"{address}/recipe.yaml")


RECIPE_0_5 = """
checkpoint_dir: checkpoints/org/model
out_dir: out/finetune/model
precision: bf16-true
quantize: null
devices: 1
num_nodes: 1
lora_alpha: 32
lora_key: true
data:
  class_path: litgpt.data.JSON
  init_args:
    json_path: my.json
    mask_prompt: false
    prompt_style: alpaca
    ignore_index: -100
    seed: 42
    num_workers: 4
train:
  save_interval: 200
  global_batch_size: 8
  epochs: 2
  max_norm: null
  min_lr: 6.0e-05
eval:
  interval: 25
  initial_validation: false
logger_name: csv
seed: 1337
optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 6e-4
    weight_decay: 0.0
    betas:
    - 0.9
    - 0.99
"""

RECIPE_2024 = """
checkpoint_dir: checkpoints/org/model
data: Alpaca
train:
  global_batch_size: 8
  learning_rate: 6e-4
  weight_decay: 0.0
  beta1: 0.9
  beta2: 0.99
  min_lr: 6.0e-05
"""


@pytest.mark.parametrize("text", [RECIPE_0_5, RECIPE_2024], ids=["0.5", "2024"])
def test_both_generations_of_litgpt_recipes_work(recipe, text):
    got = run("--config", recipe(text))
    expected = "torch.optim.AdamW" if "class_path: torch" in text else "AdamW"
    assert got["optimizer"] == OptimizerArgs(expected, lr=6e-4, weight_decay=0.0, betas=(0.9, 0.99))
    assert (got["train"].global_batch_size, got["train"].min_lr) == (8, 6e-5)
    if text is RECIPE_0_5:
        assert isinstance(got["data"], JSON) and got["data"].mask_prompt is False and got["train"].max_norm is None
        assert (got["eval"].interval, got["lora_key"], got["train"].epochs) == (25, True, 2)
    else:
        assert isinstance(got["data"], Alpaca) and got["train"].epochs == 5


NULLS = """
  epochs: null
  max_tokens: 1000000
  max_steps: null
  max_seq_length: null
  tie_embeddings: null
"""


@pytest.mark.parametrize(
    "command, text",
    [
        ("finetune_lora", f"lora_r: 32\nlora_dropout: 0.05\nlora_query: true\nlora_head: false\n{RECIPE_0_5}"),
        ("finetune", f"quantize: bnb.nf4\nlora_mlp: false\n{RECIPE_2024.rstrip()}{NULLS.replace('epochs: null', 'epochs: 4')}"),
        ("finetune_full", RECIPE_0_5.replace("quantize: null\n", "").replace("lora_alpha: 32\nlora_key: true\n", "")),
        (
            "pretrain",
            f"model_name: pythia-14m\nmodel_config: null\ninitial_checkpoint_dir: null\nresume: false\ndata: Alpaca\ntrain:{NULLS}",
        ),
        (
            "pretrain",
            "model_name: pythia-14m\ndevices: auto\noptimizer: {class_path: torch.optim.AdamW, init_args: {lr: 6e-4}}",
        ),
    ],
)
def test_recipes_of_litgpt_are_read_by_their_commands(recipe, capsys, command, text):
    file = recipe(text)
    assert cli.main([command, "--config", file, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert cli.main([command, "--config", recipe(printed, "printed.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    printed, given = yaml.safe_load(printed), yaml.safe_load(text)
    for group in [given, given.get("train") or {}]:
        for key, value in group.items():
            if not isinstance(value, dict) and key not in ("learning_rate", "weight_decay", "beta1", "beta2", "data", "min_lr"):
                assert (printed if group is given else printed["train"])[key] == value, key
    if "6e-4" in text:
        assert printed["optimizer"]["lr"] == 6e-4


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--optimizer SGD", {"name": "SGD"}),
        ("--optimizer AdamW --optimizer.lr 1e-3", {"name": "AdamW", "lr": 1e-3}),
        ("--optimizer.lr 1e-3 --optimizer SGD", {"name": "SGD", "lr": 1e-3}),
        ("--optimizer.init_args.lr 1e-3", {"lr": 1e-3}),
        ("--optimizer.init_args.momentum 0.9", {"init_args": {"momentum": 0.9}}),
        ("--optimizer.class_path torch.optim.SGD", {"name": "torch.optim.SGD"}),
        ("--optimizer.betas [0.8,0.9]", {"betas": (0.8, 0.9)}),
        ("--optimizer.lr null", {"lr": None}),
        ("--optimizer.init_args.lr null", {"lr": None}),
        ("--train.learning_rate 1e-3 --train.weight_decay 0", {"lr": 1e-3, "weight_decay": 0.0}),
        ("--train.beta1 0.5", {"betas": (0.5, 0.95)}),
        ("--train.beta2 0.5 --train.beta1 0.4", {"betas": (0.4, 0.5)}),
        (
            '--optimizer={"class_path":"torch.optim.SGD","init_args":{"lr":0.1,"momentum":0.9}}',
            {"name": "torch.optim.SGD", "lr": 0.1, "init_args": {"momentum": 0.9}},
        ),
    ],
)
def test_every_way_to_name_an_optimizer_is_put_over_the_commands_defaults(words, expected):
    assert run("m", *words.split())["optimizer"] == OptimizerArgs(**({"lr": 2e-4, "weight_decay": 0.1} | expected))


def test_flags_of_the_optimizer_override_a_recipes(recipe):
    file = recipe("optimizer:\n  class_path: torch.optim.SGD\n  init_args: {lr: 0.5, momentum: 0.9, nesterov: true}\n")
    defaults = {"weight_decay": 0.1}
    got = run("m", "--optimizer.init_args.lr", "1e-3", "--optimizer.init_args.momentum", "0.1", "--config", file)["optimizer"]
    assert got == OptimizerArgs("torch.optim.SGD", lr=1e-3, init_args={"momentum": 0.1, "nesterov": True}, **defaults)
    got = run("m", "--optimizer", "AdamW", "--config", file)["optimizer"]
    assert got == OptimizerArgs("AdamW", lr=0.5, **defaults), "another class does not inherit the arguments of the first"


def test_printed_configurations_can_be_read_back(recipe, capsys):
    words = (
        "m",
        "--data",
        "JSON",
        "--data.json_path",
        "f.json",
        "--optimizer",
        "SGD",
        "--optimizer.init_args.momentum",
        "0.9",
        "--seed",
        "7",
    )
    expected = run(*words)
    for flag in ["--print_config", "--print_config=skip_default,skip_null", "--print_config=skip_null"]:
        with pytest.raises(SystemExit) as stop:
            run(*words, flag)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert ("null" in text, "lora_alpha" in text) == ("skip_null" not in flag, "skip_default" not in flag)
        got = run("--config", recipe(text))
        assert to_plain(got) == to_plain(expected)


# Classes


def test_data_may_be_a_short_name_an_import_path_a_mapping_or_a_subclass_of_ones_own(recipe, tmp_path, monkeypatch):
    (tmp_path / "data_of_mine.py").write_text(
        "from litgpt.data import DataModule\n\n\nclass Mine(DataModule):\n    def __init__(self, size: int = 3) -> None:\n"
        "        super().__init__()\n        self.size = size\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    by_file = recipe("class_path: JSON\ninit_args: {json_path: f.json}\n")
    for words in [
        ("--data", "JSON", "--data.json_path", "f.json"),
        ("--data.json_path=f.json", "--data=litgpt.data.JSON"),
        ("--data", '{"class_path": "JSON", "init_args": {"json_path": "f.json"}}'),
        ("--data", by_file),
        ("--config", recipe("data: {class_path: litgpt.data.JSON}\n", "c.yaml"), "--data.json_path", "f.json"),
    ]:
        got = run("m", *words)["data"]
        assert type(got) is JSON and got.json_path == Path("f.json"), words
    got = run("m", "--data", "data_of_mine.Mine", "--data.size", "5")["data"]
    assert isinstance(got, DataModule) and got.size == 5
    assert "init_args: {'size': 5}" in str(to_plain({"data": got})).replace("'init_args'", "init_args")


@pytest.mark.parametrize("theirs", ["{class_path: litgpt.data.Alpaca2k, init_args: {seed: 7, folder: x}}", "Alpaca2k"])
@pytest.mark.parametrize(
    "words",
    [
        ("--data", "JSON", "--data.json_path", "f.json"),
        ("--data.json_path=f.json", "--data=litgpt.data.JSON"),
        ("--data", '{"class_path": "JSON", "init_args": {"json_path": "f.json"}}'),
    ],
    ids=["name", "path", "mapping"],
)
def test_another_data_set_takes_the_place_of_a_recipes_even_of_one_that_we_lack(recipe, theirs, words):
    file = recipe(f"seed: 9\ndata: {theirs}\n")
    for ordered in [("--config", file, *words), (*words, "--config", file)]:
        got = run("m", *ordered)
        assert type(got["data"]) is JSON and (str(got["data"].json_path), got["data"].seed, got["seed"]) == ("f.json", 42, 9)
    by_file = recipe("class_path: JSON\ninit_args: {json_path: f.json}\n", "data.yaml")
    assert str(run("m", "--data", by_file, "--config", file)["data"].json_path) == "f.json"
    assert "but got 'Alpca'. Did you mean 'Alpaca'?" in mistake("m", "--data", "Alpca", "--config", file)
    assert run("m", "--data", "null", "--config", recipe("data: JSON\n", "known.yaml"))["data"] is None


@pytest.mark.parametrize("ours", ["JSON", "litgpt.data.JSON", "litgpt.data.json_data.JSON"])
@pytest.mark.parametrize("theirs", ["JSON", "litgpt.data.JSON", "litgpt.data.json_data.JSON"])
def test_the_same_data_set_by_any_of_its_names_keeps_a_recipes_arguments(recipe, theirs, ours):
    file = recipe(f"data: {{class_path: {theirs}, init_args: {{json_path: f.json, seed: 7}}}}\n")
    got = run("m", "--config", file, "--data", ours)["data"]
    assert (str(got.json_path), got.seed) == ("f.json", 7)
    got = run("m", "--config", file, "--data", f'{{"class_path": "{ours}", "init_args": {{"seed": 8}}}}')["data"]
    assert (str(got.json_path), got.seed) == ("f.json", 8)
    assert run("m", "--config", file, "--data", "Alpaca")["data"].seed == 42


def test_the_options_of_a_data_set_are_shown_with_those_it_inherits(capsys):
    assert run("m", "--data.help", "JSON") is None
    text = capsys.readouterr().out
    assert "--data.json_path" in text and "--data.mask_prompt" in text
    assert "Whether only answers are trained on" in " ".join(text.split())


def test_a_model_config_is_a_mapping_a_file_or_single_flags(recipe):
    file = recipe("n_layer: 3\nmixers: [attention]\n")
    assert run("m", "--model_config", file)["model_config"] == Shape(3, ["attention"])
    assert run("m", "--model_config", '{"n_layer": 3}')["model_config"] == Shape(3)
    assert run("m", "--model_config", file, "--model_config.n_layer", "2")["model_config"] == Shape(2, ["attention"])
    assert run("m", "--config", recipe(f"model_config: {file}\n", "c.yaml"))["model_config"] == Shape(3, ["attention"])
    assert run("m", "--config", recipe("model_config: null\n", "c.yaml"))["model_config"] is None


def test_what_a_constructor_raises_stays_what_it_is():
    assert mistake("m", "--model_config.n_layer", "0") == "A model has layers."
    with pytest.raises(ValueError, match="a bug") as caught:
        run("m", "--model_config.n_layer", "-1")
    assert not isinstance(caught.value, UserError)


# Mistakes


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "`litgpt finetune` needs `checkpoint_dir`."),
        ("m x", "`litgpt finetune` takes `checkpoint_dir` without a flag, but also got 'x'."),
        ("m --train.epochs abc", "`--train.epochs` must be an integer or null, but got 'abc'."),
        ("m --lora_alpha 1.5", "`--lora_alpha` must be an integer, but got '1.5'."),
        ("m --lora_alpha null", "`--lora_alpha` must be an integer, but got 'None'."),
        ("m --lora_key maybe", "`--lora_key` must be true or false, but got 'maybe'."),
        ("m --devices x", "`--devices` must be an integer or 'auto', but got 'x'."),
        (
            "m --precision bf16",
            "`--precision` must be 'bf16-true', 'bf16-mixed', '32-true' or null, but got 'bf16'. Did you mean 'bf16-true'?",
        ),
        (
            "m --train.lr_schedule cosin",
            "`--train.lr_schedule` must be 'cosine', 'linear', 'constant', but got 'cosin'. Did you mean 'cosine'?",
        ),
        ("m --optimizer.lr abc", "`--optimizer.lr` must be a number or null, but got 'abc'."),
        ("m --optimizer.betas [0.9]", "`--optimizer.betas` must be a list of 2 values, but got '[0.9]'."),
        ("m --trian.epochs 1", "`litgpt finetune` has no option `--trian.epochs`. Did you mean '--train.epochs'?"),
        ("m --train.epoks 1", "`litgpt finetune` has no option `--train.epoks`. Did you mean '--train.epochs'?"),
        ("m --epochs 1", "`litgpt finetune` has no option `--epochs`. Did you mean '--train.epochs'?"),
        ("m --zzz 1", "`litgpt finetune` has no option `--zzz`. `litgpt finetune -h` lists them."),
        ("m -q", "`litgpt finetune` has no option `-q`. `litgpt finetune -h` lists them."),
        ("m --seed.x 1", "`litgpt finetune` has no option `--seed.x`. Did you mean '--seed'?"),
        ("m --devices.x 1", "`litgpt finetune` has no option `--devices.x`. Did you mean '--devices'?"),
        ("m --seed", "`--seed` wants a value. Write `--seed=VALUE` if it begins with dashes."),
        ("m --seed --devices 1", "`--seed` wants a value. Write `--seed=VALUE` if it begins with dashes."),
        ("m --train x", "`--train` wants a mapping or a YAML file, but got 'x'. For one option write `--train.OPTION`."),
        ('m --train {"epoch":1}', "`litgpt finetune` has no option `train.epoch`. Did you mean 'train.epochs'?"),
        ("m --data JSON", "`--data litgpt.data.JSON` needs `--data.json_path`."),
        (
            "m --data JSON --data.json_path f --data.json_pth g",
            "`litgpt finetune` has no option `--data.json_pth`. Did you mean '--data.json_path'?",
        ),
        ("m --data JSON --data.json_path f --data.seed x", "`--data.seed` must be an integer, but got 'x'."),
        (
            'm --model_config {"n_layers":3}',
            "`litgpt finetune` has no option `--model_config.n_layers`. Did you mean '--model_config.n_layer'?",
        ),
    ],
)
def test_a_mistake_in_a_flag_is_one_sentence(words, message):
    assert mistake(*words.split()) == message


def test_a_misspelt_data_set_names_the_known_ones():
    message = mistake("m", "--data", "JSONL")
    assert message.startswith("`--data` must be one of Alpaca, ") and message.endswith("but got 'JSONL'. Did you mean 'JSON'?")
    assert "SFTDataset" not in message
    assert "(No module named 'nowhere')" in mistake("m", "--data", "nowhere.Data")
    in_recipe = mistake("m", "--data", '{"class_path": "litgpt.data.Alpca", "init_args": {"seed": 1}}')
    assert "but got 'litgpt.data.Alpca' (module 'litgpt.data' has no attribute 'Alpca')" in in_recipe
    assert in_recipe.endswith("Did you mean 'Alpaca'?")
    assert "Choose one with `--data NAME`: Alpaca" in mistake("m", "--data.json_path", "f.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ("sead: 1", "`litgpt finetune` has no option `sead`. Did you mean 'seed'?"),
        ("train: {epoch: 1}", "`litgpt finetune` has no option `train.epoch`. Did you mean 'train.epochs'?"),
        ("train: 3", "`train` holds options, so it has to be a mapping, but got 3."),
        ("optimizer: 3", "`optimizer` holds options, so it has to be a mapping, but got 3."),
        ("train: {epochs: x}", "`--train.epochs` must be an integer or null, but got 'x'."),
        ("optimizer: {class_path: SGD, init_args: 3}", "`--optimizer.init_args` must be a mapping, but got '3'."),
        (
            "data: {class_path: JSON, init_args: {json_path: f, sead: 1}}",
            "`litgpt finetune` has no option `--data.sead`. Did you mean '--data.seed'?",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(recipe, text, message):
    assert mistake("m", "--config", recipe(text)) == message


@pytest.mark.parametrize("text, part", [("a: [1", "is not valid YAML"), ("- 1", "A recipe is a mapping"), ("", "A recipe is a mapping")])
def test_a_file_that_is_no_recipe_is_one_sentence(recipe, text, part):
    assert part in mistake("m", "--config", recipe(text))


def test_a_missing_recipe_is_one_sentence(tmp_path):
    assert "There is no file" in mistake("m", "--config", str(tmp_path / "none.yaml"))
    assert "cannot be read" in mistake("m", "--config", str(tmp_path))


# Exit codes


@pytest.fixture
def command(monkeypatch):
    """Put a function in the place of a command."""

    def put(function: Any, name: str = "chat") -> None:
        monkeypatch.setitem(cli.COMMANDS, name, ("litgpt.errors:planted", ""))
        monkeypatch.setattr("litgpt.errors.planted", function, raising=False)

    return put


def test_a_bare_value_error_is_a_bug_and_shows_its_traceback(command, capsys):
    def broken(checkpoint_dir: str) -> None:
        raise ValueError("planted")

    command(broken)
    assert cli.main(["chat", "m"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and "ValueError: planted" in captured.err and not captured.out


def test_a_users_mistake_is_one_line_and_exit_code_2(command, capsys):
    def refused(checkpoint_dir: str, *, devices: int = 1) -> None:
        raise UserError(f"`devices` has to be 1 or more,\n but got {devices}.")

    command(refused)
    assert cli.main(["chat", "m", "--devices", "0"]) == 2
    assert capsys.readouterr() == ("", "litgpt: `devices` has to be 1 or more, but got 0.\n")
    assert cli.main(["chat", "m", "--devise", "0"]) == 2
    assert capsys.readouterr() == ("", "litgpt: `litgpt chat` has no option `--devise`. Did you mean '--devices'?\n")


@pytest.mark.parametrize("raised, code", [(KeyboardInterrupt(), 130), (SystemExit(3), 3), (SystemExit(), 0), (SystemExit("text"), 1)])
def test_other_ends_have_their_own_exit_codes(command, raised, code):
    def ended() -> None:
        raise raised

    command(ended)
    assert cli.main(["chat"]) == code


def test_ctrl_c_while_the_command_line_is_read_is_no_error(monkeypatch):
    class Interrupted(MetaPathFinder):
        def find_spec(self, name: str, *_):
            if name == "litgpt.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "litgpt.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        importlib.reload(__main__)
    assert stopped.value.code == 130


def test_help_and_printed_configurations_end_with_0(command, capsys):
    command(answer)
    assert cli.main(["chat", "-h"]) == 0
    assert "--sys_prompt" in capsys.readouterr().out
    assert cli.main(["chat", "m", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"checkpoint_dir": "m", "prompt": "What?", "sys_prompt": None, "top_k": 50}


@pytest.mark.parametrize("held, called", [("finetune", "finetune_lora"), ("finetune_lora", "finetune")])
def test_a_recipe_above_a_command_may_use_its_other_name(recipe, command, held, called):
    seen = []

    def planted(*, seed: int = 1) -> None:
        seen.append(seed)

    for name in (held, called):
        command(planted, name)
    assert cli.main(["--config", recipe(f"{held}: {{seed: 9}}\n"), called]) == 0 and seen == [9]


def test_a_recipe_above_a_command_is_used_or_refused(recipe, command, capsys):
    command(answer)
    file = recipe("evaluate: {seed: 1}\nchat: other.yaml\nserve:\n")
    assert cli.main(["--config", file, "validate"]) == 2
    assert "holds options of `evaluate` and `chat` and `serve`, but none of `validate`" in capsys.readouterr().err
    assert cli.main(["--config", file, "chat", "m"]) == 2
    assert "`chat` holds options, so it has to be a mapping, but got 'other.yaml'. A file goes behind" in capsys.readouterr().err
    assert cli.main(["--config", recipe("chat: null\n"), "chat", "m"]) == 0


def test_an_unknown_command_gets_the_usage_and_one_line(capsys):
    assert cli.main(["finetun"]) == 2
    assert capsys.readouterr().err == f"{cli.USAGE}\nlitgpt: No command is called 'finetun'. Did you mean 'finetune'?\n"
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith(cli.USAGE)
    assert cli.main(["--confg", "x"]) == 2
    assert "Did you mean '--config'?" in capsys.readouterr().err
    assert cli.main(["--config"]) == 2
    assert "wants a file or a URL" in capsys.readouterr().err


def test_a_warning_of_ours_says_nothing_of_code(capsys, recwarn):
    package = Path(cli.__file__).parent
    assert cli.formatted_warning("The rate rises.", UserWarning, str(package / "run.py"), 3) == "The rate rises.\n"
    assert "torch.py:3: UserWarning: Slow." in cli.formatted_warning("Slow.", UserWarning, "/site/torch.py", 3)


def test_the_overview_lists_every_command(capsys):
    assert cli.main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("litgpt ")


def test_a_reader_that_stops_early_is_no_error():
    program = "import sys; from litgpt import cli; cli.overview = lambda: 'x' * 1_000_000; sys.exit(cli.main(['-h']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_python_dash_m_litgpt_works():
    done = subprocess.run([*PYTHON, "chta"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "Did you mean 'chat'?" in done.stderr


# Plain values


def test_arguments_become_plain_values_that_a_recipe_can_hold(recipe):
    got = run("m", "--data", "JSON", "--data.json_path", "f.json", "--data.mask_prompt", "false", "--train.epochs", "2")
    plain = to_plain(got)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["checkpoint_dir"] == "m" and plain["train"]["epochs"] == 2 and plain["optimizer"]["betas"] == [0.9, 0.95]
    assert plain["data"]["class_path"].startswith("litgpt.data.") and plain["data"]["init_args"]["json_path"] == "f.json"
    again = run("--config", recipe(yaml.safe_dump({name: value for name, value in plain.items() if name != "method"})))
    assert to_plain(again) == plain


def test_an_optimizer_is_a_name_a_class_path_or_fields():
    assert optimizer_fields("SGD") == {"name": "SGD"}
    assert optimizer_fields({"class_path": "a.B", "init_args": {"lr": 1.0, "x": 2}}) == {"name": "a.B", "lr": 1.0, "init_args": {"x": 2}}
    assert optimizer_fields({"lr": 1.0, "betas": None}) == {"lr": 1.0}
    assert optimizer_fields({"lr": None, "init_args": {"betas": None}}) == {"lr": None, "init_args": {}}


def test_recipes_and_paths_may_hold_any_character(recipe):
    assert str(run("--config", recipe("checkpoint_dir: u/🦙\n"))["checkpoint_dir"]) == "u/🦙"
    assert str(run("u/🦙")["checkpoint_dir"]) == "u/🦙"
