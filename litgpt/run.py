"""A training run as both training scripts see it: its samples, the step it goes on from, what it counts, shows, logs and saves."""

import hashlib
import math
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import IO, Any, NoReturn, Self, TypeVar

import torch
from lightning import LightningDataModule
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from litgpt import names
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data.packing import PackedSamples
from litgpt.errors import UserError, disk_error
from litgpt.files import read_yaml
from litgpt.hardware import device_name
from litgpt.launch import upload
from litgpt.metrics import Journal, Meter, ProgressLine, profiled, report, summary, validation_values
from litgpt.optim import FirstNonFinite, learning_rate, warmup_steps
from litgpt.quantize import n_weights
from litgpt.report import answers_in, write_report
from litgpt.run_folder import DECIDE, changed_options, delete_old_steps, no_folder, remove_links, results_in, set_link
from litgpt.run_state import ANOTHER, latest_step, load_run_state, loss_scaler, save_run_state, saved_counters, saved_parameters
from litgpt.training import Agreed, Feed, Limits, Sample, StopRequest, steps, take_step, validate, validation_microbatches

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

Item = TypeVar("Item")
VOTE_EVERY = 4  # microbatches of a validation, or tokens of an answer, lie between two looks at whether to stop
CUT_SAMPLES = ("seed", "train.max_seq_length", "train.packing")  # options outside of the data set that decide which samples there are
MAX_NAMED = 32  # samples that an error lists

# Data


def sample_length(train: TrainArgs, config: Config) -> int:
    """Return how many tokens a sample may have: what the options say, up to the model's context."""
    if (length := train.max_seq_length or config.block_size) > config.block_size:
        raise UserError(f"`train.max_seq_length` is {length}, but the model's context is {config.block_size} tokens. Lower it.")
    return length


def prepared(fabric: Fabric, data: LightningDataModule) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Download and read a connected data set; return its samples to train on and those to validate on, which may be none."""
    with together(fabric):
        if fabric.is_global_zero:
            data.prepare_data()
    with together(fabric), redirect_stderr(sys.stderr if fabric.is_global_zero else StringIO()):  # or each rank would tell what was cut
        if not fabric.is_global_zero:
            data.prepare_data()  # finds what the first one left, or is on another machine
        data.setup()
    train, val = data.train_dataset, data.val_dataset
    if train is None:  # a module that defines its loaders only
        train, val = (getattr(loader, "dataset", None) for loader in (data.train_dataloader(), data.val_dataloader()))
    if not hasattr(train, "__len__"):
        raise UserError(f"{type(data).__name__} does not say how many samples it has: its data set needs `__len__` and `__getitem__`.")
    return train, [] if val is None else val


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Let an error in this part of a program end it on all ranks, which would else wait for ever; the first that has one tells it."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if fabric.world_size > 1:
        codes = torch.zeros(fabric.world_size, device=fabric.device)
        codes[fabric.global_rank] = 0 if error is None else 2 if isinstance(error, UserError) else 1  # see `cli.main`
        failed = [(rank, int(code)) for rank, code in enumerate(fabric.all_reduce(codes, reduce_op="sum").tolist()) if code]
        if failed and failed[0][0] != fabric.global_rank:
            raise SystemExit(failed[0][1])
    if error is not None:
        raise error


def digest(samples: Sequence[Sample]) -> str:
    """Return a short text that differs where the samples do, after some of them."""
    found = hashlib.sha256(str(len(samples)).encode())
    for sample in _some(samples):
        for part in sample.values() if isinstance(sample, Mapping) else [sample]:
            found.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return found.hexdigest()[:12]


def check_ids(config: Config, *parts: Sequence[Sample]) -> None:
    """Raise a UserError if samples hold tokens that the model has no embedding of. Of data sets that are not ours, some are looked at."""
    known = config.padded_vocab_size
    if (highest := max(map(_highest_id, parts))) >= known:
        raise UserError(
            f"The samples hold the token id {highest}, but the model knows {known} tokens. Use the tokenizer it was trained with."
        )


def _highest_id(samples: Sequence[Sample]) -> int:
    if (known := getattr(samples, "highest_id", None)) is not None:
        return known
    ids = (sample["input_ids"] if isinstance(sample, Mapping) else sample for sample in _some(samples))
    return max((int(tokens.max()) for tokens in ids if len(tokens)), default=-1)


def _some(samples: Sequence[Sample], n_seen: int = 256) -> Iterator[Sample]:
    yield from (samples[i] for i in range(0, len(samples), max(1, len(samples) // n_seen)))


# The model


def fingerprint(model: nn.Module, n_seen: int = 64) -> str:
    """Return a short text that differs where the weights do, after some numbers of each."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        some = weight.detach().reshape(-1)[:: max(1, weight.numel() // n_seen)].contiguous()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def counted(n: int, noun: str) -> str:
    """Return `1 sample` or `1,000 samples`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def check_finite(model: nn.Module, folder: Path) -> None:
    """Raise a UserError if a weight of the model that was read from a folder is NaN or infinite, as none can be learned from."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"The weight {name!r} of the model in {folder} has numbers that are not finite, so it cannot be trained. "
                "Download or convert the model again, or take another."
            )


def described(model: nn.Module, precision: str) -> str:
    """Return what is trained, and in which number types."""
    n_all = n_weights(model)
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if n_trained < n_all:
        return f"{n_trained:,} of {n_all:,} parameters in {precision}"
    held = ", gradients and the optimizer's averages too" if precision == "bf16-true" else ""
    return f"{n_all:,} parameters in {precision}{held}"


# The run


def _samples_of(step: int, samples: Sequence[Sample], train: TrainArgs, seed: int) -> str:
    """Name the samples of a step by their numbers in the data set."""
    indices = next(steps(len(samples), train.global_batch_size, seed, first=step)).indices
    if isinstance(samples, PackedSamples):
        indices = [i for row in indices for i in samples.rows[row]]
    more = f" and {counted(len(indices) - MAX_NAMED, 'other')}" if len(indices) > MAX_NAMED else ""
    return f"the samples {', '.join(map(str, sorted(indices)[:MAX_NAMED]))}{more} (the first is 0)"


@contextmanager
def _threads_without_disk_errors() -> Iterator[None]:
    """Let threads that write logs die in silence of a full disk: the next value to log raises their error again."""
    hook = threading.excepthook
    threading.excepthook = lambda args: None if args.exc_value is not None and disk_error(args.exc_value) else hook(args)
    try:
        yield
    finally:
        threading.excepthook = hook


@dataclass
class Judged:
    """What the validations at `eval.interval` found, as each saved step keeps it."""

    lowest: float | None = None  # loss
    n_since: int = 0  # validations, none of which was lower
    best: tuple[int, float] | None = None  # of the saved steps the one with the lowest loss, and that
    owed: bool = False  # whether the system stopped the run in the validation of this step

    @property
    def is_whole(self) -> bool:
        """Whether all fields, which may have been read from a file, are of their types."""
        match self.best:
            case None | [int(), int() | float()]:
                return isinstance(self.lowest, int | float | None) and isinstance(self.n_since, int) and isinstance(self.owed, bool)
        return False


class Run:
    """What a training script does beside training. Use it as a context, which listens to signals and shows progress.

    Args:
        fabric: The launched one.
        model: As `fabric.setup_module` returned it.
        optimizer: As `fabric.setup_optimizers` returned it.
        out_dir: Where steps are saved.
        train: The options of the training.
        peak: The highest learning rate.
        limits: When the run ends.
        same: What a resumed run must have in common with the one before, lest it see other samples: option -> value.
        side_files: Writes config, tokenizer and the like into a step's folder.
        patience: After how many validations in a row that did not lower the best loss the run ends.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizer: Optimizer,
        out_dir: Path,
        train: TrainArgs,
        peak: float,
        limits: Limits,
        same: Mapping[str, Any],
        side_files: Callable[[Path], None],
        patience: int | None = None,
    ) -> None:
        self.patience = patience
        self.fabric, self.model, self.optimizer, self.out_dir, self.train = fabric, model, optimizer, out_dir, train
        self.peak, self.limits, self.same, self.side_files = peak, limits, dict(same), side_files
        self.warmup = warmup_steps(train, limits.max_steps)
        self.non_finite = FirstNonFinite(fabric.device)
        self.meter = Meter(limits.max_steps)
        self.progress = ProgressLine(limits.max_steps, shown=fabric.is_global_zero)
        self.stop = StopRequest(answers=fabric.is_global_zero)
        self.open = ExitStack()
        self.lock: IO[str] | None = None
        self.made = False  # whether this run made its folder
        self.journal = Journal(out_dir / "logs" / "metrics.jsonl")
        self.told: list[dict[str, Any]] = []  # what it says of the step that the run goes on from
        self.judged = Judged()
        self.val_loss: tuple[int, float] | None = None  # the last step that `judged` knows, and its loss
        self.validated: int | None = None  # the last step after which all samples were
        self.saved: int | None = None  # the last step that was, as it is now
        self.links = True  # whether the disk can hold them

    def __enter__(self) -> Self:
        with together(self.fabric):
            self._lock()
        for part in (_threads_without_disk_errors(), self.stop, self.progress):
            self.open.enter_context(part)
        return self

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)
        if self.lock is not None:
            self.lock.close()
        if self.made and self.lock is not None and self.step == 0 and os.listdir(self.out_dir / "logs") == [".lock"]:  # nothing came of it
            (self.out_dir / "logs" / ".lock").unlink()
            with suppress(OSError):  # of what else is in it
                (self.out_dir / "logs").rmdir()
                self.out_dir.rmdir()

    def _lock(self) -> None:
        """Make the run's folder, and refuse one that another run writes into. The lock is gone when this program ends, however it does."""
        if not self.fabric.is_global_zero:
            return
        self.made = not self.out_dir.exists()
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise no_folder(self.out_dir, str(error.strerror)) from None
        if fcntl is None:
            return
        with self._log_errors():
            try:
                (self.out_dir / "logs").mkdir(exist_ok=True)
            except FileExistsError:
                raise no_folder(self.out_dir / "logs", "there is a file of this name") from None
            self.lock = open(self.out_dir / "logs" / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another run is writing into {self.out_dir}. Wait for it, or choose another `--out_dir`.") from None

    @property
    def step(self) -> int:
        """The last step that is done."""
        return self.meter.step

    def begin(self, resumed: Path | None, hyperparameters: Mapping[str, Any]) -> None:
        """Go on from a step, or make room for a new run."""
        if resumed is not None:
            counters, before = saved_counters(resumed), read_yaml(resumed / names.HYPERPARAMETERS, way=ANOTHER)
            self._check_same(resumed, counters, before, hyperparameters)
            load_run_state(self.fabric, resumed, self.model, self.optimizer)
            self._count_on(resumed, counters)
            self._point_links()
            self.progress.say(f"Going on after step {self.step}, from {resumed}.")
            if changed := changed_options(before or hyperparameters, hyperparameters, "optimizer", "train"):
                self.progress.say(f"Resuming with changed {', '.join(changed.values())}.")
        elif self.fabric.is_global_zero:
            for path in results_in(self.out_dir, unfinished=True):  # `step_to_resume` asked for permission, and `check_room` looked
                shutil.rmtree(path)
            remove_links(self.out_dir)
        if self.fabric.is_global_zero:
            with self._log_errors():
                self.journal.cut_after(self.step if resumed is not None else -1)
                self.told = [row for row in self.journal.rows() if row.get("step") == self.step]
        self.fabric.barrier()
        if type(self.fabric.logger).__name__ != "CSVLogger":  # which has no place for them
            with self._log_errors():
                self.fabric.logger.log_hyperparams(dict(hyperparameters))

    def _count_on(self, resumed: Path, counters: Mapping[str, Any]) -> None:
        """Take up the counters of a step, and what its validations found."""
        step, total_tokens, found = counters.get("step"), counters.get("total_tokens"), counters.get("validations", {})
        known = isinstance(found, dict) and found.keys() <= Judged.__dataclass_fields__.keys()
        self.judged = Judged(**found) if known else Judged()
        if not (known and self.judged.is_whole and isinstance(step, int) and isinstance(total_tokens, int)):
            raise UserError(f"{resumed} is damaged: its counters lack the step, the tokens or the validations. {ANOTHER}")
        self.meter.step, self.meter.total_tokens = step, total_tokens
        if self.judged.best is not None and not self._best().is_dir():  # the run began in another folder
            self.judged.best = None

    def _check_same(self, resumed: Path, counters: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse the step of a run that saw other samples or trained something else."""
        name = next((name for name, value in self.same.items() if counters.get(name) != value), None)
        if name is None:
            return
        why = ""
        if "sample" in name:
            changed = changed_options(before, now, "data", "seed", "train")
            texts = [text for name, text in changed.items() if name.startswith("data.") or name in CUT_SAMPLES]
            why = f" (changed: {', '.join(texts)})" if texts else f" ({DECIDE} changed)"
        raise UserError(
            f"{resumed} is of a run with {name} {counters.get(name)!r}, not {self.same[name]!r}{why}. "
            "Resume with the model, data and flags of that run."
        )

    def feed(self, samples: Sequence[Sample], seed: int) -> Feed:
        """Return the microbatches of the steps to come, and start the clock."""
        self.meter.started = self.meter.last = self.meter.clock()
        self.non_finite.samples_of = lambda step: _samples_of(step, samples, self.train, seed)
        last = self.step if self.is_over() else self.limits.last
        return Feed(self.fabric, samples, self.train, seed, self.step + 1, last, self._wants_to_stop)

    def is_over(self) -> bool:
        """Say whether the last step was the last of all: all tokens were seen, or the loss falls no more. Equal on all ranks."""
        return self.limits.reached(self.meter.total_tokens) or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Whether as many validations in a row as allowed did not lower the loss. Equal on all ranks."""
        return self.patience is not None and self.judged.n_since >= self.patience

    def _wants_to_stop(self) -> bool:
        return bool(self.stop) or self.limits.out_of_time(self.meter.elapsed())

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        train = self.train
        return learning_rate(step, self.peak, self.limits.max_steps, self.warmup, train.lr_schedule, train.min_lr)

    def take_step(self, agreed: Agreed, loss: Tensor | None = None) -> Tensor:
        """Clip the gradients and change the weights; return the gradients' norm before clipping, without waiting for the device.

        Args:
            agreed: What all ranks knew of the step.
            loss: What this rank found of its loss.
        """
        step = self.step + 1
        if loss is not None and loss_scaler(self.fabric) is None:
            self.non_finite.update_loss(loss, step)
        lr, max_norm = self.learning_rate(step), self.train.max_norm
        grad_norm = take_step(self.fabric, self.model, self.optimizer, step, lr, max_norm, self.non_finite)
        self.meter.count(agreed.n_tokens, agreed.n_slots, agreed.waited)
        return grad_norm

    def log(self, loss: Tensor, grad_norm: Tensor, epoch: int) -> None:
        """Show and log a step. This waits for the device."""
        self.non_finite.check()
        mean_loss = self.fabric.all_reduce(loss, reduce_op="mean").item()
        values = self.meter.values(mean_loss, self.learning_rate(self.step), grad_norm.item(), epoch)
        self.progress.update(values)
        self._write_log(values)

    def _write_log(self, values: dict[str, float]) -> None:
        with self._log_errors():
            self.fabric.log_dict(values, self.step)
        self._tell(**values)

    def _tell(self, **values: Any) -> None:
        """Write what was found of a step into the journal, unless a run that was killed later in it had done so."""
        row = {"step": self.step, **values}
        if self.fabric.is_global_zero and row not in self.told:
            with self._log_errors():
                self.journal.write(row)

    @contextmanager
    def _log_errors(self) -> Iterator[None]:
        """Make a sentence of the disk's errors. The steps that are saved stay as they are."""
        try:
            yield
        except (OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, ValueError) else error  # Lightning wraps what TensorBoard raises
            if cause is None or (message := disk_error(cause)) is None:
                raise
            last = latest_step(self.out_dir)
            way = f" Then go on from {last} with `--resume true`." if last is not None else ""
            raise UserError(f"The logs in {self.out_dir / 'logs'} could not be written: {message}{way}") from error

    def validate(self, samples: Sequence[Sample], eval: EvalArgs | None = None) -> float | None:
        """Show, log and return the mean loss of a token over samples, or over as many as `eval.max_iters` allows; None if just done.

        With `eval` it counts for `best` and `patience`; and the best so far is saved, if `eval.save_best` says so.
        """
        sees_all = eval is None or len(samples) <= eval.max_iters * self.train.micro_batch_size
        if not len(samples) or (sees_all and self.validated == self.step):
            return None
        owed, self.judged.owed = self.judged.owed, eval is not None  # if the run is stopped in it
        microbatches = self.unless_stopped(validation_microbatches(self.fabric, samples, self.train, eval))
        with self.meter.paused():
            val_loss = validate(self.fabric, self.model, microbatches)
            values = validation_values(val_loss)
            self.progress.say(f"step {self.step} | val loss {val_loss:.3f} | val ppl {values['val_ppl']:.2f}")
            self._write_log(values)
        self.validated, self.judged.owed = self.step if sees_all else None, False
        if eval is not None and self.step:
            is_best = self._judge(val_loss)
            if owed or (is_best and eval.save_best):
                self.save()
        return val_loss

    def _judge(self, val_loss: float) -> bool:
        """Note the validation loss of a step; say whether it is the lowest so far."""
        is_best = val_loss < (math.inf if self.judged.lowest is None else self.judged.lowest)
        self.judged.n_since = 0 if is_best else self.judged.n_since + 1
        self.judged.lowest = val_loss if is_best else self.judged.lowest
        self.val_loss, self.saved = (self.step, val_loss), None
        return is_best

    def unless_stopped(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items. Where the system asks any rank to stop meanwhile, save the step and leave the program, all ranks together.

        Args:
            items: Equally many on all ranks, and nothing that changes the training's state.
        """
        for i, item in enumerate(items):
            if i % VOTE_EVERY == 0 and self._any_rank(bool(self.stop)):
                self._leave()
            yield item

    def _any_rank(self, claim: bool) -> bool:
        if self.fabric.world_size == 1:
            return claim
        return bool(self.fabric.all_reduce(torch.tensor(float(claim), device=self.fabric.device), reduce_op="sum").item())

    def _folder(self, step: int) -> Path:
        return self.out_dir / names.STEP.format(step)

    def _best(self) -> Path | None:
        return None if self.judged.best is None else self._folder(self.judged.best[0])

    def save(self) -> Path:
        """Write the folder of the step that is done, unless it was just written; let the links name it, delete what is too old."""
        folder = self._folder(self.step)
        if self.saved == self.step:
            return folder
        best = math.inf if self.judged.best is None else self.judged.best[1]
        if self.val_loss is not None and self.val_loss[0] == self.step and self.val_loss[1] < best:
            self.judged.best = self.val_loss
        counters = {"step": self.step, "total_tokens": self.meter.total_tokens, "validations": asdict(self.judged), **self.same}
        with self.meter.paused():
            save_run_state(self.fabric, folder, self.model, self.optimizer, counters, self.side_files, self.non_finite)
            self.saved = self.step
            self._point_links()
            if self.train.keep_last is not None and self.fabric.is_global_zero:
                try:
                    delete_old_steps(self.out_dir, self.train.keep_last, self._best(), self._is_of_this_run)
                except OSError as error:
                    self.progress.say(f"An old step could not be deleted: {error}")
        return folder

    def _is_of_this_run(self, counters: Mapping[str, Any]) -> bool:
        step = counters.get("step")
        return isinstance(step, int) and step <= self.step and all(counters.get(name) == value for name, value in self.same.items())

    def _point_links(self) -> None:
        """Let `last` name the step that is done and `best` the best one, as far as these are in this run's folder."""
        if not self.fabric.is_global_zero or not self.links:
            return
        for name, folder in ((names.LAST, self._folder(self.step)), (names.BEST, self._best())):
            if folder is not None and folder.is_dir() and not set_link(self.out_dir / name, folder):
                self.links = False
                self.progress.say(f"No link {self.out_dir / name} could be made to {folder.name}; the steps themselves are whole.")
                return

    def end(self, feed: Feed) -> None:
        """Check the last steps. If the system asked this run to stop, save its step and leave the program, so that it can be resumed.

        Raises:
            SystemExit: The system asked to stop, on whichever rank: 130 after Ctrl-C, 143 after SIGTERM.
        """
        self.non_finite.check()
        if feed.stopped and self._any_rank(bool(self.stop)):
            self._leave()
        if feed.stopped:
            self.progress.say(f"Stopping after step {self.step}: `train.max_time` is over.")
        elif self.out_of_patience:
            n_worse = counted(self.judged.n_since, "validation")
            self.progress.say(f"Stopping after step {self.step}: the validation loss did not fall in the last {n_worse}.")

    @contextmanager
    def profiled(self, n_steps: int | None) -> Iterator[Callable[[], None]]:
        """Yield what is to be called after each step; so many are recorded in `logs/trace.json`, from the third on."""
        with profiled(n_steps if self.fabric.is_global_zero else None, self.out_dir / "logs" / "trace.json") as step_done:
            yield step_done

    def note_answer(self, prompt: str, answer: str) -> None:
        """Show and log what the model, as it is now, answered to a prompt."""
        self.progress.say(f"{prompt}\n>>> {answer}")
        self._tell(prompt=prompt, answer=answer)

    def report(self, settings: Mapping[str, Any], facts: Mapping[str, str], final: Path, log: LogArgs) -> None:
        """Write `report.html`, and send the result where the logger sends the run, if the options say so."""
        if not self.fabric.is_global_zero:
            return
        rows, known = self.journal.rows(), summary(self.meter) | {"machine": device_name(self.fabric.device)}
        with self._log_errors():
            write_report(self.out_dir / names.REPORT, rows, settings, {**facts, **known}, answers_in(rows))
        upload(self.fabric.logger, final, log)

    def _leave(self) -> NoReturn:
        """Save the step that is done and leave the program, as the system asked. All ranks call this."""
        folder = self.save() if self.step else None
        where = f"Its state is in {folder}: go on with `--resume true`." if folder else "Nothing was learned yet."
        self.progress.say(f"Stopped after step {self.step}, as asked. {where}")
        raise SystemExit(128 + (self.stop.number or signal.SIGTERM))  # as the shell says it of a program that a signal ended

    def finish(self, final: Path, write: Callable[[dict[str, Tensor]], None]) -> None:
        """Write the result, and show what the run took. Should writing fail on one device, the last step is saved, if the disk has room.

        Args:
            final: The folder that `write` makes.
            write: Makes it of the trained weights. Called on one rank.
        """
        weights = self.trained_weights()
        if bad := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
            raise UserError(
                f"After step {self.step} the weight {bad[0]!r} is no longer finite. Lower `--optimizer.lr`, or clip with `train.max_norm`."
            )
        try:
            if self.fabric.is_global_zero:
                write(weights)
        except Exception:
            if self.fabric.world_size == 1:
                with suppress(UserError):  # the disk may have no room for it either
                    self.progress.say(f"{final} could not be written. The training is saved in {self.save()}: go on with `--resume true`.")
            raise
        self.fabric.barrier()
        self.progress.say(f"{report(self.meter)}\nSaved {final}. Talk to it with: litgpt chat {shlex.quote(str(final))}")

    def trained_weights(self) -> dict[str, Tensor]:
        """Return what was trained, each parameter whole and on the CPU. All ranks must call this."""
        weights = {name: parameter.detach() for name, parameter in saved_parameters(self.model).items()}
        return {name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu() for name, weight in weights.items()}
