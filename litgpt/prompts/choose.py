"""Which prompt style a checkpoint is used with, and how that is saved."""

import json
from pathlib import Path
from typing import Any

import yaml

from litgpt import names
from litgpt.errors import MissingFile, UserError
from litgpt.files import is_file, read_json, read_yaml
from litgpt.prompts.style import PromptStyle, known_style, nearest_styles, prompt_styles
from litgpt.prompts.template import ChatTemplate, read_chat_template
from litgpt.tokenizer import Tokenizer

CHAT_TEMPLATE_STYLE = "chat-template"


def find_prompt_style(
    checkpoint_dir: str | Path,
    tokenizer: Tokenizer | None = None,
    explicit: str | PromptStyle | dict[str, Any] | None = None,
    config: Any = None,
    for_instructions: bool = False,
) -> PromptStyle:
    """Return the prompt style to use with a checkpoint.

    It is the first of: the explicit one, `prompt_style.yaml`, the checkpoint's chat template, the style of the exact name on the hub,
    Alpaca for instruction data, and `Default`.

    Args:
        checkpoint_dir: The folder of the checkpoint.
        tokenizer: Its tokenizer, whose folder is searched for a chat template too.
        explicit: A style; or its name, its class path, or `chat-template`; or its class path with arguments.
        config: The model's `Config`, which may name the checkpoint.
        for_instructions: Whether it is for training on instructions.

    Raises:
        UserError: The explicit style is unknown, or a file is damaged.
    """
    folders = [Path(checkpoint_dir)] + ([] if tokenizer is None else [tokenizer.checkpoint_dir])
    templates = (folder for folder in folders if read_chat_template(folder) is not None)
    if isinstance(explicit, PromptStyle):
        return explicit
    if explicit == CHAT_TEMPLATE_STYLE:
        return ChatTemplate.from_checkpoint(next(templates, folders[0]))
    if explicit is not None:
        return _named(explicit, folders[-1])
    if has_prompt_style(checkpoint_dir):
        return load_prompt_style(checkpoint_dir, next(templates, None))
    if (folder := next(templates, None)) is not None:
        return ChatTemplate.from_checkpoint(folder)
    return prompt_styles[known_style(config) or ("alpaca" if for_instructions else "default")]()


def save_prompt_style(style: str | PromptStyle, checkpoint_dir: str | Path) -> None:
    """Write `prompt_style.yaml`: the class of a style and its arguments. A chat template's text stays in the tokenizer's files.

    Args:
        style: The style or its name.
        checkpoint_dir: The folder.

    Raises:
        UserError: An argument cannot be written.
    """
    style = PromptStyle.from_name(style) if isinstance(style, str) else style
    content: dict[str, Any] = {"class_path": _path(type(style))}
    if style.init_args:
        content["init_args"] = dict(style.init_args)
    try:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError:
        raise UserError(f"The arguments of {content['class_path']} must be plain values to be saved, but are {style.init_args}.") from None
    (Path(checkpoint_dir) / names.PROMPT_STYLE).write_text(text, encoding="utf-8")


def save_stop_tokens(style: PromptStyle, tokenizer: Tokenizer, checkpoint_dir: str | Path) -> None:
    """Write every token that ends an answer of this style into `generation_config.json`, so that other programs stop there too.

    Args:
        style: The style that the model was trained with.
        tokenizer: The model's tokenizer.
        checkpoint_dir: The folder.
    """
    file = Path(checkpoint_dir) / names.GENERATION_CONFIG
    values = read_json(file, repair=True) or {"bos_token_id": tokenizer.bos_id}
    single = [sequence[0] for sequence in style.stop_tokens(tokenizer) if len(sequence) == 1]
    ids = list(dict.fromkeys([*tokenizer.eos_ids, *single]))
    if ids:
        values["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}, indent=2) + "\n", encoding="utf-8")


def load_prompt_style(checkpoint_dir: str | Path, template_dir: Path | None = None) -> PromptStyle:
    """Return the style that `save_prompt_style` wrote, here or in LitGPT.

    Args:
        checkpoint_dir: The folder.
        template_dir: Where the chat template is, if that is the style; by default in the same folder.

    Raises:
        MissingFile: There is no such file.
        UserError: It is damaged, or names a class that this program does not know.
    """
    path = Path(checkpoint_dir) / names.PROMPT_STYLE
    if not is_file(path):
        raise MissingFile(f"There is no {names.PROMPT_STYLE} in {str(checkpoint_dir)!r}.")
    way = "Delete it, or write `class_path: litgpt.prompts.Alpaca`."
    content = read_yaml(path, way=way)
    if not isinstance(content.get("class_path"), str):
        raise UserError(f"{path} is damaged: its `class_path` is {content.get('class_path')!r:.40}, not the name of a style. {way}")
    return _named(content, template_dir or Path(checkpoint_dir))


def with_own_style(adapter: Path | None, base: Path) -> Path:
    """Return the folder whose prompt style counts where an adapter is added to a model: the adapter's, if it has one.

    Args:
        adapter: Holds LoRA updates; None adds none.
        base: Holds the model.
    """
    return adapter if adapter is not None and (has_prompt_style(adapter) or read_chat_template(adapter) is not None) else base


def has_prompt_style(checkpoint_dir: str | Path) -> bool:
    """Whether a folder has a `prompt_style.yaml`."""
    return is_file(Path(checkpoint_dir) / names.PROMPT_STYLE)


def _named(style: str | dict[str, Any], folder: Path) -> PromptStyle:
    """Return the style with a name or class path, if this program has such a class. Nothing is imported for it."""
    path = style.get("class_path") if isinstance(style, dict) else style
    arguments = (style.get("init_args") or {}) if isinstance(style, dict) else {}
    known = {_path(cls): cls for cls in _subclasses(PromptStyle)} | {
        f"litgpt.prompts.{cls.__name__}": cls for cls in prompt_styles.values()
    }
    cls = (prompt_styles.get(path) or known.get(path)) if isinstance(path, str) else None
    if cls is None:
        near = nearest_styles(str(path), [*prompt_styles, CHAT_TEMPLATE_STYLE])
        raise UserError(f"{path!r:.80} is not a prompt style that this program knows. {near} Or import the module that defines it first.")
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise UserError(f"The arguments of a prompt style map names to values, but {path!r} has {arguments!r:.40}.")
    if cls is ChatTemplate and (variables := arguments.get("variables")) is not None:
        if not isinstance(variables, dict) or not all(isinstance(key, str) for key in variables):
            raise UserError(f"The `variables` of a chat template map names to values, but they are {variables!r:.40}.")
    try:
        return ChatTemplate.from_checkpoint(folder, **arguments) if cls is ChatTemplate else cls(**arguments)
    except TypeError as error:
        raise UserError(f"The prompt style {path!r} does not take the arguments {arguments}: {error}.") from None


def _path(cls: type) -> str:
    """Return the class path of a style; ours are all known as `litgpt.prompts.NAME`."""
    package, _, _ = __name__.rpartition(".")
    return f"{package if cls.__module__.startswith(f'{package}.') else cls.__module__}.{cls.__qualname__}"


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))
