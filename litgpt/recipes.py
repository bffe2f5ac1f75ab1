"""From recipes and flags to the words that jsonargparse wants: what overrides what, and how options may be named.

`rewritten` puts recipes first, so that flags override them whatever their order, spells names out, and turns every way to name an
optimizer into the fields of `OptimizerArgs`.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from jsonargparse import ArgumentParser, get_loader
from yaml import YAMLError

from litgpt.args import optimizer_fields
from litgpt.errors import MissingFile, UserError, did_you_mean

DATA = "litgpt.data"  # the package whose names `--data` accepts
OF_MOST_DATA = (  # options of data sets
    *("mask_prompt", "train_on", "truncation", "prompt_style", "val_split_fraction", "seed", "ignore_index", "num_workers"),
)
OLDER_NAMES = {"learning_rate": "lr", "weight_decay": "weight_decay", "beta1": "beta1", "beta2": "beta2"}  # of 2024, under `train`


class Options:
    """The names that a command's flags and recipes may use."""

    def __init__(self, parser: ArgumentParser, command: str) -> None:
        actions = parser._actions
        names = {(action.option_strings or [f"--{action.dest}"])[-1].removeprefix("--").removesuffix("+") for action in actions}
        self.command = command
        self.positionals = [action.dest for action in actions if not action.option_strings]
        self.objects = {name.removesuffix(".help") for name in names if name.endswith(".help")}  # their class is an option too
        self.names = {name for name in names if not name.endswith(".help")}
        self.groups = {name.rpartition(".")[0] for name in self.names} - {""}
        self.chosen = self.objects - self.groups  # of several classes, whose arguments are known once one is named
        if "optimizer" in self.groups:
            self.names |= {"optimizer.class_path", *(f"train.{name}" for name in OLDER_NAMES)}
            self.betas = parser.get_defaults().optimizer.betas

    def spelled_out(self, flag: str) -> str:
        """Return the full name of a flag, each of whose parts may be shortened as long as it stays unique."""
        done: list[str] = []
        parts = flag.split(".")
        for place, part in enumerate(parts):
            if done and ".".join(done) not in self.groups:
                return ".".join([*done, *parts[place:]])
            known = {name.split(".")[place] for name in self.names if name.split(".")[:place] == done and name.count(".") >= place}
            matches = [part] if part in known else sorted(name for name in known if name.startswith(part))
            if not matches:
                raise UserError(self.unknown(flag, "--"))
            if len(matches) > 1:
                choices = [".".join([*done, match]) for match in matches]
                raise UserError(f"`--{flag}` is short for several options: {', '.join(f'`--{choice}`' for choice in choices)}.")
            done.append(matches[0])
        return ".".join(done)

    def unknown(self, name: str, dashes: str = "", also: Iterable[str] = ()) -> str:
        """Say that there is no such option, and which one may have been meant."""
        hint = did_you_mean(name, [*self.names, *also]).replace("'", f"'{dashes}", 1) or f" `litgpt {self.command} -h` lists them."
        if name.startswith("optimizer."):
            hint += f" The arguments of its class go to `{dashes}optimizer.init_args.NAME`."
        return f"`litgpt {self.command}` has no option `{dashes}{name}`.{hint}"

    def check(self, recipe: Mapping[str, Any], group: str = "") -> None:
        """Raise a `UserError` unless every key of a recipe is an option."""
        for key, value in recipe.items():
            name = f"{group}.{key}".lstrip(".")
            if name not in self.names | self.groups:
                raise UserError(self.unknown(name))
            if name in self.groups and isinstance(value, Mapping):
                self.check(value, name)
            elif name in self.groups and value is not None and not (name == "optimizer" and isinstance(value, str)):
                raise UserError(f"`{name}` holds options, so it has to be a mapping, but got {value!r}.")


def rewritten(options: Options, argv: list[str], recipe: Mapping[str, Any]) -> list[str]:
    """Return the words as jsonargparse wants them: one recipe, then `--flag=value` with full names.

    Args:
        options: The names that the command knows.
        argv: The words after the command.
        recipe: Options that come before those in the files that `argv` names.
    """
    layers, groups, fields, positionals, flags = [recipe], [], [], [], []
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help"):
            return ["--help"]
        if word == "--":
            positionals += words
        elif not word.startswith("-") or word == "-":
            positionals.append(word)
        elif not word.startswith("--"):
            raise UserError(options.unknown(word))
        else:
            name, equals, value = word[2:].partition("=")
            name = options.spelled_out(name)
            if name == "help":
                return ["--help"]
            if name.endswith(".help"):
                return [f"--{name}", *([value] if equals else words)]
            if name == "print_config":
                value = value.replace("skip_null", "skip_unset")
            elif not equals and (value := next(words, "--")).startswith("--"):
                raise UserError(f"`--{name}` wants a value. Write `--{name}=VALUE` if it begins with dashes.")
            if name == "config":
                layers.append(read_recipe(value))
            elif name in options.objects and is_recipe(value):
                groups.append({name: read_recipe(value)})
            elif name in options.groups:
                groups.append({name: mapping_in(value, name)})
            elif name in options.chosen:  # before jsonargparse sees a recipe's class, which may be one that we lack
                groups.append({name: yaml_value(value, name)})
            elif name.startswith("optimizer.") or name.removeprefix("train.") in OLDER_NAMES:
                fields.append(nested(name, yaml_value(value, name)))
            elif name in options.positionals:
                fields.append({name: value})
            else:
                flags.append((name, value))
    if len(positionals) > len(options.positionals):
        surplus = " ".join(positionals[len(options.positionals) :])
        takes = ", ".join(f"`{name}`" for name in options.positionals) or "none"
        raise UserError(f"`litgpt {options.command}` takes {takes} without a flag, but also got {surplus!r}.")
    fields.append(dict(zip(options.positionals, positionals)))
    merged = merged_recipe(options, [*layers, *groups, *fields], {name for name, _ in flags})
    for name, value in merged.items():
        refuse_empty(name, value)
    for name, value in flags:
        refuse_empty(name, yaml_value(value, name) if name.startswith("data.") and "class_path" in value else value)
    flags.sort(key=lambda flag: flag[0].count("."))  # a class before its arguments
    return [f"--config={json.dumps(merged, default=str, ensure_ascii=False)}", *(f"--{name}={value}" for name, value in flags)]


def merged_recipe(options: Options, layers: Iterable[Mapping[str, Any]], flags: Set[str] = frozenset()) -> dict[str, Any]:
    """Return one recipe in which later layers win, and older names and every form of `optimizer` are today's fields.

    Says which options that most data sets have are lost where another data set takes a recipe's place.

    Args:
        options: The names that the command knows.
        layers: Recipes, of which later ones win.
        flags: The names of the flags that win over all of them.
    """
    merged: dict[str, Any] = {}
    lost: dict[str, Any] = {}  # options of the data set
    for layer in layers:
        options.check(layer)
        layer = {name: value for name, value in layer.items() if not (value is None and name in options.groups)}
        for name in options.objects & set(layer):
            if isinstance(layer[name], str) and is_recipe(layer[name]):
                layer[name] = read_recipe(layer[name])
            elif isinstance(layer[name], str) and name in options.chosen:
                layer[name] = {"class_path": layer[name]}
        if "optimizer" in options.groups:
            optimizer = optimizer_fields(layer.pop("optimizer", {}))
            train = dict(layer.get("train", {}))
            older = {field: train.pop(name) for name, field in OLDER_NAMES.items() if name in train}
            if "betas" in optimizer:
                for earlier in (older, merged.get("optimizer", {})):
                    earlier.pop("beta1", None)
                    earlier.pop("beta2", None)
            layer |= {"train": train, "optimizer": older | optimizer}
        lost |= _lost(merged.get("data"), layer.get("data"))
        merge(merged, layer)
    given = {f"data.{name}" for name in _init_args(merged.get("data"))} | flags
    if shown := [f"`--data.{name}` {value!r}" for name, value in lost.items() if f"data.{name}" not in given]:
        print(f"Another data set takes the place of the recipe's, without that one's {', '.join(shown)}.", file=sys.stderr)
    optimizer = merged.get("optimizer", {})
    if {"beta1", "beta2"} & set(optimizer):
        first, second = optimizer.get("betas", options.betas)
        optimizer["betas"] = [optimizer.pop("beta1", first), optimizer.pop("beta2", second)]
    for name in options.chosen & set(merged):
        if isinstance(merged[name], dict) and list(merged[name]) == ["class_path"]:  # errors show it as it was written
            merged[name] = merged[name]["class_path"]
    return {name: value for name, value in merged.items() if value != {}}


def merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Put options over others in place. Another class does not inherit the arguments of the one before."""
    for key, value in new.items():
        old = into.get(key)
        if not isinstance(old, dict) or not isinstance(value, Mapping) or _class_of(value, old) != _class_of(old):
            into[key] = dict(value) if isinstance(value, Mapping) else value
            continue
        if value.get("name", old.get("name")) != old.get("name"):
            old.pop("init_args", None)
        merge(old, value)


def _init_args(data: Any) -> Mapping[str, Any]:
    init_args = data.get("init_args") if isinstance(data, Mapping) else None
    return init_args if isinstance(init_args, Mapping) else {}


def _lost(old: Any, new: Any) -> dict[str, Any]:
    """Return the options in a recipe's data set that another one has too, and does not inherit."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping) or _class_of(new, old) == _class_of(old):
        return {}
    return {name: value for name, value in _init_args(old).items() if name in OF_MOST_DATA and value is not None}


def refuse_empty(name: str, value: Any) -> None:
    """Raise a `UserError` for an option that names a file or folder and is empty text, for that would be the current folder."""
    if value == "" and name.endswith(("path", "_dir")):
        raise UserError(f"`{name}` is empty, but names a file or folder. Write . for the current folder, or leave it out.")
    if isinstance(value, Mapping):
        for inner, part in value.items():
            refuse_empty(f"{name}.{inner}", part)
    elif isinstance(value, list):
        for part in value:
            refuse_empty(name, part)


def _class_of(options: Mapping[str, Any], default: Mapping[str, Any] | None = None) -> str:
    """Return the class that options are for, a data set of ours by its short name, or nothing."""
    path = str(options.get("class_path", _class_of(default) if default else ""))
    return path.rpartition(".")[2] if path.startswith(f"{DATA}.") else path


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return `{"a": {"b": value}}` for the name `a.b`."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def is_recipe(text: str) -> bool:
    """Whether the text names a YAML or JSON file, or an address of one."""
    return text.startswith(("http://", "https://")) or ("\n" not in text and Path(text).suffix in (".yaml", ".yml", ".json"))


def read_recipe(where: str) -> dict[str, Any]:
    """Return the options in a YAML file or at a URL."""
    try:
        if where.startswith(("http://", "https://")):
            with urlopen(where, timeout=30) as response:
                text = response.read().decode()
        else:
            text = Path(where).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingFile(f"There is no file {where!r}. Options can be read from a YAML file or a URL.") from None
    except (OSError, ValueError) as error:  # among them every error of a URL, and bytes that are no text
        raise UserError(f"The recipe {where!r} cannot be read: {error}.") from None
    recipe = yaml_value(text, where)
    if not isinstance(recipe, dict):
        raise UserError(f"A recipe is a mapping from options to values, but {where!r} holds {recipe!r:.80}.")
    return recipe


def mapping_in(text: str, name: str) -> dict[str, Any] | str:
    """Return the mapping that a whole group of options was given as, or the name of an optimizer."""
    value = read_recipe(text) if is_recipe(text) else yaml_value(text, name)
    if isinstance(value, dict) or (name == "optimizer" and isinstance(value, str)):
        return value
    raise UserError(f"`--{name}` wants a mapping or a YAML file, but got {text!r}. For one option write `--{name}.OPTION`.")


def yaml_value(text: str, where: str) -> Any:
    """Return what YAML text means, with numbers such as 1e-3 as numbers."""
    try:
        return get_loader("yaml")(text)
    except YAMLError as error:
        raise UserError(f"{where!r} is not valid YAML: {' '.join(str(error).split())}.") from None
