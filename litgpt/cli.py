"""The command line: one table of commands, and what calls their functions and explains mistakes.

jsonargparse derives every flag, type and help text from the function's signature and docstring; `litgpt.recipes` prepares the words
that it sees, and `explained` makes one sentence of its errors.
"""

import codecs
import inspect
import os
import re
import sys
import textwrap
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from litgpt.errors import UserError, did_you_mean, disk_error
from litgpt.recipes import DATA, Options, merge, read_recipe, rewritten

COMMANDS = {  # name: (where its function is, what it does)
    "download": ("litgpt.scripts.download:download_from_hub", "Download a model, or `list` the known ones."),
    "chat": ("litgpt.chat.base:main", "Chat with a model."),
    "finetune": ("litgpt.finetune.lora:setup", "Finetune a model with LoRA."),
    "finetune_lora": ("litgpt.finetune.lora:setup", "The same, by its full name."),
    "finetune_full": ("litgpt.finetune.full:setup", "Finetune all parameters of a model."),
    "finetune_adapter": ("litgpt.finetune.adapter:setup", "Finetune a model with LLaMA-Adapter."),
    "finetune_adapter_v2": ("litgpt.finetune.adapter_v2:setup", "Finetune a model with LLaMA-Adapter V2."),
    "pretrain": ("litgpt.pretrain:setup", "Train a model from scratch, or on from a checkpoint."),
    "generate": ("litgpt.generate.base:main", "Answer one prompt, or a file of them."),
    "generate_full": ("litgpt.generate.full:main", "Answer a prompt by a model that was finetuned whole."),
    "generate_adapter": ("litgpt.generate.adapter:main", "Answer a prompt by a model and its adapter."),
    "generate_adapter_v2": ("litgpt.generate.adapter_v2:main", "Answer a prompt by a model and its adapter of the second kind."),
    "convert_to_litgpt": ("litgpt.scripts.convert_hf_checkpoint:convert_hf_checkpoint", "Write LitGPT's files beside a checkpoint's own."),
    "convert_from_litgpt": ("litgpt.scripts.convert_lit_checkpoint:convert_lit_checkpoint", "Write a complete Hugging Face folder."),
    "merge_lora": ("litgpt.scripts.merge_lora:merge_lora", "Add a LoRA update to the weights it was trained beside."),
    "evaluate": ("litgpt.eval.evaluate:convert_and_evaluate", "Measure a model on the tasks of lm-eval."),
    "serve": ("litgpt.deploy.serve:run_server", "Serve a model over HTTP, with a page to chat at."),
    "validate": ("litgpt.scripts.validate:main", "Check a checkpoint, and say what fits on this machine."),
    "preview_data": ("litgpt.scripts.preview_data:preview_data", "Show what a data set teaches, and what it costs."),
    "perplexity": ("litgpt.eval.perplexity:main", "Measure how well a model predicts texts."),
    "add_tokens": ("litgpt.scripts.add_tokens:add_tokens", "Add tokens to a model's vocabulary."),
    "export_gguf": ("litgpt.scripts.export_gguf:export_gguf", "Write a GGUF file for llama.cpp and Ollama."),
}
AS_PYTHON = warnings.formatwarning
USAGE = "usage: litgpt [-h] [--version] [--config FILE_OR_URL] COMMAND ..."
TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping", "NoneType": "null"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for a user's mistake, 1 for a bug of ours.

    Args:
        argv: The words after `litgpt`. By default those that this process was started with.
    """
    open_streams()
    warnings.formatwarning = formatted_warning
    try:
        code = answer(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return code
    except OSError as error:
        broken = close_broken_streams()
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            return 141
        if not broken:
            traceback.print_exc()
            return 1
        print("litgpt: The output could not be written:", disk_error(error) or f"{error.strerror}.", file=sys.stderr)
        return 2


def answer(argv: list[str]) -> int:
    """Run one command and return the exit code; errors of the system are passed on, for they may be of the output itself."""
    try:
        dispatch(argv)
    except UserError as error:
        print("litgpt:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # after printing help or a configuration
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except OSError:
        raise
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def formatted_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Return what a warning looks like: one of ours is told to users, so it says nothing of code."""
    is_ours = category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent)
    return f"{message}\n" if is_ours else AS_PYTHON(message, category, filename, lineno, line)


def close_broken_streams() -> bool:
    """Send what cannot be written to nowhere, or it would be tried again at the end; return whether there was such a stream."""
    broken = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.write("\n" if stream is sys.stdout else "")  # what could not be written may be gone, and leave nothing to flush
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            broken = True
    return broken


def open_streams() -> None:
    """Make standard input, output and errors usable: closed ones are empty, and what the terminal cannot show becomes a `?`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in this order, to get the numbers that are free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):  # errors are escaped anyway
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, TextIOWrapper):  # UTF-8 is what an ASCII terminal may send beyond ASCII; the tokenizer refuses the rest
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="surrogateescape")


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
    options = options_of(name, recipe)
    module, function = COMMANDS[name][0].split(":")
    run(getattr(import_module(module), function), name, words, options)


def options_of(command: str, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a recipe above the command holds for it, under its name or another name of the same command.

    Raises:
        UserError: The recipe is one of other commands only, or holds no options.
    """
    if not recipe:
        return {}
    names = [name for name in (command, *recipe) if name in recipe and COMMANDS[name][0] == COMMANDS[command][0]]
    if not names:
        held = " and ".join(f"`{name}`" for name in recipe)
        raise UserError(
            f"The recipe above the command holds options of {held}, but none of `{command}`. Add them, or leave `--config` out."
        )
    options = recipe[names[0]]
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise UserError(
            f"`{names[0]}` holds options, so it has to be a mapping, but got {options!r}. "
            f"A file goes behind: `litgpt {command} --config FILE`."
        )
    return options


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
    unread = re.match(r"NestedArg\(key='([^']+)'", found[1] if found and "." not in name else "")
    if other := re.search(r"Option '([^']+)' is not accepted", message) or unread:
        if class_path == f"{DATA}.DataModule":  # the base of them all
            return f"`--data.{other[1]}` is an option of a data set. Choose one with `--data NAME`: {', '.join(data_names())}."
        return options.unknown(f"{name}.{other[1]}", "--", option_names(class_path, name))
    if not name or not found:
        return f"`litgpt {options.command}`: " + " ".join(re.sub(r"<class '([\w.]+)'>", r"\1", message).split())
    value = re.sub(r"^NestedArg\(key='[^']*', val=(.*)\)$", r"\1", found[1])
    return f"`--{name}` " + wanted(block[: found.start()], value, name)


def wanted(block: str, value: str, name: str) -> str:
    """Return the sentence's second half: what may stand there, and what stood there."""
    chosen = re.search(r"given class_path '([^']+)':\s*(.*)", block)
    if chosen or "import path" in block or "subclass of" in block:
        path = re.search(r"import path (?:string|format): (\S+)", block)
        value, because = (chosen[1], f" ({chosen[2]})") if chosen else (path[1] if path else value, "")
        known = data_names() if name in ("data", "data.sources") else []
        listed = f"one of {', '.join(known)}, or " if known else ""
        return f"must be {listed}the import path of a class, but got {value!r}{because}." + did_you_mean(value.rpartition(".")[2], known)
    kinds, choices = [], []
    for kind in re.findall(r"Expected (?:an? )?(.+?)\.?\s*$", block, re.MULTILINE):
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
