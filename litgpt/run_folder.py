"""The folder of a training run: where it is, what may be done with it, and how the options in it differ from those of today."""

import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from lightning import LightningDataModule

from litgpt import names
from litgpt.checkpoint import has_updates, named_base
from litgpt.errors import MissingFile, UserError
from litgpt.files import OURS, read_json
from litgpt.run_state import latest_step

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

A_STEP = names.STEP.replace("{:06d}", "[0-9]+")


def run_folder(out_dir: Path) -> Path:
    """Return where a run writes: `out_dir`, below LIGHTNING_ARTIFACTS_DIR if that is set and `out_dir` is relative.

    It is not made yet, so that a run that is refused leaves nothing behind.
    """
    folder = Path(os.environ.get("LIGHTNING_ARTIFACTS_DIR", "")) / out_dir
    there = folder.absolute()  # what is there already of the way to it
    while True:
        try:
            there.lstat()
        except FileNotFoundError:
            there = there.parent
        except OSError as error:  # of a file on the way, or of a name that is too long
            raise no_folder(folder, error.strerror) from None
        else:
            break
    if not there.is_dir():
        raise no_folder(folder, f"{there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"`out_dir` is a folder to write into, but writing is not allowed in {there}. Choose another.")
    return folder


@contextmanager
def held(out_dir: Path) -> Iterator[None]:
    """Make the folder of a run, and let no other run write into it until this one ends, however it does.

    A folder that was made for a run of which nothing came is deleted again.
    """
    is_new, logs = not out_dir.exists(), out_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        lock = open(logs / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        why = "there is a file of this name" if isinstance(error, FileExistsError) else error.strerror
        raise no_folder(Path(error.filename), why) from None
    try:
        with lock:
            _lock(lock, out_dir)
            yield
    finally:
        with suppress(OSError):  # of what else is in it
            if is_new and os.listdir(logs) == [".lock"]:
                (logs / ".lock").unlink()
                logs.rmdir()
                out_dir.rmdir()


def _lock(file: IO[str], out_dir: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # any other is of a disk that knows no locks, as those of some clusters
            raise UserError(f"Another run is writing into {out_dir}. Wait for it, or choose another `--out_dir`.") from None


def _refuse_held(out_dir: Path) -> None:
    """Raise a UserError if a run is writing into its folder just now."""
    with suppress(OSError), open(out_dir / "logs" / ".lock", "a") as lock:
        _lock(lock, out_dir)


def no_folder(folder: Path, why: str) -> UserError:
    """Return what to raise where a run's folder cannot be made."""
    return UserError(f"`out_dir` is a folder to write into, but {folder} cannot be one: {why}. Choose another.")


def step_to_resume(out_dir: Path, resume: bool | str | Path | None, overwrite: bool = False) -> Path | None:
    """Return the step folder that a run goes on from, or None for a run that begins.

    Args:
        out_dir: The run's folder.
        resume: True wants the last step in `out_dir`, "auto" takes it if there is one; a path names a step or another run's folder.
        overwrite: Whether a new run may take the place of the one in `out_dir`.

    Raises:
        MissingFile: There is no such step.
        UserError: `out_dir` holds a run, and neither option says what to do with it, or both do.
    """
    if overwrite and resume not in (False, None, "false"):
        raise UserError(f"`resume` goes on with a run and `overwrite` deletes it, but got resume {str(resume)!r} and overwrite. Give one.")
    if resume in (True, "auto", "true"):
        found = latest_step(out_dir)
        if found is None and resume != "auto":
            way = "Start over with `--overwrite true`." if results_in(out_dir) else "Use auto to begin where there is none."
            raise MissingFile(f"`resume` is true, but {out_dir} holds no step to go on from. {way}")
        if found is not None:
            return found
    elif resume not in (False, None, "false"):
        folder = Path(resume)
        folder = folder.resolve() if folder.is_symlink() else folder  # `last` and `best` will name other steps
        found = folder if (folder / names.RUN_STATE / names.STATE).is_file() else latest_step(folder)
        if found is None:
            why = "is no step of a run and holds none" if folder.exists() else "is not there"
            raise MissingFile(f"`resume` names {folder}, which {why}. Give a step, such as {out_dir / names.STEP.format(100)}, or true.")
        if found.resolve().parent == out_dir.resolve():
            return found
    else:
        found = None
    if (results := results_in(out_dir)) and not overwrite:
        _refuse_held(out_dir)
        ways = "start over with `--overwrite true`, or choose another `--out_dir`."
        ways = f"Go on from its last step with `--resume true`, {ways}" if latest_step(out_dir) is not None else ways.capitalize()
        raise UserError(f"{out_dir} already holds a run ({results[-1].name}). {ways}")
    return found


def results_in(out_dir: Path, unfinished: bool = False) -> list[Path]:
    """Return the steps and final folders of a run, those too that were being written if `unfinished` are wanted; no links of ours."""
    finished = "|".join([A_STEP, names.FINAL, names.BEST, names.LAST])
    pattern = rf"({finished})(\.old)?({re.escape(names.PARTIAL)})?" if unfinished else finished
    found = (path for path in out_dir.glob("*") if re.fullmatch(pattern, path.name))
    return sorted(path for path in found if path.is_dir() and not is_link(path))


def check_room(out_dir: Path, data: LightningDataModule, *checkpoints: Path | None) -> None:
    """Raise a UserError if a new run would have to delete what no run wrote, or what it reads itself.

    Args:
        out_dir: The run's folder.
        data: Its data set, whose options name files and folders.
        checkpoints: The folders of the models and tokenizers that it begins with.
    """
    inputs = [path for path in _named_in(data) if os.path.exists(path)]  # which takes a long text for no path
    inputs += [path for folder in checkpoints if folder is not None for path in _read_with(folder)]
    for folder in results_in(out_dir, unfinished=True):
        if not _is_a_runs(folder):
            signs = f"neither {names.RUN_STATE} nor {names.LIT_CONFIG} nor {names.HYPERPARAMETERS}"
            raise UserError(f"{folder} is in the way, but not of a run: it holds {signs}. Move it, or choose another `--out_dir`.")
        for path in inputs:
            if path.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"`overwrite` would delete {folder}, but this run reads {path}. Choose another `--out_dir`, or move what it reads."
                )


def _is_a_runs(folder: Path) -> bool:
    """Say whether a run of ours or of LitGPT's wrote a folder, or nobody misses it."""
    if folder.is_symlink():
        return False
    signs = (names.RUN_STATE, names.LIT_CONFIG, names.HYPERPARAMETERS, OURS)
    return any((folder / sign).exists() for sign in signs) or not any(folder.iterdir())


def _named_in(data: LightningDataModule) -> Iterator[Path]:
    """Yield what may be paths among the options of a data set, and of the data sets in it."""
    for value in vars(data).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, str | Path):
                yield Path(part)
            elif isinstance(part, LightningDataModule):
                yield from _named_in(part)


def _read_with(folder: Path) -> list[Path]:
    """Return the folders that a checkpoint is read from: its own, and the base beside which its updates were trained."""
    return [folder, named_base(folder)] if has_updates(folder) else [folder]


def write_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the options of a run, as `--config` reads them."""
    text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    (folder / names.HYPERPARAMETERS).write_text(text, encoding="utf-8")


# Links to steps, and steps that are no longer wanted


def is_link(path: Path) -> bool:
    """Whether a path is a link of a run to one of its steps, as `set_link` makes it."""
    return path.is_symlink() and re.fullmatch(A_STEP, os.readlink(path)) is not None


def set_link(path: Path, step: Path) -> bool:
    """Let `last` or `best` name a step beside it, at once; say whether this file system can."""
    partial = path.with_name(path.name + names.PARTIAL)
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(step.name)
        os.replace(partial, path)
    except OSError:  # no links there, or something of the user's has the name
        return False
    return True


def remove_results(out_dir: Path) -> None:
    """Delete the steps and the results of the run that a folder holds, and its links to them. `check_room` says whether that may be."""
    try:
        for path in results_in(out_dir, unfinished=True):
            _delete(path)
        for path in out_dir.glob("*"):
            if path.name.removesuffix(names.PARTIAL) in (names.LAST, names.BEST) and is_link(path):
                path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename} could not be deleted: {error.strerror}. Delete it, or choose another `--out_dir`.") from None


def delete_old_steps(out_dir: Path, keep_last: int, best: Path | None, of_this_run: Callable[[Mapping[str, Any]], bool]) -> None:
    """Delete the steps before the last ones, but for those that a link names.

    Args:
        out_dir: The run's folder.
        keep_last: How many to keep.
        best: One that is kept too, for the disk may not know links.
        of_this_run: Says of the counters of a step whether it is one of the run's.
    """
    kept = {path.resolve() for path in (out_dir / names.LAST, out_dir / names.BEST, best) if path is not None}
    found = sorted((int(path.name.rpartition("-")[2]), path) for path in out_dir.glob("*") if re.fullmatch(A_STEP, path.name))
    steps = [(number, path) for number, path in found if not path.is_symlink()]
    whole = [path for _, path in steps if (counters := _counters(path)) is not None and of_this_run(counters)]
    half = [path for _, path in steps if (path / OURS).is_file() and not (path / names.RUN_STATE / names.STATE).exists()]
    for path in [*half, *whole[:-keep_last]]:
        if path.resolve() not in kept:
            _delete(path)


def _delete(folder: Path) -> None:
    """Delete a step or a result. Whoever is killed meanwhile leaves no half of a step, and nothing that is not known as a run's."""
    (folder / OURS).touch()
    (folder / names.RUN_STATE / names.STATE).unlink(missing_ok=True)  # without which it is no step
    for part in folder.iterdir():
        if part.name != OURS:
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
    shutil.rmtree(folder)


def _counters(step: Path) -> Mapping[str, Any] | None:
    state = step / names.RUN_STATE / names.STATE
    try:
        counters = read_json(state).get("counters")
    except UserError:  # damaged
        return None
    return counters if isinstance(counters, dict) else None


# The run before


NO_EFFECT = ("train.save_interval", "train.log_interval", "train.keep_last")


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any], *groups: str) -> dict[str, str]:
    """Return the options of these groups that differ between two runs, and how: `train.min_lr null -> 0.1`.

    Args:
        before: The options of a run as its `hyperparameters.yaml` holds them.
        now: Those of this one.
        groups: The first parts of their names.
    """
    old, new = (dict(_leaves({group: options.get(group) for group in groups})) for options in (before, now))
    different = [name for name in old | new if old.get(name) != new.get(name) and name not in NO_EFFECT]
    return {name: f"{name} {_as_yaml(old.get(name))} -> {_as_yaml(new.get(name))}" for name in different}


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).removesuffix("...\n").strip()


def _leaves(options: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{group}{name}.")
        else:
            yield f"{group}{name}", value
