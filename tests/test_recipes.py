"""What a recipe and flags become, and what is said of it."""

from pathlib import Path

import pytest

from litgpt.cli import make_parser
from litgpt.errors import UserError
from litgpt.finetune import lora
from litgpt.recipes import Options, merged_recipe, rewritten

OF_ALPACA = "{mask_prompt: false, prompt_style: alpaca, val_split_fraction: 0.1, seed: 7, ignore_index: -100, num_workers: 4, file_name: x}"
JSON = ("--data", "JSON", "--data.json_path", "f.json")
EMPTY_SOURCE = '[{"class_path": "JSON", "init_args": {"json_path": ""}}]'


@pytest.fixture(scope="module")
def options() -> Options:
    return Options(make_parser(lora.setup, "finetune"), "finetune")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (file := tmp_path / "recipe.yaml").write_text(f"data: {{class_path: litgpt.data.Alpaca2k, init_args: {OF_ALPACA}}}\n")
    return str(file)


@pytest.mark.parametrize("is_last", [True, False])
def test_options_of_a_recipes_data_set_that_another_one_does_not_inherit_are_named(options, recipe, capsys, is_last):
    words = [*JSON, "--data.seed", "8", "--config", recipe] if is_last else ["--config", recipe, *JSON, "--data.seed", "8"]
    rewritten(options, words, {})
    (said,) = capsys.readouterr().err.splitlines()
    kept = "`--data.mask_prompt` False, `--data.prompt_style` 'alpaca', `--data.val_split_fraction` 0.1, `--data.ignore_index` -100"
    assert said == f"Another data set takes the place of the recipe's, without that one's {kept}, `--data.num_workers` 4."


def test_nothing_is_said_where_nothing_is_lost(options, recipe, capsys, tmp_path):
    same = ["--config", recipe, "--data", "litgpt.data.Alpaca2k"]
    (bare := tmp_path / "bare.yaml").write_text("data: Alpaca2k\n")
    null = tmp_path / "null.yaml"
    null.write_text("data: {class_path: Alpaca2k, init_args: {prompt_style: null, download_dir: x}}\n")
    given = [f"--data.{option}={value}" for option, value in dict(mask_prompt=0, prompt_style="x", val_split_fraction=0, seed=1).items()]
    given += ["--data.ignore_index=1", "--data.num_workers=1"]
    for words in (same, ["--config", str(bare), *JSON], ["--config", str(null), *JSON], ["--config", recipe, *JSON, *given], JSON):
        rewritten(options, list(words), {})
        assert capsys.readouterr().err == "", words


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["m", "--out_dir", ""], "out_dir"),
        (["m", "--out_dir="], "out_dir"),
        ([""], "checkpoint_dir"),
        (["m", "--data", "JSON", "--data.json_path", ""], "data.json_path"),
        (["m", "--data", '{"class_path": "JSON", "init_args": {"json_path": ""}}'], "data.init_args.json_path"),
        (["m", "--data", "Chat", "--data.path", ""], "data.path"),
        (["m", "--data", "Mix", "--data.sources", EMPTY_SOURCE], "data.sources.init_args.json_path"),
        (
            ["m", "--data", f'{{"class_path": "Mix", "init_args": {{"sources": {EMPTY_SOURCE}}}}}'],
            "data.init_args.sources.init_args.json_path",
        ),
    ],
)
def test_an_empty_name_of_a_file_or_folder_is_refused(options, words, name):
    with pytest.raises(UserError, match=f"^`{name}` is empty, but names a file or folder"):
        rewritten(options, words, {})


def test_other_texts_may_be_empty(options):
    assert rewritten(options, ["m", "--access_token", ""], {})[-1] == "--access_token="


@pytest.mark.parametrize(
    ("layers", "betas"),
    [
        ([{"train": {"beta1": 0.5, "beta2": 0.6}}, {"optimizer": {"betas": [0.8, 0.99]}}], [0.8, 0.99]),
        ([{"train": {"beta1": 0.5}}, {"optimizer": {"init_args": {"betas": [0.8, 0.99]}}}], [0.8, 0.99]),
        ([{"train": {"beta1": 0.5}, "optimizer": {"betas": [0.8, 0.99]}}], [0.8, 0.99]),
        ([{"optimizer": {"betas": [0.8, 0.99]}}, {"train": {"beta1": 0.5}}], [0.5, 0.99]),
    ],
)
def test_betas_and_their_older_names_override_each_other(options, layers, betas):
    assert merged_recipe(options, layers)["optimizer"]["betas"] == betas
