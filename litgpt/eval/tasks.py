"""Tasks of lm-eval, its own and the user's: found by name or file, loaded with their data, and checked."""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import MissingFile, UserError
from litgpt.eval.harness import lm_eval_module
from litgpt.files import read_text

TASK_FILES = (".yaml", ".yml")
COUNTED = 10_000  # up to so many solved examples it is worth counting those that are alike


def list_tasks(include_path: Path | None) -> None:
    """Print the names of all tasks, and how to evaluate on them."""
    print("\n".join(task_manager(include_path).all_tasks))
    print("\nThese are the tasks of lm-eval. Evaluate on some with: litgpt evaluate CHECKPOINT --tasks hellaswag,mmlu")


def task_manager(include_path: Path | None, knows_all: bool = True) -> Any:
    """Return lm-eval's index of tasks, of its own and of a folder.

    Args:
        include_path: The folder.
        knows_all: Whether to read lm-eval's own tasks, of which there are many thousands, so that it takes seconds.

    Raises:
        MissingFile: There is no such folder.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise MissingFile(f"There is no folder {include_path} to look for tasks in. `include_path` names a folder with YAML files.")
    more = {} if knows_all else {"include_defaults": False}
    return lm_eval_module("lm_eval.tasks").TaskManager(include_path=None if include_path is None else str(include_path), **more)


def find_tasks(names: list[str], include_path: Path | None) -> Any:
    """Return the index of tasks, which knows all that are named; a pattern among the names is replaced by what it stands for.

    Raises:
        MissingFile: A file of a task is not there.
        UserError: A name is unknown, or there is none.
    """
    if not names:
        raise UserError("`tasks` names no task. Name some, as in --tasks hellaswag,mmlu; `litgpt evaluate list` prints all.")
    for name in names:
        if name.endswith(TASK_FILES) and not Path(name).is_file():
            raise MissingFile(f"There is no file {name!r} for `tasks`. Name one that is there, or a task of lm-eval's.")
    manager = task_manager(include_path, knows_all=not all(map(_is_whole_task, names)))
    for name in list(names):
        found = [name] if name in manager.task_index or _is_task_file(name) else manager.match_tasks([name])
        if not found:
            near = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UserError(f"There is no task {name!r}.{meant} {_unread(include_path)}`litgpt evaluate list` prints all.")
        at = names.index(name)
        names[at : at + 1] = found
    return manager


def _unread(folder: Path | None) -> str:
    """Return a sentence on a file of a folder that lm-eval left out without a word, or nothing."""
    for path in sorted(Path(folder).rglob("*")) if folder is not None else ():
        if path.suffix in TASK_FILES and path.is_file():
            try:
                yaml.compose(read_text(path), yaml.SafeLoader)
            except (yaml.YAMLError, RecursionError) as error:
                return f"{path} is no YAML, so its tasks are unknown: {' '.join(str(error).split())}. Correct the file. "
    return ""


def _is_task_file(name: str) -> bool:
    return name.endswith(TASK_FILES) and Path(name).is_file()


def _is_whole_task(name: str) -> bool:
    """Whether a name is that of a file that names no other task."""
    if not _is_task_file(name):
        return False
    try:
        content = yaml.compose(read_text(Path(name)), yaml.SafeLoader)  # not its values, which may be functions
    except (yaml.YAMLError, RecursionError):  # which lm-eval tells of when it loads the file
        return False
    keys = content.value if isinstance(content, yaml.MappingNode) else ()
    return bool(keys) and not any(isinstance(key, yaml.ScalarNode) and key.value in ("group", "include") for key, _ in keys)


def load_tasks(manager: Any, names: Sequence[str], num_fewshot: int | None = None) -> list[Any]:
    """Return the tasks and groups with their data.

    Args:
        manager: The index of tasks.
        names: What to load.
        num_fewshot: How many solved examples each question is to have, if not as many as the task says.

    Raises:
        UserError: A task is wrong, data or packages are missing, or a task needs what is not supported.
    """
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # no code of ours runs there, and what datasets and the hub raise is without end
        raise UserError(_why_not_loaded(", ".join(names), error)) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"The task {name} runs programs that the model writes, which is not supported. Choose another task.")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"The task {name} shows pictures, which is not supported. Choose another task.")
        check_shots(name, task, num_fewshot)
    groups = loaded["groups"]
    inside = {child.name for group in groups.values() for child in group.get_all_groups() if child is not group}
    grouped = {id(task) for group in groups.values() for task in group.get_all_tasks()}
    alone = [task for task in loaded["tasks"].values() if id(task) not in grouped]
    return [group for name, group in groups.items() if name not in inside] + alone


def _why_not_loaded(names: str, error: Exception) -> str:
    """Return the sentence for what was raised while tasks were loaded."""
    said = f"{' '.join(str(error).split())[:300]} ({type(error).__name__})".lstrip()
    if isinstance(error, yaml.YAMLError):
        return f"A task file of {names} is no YAML: {said}. Correct the file."
    if isinstance(error, lm_eval_module("jinja2").TemplateError):
        return f"A template in the task file of {names} is wrong: {said}. Correct the file; a template names fields of the data."
    if type(error) is FileNotFoundError:  # those of the network are of classes below it
        return f"A file that {names} needs is not there: {said}. Correct the path in the task file."
    return f"The data of {names} could not be loaded: {said}. Check the network, or name tasks whose data is on this machine."


def check_shots(name: str, task: Any, num_fewshot: int | None) -> None:
    """Refuse a task that has fewer solved examples than are to stand before each question.

    Args:
        name: What the task is called.
        task: The task, with its data.
        num_fewshot: How many examples; None, and a task that says 0, leave it to the task, as in lm-eval.

    Raises:
        UserError: There are too few.
    """
    own = task.get_config("num_fewshot")
    n = own if num_fewshot is None or own == 0 else num_fewshot
    sampler = getattr(task, "sampler", None)
    if not n or sampler is None:
        return
    n_known = len(sampler.df)
    if n_known and task.fewshot_cfg.split == task.config.test_split:  # a question is no example for itself, nor for one like it
        n_known -= max(Counter(map(repr, sampler.df)).values()) if n_known < COUNTED else 1
    if n > n_known:
        way = f"Set at most --num_fewshot {n_known}." if n_known else "Leave out --num_fewshot."
        raise UserError(f"The task {name} has {n_known} solved examples, but {n} are to stand before each question. {way}")
