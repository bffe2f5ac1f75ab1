"""A training run as both training scripts see it: its folder, the step it goes on from, what it counts, shows, logs and saves."""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

import torch
import yaml
from lightning import LightningDataModule
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from litgpt import names
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.errors import MissingFile, UserError, disk_error
from litgpt.metrics import Meter, ProgressLine, report, validation_values
from litgpt.optim import FirstNonFinite, learning_rate, warmup_steps
from litgpt.run_state import latest_step, load_run_state, save_run_state, saved_parameters
from litgpt.training import Feed, Limits, Sample, StopRequest, take_step, validate, validation_microbatches

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

# The run's folder


def run_folder(out_dir: Path) -> Path:
    """Return where a run writes: `out_dir`, below LIGHTNING_ARTIFACTS_DIR if that is set and `out_dir` is relative."""
    folder = Path(os.environ.get("LIGHTNING_ARTIFACTS_DIR", "")) / out_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`out_dir` is a folder to write into, but {folder} cannot be one: {error.strerror}. Choose another.") from None
    if not os.access(folder, os.W_OK | os.X_OK):  # one that was there before
        raise UserError(f"`out_dir` is a folder to write into, but writing is not allowed in {folder}. Choose another.")
    return folder


def step_to_resume(out_dir: Path, resume: bool | str | Path | None, overwrite: bool = False) -> Path | None:
    """Return the step folder that a run goes on from, or None for a run that begins.

    Args:
        out_dir: The run's folder.
        resume: True wants the last step in `out_dir`, "auto" takes it if there is one; a path names a step or another run's folder.
        overwrite: Whether a new run may take the place of the one in `out_dir`.

    Raises:
        MissingFile: There is no such step.
        UserError: `out_dir` holds a run, and neither option says what to do with it.
    """
    if resume in (True, "auto", "true"):
        found = latest_step(out_dir)
        if found is None and resume != "auto":
            raise MissingFile(f"`resume` is true, but {out_dir} holds no step to go on from. Use auto to begin where there is none.")
        if found is not None:
            return found
    elif resume not in (False, None, "false"):
        folder = Path(resume)
        found = folder if (folder / names.RUN_STATE / names.STATE).is_file() else latest_step(folder)
        if found is None:
            raise MissingFile(f"`resume` names {folder}, which is no step of a run and holds none, such as {names.STEP.format(100)}.")
        if found.absolute().parent == out_dir.absolute():
            return found
    else:
        found = None
    if (results := results_in(out_dir)) and not overwrite:
        ways = "Go on from its last step with `--resume true`, start over with `--overwrite true`, or choose another `--out_dir`."
        raise UserError(f"{out_dir} already holds a run ({results[-1].name}). {ways}")
    return found


def results_in(out_dir: Path, unfinished: bool = False) -> list[Path]:
    """Return the steps and final folders of a run, those too that were being written if `unfinished` are wanted."""
    finished = f"{names.STEP.replace('{:06d}', '[0-9]+')}|{names.FINAL}|{names.BEST}"
    pattern = rf"({finished})(\.old)?({re.escape(names.PARTIAL)})?" if unfinished else finished
    return sorted(path for path in out_dir.glob("*") if path.is_dir() and re.fullmatch(pattern, path.name))


def write_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the options of a run, as `--config` reads them."""
    (folder / names.HYPERPARAMETERS).write_text(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))


# Data


def sample_length(train: TrainArgs, config: Config) -> int:
    """Return how many tokens a sample may have: what the options say, up to the model's context."""
    if (length := train.max_seq_length or config.block_size) > config.block_size:
        raise UserError(f"`train.max_seq_length` is {length}, but the model's context is {config.block_size} tokens. Lower it.")
    return length


def prepared(fabric: Fabric, data: LightningDataModule) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Download and read a connected data set; return its samples to train on and those to validate on, which may be none."""
    with fabric.rank_zero_first():
        data.prepare_data()
    data.setup()
    train, val = data.train_dataset, data.val_dataset
    if train is None:  # a module that defines its loaders only
        train, val = (getattr(loader, "dataset", None) for loader in (data.train_dataloader(), data.val_dataloader()))
    if not hasattr(train, "__len__"):
        raise UserError(f"{type(data).__name__} does not say how many samples it has: its data set needs `__len__` and `__getitem__`.")
    return train, [] if val is None else val


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


def described(model: nn.Module, precision: str) -> str:
    """Return what is trained, and in which number types."""
    n_all = sum(parameter.numel() for parameter in model.parameters())
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if n_trained < n_all:
        return f"{n_trained:,} of {n_all:,} parameters in {precision}"
    held = ", gradients and the optimizer's averages too" if precision == "bf16-true" else ""
    return f"{n_all:,} parameters in {precision}{held}"


# The run


@contextmanager
def _threads_without_disk_errors() -> Iterator[None]:
    """Let threads that write logs die in silence of a full disk: the next value to log raises their error again."""
    hook = threading.excepthook
    threading.excepthook = lambda args: None if args.exc_value is not None and disk_error(args.exc_value) else hook(args)
    try:
        yield
    finally:
        threading.excepthook = hook


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
    ) -> None:
        self.fabric, self.model, self.optimizer, self.out_dir, self.train = fabric, model, optimizer, out_dir, train
        self.peak, self.limits, self.same, self.side_files = peak, limits, dict(same), side_files
        self.warmup = warmup_steps(train, limits.max_steps)
        self.non_finite = FirstNonFinite(fabric.device)
        self.meter = Meter(limits.max_steps)
        self.progress = ProgressLine(limits.max_steps, shown=fabric.is_global_zero)
        self.stop = StopRequest(answers=fabric.is_global_zero)
        self.open = ExitStack()
        self.lock: IO[str] | None = None
        self.validated: int | None = None  # the last step after which all samples were

    def __enter__(self) -> Self:
        self._lock()
        for part in (_threads_without_disk_errors(), self.stop, self.progress):
            self.open.enter_context(part)
        return self

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)
        if self.lock is not None:
            self.lock.close()

    def _lock(self) -> None:
        """Refuse a folder that another run writes into. The lock is gone when this program ends, however it does."""
        if not self.fabric.is_global_zero or fcntl is None:
            return
        with self._log_errors():
            (self.out_dir / "logs").mkdir(exist_ok=True)
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
            counters = load_run_state(self.fabric, resumed, self.model, self.optimizer)
            if different := [name for name, value in self.same.items() if counters.get(name) != value]:
                saved, here = counters.get(different[0]), self.same[different[0]]
                raise UserError(
                    f"{resumed} is of a run with {different[0]} {saved!r}, not {here!r}. Resume with the model, data and flags of that run."
                )
            self.meter.step, self.meter.total_tokens = counters["step"], counters["total_tokens"]
            self.progress.say(f"Going on after step {self.step}, from {resumed}.")
        elif self.fabric.is_global_zero:
            for path in results_in(self.out_dir, unfinished=True):  # `step_to_resume` asked for permission
                shutil.rmtree(path)
        self.fabric.barrier()
        if type(self.fabric.logger).__name__ != "CSVLogger":  # which has no place for them
            with self._log_errors():
                self.fabric.logger.log_hyperparams(dict(hyperparameters))

    def feed(self, samples: Sequence[Sample], seed: int) -> Feed:
        """Return the microbatches of the steps to come, and start the clock."""
        self.meter.started = self.meter.last = self.meter.clock()
        return Feed(self.fabric, samples, self.train, seed, self.step + 1, self.limits.last, self._wants_to_stop)

    def _wants_to_stop(self) -> bool:
        return bool(self.stop) or self.limits.out_of_time(self.meter.elapsed())

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        train = self.train
        return learning_rate(step, self.peak, self.limits.max_steps, self.warmup, train.lr_schedule, train.min_lr)

    def take_step(self, n_tokens: int) -> Tensor:
        """Clip the gradients and change the weights; return the gradients' norm before clipping, without waiting for the device.

        Args:
            n_tokens: How many tokens the step saw, over all ranks.
        """
        step = self.step + 1
        lr, max_norm = self.learning_rate(step), self.train.max_norm
        grad_norm = take_step(self.fabric, self.model, self.optimizer, step, lr, max_norm, self.non_finite)
        self.meter.count(n_tokens)
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

    def validate(self, samples: Sequence[Sample], eval: EvalArgs | None = None) -> None:
        """Show and log the mean loss of a token over samples, or over as many as `eval.max_iters` allows; nothing if that was just done."""
        sees_all = eval is None or len(samples) <= eval.max_iters * self.train.micro_batch_size
        if not len(samples) or (sees_all and self.validated == self.step):
            return
        self.validated = self.step if sees_all else None
        with self.meter.paused():
            val_loss = validate(self.fabric, self.model, validation_microbatches(self.fabric, samples, self.train, eval))
            values = validation_values(val_loss)
            self.progress.say(f"step {self.step} | val loss {val_loss:.3f} | val ppl {values['val_ppl']:.2f}")
            self._write_log(values)

    def save(self) -> Path:
        """Write the folder of the step that is done."""
        folder = self.out_dir / names.STEP.format(self.step)
        counters = {"step": self.step, "total_tokens": self.meter.total_tokens, **self.same}
        with self.meter.paused():
            save_run_state(self.fabric, folder, self.model, self.optimizer, counters, self.side_files, self.non_finite)
        return folder

    def end(self, feed: Feed) -> None:
        """Check the last steps. If the system asked this run to stop, save its step and leave the program, so that it can be resumed.

        Raises:
            SystemExit: The system asked to stop, on whichever rank.
        """
        self.non_finite.check()
        asked = self.fabric.all_reduce(torch.tensor(float(bool(self.stop)), device=self.fabric.device), reduce_op="sum").item()
        if feed.stopped and asked:
            folder = self.save() if self.step else None
            where = f"Its state is in {folder}: go on with `--resume true`." if folder else "Nothing was learned yet."
            self.progress.say(f"Stopped after step {self.step}, as asked. {where}")
            raise SystemExit(130)
        if feed.stopped:
            self.progress.say(f"Stopping after step {self.step}: `train.max_time` is over.")

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
        self.progress.say(f"{report(self.meter)}\nSaved {final}. Talk to it with: litgpt chat {final}")

    def trained_weights(self) -> dict[str, Tensor]:
        """Return what was trained, each parameter whole and on the CPU. All ranks must call this."""
        weights = {name: parameter.detach() for name, parameter in saved_parameters(self.model).items()}
        return {name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu() for name, weight in weights.items()}
