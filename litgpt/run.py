"""A training run as both training scripts see it: the step it goes on from, what it counts, shows, logs and saves."""

import math
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from litgpt import names
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.errors import UserError
from litgpt.files import read_yaml
from litgpt.hardware import device_name, give_back_memory
from litgpt.launch import upload
from litgpt.metrics import Meter, ProgressLine, profiled, report, summary, validation_values
from litgpt.optim import FirstNonFinite, learning_rate, warmup_steps
from litgpt.run_folder import changed_options, delete_old_steps, held, is_link, remove_results, set_link
from litgpt.run_inputs import counted, samples_of, together
from litgpt.run_log import RunLog
from litgpt.run_state import (
    ANOTHER,
    latest_step,
    load_run_state,
    replace_counters,
    save_run_state,
    saved_counters,
    saved_parameters,
)
from litgpt.training import Agreed, Feed, Limits, Sample, StopRequest, take_step, validate, validation_microbatches

Item = TypeVar("Item")
VOTE_EVERY = 4  # microbatches of a validation, or tokens of an answer, lie between two looks at whether to stop
CUT_SAMPLES = ("seed", "train.max_seq_length", "train.packing")  # options outside of the data set that decide which samples there are


@dataclass
class Judged:
    """What the validations at `eval.interval` found, as each saved step keeps it."""

    lowest: float | None = None  # loss
    n_since: int = 0  # validations, none of which was lower
    best: tuple[int, float] | None = None  # of the saved steps the one with the lowest loss, and that
    owed: bool = False  # whether the system stopped the run in the validation of this step
    unanswered: bool = False  # or before its example answer was whole

    @property
    def is_whole(self) -> bool:
        """Whether all fields, which may have been read from a file, are of their types."""
        match self.best:
            case None | [int(), int() | float()]:
                return (
                    isinstance(self.lowest, int | float | None)
                    and isinstance(self.n_since, int)
                    and {type(self.owed), type(self.unanswered)} == {bool}
                )
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
        self.logs = RunLog(fabric, out_dir)
        self.judged = Judged()
        self.val_loss: tuple[int, float] | None = None  # the last step that `judged` knows, and its loss
        self.validated: int | None = None  # the last step after which all samples were
        self.answered: int | None = None  # the last step after which an example answer was told
        self.saved: tuple[int, dict[str, Any]] | None = None  # the last step that was, and what was known of its validations
        self.links = True  # whether the disk can hold them

    def __enter__(self) -> Self:
        with together(self.fabric):
            if self.fabric.is_global_zero:
                self.open.enter_context(held(self.out_dir))
        for part in (self.logs, self.stop, self.progress):
            self.open.enter_context(part)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.open.__exit__(kind, error, trace)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):  # of NCCL or gloo
            last = latest_step(self.out_dir)
            way = f"Go on from {last.name} with `--resume true`." if last is not None else "No step was saved: start again."
            raise UserError(
                f"Another process of this run ended or cannot be reached, so this one ends too; see what that one said. {way}"
            ) from error

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
            if self.limits.last is not None and self.step > self.limits.last:  # what `max_tokens` makes of it is a guess
                raise UserError(
                    f"{resumed} is past the end of the run, which its limits set after step {self.limits.last:,}. "
                    "Raise the limit, or name an earlier step with `--resume`."
                )
            self._point_links()
            self.progress.say(f"Going on after step {self.step}, from {resumed}.")
            if changed := changed_options(before or hyperparameters, hyperparameters, "optimizer", "train"):
                self.progress.say(f"Resuming with changed {', '.join(changed.values())}.")
        with together(self.fabric):
            if self.fabric.is_global_zero:
                if resumed is None:
                    remove_results(self.out_dir)  # `step_to_resume` asked for permission, and `check_room` looked
                self.logs.begin(-1 if resumed is None else self.step, hyperparameters)

    def _count_on(self, resumed: Path, counters: Mapping[str, Any]) -> None:
        """Take up the counters of a step, and what its validations found."""
        step, total_tokens, found = counters.get("step"), counters.get("total_tokens"), counters.get("validations", {})
        known = isinstance(found, dict) and found.keys() <= Judged.__dataclass_fields__.keys()
        self.judged, seconds = Judged(**found) if known else Judged(), counters.get("training_seconds", 0.0)
        is_whole = known and self.judged.is_whole and isinstance(step, int) and isinstance(total_tokens, int)
        if not (is_whole and isinstance(seconds, int | float)):
            raise UserError(f"{resumed} is damaged: its counters lack the step, the tokens, the time or the validations. {ANOTHER}")
        self.meter.step, self.meter.total_tokens, self.meter.seconds_before = step, total_tokens, seconds
        if resumed.resolve().parent == self.out_dir.resolve():
            self.saved = step, asdict(self.judged)
        if self.judged.best is not None and not self._best().is_dir():  # the run began in another folder
            self.judged.best = None

    def _check_same(self, resumed: Path, counters: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse the step of a run that saw other samples or trained something else."""
        name = next((name for name, value in self.same.items() if counters.get(name) != value), None)
        if name is None:
            return
        why = ""
        if "sample" in name:
            changed = changed_options(before or now, now, "data", "seed", "train")
            texts = [text for name, text in changed.items() if name.startswith("data.") or name in CUT_SAMPLES]
            why = f" (changed: {', '.join(texts)})" if texts else " (the data's files or the tokenizer changed)"
        raise UserError(
            f"{resumed} is of a run with {name} {counters.get(name)!r}, not {self.same[name]!r}{why}. "
            "Resume with the model, data and flags of that run."
        )

    def feed(self, samples: Sequence[Sample], seed: int) -> Feed:
        """Return the microbatches of the steps to come, and start the clock."""
        self.meter.started = self.meter.last = self.meter.clock()
        self.non_finite.samples_of = lambda step: samples_of(step, samples, self.train, seed)
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
        if loss is not None:
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
        self.logs.values(self.step, values)

    def validate(self, samples: Sequence[Sample], eval: EvalArgs | None = None) -> None:
        """Show and log the mean loss of a token over samples, or over as many as `eval.max_iters` allows, unless that was just done.

        With `eval` it counts for `best` and `patience`; and the best so far is saved, if `eval.save_best` says so.
        """
        sees_all = eval is None or len(samples) <= eval.max_iters * self.train.micro_batch_size
        if not len(samples) or (sees_all and self.validated == self.step):
            return
        owed, self.judged.owed = self.judged.owed, eval is not None  # if the run is stopped in it
        microbatches = self.unless_stopped(validation_microbatches(self.fabric, samples, self.train, eval))
        with self.meter.paused():
            val_loss = validate(self.fabric, self.model, microbatches)
            values = validation_values(val_loss)
            self.progress.say(f"step {self.step} | val loss {val_loss:.3f} | val ppl {values['val_ppl']:.2f}")
            self.logs.values(self.step, values)
        self.validated, self.judged.owed = self.step if sees_all else None, False
        if eval is not None and self.step:
            is_best = self._judge(val_loss)
            if owed or (is_best and eval.save_best):
                self.save()

    def _judge(self, val_loss: float) -> bool:
        """Note the validation loss of a step; say whether it is the lowest so far."""
        is_best = val_loss < (math.inf if self.judged.lowest is None else self.judged.lowest)
        self.judged.n_since = 0 if is_best else self.judged.n_since + 1
        self.judged.lowest = val_loss if is_best else self.judged.lowest
        self.val_loss = self.step, val_loss
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
        best = math.inf if self.judged.best is None else self.judged.best[1]
        if self.val_loss is not None and self.val_loss[0] == self.step and self.val_loss[1] < best:
            self.judged.best = self.val_loss
        known = asdict(self.judged)
        if self.saved == (self.step, known):
            return folder
        self.non_finite.check()
        self._check_weights()
        counters = {"step": self.step, "total_tokens": self.meter.total_tokens, "training_seconds": self.meter.all_seconds}
        counters |= {"validations": known, **self.same}
        with self.meter.paused():
            if self.saved is not None and self.saved[0] == self.step:  # it was stopped in the step's validation, which is done now
                with together(self.fabric):
                    if self.fabric.is_global_zero:
                        replace_counters(folder, counters)
            else:
                save_run_state(self.fabric, folder, self.model, self.optimizer, counters, self.side_files)
            self.saved = self.step, known
            self._point_links()
            if self.train.keep_last is not None and self.fabric.is_global_zero:
                try:
                    delete_old_steps(self.out_dir, self.train.keep_last, self._best(), self._is_of_this_run)
                except OSError as error:
                    self.progress.say(f"An old step could not be deleted: {error}")
        return folder

    def _check_weights(self) -> None:
        """Raise a UserError if what was learned is not finite, which a loss that tells it may be yet to come. All ranks must call this."""
        weights = {name: _held(parameter) for name, parameter in saved_parameters(self.model).items()}
        highest = {name: torch.linalg.vector_norm(weight, math.inf) for name, weight in weights.items() if weight.numel()}
        is_finite = torch.stack(list(highest.values())).isfinite().tolist() if highest else []
        bad = next((name for name, fine in zip(highest, is_finite, strict=True) if not fine), None)
        if self._any_rank(bad is not None):
            which = "a weight" if bad is None else f"the weight {bad!r}"
            raise UserError(f"After step {self.step} {which} is no longer finite. Lower `--optimizer.lr`, or clip with `train.max_norm`.")

    def _is_of_this_run(self, counters: Mapping[str, Any]) -> bool:
        step = counters.get("step")
        return isinstance(step, int) and step <= self.step and all(counters.get(name) == value for name, value in self.same.items())

    def _point_links(self) -> None:
        """Let `last` name the step that is done and `best` the best one, as far as these are in this run's folder."""
        if not self.fabric.is_global_zero or not self.links:
            return
        for name, folder in ((names.LAST, self._folder(self.step)), (names.BEST, self._best())):
            link = self.out_dir / name
            if folder is None and is_link(link):  # of steps after the one that the run went back to
                link.unlink()
            if folder is not None and folder.is_dir() and not set_link(link, folder):
                self.links = False
                self.progress.say(f"No link {link} could be made to {folder.name}; the steps themselves are whole.")
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

    def profiled(self, n_steps: int | None) -> AbstractContextManager[Callable[[], None]]:
        """Give what is to be called after each step; so many are recorded in `logs/trace.json`, from the third on."""
        return profiled(n_steps if self.fabric.is_global_zero else None, self.out_dir / "logs" / "trace.json")

    def note_answer(self, prompt: str, answer: str) -> None:
        """Show and log what the model, as it is now, answered to a prompt."""
        self.progress.say(f"{prompt}\n>>> {answer}")
        self.logs.tell(self.step, {"prompt": prompt, "answer": answer})
        self.answered = self.step

    def report(self, settings: Mapping[str, Any], facts: Mapping[str, str], final: Path, log: LogArgs) -> None:
        """Write `report.html`, and send the result where the logger sends the run, if the options say so."""
        if self.fabric.is_global_zero:
            self.logs.report(settings, {**facts, **summary(self.meter), "machine": device_name(self.fabric.device)})
            upload(self.fabric.logger, final, log)

    def _leave(self) -> NoReturn:
        """Save the step that is done and leave the program, as the system asked. All ranks call this."""
        folder = self.save() if self.step else None
        where = f"Its state is in {folder}: go on with `--resume true`." if folder else "Nothing was learned yet."
        self.progress.say(f"Stopped after step {self.step}, as asked. {where}")
        self.fabric.barrier()  # for the first rank points links, and whoever started the ranks ends all when one is gone
        raise SystemExit(128 + (self.stop.number or signal.SIGTERM))  # as the shell says it of a program that a signal ended

    def finish(self, final: Path, write: Callable[[dict[str, Tensor]], None]) -> None:
        """Write the result, and show what the run took. Should writing fail, the last step is saved, if the disk has room.

        Args:
            final: The folder that `write` makes.
            write: Makes it of the trained weights. Called on one rank.
        """
        self._check_weights()
        weights = self.trained_weights()
        give_back_memory()  # that of activations: the base is read once more beside the trained model
        try:
            with together(self.fabric):
                if self.fabric.is_global_zero:
                    write(weights)
        except (Exception, SystemExit):  # on ranks without an error the latter
            with suppress(UserError):  # the disk may have no room for it either
                self.progress.say(f"{final} could not be written. The training is saved in {self.save()}: go on with `--resume true`.")
            raise
        self.progress.say(f"{report(self.meter)}\nSaved {final}. Talk to it with: litgpt chat {shlex.quote(str(final))}")

    def trained_weights(self) -> dict[str, Tensor]:
        """Return what was trained, each parameter whole and on the CPU. All ranks must call this."""
        weights = {name: parameter.detach() for name, parameter in saved_parameters(self.model).items()}
        return {name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu() for name, weight in weights.items()}


def _held(parameter: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter."""
    weight = parameter.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight
