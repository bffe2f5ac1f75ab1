"""What a run tells: to its loggers, and to the journal that its report is made of."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger

from litgpt import names
from litgpt.errors import UserError, disk_error
from litgpt.metrics import Journal
from litgpt.report import answers_in, write_report
from litgpt.run_state import latest_step


class RunLog:
    """Tells what a run found, on the first rank; on the others it is silent. Use it as a context, which closes the loggers.

    An error of the disk becomes a sentence, and the steps that are saved stay as they are.

    Args:
        fabric: The launched one, with its loggers.
        out_dir: The run's folder.
    """

    def __init__(self, fabric: Fabric, out_dir: Path) -> None:
        self.fabric, self.out_dir = fabric, out_dir
        self.journal = Journal(out_dir / "logs" / "metrics.jsonl")
        self.told: list[dict[str, Any]] = []  # what the journal says of the step that the run goes on from

    def __enter__(self) -> Self:
        self.hook, threading.excepthook = threading.excepthook, self._thread_died
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: Any) -> None:
        try:
            with self._errors() if error is None else suppress(OSError, ValueError):  # lest a second error hides the first
                for logger in self.fabric.loggers:
                    logger.finalize("success" if error is None else "failed")  # lest MLflow shows for ever that it runs
        finally:
            threading.excepthook = self.hook

    def _thread_died(self, args: threading.ExceptHookArgs) -> None:
        """Be silent about a full disk: the next value to log raises the thread's error again."""
        if args.exc_value is None or disk_error(args.exc_value) is None:
            self.hook(args)

    def begin(self, step: int, hyperparameters: Mapping[str, Any]) -> None:
        """Forget what was told of the steps after one, from which the run goes on; -1 forgets all."""
        with self._errors():
            self.journal.cut_after(step)
            self.told = [row for row in self.journal.rows() if row["step"] == step]
            for logger in self.fabric.loggers:
                if not isinstance(logger, CSVLogger):  # which has no place for them
                    logger.log_hyperparams(dict(hyperparameters))

    def values(self, step: int, values: dict[str, float]) -> None:
        """Tell numbers to loggers and journal."""
        with self._errors():
            self.fabric.log_dict(values, step)
        self.tell(step, values)

    def tell(self, step: int, values: Mapping[str, Any]) -> None:
        """Write what was found of a step into the journal, unless a run that was killed later in it had done so."""
        row = {"step": step, **values}
        if self.fabric.is_global_zero and row not in self.told:
            with self._errors():
                self.journal.write(row)

    def report(self, settings: Mapping[str, Any], facts: Mapping[str, str]) -> None:
        """Write `report.html`, of all lives of the run."""
        rows = self.journal.rows()
        with self._errors():
            write_report(self.out_dir / names.REPORT, rows, settings, facts, answers_in(rows))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, ValueError) else error  # Lightning wraps what TensorBoard raises
            if cause is None or (message := disk_error(cause)) is None:
                raise
            last = latest_step(self.out_dir)
            way = f" Then go on from {last} with `--resume true`." if last is not None else ""
            raise UserError(f"The logs in {self.out_dir / 'logs'} could not be written: {message}{way}") from error
