"""Files that a user hands us, of which each is what it should be or one sentence says what is wrong; folders that appear whole."""

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from litgpt import names
from litgpt.errors import MissingFile, UserError, disk_error

AGAIN = "Repair it or download it again."
OURS = ".unfinished-by-litgpt"  # marks a folder that nobody misses if it is deleted
MAX_DEPTH = 64  # no config is nested deeper, and copying what is nested very deep would fail somewhere else
MAX_VALUES = 10_000_000
NO_TEXT = re.compile("[\ud800-\udfff]")  # halves of characters, which JSON can write and nothing can encode


# Reading


def read_json(path: Path, *, repair: bool = False, way: str = AGAIN) -> dict[str, Any]:
    """Return the mapping in a JSON file, or an empty one if there is no file.

    Args:
        path: The file.
        repair: Whether to put commas right where that makes a broken file readable; some published files need it.
        way: The way out, which ends the sentence of an error.

    Raises:
        UserError: The file may not be read, or holds something else.
    """
    if not is_file(path):
        return {}
    text = read_text(path, way)
    try:
        content = _loaded_json(path, text, repair)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: it is not valid JSON ({error}). {way}") from None
    except ValueError:  # of a number that Python refuses to read
        raise UserError(f"{path} is damaged: a number in it has thousands of digits. {way}") from None
    except RecursionError:
        raise UserError(f"{path} is damaged: its values are nested too deep. {way}") from None
    return _mapping(path, content, "a JSON object", way)


def read_yaml(path: Path, *, way: str = AGAIN) -> dict[str, Any]:
    """Return the mapping in a YAML file, whose keys are text, or an empty one if there is no file.

    Args:
        path: The file.
        way: The way out, which ends the sentence of an error.

    Raises:
        UserError: The file may not be read, or holds something else.
    """
    if not is_file(path):
        return {}
    text = read_text(path, way)
    try:
        content = yaml.load(text, _UniqueKeys)
    except RecursionError:
        raise UserError(f"{path} is damaged: its values are nested too deep. {way}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:  # the package leaks errors of its parts
        raise UserError(f"{path} is damaged: it is not valid YAML ({' '.join(str(error).split())[:300]}). {way}") from None
    return _mapping(path, content, "a mapping", way)


class _UniqueKeys(yaml.SafeLoader):
    """Reads plain values, and refuses a key that stands twice in one mapping, of which YAML's reader would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_text(path: Path, way: str = AGAIN) -> str:
    """Return the text of a file in UTF-8.

    Args:
        path: The file.
        way: The way out if it holds something else.

    Raises:
        MissingFile: There is no such file.
        UserError: It may not be read, or is no text.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not text in UTF-8, from byte {error.start} on. {way}") from None


def read_bytes(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        MissingFile: There is no such file.
        UserError: It may not be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from None


def check_readable(path: Path) -> None:
    """Refuse a file that cannot be opened, before a package opens it that does not say why.

    Raises:
        MissingFile: There is no such file.
        UserError: It may not be read.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise cannot_read(path, error) from None


def is_file(path: Path) -> bool:
    """Whether a path is a file. Where the system refuses to tell, that is a UserError."""
    try:
        return path.is_file()
    except OSError as error:
        raise cannot_read(path, error) from None


def is_folder(path: Path) -> bool:
    """Whether a path is a folder. Where the system refuses to tell, that is a UserError."""
    try:
        return path.is_dir()
    except OSError as error:
        raise cannot_read(path, error) from None


def cannot_read(path: Path, error: OSError) -> UserError:
    """Return what to raise where the system refuses to read.

    Args:
        path: What was to be read.
        error: What the system raised.
    """
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"{path} may not be read by this user. Change its permissions, or name another one.")
    if error.errno == errno.ENAMETOOLONG:
        start = f"{str(path)[:60]}..."
        return UserError(f"{start!r} cannot be read: its {len(str(path))} characters are more than a name may have. Name a shorter one.")
    if error.errno == errno.ENOENT:
        return MissingFile(f"There is no file {path}.")
    return UserError(f"{path} cannot be read: {error.strerror or error}. Name another one.")


def indexed_files(index: Path) -> list[str]:
    """Return the names of the files that an index of weights lists, each of which can only lie beside it.

    Args:
        index: Such as `model.safetensors.index.json`.

    Raises:
        UserError: It is damaged, or leads out of its folder.
    """
    way = "Delete it and download it again."
    listed = read_json(index, way=way).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} is damaged: its `weight_map` does not say which weight is in which file. {way}")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise UserError(f"{index} names {name!r}, but may only name files that lie beside it. Use a checkpoint from another source.")
    return sorted(set(listed.values()))


def _loaded_json(path: Path, text: str, repair: bool) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if not repair:
            raise
    text = re.sub(r",(\s*[}\]])", r"\1", text)  # a comma too many
    text = re.sub(r'(["\d\]}el])(\s+)(?=")', lambda gap: gap[1] + ("," if "\n" in gap[2] else "") + gap[2], text)  # one too few
    content = json.loads(text)
    warnings.warn(f"The JSON in {str(path)!r} is broken; its commas were put right while reading.")
    return content


def _mapping(path: Path, content: Any, wanted: str, way: str) -> dict[str, Any]:
    """Return what a file holds, if it is a mapping that every part of the program can use."""
    if content is None:
        raise UserError(f"{path} is empty, but must hold {wanted}. {way}")
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds {kind_of(content)}, but must hold {wanted}. {way}")
    if (key := next((key for key in content if not isinstance(key, str)), None)) is not None:
        raise UserError(f"{path} is damaged: its key {key!r} is no text. {way}")
    level, n_values = {id(content): (content, 1)}, 0  # YAML may name one part many times, and its copies would fill the memory
    for _ in range(MAX_DEPTH):
        children: dict[int, tuple[Any, int]] = {}
        for value, times in level.values():
            if isinstance(value, str) and not value.isascii() and NO_TEXT.search(value):
                raise UserError(f"{path} is damaged: it holds half a character. {way}")
            for child in _parts(value):
                children[id(child)] = child, times + children.get(id(child), (child, 0))[1]
        n_values += sum(times for _, times in children.values())
        if n_values > MAX_VALUES:
            raise UserError(f"{path} is damaged: it repeats its parts too often. {way}")
        if not children:
            return content
        level = children
    raise UserError(f"{path} is damaged: its values are nested too deep. {way}")


def kind_of(value: Any) -> str:
    """Return what a user calls a value of a JSON or YAML file."""
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), f"a value of the type {type(value).__name__}")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list | tuple | set) else ()


# Writing


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into that gets the name `path` once all is on the disk; on any error nothing is left.

    Args:
        path: The folder to make.
        overwrite: Put it in the place of an existing one, which stays until the new one is complete.

    Raises:
        UserError: `path` exists and is not to be overwritten, or the disk is full or forbids writing.
    """
    partial, path = None, path.absolute()
    try:
        try:
            path = path.resolve() if path.is_symlink() else path
            if path.exists() and (not path.is_dir() or (not overwrite and any(path.iterdir()))):
                raise UserError(f"{path} already exists. Choose another folder, or delete it first.")
            partial = begin_folder(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        yield partial
        written = list(partial.rglob("*"))
        for file in written:
            file.chmod(file.stat().st_mode | partial.stat().st_mode & 0o666)  # safetensors lets nobody else read its files
        sync(*written, partial)
        put_in_place(partial, path)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if disk_error(error):
            raise cannot_write(path, error) from error
        raise


def cannot_write(path: Path, error: BaseException) -> UserError:
    """Return what to raise where the system refuses to write.

    Args:
        path: What was to be written.
        error: What was raised, by the system or by a package.
    """
    if isinstance(error, UserError):
        return error
    reason = getattr(error, "strerror", None) or error
    shown = path if len(path.name) < 100 else f"{path.name[:60]}..."
    return UserError(f"{shown} could not be written: {disk_error(error) or f'{reason}. Choose another place.'}")


def begin_folder(path: Path) -> Path:
    """Make the folder in which `path` is written, in the place of one that was left unfinished.

    Args:
        path: What the folder will be called when `put_in_place` is told that it is complete.

    Raises:
        UserError: Something that is not ours has a name that is needed.
    """
    partial, previous = _unfinished(path)
    for left in (partial, previous):
        marked = (left / OURS).is_file() or (left.is_dir() and not left.is_symlink() and not any(left.iterdir()))
        if not marked and (left.exists() or left.is_symlink()):
            raise UserError(f"{left} is in the way, a name that is needed while {path.name} is written. Move it, or delete it.")
    _delete(partial)
    partial.mkdir(parents=True)
    (partial / OURS).touch()
    return partial


def put_in_place(partial: Path, path: Path) -> None:
    """Give a complete folder its name. One that has the name stays until then.

    Args:
        partial: From `begin_folder`.
        path: The name.
    """
    _, previous = _unfinished(path)
    _delete(previous)  # of a program that was killed here; `begin_folder` has seen that it is ours
    if path.exists():
        (path / OURS).touch()
        path.rename(previous)
    partial.rename(path)
    (path / OURS).unlink()
    sync(path, path.parent)
    _delete(previous)


def _delete(folder: Path) -> None:
    """Delete a folder of ours if it is there, its mark last: who is killed here must know the rest as ours."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name != OURS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _unfinished(path: Path) -> tuple[Path, Path]:
    """Return the names of a folder while it is written, and of the one in its place while that is replaced."""
    return path.with_name(path.name + names.PARTIAL), path.with_name(path.name + ".old" + names.PARTIAL)


def sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
