"""The pretraining script, whole: train a model from scratch on tokens of text, or on from a checkpoint."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from litgpt import names
from litgpt.args import EvalArgs, LogArgs, OptimizerArgs, TrainArgs, to_plain
from litgpt.checkpoint import copy_side_files, load_model, read_hyperparameters, refuse_adapter, write_checkpoint, write_config
from litgpt.config import Config, listing
from litgpt.data import DataModule
from litgpt.data.base import highest_id
from litgpt.errors import UserError
from litgpt.launch import PRECISIONS, cast_parameters, choose_logger, fits_each_device, launch_fabric, training_precision
from litgpt.lora import seed_of
from litgpt.model import GPT
from litgpt.optim import check_schedule, make_optimizer
from litgpt.run import Run
from litgpt.run_folder import check_room, run_folder, step_to_resume, write_options
from litgpt.run_inputs import check_finite, check_ids, counted, described, digest, fingerprint, prepared, sample_length
from litgpt.run_state import saved_counters, saved_precision
from litgpt.scripts.download import find_checkpoint
from litgpt.tokenizer import Tokenizer
from litgpt.training import Limits, Sample, check_limits, data_share, forward_backward, seed_generators

EXPERT_BALANCE = 0.001  # as Mixtral and Qwen's models were trained
TRAIN = TrainArgs(save_interval=1000, log_interval=1, global_batch_size=None, micro_batch_size=4, max_norm=1.0)
EVAL = EvalArgs(interval=1000, max_iters=100)
LOG = LogArgs()
OPTIMIZER = OptimizerArgs(lr=None, weight_decay=0.1)

SAYS_NOTHING = {"name", "hf_config", "family", "vocab_size", "padded_vocab_size", "padding_multiple", "block_size"}  # of an architecture

N_STEPS = 500  # how many steps a run should have at least, before a larger batch pays
MAX_BATCH = 512  # samples


def setup(
    model_name: str,
    *,
    model_config: Config | None = None,
    out_dir: Path = Path("out/pretrain"),
    precision: str | None = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    overwrite: bool = False,
    data: DataModule | None = None,
    train: TrainArgs = TRAIN,
    eval: EvalArgs = EVAL,
    log: LogArgs = LOG,
    optimizer: OptimizerArgs = OPTIMIZER,
    devices: int | str = "auto",
    num_nodes: int = 1,
    tokenizer_dir: Path | None = None,
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = "tensorboard",
    seed: int = 42,
) -> None:
    """Train a model to predict the next token of texts: a new one, or, with `--initial_checkpoint_dir`, one that was trained before.

    The data is gone through again and again until a limit is reached (`train.max_tokens`, `max_steps`, `epochs` or `max_time`), or
    once if none is set. Where they are not set, the batch size and the learning rate follow from the size of the data and the model.

    Args:
        model_name: The architecture of a new model: a known name such as `EleutherAI/pythia-160m`, or `list` to show them all.
        model_config: The architecture as a YAML file or a mapping of `Config`'s fields, in place of that of the name.
        out_dir: Where to write. `final/` becomes a complete Hugging Face folder, `step-N/` holds what a run needs to go on after
            step N, and `logs/` the logged values. A folder that already holds a run is refused.
        precision: The number types to train in: `32-true`, `bf16-mixed` (weights in fp32, products in bf16), `bf16-true` (all in
            bf16) or `16-mixed` (GPUs only). By default `bf16-mixed` where the hardware multiplies bf16, else `32-true`.
        initial_checkpoint_dir: The checkpoint to train on from. Its architecture is kept, also if the name is that of another.
        resume: Go on with a run, bit for bit as if it had not been interrupted: `true` from the last step in `out_dir`, `auto` the
            same but starting anew if there is none, or the path of a step. Give the other flags as before.
        overwrite: Whether to delete the run that `out_dir` holds, and start over. What the run itself reads is never deleted.
        data: The texts to learn from, such as `TextFiles` with `--data.train_data_path FOLDER`.
        train: Batch sizes, limits, schedule and intervals.
        eval: When and how to validate.
        log: Names and switches for loggers that send the run somewhere.
        optimizer: Which optimizer, and how fast. By default the rate is 6e-4 for a width of 768 and falls as models grow wider; a
            tenth of that to train on from a checkpoint.
        devices: How many devices to train on, or `auto` for all GPUs.
        num_nodes: How many machines take part.
        tokenizer_dir: The folder or name of the tokenizer. By default that of the initial checkpoint.
        logger_name: Where to log: `csv` and `tensorboard` write into `out_dir/logs`; the others send the run to their service.
        seed: Decides the order of the texts, and the weights that a new model starts with.
    """
    if model_name == "list":
        print(listing(grouped=sys.stdout.isatty()))
        return
    given = {name: value for name, value in locals().items() if name not in ("resume", "overwrite")}
    check_options(train, eval, model_config, initial_checkpoint_dir, data)
    out_dir = run_folder(out_dir)
    resumed = step_to_resume(out_dir, resume, overwrite)
    precision = training_precision(precision or saved_precision(resumed), any_frozen=False)
    if resumed is not None and initial_checkpoint_dir is None:
        initial_checkpoint_dir = read_hyperparameters(resumed).get("initial_checkpoint_dir")
    origin = find_origin(model_name, model_config, initial_checkpoint_dir, tokenizer_dir, train)
    if resumed is None:
        check_room(out_dir, data, origin.folder, origin.tokenizer_dir)

    logger = choose_logger(logger_name, out_dir, f"pretrain-{origin.config.name}", log)
    fits = fits_each_device(origin.config, False, precision, devices, num_nodes)
    fabric = launch_fabric(devices, num_nodes, precision=precision, fits_one_device=fits, loggers=logger)
    seed_generators(fabric, seed)
    origin = with_vocabulary(origin, said=fabric.print if model_config is not None else None)
    samples, val_samples = read_samples(fabric, data, origin, train)
    length = len(samples[0]) - 1  # targets of one sample
    if resumed is not None and train.global_batch_size is None:  # what was chosen then, for another limit would choose another
        chosen = saved_counters(resumed).get("train.global_batch_size")
        train = replace(train, global_batch_size=chosen if isinstance(chosen, int) and chosen > 0 else None)
    train = with_batch_size(train, len(samples), length, data_share(fabric)[1])
    limits = Limits.of(train, len(samples), length)
    optimizer = replace(optimizer, lr=peak_learning_rate(origin) if optimizer.lr is None else optimizer.lr)
    check_schedule(train, optimizer.lr)
    hyperparameters = to_plain(given | {"train": train, "optimizer": optimizer, "precision": precision})

    model = origin.model(seed)
    if origin.folder is not None:
        check_finite(model, origin.folder)
    model.expert_balance = EXPERT_BALANCE if train.expert_balance is None else train.expert_balance
    model.n_recomputed = model.config.n_layer if train.activation_checkpointing == "full" else 0
    base = fingerprint(model) if origin.folder is not None else None
    dtype = written_dtype(model, origin, precision)
    cast_parameters(model, precision)
    size = described(model, precision)
    model = fabric.setup_module(model.train())
    torch_optimizer = fabric.setup_optimizers(make_optimizer(optimizer, model))

    side_files = partial(write_side_files, origin=origin, dtype=dtype, hyperparameters=hyperparameters)
    same = {"seed": seed, "train.global_batch_size": train.global_batch_size, "samples": len(samples), "tokens of a sample": length}
    same |= {"digest of the samples": digest(samples), "optimizer.name": optimizer.name}
    same |= {"optimizer.state": optimizer.state, "precision": precision}
    same |= {"fingerprint of the initial weights": base}
    with Run(fabric, model, torch_optimizer, out_dir, train, optimizer.lr, limits, same, side_files, eval.patience) as run:
        batch = f"{train.global_batch_size:,} of {counted(len(samples), 'sample')} of {counted(length, 'token')} in a step"
        run.progress.say(f"Pretraining {origin.config.name}: {size}, {batch}.")
        if origin.config.family is None:
            run.progress.say("No architecture of Hugging Face's can express this model, so only this library will be able to use it.")
        run.begin(resumed, hyperparameters)
        fit(run, samples, val_samples, eval, seed)
        run.finish(out_dir / names.FINAL, lambda weights: write_final(out_dir / names.FINAL, weights, origin, dtype, hyperparameters))
        facts = {"model": origin.config.name, "trained": size, "samples": f"{len(samples):,}"}
        run.report(hyperparameters, facts, out_dir / names.FINAL, log)


def fit(run: Run, samples: Sequence[Sample], val_samples: Sequence[Sample], eval: EvalArgs, seed: int) -> None:
    """Train until a limit is reached."""
    train = run.train
    if run.judged.owed or (eval.initial_validation and run.step == 0):
        run.validate(val_samples, eval)

    feed = run.feed(samples, seed)
    for epoch, microbatches, agreed in feed:
        loss = forward_backward(run.fabric, run.model, microbatches, agreed.n_targets)
        grad_norm = run.take_step(agreed, loss)

        if run.step % train.log_interval == 0:
            run.log(loss, grad_norm, epoch)  # the only line that waits for the device
        if run.step % eval.interval == 0:
            run.validate(val_samples, eval)
        if train.save_interval and run.step % train.save_interval == 0:
            run.save()
        if run.is_over():
            break
    run.end(feed)

    if eval.final_validation:
        run.validate(val_samples)


# What is trained


@dataclass(frozen=True)
class Origin:
    """What a run begins with."""

    config: Config
    folder: Path | None  # of the weights; None for a new model
    tokenizer_dir: Path | None

    @property
    def source(self) -> Path | None:
        """The folder whose `config.json` and side files are carried over."""
        return self.folder or self.tokenizer_dir

    def model(self, seed: int) -> GPT:
        """Return the model to begin with."""
        return load_model(self.folder) if self.folder is not None else new_model(self.config, seed)


def check_options(
    train: TrainArgs, eval: EvalArgs, model_config: Config | None, initial_checkpoint_dir: Path | None, data: DataModule | None
) -> None:
    """Raise a UserError for options that contradict each other or cannot be followed."""
    check_limits(train, eval)
    if model_config is not None and initial_checkpoint_dir is not None:
        raise UserError("`model_config` describes a new model, and `initial_checkpoint_dir` keeps its own architecture. Give one of them.")
    if train.packing == "global":
        raise UserError("`train.packing` global is for finetuning; texts to pretrain on fill their rows anyway. Leave it out.")
    if not isinstance(train.activation_checkpointing, str):
        raise UserError("`train.activation_checkpointing` is 'none' or 'full' in pretraining; a budget in GB is for finetuning.")
    if eval.max_new_tokens is not None:
        raise UserError("`eval.max_new_tokens` is for the example answers of finetuning; pretraining shows none. Leave it out.")
    if data is None:
        raise UserError("Nothing says what to learn from. Give `--data TextFiles --data.train_data_path FOLDER`, a folder with .txt files.")


def find_origin(
    model_name: str, model_config: Config | None, initial_checkpoint_dir: Path | None, tokenizer_dir: Path | None, train: TrainArgs
) -> Origin:
    """Return what the options say that a run begins with."""
    folder = find_checkpoint(initial_checkpoint_dir, needs_tokenizer=tokenizer_dir is None) if initial_checkpoint_dir is not None else None
    if folder is not None:
        refuse_adapter(folder)
        config = Config.from_checkpoint(folder)
        check_name(model_name, config, folder)
        if train.tie_embeddings not in (None, config.tie_embeddings):
            raise UserError(f"`train.tie_embeddings` is {train.tie_embeddings}, but {folder} is built the other way. Leave it out.")
    else:
        config = model_config or Config.from_name(model_name)
        config.check_family()
        config = config if config.name else replace(config, name=model_name)
        if train.tie_embeddings is not None:
            config = replace(config, tie_embeddings=train.tie_embeddings)
    return Origin(config, folder, folder if tokenizer_dir is None else find_checkpoint(tokenizer_dir, tokenizer_only=True))


def check_name(model_name: str, config: Config, folder: Path) -> None:
    """Raise a UserError if the name beside an initial checkpoint is not known; say so if it is that of another architecture."""
    own = (config.name, folder.name, str(folder), "/".join(folder.absolute().parts[-2:]))
    if model_name in own:
        return
    named = Config.from_name(model_name)
    if any(getattr(named, field.name) != getattr(config, field.name) for field in fields(Config) if field.name not in SAYS_NOTHING):
        print(f"The architecture is that of the model in {folder}, which is not the one called {model_name!r}.", file=sys.stderr)


def with_vocabulary(origin: Origin, said: Callable[[str], None] | None) -> Origin:
    """Return what a run begins with, whose config knows as many tokens as its tokenizer.

    Args:
        origin: What the run begins with.
        said: Told if `vocab_size` was smaller; None where nobody chose that number.

    Raises:
        UserError: The model has not as many embeddings.
    """
    config = origin.config
    if origin.tokenizer_dir is None or (n_tokens := highest_id(Tokenizer(origin.tokenizer_dir)) + 1) <= config.vocab_size:
        return origin
    if n_tokens > config.padded_vocab_size:
        sizes = f"{counted(n_tokens, 'token')}, but the model {config.name} only {config.padded_vocab_size}"
        raise UserError(f"The tokenizer in {origin.tokenizer_dir} knows {sizes}. Take the model's own, or a larger `vocab_size`.")
    if said is not None:
        said(f"`vocab_size` is raised from {config.vocab_size} to {n_tokens}, which is how many tokens the tokenizer knows.")
    return replace(origin, config=replace(config, vocab_size=n_tokens))


def new_model(config: Config, seed: int) -> GPT:
    """Return a model that nothing was taught yet, the same on every machine.

    As in GPT-NeoX-20B (arXiv:2204.06745): weights are normal with variance 2 / (5 C), but those that write into the residual stream
    have the deviation 1 / (L sqrt(C)), for C features and L layers, so that the stream does not grow with depth.
    """
    model = GPT(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            writes = name.endswith(".proj")
            std = 1 / (config.n_layer * math.sqrt(config.n_embd)) if writes else math.sqrt(2 / (5 * config.n_embd))
            nn.init.normal_(module.weight, std=std, generator=torch.Generator().manual_seed(seed_of(seed, name)))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    return model


# What suits the data and the model


def read_samples(fabric: Fabric, data: DataModule, origin: Origin, train: TrainArgs) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return the samples to train on and those to validate on, each with one token more than it has targets."""
    config = origin.config
    tokenizer = Tokenizer(origin.tokenizer_dir) if origin.tokenizer_dir is not None else None
    data.connect(tokenizer, train.micro_batch_size, sample_length(train, config))
    samples, val_samples = prepared(fabric, data)
    if len(samples) == 0:
        raise UserError("There is not enough text for a single sample. Add more, or lower `train.max_seq_length`.")
    if not (isinstance(samples[0], Tensor) and samples[0].ndim == 1):
        raise UserError(
            f"{type(data).__name__} holds instructions, but pretraining reads text. Use `--data TextFiles`, or `litgpt finetune`."
        )
    check_ids(config, samples, val_samples)
    return samples, val_samples


def with_batch_size(train: TrainArgs, n_samples: int, length: int, n_shares: int) -> TrainArgs:
    """Return the options with what they leave open: once through the data, in enough steps to learn, as large as that allows."""
    if all(limit is None for limit in (train.epochs, train.max_steps, train.max_tokens, train.max_time)):
        train = replace(train, epochs=1)
    if train.global_batch_size is not None:
        return train
    n_seen = n_samples * (train.epochs or 1) if train.max_tokens is None else math.ceil(train.max_tokens / length)
    size = min(MAX_BATCH, max(1, n_seen // N_STEPS))
    return replace(train, global_batch_size=max(n_shares, 2 ** int(math.log2(size))))


def peak_learning_rate(origin: Origin) -> float:
    """Return a rate that suits a model of this width, as those of Pythia's models (arXiv:2304.01373, table 6) roughly do."""
    from_scratch = min(2e-3, 6e-4 * 768 / origin.config.n_embd)
    return from_scratch if origin.folder is None else from_scratch / 10


# What is written


def written_dtype(model: GPT, origin: Origin, precision: str) -> torch.dtype:
    """Return the dtype of the weights in `final`: that of the weights the run begins with, or, of a new model, that of the training."""
    return PRECISIONS[precision].frozen if origin.folder is None else model.transformer.wte.weight.dtype


def write_final(folder: Path, weights: dict[str, Tensor], origin: Origin, dtype: torch.dtype, hyperparameters: dict[str, Any]) -> None:
    """Make a Hugging Face folder of the trained weights."""
    extras = partial(write_extras, origin=origin, hyperparameters=hyperparameters)
    write_checkpoint(folder, weights, origin.config, source=origin.source, dtype=dtype, extras=extras, overwrite=True)


def write_extras(folder: Path, origin: Origin, hyperparameters: dict[str, Any]) -> None:
    """Write the run's options, and the tokenizer it used."""
    write_options(folder, hyperparameters)
    if origin.tokenizer_dir not in (None, origin.source):
        for name in names.TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
        copy_side_files(origin.tokenizer_dir, folder)


def write_side_files(folder: Path, origin: Origin, dtype: torch.dtype, hyperparameters: dict[str, Any]) -> None:
    """Write what makes a step's folder a checkpoint directory: config, tokenizer, options."""
    write_config(folder, origin.config, origin.source, dtype)
    if origin.source is not None:
        copy_side_files(origin.source, folder)
    write_extras(folder, origin, hyperparameters)
