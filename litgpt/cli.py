"""The command line: one table of commands, and what turns words and recipes into a function's arguments.

jsonargparse derives every flag, type and help text from the function's signature and docstring. Before it sees anything,
`rewritten` puts recipes first, so that flags override them whatever their order, spells names out, and turns every way to
name an optimizer into the fields of `OptimizerArgs`. `explained` makes one sentence of jsonargparse's errors.
"""

import inspect
import json
import os
import re
import sys
import textwrap
import traceback
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from urllib.request import urlopen

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, get_loader, set_parsing_settings
from yaml import YAMLError

from litgpt.args import optimizer_fields
from litgpt.errors import MissingFile, UserError, did_you_mean

COMMANDS = {  # name: (where its function is, what it does)
    "download": ("litgpt.scripts.download:download_from_hub", "Download a model, or `list` the known ones."),
    "chat": ("litgpt.chat.base:main", "Chat with a model."),
    "finetune": ("litgpt.finetune.lora:setup", "Finetune a model with LoRA."),
    "finetune_lora": ("litgpt.finetune.lora:setup", "The same, by its full name."),
    "finetune_full": ("litgpt.finetune.full:setup", "Finetune all parameters of a model."),
    "pretrain": ("litgpt.pretrain:setup", "Train a model from scratch, or on from a checkpoint."),
    "generate": ("litgpt.generate.base:main", "Answer one prompt."),
    "convert_to_litgpt": ("litgpt.scripts.convert_hf_checkpoint:convert_hf_checkpoint", "Write LitGPT's files beside a checkpoint's own."),
    "convert_from_litgpt": ("litgpt.scripts.convert_lit_checkpoint:convert_lit_checkpoint", "Write a complete Hugging Face folder."),
    "merge_lora": ("litgpt.scripts.merge_lora:merge_lora", "Add a LoRA update to the weights it was trained beside."),
}
USAGE = "usage: litgpt [-h] [--version] [--config FILE_OR_URL] COMMAND ..."
DATA = "litgpt.data"  # the package whose names `--data` accepts
OLDER_NAMES = {"learning_rate": "lr", "weight_decay": "weight_decay", "beta1": "beta1", "beta2": "beta2"}  # of 2024, under `train`
TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping", "NoneType": "null"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for a user's mistake, 1 for a bug of ours.

    Args:
        argv: The words after `litgpt`. By default those that this process was started with.
    """
    try:
        dispatch(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except UserError as error:
        print("litgpt:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:  # after printing help or a configuration
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def dispatch(argv: list[str]) -> None:
    """Find the command among the words and run it."""
    recipe: dict[str, Any] = {}
    while argv and argv[0].startswith("-"):
        flag, equals, value = argv.pop(0).partition("=")
        if flag in ("-h", "--help"):
            print(overview())
            return
        if flag == "--version":
            print("litgpt", version("litgpt"))
            return
        if len(flag) < 3 or not "--config".startswith(flag):
            raise usage_error(f"There is no option {flag!r} before the command." + did_you_mean(flag, ("--help", "--version", "--config")))
        if not equals and not argv:
            raise usage_error("`--config` wants a file or a URL.")
        merge(recipe, read_recipe(value if equals else argv.pop(0)))
    if unknown := [name for name in recipe if name not in COMMANDS]:
        raise UserError(
            f"Above a command, `--config` holds the names of commands, not {unknown[0]!r}." + did_you_mean(unknown[0], COMMANDS)
        )
    if not argv and len(recipe) == 1:
        argv = list(recipe)
    if not argv:
        raise usage_error("Which command? `litgpt -h` lists them.")
    name, *words = argv
    if name not in COMMANDS:
        raise usage_error(f"No command is called {name!r}." + did_you_mean(name, COMMANDS))
    module, function = COMMANDS[name][0].split(":")
    run(getattr(import_module(module), function), name, words, recipe.get(name) or {})


def overview() -> str:
    """Return the help text that lists the commands."""
    rows = [f"  {name:20} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([USAGE, "", "Commands:", *rows, "", "`litgpt COMMAND -h` shows the options of one."])


def usage_error(message: str) -> UserError:
    """Print how to call us, and return the error to raise."""
    print(USAGE, file=sys.stderr)
    return UserError(message)


def run(function: Callable[..., Any], command: str, argv: list[str], recipe: Mapping[str, Any] | None = None) -> Any:
    """Call a function with arguments from the command line, and return what it returns.

    Args:
        function: Its parameters without default are positional, all others are flags.
        command: The name of the command, for messages.
        argv: The words after the command.
        recipe: Options that the words override.
    """
    parser = make_parser(function, command)
    options = Options(parser, command)
    if "data" in options.objects:
        data_names()
    words = rewritten(options, argv, recipe or {})
    if words == ["--help"]:
        print(parser.format_help(), end="")
        return None
    if words[0].removeprefix("--").removesuffix(".help") in options.objects:
        print(class_help(parser, command, *words), end="")
        return None
    try:
        arguments = parser.parse_args(words)
    except ArgumentError as error:
        raise UserError(explained(str(error), options)) from None
    refuse_null(parser, arguments)
    del arguments["config"]
    try:
        ready = parser.instantiate(arguments, instantiators=[(construct, object, True)])
    except ConstructorFailed as failed:
        raise failed.args[0] from None
    return function(**vars(ready))


def refuse_null(parser: ArgumentParser, arguments: Mapping[str, Any]) -> None:
    """Raise a UserError for an option that is null and may not be, which jsonargparse lets pass in a recipe."""
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if isinstance(hint, type) and action.dest in arguments and arguments[action.dest] is None:
            kind = TYPES.get(hint.__name__, hint.__name__)
            raise UserError(f"`--{action.dest}` must be {kind}, but got null. Leave it out for its default.")


def make_parser(function: Callable[..., Any], command: str) -> ArgumentParser:
    """Return a parser whose flags, types and help texts are those of a function."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"litgpt {command}", exit_on_error=False, description=manual(function), formatter_class=HelpFormatter)
    parser.add_argument("--config", action="config", help="A YAML file or URL with options; flags override it whatever their order.")
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    for action in parser._actions:  # two texts that are jsonargparse's own
        if action.dest == "print_config":
            action.help = (
                "Print all options as a recipe and exit. `--print_config=skip_default` leaves out those at their default, "
                "`--print_config=skip_null` those that are null."
            )
        elif action.help == "Path to a configuration file.":
            action.help = "Several of the options below at once: a YAML file, or a mapping such as '{\"OPTION\": VALUE}'."
    return parser


def manual(described: Callable[..., Any]) -> str:
    """Return what a docstring says before it comes to the arguments."""
    return re.split(r"^(?:Args|Attributes|Raises):$", inspect.getdoc(described) or "", maxsplit=1, flags=re.MULTILINE)[0].strip()


class HelpFormatter(DefaultHelpFormatter):
    """Wraps titles too, keeps paragraphs, and writes types as a reader knows them."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options."""
        super().start_section(heading and textwrap.fill(" ".join(heading.split()), self._width))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        return "\n\n".join(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent) for line in paragraphs)

    def _expand_help(self, action: Any) -> str:
        text = re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", super()._expand_help(action))
        text = re.sub(r"\bOptional\[((?:[^\[\]]|\[[^\[\]]*\])*)\]", r"\1 | null", text)
        text = re.sub(r"\bUnion\[((?:[^\[\]]|\[[^\[\]]*\])*)\]", lambda union: re.sub(r", (?![^\[]*\])", " | ", union[1]), text)
        return re.sub(r"(known subclasses: )(?:[\w.]+\.(?:DataModule|SFTModule|PromptStyle), )+", r"\1", text)  # bases are no choice


def class_help(parser: ArgumentParser, command: str, flag: str, name: str = "", *_: str) -> str:
    """Return the help text of a class whose arguments are options, or the names of the data sets if none is named.

    Args:
        parser: That of the command.
        command: The name of the command.
        flag: Such as `--data.help`.
        name: The name of a data set, or its import path.
    """
    option = flag.removeprefix("--").removesuffix(".help")
    if option == "data" and not name:
        rows = [f"  {known:12} {manual(data_class(known)).splitlines()[0]}" for known in data_names()]
        return "\n".join(["Data sets:", *rows, "", f"`litgpt {command} --data.help NAME` shows the options of one.", ""])
    types = next(action._typehint for action in parser._actions if action.dest == f"{option}.help")
    kind = data_class(name) if option == "data" else next(kind for kind in (*get_args(types), types) if isinstance(kind, type))
    program = f"litgpt {command} --data {name}" if option == "data" else f"litgpt {command}"
    options = ArgumentParser(prog=program, add_help=False, description=manual(kind), formatter_class=HelpFormatter)
    options.add_class_arguments(kind, option, as_group=False)
    for action in options._actions:
        if action.dest.endswith(".help"):  # only the command's own are flags
            action.help = SUPPRESS
    return options.format_help()


def data_class(name: str) -> type:
    """Return a data set's class by its name among ours, or by its import path."""
    module, _, kind = name.rpartition(".")
    known = data_names()
    try:
        found = getattr(import_module(module or DATA), kind)
    except (ImportError, AttributeError):
        found = None
    base = import_module(DATA).DataModule
    if not isinstance(found, type) or not issubclass(found, base) or found is base:
        hint = did_you_mean(kind, known)
        raise UserError(f"`--data.help` wants one of {', '.join(known)}, or the import path of a data set, but got {name!r}.{hint}")
    return found


class ConstructorFailed(BaseException):
    """Carries an error past jsonargparse, which would report any `Exception` as a wrong type."""


def construct(kind: type, *args: Any, **kwargs: Any) -> Any:
    """Return an object of the class; what its constructor raises stays what it is."""
    try:
        return kind(*args, **kwargs)
    except Exception as error:
        raise ConstructorFailed(error) from None


class Options:
    """The names that a command's flags and recipes may use."""

    def __init__(self, parser: ArgumentParser, command: str) -> None:
        actions = parser._actions
        names = {(action.option_strings or [f"--{action.dest}"])[-1].removeprefix("--") for action in actions}
        self.command = command
        self.positionals = [action.dest for action in actions if not action.option_strings]
        self.objects = {name.removesuffix(".help") for name in names if name.endswith(".help")}  # their class is an option too
        self.names = {name for name in names if not name.endswith(".help")}
        self.groups = {name.rpartition(".")[0] for name in self.names} - {""}
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
                layers.append({name: read_recipe(value)})
            elif name in options.groups:
                groups.append(nested(name, mapping_in(value, name)))
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
    merged = merged_recipe(options, [*layers, *groups, *fields])
    flags.sort(key=lambda flag: flag[0].count("."))  # a class before its arguments
    return [f"--config={json.dumps(merged, default=str, ensure_ascii=False)}", *(f"--{name}={value}" for name, value in flags)]


def merged_recipe(options: Options, layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one recipe in which later layers win, and older names and every form of `optimizer` are today's fields."""
    merged: dict[str, Any] = {}
    for layer in layers:
        options.check(layer)
        layer = {name: value for name, value in layer.items() if not (value is None and name in options.groups)}
        for name in options.objects & set(layer):
            if isinstance(layer[name], str) and is_recipe(layer[name]):
                layer[name] = read_recipe(layer[name])
        if "optimizer" in options.groups:
            optimizer = optimizer_fields(layer.pop("optimizer", {}))
            train = dict(layer.get("train", {}))
            older = {field: train.pop(name) for name, field in OLDER_NAMES.items() if name in train}
            layer |= {"train": train, "optimizer": older | optimizer}
        merge(merged, layer)
    optimizer = merged.get("optimizer", {})
    if {"beta1", "beta2"} & set(optimizer):
        first, second = optimizer.get("betas", options.betas)
        optimizer["betas"] = [optimizer.pop("beta1", first), optimizer.pop("beta2", second)]
    return {name: value for name, value in merged.items() if value != {}}


def merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Put options over others in place. Another class does not inherit the arguments of the one before."""
    for key, value in new.items():
        old = into.get(key)
        if not isinstance(old, dict) or not isinstance(value, Mapping) or "class_path" in value:
            into[key] = dict(value) if isinstance(value, Mapping) else value
            continue
        if value.get("name", old.get("name")) != old.get("name"):
            old.pop("init_args", None)
        merge(old, value)


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
            text = Path(where).read_text()
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


def data_names() -> list[str]:
    """Import every data set, so that its class may be given by its short name, and return the names."""
    module = import_module(DATA)
    classes = {name: kind for name in module.__all__ if isinstance(kind := getattr(module, name), type)}
    return [name for name, kind in classes.items() if issubclass(kind, module.DataModule) and kind is not module.DataModule]


def explained(message: str, options: Options) -> str:
    """Return one sentence for an error of jsonargparse, which describes its own types over many lines."""
    name = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    class_path = (re.findall(r"given class_path '([^']+)'", message) or [""])[-1]
    if missing := re.search(r"arguments are required: (.*)", message):
        needed = " and ".join(f"`--{name}.{word}`" if name else f"`{word}`" for word in missing[1].split(", "))
        return f"`{f'--{name} {class_path}' if name else f'litgpt {options.command}'}` needs {needed}."
    block = message[message.rfind("Parser key") :]
    found = re.search(r"(?:Got|Given) value: (.*)", block)
    if other := re.search(r"Option '([^']+)' is not accepted", message) or re.match(r"NestedArg\(key='([^']+)'", found[1] if found else ""):
        if class_path == f"{DATA}.DataModule":  # the base of them all
            return f"`--data.{other[1]}` is an option of a data set. Choose one with `--data NAME`: {', '.join(data_names())}."
        return options.unknown(f"{name}.{other[1]}", "--", option_names(class_path, name))
    if not name or not found:
        return f"`litgpt {options.command}`: " + " ".join(re.sub(r"<class '([\w.]+)'>", r"\1", message).split())
    return f"`--{name}` " + wanted(block[: found.start()], found[1], name)


def wanted(block: str, value: str, name: str) -> str:
    """Return the sentence's second half: what may stand there, and what stood there."""
    chosen = re.search(r"given class_path '([^']+)':\s*(.*)", block)
    if chosen or "import path" in block or "subclass of" in block:
        value, because = (chosen[1], f" ({chosen[2]})") if chosen else (value, "")
        known = data_names() if name == "data" else []
        listed = f"one of {', '.join(known)}, or " if known else ""
        return f"must be {listed}the import path of a class, but got {value!r}{because}." + did_you_mean(value.rpartition(".")[2], known)
    kinds, choices = [], []
    for kind in re.findall(r"Expected an? (.+?)\.?\s*$", block, re.MULTILINE):
        kind = re.sub(r"^<class '(?:\w+\.)*(\w+)'>$", r"\1", kind)
        if "Literal[" in kind:
            words = re.findall(r"'([^']*)'", kind)
            kinds.append(", ".join(map(repr, words)))
            choices += words
        else:
            kinds.append(TYPES.get(kind) or re.sub(r"tuple with (\d+) elements", r"list of \1 values", f"a {kind}"))
    return f"must be {' or '.join(kinds)}, but got {value!r}." + did_you_mean(value, choices)


def option_names(class_path: str, group: str) -> list[str]:
    """Return the options of a class, as they are written on the command line."""
    if not class_path:
        return []
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(import_module(module), name), group)
    return [action.dest for action in parser._actions]
