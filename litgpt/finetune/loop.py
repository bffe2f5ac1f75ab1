"""The finetuning script, whole. What differs between the ways to finetune is a `Method`; a file beside this one makes each of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor

from litgpt import names
from litgpt.args import EvalArgs, LogArgs, OptimizerArgs, TrainArgs, to_plain
from litgpt.checkpoint import copy_side_files, has_lora, load_model, refuse_adapter, write_config
from litgpt.config import Config
from litgpt.data import Alpaca, DataModule
from litgpt.data.packing import PackedSamples, Sample
from litgpt.errors import UserError
from litgpt.finetune.plan import make_plan, recomputed_blocks, stored_dtype
from litgpt.finetune.plan import text as plan_text
from litgpt.generate.decode import complete
from litgpt.generate.memory import compile_blocks
from litgpt.generate.run import stop_tokens
from litgpt.generate.sampling import RowState
from litgpt.hardware import find_device, parse_devices, peak_flops, products_dtype
from litgpt.launch import PRECISIONS, cast_parameters, check_alone, choose_logger, fits_each_device, launch_fabric, training_precision
from litgpt.loss import IGNORED
from litgpt.metrics import train_flops_per_token
from litgpt.model import GPT
from litgpt.optim import check_schedule, make_optimizer
from litgpt.prompts import PromptStyle, encode_prompt, save_prompt_style, save_stop_tokens
from litgpt.quantize import bytes_per_weight, check_quantize, quantize_model
from litgpt.run import Run
from litgpt.run_folder import check_room, run_folder, step_to_resume, write_options
from litgpt.run_inputs import check_finite, check_ids, counted, described, digest, fingerprint, prepared, sample_length
from litgpt.run_state import saved_precision
from litgpt.scripts.download import find_checkpoint
from litgpt.tokenizer import Tokenizer
from litgpt.training import Limits, check_limits, forward_backward, seed_generators

TRAIN = TrainArgs(save_interval=1000, log_interval=1, global_batch_size=16, micro_batch_size=1, epochs=5)
EVAL = EvalArgs(interval=100, max_new_tokens=100, max_iters=100)
LOG = LogArgs()
OPTIMIZER = OptimizerArgs()
UNSAVED = ("method", "access_token", "resume", "overwrite", "dry_run", "profile")  # options that make no difference to the result


@dataclass(frozen=True)
class Base:
    """The model that is finetuned, as it lies on the disk."""

    folder: Path
    config: Config
    dtype: torch.dtype  # of its weights


Extras = Callable[[Path], None]  # writes the run's own files into a folder: its options and its prompt style


@dataclass(frozen=True)
class Method:
    """What differs between the ways to finetune."""

    name: str
    """What is said about it: `Finetuning MODEL with NAME`."""
    freezes: bool
    """Whether parts of the model are not trained, which can then be held in fewer bits."""
    prepare: Callable[[GPT, int], None]
    """Freezes what is not trained and adds what is, starting from a seed."""
    write: Callable[[Path, dict[str, Tensor], Base, Extras], None]
    """Makes the checkpoint directory `final` of what was trained."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The flags that only this method has."""
    quantize: str | None = None
    """In how few bits the frozen layers are held, see `litgpt.quantize`."""
    lr_ratios: Mapping[str, float] = field(default_factory=dict)
    """By what the learning rate is multiplied, for parameters whose name contains a key."""


def finetune(
    method: Method,
    checkpoint_dir: Path,
    *,
    out_dir: Path,
    precision: str | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    cpu_offload: bool = False,
    compile: bool = False,
    resume: bool | Literal["auto"] | Path = False,
    overwrite: bool = False,
    data: DataModule | None = None,
    train: TrainArgs = TRAIN,
    eval: EvalArgs = EVAL,
    log: LogArgs = LOG,
    optimizer: OptimizerArgs = OPTIMIZER,
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    dry_run: bool = False,
    profile: int | None = None,
) -> None:
    """Finetune a model.

    Args:
        method: What is trained, and how it is saved.
        checkpoint_dir: The model to start from: a folder, a name in `checkpoints/`, or an `ORG/NAME` that is downloaded from the hub.
        out_dir: Where to write. `final/` becomes a complete Hugging Face folder, `step-N/` holds what a run needs to go on after
            step N, and `logs/` the logged values. A folder that already holds a run is refused.
        precision: The number types to train in: `32-true`, `bf16-mixed` (weights in fp32, products in bf16), `bf16-true` (weights in
            bf16; what is trained beside frozen ones stays in fp32), or on GPUs `16-mixed` and `16-true` (frozen weights in fp16). By
            default what this machine is fast in: fp32 where its processor does not multiply bf16.
        devices: How many devices to train on, or `auto` for all GPUs.
        num_nodes: How many machines take part.
        strategy: How several devices share the work: `ddp` (each holds the whole model), `fsdp` (each holds a slice of every weight), or
            `auto`: the first, if the training fits each of them.
        cpu_offload: Keep the slices of `fsdp` in the CPU's memory while they are not needed.
        compile: Compile the model's blocks one by one. The first steps take a minute more, the others less time and memory.
        resume: Go on with a run, bit for bit as if it had not been interrupted: `true` from the last step in `out_dir`, `auto` the
            same but starting anew if there is none, or the path of a step. Give the other flags as before.
        overwrite: Whether to delete the run that `out_dir` holds, and start over. What the run itself reads is never deleted.
        data: The samples to learn from. By default Alpaca, 52 thousand instructions with answers.
        train: Batch sizes, limits, schedule and intervals.
        eval: When and how to validate.
        log: Names and switches for loggers that send the run somewhere.
        optimizer: Which optimizer, and how fast.
        logger_name: Where to log: `csv` and `tensorboard` write into `out_dir/logs`; the others send the run to their service.
        seed: Decides the order of the samples, what is dropped out, and the start of what is added to the model.
        access_token: A token of the Hugging Face hub, for models that are not open to everyone.
        dry_run: Say how many steps the run has, what memory it takes and what would save some, and train nothing.
        profile: Record so many steps, from the third on, and write `logs/trace.json` for https://ui.perfetto.dev.
    """
    hyperparameters = options_of(locals())
    check_options(method, train, eval, optimizer, devices, profile)
    out_dir = run_folder(out_dir)
    resumed = None if dry_run else step_to_resume(out_dir, resume, overwrite)
    precision = training_precision(precision or saved_precision(resumed), any_frozen=method.freezes)
    folder = find_base(checkpoint_dir, access_token, needs_weights=not dry_run)
    hyperparameters |= method.options | {"checkpoint_dir": str(folder), "precision": precision}
    config, data = Config.from_checkpoint(folder), data or Alpaca()
    fits = fits_each_device(config, method.freezes, precision, devices, num_nodes, bytes_per_weight(method.quantize))
    if dry_run:
        check_alone("dry_run")
        is_sharded = strategy == "fsdp" or (strategy == "auto" and not fits)
        shares = dict(n_local=parse_devices(devices), num_nodes=num_nodes, is_sharded=is_sharded, offloads=cpu_offload)
        print(plan_of(method, folder, config, data, train, optimizer, precision, seed, **shares))
        return
    if resumed is None:
        check_room(out_dir, data, folder)

    logger = choose_logger(logger_name, out_dir, f"finetune-{folder.name}", log)
    layout = dict(strategy=strategy, cpu_offload=cpu_offload, precision=precision, fits_one_device=fits, loggers=logger)
    fabric = launch_fabric(devices, num_nodes, **layout)
    seed_generators(fabric, seed)
    tokenizer = Tokenizer(folder)
    samples, val_samples = read_samples(fabric, data, tokenizer, config, train)
    check_judged(eval, val_samples)
    limits = Limits.of(train, len(samples), mean_inputs(samples))
    shown = samples_to_show(samples, val_samples, eval)

    n_recomputed = recomputed_blocks(method, config, samples, train, precision, seed, fabric.world_size)
    model, base, initial = prepared_model(method, folder, train, precision, seed, fabric.device)
    model.n_recomputed = n_recomputed
    size, flops = described(model, precision), flops_per_token(model, samples)
    if compile:
        compile_blocks(model, dynamic=None)  # the first steps show which lengths differ
    model = fabric.setup_module(model.train())
    torch_optimizer = fabric.setup_optimizers(make_optimizer(optimizer, model, method.lr_ratios))

    extras = partial(write_extras, hyperparameters=hyperparameters, style=getattr(samples, "prompt_style", None), tokenizer=tokenizer)
    side_files = partial(write_side_files, base=base, extras=extras)
    same = what_decides(method, train, samples, seed) | {"fingerprint of the base model": initial}
    same |= {"optimizer.name": optimizer.name, "optimizer.state": optimizer.state, "precision": precision}
    run = Run(fabric, model, torch_optimizer, out_dir, train, optimizer.lr, limits, same, side_files, eval.patience)
    run.meter.flops_per_token, run.meter.peak_flops = flops, peak_of_all(fabric, precision)
    with run:
        run.progress.say(f"Finetuning {base.config.name} with {method.name}: {size}, {counted(len(samples), 'sample')}.")
        run.begin(resumed, hyperparameters)
        fit(run, samples, val_samples, eval, seed, partial(say_answer, run, tokenizer, shown, eval) if shown else None, profile)
        run.finish(out_dir / names.FINAL, lambda weights: method.write(out_dir / names.FINAL, weights, base, extras))
        facts = {"model": base.config.name, "method": method.name, "trained": size, "samples": f"{len(samples):,}"}
        run.report(hyperparameters, facts, out_dir / names.FINAL, log)


def fit(
    run: Run,
    samples: Sequence[Sample],
    val_samples: Sequence[Sample],
    eval: EvalArgs,
    seed: int,
    show_example: Callable[[], None] | None,
    profile: int | None = None,
) -> None:
    """Train until a limit is reached."""
    train = run.train
    if run.judged.owed or (eval.initial_validation and run.step == 0):
        run.validate(val_samples, eval)
    if show_example is not None and (run.judged.unanswered or run.step == 0):
        show_example()

    feed = run.feed(samples, seed)
    with run.profiled(profile) as step_done:
        for epoch, microbatches, agreed in feed:
            loss = forward_backward(run.fabric, run.model, microbatches, agreed.n_targets)
            grad_norm = run.take_step(agreed, loss)

            if run.step % train.log_interval == 0:
                run.log(loss, grad_norm, epoch)  # the only line that waits for the device
            if run.step % eval.interval == 0:
                run.judged.unanswered = show_example is not None
                run.validate(val_samples, eval)
                if show_example is not None:
                    show_example()
            if train.save_interval and run.step % train.save_interval == 0:
                run.save()
            step_done()
            if run.is_over():
                break
    run.end(feed)

    if eval.final_validation:
        run.validate(val_samples)
    if show_example is not None and run.step % eval.interval:
        show_example()


def check_options(
    method: Method, train: TrainArgs, eval: EvalArgs, optimizer: OptimizerArgs, devices: int | str, profile: int | None
) -> None:
    """Raise a UserError for options that contradict each other, this script or this machine; better known before anything is read."""
    check_limits(train, eval)
    check_schedule(train, optimizer.lr)
    parse_devices(devices)
    check_quantize(method.quantize, find_device())
    if train.global_batch_size is None:
        raise UserError("`train.global_batch_size` is a number of samples, but got null. Only pretraining chooses one itself.")
    if profile is not None and profile < 1:
        raise UserError(f"`profile` is how many steps to record, but got {profile}. Give a positive number, or leave it out.")


def plan_of(
    method: Method,
    folder: Path,
    config: Config,
    data: DataModule,
    train: TrainArgs,
    optimizer: OptimizerArgs,
    precision: str,
    seed: int,
    n_local: int,
    num_nodes: int,
    is_sharded: bool,
    offloads: bool,
) -> str:
    """Return what a run would do and take, as text, after reading its data, but none of the model's weights."""
    fabric = launch_fabric(precision=precision)
    samples, _ = read_samples(fabric, data, Tokenizer(folder), config, train)
    limits = Limits.of(train, len(samples), mean_inputs(samples))
    how = dict(seed=seed, n_devices=n_local * num_nodes, n_local=n_local, is_sharded=is_sharded, offloads=offloads)
    how["stored"] = stored_dtype(folder)
    return plan_text(make_plan(method, config, samples, train, optimizer, precision, limits, **how))


def find_base(checkpoint_dir: Path, access_token: str | None, needs_weights: bool) -> Path:
    """Return the folder of the model to finetune."""
    folder = find_checkpoint(checkpoint_dir, access_token=access_token, needs_weights=needs_weights)
    if has_lora(folder):
        raise UserError(f"{folder} holds the updates of a model, not a model. Merge them first: litgpt merge_lora {folder}")
    refuse_adapter(folder)
    return folder.absolute()  # what is written names it, and may be read from elsewhere


def prepared_model(
    method: Method, folder: Path, train: TrainArgs, precision: str, seed: int, device: torch.device
) -> tuple[GPT, Base, str]:
    """Return the model with what the method trains of it, where it came from, and what identifies its weights."""
    model = load_model(folder)
    check_finite(model, folder)
    base, initial = Base(folder, model.config, model.transformer.wte.weight.dtype), fingerprint(model)
    check_architecture(train, base.config)
    if method.quantize is not None:
        quantize_model(model, method.quantize, PRECISIONS[precision].frozen, device)
    method.prepare(model, seed)
    cast_parameters(model, precision)
    model.expert_balance = train.expert_balance or 0.0
    return model, base, initial


def what_decides(method: Method, train: TrainArgs, samples: Sequence[Sample], seed: int) -> dict[str, Any]:
    """Return what a resumed run must have in common with the one before."""
    return {
        "seed": seed,
        "train.global_batch_size": train.global_batch_size,
        "samples": len(samples),
        "digest of the samples": digest(samples),
        **method.options,
    }


def read_samples(
    fabric: Fabric, data: DataModule, tokenizer: Tokenizer, config: Config, train: TrainArgs
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Return the samples to train on and those to validate on, cut to what the model can read."""
    data.ignore_index = IGNORED  # the label that our loss leaves out
    data.connect(tokenizer, train.micro_batch_size, sample_length(train, config))
    samples, val_samples = prepared(fabric, data)
    if len(samples) and not (isinstance(samples[0], Mapping) and {"input_ids", "labels"} <= samples[0].keys()):
        raise UserError(f"{type(data).__name__} has no answers to learn, as finetuning needs. Use `--data JSON`, or `litgpt pretrain`.")
    check_ids(config, samples, val_samples)
    if train.packing == "global":
        samples = PackedSamples(samples, train.max_seq_length)
    return samples, val_samples


def check_judged(eval: EvalArgs, val_samples: Sequence[Sample]) -> None:
    """Raise a UserError if the run is to be judged by samples that it does not have."""
    if not len(val_samples) and (eval.save_best or eval.patience is not None):
        raise UserError(
            "`eval.save_best` and `eval.patience` need samples to validate on, but there are none. "
            "Set `--data.val_split_fraction`, or leave them out."
        )


def mean_length(samples: Sequence[Sample], n_seen: int = 1000) -> float:
    """Return how many tokens a sample has on average, after the first ones."""
    lengths = getattr(samples, "lengths", None) or [len(samples[i]["input_ids"]) for i in range(min(len(samples), n_seen))]
    return sum(lengths) / max(1, len(lengths))


def mean_inputs(samples: Sequence[Sample]) -> float:
    """Return how many tokens of a sample go into the model on average: all but the last one of each text."""
    rows = getattr(samples, "rows", None)  # of packed texts
    return max(1.0, mean_length(samples) - (1 if rows is None else sum(map(len, rows)) / len(rows)))


def flops_per_token(model: GPT, samples: Sequence[Sample]) -> float:
    """Return how many operations a token of a sample takes on average, for which long samples count more."""
    samples = getattr(samples, "samples", samples)  # of packed rows
    if not (lengths := getattr(samples, "lengths", None)):
        return train_flops_per_token(model, mean_length(samples))
    n_targets, total = getattr(samples, "n_targets", None), sum(lengths)
    return train_flops_per_token(model, sum(n * n for n in lengths) / total, 1.0 if n_targets is None else sum(n_targets) / total)


def peak_of_all(fabric: Fabric, precision: str) -> float | None:
    """Return how many operations a second all devices together can do, or None if that is not known."""
    peak = peak_flops(products_dtype(precision), fabric.device)
    return None if peak is None else peak * fabric.world_size


def check_architecture(train: TrainArgs, config: Config) -> None:
    """Raise a UserError if the options ask for another model than the one that is finetuned."""
    if train.expert_balance and not config.n_expert:
        raise UserError("`train.expert_balance` is for models with experts, but this one has none. Leave it out.")
    if train.tie_embeddings not in (None, config.tie_embeddings):
        raise UserError(
            f"`train.tie_embeddings` is {train.tie_embeddings}, but the model is built the other way. Leave it out in finetuning."
        )


def samples_to_show(samples: Sequence[Sample], val_samples: Sequence[Sample], eval: EvalArgs) -> Sequence[Sample] | None:
    """Return the samples whose instructions example answers are shown for, or None if none are to be shown."""
    shown = val_samples if len(val_samples) else samples
    if eval.max_new_tokens is None or not hasattr(shown, "example"):  # a data set of the user's own
        return None
    example_index(shown, eval, step=0)  # checks it now, not after an hour
    return shown


def example_index(samples: Sequence[Sample], eval: EvalArgs, step: int) -> int:
    """Return which record the example answer after a step is for."""
    n, wanted = len(samples.data), eval.evaluate_example
    index = {"first": 0, "random": Random(step).randrange(n)}.get(wanted, wanted)
    if not 0 <= int(index) < n:
        raise UserError(
            f"`eval.evaluate_example` is {wanted!r}, but the data has {counted(n, 'sample')}. Use 'first', 'random' or a number below that."
        )
    return int(index)


def say_answer(run: Run, tokenizer: Tokenizer, samples: Sequence[Sample], eval: EvalArgs) -> None:
    """Show and log what the model, as it is now, answers to a sample's instruction. All ranks must call this."""
    if run.answered == run.step:  # at once when it was resumed
        return
    run.judged.unanswered = bool(run.step)  # until it is told
    model, i = run.model.module, example_index(samples, eval, run.step)
    messages, _ = samples.example(i)
    style = samples.style_of(i) if hasattr(samples, "style_of") else samples.prompt_style  # sets of the user's own have one for all
    prompt = encode_prompt(style, tokenizer, messages)
    if len(prompt) >= model.config.block_size:
        run.progress.say("No example is shown, for its prompt fills the model's context.")
        run.judged.unanswered = False
        return
    with run.meter.paused():
        model.eval()
        try:
            with torch.no_grad():  # FSDP2 makes its buffers in the first pass; training cannot use what is made in inference mode
                model(torch.zeros(1, 1, dtype=torch.int64, device=run.fabric.device))
            row = RowState(temperature=0.8, seed=run.step)  # its own generator, so that training goes on as if nothing had been drawn
            answer = run.unless_stopped(complete(model, prompt, row, eval.max_new_tokens, stop_tokens(style, tokenizer)))
            tokens = [token for new in answer for token in new]
        finally:
            model.train()
        run.note_answer(messages[-1]["content"], tokenizer.decode(tokens))
        run.judged.unanswered = False


# What is written


def options_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `finetune` as `hyperparameters.yaml` holds them, and `--config` reads them."""
    return to_plain({name: value for name, value in arguments.items() if name not in UNSAVED})


def write_extras(folder: Path, hyperparameters: Mapping[str, Any], style: PromptStyle | None, tokenizer: Tokenizer) -> None:
    """Write the run's options, the prompt style it was trained with, and what ends an answer in it."""
    write_options(folder, hyperparameters)
    if style is not None:
        save_prompt_style(style, folder)
        save_stop_tokens(style, tokenizer, folder)


def write_side_files(folder: Path, base: Base, extras: Extras) -> None:
    """Write what makes a step's folder a checkpoint directory: config, tokenizer, prompt style, options."""
    write_config(folder, base.config, base.folder, base.dtype)
    copy_side_files(base.folder, folder)
    extras(folder)
