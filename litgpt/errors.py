"""The two exceptions for users' mistakes, and how to name what was meant."""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType


class UserError(ValueError):
    """A user's mistake, in one sentence that names the value, the rule and the way out."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named, or that has to be there, is not."""

    __str__ = ValueError.__str__  # not OSError's, which wants an errno


def disk_error(error: BaseException) -> str | None:
    """Return a sentence for an error of the disk, or None for any other.

    Args:
        error: What was raised by the system, or by the writer of safetensors, which puts the system's number into its text.
    """
    number = error.errno if isinstance(error, OSError) and not isinstance(error, UserError) else None
    if type(error).__name__ == "SafetensorError" and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Free some space, or choose a folder on another disk."
    if number == errno.EFBIG:
        return "the file would grow beyond what the system allows. Choose a folder on another disk."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "writing is not allowed there. Choose another folder."
    if number == errno.ENAMETOOLONG:
        return "its name is longer than the system allows. Choose a shorter one."
    if number == errno.ENOTDIR:
        return "a part of its path is a file, not a folder. Choose another folder."
    return None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of the words, or nothing where none is near.

    Args:
        word: What the user typed.
        words: What would have been right.
    """
    spelled = {known.lower(): known for known in words}
    close = get_close_matches(word.lower(), spelled, n=1, cutoff=0.5)
    return f" Did you mean {spelled[close[0]]!r}?" if close else ""


def optional(module: str, extra: str) -> ModuleType:
    """Import a package that only some features need.

    Args:
        module: The package to import.
        extra: The extra of `pyproject.toml` that installs it.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(f"This needs the package {error.name!r}. Install it with: pip install -e '.[{extra}]'") from None
