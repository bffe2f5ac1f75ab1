"""What a run may do with its folder: hold it, delete from it, link in it. No training."""

import errno
import json
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from litgpt import names, run_folder
from litgpt.data import JSON, Mix
from litgpt.errors import UserError
from litgpt.run_folder import changed_options, check_room, delete_old_steps, held, is_link, remove_results, set_link, step_to_resume
from litgpt.run_state import latest_step

DATA = JSON("nowhere.json")


def make_step(out_dir: Path, number: int, **counters: Any) -> Path:
    """A step as a run leaves it, but for its tensors."""
    folder = out_dir / names.STEP.format(number)
    (folder / names.RUN_STATE).mkdir(parents=True)
    for name in (names.HYPERPARAMETERS, names.CONFIG, "run_state/shard-00000.safetensors"):
        (folder / name).touch()
    (folder / names.RUN_STATE / names.STATE).write_text(json.dumps({"counters": {"step": number, **counters}}))
    return folder


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    """A run with three steps and a result."""
    for number in (1, 2, 3):
        make_step(tmp_path / "out", number)
    (tmp_path / "out" / names.FINAL).mkdir()
    for name in (names.HYPERPARAMETERS, names.CONFIG):
        (tmp_path / "out" / names.FINAL / name).touch()
    set_link(tmp_path / "out" / names.LAST, tmp_path / "out" / names.STEP.format(3))
    return tmp_path / "out"


def steps_in(out_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in out_dir.glob("step-*"))


def files_of(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


# Held by one run


def test_a_folder_is_held_by_one_run_and_free_when_that_ends(tmp_path: Path):
    with held(tmp_path / "out"), pytest.raises(UserError, match="Another run is writing into .*out. Wait for it"), held(tmp_path / "out"):
        pytest.fail("two runs hold it")
    with held(tmp_path / "out"):
        pass


def test_a_folder_made_for_a_run_of_which_nothing_came_is_deleted(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
    with held(tmp_path / "out"):
        (tmp_path / "out" / "logs" / "metrics.jsonl").touch()
    assert (tmp_path / "out" / "logs" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_knows_no_locks_is_no_reason_to_refuse_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with held(tmp_path / "out"):
        assert (tmp_path / "out" / "logs").is_dir()


# Deleted from


def test_whoever_is_killed_while_a_run_is_deleted_can_delete_the_rest(out_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unlink, whole = os.unlink, shutil.copytree(out_dir, tmp_path / "whole", symlinks=True)

    def killed_at(n: int) -> bool:
        calls = count(1)

        def dying(*args: Any, **options: Any) -> None:
            if next(calls) == n:
                raise KeyboardInterrupt
            unlink(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", dying)
            try:
                remove_results(out_dir)
            except KeyboardInterrupt:
                return True
        return False

    for n in count(1):
        if not killed_at(n):
            break
        check_room(out_dir, DATA)
        if (last := latest_step(out_dir)) is not None:
            assert files_of(last) >= files_of(whole / last.name), "what is left of a step is none"
        remove_results(out_dir)
        assert not list(out_dir.iterdir())
        shutil.rmtree(out_dir)
        shutil.copytree(whole, out_dir, symlinks=True)
    assert n > 10 and not list(out_dir.iterdir())


def test_what_cannot_be_deleted_is_one_sentence(out_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(UserError, match="state.json could not be deleted: Permission denied. Delete it, or choose another"):
        remove_results(out_dir)


def test_a_link_in_a_step_is_deleted_and_not_followed(out_dir: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (out_dir / names.STEP.format(1) / "mine").symlink_to(tmp_path / "precious")
    delete_old_steps(out_dir, 1, None, lambda counters: True)
    assert steps_in(out_dir) == [3] and (tmp_path / "precious" / "file").is_file()


@pytest.mark.parametrize("nested", [False, True])
def test_a_file_that_any_part_of_a_mix_reads_is_never_deleted(out_dir: Path, nested: bool):
    (out_dir / names.STEP.format(1) / "a.json").touch()
    parts: list[Any] = [JSON("nowhere.json"), JSON(out_dir / names.STEP.format(1) / "a.json")]
    with pytest.raises(UserError, match="`overwrite` would delete .*step-000001, but this run reads .*a.json"):
        check_room(out_dir, Mix([DATA, Mix(parts)] if nested else parts))
    check_room(out_dir, Mix([DATA, DATA]))


# The last step


def test_the_last_step_is_that_with_the_highest_number_unless_the_run_went_back(out_dir: Path):
    assert latest_step(out_dir).name == names.STEP.format(3)
    os.utime(out_dir / names.LAST, ns=(1, 1), follow_symlinks=False)
    set_link(out_dir / names.LAST, out_dir / names.STEP.format(2))
    state = out_dir / names.STEP.format(3) / names.RUN_STATE / names.STATE
    os.utime(state, ns=(1, 1))  # of a way that was left long ago
    assert latest_step(out_dir).name == names.STEP.format(2)
    make_step(out_dir, 10)  # killed before its link was set
    os.utime(out_dir / names.LAST, ns=(1, 1), follow_symlinks=False)
    assert latest_step(out_dir).name == names.STEP.format(10)


def test_a_step_of_the_new_way_is_the_last_though_the_way_that_was_left_went_further(out_dir: Path):
    set_link(out_dir / names.LAST, out_dir / names.STEP.format(1))
    went_back = (out_dir / names.LAST).lstat().st_mtime_ns
    for number, when in ((2, went_back + 1), (3, 1)):  # killed between the second step and its link
        os.utime(out_dir / names.STEP.format(number) / names.RUN_STATE / names.STATE, ns=(when, when))
    assert latest_step(out_dir).name == names.STEP.format(2)


def test_a_run_without_a_step_is_told_no_way_that_leads_nowhere(tmp_path: Path):
    (tmp_path / "out" / names.FINAL).mkdir(parents=True)
    for resume in (True, "auto", False):
        with pytest.raises(UserError, match="(?i)start over with `--overwrite true`") as error:
            step_to_resume(tmp_path / "out", resume)
        assert "resume true`" not in str(error.value) and "auto" not in str(error.value)
    with pytest.raises(UserError, match="Use auto to begin"):
        step_to_resume(tmp_path / "new", True)


def test_a_link_to_a_step_that_is_gone_or_half_says_nothing_of_the_last_step(out_dir: Path):
    for number in (9, 2):
        set_link(out_dir / names.LAST, out_dir / names.STEP.format(number))
        (out_dir / names.STEP.format(2) / names.RUN_STATE / names.STATE).unlink(missing_ok=True)
        assert latest_step(out_dir).name == names.STEP.format(3)


def test_links_are_told_from_what_looks_like_them(tmp_path: Path):
    (tmp_path / "step-000001").mkdir()
    for name, target, ours in (("a", "step-000001", True), ("b", "step-000009", True), ("c", tmp_path / "step-000001", False)):
        (tmp_path / name).symlink_to(target)
        assert is_link(tmp_path / name) is ours
    assert not is_link(tmp_path / "step-000001") and not is_link(tmp_path / "nowhere")


# Options


def test_options_that_differ_are_told_as_they_are_written_in_a_recipe():
    before = {"train": {"min_lr": None, "save_interval": 5}, "data": {"init_args": {"split": [1, 2]}}, "seed": 1}
    now = {"train": {"min_lr": 0.5, "save_interval": 7}, "data": {"init_args": {"split": [1, 3]}}, "seed": 1}
    found = changed_options(before, now, "train", "data", "seed")
    assert list(found.values()) == ["train.min_lr null -> 0.5", "data.init_args.split [1, 2] -> [1, 3]"]
