"""What a run tells its loggers and its journal, and how it ends."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.loggers import CSVLogger

from litgpt.errors import UserError
from litgpt.run_log import RunLog


class Service:
    """Stands for a logger: what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def log_hyperparams(self, given: dict) -> None:
        self.told.append(given)

    def finalize(self, status: str) -> None:
        self.told.append(status)


def log_of(out_dir: Path, *loggers: Any, log_dict: Any = lambda values, step: None, is_global_zero: bool = True) -> RunLog:
    return RunLog(SimpleNamespace(loggers=loggers, log_dict=log_dict, is_global_zero=is_global_zero), out_dir)


def test_loggers_learn_how_a_run_ended(tmp_path: Path):
    for error, status in ((None, "success"), (KeyboardInterrupt, "failed"), (SystemExit, "failed"), (UserError, "failed")):
        service = Service()
        try:
            with log_of(tmp_path, service):
                if error is not None:
                    raise error
        except (KeyboardInterrupt, SystemExit, UserError) as caught:
            assert type(caught) is error
        assert service.told == [status]


def test_a_disk_that_is_full_when_loggers_are_closed_hides_no_other_error(tmp_path: Path):
    def full(status: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="logs could not be written: the disk is full"), log_of(tmp_path, SimpleNamespace(finalize=full)):
        pass
    with pytest.raises(KeyError, match="ours"), log_of(tmp_path, SimpleNamespace(finalize=full)):
        raise KeyError("ours")


def test_options_go_to_every_logger_that_has_a_place_for_them(tmp_path: Path):
    service = Service()
    log_of(tmp_path, CSVLogger(tmp_path), service).begin(-1, {"seed": 1})
    assert service.told == [{"seed": 1}]


def test_what_was_told_of_a_step_before_a_kill_is_not_told_again(tmp_path: Path):
    log = log_of(tmp_path)
    for step, loss in ((1, 0.5), (2, 0.1 + 0.2), (3, 0.25)):
        log.values(step, {"loss": loss})
    log.tell(2, {"val_loss": 1.0})
    resumed = log_of(tmp_path)
    resumed.begin(2, {})
    for values in ({"loss": 0.1 + 0.2}, {"val_loss": 1.0}, {"val_loss": 2.0}):
        resumed.tell(2, values)
    expected = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.1 + 0.2}, {"step": 2, "val_loss": 1.0}, {"step": 2, "val_loss": 2.0}]
    assert resumed.journal.rows() == expected
    log_of(tmp_path, is_global_zero=False).tell(4, {"loss": 1.0})
    assert resumed.journal.rows() == expected, "other ranks write nothing"
    resumed.begin(-1, {})
    assert resumed.journal.rows() == []


def test_a_thread_that_dies_of_a_full_disk_says_nothing_and_any_other_does(tmp_path: Path, capfd: pytest.CaptureFixture):
    def dies(error: Exception) -> None:
        def target() -> None:
            raise error

        thread = threading.Thread(target=target)
        thread.start()
        thread.join()

    before, heard = threading.excepthook, []
    threading.excepthook = lambda args: heard.append(type(args.exc_value))
    try:
        with log_of(tmp_path):
            dies(OSError(28, "No space left on device"))
            dies(KeyError("ours"))
        dies(OSError(28, "No space left on device"))
    finally:
        threading.excepthook = before
    assert heard == [KeyError, OSError]
