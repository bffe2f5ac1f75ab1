"""What `-h` and `--data.help` show, and what a recipe may leave empty."""

import inspect
import re
from dataclasses import fields
from importlib import import_module

import pytest

from litgpt import cli
from litgpt.args import TrainArgs


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys, *words: str) -> str:
    assert cli.main(list(words)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def joined(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_the_whole_docstring_wrapped_and_without_words_of_the_parser(capsys, command):
    text = shown(capsys, command, "-h")
    module, function = cli.COMMANDS[command][0].split(":")
    manual = inspect.getdoc(getattr(import_module(module), function)).split("\nArgs:")[0].strip()
    assert joined(manual) in joined(text)
    for paragraph in manual.split("\n\n"):
        first = paragraph.split()[0]
        assert re.search(rf"^{re.escape(first)}", text, re.MULTILINE), "paragraphs stay apart"
    usage, described = text.split("\n\n", 1)
    assert usage.startswith(f"usage: litgpt {command} ")
    assert max(map(len, described[: described.index("options:")].splitlines())) <= 80
    for leak in ("Union[", "Optional[", "<class", "flags customizes", "Path to a configuration file", "DataModule,", "SFTModule"):
        assert leak not in joined(text), leak


def test_a_group_of_options_says_how_to_give_several_at_once(capsys):
    text = joined(shown(capsys, "finetune", "-h"))
    assert "--train CONFIG Several of the options below at once: a YAML file, or a mapping such as" in text
    assert all(f"litgpt.data.{name}" in text for name in cli.data_names())
    assert "(type: bool | Literal['auto'] | Path, default: False)" in text


def test_titles_are_wrapped(capsys):
    lines = shown(capsys, "pretrain", "-h").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Which optimizer, and how fast."))
    assert len(lines[start]) <= 80 and lines[start + 1].strip()


@pytest.mark.parametrize("name", ["JSON", "litgpt.data.JSON"])
def test_the_options_of_a_data_set_are_shown_with_the_command(capsys, name):
    text = shown(capsys, "finetune", "--data.help", name)
    assert text.startswith(f"usage: litgpt finetune --data {name} --data.json_path JSON_PATH")
    assert "Samples from your own files" in text and "(required, type: Path)" in joined(text)
    assert "<class" not in text and "Union[" not in text and "prompts.PromptStyle" not in text and ".help" not in text


def test_without_a_name_the_data_sets_are_listed(capsys):
    text = shown(capsys, "finetune", "--data.help")
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == cli.data_names()
    assert "`litgpt finetune --data.help NAME`" in text and "DataModule" not in text


@pytest.mark.parametrize(
    "name, hint",
    [("Jsn", " Did you mean 'JSON'?"), ("DataModule", ""), ("nowhere.Zzz", ""), ("litgpt.data.Alpca", " Did you mean 'Alpaca'?")],
)
def test_a_misspelt_data_set_gets_the_list_and_the_nearest(capsys, name, hint):
    assert cli.main(["finetune", "--data.help", name]) == 2
    message = f"`--data.help` wants one of {', '.join(cli.data_names())}, or the import path of a data set, but got"
    assert capsys.readouterr() == ("", f"litgpt: {message} {name!r}.{hint}\n")


def test_the_options_of_another_class_are_shown_with_the_command(capsys):
    text = shown(capsys, "pretrain", "--model_config.help")
    assert text.startswith("usage: litgpt pretrain [--model_config.name NAME]")
    assert "(type: dict[str, Any] | null, default: null)" in joined(text)


def test_surplus_words_alone_are_quoted(capsys):
    assert cli.main(["generate", "MODEL", "hello there"]) == 2
    assert capsys.readouterr().err == "litgpt: `litgpt generate` takes `checkpoint_dir` without a flag, but also got 'hello there'.\n"


def test_null_as_the_interval_of_saving_is_described_as_it_is():
    source = inspect.getsource(TrainArgs)
    assert "null saves no steps." in source and "save_interval" in {field.name for field in fields(TrainArgs)}


@pytest.mark.parametrize("line", ["temperature: null", "max_new_tokens: null"])
def test_null_in_a_recipe_is_refused_where_it_means_nothing(capsys, tmp_path, line):
    (tmp_path / "recipe.yaml").write_text(f"checkpoint_dir: m\n{line}\n")
    assert cli.main(["generate", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert f"`--{line.split(':')[0]}` must be" in capsys.readouterr().err
